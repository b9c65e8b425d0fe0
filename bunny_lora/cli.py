"""The `bunny-lora` command: thin doors to the library."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bunny_lora import __version__
from bunny_lora.arguments import of_export, of_generate, of_sweep, of_watch, with_config
from bunny_lora.config import json_schema
from bunny_lora.core import ranks
from bunny_lora.core.interrupts import StoppedError
from bunny_lora.core.paths import new, relative, typed, typed_or_name
from bunny_lora.errors import BunnyLoraError, FollowerError, LostProcessError
from bunny_lora.session import models_of, open_config
from bunny_lora.world.cli import add_world

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


AS_TRAINED = ("lora_scale", 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0, or 2 with a message and no traceback for a user's mistake.

    A run that was stopped returns 128 + the signal's number, as a shell does: 130 or 143.
    """
    _never_die_of_a_letter()
    try:
        options = build_parser().parse_args(arguments)
        with ranks.quiet_unless_main():
            options.run(options)
    except FollowerError:
        return 2
    except StoppedError as stop:
        if ranks.is_main_process():
            print(f"bunny-lora: {stop}", file=sys.stderr)
        return stop.exit_code
    except LostProcessError as error:
        print(f"bunny-lora: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # An ordinary end would wait for the connections to what is gone.
    except BunnyLoraError as error:
        print(f"bunny-lora: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bunny-lora: stopped; the checkpoints written so far are whole.", file=sys.stderr)
        return 130
    return 0


def _never_die_of_a_letter() -> None:
    """Write what the terminal's encoding lacks as Python's escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="bunny-lora", description=__doc__)
    parser.add_argument("--version", action="version", version=f"bunny-lora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    prepare = with_config(commands.add_parser("prepare", help="write training data from a source"))
    prepare.add_argument(
        "--source", type=typed_or_name, help="a stage-4 run, a folder of images, or auto"
    )
    prepare.add_argument("--overwrite", action="store_true", help="replace data edited by hand")
    prepare.set_defaults(run=_prepare)

    train = with_config(commands.add_parser("train", help="train LoRA, or go on with a run"))
    train.add_argument("--max-steps", type=int, help="training.max_train_steps")
    train.add_argument("--output-dir", type=typed, help="the run's folder")
    train.add_argument(
        "--resume",
        type=typed_or_name,
        help="auto, never, a checkpoint's step, name or path",
    )
    train.set_defaults(run=_train)

    plan = with_config(commands.add_parser("plan", help="what a run will take, by a little of it"))
    plan.add_argument("--hours", type=float, help="those that there are: more is no-go")
    plan.set_defaults(run=_plan)

    evaluate = with_config(commands.add_parser("evaluate", help="compare a run with its base model"))
    evaluate.add_argument("--output-dir", type=typed, help="the run's folder")
    evaluate.set_defaults(run=_evaluate)

    choose = with_config(
        commands.add_parser("choose", help="choose a run's checkpoint, LoRA scale and guidance")
    )
    choose.add_argument("run_dir", nargs="?", type=typed, help="the run's folder; default: output_dir")
    choose.set_defaults(run=_choose)

    watch = of_watch(
        commands.add_parser("watch", help="look at runs while they work, and ask them to stop")
    )
    watch.set_defaults(run=_watch)

    report = commands.add_parser("report", help="write a run, or several side by side, as one page")
    report.add_argument("runs", nargs="*", type=typed, help="folders; default: output_dir")
    report.add_argument("--out", "--output", type=new, help="default: report.html in the run's folder")
    report.set_defaults(run=_report)

    config = with_config(commands.add_parser("config", help="print the configuration, key by key"))
    config.add_argument(
        "--schema", action="store_true", help="print the JSON Schema of the file instead"
    )
    config.set_defaults(run=_config)
    download = with_config(commands.add_parser("download", help="fetch models from the hub"))
    download.add_argument(
        "model",
        nargs="?",
        type=typed_or_name,
        help="owner/name, or owner/name@revision; default: all that the configuration names",
    )
    download.set_defaults(run=_download)
    generate = of_generate(commands.add_parser("generate", help="draw pictures with trained weights"))
    generate.set_defaults(run=_generate)
    export = of_export(commands.add_parser("export", help="write trained weights for other programs"))
    export.set_defaults(run=_export)
    sweep = of_sweep(commands.add_parser("sweep", help="train and evaluate over a grid of settings"))
    sweep.set_defaults(run=_sweep)
    add_world(commands.add_parser("world", help="Bunny World: a cartoon film to try things on"))
    return parser


def _prepare(options: argparse.Namespace) -> None:
    from bunny_lora import report
    from bunny_lora.prepare import prepare_data

    config = open_config(options.config, settings=options.set, source=options.source)
    print(report.dropped_text(prepare_data(config, overwrite=options.overwrite)))
    print(report.weak_spots_text(config))


def _train(options: argparse.Namespace) -> None:
    from bunny_lora.trainer import LoRATrainer

    named = {name: getattr(options, name) for name in ("max_steps", "output_dir", "resume")}
    LoRATrainer(config=open_config(options.config, settings=options.set, **named)).train()


def _watch(options: argparse.Namespace) -> None:
    from bunny_lora import report, watch

    runs = options.runs or report.working_runs()
    if options.ask:
        watch.ask(runs, options.ask)
    watch.watch(runs, once=options.once)


def _plan(options: argparse.Namespace) -> None:
    from bunny_lora.trainer import LoRATrainer

    plan = LoRATrainer(config=open_config(options.config, settings=options.set)).plan()
    print(plan)
    if refusals := plan.refusals(options.hours):
        raise BunnyLoraError(f"no-go: the run would take {'; '.join(refusals)}.")
    print(f"{'go':<15}bunny-lora train, with the same options")


def _evaluate(options: argparse.Namespace) -> None:
    from bunny_lora import report
    from bunny_lora.evaluation import evaluate

    config = open_config(options.config, settings=options.set, output_dir=options.output_dir)
    result = evaluate(config.run_dir, config=config)
    print(f"{report.axes_table(result)}\n\n{report.scores_table(result)}")
    if result.traits:
        print(f"\n{report.traits_table(result)}")


def _choose(options: argparse.Namespace) -> None:
    from bunny_lora import report
    from bunny_lora.evaluation import choose

    of_run = options.run_dir and options.config is None
    path = options.run_dir / "config.yaml" if of_run else options.config
    config = open_config(path, settings=options.set, output_dir=options.run_dir)
    print(report.choice_table(choose(config.run_dir, config=config)))


def _report(options: argparse.Namespace) -> None:
    from bunny_lora.compare import find_runs, write_comparison
    from bunny_lora.report import write_report

    runs = find_runs(options.runs or [open_config().run_dir])
    alone = len(runs) == 1
    page = write_report(runs[0], options.out) if alone else write_comparison(runs, options.out)
    print(relative(page))


def _config(options: argparse.Namespace) -> None:
    if options.schema:
        print(json.dumps(json_schema(), indent=2))
        return
    with contextlib.redirect_stdout(sys.stderr):  # So that what is printed can become a file.
        config = open_config(options.config, settings=options.set)
    print(config.to_yaml(comments=True), end="")


def _download(options: argparse.Namespace) -> None:
    from bunny_lora.model import components, hub, image_encoder

    names = (
        [options.model]
        if options.model
        else models_of(open_config(options.config, settings=options.set))
    )
    for name in names:
        if folder := components.folder_here(name) or image_encoder.folder_here(name):
            print(f"{name} needs no download: {relative(Path(folder))}")
        else:
            print(hub.fetch(name))


def _generate(options: argparse.Namespace) -> None:
    from bunny_lora import batch, inference
    from bunny_lora.core.progress import progress
    from bunny_lora.model.prompts import doubts
    from bunny_lora.training import distributed

    if options.prompts and not options.out:
        raise BunnyLoraError("--prompts FILE needs --out FOLDER: many images go into one folder.")
    prompts = batch.read_prompts(options.prompts) if options.prompts else options.prompt
    weights = inference.find_loras(map(weighted, options.lora_weights or ()))
    pipe = inference.load_lora_pipeline(options.base_model, weights, options.device)
    seeds = options.seed or [42]
    typed_settings = {
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
        "negative_prompt": options.negative_prompt,
        "width": options.width,
        "height": options.height,
        "lora_scale": options.lora_scale,
        "sampler": options.sampler,
        "reference": options.reference or None,
    }
    settings = {key: value for key, value in typed_settings.items() if value is not None}
    print(_recommendation(pipe, settings, inference.settings_with(pipe, **settings)), end="")
    for doubt in doubts([*prompts, options.negative_prompt or ""], pipe.tokenizer):
        print(doubt)
    if options.prompts:
        made_by = batch.weights_identity(options.base_model, weights)
        with distributed.process_group(pipe.device) as group:
            paths = batch.draw_batch(
                pipe, prompts, seeds, options.out, made_by, group=group, **settings
            )
    else:
        paths = output_paths(options.out or new("out.png"), len(prompts), seeds)
        images = inference.generate_images(pipe, prompts, seeds, **settings)
        for path, image in progress(zip(paths, images, strict=True), desc="draw", total=len(paths)):
            inference.save_image(image, path)
    print("\n".join(relative(path) for path in paths))


def _recommendation(
    pipe: StableDiffusionPipeline, typed_settings: Mapping[str, Any], drawn_with: Mapping[str, Any]
) -> str:
    """Return the line that says what a run's own recommendation decides; "" where nothing does."""
    said = {
        "num_inference_steps": "{} steps",
        "guidance_scale": "guidance {}",
        "width": "{} px wide",
        "height": "{} px high",
        "sampler": "{}",
        "lora_scale": "LoRA scale {}",
    }
    recommended = pipe.recommended.settings() if pipe.recommended else {}
    parts = [
        text.format(recommended[key])
        for key, text in said.items()
        if key not in typed_settings and recommended.get(key) == drawn_with[key]
        if (key, recommended[key]) != AS_TRAINED
    ]
    return f"As the run recommends: {', '.join(parts)}\n" if parts else ""


def weighted(text: str) -> tuple[str, float]:
    """Return path and weight of `path=0.5`, weight 1 where none is given.

    Raises:
        BunnyLoraError: what follows the last "=" is no number.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or typed(text).exists():
        return str(typed(text)), 1.0
    try:
        return str(typed(path)), float(weight)
    except ValueError:
        raise BunnyLoraError(f"--lora-weights {text}: {weight} is no number.") from None


def _export(options: argparse.Namespace) -> None:
    from bunny_lora import export

    kinds = options.format or export.USUAL
    paths = export.export(options.lora_weights, options.out, kinds=kinds, base_model=options.base_model)
    print("\n".join(relative(path) for path in paths))
    if options.hub:
        print(export.upload(paths[-1].parent, options.hub))


def output_paths(output: Path, n_prompts: int, seeds: Sequence[int]) -> list[Path]:
    """Return where each picture goes: `output` itself for one, else a numbered name for each."""
    is_file = output.suffix.lower() == ".png"
    if output.suffix and not is_file and not output.is_dir():
        raise BunnyLoraError(
            f"--out {output.name}: images are written as PNG, which keeps prompt and settings inside."
            " Name a file that ends in .png, or a folder without a dot in its name."
        )
    if is_file and n_prompts * len(seeds) == 1:
        return [output]
    folder, stem = (output.parent, f"{output.stem}-") if is_file else (output, "")
    return [folder / f"{stem}{p:02d}-{seed}.png" for p in range(n_prompts) for seed in seeds]


def _sweep(options: argparse.Namespace) -> None:
    from bunny_lora import sweep
    from bunny_lora.config import assign

    folder, grid = sweep.read_sweep(options.file)
    todo = [run for run in grid if not run.done]
    print(f"{len(grid)} runs, {len(grid) - len(todo)} of them done")
    if options.slurm is None:
        failures = sweep.sweep_here(todo)
    else:
        settings: dict[str, Any] = {}
        for assignment in options.slurm:
            assign(settings, assignment)
        failures = sweep.sweep_on_cluster(todo, folder, settings)
    print(sweep.leaderboard_text(*sweep.leaderboard(folder, grid)))
    print(folder / sweep.LEADERBOARD)
    if page := sweep.leaderboard_page(folder, grid):
        print(page)
    if failures:
        raise BunnyLoraError(f"{len(failures)} of {len(grid)} runs failed:\n" + "\n".join(failures))
