"""Pretrain the reader: a small classifier that says what a picture shows, to hold against the prompt.

It is never shown a caption or a generated picture, so it judges both without favour. Half of what it
learns from are renders as the autoencoder gives them back: whatever the denoiser draws comes out of
that, and a reader of sharp renders alone takes its softened capes and marks for something else. Its
characters have all traits in all combinations, those of heroes too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from bunny_lora.core.files import atomic_path, sha256, write_json
from bunny_lora.core.seeding import derive_seed, generator
from bunny_lora.world import attributes
from bunny_lora.world.attributes import CAMERAS, Picture, random_picture
from bunny_lora.world.pretraining.data import (
    as_rows,
    filled_rows,
    heldout_seed,
    made_or_shipped,
    to_unit,
)
from bunny_lora.world.pretraining.learner import TrainState
from bunny_lora.world.pretraining.vae import reconstruct
from bunny_lora.world.traits import QUESTIONS, Reader, truth

N_RENDERS, N_RECONSTRUCTED = 9_000, 2_600
_NOT_ASKED = -100
_JITTER = 0.12
_FACE_WEIGHT = 10.0


def reader_picture(seed: int, index: int, camera: str | None = None) -> Picture:
    """Return a picture of one character that may have any traits, half of them in medium shots."""
    rng = attributes.generator(seed, "reader picture", index)
    scene = attributes.random_scene(rng, camera=camera)
    moment = attributes.random_moment(rng, "", attributes.any_traits(rng), scene.camera)
    return Picture(scene, attributes.stage(rng, [moment], scene.camera, 1.0), 1.0)


def single_picture(seed: int, index: int, camera: str = "medium") -> Picture:
    """Return the first random picture of one character seen by `camera`, of many that `index` names."""
    for attempt in range(1000):
        picture = random_picture(seed, 1000 * index + attempt)
        if len(picture.characters) == 1 and picture.scene.camera == camera:
            return picture
    raise AssertionError("random pictures hold every camera")


def labels_of(pictures: Iterable[Picture]) -> torch.Tensor:
    """Return the right answer to every question by its index, int64 [N, questions], or `_NOT_ASKED`."""
    rows = []
    for picture in pictures:
        right = truth(picture)
        rows.append(
            [
                answers.index(right[name]) if name in right else _NOT_ASKED
                for name, answers in QUESTIONS.items()
            ]
        )
    return torch.tensor(rows)


class _Renders(Dataset[np.ndarray]):
    """Picture `index` of the reader's stream, as `as_rows` gives it."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __getitem__(self, index: int) -> np.ndarray:
        return as_rows(reader_picture(self.seed, index), self.size)


def rendered_pictures(
    out_dir: Path,
    n_pictures: int,
    *,
    size: int,
    seed: int,
    n_workers: int = 0,
    report: Callable[[str], None] = print,
) -> np.ndarray:
    """Return the reader's stream, uint8 [n_pictures, 4, size, size], see `as_rows`; draw the missing.

    The pictures lie memory-mapped in `out_dir/renders.npy`.
    """
    Path(out_dir).mkdir(parents=True, exist_ok=True)

    def blocks(first: int) -> Iterable[np.ndarray]:
        rest = range(first, n_pictures)
        loader = DataLoader(_Renders(seed, size), 50, sampler=rest, num_workers=n_workers)
        return (block.numpy() for block in loader)

    shape = (n_pictures, 4, size, size)
    return filled_rows(Path(out_dir) / "renders.npy", {"seed": seed}, shape, np.uint8, blocks, report)


def reconstructed_pictures(
    out_dir: Path, vae_dir: Path, pictures: np.ndarray, report: Callable[[str], None] = print
) -> np.ndarray:
    """Return the first pictures of the stream as the autoencoder gives them back, uint8 [N, 3, H, W].

    They lie memory-mapped in `out_dir/reconstructions.npy`; what is missing there is made.
    """
    vae = AutoencoderKL.from_pretrained(vae_dir).eval()
    n = min(N_RECONSTRUCTED, len(pictures))

    def blocks(first: int) -> Iterable[np.ndarray]:
        for row in range(first, n, 50):
            images = torch.from_numpy(pictures[row : min(row + 50, n), :3])
            yield reconstruct(vae, images).numpy()

    key, shape = {"vae": _vae_sha256(vae_dir)}, (n, 3, *pictures.shape[2:])
    return filled_rows(out_dir / "reconstructions.npy", key, shape, np.uint8, blocks, report)


def _vae_sha256(vae_dir: Path) -> str:
    return sha256(vae_dir / "diffusion_pytorch_model.safetensors")


def _blurred(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Soften and roughen half of the images, as an autoencoder would; float32 [N, 3, H, W]."""
    half = len(images) // 2
    soft = F.avg_pool2d(images[:half], 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand((half, 1, 1, 1), generator=rng)
    soft = images[:half].lerp(soft, share)
    soft = soft + 0.06 * torch.randn(soft.shape, generator=rng)
    return torch.cat([soft, images[half:]])


def faces_of(pictures: np.ndarray) -> torch.Tensor:
    """Return middle and longer side of each face, float32 [N, 3], of rows as `as_rows` gives."""
    faces = []
    for weight in pictures[:, 3]:
        rows, columns = (np.flatnonzero((weight == 3).any(axis)) for axis in (1, 0))
        (top, bottom), (left, right) = ((line[0], line[-1] + 1) for line in (rows, columns))
        faces.append((left + right, top + bottom, 2 * max(right - left, bottom - top)))
    return torch.tensor(np.array(faces) / 2 / pictures.shape[-1], dtype=torch.float32)


class _Lessons:
    """Pictures with labels and faces; half of a batch is what the autoencoder gives back."""

    def __init__(self, pictures: np.ndarray, softened: np.ndarray, labels: torch.Tensor) -> None:
        self.pictures, self.softened, self.labels = pictures, softened, labels
        self.faces = faces_of(pictures)

    def batch(
        self, count: int, seed: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `count` images by lot, every second one mirrored, with their labels and faces."""
        rng = attributes.generator(seed, "reader batch", step)
        sharp = rng.integers(len(self.pictures), size=count - count // 2)
        soft = rng.integers(len(self.softened), size=count // 2)
        images = to_unit(
            torch.from_numpy(np.concatenate([self.pictures[sharp, :3], self.softened[soft]]))
        )
        blur = generator(seed, "world reader blur", step)
        images[: len(sharp)] = _blurred(images[: len(sharp)], blur)
        chosen = np.concatenate([sharp, soft])
        labels, faces = self.labels[chosen], self.faces[chosen]
        mirrored = torch.from_numpy(rng.permutation(count) % 2 == 0)
        images[mirrored] = images[mirrored].flip(-1)
        faces[mirrored, 0] = 1 - faces[mirrored, 0]
        return images, labels, faces


def _nearly(faces: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Return the faces a little off, as one finds them."""
    off = _JITTER * (2 * torch.rand(faces.shape, generator=rng) - 1)
    x, y, size = faces.unbind(1)
    return torch.stack([x + off[:, 0] * size, y + off[:, 1] * size, size * off[:, 2].exp()], dim=1)


def _loss(
    answers: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    found: torch.Tensor,
    faces: torch.Tensor,
) -> torch.Tensor:
    """Return the cross entropy of all that can be asked of a picture, and how far faces are missed."""
    losses = [
        F.cross_entropy(answers[name], labels[:, column], reduction="sum", ignore_index=_NOT_ASKED)
        for column, name in enumerate(QUESTIONS)
    ]
    return torch.stack(losses).sum() / len(labels) + _FACE_WEIGHT * F.l1_loss(found, faces)


def pretrain_reader(
    out_dir: Path,
    *,
    max_steps: int = 2_000,
    batch_size: int = 32,
    peak_rate: float = 3e-3,
    n_pictures: int = N_RENDERS,
    size: int = 128,
    seed: int = 0,
    device: str = "cpu",
    n_workers: int = 0,
    stop_at: int | None = None,
    evaluate_every: int = 250,
    n_heldout: int = 200,
    report: Callable[[str], None] = print,
) -> Path:
    """Train the reader, or go on training it, and return the folder of its averaged weights.

    Args:
        out_dir: holds `renders.npy`, `reconstructions.npy`, `reader_state.safetensors`, to go on from,
            and `reader/`: the weights in float16, and how often they are right.
        max_steps: length of the whole training; the learning rate ends at 0 there.
        n_pictures: pictures to draw; `out_dir/vae`, or the shipped autoencoder, gives some back.
        stop_at: stop at this step already, as an interruption would.
        n_heldout: pictures a camera that training never sees, to measure the accuracy on.
        report: receives a line of progress at every evaluation.

    Raises:
        BunnyLoraError: the state in `out_dir` was made under other settings.
    """
    out_dir = Path(out_dir)
    pictures = rendered_pictures(
        out_dir, n_pictures, size=size, seed=seed, n_workers=n_workers, report=report
    )
    vae_dir = made_or_shipped(out_dir, "sd/vae")
    softened = reconstructed_pictures(out_dir, vae_dir, pictures, report)
    labels = labels_of(reader_picture(seed, index) for index in range(n_pictures))
    lessons = _Lessons(pictures, softened, labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "world reader weights"))
        reader = Reader(size).to(device)
    settings: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "n_pictures": n_pictures}
    settings |= {"max_steps": max_steps, "peak_rate": peak_rate, "vae": _vae_sha256(vae_dir)}
    settings |= {"size": size}
    state = TrainState(reader, settings, ema_decay=0.99, muon=False)

    def loss_of(step: int) -> torch.Tensor:
        reader.train()
        batch = lessons.batch(batch_size, seed, step)
        nearly = _nearly(batch[2], generator(seed, "world reader faces", step)).to(device)
        images, right, faces = (tensor.to(device) for tensor in batch)
        answers, found = reader(images, nearly)
        return _loss(answers, right, found, faces)

    vae = AutoencoderKL.from_pretrained(vae_dir).eval()
    exams = [Exam.of(seed, size, camera, n_heldout, vae) for camera in CAMERAS]
    for progress in state.train(
        loss_of,
        out_dir / "reader_state.safetensors",
        max_steps=max_steps,
        peak_rate=peak_rate,
        images_per_step=batch_size,
        evaluate_every=evaluate_every,
        stop_at=stop_at,
        warmup_steps=100,
    ):
        with state.averaged():
            _settle(reader, pictures, softened)
            shares = accuracy(reader, exams)
            save_reader(reader, out_dir / "reader", shares)
        medium = shares["reconstructions"]["medium"]
        quality = ", ".join(f"{name} {share:.1%}" for name, share in medium.items())
        speed = f"{progress.images_per_sec:.1f} images/s"
        report(f"step {state.step}: loss {progress.mean_loss:.3f}, {quality}, {speed}")
    return out_dir / "reader"


@torch.no_grad()
def _settle(reader: Reader, pictures: np.ndarray, softened: np.ndarray) -> None:
    """Measure the batch statistics anew: those from training belong to weights that came before."""
    norms = [module for module in reader.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    reader.train()
    device = str(next(reader.parameters()).device)
    for first in range(0, min(320, len(softened)), 32):
        images = np.concatenate([rows[first : first + 32, :3] for rows in (pictures, softened)])
        reader(to_unit(torch.from_numpy(images), device))
    for norm in norms:
        norm.momentum = 0.1
    reader.eval()


@dataclass(frozen=True)
class Exam:
    """Pictures by one camera that training never sees, uint8 [N, 3, H, W], sharp and given back."""

    camera: str
    pictures: list[Picture]
    renders: torch.Tensor
    reconstructions: torch.Tensor

    @classmethod
    def of(cls, seed: int, size: int, camera: str, n: int, vae: AutoencoderKL) -> Exam:
        """Draw `n` pictures and have the autoencoder give them back."""
        pictures = [reader_picture(heldout_seed(seed), index, camera) for index in range(n)]
        renders = torch.from_numpy(np.stack([as_rows(picture, size)[:3] for picture in pictures]))
        return cls(camera, pictures, renders, reconstruct(vae, renders))


def accuracy(reader: Reader, exams: Sequence[Exam]) -> dict[str, Any]:
    """Return the share of right answers, of renders and of what is given back of them, a camera."""
    shares: dict[str, Any] = {"n_images_per_camera": len(exams[0].pictures)}
    for kind in ("renders", "reconstructions"):
        shares[kind] = {
            exam.camera: shares_right(reader.read(getattr(exam, kind)), exam.pictures) for exam in exams
        }
    return shares


def shares_right(read: Mapping[str, torch.Tensor], pictures: Sequence[Picture]) -> dict[str, float]:
    """Return the share of right answers to each question, see `Reader.read`.

    Only of pictures where there is something to see, see `traits_to_see`; a question that none of them
    can answer is left out.
    """
    labels, shares = labels_of(pictures), {}
    for column, name in enumerate(QUESTIONS):
        asked = labels[:, column] != _NOT_ASKED
        if asked.any():
            hits = read[name].argmax(1)[asked] == labels[asked, column]
            shares[name] = round(float(hits.float().mean()), 4)
    return shares


def save_reader(reader: Reader, folder: Path, shares: Mapping[str, Any]) -> None:
    """Write the reader in float16, and beside it how often it is right."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in reader.state_dict().items()
    }
    with atomic_path(folder) as part:
        part.mkdir()
        save_file(tensors, part / "model.safetensors", {"size": str(reader.size)})
        write_json(part / "accuracy.json", shares)
