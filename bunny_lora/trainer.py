"""`LoRATrainer`: everything around the training loop, from a configuration to `final/`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from peft import PeftModel
from PIL import Image

from bunny_lora import dataset
from bunny_lora.config import Config, load_config
from bunny_lora.core import files, interrupts, lock, paths, ranks
from bunny_lora.data.frames import Sample
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import adapters, components, devices, formats
from bunny_lora.model.formats import LoRA
from bunny_lora.prepare import prepare_data, source_changed
from bunny_lora.training import (
    banner,
    checkpoint,
    class_images,
    fingerprint,
    handover,
    memory,
    resume,
    validation,
)
from bunny_lora.training.checkpoint import TrainingState
from bunny_lora.training.distributed import Processes, together
from bunny_lora.training.fingerprint import Identity
from bunny_lora.training.latents import EncodedImages, encode_dataset
from bunny_lora.training.loop import training_loop
from bunny_lora.training.objective import Learner
from bunny_lora.training.optim import build_optimizer
from bunny_lora.training.resume import Start
from bunny_lora.training.supervision import Supervisor
from bunny_lora.training.validation import ValidationImage


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
                config_path, reason = paths.choose_params()
                if ranks.is_main_process():
                    print(f"Configuration: {config_path or 'no file'} ({reason})")
            config = load_config(config_path, overrides)
        self.config = config
        self.run_dir = self.config.run_dir
        self.data_dir = self.config.data_path
        self.group = Processes()

    def train(self) -> Path:
        """Do everything that is left to do of this run and return its `final/` folder.

        Raises:
            StoppedError: a signal or the stop button came; the state was saved, if there was any.
            BunnyLoraError: no data, no model, impossible settings, or a run folder with another run.
        """
        device = devices.resolve_device(self.config.device)
        # A stand-in is built here: of a group of processes, transformers lets only the first save one.
        components.resolve_base_model(self.config.base_model)
        with interrupts.watch(), together(device) as self.group, contextlib.ExitStack() as held:
            self._refuse_idle_processes()
            with interrupts.stoppable(), self.group.in_turn():
                self.prepare_data()
            self.group.told_by_main(lambda: self._take_folder(held))
            return self._train_what_is_left(self.run_dir / "final")

    def _refuse_idle_processes(self) -> None:
        """A step's micro-batches are what processes share."""
        training, count = self.config.training, self.group.count
        if training.gradient_accumulation_steps < count:
            raise BunnyLoraError(
                f"{count} processes share the micro-batches of a step, and with training."
                f"gradient_accumulation_steps: {training.gradient_accumulation_steps} some of them have"
                f" nothing to do. Set it to {count} or more, and training.batch_size lower in turn, so"
                " that a step has as many images as before; or launch fewer processes."
            )

    def _take_folder(self, held: contextlib.ExitStack) -> None:
        if self.config.resume == "never":
            with lock.hold(self.run_dir):
                resume.begin_anew(self.run_dir)
        held.enter_context(lock.hold(self.run_dir))

    def _train_what_is_left(self, final: Path) -> Path:
        with interrupts.stoppable():
            identity = components.base_identity(self.config.base_model)
            data = dataset.data_sha256(self.data_dir)
            about = Identity.of(self.config, data, self.group.count, identity)
            start, complete = self.group.told_by_main(lambda: self._open(about, final))
            if not complete:
                self.load(start)
                self._refuse_different_processes(about)
        if complete:
            print(f"This run is complete: {paths.relative(final)}. Raise max_train_steps to go on.")
        else:
            self._train_to_the_end(about.as_dict())
        self.group.told_by_main(lambda: self._finish(final, trained=not complete))
        return final

    def _open(self, about: Identity, final: Path) -> tuple[Start, bool]:
        start = resume.open_run(self.run_dir, self.config, about)
        complete = self._is_complete(start, final)
        if not complete:
            resume.announce(self.run_dir, start)
        return start, complete

    def _refuse_different_processes(self, about: Identity) -> None:
        """Every process must do the same on the same data."""
        known = self.group.gathered(
            (self.config.to_yaml(), about.data_sha256, self.base_sha256, self.class_sha256)
        )
        for rank, theirs in enumerate(known):
            what = ("settings", "training data", "weights of the base model", "class images")
            if other := [name for name, a, b in zip(what, theirs, known[0], strict=True) if a != b]:
                raise BunnyLoraError(
                    f"Process {rank} has other {' and '.join(other)} than the main process: bring the"
                    " same files to its computer, or let all share one folder."
                )

    def _finish(self, final: Path, *, trained: bool) -> None:
        if trained:
            checkpoint.save_adapters(final, self.models)
            print(f"Done: {paths.relative(final)}")
        handover.write_handover(self.run_dir, self.config)
        checkpoint.remove_old(self.run_dir, self.config.training.keep_checkpoints, finished=True)

    def _missing_samples(self, step: int) -> list[ValidationImage]:
        return validation.missing_samples(self.run_dir, self.config.training, step)

    def _is_complete(self, start: Start, final: Path) -> bool:
        done = start.folder is not None and start.step == self.config.training.max_train_steps
        if not done or self._missing_samples(start.step):
            return False
        return start.folder is not None and checkpoint.same_adapters(start.folder, final)

    def prepare_data(self) -> None:
        """Prepare the training data if there is none; say so if its source has changed since."""
        files.recover(self.data_dir.parent)
        if not (self.data_dir / "metadata.jsonl").is_file():
            summary = prepare_data(self.config)
            print(f"Prepared {summary['n_images']} images in {paths.relative(self.data_dir)}")
        elif source_changed(self.config):
            print(
                "The frames have changed since they were prepared, and training goes on with what was"
                " prepared then. To take them in: notebook 01, or `bunny-lora prepare`."
            )

    def load(self, start: Start = Start()) -> None:  # noqa: B008
        """Load the base model, attach LoRA, encode the data, and take up the state of `start`."""
        config, training = self.config, self.config.training
        device = devices.resolve_device(config.device)
        dtype = devices.resolve_dtype(training.mixed_precision, device)
        with self.group.in_turn():
            self.parts = components.load_components(config.base_model, device, dtype)
            self.base_sha256 = fingerprint.model_sha256(self.parts)
            start.check_base(self.base_sha256, str(dtype).removeprefix("torch."))
            memory.check_pictures(self.parts, config.resolution)
            self.pipe = components.pipeline_from(self.parts, config.base_model)
            given = self._given_lora() if self.group.is_main else {}
            images = self._encode(self.data_dir, self.data_dir.parent, "training")
            self.class_sha256: str | None = None
            preserved = self._class_images(start) if config.prior_preservation.enabled else None

        self.models = self._attach()
        self.learner = Learner(self.parts, config, images, preserved)
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
        self.group.told_by_main(lambda: self._take_up(start, given))
        if self.group.count > 1:
            told = self.group.told_by_main(lambda: checkpoint.snapshot(self.state))
            checkpoint.restore(self.state, told)

    def _take_up(self, start: Start, given: LoRA) -> None:
        if start.folder is not None:
            checkpoint.load_checkpoint(start.folder, self.state)
        elif given:
            adapters.start_from(self.models, given)

    def _given_lora(self) -> LoRA:
        """Return `lora.start_from`, read before anything that takes long."""
        if self.config.lora.start_from is None:
            return {}
        path = adapters.find_weights(paths.resolve(self.config.lora.start_from))
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
                self.parts.text_encoder.activation_checkpointing_enable()
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

    def _encode(self, source: Path | list[Sample], place: Path, stream: str) -> EncodedImages:
        config = self.config
        images = dataset.ImageDataset(
            source,
            resolution=config.resolution,
            center_crop=config.center_crop,
            instance_prompt=config.instance_prompt,
            tokenizer=self.parts.tokenizer,
        )
        return encode_dataset(
            self.parts.vae,
            images,
            place / "latents",
            random_flip=config.random_flip,
            zoom_on_faces=config.zoom_on_faces,
            tag_dropout=config.training.caption_tag_dropout if stream == "training" else 0.0,
            repeats=images.repeats() if config.balance_characters and stream == "training" else None,
            num_workers=config.num_workers,
            pin_memory=config.pin_memory,
            stream=stream,
        )

    def _class_images(self, start: Start) -> EncodedImages:
        """Draw the class images that are missing or stale, with the base model, and encode all."""
        wanted = class_images.plan(self.pipe, self.config, self.base_sha256)
        self.class_sha256 = wanted.sha256()
        start.check_class_images(self.class_sha256)
        class_images.draw(self.pipe, self.config, wanted)
        place = paths.resolve(self.config.prior_preservation.class_data_dir).parent
        return self._encode(wanted.samples, place, "class")

    def _train_to_the_end(self, about: dict[str, Any]) -> None:
        last_step, n_steps = self.state.step, self.config.training.max_train_steps
        with interrupts.stoppable():
            missing = self.group.told_by_main(lambda: self._missing_samples(last_step))
            self._draw_samples(missing)
            self._set_training_mode(True)
            memory.check(self)
            trial = banner.time_trial(self.learner, self.optimizer)
        print(banner.describe(self, trial, n_steps - last_step))

        known = {"base_sha256": self.base_sha256, "class_sha256": self.class_sha256}
        about = about | known | {"history": list(self.history)}
        supervisor = Supervisor(
            self.run_dir,
            self.config.training,
            self.state,
            about,
            self._draw_samples,
            writes=self.group.is_main,
        )
        steps = training_loop(
            self.learner, self.optimizer, self.lr_scheduler, self.scaler, last_step, self.group
        )
        supervisor.follow(steps)

    def _draw_samples(self, wanted: list[ValidationImage]) -> None:
        """Draw with the weights as they are; a stop leaves out the rest."""
        self._set_training_mode(False)
        for sample, image in self.group.share(wanted, self._draw):
            if self.group.is_main:
                validation.save(image, sample)
        self._set_training_mode(True)

    def _draw(self, sample: ValidationImage) -> Image.Image:
        with interrupts.stoppable():
            return validation.draw(self.pipe, self.config, sample)

    def _set_training_mode(self, training: bool) -> None:
        for part in self.models:
            getattr(self.parts, part).train(training)
