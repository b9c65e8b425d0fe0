"""`bunny-lora world`: make the models, measure them, draw the film."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bunny_lora.core.paths import new, relative, typed
from bunny_lora.errors import BunnyLoraError


def add_world(parser: argparse.ArgumentParser) -> None:
    """Give `bunny-lora world` its commands."""
    commands = parser.add_subparsers(required=True, metavar="command")
    film = commands.add_parser("film", help="write a whole stage-4 run of a made-up film")
    film.add_argument("--out", type=new, required=True, help="a new folder, outputs/<run>")
    film.add_argument("--frames", type=int, default=65, help="usable frames (65)")
    film.add_argument("--seed", type=int, default=0)
    film.add_argument("--fresh-heroes", type=int, metavar="SEED", help="four others than the demo's")
    film.add_argument("--style", default="plain", help="plain, storybook or neon: how it is drawn")
    film.set_defaults(run=_film)

    pretrain = commands.add_parser("pretrain", help="train Bunny World's own models, or go on")
    pretrain.add_argument("model", choices=["vae", "sd", "clip", "reader"])
    pretrain.add_argument("--out", type=new, required=True, help="folder of states and weights")
    pretrain.add_argument("--steps", type=int, help="length of the whole training")
    pretrain.add_argument("--batch-size", type=int, help="pictures a step")
    pretrain.add_argument("--peak-rate", type=float, help="highest learning rate")
    pretrain.add_argument("--start-from", type=typed, help="trained sd/ or vae/ to learn on from")
    pretrain.add_argument("--stop-at", type=int, help="stop at this step, to go on another day")
    pretrain.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])
    pretrain.add_argument("--workers", type=int, default=0, help="processes that draw pictures")
    pretrain.set_defaults(run=_pretrain)

    measure = commands.add_parser(
        "measure", help="measure Bunny World's models: the model card's table"
    )
    measure.add_argument("--out", type=new, required=True, help="folder of the results")
    measure.add_argument("--weights", type=typed, help="folder of sd/, clip/ and reader/ (the shipped)")
    measure.add_argument("--images", type=int, default=500, help="pictures to draw and read (500)")
    measure.set_defaults(run=_measure)


def _pretrain(options: argparse.Namespace) -> None:
    from bunny_lora.model.devices import resolve_device
    from bunny_lora.world.pretraining.clip import pretrain_clip
    from bunny_lora.world.pretraining.reader import pretrain_reader
    from bunny_lora.world.pretraining.sd import pretrain_sd
    from bunny_lora.world.pretraining.vae import pretrain_vae

    device = resolve_device(options.device).type
    settings: dict[str, Any] = {"device": device, "n_workers": options.workers}
    overrides = {"max_steps": options.steps, "batch_size": options.batch_size}
    overrides |= {"peak_rate": options.peak_rate}
    settings |= {name: value for name, value in overrides.items() if value is not None}
    if options.start_from is not None:
        if options.model not in ("vae", "sd"):
            raise BunnyLoraError("--start-from is for `pretrain vae` and `pretrain sd`: leave it out.")
        settings["start_from"] = options.start_from
    models: dict[str, Callable[..., Path]]
    models = {"vae": pretrain_vae, "sd": pretrain_sd, "clip": pretrain_clip, "reader": pretrain_reader}
    print(models[options.model](options.out, stop_at=options.stop_at, **settings))


def _measure(options: argparse.Namespace) -> None:
    from bunny_lora.model.components import WORLD_WEIGHTS
    from bunny_lora.world.pretraining.quality import measure

    measure(options.weights or WORLD_WEIGHTS, options.out, n_images=options.images)
    print(options.out / "quality.json")


def _film(options: argparse.Namespace) -> None:
    from bunny_lora.world.attributes import HEROES, fresh_heroes
    from bunny_lora.world.drawing import STYLES
    from bunny_lora.world.film import write_film

    heroes = HEROES if options.fresh_heroes is None else fresh_heroes(options.fresh_heroes)
    if (style := STYLES.get(options.style)) is None:
        raise BunnyLoraError(f"--style {options.style}: there are {', '.join(STYLES)}.")
    film = write_film(
        options.out, n_frames=options.frames, seed=options.seed, heroes=heroes, style=style
    )
    print(relative(film))
