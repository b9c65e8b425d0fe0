"""The pictures that a run draws of itself: the validation prompts, at each step of `save_steps`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from bunny_lora.config import Config, TrainingSection
from bunny_lora.core import files
from bunny_lora.core.seeding import derive_seed
from bunny_lora.model import components

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@dataclass(frozen=True)
class ValidationImage:
    """One picture: where it lies, and what it is drawn from."""

    path: Path
    prompt: str
    seed: int


def is_milestone(step: int, training: TrainingSection) -> bool:
    """Whether a checkpoint and samples belong to this step, however long the steps take."""
    return step > 0 and (step % training.save_steps == 0 or step == training.max_train_steps)


def samples_of(run_dir: Path, training: TrainingSection, step: int) -> list[ValidationImage]:
    """Return the samples that belong to a step; most steps have none."""
    folder, seed = run_dir / "samples" / f"step-{step:06d}", training.seed
    return [
        ValidationImage(folder / f"{p:02d}-{i}.png", prompt, derive_seed(seed, "validation", i))
        for p, prompt in enumerate(training.validation_prompts)
        for i in range(training.num_validation_images)
        if is_milestone(step, training)
    ]


def missing_samples(run_dir: Path, training: TrainingSection, step: int) -> list[ValidationImage]:
    """Return the samples of a step that a stop or a kill has left out."""
    return [sample for sample in samples_of(run_dir, training, step) if not sample.path.is_file()]


def draw(pipe: StableDiffusionPipeline, config: Config, sample: ValidationImage) -> Image.Image:
    """Draw one picture with the weights as they are."""
    return components.draw_image(
        pipe,
        sample.prompt,
        seed=sample.seed,
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
        width=config.resolution,
        height=config.resolution,
    )


def save(image: Image.Image, sample: ValidationImage) -> None:
    """Write a picture where it belongs."""
    with files.atomic_path(sample.path) as part:
        image.save(part)
