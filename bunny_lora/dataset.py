"""Write training data that any tool can load, and read it back as tensors, by position.

The layout is the one that Hugging Face `datasets` calls `imagefolder`: pictures, and `metadata.jsonl`
beside them with one `{"file_name": …, "text": …}` a line. `data_summary.json` lies one folder above.
"""

from __future__ import annotations

import errno
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps

from bunny_lora.captions import count_tokens, name_first
from bunny_lora.core import files, paths, seeding
from bunny_lora.core.files import is_file, is_inside
from bunny_lora.core.progress import progress
from bunny_lora.data_summary import (
    SUMMARY,
    Item,
    by_reason,
    describe,
    describe_files,
    identity,
    load_summary,
    sha256_hex,
)
from bunny_lora.errors import BunnyLoraError
from bunny_lora.images import crop_around, open_rgb, plain_bytes, plain_suffix
from bunny_lora.stage4 import METADATA, Frame, Source, json_lines

T = TypeVar("T")
MAX_STEM_CHARACTERS = 80
FACE_TO_ZOOM = 4.0  # the side of a picture from near over its face: a head, and most of a cartoon body
# `datasets` takes a file that has one of these words in its name for a part of its own, without texts.
SPLIT_WORDS = re.compile(
    r"(?<![^\W\d_])(train|training|val|valid|validation|dev|test|testing|eval|evaluation)(?![^\W\d_])",
    re.IGNORECASE,
)
NOT_DATA = ("Thumbs.db", "desktop.ini")  # Left by file browsers; so is everything with a leading dot.

__all__ = [
    "ImageDataset",
    "data_sha256",
    "known_images",
    "load_summary",
    "name_first",
    "prepare",
    "sample_indices",
    "write_captions",
]


def prepare(source: Source, data_dir: Path, *, tokenizer: Any = None, overwrite: bool = False) -> dict:
    """Write pictures, captions and summary, or nothing if that is what lies there already.

    The folder is built anew beside the old one and swapped in whole. One that was changed by hand, or
    that something else wrote, is left alone, or kept as `<data_dir>.backup-<n>` with `overwrite`.

    Args:
        source: what `read_source` returned.
        data_dir: e.g. `training_data/instance_images`; the summary goes to the folder above.
        tokenizer: the text encoder's; with it, names are moved to where cutting cannot lose them.
        overwrite: replace a folder that is not as we left it.

    Returns:
        The summary, with `"unchanged": True` added if nothing was written.

    Raises:
        BunnyLoraError: no usable picture, a folder that must not be replaced, or a full disk.
    """
    data_dir = paths.resolve(data_dir)
    _refuse_impossible(source, data_dir)
    old, key = load_summary(data_dir), identity(source, tokenizer)
    difference = _difference(data_dir, old)
    intact = is_file(data_dir / METADATA) and not difference
    if old and intact and all(old.get(name) == value for name, value in key.items()):
        return old | {"unchanged": True}
    items = _plan(source.frames, tokenizer)
    text = "".join(_line(item.file_name, item.text) for item in items)
    if difference and _is_planned(data_dir, items, text):
        difference = ""
    if difference and not overwrite:
        raise BunnyLoraError(_refusal(data_dir, difference))
    hashes = _write(items, text, data_dir, keep_old=bool(difference))
    summary = key | describe(source, items, tokenizer) | describe_files(items, text, hashes)
    files.write_json(data_dir.parent / SUMMARY, summary)
    return summary


def _refuse_impossible(source: Source, data_dir: Path) -> None:
    if not source.frames:
        kinds = ", ".join(f"{n} {kind}" for kind, n in by_reason(source).items()) or "nothing in it"
        raise BunnyLoraError(
            f"No usable picture in {source.origin}: {kinds}. A lower min_confidence, an instance_prompt"
            " for pictures without caption, or another source may help."
        )
    if is_inside(paths.project_root(), [data_dir.resolve()]):
        raise BunnyLoraError(
            f"data_dir {data_dir} holds the whole project; choose a folder of its own."
        )
    if any(is_inside(frame.path, [data_dir.resolve()]) for frame in source.frames):
        raise BunnyLoraError(
            f"The source's pictures lie in data_dir itself ({data_dir}). Choose another data_dir, or"
            " train on the folder as it is."
        )


def _present(data_dir: Path) -> set[str]:
    names = {path.name for path in data_dir.iterdir()} if data_dir.is_dir() else set()
    return {name for name in names if not name.startswith(".") and name not in NOT_DATA}


def _difference(data_dir: Path, old: dict | None) -> str:
    """Return in words how the folder differs from what we left there; empty if it does not."""
    present = _present(data_dir)
    if not present:
        return ""
    if old is None:
        return "it holds files that were not written by this step"
    left = {image["file_name"]: image["sha256"] for image in old["images"]}
    left[METADATA] = old["metadata_sha256"]
    kept = present & set(left)
    changed = {name for name in kept if sha256_hex((data_dir / name).read_bytes()) != left[name]}
    changed |= present.symmetric_difference(left)
    if METADATA in changed:
        return f"the captions in {METADATA} were changed by hand since it was prepared"
    names = ", ".join(sorted(changed)[:3])
    return f"pictures were changed by hand since it was prepared ({names})" if changed else ""


def _is_planned(data_dir: Path, items: list[Item], text: str) -> bool:
    """Whether the folder is just what would be written: stopped between it and the summary."""
    return (
        _present(data_dir) == {METADATA, *(item.file_name for item in items)}
        and (data_dir / METADATA).read_bytes() == text.encode()
        and all((data_dir / i.file_name).read_bytes() == plain_bytes(i.frame.path) for i in items)
    )


def _refusal(data_dir: Path, difference: str) -> str:
    return (
        f"{data_dir} would be replaced, but {difference}. To train on it as it is, go on without"
        f" preparing. To prepare it anew, pass overwrite=True (--overwrite): what is there now is then"
        f" kept as {_backup(data_dir).name} beside it."
    )


def _backup(data_dir: Path) -> Path:
    number = 1
    while (backup := data_dir.with_name(f"{data_dir.name}.backup-{number}")).exists():
        number += 1
    return backup


def _plan(frames: list[Frame], tokenizer: Any) -> list[Item]:
    taken: set[str] = set()
    items = []
    for frame in frames:
        text, tokens = frame.caption, None
        if tokenizer is not None:
            text = name_first(text, frame.characters, tokenizer)
            tokens = count_tokens(text, tokenizer)
        items.append(Item(frame, _unchanged(_file_name, frame.path, taken), text, tokens))
    return items


def _unchanged(use: Callable[..., T], path: Path, *arguments: Any) -> T:
    """Use a picture that was good when the source was read."""
    try:
        return use(path, *arguments)
    except Exception as error:  # Pillow's decoders raise whatever they trip over.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise
        raise BunnyLoraError(
            f"{path.name} changed while it was read. What was prepared before is untouched: run the"
            " same command again."
        ) from error


def _file_name(path: Path, taken: set[str]) -> str:
    """Return a name that every system takes, and that no frame has yet on any of them."""
    stem = re.sub(r"[^\w.-]+", "_", path.stem)[:MAX_STEM_CHARACTERS].strip("._-") or "image"
    stem = SPLIT_WORDS.sub(r"x\1", stem)
    suffix = plain_suffix(path) or ".png"
    name, number = stem + suffix, 1
    while name.lower() in taken:  # Windows and macOS take a.jpg and A.jpg for the same file.
        number += 1
        name = f"{stem}_{number}{suffix}"
    taken.add(name.lower())
    return name


def _line(file_name: str, text: str) -> str:
    return json.dumps({"file_name": file_name, "text": text}, ensure_ascii=False) + "\n"


def _write(items: list[Item], text: str, data_dir: Path, *, keep_old: bool) -> list[str]:
    """Swap in the new folder, the old one kept as a backup or dropped; return the pictures' hashes."""
    backup = _backup(data_dir)
    try:
        with files.atomic_path(data_dir) as part:
            hashes = _build(items, text, part)
            if keep_old:
                data_dir.rename(backup)
    except BaseException:
        if backup.exists() and not data_dir.exists():
            backup.rename(data_dir)
        raise
    return hashes


def _build(items: list[Item], text: str, folder: Path) -> list[str]:
    folder.mkdir()
    hashes = []
    for item in progress(items, desc="Writing training images", delay=2.0):
        data = _unchanged(plain_bytes, item.frame.path)
        (folder / item.file_name).write_bytes(data)
        hashes.append(sha256_hex(data))
    (folder / METADATA).write_bytes(text.encode())
    return hashes


class ImageDataset(torch.utils.data.Dataset[torch.Tensor]):
    """Pictures of a prepared folder, in the order of its `metadata.jsonl`, cut to size.

    Item i is float32 [3, H, W] in [-1, 1]. With `center_crop`, H = W = `resolution`. Without it, the
    shorter side is `resolution` and the longer one the nearest multiple of 8, a latent pixel.
    """

    def __init__(
        self, data_dir: Path, *, resolution: int, center_crop: bool, instance_prompt: str = ""
    ) -> None:
        """Read the captions; pictures are opened when they are asked for.

        Args:
            data_dir: a folder with `metadata.jsonl`, ours or anybody's.
            resolution: in pixels, a multiple of 8.
            center_crop: cut the middle square, or keep the whole picture.
            instance_prompt: the caption of lines that have no `text`.

        Raises:
            BunnyLoraError: `metadata.jsonl` is missing or broken (names the line), or a picture is
                missing.
        """
        self.data_dir = paths.resolve(data_dir)
        self.resolution = resolution
        self.center_crop = center_crop
        rows = _read_rows(self.data_dir, instance_prompt)
        self.file_names = [file_name for file_name, _ in rows]
        self.paths = [self.data_dir / file_name for file_name in self.file_names]
        self.captions = [text for _, text in rows]
        images = (load_summary(self.data_dir) or {}).get("images", [])
        names = {image["file_name"]: tuple(image["characters"]) for image in images}
        self.characters: list[tuple[str, ...]] = [names.get(name, ()) for name in self.file_names]
        found = {
            i["file_name"]: (i["faces"], i["size"]) for i in images if {"faces", "size"} <= i.keys()
        }
        seen = [found.get(name, ([], [])) for name in self.file_names]
        self.faces: list[list[list[float]]] = [faces for faces, _ in seen]
        self.sizes: list[list[int]] = [size for _, size in seen]

    def __len__(self) -> int:
        return len(self.file_names)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._read(index, self._cut)

    def _read(self, index: int, cut: Callable[[Image.Image], Image.Image]) -> torch.Tensor:
        path = self.paths[index]
        try:
            image = cut(open_rgb(path))
        except Exception as error:  # Pillow's decoders raise whatever they trip over.
            raise BunnyLoraError(f"Could not read {path}: {error}. Prepare the data again.") from error
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32) / 127.5 - 1.0

    def repeats(self) -> list[int]:
        """Return how often to show each picture, so that every character is seen about as often.

        Who is in most pictures sets the measure; a picture counts for the rarest of those in it.
        """
        counts = Counter(name for names in self.characters for name in names)
        most = max(counts.values(), default=1)
        return [
            max((round(most / counts[name]) for name in names), default=1) for names in self.characters
        ]

    def can_zoom(self, index: int) -> bool:
        """Whether it is clear who would be seen from near: one name in the picture, and one face."""
        return len(self.characters[index]) == 1 and len(self.faces[index]) == 1

    def zoomed(self, index: int) -> torch.Tensor:
        """Return the square around the only face of a picture, [3, resolution, resolution]."""
        return self._read(index, lambda image: self._around(image, self.faces[index][0]))

    def _around(self, image: Image.Image, face: Sequence[float]) -> Image.Image:
        near = crop_around(image, face, FACE_TO_ZOOM)
        return near.resize((self.resolution, self.resolution), Image.Resampling.LANCZOS)

    def _cut(self, image: Image.Image) -> Image.Image:
        if self.center_crop:
            return ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale / 8) * 8) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)


def known_images(data_dir: Path) -> list[dict[str, Any]]:
    """Return the summary's entry for each picture; for a folder that nobody prepared, names alone.

    Raises:
        BunnyLoraError: as `ImageDataset`.
    """
    if summary := load_summary(data_dir):
        return summary["images"]
    rows = _read_rows(paths.resolve(data_dir), "-")
    return [{"file_name": file_name, "characters": [], "faces": []} for file_name, _ in rows]


def data_sha256(data_dir: Path) -> str:
    """Return one hash of all that training reads of a folder: captions, pictures, who is where in them.

    Raises:
        BunnyLoraError: as `ImageDataset`.
    """
    data_dir = paths.resolve(data_dir)
    names = sorted({file_name for file_name, _ in _read_rows(data_dir, "-")})
    digest = files.sha256(data_dir / METADATA, *(data_dir / name for name in names))
    if (summary := load_summary(data_dir)) is None:
        return digest
    who = [
        [image.get(key) for key in ("file_name", "characters", "faces")] for image in summary["images"]
    ]
    return sha256_hex((digest + json.dumps(who)).encode())


def write_captions(folder: Path, captions: dict[str, str]) -> None:
    """Write `metadata.jsonl` beside pictures that are there already: file names to captions."""
    files.write_text(folder / METADATA, "".join(_line(*item) for item in captions.items()))


def _read_rows(data_dir: Path, instance_prompt: str) -> list[tuple[str, str]]:
    path = data_dir / METADATA
    if not is_file(path):
        raise BunnyLoraError(
            f"No training data: {path} is not there. Prepare it with notebook 01, or set data_dir"
            " to a folder with pictures and a metadata.jsonl."
        )
    rows = []
    for number, row in json_lines(path):
        row = row if isinstance(row, dict) else {}
        name, text = row.get("file_name"), row.get("text") or instance_prompt
        if not isinstance(name, str) or not isinstance(text, str) or not text:
            raise BunnyLoraError(
                f'{path}, line {number}: should read {{"file_name": "a.jpg", "text": "a caption"}}.'
                " Mend the line, or prepare the data again."
            )
        if not is_file(data_dir / name) or not is_inside(data_dir / name, [data_dir.resolve()]):
            raise BunnyLoraError(f"{path}, line {number}: there is no picture {name!r} in the folder.")
        rows.append((name, text))
    if not rows:
        raise BunnyLoraError(f"{path} is empty: there is nothing to train on. Prepare the data again.")
    return rows


def sample_indices(seed: int, n_images: int, start: int, count: int) -> list[int]:
    """Return which pictures come at positions start … start + count - 1 of the endless sample stream.

    Position p belongs to epoch p // n_images; each epoch is a shuffle of its own. A pure function of
    the arguments, so a run that is resumed at any position sees what it would have seen.
    """
    orders: dict[int, list[int]] = {}
    indices = []
    for position in range(start, start + count):
        epoch, place = divmod(position, n_images)
        if epoch not in orders:
            shuffle = seeding.generator(seed, "order", epoch)
            orders[epoch] = torch.randperm(n_images, generator=shuffle).tolist()
        indices.append(orders[epoch][place])
    return indices
