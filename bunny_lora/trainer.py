"""`LoRATrainer`: everything around the training loop, from a configuration to `final/`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from bunny_lora import dataset
from bunny_lora.config import Config, load_config
from bunny_lora.core import files, interrupts, lock, paths, ranks, requests
from bunny_lora.core.image_file import save_image
from bunny_lora.core.status import StatusFile
from bunny_lora.data.summary import remarks
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components, devices
from bunny_lora.prepare import check_as_it_is, prepare_data, reading, source_changed
from bunny_lora.training import (
    banner,
    checkpoint,
    handover,
    log,
    memory,
    resume,
    trackers,
    validation,
)
from bunny_lora.training.distributed import ProcessGroup, process_group
from bunny_lora.training.fingerprint import Fingerprint
from bunny_lora.training.held_out_loss import Validation
from bunny_lora.training.loop import StepRecord, training_loop
from bunny_lora.training.plan import Plan
from bunny_lora.training.rehearsal import make_plan
from bunny_lora.training.resume import Start
from bunny_lora.training.setup import set_up
from bunny_lora.training.supervision import Supervisor
from bunny_lora.training.trackers import Trackers
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
                config_path, reason = paths.choose_params(overrides)
                if ranks.is_main_process():
                    print(f"Configuration: {config_path or 'no file'} ({reason})")
            config = load_config(config_path, overrides)
        self.config = config
        self.run_dir = self.config.run_dir
        self.data_dir = self.config.data_path
        self.group = ProcessGroup()

    def train(self) -> Path:
        """Do everything that is left to do of this run and return its `final/` folder.

        Raises:
            StoppedError: a signal or the stop button came; the state was saved, if there was any.
            BunnyLoraError: no data, no model, impossible settings, or a run folder with another run.
        """
        for _ in self.steps():
            pass
        return self.run_dir / "final"

    def steps(self) -> Iterator[StepRecord]:
        """Do as `train` does, and yield a record after each step, when all that belongs to it is saved.

        Between two steps the caller may plot the records, or `draw` with the weights as they are. Who
        leaves the loop stops the run: its state is saved, and the next call goes on from there.

        Raises:
            StoppedError, BunnyLoraError: as `train`.
        """
        with contextlib.closing(self.ticks()) as ticks:
            for record in ticks:
                if record is not None:
                    yield record

    def ticks(self, *, bar: bool = True) -> Generator[StepRecord | None, None, None]:
        """Do as `steps` does, and yield None too, between two micro-batches and between two samples.

        Then a caller can look after other things without waiting for a step to end.

        Args:
            bar: show a progress bar of the steps.
        """
        device = devices.resolve_device(self.config.device)
        trackers.check(self.config.training.trackers)
        # A random model is built here: of many processes, transformers lets only the first save one.
        components.resolve_base_model(self.config.base_model)
        with interrupts.watch(), process_group(device) as self.group, contextlib.ExitStack() as held:
            self._refuse_idle_processes()
            with interrupts.stoppable(), self.group.main_process_first():
                self.prepare_data()
            self.group.broadcast_from_main(lambda: self._take_folder(held))
            yield from self._train_what_is_left(self.run_dir / "final", bar=bar)

    def plan(self) -> Plan:
        """Try a little of the run on this machine, and say what all of it, or what is left, will take.

        Raises:
            BunnyLoraError: no data, no model, impossible settings, or too little memory for a step.
        """
        self.prepare_data()
        return make_plan(self.config)

    def generate_image(self, prompt: str, *, seed: int = 42) -> Image.Image:
        """Draw between two steps, with the weights as they are, as the run's samples are drawn."""
        self.setup.set_training_mode(False)
        image = validation.generate(self.setup.pipe, self.config, ValidationImage(Path(), prompt, seed))
        self.setup.set_training_mode(True)
        return image

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
            with lock.acquire(self.run_dir):
                resume.archive_old_run(self.run_dir)
        held.enter_context(lock.acquire(self.run_dir))
        for kind in requests.clear(self.run_dir):
            print(f"A request to {kind} from before the start was there; it is taken away, not obeyed.")

    def _train_what_is_left(self, final: Path, *, bar: bool) -> Iterator[StepRecord | None]:
        with interrupts.stoppable():
            identity = components.base_identity(self.config.base_model)
            data = dataset.data_sha256(self.data_dir, **reading(self.config))
            about = Fingerprint.of(self.config, data, self.group.count, identity)
            start, complete = self.group.broadcast_from_main(lambda: self._open(about, final))
        if complete:
            print(f"This run is complete: {paths.relative(final)}. Raise max_train_steps to go on.")
            self.group.broadcast_from_main(lambda: self._finish(final, trained=False))
            return
        with self._status() as status:
            with interrupts.stoppable():
                self.load(start)
                self._refuse_different_processes(about)
            yield from self._train_to_the_end(about.as_dict(), status, bar=bar)
            self.group.broadcast_from_main(lambda: self._finish(final, trained=True))

    @contextlib.contextmanager
    def _status(self) -> Iterator[StatusFile]:
        """Have `status.json` say what the run does, and at its end, how it ended."""
        status = StatusFile(self.run_dir, writes=self.group.is_main)
        status.write("working", "getting ready")
        try:
            yield status
        except (GeneratorExit, interrupts.StoppedError, interrupts.StopRequest) as stop:
            status.write("stopped", str(stop) if isinstance(stop, BunnyLoraError) else "")
            raise
        except BaseException as error:
            with contextlib.suppress(BunnyLoraError):  # On a full disk what failed says more.
                is_ours = isinstance(error, BunnyLoraError)
                status.write("failed", str(error) if is_ours else f"{type(error).__name__}: {error}")
            raise
        status.write("finished")

    def _open(self, about: Fingerprint, final: Path) -> tuple[Start, bool]:
        start = resume.open_run(self.run_dir, self.config, about)
        complete = self._is_complete(start, final)
        if not complete:
            resume.announce(self.run_dir, start)
        return start, complete

    def _refuse_different_processes(self, about: Fingerprint) -> None:
        """Every process must do the same on the same data."""
        known = self.group.all_gather(
            (
                self.config.to_yaml(),
                about.data_sha256,
                self.setup.base_sha256,
                self.setup.class_sha256,
            )
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
            checkpoint.save_adapters(final, self.setup.state.models)
            print(f"Done: {paths.relative(final)}")
            for kind in requests.clear(self.run_dir):
                print(f"A request to {kind} came too late: the run has done all its steps.")
        handover.write_handover(self.run_dir, self.config)
        checkpoint.remove_old(self.run_dir, self.config.training.keep_checkpoints, finished=True)

    def _missing_samples(self, step: int) -> list[ValidationImage]:
        return validation.missing_samples(self.run_dir, self.config, step)

    def _is_complete(self, start: Start, final: Path) -> bool:
        done = start.folder is not None and start.step == self.config.training.max_train_steps
        if not done or self._missing_samples(start.step):
            return False
        return start.folder is not None and checkpoint.same_adapters(start.folder, final)

    def prepare_data(self) -> None:
        """Prepare the training data if there is none; say so if its source has changed since."""
        files.recover(self.data_dir.parent)
        if not dataset.is_data(self.data_dir):
            summary = prepare_data(self.config)
            print(f"Prepared {summary['n_images']} images in {paths.relative(self.data_dir)}")
            if summary["dropped"]:
                print(f"{len(summary['dropped'])} are left out: see data_summary.json beside them")
            _say(remarks(summary))
        elif dataset.load_summary(self.data_dir) is None:
            _say(check_as_it_is(self.config))
        elif source_changed(self.config):
            print(
                "The frames have changed since they were prepared, and training goes on with what was"
                " prepared then. To take them in: notebook 01, or `bunny-lora prepare`."
            )

    def load(self, start: Start = Start()) -> None:  # noqa: B008
        """Put together what the run is made of, `self.setup`, in the state of `start`."""
        self.setup = set_up(self.config, start, self.group)

    def _train_to_the_end(
        self, about: dict[str, Any], status: StatusFile, *, bar: bool
    ) -> Iterator[StepRecord | None]:
        setup, state, training = self.setup, self.setup.state, self.config.training
        last_step, n_steps = state.step, training.max_train_steps
        missing = self.group.broadcast_from_main(lambda: self._missing_samples(last_step))
        yield from self._generate_samples(missing)
        with interrupts.stoppable():
            setup.set_training_mode(True)
            memory.check(setup)
            trial = banner.time_trial(setup.learner, state.optimizer)
        print(banner.run_summary(setup, trial, n_steps - last_step))

        told = Trackers(self.config, last_step, writes=self.group.is_main)
        with contextlib.closing(told):
            validate = self._validation(told)
            if last_step not in self._validated() and last_step % training.save_steps == 0:
                validate()
            known = {"base_sha256": setup.base_sha256, "class_sha256": setup.class_sha256}
            about = about | known | {"history": list(setup.history)}
            draw = self._generate_samples
            supervisor = Supervisor(
                self.run_dir, training, state, about, draw, validate, self.group, status, told
            )
            ticks = training_loop(
                setup.learner, state.optimizer, state.lr_scheduler, state.scaler, last_step, self.group
            )
            yield from supervisor.follow(ticks, bar=bar)

    def _validation(self, told: Trackers) -> Callable[[], None]:
        """Return what measures the loss on held-out frames and logs it; nothing, without frames."""
        if not self.setup.held_out:
            return lambda: None
        with interrupts.stoppable():
            held_out = Validation(self.setup) if self.group.is_main else None
            self.setup.offload_unused()

        def measure() -> None:
            assert held_out is not None  # Only the main process measures.
            self.setup.set_training_mode(False)
            with interrupts.stoppable():
                record = {"step": self.setup.state.step} | held_out.measure()
            self.setup.set_training_mode(True)
            log.append_validation(self.run_dir, record)
            told.log_validation(record["step"], record)

        return lambda: self.group.broadcast_from_main(measure)

    def _validated(self) -> set[int]:
        """Return the steps that are; the main process alone may look, but all need the same answer."""
        path = self.run_dir / log.VALIDATION
        return self.group.broadcast_from_main(lambda: {r["step"] for r in log.read_lines(path)})

    def _generate_samples(self, wanted: list[ValidationImage]) -> Iterator[None]:
        """Draw with the weights as they are, and yield in between; a stop leaves out the rest."""
        self.setup.set_training_mode(False)
        for sample, image in self.group.share(wanted, self._generate):
            if self.group.is_main:
                save_image(image, sample.path)
            yield
        self.setup.set_training_mode(True)

    def _generate(self, sample: ValidationImage) -> Image.Image:
        with interrupts.stoppable():
            return validation.generate(self.setup.pipe, self.config, sample)


def _say(lines: list[str]) -> None:
    for line in lines:
        print(line)
