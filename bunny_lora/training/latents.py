"""Encode every training image once, keep the result on disk, and draw batches from it by position.

A frozen VAE gives the same latents in every epoch, and on a CPU it costs about as much as a training
step; so each image is encoded once, as mean and standard deviation, and each sample is drawn from them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

from bunny_lora.core import files
from bunny_lora.core.progress import progress
from bunny_lora.core.seeding import generator
from bunny_lora.core.values import Zoom
from bunny_lora.data.captions import caption_parts, find_name, name_only
from bunny_lora.data.frames import FaceNames
from bunny_lora.data.images import FACE_TO_MEDIUM
from bunny_lora.dataset import ImageDataset, Sample, sample_indices
from bunny_lora.model.components import encode_images
from bunny_lora.training.batch import Batch
from bunny_lora.training.masks import own_part
from bunny_lora.training.sampler import Size, bucketed_indices


@dataclass(frozen=True)
class View:
    """One way of seeing image `index`: whole or one of its faces from near, as it is or mirrored."""

    index: int
    zoomed: bool
    mirrored: bool
    face: int = field(default=0, repr=False)  # The cache's key has the face's box instead.


@dataclass(frozen=True)
class EncodedView:
    """A view as latents: mean and standard deviation, float32 [2, 4, H/8, W/8].

    `faces` are (x1, y1, x2, y2) in latent pixels; none where the view is a square already. `face_names`
    say whose they are, if anybody knows. `caption` is None where it is the sample's own. `mask` is
    float32 [H/8, W/8], 0 where somebody else is; None: nowhere. `zoomed`: a face from near.
    """

    latent_dist: torch.Tensor
    faces: list[list[float]]
    caption: str | None = None
    face_names: FaceNames = ()
    mask: torch.Tensor | None = None
    zoomed: bool = False

    @property
    def size(self) -> Size:
        """Width and height in latent pixels."""
        return self.latent_dist.shape[3], self.latent_dist.shape[2]

    def unseen(self, left: int, top: int, side: int) -> set[str]:
        """Return who has a face, and has its middle outside a square: not of those without one."""
        return {
            name
            for name, (x1, y1, x2, y2) in zip(self.face_names, self.faces, strict=False)
            if name and not (0 <= (x1 + x2) / 2 - left <= side and 0 <= (y1 + y2) / 2 - top <= side)
        }


@dataclass(frozen=True)
class EncodedImages:
    """A data set as latent distributions: `views[i]` are the one or several of `samples[i]`.

    `stream` names the random numbers, so that training and class images do not share theirs; `repeats`
    says how often each image comes in an epoch, None: once. `names` are the characters of the data
    set: a part of a caption that has one is never dropped. With `buckets`, views are shown whole, and
    each batch is of views of one size; else, squares of them.
    """

    samples: list[Sample]
    views: list[list[EncodedView]]
    latent_size: int
    stream: str
    tag_dropout: float = 0.0
    repeats: list[int] | None = None
    names: frozenset[str] = frozenset()
    caption_dropout: float = 0.0
    buckets: bool = False

    @property
    def captions(self) -> list[str]:
        """What the samples are trained on, in full."""
        return [sample.caption for sample in self.samples]

    @property
    def view_captions(self) -> list[str]:
        """What single views of them are trained on instead."""
        return [view.caption for views in self.views for view in views if view.caption is not None]

    def batch(self, seed: int, position: int, count: int, num_train_timesteps: int) -> Batch:
        """Return samples `position` to `position + count` of the endless training stream."""
        size, indices = self.indices(seed, position, count)
        drawn = [
            self._draw(seed, position + offset, index, num_train_timesteps, size)
            for offset, index in enumerate(indices)
        ]
        return Batch.joined(drawn)

    def draws(
        self, seed: int, index: int, count: int, num_train_timesteps: int, *, at_most: int
    ) -> list[Batch]:
        """Return `count` samples of one image, as batches of one size and `at_most` so many each."""
        sizes = sorted({view.size for view in self.views[index]}) if self.buckets else [None]
        batches = []
        for place, size in enumerate(sizes[:count]):
            positions = range(index * count + place, (index + 1) * count, len(sizes))
            drawn = [self._draw(seed, p, index, num_train_timesteps, size) for p in positions]
            batches += [Batch.joined(drawn[i : i + at_most]) for i in range(0, len(drawn), at_most)]
        return batches

    def indices(self, seed: int, position: int, count: int) -> tuple[Size | None, list[int]]:
        """Return which images such samples are of, and their size, if all are to be of one."""
        if self.buckets:
            return bucketed_indices(seed, self._of_size, position, count)
        repeats = self.repeats or [1] * len(self.samples)
        epoch = [index for index, times in enumerate(repeats) for _ in range(times)]
        return None, [epoch[place] for place in sample_indices(seed, len(epoch), position, count)]

    @cached_property
    def _of_size(self) -> dict[Size, list[int]]:
        """The images of each size of latents, as often as they come in an epoch.

        One with views of two sizes, whole and from near, comes once with each, and others twice.
        """
        sizes = [sorted({view.size for view in views}) for views in self.views]
        most = max(map(len, sizes), default=1)
        found: dict[Size, list[int]] = {}
        for index, (own, times) in enumerate(zip(sizes, self.repeats or [1] * len(sizes), strict=True)):
            for size in own:
                found.setdefault(size, []).extend([index] * (times * most // len(own)))
        return found

    def _draw(
        self, seed: int, position: int, index: int, num_train_timesteps: int, size: Size | None = None
    ) -> Batch:
        """Draw a view of an image, of a size if one is given, and a square of it if not."""
        random = generator(seed, f"{self.stream} sample", position)
        views = [view for view in self.views[index] if size in (None, view.size)]
        view = views[int(torch.randint(len(views), (), generator=random))]
        mean, std = view.latent_dist
        latents = mean + std * torch.randn(mean.shape, generator=random)
        left, top = 0, 0
        if size is None:
            left, top = self._place(latents, view.faces, random)
            latents = latents[:, top : top + self.latent_size, left : left + self.latent_size]
        noise = torch.randn(latents.shape, generator=random)
        timestep = torch.randint(num_train_timesteps, (), generator=random)
        caption = self.samples[index].caption if view.caption is None else view.caption
        if unseen := view.unseen(left, top, self.latent_size):
            caption = name_only(caption, self.names - unseen, unseen, len(view.faces))
        mask = None if view.mask is None else view.mask[None, None]
        return Batch(latents[None], noise[None], timestep[None], [self._thinned(caption, random)], mask)

    def _place(
        self, latents: torch.Tensor, faces: list[list[float]], random: torch.Generator
    ) -> tuple[int, int]:
        """Return left and top of a random square in a whole frame: around all faces, or else one.

        A caption that names two and a square that shows one would teach that either name will do.
        """
        height, width = latents.shape[1:]
        x1, y1, x2, y2 = 0.0, 0.0, float(width), float(height)
        if faces:
            lefts, tops, rights, bottoms = zip(*faces, strict=True)
            x1, y1, x2, y2 = min(lefts), min(tops), max(rights), max(bottoms)
            if max(math.ceil(x2) - math.floor(x1), math.ceil(y2) - math.floor(y1)) > self.latent_size:
                x1, y1, x2, y2 = faces[int(torch.randint(len(faces), (), generator=random))]
        top = self._offset(y1, y2, height, random)
        return self._offset(x1, x2, width, random), top

    def _offset(self, low: float, high: float, length: int, random: torch.Generator) -> int:
        """Return the start of a random window that holds `low` to `high`, or lies in it if longer."""
        ends = sorted((math.floor(low), math.ceil(high) - self.latent_size))
        first, last = (min(max(end, 0), length - self.latent_size) for end in ends)
        return first + int(torch.randint(last - first + 1, (), generator=random))

    def _thinned(self, caption: str, random: torch.Generator) -> str:
        first, *rest = caption_parts(caption)
        draws = torch.rand(len(rest), generator=random)
        kept = [
            part
            for part, chance in zip(rest, draws, strict=True)
            if chance >= self.tag_dropout or not self._may_go(part)
        ]
        # Drawn last, so that a run without it draws everything else as ever.
        dropped = float(torch.rand((), generator=random)) < self.caption_dropout
        return "" if dropped else "".join([first, *kept])

    def _may_go(self, part: str) -> bool:
        return not any(find_name(part, name) for name in self.names)

    @property
    def has_parts(self) -> bool:
        """Whether any caption has a part that may be left out."""
        return any(self._may_go(part) for text in self.captions for part in caption_parts(text)[1:])


class _Pixels(Dataset):
    """The views of a data set as tensors, [3, H, W] in [-1, 1]."""

    def __init__(self, images: ImageDataset, views: list[View]) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, item: int) -> torch.Tensor:
        view = self.views[item]
        pixel_values = (
            self.images.zoomed(view.index, view.face) if view.zoomed else self.images[view.index]
        )
        return pixel_values.flip(-1) if view.mirrored else pixel_values


def encode_dataset(
    vae: AutoencoderKL,
    images: ImageDataset,
    cache_dir: Path,
    *,
    random_flip: bool = False,
    zoom_on_faces: Zoom = False,
    mask_neighbours: bool = False,
    tag_dropout: float = 0.0,
    caption_dropout: float = 0.0,
    repeats: list[int] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
    stream: str = "training",
) -> EncodedImages:
    """Return the latents of a data set, from the disk if they are there already.

    Args:
        vae: frozen; its weights and dtype are part of the cache's key.
        images: what to encode; the files' bytes and the crop are part of the key.
        cache_dir: holds one safetensors file a key; it may be deleted at any time.
        random_flip: encode the mirror images too.
        zoom_on_faces: encode the square around each face that is known by name, too; an image is
            drawn from near as often as whole, or with "only" always.
        mask_neighbours: know where such a square shows others, who are not to be learnt from it.
        tag_dropout: share of a caption's parts, between commas, left out at random, but for the
            first and those with a name of `images.characters`.
        caption_dropout: share of captions that are left out as a whole.
        num_workers: processes that decode images, as in torch's `DataLoader`.
        pin_memory: as in torch's `DataLoader`; speeds up copies to a GPU.
        repeats: how often each image comes in an epoch.
        stream: names the random numbers that samples are drawn with.
    """
    views = _views(images, random_flip=random_flip, zoom_on_faces=bool(zoom_on_faces))
    path = cache_dir / f"{_key(vae, images, views)}.safetensors"
    if not path.is_file():
        loader = DataLoader(
            _Pixels(images, views),
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory and torch.cuda.is_available(),  # torch warns where it helps nobody.
        )
        bar = progress(_encode_each(vae, loader), desc="encode images", total=len(views))
        tensors = {f"{i:06d}": latent_dist for i, latent_dist in enumerate(bar)}
        with files.atomic_path(path) as part:
            save_file(tensors, part)
    tensors = load_file(path)
    whole: list[list[EncodedView]] = [[] for _ in range(len(images))]
    near: list[list[EncodedView]] = [[] for _ in range(len(images))]
    for i, view in enumerate(views):
        encoded = _encoded_view(view, images, tensors[f"{i:06d}"])
        if mask_neighbours and view.zoomed:
            encoded = replace(encoded, mask=_own_part(view, images))
        (near if view.zoomed else whole)[view.index].append(encoded)
    # The whole image once for each face, so that it is drawn as often as all of them.
    drawn = [
        n if n and zoom_on_faces == "only" else w * max(1, len(n) // len(w)) + n
        for w, n in zip(whole, near, strict=True)
    ]
    side = images.resolution // 8
    return EncodedImages(
        images.samples,
        drawn,
        side,
        stream,
        tag_dropout,
        repeats,
        images.names,
        caption_dropout,
        images.aspect_buckets,
    )


def n_to_encode(
    vae: AutoencoderKL,
    images: ImageDataset,
    cache_dir: Path,
    *,
    random_flip: bool = False,
    zoom_on_faces: bool = False,
) -> int:
    """Return how many pictures `encode_dataset` would encode; none where it has done so before."""
    views = _views(images, random_flip=random_flip, zoom_on_faces=zoom_on_faces)
    done = (cache_dir / f"{_key(vae, images, views)}.safetensors").is_file()
    return 0 if done else len(views)


def _views(images: ImageDataset, *, random_flip: bool, zoom_on_faces: bool) -> list[View]:
    mirrorings = (False, True) if random_flip else (False,)
    views = []
    for index in range(len(images)):
        views += [View(index, False, mirrored) for mirrored in mirrorings]
        if zoom_on_faces:
            faces = images.faces_to_zoom(index)
            views += [View(index, True, mirrored, face) for face in faces for mirrored in mirrorings]
    return views


def _encoded_view(view: View, images: ImageDataset, latent_dist: torch.Tensor) -> EncodedView:
    own = images.samples[view.index].caption
    caption = (
        images.zoomed_caption(view.index, view.face) if view.zoomed else images.caption(view.index)
    )
    faces = _faces_in(view, images, latent_dist)
    names = images.face_names[view.index] if faces and images.face_names is not None else ()
    told = None if caption == own else caption
    return EncodedView(latent_dist, faces, told, names, zoomed=view.zoomed)


def _own_part(view: View, images: ImageDataset) -> torch.Tensor | None:
    mask = own_part(images, view.index, view.face)
    return mask if mask is None or not view.mirrored else mask.flip(-1)


def _faces_in(view: View, images: ImageDataset, latent_dist: torch.Tensor) -> list[list[float]]:
    """Return the faces of a whole frame in pixels of its latents."""
    sample = images.samples[view.index]
    if view.zoomed or images.center_crop or images.aspect_buckets or not sample.faces:
        return []
    height, width = latent_dist.shape[2:]
    across, down = (new / old for new, old in zip((width, height), sample.size, strict=True))
    faces = [[x1 * across, y1 * down, x2 * across, y2 * down] for x1, y1, x2, y2 in sample.faces]
    return [[width - x2, y1, width - x1, y2] for x1, y1, x2, y2 in faces] if view.mirrored else faces


def _encode_each(vae: AutoencoderKL, loader: DataLoader) -> Iterator[torch.Tensor]:
    # Halves the time on a CPU. Only here: pictures are drawn with the layout that diffusers loads, so
    # that they come out the same to the bit with diffusers alone.
    vae.to(memory_format=torch.channels_last)
    for pixel_values in loader:
        mean, std = encode_images(vae, pixel_values[None])
        yield torch.cat([mean, std]).cpu().contiguous()
    vae.to(memory_format=torch.contiguous_format)


def _key(vae: AutoencoderKL, images: ImageDataset, views: list[View]) -> str:
    digest = hashlib.sha256(files.sha256(*(sample.path for sample in images.samples)).encode())
    digest.update(f"{images.resolution}/{images.center_crop}/{vae.dtype}/{views}".encode())
    if images.aspect_buckets:  # Only then: else the latents that older versions cached are found again.
        digest.update(b"aspect_buckets")
    zoomed = [[FACE_TO_MEDIUM, *images.samples[v.index].faces[v.face]] for v in views if v.zoomed]
    digest.update(repr(zoomed).encode())
    digest.update(str(vae.config.scaling_factor).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
