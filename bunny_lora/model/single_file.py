"""A base model in one file, as A1111, ComfyUI and stable-diffusion.cpp keep theirs: converted once.

diffusers reads the layout itself; what it would fetch from the hub for that, the configuration of
Stable Diffusion 1.x and CLIP's vocabulary, comes with the package. The folder that comes out is used
from then on, for as long as the file is the same.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import CHECKPOINT_KEY_NAMES, infer_diffusers_model_type
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from bunny_lora.core import files, paths
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import bpe, ldm, random_models
from bunny_lora.model.kinds import TAKES
from bunny_lora.model.ldm import PREFIXES
from bunny_lora.model.quiet import quiet
from bunny_lora.model.random_models import SD1

SOURCE = "source.json"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
# How diffusers calls what it finds, by its beginning, and how people do.
TYPES = {
    "inpainting": "an inpainting model",
    "instruct-pix2pix": "a model that edits images, InstructPix2Pix",
    "xl": "Stable Diffusion XL (SDXL)",
    "playground": "a kind of Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "v2": "Stable Diffusion 2.x",
}


@dataclass(frozen=True)
class _Header:
    """What the first bytes of a file tell: shape and type of every tensor."""

    shapes: dict[str, torch.Tensor]
    dtypes: set[str]
    metadata: Mapping[str, str]


def converted(path: Path) -> Path:
    """Return the folder in diffusers' layout that a single file was converted to, now or before.

    It lies in `outputs/converted/`, under the names of the file and of its content.

    Raises:
        BunnyLoraError: a pickle, unreadable, or no Stable Diffusion 1.x.
    """
    _refuse_pickle(path)
    home = paths.project_root() / "outputs" / "converted"
    if known := _known(home, _stamp(path)):
        return known
    header = _header(path)
    _refuse_other_kinds(path, header)
    origin = {"sha256": _digest(path)} | _stamp(path)
    folder = _known(home, {"sha256": origin["sha256"]}) or home / f"{path.stem}-{origin['sha256'][:8]}"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f".{folder.name}.lock"):
        if not (folder / SOURCE).is_file():
            print(f"Converting {path.name}, once, to {paths.relative(folder)}")
            with files.atomic_path(folder) as part:
                _convert(path, part, header)
                files.write_json(part / SOURCE, origin)
        elif files.read_json(folder / SOURCE) != origin:
            files.write_json(folder / SOURCE, origin)
    return folder


def sha256(folder: Path) -> str | None:
    """Return the digest of the file that a folder was converted from; None of any other folder."""
    return files.read_json(folder / SOURCE)["sha256"] if (folder / SOURCE).is_file() else None


def _stamp(path: Path) -> dict[str, Any]:
    """Return what changes with a file's content, to hash four gigabytes but once."""
    status = path.stat()
    return {
        "file": path.name,
        "size": status.st_size,
        "times": [status.st_mtime_ns, status.st_ctime_ns],
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _known(home: Path, about: Mapping[str, Any]) -> Path | None:
    """Return the folder whose source is recorded with these facts."""
    sources = sorted(home.glob(f"*/{SOURCE}"))
    return next((s.parent for s in sources if about.items() <= files.read_json(s).items()), None)


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() in PICKLES:
        raise BunnyLoraError(
            f"{path.name} is a pickle, which can run code when it is read, so it is not. Look for the"
            " same model as .safetensors, or convert it at Python's prompt, where weights_only has"
            " nothing run:\n"
            "  import torch, safetensors.torch\n"
            f'  told = torch.load("{path.name}", map_location="cpu", weights_only=True)\n'
            '  told = told.get("state_dict", told)\n'
            '  told = {k: v.clone() for k, v in told.items() if hasattr(v, "clone")}\n'
            f'  safetensors.torch.save_file(told, "{path.stem}.safetensors")'
        )
    if path.suffix.lower() != ".safetensors":
        raise BunnyLoraError(f"{path.name} is no .safetensors file. {TAKES}, in a folder or one file.")


def _header(path: Path) -> _Header:
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BunnyLoraError(
            f"{path.name} cannot be read as a checkpoint in a single file:"
            f" {str(error).splitlines()[0]}. It is cut off, empty, or something else under that name (a"
            " web page, a Git LFS pointer): fetch it again."
        ) from None
    shapes = {name: torch.empty(s.get_shape(), device="meta") for name, s in slices.items()}
    ours = [s for name, s in slices.items() if name.startswith(tuple(PREFIXES.values()))]
    return _Header(shapes, {s.get_dtype() for s in ours}, metadata)


def _refuse_other_kinds(path: Path, header: _Header) -> None:
    names = header.shapes
    if any(name.startswith("lora_") or ".lora" in name for name in names):
        raise BunnyLoraError(f"{path.name} is a LoRA, no base model: draw with it by --lora-weights.")
    kind = infer_diffusers_model_type(names)
    if kind != "v1":
        called = next((label for start, label in TYPES.items() if kind.startswith(start)), kind)
        raise BunnyLoraError(
            f"{path.name} is {called}; of models in one file, base_model takes Stable Diffusion 1.x."
        )
    if absent := [part for part, start in PREFIXES.items() if not _any_starts(names, start)]:
        raise BunnyLoraError(
            f"{path.name} is no whole Stable Diffusion 1.x: it has no {' and no '.join(absent)}"
            f" ({', '.join(PREFIXES[part] + '…' for part in absent)})."
        )
    if CHECKPOINT_KEY_NAMES["v1"] not in names:
        raise BunnyLoraError(
            f"{path.name} has a UNet of other blocks than Stable Diffusion 1.x, as BK-SDM-Tiny's is:"
            " set base_model to its folder in diffusers' layout, or its name on the hub."
        )
    if header.metadata.get("modelspec.prediction_type", "epsilon") != "epsilon" or "v_pred" in names:
        raise BunnyLoraError(
            f"{path.name} says that it was trained with v-prediction, which a single file cannot say"
            " in full: name its folder in diffusers' layout, whose scheduler/ does."
        )


def _any_starts(names: Mapping[str, Any], start: str) -> bool:
    return any(name.startswith(start) for name in names)


@quiet()
def _convert(path: Path, folder: Path, header: _Header) -> None:
    with tempfile.TemporaryDirectory() as configs:
        random_models.save_configs(SD1, bpe.build_clip_tokenizer(), Path(configs))
        try:
            pipe = diffusers.StableDiffusionPipeline.from_single_file(
                str(path), config=configs, local_files_only=True, torch_dtype=_dtype(header)
            )
            pipe.save_pretrained(folder)
        except Exception as error:  # It raises whatever it trips over: of what is missing, anything.
            reason = _absent(header) or str(error).strip().splitlines()[0][:200]
            raise BunnyLoraError(f"{path.name} does not fit Stable Diffusion 1.x: {reason}.") from error


def _absent(header: _Header) -> str | None:
    """Say which tensors are not there that Stable Diffusion 1.x has."""
    with torch.device("meta"):
        whole = random_models.build_pipeline(SD1)
    absent = [name for name in ldm.tensors(whole) if name not in header.shapes]
    return f"it has no {absent[0]}, {len(absent)} such tensors in all" if absent else None


def _dtype(header: _Header) -> torch.dtype:
    """Return the most exact type among the weights, which loses nothing; of bytes, half precision."""
    if header.dtypes & {"F32", "F64"} or {"F16", "BF16"} <= header.dtypes:
        return torch.float32
    return torch.bfloat16 if "BF16" in header.dtypes else torch.float16
