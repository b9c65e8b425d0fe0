"""What a run will take, before it is begun: its work counted, times what `rehearsal` has measured."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from bunny_lora.config import Config
from bunny_lora.data.shots import near_duplicates
from bunny_lora.dataset import ImageDataset
from bunny_lora.training import banner, validation
from bunny_lora.training.held_out_loss import N_VALIDATION

LEAST_DOUBT = 0.1
"""Share of a time that it may be off by, however alike the trials were: a machine does other things."""


@dataclass(frozen=True)
class Work:
    """What is to be done, counted."""

    n_updates: int
    n_micro_batches: int
    n_views: int
    n_captions: int
    n_milestones: int
    n_pictures: int
    n_denoising_steps: int
    n_validations: int = 0


@dataclass(frozen=True)
class Pieces:
    """What each of it takes, in seconds; `micro_batch` is a time for each trial."""

    load: float
    encode: float
    caption: float
    micro_batch: tuple[float, ...]
    denoise: float
    decode: float

    def seconds(self, work: Work) -> dict[str, float]:
        """Return how long the parts of a run take."""
        picture = work.n_denoising_steps * self.denoise + self.decode
        return {
            "to begin": self.load + work.n_views * self.encode + work.n_captions * self.caption,
            f"{work.n_updates} updates": work.n_micro_batches * statistics.mean(self.micro_batch),
            f"{work.n_pictures} pictures": work.n_pictures * picture,
        } | self._validations(work)

    def _validations(self, work: Work) -> dict[str, float]:
        """A held-out frame goes forwards once, where a denoising step takes two samples there."""
        each = N_VALIDATION * self.denoise / 2
        done = work.n_validations
        return {f"{done} looks at held-out frames": done * each} if done else {}

    @property
    def doubt(self) -> float:
        """By which share of the time the run may take more or less."""
        half = (max(self.micro_batch) - min(self.micro_batch)) / 2
        return max(LEAST_DOUBT, half / statistics.mean(self.micro_batch))


@dataclass(frozen=True)
class Plan:
    """A run as it would be. Bytes are GB of 10^9; `saved` are seconds by the change that saves them.

    `seen` says how often each frame is seen, `characters` how often each character; `by_threads` are
    seconds of a micro-batch. `approximation` says how far one that was chosen moves what is learnt.
    """

    work: Work
    pieces: Pieces
    images_a_step: int
    seen: tuple[float, float]
    characters: dict[str, float]
    memory_gb: float
    free_memory_gb: float
    disk_gb: float
    free_disk_gb: float
    by_threads: dict[int, float]
    threads: int
    saved: dict[str, float]
    approximation: str = ""

    @property
    def seconds(self) -> float:
        """How long it will take."""
        return sum(self.pieces.seconds(self.work).values())

    def refusals(self, hours: float | None = None) -> list[str]:
        """Return what speaks against beginning; `hours` are those that there are."""
        found = []
        if self.disk_gb > self.free_disk_gb:
            found.append(f"{self.disk_gb:.1f} GB of disk, and {self.free_disk_gb:.1f} are free")
        longest = self.seconds * (1 + self.pieces.doubt)
        if hours is not None and longest > hours * 3600:
            found.append(f"up to {banner.duration(longest)}, more than {hours:g} hours")
        return found

    def __str__(self) -> str:
        parts = self.pieces.seconds(self.work).items()
        less, more = ((1 + sign * self.pieces.doubt) * self.seconds for sign in (-1, 1))
        lines = {
            "time": f"{banner.duration(self.seconds)}, between {banner.duration(less)} and"
            f" {banner.duration(more)}: " + ", ".join(f"{banner.duration(s)} {x}" for x, s in parts),
            "memory": f"{self.memory_gb:.1f} GB at most; {self.free_memory_gb:.1f} GB more were free",
            "disk": f"{self.disk_gb:.2f} GB, and {self.free_disk_gb:.0f} GB are free",
            "updates": f"{self.work.n_updates} on {self.images_a_step} images each",
            "each frame": _times(*self.seen),
            "characters": ", ".join(f"{name} {n:.0f} times" for name, n in self.characters.items())
            or "nobody is named",
            "threads": self._threads(),
            **({"approximation": self.approximation} if self.approximation else {}),
            "would save": "\n               ".join(self._savings()) or "nothing that was tried",
        }
        return "\n".join(f"{name:<15}{text}" for name, text in lines.items())

    def _threads(self) -> str:
        times = ", ".join(f"{n}: {sec:.2f} s" for n, sec in self.by_threads.items())
        best = min(self.by_threads, key=self.by_threads.__getitem__)
        advice = "as now" if best == self.threads else f"set OMP_NUM_THREADS={best}"
        return f"{times} a micro-batch; fastest: {best}, {advice}"

    def _savings(self) -> Iterator[str]:
        doubt = self.pieces.doubt * self.seconds
        for change, seconds in self.saved.items():
            amount = banner.duration(seconds) if seconds > 0 else "nothing"
            yield f"{change}: {amount}" + (" (less than the doubt)" if 0 < seconds < doubt else "")


def _times(fewest: float, most: float) -> str:
    if round(fewest) == round(most):
        return f"seen about {most:.0f} times"
    return f"seen {fewest:.0f} to {most:.0f} times"


# ---------------------------------------------------------------------------- counting


def count_work(config: Config, images: ImageDataset, n_views: int, n_done: int = 0) -> Work:
    """Return what a run has left to do after `n_done` steps, with `n_views` still to encode."""
    training, prior = config.training, config.prior_preservation
    steps = range(n_done + 1, training.max_train_steps + 1)
    milestones = sum(validation.is_milestone(step, training) for step in steps)
    n_class = prior.num_class_images if prior.enabled else 0
    n_samples = milestones * len(training.validation_prompts) * training.num_validation_images
    return Work(
        n_updates=len(steps),
        n_micro_batches=len(steps) * training.gradient_accumulation_steps,
        n_views=n_class + n_views,
        n_captions=0 if config.lora.train_text_encoder else len({s.caption for s in images.samples}),
        n_milestones=milestones,
        n_pictures=n_class + n_samples,
        n_denoising_steps=config.sampling.num_inference_steps,
        n_validations=milestones + (n_done == 0) if config.held_out else 0,
    )


def often(config: Config, images: ImageDataset, n_images: int) -> tuple[list[float], dict[str, float]]:
    """Return how often a run of `n_images` sees each frame, and by name how often each character."""
    paths = [sample.path for sample in images.samples]
    groups = near_duplicates(paths) if config.thin_duplicates else None
    repeats = images.repeats(
        balance=config.balance_characters, zoom=config.zoom_on_faces, groups=groups
    )
    each = [n_images * n / sum(repeats) for n in repeats]
    of_pictures = 1 - config.preservation.share - config.naming.share
    counts: Counter[str] = Counter()
    for sample, n in zip(images.samples, each, strict=True):
        counts.update(dict.fromkeys(sample.characters, n * of_pictures))
    return each, dict(sorted(counts.items(), key=lambda item: -item[1]))
