"""The pictures that a run draws of itself: the validation prompts, at each step of `save_steps`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from bunny_lora.config import Config
from bunny_lora.core.image_file import ImageSettings, image_settings, is_current
from bunny_lora.core.sections import TrainingSection
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


def samples_of(
    run_dir: Path, training: TrainingSection, step: int, *, asked: bool = False
) -> list[ValidationImage]:
    """Return the samples that belong to a step; most have none, unless somebody asked for them."""
    folder, seed = run_dir / "samples" / f"step-{step:06d}", training.seed
    return [
        ValidationImage(folder / f"{p:02d}-{i}.png", prompt, derive_seed(seed, "validation", i))
        for p, prompt in enumerate(training.validation_prompts)
        for i in range(training.num_validation_images)
        if asked or is_milestone(step, training)
    ]


def missing_samples(run_dir: Path, config: Config, step: int) -> list[ValidationImage]:
    """Return the samples of a step that a stop or a kill has left out, or that other settings drew."""
    return [
        sample
        for sample in samples_of(run_dir, config.training, step)
        if not is_current(sample.path, sample_settings(config, sample.prompt, sample.seed), {})
    ]


def settings_of(config: Config, prompt: str, seed: int) -> ImageSettings:
    """Return how a run draws a prompt for its evaluation, and but for the decoder for its samples."""
    sampling = config.sampling
    return image_settings(
        prompt=prompt,
        seed=seed,
        width=config.resolution,
        height=config.resolution,
        num_inference_steps=sampling.num_inference_steps,
        guidance_scale=sampling.guidance_scale,
        lora_scale=sampling.lora_scale,
        sampler=components.sampler_name(config.base_model, sampling.sampler),
    )


def generate(pipe: StableDiffusionPipeline, config: Config, sample: ValidationImage) -> Image.Image:
    """Draw one image with the weights as they are."""
    return components.generate(pipe, sample_settings(config, sample.prompt, sample.seed))


def sample_settings(config: Config, prompt: str, seed: int) -> ImageSettings:
    """Return how a sample is drawn: as the evaluation draws, but for a decoder of its own."""
    settings = settings_of(config, prompt, seed)
    return settings.model_copy(update={"decoder": config.sampling.preview_decoder})
