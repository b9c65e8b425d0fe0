"""Read the traits of a character off a picture: species, fur, eyes, clothes, mark, ear.

The reader is a small classifier, taught by `pretraining.reader` on renders and on what the autoencoder
gives back of them; its weights are shipped, and beside them how often it is right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from bunny_lora.core.files import read_json
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model.components import WORLD_WEIGHTS
from bunny_lora.world import attributes
from bunny_lora.world.attributes import Picture, Traits

TRAITS: Mapping[str, tuple[str, ...]] = {
    "species": attributes.SPECIES,
    "fur": attributes.FURS + attributes.HERO_FURS,
    "eyes": attributes.EYES,
    "outfit": attributes.OUTFITS,
    "outfit_colour": attributes.OUTFIT_COLOURS,
    "mark": attributes.MARKS,
    "mark_colour": attributes.MARK_COLOURS,
    "ear": attributes.EARS,
}
"""What makes a character the same in every picture, with all the answers that there are."""
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    **TRAITS,
    "place": attributes.PLACES,
    "light": attributes.LIGHTS,
    "pose": attributes.POSES,
}
"""All that is read: the traits, and what a prompt asks for besides."""
FAR_WIDTHS, CLOSE_WIDTHS, CLOSEST_WIDTHS = (16, 32, 64, 96), (24, 48, 96, 160), (24, 48, 96)
_FACE_STAGE = 2


@dataclass(frozen=True)
class Look:
    """A square that is looked at closely, in sides of the face: how far below its middle, and how wide.

    `share` is its side in pixels over the picture's: what lies so small is not to be read any finer.
    """

    below: float
    half_side: float
    share: float


LOOKS: Mapping[str, Look] = {
    "body": Look(0.3, 1.3, 5 / 8),
    "ears": Look(-0.8, 0.9, 3 / 8),
    "eyes": Look(-0.1, 0.6, 5 / 16),
    "chest": Look(0.75, 0.55, 5 / 16),
}
RELIABLE = 0.85
"""The share of right answers, on what the autoencoder gives back, from which on a trait counts."""


def _stages(widths: Sequence[int]) -> nn.ModuleList:
    """Return stages of two convolutions each; each halves the side."""
    stages = nn.ModuleList()
    for n_in, n_out in zip((3, *widths), widths, strict=False):
        layers: list[nn.Module] = []
        for stride, channels in ((2, n_in), (1, n_out)):
            layers += [nn.Conv2d(channels, n_out, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(n_out), nn.ReLU()]
        stages.append(nn.Sequential(*layers))
    return stages


def _pooled(features: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the highest value and the mean of every channel of every stage, [N, 2 * channels].

    Of all stages: marks and ears are a few pixels wide, and the last stage has lost them.
    """
    return torch.cat([pool for f in features for pool in (f.amax((2, 3)), f.mean((2, 3)))], dim=1)


class Reader(nn.Module):
    """Finds the face in a picture, then looks closely at what is around it, and closer still.

    It reads near and far characters alike, since both fill the same squares when it looks closely.
    """

    def __init__(self, size: int = 128) -> None:
        super().__init__()
        self.size = size
        self.far = _stages(FAR_WIDTHS)
        self.where = nn.Conv2d(FAR_WIDTHS[_FACE_STAGE], 2, 1)
        widths = {name: CLOSE_WIDTHS if name == "body" else CLOSEST_WIDTHS for name in LOOKS}
        self.close = nn.ModuleDict({name: _stages(widths[name]) for name in LOOKS})
        n_features = 2 * (sum(FAR_WIDTHS) + sum(sum(row) for row in widths.values()))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(n_features, len(answers)) for name, answers in QUESTIONS.items()}
        )

    def forward(
        self, images: torch.Tensor, faces: torch.Tensor | None = None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the logits of every question's answers, [N, answers], and the faces that it finds.

        Args:
            images: [N, 3, H, W] from -1 to 1.
            faces: where to look closely, instead of at the faces that it finds: x and y of the middle
                and the longer side, [N, 3], in sides of the picture.
        """
        features, seen = [], F.avg_pool2d(images, 2)
        for stage in self.far:
            seen = stage(seen)
            features.append(seen)
        found = self._find(features[_FACE_STAGE])
        for look, stages in zip(LOOKS.values(), self.close.values(), strict=True):
            seen = close_up(images, found.detach() if faces is None else faces, look)
            for stage in cast(nn.ModuleList, stages):
                seen = stage(seen)
                features.append(seen)
        pooled = _pooled(features)
        return {name: head(pooled) for name, head in self.heads.items()}, found

    def _find(self, features: torch.Tensor) -> torch.Tensor:
        """Return the mean place and size of a face, weighted by where there seems to be one."""
        heat, size = self.where(features).flatten(2).unbind(1)
        rows, columns = features.shape[2:]
        y, x = torch.meshgrid(
            (torch.arange(rows, device=heat.device) + 0.5) / rows,
            (torch.arange(columns, device=heat.device) + 0.5) / columns,
            indexing="ij",
        )
        values = torch.stack(
            [x.flatten().expand_as(size), y.flatten().expand_as(size), size.sigmoid()], -1
        )
        return (heat.softmax(1)[:, :, None] * values).sum(1)

    @torch.no_grad()
    def read(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the probabilities of all answers, float32 [N, answers], of uint8 [N, 3, H, W]."""
        device = next(self.parameters()).device
        rows = []
        for part in images.split(64):
            unit = part.to(device).float() / 127.5 - 1
            if unit.shape[-1] != self.size:
                unit = F.interpolate(unit, (self.size, self.size), mode="bilinear", antialias=True)
            rows.append(self(unit)[0])
        return {name: torch.cat([row[name] for row in rows]).softmax(1).cpu() for name in QUESTIONS}


def close_up(images: torch.Tensor, faces: torch.Tensor, look: Look) -> torch.Tensor:
    """Return a square at each face, [N, 3, side, side]; faces as in `Reader.forward`."""
    x, y, size = (2 * faces - torch.tensor([1.0, 1.0, 0.0], device=faces.device)).unbind(1)
    y, half, none = y + look.below * size, look.half_side * size, torch.zeros_like(x)
    theta = torch.stack([half, none, x, none, half, y], dim=1).view(-1, 2, 3)
    side = round(images.shape[-1] * look.share)
    grid = F.affine_grid(theta, [len(images), 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


@cache
def load_reader(folder: Path = WORLD_WEIGHTS / "reader") -> Reader:
    """Return a reader that `pretrain_reader` wrote, by default the shipped one, ready to read."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        reader = Reader(int(file.metadata()["size"]))
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    reader.load_state_dict(weights)
    return reader.eval()


def read_traits(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what pictures of one character show.

    Args:
        images: uint8 [N, 3, H, W], square.

    Returns:
        for each of `QUESTIONS` the probabilities of its answers, in their order, float32 [N, answers].

    Raises:
        BunnyLoraError: the images are of another kind.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise BunnyLoraError(
            f"Traits are read off uint8 images [N, 3, H, W], not off {images.dtype}"
            f" {list(images.shape)}."
        )
    if images.shape[2] != images.shape[3]:
        height, width = images.shape[2:]
        raise BunnyLoraError(
            f"Traits are read off square pictures, not off {width} x {height}: cut a square out first."
        )
    return load_reader().read(images)


def reliable_questions(camera: str = "medium") -> tuple[str, ...]:
    """Return all questions that the shipped reader answers well enough to count, traits among them."""
    shares = read_json(WORLD_WEIGHTS / "reader" / "accuracy.json")["reconstructions"][camera]
    return tuple(name for name in QUESTIONS if shares[name] >= RELIABLE)


def reliable_traits(camera: str = "medium") -> tuple[str, ...]:
    """Return the traits among `reliable_questions`."""
    return tuple(name for name in reliable_questions(camera) if name in TRAITS)


def traits_to_see(
    traits: Traits, *, pose: str = "standing", expression: str = "happy"
) -> dict[str, str]:
    """Return the right answers about a character, without what nobody can see.

    Closed eyes have no colour, nothing worn has none, and scarf and cape lie hidden under a sleeper's
    head.
    """
    hidden = set()
    if pose == "sleeping":
        hidden |= {"eyes", "outfit", "outfit_colour"}
    if expression == "laughing":
        hidden.add("eyes")
    if traits.outfit == "none":
        hidden.add("outfit_colour")
    if traits.mark == "none":
        hidden.add("mark_colour")
    return {name: getattr(traits, name) for name in TRAITS if name not in hidden}


def truth(picture: Picture) -> dict[str, str]:
    """Return the right answers about a picture of one character, without what nobody can see."""
    (character,) = picture.characters
    scene = {"place": picture.scene.place, "light": picture.scene.light, "pose": character.pose}
    return scene | traits_to_see(character.traits, pose=character.pose, expression=character.expression)


def identity_scores(
    read: Mapping[str, torch.Tensor],
    right: Mapping[str, str],
    traits: Collection[str] = tuple(TRAITS),
) -> torch.Tensor:
    """Return how sure it is that each picture shows that character, from 0 to 1, float32 [N].

    The mean probability of the right answers.

    Args:
        read: from `read_traits`.
        right: from `traits_to_see`.
        traits: those that count, see `reliable_traits`.
    """
    asked = [name for name in right if name in traits]
    return torch.stack([read[name][:, QUESTIONS[name].index(right[name])] for name in asked]).mean(0)
