"""Train LoRA adapters: the loop itself, and `LoRATrainer`, which does everything around it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bunny_lora import (
    adapters,
    banner,
    checkpoint,
    components,
    dataset,
    formats,
    handover,
    identity,
    interrupts,
    memory,
    resume,
    run_lock,
    runs,
    samples,
)
from bunny_lora.checkpoint import TrainingState
from bunny_lora.config import Config, load_config
from bunny_lora.errors import BunnyLoraError
from bunny_lora.formats import LoRA
from bunny_lora.identity import Identity
from bunny_lora.latents import EncodedImages, encode_dataset
from bunny_lora.learning import Learner
from bunny_lora.prepare import prepare_data, source_changed
from bunny_lora.progress import progress
from bunny_lora.resume import Start
from bunny_lora.samples import Sample
from bunny_lora.seeding import derive_seed
from bunny_lora.supervision import Supervisor


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step. `loss` is the mean over its `n_images` images.

    `skipped`: loss or gradients were not finite, and the weights stayed as they were.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    skipped: bool
    seconds: float
    n_images: int
    peak_memory_gb: float


def training_loop(
    learner: Learner,
    optimizer: Optimizer,
    lr_scheduler: LRScheduler,
    scaler: torch.amp.GradScaler,
    start_step: int = 0,
) -> Iterator[StepRecord]:
    """Yield a record after each optimiser step, from `start_step + 1` to `max_train_steps`.

    A step is one update on batch_size x gradient_accumulation_steps images. The caller decides what
    happens in between: logging, samples, checkpoints, or stopping early. A stop from outside drops the
    micro-batch that it comes in, and leaves everything as it was after the last step.
    """
    training = learner.config.training
    images_per_step = training.batch_size * training.gradient_accumulation_steps
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    for step in range(start_step + 1, training.max_train_steps + 1):
        started = time.perf_counter()
        first = (step - 1) * images_per_step
        losses = []
        for position in range(first, first + images_per_step, training.batch_size):
            with interrupts.stoppable():
                loss = learner.loss(position)
                scaler.scale(loss / training.gradient_accumulation_steps).backward()
                losses.append(loss.item())

        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm).item()
        learning_rate = float(lr_scheduler.get_last_lr()[0])
        finite = math.isfinite(sum(losses)) and math.isfinite(grad_norm)
        if finite:
            scaler.step(optimizer)
        scaler.update()
        lr_scheduler.step()
        optimizer.zero_grad()

        yield StepRecord(
            step=step,
            loss=sum(losses) / len(losses),
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            skipped=not finite,
            seconds=time.perf_counter() - started,
            n_images=images_per_step,
            peak_memory_gb=banner.peak_memory_gb(learner.components.device),
        )


def build_optimizer(config: Config, parameters: list[torch.nn.Parameter]) -> Optimizer:
    """Return AdamW with torch's defaults, or bitsandbytes' 8-bit version of it.

    Raises:
        BunnyLoraError: `use_8bit_adam` without a CUDA GPU or without bitsandbytes.
    """
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, lr=config.training.learning_rate)
    try:
        import bitsandbytes
    except ImportError:
        raise BunnyLoraError(
            "use_8bit_adam needs the bitsandbytes package: `pip install bitsandbytes`, or set it to"
            " false (LoRA's optimiser state is a few MB anyway)."
        ) from None
    if not torch.cuda.is_available():
        raise BunnyLoraError("use_8bit_adam needs a CUDA GPU; set it to false here.")
    return bitsandbytes.optim.AdamW8bit(parameters, lr=config.training.learning_rate)


class LoRATrainer:
    """Stage 5 in one call: `LoRATrainer("params/cpu.yaml").train()`.

    Args:
        config_path: a YAML file with a `finetuning:` section. None looks for `config.yaml` in the
            working folder (a host pipeline's), then for the project's default (`runs.choose_params`).
        overrides: laid over the file, `{"training": {"max_train_steps": 5}}`.
        config: a ready configuration instead of a file.
    """

    def __init__(
        self,
        config_path: str | Path | None = None,
        overrides: Mapping[str, Any] | None = None,
        *,
        config: Config | None = None,
    ) -> None:
        if config is None:
            if config_path is None:
                config_path, reason = runs.choose_params()
                print(f"Configuration: {config_path or 'no file'} ({reason})")
            config = load_config(config_path, overrides)
        self.config = config
        self.run_dir = runs.resolve(self.config.output_dir)
        self.data_dir = runs.resolve(self.config.data_dir)

    def train(self) -> Path:
        """Do everything that is left to do of this run and return its `final/` folder.

        Raises:
            StoppedError: a signal or the stop button came; the state was saved, if there was any.
            BunnyLoraError: no data, no model, impossible settings, or a run folder with another run.
        """
        with interrupts.watch():
            with interrupts.stoppable():
                self.prepare_data()
            if self.config.resume == "never":
                with run_lock.hold(self.run_dir):
                    resume.begin_anew(self.run_dir)
            with run_lock.hold(self.run_dir):
                return self._train_what_is_left(self.run_dir / "final")

    def _train_what_is_left(self, final: Path) -> Path:
        with interrupts.stoppable():
            data_sha256 = dataset.data_sha256(self.data_dir)
            start = resume.open_run(self.run_dir, self.config, data_sha256)
            complete = self._is_complete(start, final)
            if not complete:
                resume.announce(self.run_dir, start)
                self.load(start)
        if complete:
            print(f"This run is complete: {runs.relative(final)}. Raise max_train_steps to go on.")
        else:
            self._train_to_the_end(Identity.of(self.config, data_sha256).as_dict())
            checkpoint.save_adapters(final, self.models)
            print(f"Done: {runs.relative(final)}")
        handover.write_handover(self.run_dir, self.config)
        checkpoint.remove_old(self.run_dir, self.config.training.keep_checkpoints, finished=True)
        return final

    def _missing_samples(self, step: int) -> list[Sample]:
        return samples.missing_samples(self.run_dir, self.config.training, step)

    def _is_complete(self, start: Start, final: Path) -> bool:
        done = start.folder is not None and start.step == self.config.training.max_train_steps
        if not done or self._missing_samples(start.step):
            return False
        return start.folder is not None and checkpoint.same_adapters(start.folder, final)

    def prepare_data(self) -> None:
        """Prepare the training data if there is none; say so if its source has changed since."""
        runs.recover(self.data_dir.parent)
        if not (self.data_dir / "metadata.jsonl").is_file():
            summary = prepare_data(self.config)
            print(f"Prepared {summary['n_images']} images in {runs.relative(self.data_dir)}")
        elif source_changed(self.config):
            print(
                "The frames have changed since they were prepared, and training goes on with what was"
                " prepared then. To take them in: notebook 01, or `bunny-lora prepare`."
            )

    def load(self, start: Start = Start()) -> None:  # noqa: B008
        """Load the base model, attach LoRA, encode the data, and take up the state of `start`."""
        config, training = self.config, self.config.training
        device = components.resolve_device(config.device)
        dtype = components.resolve_dtype(training.mixed_precision, device)
        self.parts = components.load_components(config.base_model, device, dtype)
        self.base_sha256 = identity.model_sha256(self.parts)
        start.check_base(self.base_sha256, str(dtype).removeprefix("torch."))
        memory.check_pictures(self.parts, config.resolution)
        self.pipe = components.pipeline_from(self.parts, config.base_model)
        given = self._given_lora()
        images = self._encode(self.data_dir, config.instance_prompt, "training")
        class_images = self._class_images() if config.prior_preservation.enabled else None

        self.models = self._attach()
        self.learner = Learner(self.parts, config, images, class_images)
        self.optimizer = build_optimizer(config, self.trainable())
        self.lr_scheduler = get_scheduler(
            training.lr_scheduler,
            self.optimizer,
            num_warmup_steps=training.lr_warmup_steps,
            num_training_steps=training.max_train_steps,
        )
        scaled = device.type == "cuda" and dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.state = TrainingState(self.models, self.optimizer, self.lr_scheduler, self.scaler)
        self.history = start.history
        if start.folder is not None:
            checkpoint.load_checkpoint(start.folder, self.state)
        elif given:
            adapters.start_from(self.models, given)

    def _given_lora(self) -> LoRA:
        """Return `lora.start_from`, read before anything that takes long."""
        if self.config.lora.start_from is None:
            return {}
        path = adapters.find_weights(self.config.lora.start_from)
        return formats.read_lora(path, {part: getattr(self.parts, part) for part in adapters.PARTS})

    def trainable(self) -> list[torch.nn.Parameter]:
        """Return every parameter that training changes."""
        models = [getattr(self.parts, part) for part in self.models]
        return [p for model in models for p in adapters.trainable_parameters(model).values()]

    def _attach(self) -> dict[str, PeftModel]:
        config = self.config
        if config.training.gradient_checkpointing:
            self.parts.unet.enable_gradient_checkpointing()
            if config.lora.train_text_encoder:
                self.parts.text_encoder.gradient_checkpointing_enable()
        names = adapters.PARTS if config.lora.train_text_encoder else adapters.PARTS[:1]
        return {
            part: adapters.attach(
                getattr(self.parts, part),
                part,
                config.lora,
                base_model=config.base_model,
                seed=config.training.seed,
            )
            for part in names
        }

    def _encode(self, folder: Path, prompt: str, stream: str) -> EncodedImages:
        config = self.config
        images = dataset.ImageDataset(
            folder,
            resolution=config.resolution,
            center_crop=config.center_crop,
            instance_prompt=prompt,
        )
        named = zip(images.captions, images.characters, strict=True)
        tokenizer = self.parts.tokenizer
        captions = [dataset.name_first(text, names, tokenizer) for text, names in named]
        return encode_dataset(
            self.parts.vae,
            images,
            captions,
            folder.parent / "latents",
            random_flip=config.random_flip,
            zoom_on_faces=config.zoom_on_faces,
            tag_dropout=config.training.caption_tag_dropout if stream == "training" else 0.0,
            num_workers=config.num_workers,
            pin_memory=config.pin_memory,
            stream=stream,
        )

    def _class_images(self) -> EncodedImages:
        """Draw the class images that are missing, with the base model, and encode all."""
        prior = self.config.prior_preservation
        folder = runs.resolve(prior.class_data_dir)
        present = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
        places = ((i, folder / f"class_{i:05d}.png") for i in itertools.count())
        free = ((i, path) for i, path in places if path not in present)
        missing = list(itertools.islice(free, max(prior.num_class_images - len(present), 0)))
        for i, path in progress(missing, desc="draw class images", disable=not missing):
            seed = derive_seed(self.config.training.seed, "class image", i)
            samples.draw(self.pipe, self.config, Sample(path, prior.class_prompt, seed))
        used = [*present, *(path for _, path in missing)][: prior.num_class_images]
        dataset.write_captions(folder, {path.name: prior.class_prompt for path in used})
        return self._encode(folder, prior.class_prompt, "class")

    def _train_to_the_end(self, about: dict[str, Any]) -> None:
        last_step, n_steps = self.state.step, self.config.training.max_train_steps
        with interrupts.stoppable():
            self._draw_samples(self._missing_samples(last_step))
            self._set_training_mode(True)
            memory.check(self)
            trial = banner.time_trial(self.learner, self.optimizer)
        print(banner.describe(self, trial, n_steps - last_step))

        about = about | {"base_sha256": self.base_sha256, "history": list(self.history)}
        supervisor = Supervisor(
            self.run_dir, self.config.training, self.state, about, self._draw_samples
        )
        steps = training_loop(self.learner, self.optimizer, self.lr_scheduler, self.scaler, last_step)
        supervisor.follow(steps)

    def _draw_samples(self, wanted: list[Sample]) -> None:
        """Draw with the weights as they are; a stop leaves out the rest."""
        self._set_training_mode(False)
        for sample in wanted:
            with interrupts.stoppable():
                samples.draw(self.pipe, self.config, sample)
        self._set_training_mode(True)

    def _set_training_mode(self, training: bool) -> None:
        for part in self.models:
            getattr(self.parts, part).train(training)
