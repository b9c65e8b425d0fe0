"""Hand a LoRA to other programs: every format written, then read back by its own loader and compared.

A file whose loader sees another change of the weights than training made fails the export, and nothing
of it is left.
"""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers import UNet2DConditionModel
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from bunny_lora import inference
from bunny_lora.core import files, paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.export.model_card import About, model_card
from bunny_lora.export.names import file_stem
from bunny_lora.model import adapters, components, formats, ldm, random_models
from bunny_lora.model.formats import DIFFUSERS_NAME, PARTS, LoRA
from bunny_lora.model.quiet import quiet

FORMATS = ("peft", "diffusers", "kohya", "merged", "checkpoint", "kohya-sd1")
USUAL = ("peft", "diffusers", "kohya")
TOLERANCE = 1e-5  # of the largest change: float32 rounds in another order

Changes = Mapping[str, Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class _Job:
    """What every writer and every check needs."""

    lora: LoRA
    base_model: str
    pipe: diffusers.StableDiffusionPipeline
    about: About

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        return {part: getattr(self.pipe, part) for part in PARTS}


def export(
    lora_weights_dir: str | Path,
    out_dir: str | Path,
    *,
    kinds: Sequence[str] = USUAL,
    base_model: str | None = None,
) -> list[Path]:
    """Write the LoRA of a checkpoint in other programs' formats, with a model card, and check each.

    Args:
        lora_weights_dir: `…/final`, `…/checkpoint-<step>`, a run folder (see `inference.handed_on`),
            or what else `adapters.find_weights` takes.
        out_dir: a new or empty folder; it appears whole or not at all.
        kinds: of `FORMATS`. "merged" is a whole pipeline, as large as the base model, "checkpoint" the
            same in one file of half precision; "kohya-sd1" is experimental: BK-SDM-Tiny's LoRA under
            the names of full Stable Diffusion 1.x.
        base_model: None is the one that the run was trained on.

    Returns:
        What was written, the model card last.

    Raises:
        BunnyLoraError: unknown kind, no weights, a folder in use, or a file that its loader reads
            differently.
    """
    if unknown := [kind for kind in kinds if kind not in FORMATS]:
        raise BunnyLoraError(f"Unknown format {unknown[0]}: choose from {', '.join(FORMATS)}.")
    out_dir = paths.resolve(out_dir)
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise BunnyLoraError(f"{out_dir} exists and is not empty: choose another folder or remove it.")
    weights = adapters.find_weights(inference.handed_on(lora_weights_dir))
    base_model = base_model or inference.recorded_base_model(weights)
    parts = components.load_components(base_model, torch.device("cpu"), torch.float32)
    pipe = components.pipeline_from(parts, base_model)
    lora = formats.read_lora(weights, {part: getattr(parts, part) for part in PARTS})
    job = _Job(lora, base_model, pipe, About.of_run(weights, base_model, lora))
    if (run := inference.run_folder(weights)) and not job.about.title.startswith(run.name):
        print(f"The folder's name {run.name} says nothing: the LoRA is called {job.about.title}.")
    with files.atomic_path(out_dir) as folder:
        folder.mkdir()
        written = [_WRITERS[kind](job, folder) for kind in kinds]
        card = folder / "README.md"
        files.write_text(card, model_card(job.about, [path.name for path in written]))
        names = [path.name for path in (*written, card)]
    return [out_dir / name for name in names]


def upload(folder: Path, repository: str) -> str:
    """Put an exported folder on the hub, private until its owner says otherwise; return its address.

    Raises:
        BunnyLoraError: not signed in, no right to write there, or no network.
    """
    hub = HfApi()
    try:
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="LoRA of bunny_lora")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        raise BunnyLoraError(
            f"Could not upload to {repository}: {str(error).strip().splitlines()[0]}. Sign in with"
            f" `hf auth login` and try again; the files are in {folder}."
        ) from error
    return str(address)


# ---------------------------------------------------------------------------- write and check


def _peft(job: _Job, folder: Path) -> Path:
    path = folder / "peft"
    path.mkdir()
    formats.write_peft(job.lora, path, job.base_model)
    seen = {}
    for part in job.lora:
        with warnings.catch_warnings():
            # PEFT asks a text encoder by a name that transformers has deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            handle = PeftModel.from_pretrained(job.models[part], path / part)
        seen[part] = _changes(handle.base_model.model)
        handle.unload()
    _compare(path, seen, _expected(job.lora))
    return path


def _diffusers(job: _Job, folder: Path) -> Path:
    path = folder / DIFFUSERS_NAME
    formats.write_diffusers(job.lora, path, job.base_model)
    _compare(path, _as_diffusers_sees(job, path), _expected(job.lora))
    return path


def _kohya(job: _Job, folder: Path) -> Path:
    path = _kohya_path(job, folder)
    formats.write_kohya(job.lora, path, job.about.kohya_metadata())
    _compare(path, _as_diffusers_sees(job, path), _expected(job.lora))
    return path


def _kohya_path(job: _Job, folder: Path) -> Path:
    path = folder / f"{file_stem(job.about.title)}.safetensors"
    # The same file to Windows and macOS, in whatever case.
    return path.with_stem(f"{path.stem}-kohya") if path.name.lower() == DIFFUSERS_NAME else path


def _kohya_sd1(job: _Job, folder: Path) -> Path:
    path = folder / f"{file_stem(job.about.title)}-experimental-for-sd1.safetensors"
    if list(job.pipe.unet.config.block_out_channels) != [320, 640, 1280]:
        raise BunnyLoraError(
            "kohya-sd1 renames the blocks of BK-SDM-Tiny to those of full Stable Diffusion 1.x, and"
            f" {job.base_model} has other blocks."
        )
    renamed = formats.for_sd1(job.lora)
    formats.write_kohya(renamed, path, job.about.kohya_metadata(experimental=True))
    # Full Stable Diffusion without its weights: the loader needs to find its modules, no more.
    with torch.device("meta"):
        full = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    own, job.pipe.unet = job.pipe.unet, full.to_empty(device="cpu")
    try:
        _compare(path, _as_diffusers_sees(job, path), _expected(renamed))
    finally:
        job.pipe.unet = own
    return path


@quiet()
def _merged(job: _Job, folder: Path) -> Path:
    path = folder / "merged"
    with _merged_in(job) as expected:
        components.save_model(job.pipe, path)
    merged = diffusers.StableDiffusionPipeline.from_pretrained(
        path, safety_checker=None, requires_safety_checker=False
    )
    seen = {
        part: {name: _weight(getattr(merged, part), name) for name in weights}
        for part, weights in expected.items()
    }
    _compare(path, seen, expected)
    return path


@quiet()
def _checkpoint(job: _Job, folder: Path) -> Path:
    path = folder / f"{job.about.title}-checkpoint.safetensors"
    is_full = ldm.is_full(job.pipe.unet)
    with _merged_in(job):
        state = ldm.state_dict(job.pipe)
        save_file(state, path, job.about.checkpoint_metadata())
        if is_full:
            expected = {part: getattr(job.pipe, part).state_dict() for part in ldm.PREFIXES}
            half = {p: {n: t.half().float() for n, t in own.items()} for p, own in expected.items()}
            _compare(path, _as_single_file(job, path), half)
    # No loader here reads BK-SDM-Tiny in one file; at least what was written is there.
    _compare(path, {"file": load_file(path)}, {"file": state})
    return path


def _as_single_file(job: _Job, path: Path) -> Changes:
    with tempfile.TemporaryDirectory() as configs:
        random_models.save_parts_configs(job.pipe, Path(configs))
        loaded = diffusers.StableDiffusionPipeline.from_single_file(
            str(path), config=configs, local_files_only=True, torch_dtype=torch.float32
        )
    return {part: getattr(loaded, part).state_dict() for part in ldm.PREFIXES}


@contextlib.contextmanager
def _merged_in(job: _Job) -> Iterator[Changes]:
    """Add the LoRA to the pipeline's weights for as long as the block lasts; yield the new ones.

    Whole weights are compared: of a small change little is left when large weights are subtracted.
    """
    before = {
        part: {name: _weight(job.models[part], name).clone() for name in modules}
        for part, modules in job.lora.items()
    }
    expected = {
        part: {name: weight + job.lora[part][name].change() for name, weight in weights.items()}
        for part, weights in before.items()
    }
    _put(job, expected)
    try:
        yield expected
    finally:
        _put(job, before)


def _put(job: _Job, weights: Changes) -> None:
    for part, tensors in weights.items():
        for name, tensor in tensors.items():
            _weight(job.models[part], name).copy_(tensor)


_WRITERS: dict[str, Callable[[_Job, Path], Path]] = {
    "peft": _peft,
    "diffusers": _diffusers,
    "kohya": _kohya,
    "merged": _merged,
    "checkpoint": _checkpoint,
    "kohya-sd1": _kohya_sd1,
}


def _weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    return model.get_parameter(f"{name}.weight").data


@quiet()
def _as_diffusers_sees(job: _Job, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    try:
        job.pipe.load_lora_weights(path)
        return {part: _changes(job.models[part]) for part in job.lora}
    finally:
        job.pipe.unload_lora_weights()


def _changes(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what the adapters loaded into a model change, by PEFT's own arithmetic."""
    return {
        name.removeprefix("text_model."): layer.get_delta_weight(layer.active_adapters[0]).detach()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _expected(lora: LoRA) -> Changes:
    return {
        part: {n: module.change() for n, module in modules.items()} for part, modules in lora.items()
    }


def _compare(path: Path, seen: Changes, expected: Changes) -> None:
    for part, wanted in expected.items():
        missing = sorted(wanted.keys() ^ seen[part].keys())
        if missing:
            raise BunnyLoraError(
                f"{path.name} was not written: its own loader finds other modules in the {part} than"
                f" were trained, {missing[0]} among {len(missing)}."
            )
        largest = max(float(change.abs().max()) for change in wanted.values())
        for name, change in wanted.items():
            error = float((seen[part][name] - change).abs().max())
            if not error <= TOLERANCE * max(largest, 1e-6):
                raise BunnyLoraError(
                    f"{path.name} was not written: its own loader changes {name} of the {part} by up to"
                    f" {error:.2g} differently than training did (of {largest:.2g})."
                )
