"""Models of the Hugging Face hub: the parts that are loaded, fetched once into its own cache.

What lies in the cache is used as it is, with no question to the hub, so that a run goes on with the
weights it began with; `bunny-lora download` asks for what is new.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from bunny_lora.core import files
from bunny_lora.core.progress import progress
from bunny_lora.core.values import split_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import kinds, variants
from bunny_lora.model.kinds import CONFIGS

# What tells a model's kind, and its tokenizer; merges.txt is in the tokenizer.json of newer ones.
SMALL = (*CONFIGS, "tokenizer/*.json", "tokenizer/merges.txt")
REQUIRED = (*CONFIGS, "tokenizer/*.json")
# Of a model in transformers' layout: its configuration, processor, tokenizer; and its weights, whole or
# in parts.
NAMES = ("config.json", "*processor_config.json", "token*.json", "special_tokens_map.json")
TEXTS = (*NAMES, "vocab.*", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
DECODER = ("config.json", "diffusion_pytorch_model.safetensors")
PARTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")


def local(name: str) -> Path:
    """Return the folder of a hub's base model, downloaded if it is not in the cache.

    Args:
        name: "owner/name", or "owner/name@revision" with a commit, a tag or a branch.

    Raises:
        BunnyLoraError: it is not in the cache and cannot be had; the message says why.
    """
    return cached(name) or download(name)


def cached(name: str) -> Path | None:
    """Return the folder in the hub's cache if all parts are there, without any connection."""
    found = _in_cache(name, SMALL)
    return None if found is None or _missing(found) else found


def _in_cache(name: str, patterns: Iterable[str]) -> Path | None:
    """Return a model's folder in the hub's cache, whole or not, without any connection."""
    repo, revision = split_revision(name)
    with contextlib.suppress(EntryNotFoundError, HFValidationError):
        wanted = list(patterns)
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True)
        )
    return None


def download(name: str) -> Path:
    """Fetch what is new or missing of a hub's base model, with a bar; whole files are kept.

    Only safetensors are fetched, since a pickle can run code, and only what is loaded: no safety
    checker. A connection that breaks is taken up again in the middle of a file, a few times.

    Raises:
        BunnyLoraError: no such model or no access to it, no connection, no Stable Diffusion, or one
            without safetensors.
    """
    with _explaining(name):
        about, sizes = _about(name)
        folder = _snapshot(name, CONFIGS, _no_bar)
        kinds.check(folder, name)
        wanted = [*SMALL, *_weights(name, sizes)]
        _tell(name, str(about.sha), sizes, wanted)
        folder = _snapshot(name, wanted, progress)
    if missing := _missing(folder):
        raise _incomplete(name, missing, sizes)
    return folder


def fetch(name: str) -> Path:
    """Fetch what is new or missing of a hub's model, a base model or an encoder.

    Raises:
        BunnyLoraError: as `download` and `download_encoder`.
    """
    with _explaining(name):
        sizes = _about(name)[1]
    is_encoder = "config.json" in sizes and "model_index.json" not in sizes
    return download_encoder(name) if is_encoder else download(name)


def local_encoder(name: str) -> Path:
    """Return the folder of a hub's model in transformers' layout, downloaded if it is not in the cache.

    Args:
        name: as `local` takes it.

    Raises:
        BunnyLoraError: it is not in the cache and cannot be had; the message says why.
    """
    found = _in_cache(name, [*TEXTS, *PARTS])
    return found if found is not None and _has_weights(found) else download_encoder(name)


def local_decoder(name: str) -> Path:
    """Return the folder of a hub's single autoencoder, downloaded if it is not in the cache.

    Args:
        name: as `local` takes it.

    Raises:
        BunnyLoraError: it is not in the cache and cannot be had; the message says why.
    """
    found = _in_cache(name, DECODER)
    if found is not None and all((found / file).is_file() for file in DECODER):
        return found
    with _explaining(name):
        return _snapshot(name, DECODER, progress)


def download_encoder(name: str) -> Path:
    """Fetch what is new or missing of a hub's model in transformers' layout, with a bar.

    Raises:
        BunnyLoraError: as `download`; the model is none of transformers, or has no safetensors.
    """
    with _explaining(name):
        about, sizes = _about(name)
        if "config.json" not in sizes:
            raise BunnyLoraError(f"{name} is no model in transformers' layout: it has no config.json.")
        if not any(filter_repo_objects(sizes, allow_patterns=list(PARTS))):
            raise BunnyLoraError(
                f"{name} has no model.safetensors, and weights as pickles (.bin) are not loaded, since"
                " they can run code. Many such models have safetensors in a request of the hub's"
                " converter: see Community on its page, and name"
                f" {split_revision(name)[0]}@refs/pr/ and its number."
            )
        _tell(name, str(about.sha), sizes, [*TEXTS, *PARTS])
        return _snapshot(name, [*TEXTS, *PARTS], progress)


def _has_weights(folder: Path) -> bool:
    """Whether all parts of a model's weights lie in a folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    parts = set(files.read_json(index).get("weight_map", {}).values())
    return all((folder / part).is_file() for part in parts)


def _about(name: str) -> tuple[ModelInfo, dict[str, int]]:
    """Return what the hub says of a model, and the size of each of its files."""
    repo, revision = split_revision(name)
    if constants.HF_HUB_CACHE.startswith("~"):  # It would be a folder of that name right here.
        raise BunnyLoraError(
            f"{name} cannot be kept, since this system knows no home folder for the hub's cache: set"
            " HF_HOME to a folder that may be written."
        )
    about = HfApi().model_info(repo, revision=revision, files_metadata=True)
    return about, {file.rfilename: file.size or 0 for file in about.siblings or ()}


def _snapshot(name: str, patterns: Iterable[str], bar: Any) -> Path:
    repo, revision = split_revision(name)
    folder = snapshot_download(
        repo, revision=revision, allow_patterns=list(patterns), tqdm_class=cast(Any, bar)
    )
    return Path(folder)


@contextlib.contextmanager
def _explaining(name: str) -> Iterator[None]:
    try:
        yield
    except BunnyLoraError:
        raise
    except Exception as error:  # Its HTTP library is not ours to name, and raises what it likes.
        raise _explained(name, error) from error


def _no_bar(*args: Any, **kwargs: Any) -> Any:
    return progress(*args, **kwargs | {"disable": True})


def _weights(name: str, listed: Iterable[str]) -> list[str]:
    """Return the file that each part is read from; refuse a model that has none for one of them."""
    found = {part: variants.weights_file(listed, part) for part in variants.WEIGHTS}
    if missing := [_plain(part) for part, file in found.items() if file is None]:
        raise _incomplete(name, missing, listed)
    return [file for file in found.values() if file is not None]


def _tell(name: str, commit: str, sizes: Mapping[str, int], wanted: list[str]) -> None:
    """Say what is about to be fetched, before the bar."""
    chosen = list(filter_repo_objects(sizes, allow_patterns=wanted))
    total = sum(sizes[path] for path in chosen)
    print(
        f"Downloading {split_revision(name)[0]}, commit {commit[:12]}: {len(chosen)} of its"
        f" {len(sizes)} files, {total / 1e9:.2g} of {sum(sizes.values()) / 1e9:.2g} GB, to the hub's"
        " cache"
    )


def _missing(folder: Path) -> list[str]:
    missing = [pattern for pattern in REQUIRED if not any(folder.glob(pattern))]
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors")]
    return missing + [_plain(p) for p in variants.WEIGHTS if not variants.weights_file(names, p)]


def _plain(part: str) -> str:
    return f"{part}/{variants.WEIGHTS[part]}.safetensors"


def _incomplete(name: str, missing: list[str], listed: Iterable[str]) -> BunnyLoraError:
    text = (
        f"{name} is no Stable Diffusion in diffusers' layout with safetensors weights; it has no"
        f" {', no '.join(missing)}. Weights as pickles (.bin, .ckpt) are not loaded from the hub,"
        " since they can run code."
    )
    if single := [file for file in listed if "/" not in file and file.endswith(".safetensors")]:
        text += (
            f" It holds {single[0]}: if that is a whole checkpoint, fetch it with"
            f" `hf download {split_revision(name)[0]} {single[0]}` and name the file in base_model."
        )
    return BunnyLoraError(text)


def _explained(name: str, error: Exception) -> BunnyLoraError:
    repo, revision = split_revision(name)
    where = constants.ENDPOINT
    again = f"bunny-lora download {name}"
    if isinstance(error, OfflineModeIsEnabled):
        return BunnyLoraError(
            f"{name} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it: unset that"
            f" and run `{again}` once, or copy the cache of a computer that has it."
        )
    if isinstance(error, GatedRepoError):
        return BunnyLoraError(
            f"{name} is gated: accept its terms at {where}/{repo}, then `hf auth login` with a token"
            " of that account."
        )
    if isinstance(error, RepositoryNotFoundError):
        return BunnyLoraError(
            f"{where} knows no {repo}, or it is private: check the name, or `hf auth login` first."
        )
    if isinstance(error, RevisionNotFoundError):
        return BunnyLoraError(f"{repo} has no revision {revision}: name a commit, a tag or a branch.")
    if isinstance(error, HFValidationError):
        return BunnyLoraError(f"{repo} is neither a folder here nor a name that the hub could have.")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return BunnyLoraError(
        f"{name} is not wholly in the hub's cache, and fetching it from {where} failed: {reason}\n"
        f"Files that have arrived whole are kept; `{again}` fetches the others once that is mended."
    )
