"""What is drawn with what: the pictures of an evaluation, the weights that draw them, the drawing.

Base, checkpoints and final weights draw the same prompts from the same seeds. A picture that is
already there is kept only if its own metadata names the same weights and settings.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bunny_lora import inference
from bunny_lora.config import Config
from bunny_lora.core.files import sha256
from bunny_lora.core.image_file import ImageSettings, add_metadata, is_current, save_image
from bunny_lora.core.progress import progress
from bunny_lora.core.seeding import derive_seed
from bunny_lora.model import adapters, components, devices
from bunny_lora.model.fast import drawing
from bunny_lora.training import validation
from bunny_lora.training.distributed import ProcessGroup

SUBJECT = "subject"  # stands for the one character of data that names none
NEUTRAL = "-"  # stands for nobody, in the prompts of the characters
OTHERS, EMPTY = "-others", "-empty"  # nobody in other prompts, and in none
NOBODY = {NEUTRAL: "no-name", OTHERS: "no-name-others", EMPTY: "no-name-empty"}
N_GRID_CHARACTERS = 3


@dataclass(frozen=True)
class Model:
    """Weights that draw: "base", "final" or "checkpoint-<step>"."""

    name: str
    folder: Path | None
    identity: dict[str, Any]


@dataclass(frozen=True)
class ImageSpec:
    """One image of the protocol: what it shows, and what draws it from which seed.

    `lora_scale` and `guidance_scale` are None where they are the configuration's.
    """

    model: str
    character: str
    prompt_index: int
    prompt: str
    seed: int
    lora_scale: float | None = None
    guidance_scale: float | None = None

    @property
    def file(self) -> str:
        """Where the picture lies below `<run>/evaluation/`."""
        subject = NOBODY.get(self.character) or slug(self.character)
        folder = self.model
        folder += "" if self.lora_scale is None else f"-scale-{self.lora_scale:g}"
        folder += "" if self.guidance_scale is None else f"-guidance-{self.guidance_scale:g}"
        return f"images/{folder}/{subject}-{self.prompt_index}-{self.seed}.png"


# ---------------------------------------------------------------------------- pictures


def plan_images(config: Config, characters: list[str], models: list[str]) -> list[ImageSpec]:
    """Return every image to draw: all prompts for base and final, a small grid for checkpoints.

    The seed depends on prompt and position alone, so models and characters start from the same noise.
    """
    plan = []
    for model in models:
        if model in ("base", "final"):
            plan += [p for name in characters for p in specs_of(config, model, name)]
            plan += [p for nobody in NOBODY for p in specs_of(config, model, nobody)]
        else:
            plan += [specs_of(config, model, name)[0] for name in characters[:N_GRID_CHARACTERS]]
    return plan


def specs_of(config: Config, model: str, character: str) -> list[ImageSpec]:
    """Return the images of one character, or of one of `NOBODY`, prompts first."""
    prompts = prompts_of(config, character)
    n_images = config.evaluation.num_images_per_prompt
    if character in NOBODY:
        n_images = max(n_images, -(-config.evaluation.num_drift_images // len(prompts)))
    return [
        ImageSpec(model, character, index, prompt, image_seed(config.evaluation.seed, index, image))
        for index, prompt in enumerate(prompts)
        for image in range(n_images)
    ]


def prompts_of(config: Config, character: str) -> list[str]:
    """Return what is drawn of one character, or of one of `NOBODY`."""
    templates, class_prompt = config.evaluation.prompts, config.prior_preservation.class_prompt
    if character == NEUTRAL:
        return list(dict.fromkeys(without_name(template, class_prompt) for template in templates))
    if character in NOBODY:
        return config.evaluation.other_prompts if character == OTHERS else [""]
    name = config.instance_prompt if character == SUBJECT else character
    looks = config.looks.get(character, "")
    return [with_looks(template, looks).replace("{name}", name) for template in templates]


def image_seed(seed: int, prompt_index: int, image_index: int) -> int:
    """Return a 32-bit seed of the evaluation's own, apart from every seed that training uses."""
    return derive_seed(seed, "evaluation", prompt_index, image_index) >> 31


def with_looks(template: str, looks: str) -> str:
    """Return a template that says somebody's looks; without any, `{looks}` and its comma go."""
    if looks:
        return template.replace("{looks}", looks)
    return re.sub(r"^\{looks\}\s*,\s*|\s*,?\s*\{looks\}", "", template)


def without_name(template: str, class_prompt: str) -> str:
    """Return a prompt that names nobody: a leading "{name}, " goes, elsewhere the class stands in."""
    template = re.sub(r"^\{name\}\s*(,\s*|$)", "", with_looks(template, ""))
    return template.replace("{name}", class_prompt) or class_prompt


def slug(character: str) -> str:
    """Return a file name part for a character; different names never share one."""
    plain = re.sub(r"[^a-z0-9_]+", "_", character.lower())[:40]
    return (
        plain if plain == character else f"{plain}_{hashlib.sha256(character.encode()).hexdigest()[:6]}"
    )


# ---------------------------------------------------------------------------- models


def find_models(run_dir: Path, config: Config) -> list[Model]:
    """Return base, every checkpoint by step, and final; a checkpoint equal to final is left out."""
    final = adapters.find_weights(run_dir / "final")
    device = devices.resolve_device(config.device)
    base_model = inference.recorded_base_model(final)
    shared = {
        "base_model": base_model,
        "base_sha256": base_digest(base_model),
        "dtype": str(inference.run_dtype(final, device)).removeprefix("torch."),
        "device": device.type,
    }
    folders = [path for path in run_dir.glob("checkpoint-*") if path.name[11:].isdecimal()]
    models = [Model("base", None, shared | {"weights_sha256": None})]
    last = adapters.adapter_digest(final)
    for folder in sorted(folders, key=lambda path: int(path.name[11:])):
        if (digest := adapters.adapter_digest(folder)) not in (None, last):
            models.append(Model(folder.name, folder, shared | {"weights_sha256": digest}))
    return [*models, Model("final", final, shared | {"weights_sha256": last})]


def base_digest(base_model: str) -> str | None:
    """Return one digest over a base model's files; where it has an identity, that."""
    if identity := components.base_identity(base_model):
        return identity
    folder = Path(components.resolve_base_model(base_model))
    files = [path for path in folder.rglob("*") if path.suffix in (".json", ".safetensors", ".bin")]
    return sha256(*sorted(files)) if files else None


# ---------------------------------------------------------------------------- drawing


def generate_missing(
    run_dir: Path, models: list[Model], plan: list[ImageSpec], config: Config, group: ProcessGroup
) -> None:
    """Draw what is missing or stale, one model in memory at a time; each process its share."""
    evaluation_dir = run_dir / "evaluation"
    missing = group.broadcast_from_main(lambda: _missing(evaluation_dir, models, plan, config))
    total = sum(map(len, missing.values()))
    with progress(
        desc="Drawing for the evaluation", total=total, unit="image", disable=not total
    ) as bar:
        for model in models:
            if missing[model.name]:
                for spec, image in generate_with(model, missing[model.name], config, group):
                    if group.is_main:
                        save_image(image, evaluation_dir / spec.file)
                    bar.update()
                gc.collect()


def _missing(
    evaluation_dir: Path, models: list[Model], plan: list[ImageSpec], config: Config
) -> dict[str, list[ImageSpec]]:
    return {
        model.name: [
            spec
            for spec in plan
            if spec.model == model.name
            and not is_current(
                evaluation_dir / spec.file, generation_settings(spec, config), model.identity
            )
        ]
        for model in models
    }


def generate_with(
    model: Model, specs: list[ImageSpec], config: Config, group: ProcessGroup
) -> Iterator[tuple[ImageSpec, Image.Image]]:
    """Yield images drawn with one model; each tells in its metadata what made it."""
    identity = model.identity
    dtype = getattr(torch, identity["dtype"])
    pipe = inference.load_lora_pipeline(identity["base_model"], model.folder, identity["device"], dtype)
    pipes = drawing.twins(pipe, drawing.n_at_once(pipe.device, config.resolution))

    def generate_some(some: list[ImageSpec]) -> list[Image.Image]:
        started = time.perf_counter()
        images = components.generate_together(pipes, [generation_settings(s, config) for s in some])
        seconds = round((time.perf_counter() - started) / len(some), 3)
        return [add_metadata(image, identity | {"seconds": seconds}) for image in images]

    for some, images in group.share(_together(specs, len(pipes)), generate_some):
        yield from zip(some, images, strict=True)


def _together(specs: list[ImageSpec], at_most: int) -> list[list[ImageSpec]]:
    """Return images in lots that the same weights draw at once."""
    lots = []
    for _, group in itertools.groupby(specs, key=lambda spec: spec.lora_scale):
        alike = list(group)
        lots += [alike[i : i + at_most] for i in range(0, len(alike), at_most)]
    return lots


def generation_settings(spec: ImageSpec, config: Config) -> ImageSettings:
    """Return how an image is drawn: as the run's samples are, but for what the image says itself.

    The base model has no LoRA, and its images are the same at any scale.
    """
    settings = validation.settings_of(config, spec.prompt, spec.seed)
    scale = 1.0 if spec.model == "base" else spec.lora_scale
    changes = {"lora_scale": scale, "guidance_scale": spec.guidance_scale}
    return settings.model_copy(update={key: v for key, v in changes.items() if v is not None})
