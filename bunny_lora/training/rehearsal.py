"""A little of a run, done to know the whole: two micro-batches, one short picture, and cheaper ways.

It uses two of the run's own images, in a folder that is gone afterwards; no gradient is kept.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bunny_lora.config import Config, merge, validate
from bunny_lora.core.image_file import save_image
from bunny_lora.data.frames import Sample
from bunny_lora.dataset import ImageDataset
from bunny_lora.model import components, devices
from bunny_lora.model.components import Components
from bunny_lora.model.fast import pooled
from bunny_lora.prepare import read_split
from bunny_lora.training import approximation, checkpoint, latents, memory, setup, validation
from bunny_lora.training.latents import EncodedImages
from bunny_lora.training.plan import Pieces, Plan, Work, count_work, often
from bunny_lora.training.setup import Setup

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

N_BESIDE = 3
"""Checkpoints beside those of save_steps: two of save_minutes, and final/."""
N_TIMED = 2
FEWER_STEPS = 12
MIN_SIDE = 64


def make_plan(config: Config) -> Plan:
    """Try a little of a run and return what the whole of it, or what is left of it, will take.

    Args:
        config: of the run; its data are prepared.

    Raises:
        BunnyLoraError: no data, no model, impossible settings, or too little memory for a step.
    """
    begun = list(checkpoint.list_checkpoints(config.run_dir)) if config.resume != "never" else []
    setup.say_doubts(config, begun=bool(begun))
    started = time.perf_counter()
    parts = setup.load_parts(config)
    pipe = components.pipeline_from(parts, config.base_model)
    if config.training.low_memory:
        setup.take_turns(parts, config)
    load_sec = time.perf_counter() - started
    samples, _ = read_split(config)
    data = setup.image_dataset(config, parts, samples)
    work = count_work(config, data, _n_to_encode(config, parts, data), max(begun, default=0))
    images_a_step = config.training.batch_size * config.training.gradient_accumulation_steps
    each, characters = often(config, data, work.n_updates * images_a_step)

    with tempfile.TemporaryDirectory() as folder:
        few, encode_sec = _encode_few(config, parts, samples, Path(folder))
        with _tried(config, parts, pipe, few) as run:
            memory.check(run)
            caption_sec = _caption_sec(parts, few.captions[0])
            micro_batch = _micro_batches(run, 1 + N_TIMED)[1:]
            denoise_sec, decode_sec, image_bytes = _picture(run, Path(folder))
            memory_gb, free_gb = devices.peak_memory_gb(parts.device), _free_gb(parts)
            checkpoint_bytes = _checkpoint_bytes(run, Path(folder))
            by_threads = _by_threads(run, statistics.mean(micro_batch))
            moved = approximation.describe(run)
        pieces = Pieces(load_sec, encode_sec, caption_sec, tuple(micro_batch), denoise_sec, decode_sec)
        saved = dict(_savings(config, parts, pipe, few, work, pieces))
    n_kept = config.training.keep_checkpoints or work.n_milestones
    latent_bytes = few.views[0][0].latent_dist.nbytes
    disk = (n_kept + N_BESIDE) * checkpoint_bytes + work.n_pictures * image_bytes
    return Plan(
        work=work,
        pieces=pieces,
        images_a_step=images_a_step,
        seen=(min(each), max(each)),
        characters=characters,
        memory_gb=memory_gb,
        free_memory_gb=free_gb,
        disk_gb=(disk + work.n_views * latent_bytes) / 1e9,
        free_disk_gb=_free_disk(config.run_dir) / 1e9,
        by_threads=by_threads,
        threads=torch.get_num_threads(),
        saved=saved,
        approximation=moved,
    )


def _n_to_encode(config: Config, parts: Components, data: ImageDataset) -> int:
    """Return how many views a run begins with encoding.

    Faces that `face_encoder` is to tie to names are not known yet: those of one character are counted.
    """
    ways = {"random_flip": config.random_flip, "zoom_on_faces": bool(config.zoom_on_faces)}
    return latents.n_to_encode(parts.vae, data, config.data_path.parent / "latents", **ways)


@contextmanager
def _tried(
    config: Config, parts: Components, pipe: StableDiffusionPipeline, images: EncodedImages
) -> Iterator[Setup]:
    """Put a run together on parts that are loaded, ready to train, and take it apart again."""
    class_images = images if config.prior_preservation.enabled else None
    run = setup.assemble(config, parts, pipe, images, class_images)
    run.set_training_mode(True)
    try:
        yield run
    finally:
        run.set_training_mode(False)
        for model in run.state.models.values():
            model.unload()
        parts.unet.disable_gradient_checkpointing()
        parts.text_encoder.activation_checkpointing_disable()


def _encode_few(
    config: Config, parts: Components, samples: Sequence[Sample], folder: Path
) -> tuple[EncodedImages, float]:
    """Return a few images as the run would train on them, and the seconds that a view of them takes."""
    few = [samples[0], samples[len(samples) // 2]]
    # Both say what they find, which of two images would be untrue of the whole.
    config = config.model_copy(update={"face_encoder": None, "thin_duplicates": False})
    setup.encode(config, parts, few[:1], folder, "training")  # warms up
    started = time.perf_counter()
    images = setup.encode(config, parts, few, folder, "training")
    n_views = sum(len({id(view.latent_dist) for view in views}) for views in images.views)
    return images, (time.perf_counter() - started) / n_views


def _micro_batches(run: Setup, count: int) -> list[float]:
    """Return the seconds of the first micro-batches, whose gradients are thrown away."""
    times = []
    for number in range(count):
        started = time.perf_counter()
        run.learner.loss(number * run.config.training.batch_size).backward()
        devices.synchronize(run.parts.device)
        times.append(time.perf_counter() - started)
        run.state.optimizer.zero_grad()
    return times


def _picture(run: Setup, folder: Path) -> tuple[float, float, int]:
    """Draw a picture of two steps: seconds of a step, seconds of the rest, bytes of the file."""
    config, steps = run.config, _Steps(run.pipe.unet)
    prompt = (config.training.validation_prompts or run.learner.images.captions)[0]
    short = validation.sample_settings(config, prompt, 0).model_copy(update={"num_inference_steps": 2})
    run.set_training_mode(False)
    started = time.perf_counter()
    with steps.watched():
        image = components.generate(run.pipe, short)
    whole = time.perf_counter() - started
    run.set_training_mode(True)
    save_image(image, folder / "image.png")
    size = (folder / "image.png").stat().st_size
    return statistics.mean(steps.seconds[1:]), whole - sum(steps.seconds), size


class _Steps:
    """The seconds of each call of a UNet."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet, self.started = unet, 0.0
        self.seconds: list[float] = []

    @contextmanager
    def watched(self) -> Iterator[None]:
        hooks = (
            self.unet.register_forward_pre_hook(self._begin),
            self.unet.register_forward_hook(self._end),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, *_: object) -> None:
        self.started = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.started)


@torch.no_grad()
def _caption_sec(parts: Components, caption: str) -> float:
    started = time.perf_counter()
    components.encode_prompts(parts, [caption])
    return time.perf_counter() - started


def _checkpoint_bytes(run: Setup, folder: Path) -> int:
    run.learner.loss(0).backward()
    run.state.optimizer.step()
    run.state.optimizer.zero_grad()
    checkpoint.save_checkpoint(folder / "checkpoint-1", run.state, {})
    return sum(file.stat().st_size for file in (folder / "checkpoint-1").rglob("*") if file.is_file())


def _by_threads(run: Setup, known_sec: float) -> dict[int, float]:
    """Return the seconds of a micro-batch by threads: one, half of the processor's, all, and as now."""
    now, all_threads = torch.get_num_threads(), os.cpu_count() or 1
    found = {now: known_sec}
    try:
        for count in {1, max(1, all_threads // 2), all_threads} - {now}:
            torch.set_num_threads(count)
            found[count] = min(_micro_batches(run, N_TIMED))
    finally:
        torch.set_num_threads(now)
    return dict(sorted(found.items()))


def _savings(
    config: Config,
    parts: Components,
    pipe: StableDiffusionPipeline,
    images: EncodedImages,
    work: Work,
    pieces: Pieces,
) -> Iterator[tuple[str, float]]:
    """Yield changes of the configuration and the seconds that they save, each tried on its own."""
    whole = sum(pieces.seconds(work).values())
    for name, changes in _cheaper(config, parts):
        other = validate(merge(config.model_dump(mode="json"), changes))
        cut = replace(images, latent_size=other.resolution // 8)
        with _tried(other, parts, pipe, cut) as run:
            times = tuple(_micro_batches(run, N_TIMED))
        area = (other.resolution / config.resolution) ** 2
        cheaper = replace(
            pieces,
            micro_batch=(min(times),),
            encode=pieces.encode * area,
            denoise=pieces.denoise * area,
            decode=pieces.decode * area,
        )
        yield name, whole - sum(cheaper.seconds(work).values())
    if work.n_pictures and config.sampling.sampler == "own" and work.n_denoising_steps > FEWER_STEPS:
        fewer = replace(work, n_denoising_steps=FEWER_STEPS)
        name = f"sampling: {{sampler: dpm++-2m-karras, num_inference_steps: {FEWER_STEPS}}}"
        yield name, whole - sum(pieces.seconds(fewer).values())


def _cheaper(config: Config, parts: Components) -> Iterator[tuple[str, dict[str, Any]]]:
    for share in (0.75, 0.5):
        if (side := int(config.resolution * share) // 8 * 8) >= MIN_SIDE:
            yield f"resolution: {side}", {"resolution": side}
    if config.lora.rank > 1:
        rank = config.lora.rank // 2
        yield f"lora.rank: {rank}", {"lora": {"rank": rank}}
    if pooled.applies_to(parts.unet) and config.training.pooled_attention is None:
        name = "training.pooled_attention: 2 (an approximation; with it, a plan says how close)"
        yield name, {"training": {"pooled_attention": 2}}
    if config.lora.train_text_encoder:
        yield "lora.train_text_encoder: false", {"lora": {"train_text_encoder": False}}
    if config.training.gradient_checkpointing:
        off = {"training": {"gradient_checkpointing": False}}
        yield "training.gradient_checkpointing: false (more memory)", off


def _free_gb(parts: Components) -> float:
    return devices.free_bytes(parts.device) / 1e9


def _free_disk(run_dir: Path) -> int:
    return shutil.disk_usage(next(folder for folder in run_dir.parents if folder.is_dir())).free
