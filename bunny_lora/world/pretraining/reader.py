"""Pretrain the reader: a small classifier that says what a picture shows, to hold against the prompt.

It is never shown a caption or a generated picture, so it judges both without favour. A third of what
it learns from are renders as the autoencoder gives them back: whatever the denoiser draws comes out of
that, and a reader of sharp renders alone takes its softened capes and dresses for something else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetModel

from bunny_lora.core.files import atomic_path, sha256
from bunny_lora.core.seeding import derive_seed, generator
from bunny_lora.world import attributes
from bunny_lora.world.attributes import Picture, random_picture
from bunny_lora.world.pretraining.data import (
    N_PICTURES,
    as_rows,
    drawn_pictures,
    filled_rows,
    heldout_seed,
    made_or_shipped,
    to_unit,
)
from bunny_lora.world.pretraining.learner import TrainState
from bunny_lora.world.pretraining.vae import reconstruct

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "species": attributes.SPECIES,
    "fur": attributes.FURS,
    "place": attributes.PLACES,
    "pose": attributes.POSES,
    "outfit": attributes.OUTFITS,
}
WIDTHS = (32, 64, 128, 192)
N_RECONSTRUCTED = 4_000


class Reader(nn.Module):
    """Images [N, 3, H, W] from -1 to 1 to the logits of every question's answers, [N, answers]."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.trunk = ResNetModel(
            ResNetConfig(
                embedding_size=widths[0],
                hidden_sizes=list(widths),
                depths=[1] * len(widths),
                layer_type="basic",
            )
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(widths[-1], len(answers)) for name, answers in QUESTIONS.items()}
        )

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits."""
        pooled = self.trunk(images).pooler_output.flatten(1)
        return {name: head(pooled) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the index of the likeliest answer to every question, int64 [N], of uint8 images."""
        device = str(next(self.parameters()).device)
        answers = [self(to_unit(chunk, device)) for chunk in images.split(64)]
        return {name: torch.cat([a[name] for a in answers]).argmax(1).cpu() for name in QUESTIONS}


def truth(picture: Picture) -> list[int]:
    """Return the index of the right answer to every question, for a picture of one character."""
    (character,) = picture.characters
    said = {"place": picture.scene.place, "pose": character.pose}
    said |= {name: getattr(character.traits, name) for name in ("species", "fur", "outfit")}
    return [answers.index(said[name]) for name, answers in QUESTIONS.items()]


def single_picture(seed: int, index: int, camera: str = "medium") -> Picture:
    """Return the first random picture of one character seen by `camera`, of many that `index` names."""
    for attempt in range(1000):
        picture = random_picture(seed, 1000 * index + attempt)
        if len(picture.characters) == 1 and picture.scene.camera == camera:
            return picture
    raise AssertionError("random pictures hold every camera")


def _blurred(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Soften and roughen half of the images, as an autoencoder would; float32 [N, 3, H, W]."""
    half = len(images) // 2
    soft = F.avg_pool2d(images[:half], 3, stride=1, padding=1, count_include_pad=False)
    share = torch.rand((half, 1, 1, 1), generator=rng)
    soft = images[:half].lerp(soft, share)
    soft = soft + 0.06 * torch.randn(soft.shape, generator=rng)
    return torch.cat([soft, images[half:]])


def _lesson(
    pictures: np.ndarray,
    softened: np.ndarray,
    alone: np.ndarray,
    labels: torch.Tensor,
    count: int,
    rng: np.random.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `count` images by lot and truths; the last third as the autoencoder gives them back."""
    n_soft = count // 3
    sharp = np.sort(rng.choice(len(alone), size=count - n_soft, replace=False))
    soft = np.sort(rng.integers(int((alone < len(softened)).sum()), size=n_soft))
    order = torch.from_numpy(rng.permutation(count - n_soft))
    images = torch.from_numpy(pictures[alone[sharp], :3])[order]
    images = torch.cat([images, torch.from_numpy(softened[alone[soft]])])
    return to_unit(images), torch.cat([labels[sharp][order], labels[soft]])


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


def pretrain_reader(
    out_dir: Path,
    *,
    max_steps: int = 7500,
    batch_size: int = 48,
    peak_rate: float = 2e-3,
    n_pictures: int = N_PICTURES,
    size: int = 128,
    widths: tuple[int, ...] = WIDTHS,
    seed: int = 0,
    device: str = "cpu",
    n_workers: int = 0,
    stop_at: int | None = None,
    evaluate_every: int = 250,
    n_heldout: int = 1000,
    report: Callable[[str], None] = print,
) -> Path:
    """Train the reader, or go on training it, and return the file of its averaged weights.

    Args:
        out_dir: holds `pictures.npy` (see `drawn_pictures`), `reader_state.safetensors`, to go on from,
            and `reader.safetensors`.
        max_steps: length of the whole training; the learning rate ends at 0 there.
        n_pictures: pictures of the random stream to draw; those of one character are learned from.
            `out_dir/vae`, or the shipped autoencoder, gives some of them back.
        stop_at: stop at this step already, as an interruption would.
        n_heldout: pictures that training never sees, to measure the accuracy on.
        report: receives a line of progress at every evaluation.

    Raises:
        BunnyLoraError: the state in `out_dir` was made under other settings.
    """
    out_dir = Path(out_dir)
    pictures = drawn_pictures(
        out_dir, n_pictures, size=size, seed=seed, n_workers=n_workers, report=report
    )
    vae = made_or_shipped(out_dir, "sd/vae")
    softened = reconstructed_pictures(out_dir, vae, pictures, report)
    truths = [random_picture(seed, index) for index in range(n_pictures)]
    alone = np.array([i for i, picture in enumerate(truths) if len(picture.characters) == 1])
    labels = torch.tensor([truth(truths[i]) for i in alone])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "world reader weights"))
        reader = Reader(widths).to(device)
    settings = {"widths": list(widths), "seed": seed, "batch_size": batch_size, "size": size}
    settings |= {"n_pictures": n_pictures, "max_steps": max_steps, "peak_rate": peak_rate}
    settings |= {"vae": _vae_sha256(vae)}
    state = TrainState(reader, settings, ema_decay=0.99)

    def loss_of(step: int) -> torch.Tensor:
        reader.train()
        rng = attributes.generator(seed, "reader batch", step)
        images, right = _lesson(pictures, softened, alone, labels, batch_size, rng)
        if step < 0.75 * max_steps:  # The last quarter is for what only a sharp eye tells.
            n_renders = batch_size - batch_size // 3
            blur = generator(seed, "world reader blur", step)
            images[:n_renders] = _blurred(images[:n_renders], blur)
        right = right.to(device)
        with torch.autocast(device, torch.bfloat16):
            answers = reader(images.to(device))
        losses = [
            F.cross_entropy(answers[name].float(), right[:, column])
            for column, name in enumerate(QUESTIONS)
        ]
        return torch.stack(losses).sum()

    for progress in state.train(
        loss_of,
        out_dir / "reader_state.safetensors",
        max_steps=max_steps,
        peak_rate=peak_rate,
        images_per_step=batch_size,
        evaluate_every=evaluate_every,
        stop_at=stop_at,
    ):
        with state.averaged():
            _settle(reader, pictures, alone)
            scores = accuracy(reader, seed, size, n_heldout)
            save_reader(reader, out_dir / "reader.safetensors")
        quality = ", ".join(f"{name} {score:.2%}" for name, score in scores.items())
        report(f"step {state.step}: {quality}, {progress.images_per_sec:.1f} images/s")
    return out_dir / "reader.safetensors"


@torch.no_grad()
def _settle(reader: Reader, pictures: np.ndarray, alone: np.ndarray) -> None:
    """Measure the batch statistics anew: those from training belong to weights that came before."""
    norms = [module for module in reader.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    reader.train()
    device = str(next(reader.parameters()).device)
    for rows in np.array_split(alone[:640], 10):
        reader(to_unit(torch.from_numpy(pictures[rows, :3]), device))
    for norm in norms:
        norm.momentum = 0.1
    reader.eval()


def accuracy(
    reader: Reader, seed: int, size: int, n: int, vae: AutoencoderKL | None = None
) -> dict[str, float]:
    """Return the share of right answers to each question on `n` pictures that training never sees.

    With an autoencoder, as it gives them back: no denoiser that draws through it could be read better.
    """
    unseen = [single_picture(heldout_seed(seed), index) for index in range(n)]
    images = torch.from_numpy(np.stack([as_rows(picture, size)[:3] for picture in unseen]))
    if vae is not None:
        images = reconstruct(vae, images)
    return shares_right(reader.read(images), unseen)


def shares_right(answers: Mapping[str, torch.Tensor], pictures: Sequence[Picture]) -> dict[str, float]:
    """Return the share of right answers to each question, see `Reader.read`.

    Nobody is asked what a sleeper wears: scarf and cape lie hidden under a sleeper's head.
    """
    right = torch.tensor([truth(picture) for picture in pictures])
    awake = torch.tensor([picture.characters[0].pose != "sleeping" for picture in pictures])
    shares = {}
    for column, name in enumerate(QUESTIONS):
        hits = (answers[name] == right[:, column])[awake if name == "outfit" else slice(None)]
        shares[name] = round(float(hits.float().mean()), 4)
    return shares


def save_reader(reader: Reader, path: Path) -> None:
    """Write the reader as one safetensors file."""
    widths = json.dumps(list(reader.trunk.config.hidden_sizes))
    tensors = {name: tensor.contiguous() for name, tensor in reader.state_dict().items()}
    with atomic_path(path) as part:
        save_file(tensors, part, {"widths": widths})


def load_reader(path: Path) -> Reader:
    """Return a reader that `pretrain_reader` wrote, ready to read."""
    with safe_open(path, "pt") as file:
        reader = Reader(tuple(json.loads(file.metadata()["widths"])))
        reader.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return reader.eval()
