"""Many pictures into one folder, going on where it was left, with contact sheets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from bunny_lora import inference
from bunny_lora.core.files import decoded, sha256
from bunny_lora.core.image_file import add_metadata, image_settings, is_current, save_image
from bunny_lora.core.paths import resolve
from bunny_lora.core.progress import progress
from bunny_lora.errors import BunnyLoraError
from bunny_lora.evaluation import protocol
from bunny_lora.model import adapters, components
from bunny_lora.report.grids import picture_grid
from bunny_lora.report.plot import save_figure
from bunny_lora.training.distributed import ProcessGroup

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

ROWS_A_SHEET, COLUMNS_A_SHEET = 12, 6


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one a line, without empty lines and comments.

    A comment is a "#" with a space after it, or nothing: "#ffcc00 sky" is a prompt.

    Raises:
        BunnyLoraError: no such file, no text, or no prompt in it.
    """
    try:
        lines = decoded(resolve(path).read_bytes()).splitlines()
    except OSError as error:
        raise BunnyLoraError(f"The prompts in {path} cannot be read: {error}.") from None
    except UnicodeDecodeError as error:
        message = f"The prompts in {path} are not UTF-8 text (byte {error.start}): save them as UTF-8."
        raise BunnyLoraError(message) from None
    lines = [line.strip() for line in lines if line.strip()]
    prompts = [line for line in lines if not re.match(r"#+(\s|$)", line)]
    if n_comments := len(lines) - len(prompts):
        print(f"{n_comments} of {len(lines)} lines in {path.name} begin with # and a space: comments.")
    if not prompts:
        raise BunnyLoraError(f"There is no prompt in {path}: write one a line.")
    return prompts


def weights_identity(base_model: str | None, weights: Mapping[Any, float]) -> dict[str, Any]:
    """Return what, beside its settings, a picture depends on: base model and adapters, by their bytes.

    Args:
        base_model: None is the one recorded with the first weights.
        weights: as for `inference.load_lora_pipeline`.
    """
    found = inference.find_loras(weights.items())
    base_model = base_model or inference.recorded_base_model(next(iter(found), None))
    loras = [
        [sha256(path) if path.is_file() else adapters.adapter_digest(path), weight]
        for path, weight in found.items()
    ]
    base_sha256 = protocol.base_digest(base_model)
    return {"base_model": base_model, "base_sha256": base_sha256, "loras": loras}


def draw_batch(
    pipe: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    out_dir: Path,
    made_by: Mapping[str, Any],
    *,
    group: ProcessGroup = ProcessGroup(),  # noqa: B008
    **settings: Any,
) -> list[Path]:
    """Draw every prompt with every seed into `out_dir/<prompt>-<seed>.png` and return the files.

    A picture that is already there is kept if it says that the same prompt, settings and weights made
    it, so an interrupted batch goes on, and a changed one is drawn anew where it changed.

    Args:
        pipe: from `inference.load_lora_pipeline`.
        prompts: numbered from 0000 in the file names.
        seeds: of each prompt.
        out_dir: receives the pictures and `contact_sheet-<n>.png`.
        made_by: what drew, see `weights_identity`.
        group: the processes that share the work, each with a `pipe` of its own; the main one writes.
        settings: as for `inference.generate_image`; what is left out is as the run recommends.

    Raises:
        BunnyLoraError: a setting is out of range.
    """
    settings = inference.settings_with(pipe, **settings)
    images = {
        out_dir / f"{index:04d}-{seed}.png": image_settings(prompt=prompt, seed=seed, **settings)
        for index, prompt in enumerate(prompts)
        for seed in seeds
    }
    dtype = str(pipe.unet.dtype).removeprefix("torch.")
    made_by = dict(made_by) | {"dtype": dtype, "device": pipe.device.type}
    missing = group.broadcast_from_main(
        lambda: [path for path, wanted in images.items() if not is_current(path, wanted, made_by)]
    )

    def draw_one(path: Path) -> Image.Image:
        return add_metadata(components.generate(pipe, images[path]), made_by)

    drawn = group.share(missing, draw_one)
    for path, image in progress(
        drawn, desc="draw", total=len(missing), unit="image", disable=not missing
    ):
        if group.is_main:
            save_image(image, path)
    paths = list(images)
    group.broadcast_from_main(lambda: _contact_sheets(out_dir, prompts, seeds, paths))
    return paths


def _contact_sheets(
    out_dir: Path, prompts: Sequence[str], seeds: Sequence[int], paths: Sequence[Path]
) -> None:
    columns = seeds[:COLUMNS_A_SHEET]
    for number, first in enumerate(range(0, len(prompts), ROWS_A_SHEET), start=1):
        rows = range(first, min(first + ROWS_A_SHEET, len(prompts)))
        shown = [[paths[row * len(seeds) + column] for column in range(len(columns))] for row in rows]
        titles = (out_dir.name, f"prompts {rows[0]} to {rows[-1]} of {len(prompts)}")
        heads = [("", [f"seed {seed}" for seed in columns])]
        figure = picture_grid(titles, [prompts[row] for row in rows], heads, shown)
        save_figure(figure, out_dir / f"contact_sheet-{number}.png")


def recommendation(
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
        if (key, recommended[key]) != ("lora_scale", 1.0)  # as trained
    ]
    return f"As the run recommends: {', '.join(parts)}\n" if parts else ""
