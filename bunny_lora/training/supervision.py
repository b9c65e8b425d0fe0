"""What happens around the steps of a run: log, checkpoints, samples, requests, a stop in good order."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bunny_lora.core import paths, requests
from bunny_lora.core.interrupts import StoppedError, StopRequest
from bunny_lora.core.progress import progress
from bunny_lora.core.sections import TrainingSection
from bunny_lora.core.status import StatusFile
from bunny_lora.errors import BunnyLoraError, LostProcessError
from bunny_lora.training import checkpoint
from bunny_lora.training.checkpoint import TrainingState
from bunny_lora.training.distributed import ProcessGroup
from bunny_lora.training.log import RunLog
from bunny_lora.training.trackers import Trackers
from bunny_lora.training.validation import ValidationImage, is_milestone, samples_of

if TYPE_CHECKING:
    from bunny_lora.training.loop import StepRecord

# fp16 finds its scale by skipping a few steps in a row; more are no accident.
MAX_SKIPPED_IN_A_ROW = 10


class Supervisor:
    """Follows the steps of one run and keeps its state safe.

    Args:
        run_dir: where everything is written; nobody else writes there.
        training: when to log, save and draw.
        state: of the run, as it stands between two steps.
        about: whose state it is; written into each checkpoint.
        draw: draws pictures that belong to a step, and yields in between; may be stopped.
        validate: measures and logs the loss on held-out frames.
        group: of which the main process writes.
        status: where it says what it does.
        trackers: who else is told.
    """

    def __init__(
        self,
        run_dir: Path,
        training: TrainingSection,
        state: TrainingState,
        about: dict[str, Any],
        draw: Callable[[list[ValidationImage]], Iterator[None]],
        validate: Callable[[], None],
        group: ProcessGroup,
        status: StatusFile,
        trackers: Trackers,
    ) -> None:
        self.run_dir, self.training, self.state, self.about = run_dir, training, state, about
        self.draw, self.validate, self.group = draw, validate, group
        self.status, self.trackers = status, trackers
        self.saved_step, self.saved_at = state.step, time.monotonic()
        self.recent: list[float] = []

    def follow(self, ticks: Iterator[StepRecord | None], *, bar: bool) -> Iterator[StepRecord | None]:
        """Take the run to its end, or to a stop, and pass its records on, and None in between.

        Who takes no more of them stops the run: its state is saved. What is asked for in the run's
        folder is done between two micro-batches; a stop, after the step.

        Raises:
            StoppedError: a stop came from outside; the state was saved before.
            LostProcessError: another process of the run has gone; likewise.
            BunnyLoraError: too many steps in a row gave no finite numbers, or nothing can be written.
        """
        writes, step = self.group.is_main, self.state.step
        log = contextlib.closing(RunLog(self.run_dir)) if writes else contextlib.nullcontext()
        total = self.training.max_train_steps
        shown = progress(desc="train", total=total, initial=step, unit="step", disable=not bar)
        self.status.write("working", "training")
        with log as self.log, shown as self.bar:
            try:
                for record in ticks:
                    if record is not None:
                        self._note(record)
                        yield from self._save_if_due()
                        self.bar.update()
                    yield record
                    yield from self._obey(after_a_step=record is not None)
            except GeneratorExit:
                self._save_before_stopping()
                raise
            except StopRequest as stop:
                self._save_before_stopping()
                raise StoppedError(self._where_it_goes_on(), stop.number) from None
            except LostProcessError as lost:
                self._save_before_stopping()
                if writes:
                    raise LostProcessError(lost.reason, self._where_it_goes_on()) from None
                raise

    def _obey(self, *, after_a_step: bool) -> Iterator[None]:
        """Do what somebody has asked for; many processes do so after a step only, all of them."""
        if not after_a_step and self.group.count > 1:
            return
        for kind in self.group.broadcast_from_main(lambda: requests.pending(self.run_dir)):
            if kind == "stop" and not (after_a_step and self._is_unfinished()):
                continue
            if self.group.is_main:
                requests.withdraw(self.run_dir, kind)
            if kind == "stop":
                self._save_before_stopping()
                by = "a request in its folder"
                raise StoppedError(self._where_it_goes_on(), signal.SIGTERM, by)
            if kind == "save":
                self._save_as_asked()
            else:
                yield from self._draw_as_asked()

    def _is_unfinished(self) -> bool:
        return self.state.step < self.training.max_train_steps

    def _save_as_asked(self) -> None:
        step = self.state.step
        if not step:
            print("Asked to save: there is nothing yet, no step is finished.")
            return
        if step != self.saved_step:
            self._save(milestone=False)
        if self.log is not None:
            folder = self.run_dir / f"checkpoint-{step}"
            (folder / checkpoint.KEEP).touch()
            print(f"Saved as asked, to stay: {paths.relative(folder)}")

    def _draw_as_asked(self) -> Iterator[None]:
        wanted = samples_of(self.run_dir, self.training, self.state.step, asked=True)
        if not wanted:
            print("Asked for samples: training.validation_prompt names none to draw.")
            return
        yield from self._draw(wanted)
        print(f"Drawn as asked: {paths.relative(wanted[0].path.parent)}")

    def _draw(self, wanted: list[ValidationImage]) -> Iterator[None]:
        self.status.write("working", "drawing samples")
        yield from self.draw(wanted)
        self.trackers.log_samples(self.state.step, [sample.path for sample in wanted])
        self.status.write("working", "training")

    def _note(self, record: StepRecord) -> None:
        state, every = self.state, self.training.logging_steps
        state.step = record.step
        state.skipped += record.skipped
        state.skipped_in_a_row = state.skipped_in_a_row + 1 if record.skipped else 0
        if self.log is not None:
            self.log.write(asdict(record))
            self.trackers.log_step(record)
        if not record.skipped:
            self.recent.append(record.loss)
        if self.recent and (record.step % every == 0 or record.step == self.training.max_train_steps):
            loss = f"{sum(self.recent) / len(self.recent):.4f}"
            skipped = {"skipped": state.skipped} if state.skipped else {}
            self.bar.set_postfix(loss=loss, **skipped, refresh=False)
            self.recent.clear()
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise BunnyLoraError(self._not_finite())

    def _save_if_due(self) -> Iterator[None]:
        step, minutes = self.state.step, self.training.save_minutes
        if is_milestone(step, self.training):
            self._save(milestone=True)
            self.validate()
            yield from self._draw(samples_of(self.run_dir, self.training, step))
        elif minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes:
            self._save(milestone=False)

    def _save_before_stopping(self) -> None:
        if self.state.step != self.saved_step:
            self._save(milestone=False)

    def _save(self, *, milestone: bool) -> None:
        if self.log is None:
            return
        self.log.sync()
        folder = self.run_dir / f"checkpoint-{self.state.step}"
        checkpoint.save_checkpoint(folder, self.state, self.about, milestone=milestone)
        self.saved_step, self.saved_at = self.state.step, time.monotonic()
        checkpoint.remove_old(self.run_dir, self.training.keep_checkpoints)

    def _where_it_goes_on(self) -> str:
        if not self.saved_step:
            return "No step was finished yet, so nothing was lost: the same command begins again."
        folder = paths.relative(self.run_dir / f"checkpoint-{self.saved_step}")
        done = f"Step {self.saved_step} of {self.training.max_train_steps} is saved in {folder}"
        return f"{done}: the same command goes on from there."

    def _not_finite(self) -> str:
        return (
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row gave a loss or gradients that are not finite. None"
            " of them changed the weights, and the last checkpoint, after step"
            f" {self.saved_step}, is whole. Begin a run in another output_dir with a lower"
            " training.learning_rate, or with training.mixed_precision: bf16 (or no)."
        )
