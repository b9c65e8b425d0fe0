"""Base models of the Hugging Face hub: the parts that are loaded, fetched once into its own cache.

What lies in the cache is used as it is, with no question to the hub, so that a run goes on with the
weights it began with; `bunny-lora download` asks for what is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from bunny_lora.core.progress import progress
from bunny_lora.core.values import split_revision
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import kinds, variants
from bunny_lora.model.kinds import CONFIGS

# What tells a model's kind, and its tokenizer; merges.txt is in the tokenizer.json of newer ones.
SMALL = (*CONFIGS, "tokenizer/*.json", "tokenizer/merges.txt")
REQUIRED = (*CONFIGS, "tokenizer/*.json")


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
    repo, revision = split_revision(name)
    try:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=list(SMALL), local_files_only=True
        )
    except (EntryNotFoundError, HFValidationError):
        return None
    return None if _missing(Path(found)) else Path(found)


def download(name: str) -> Path:
    """Fetch what is new or missing of a hub's base model, with a bar; whole files are kept.

    Only safetensors are fetched, since a pickle can run code, and only what is loaded: no safety
    checker. A connection that breaks is taken up again in the middle of a file, a few times.

    Raises:
        BunnyLoraError: no such model or no access to it, no connection, no Stable Diffusion, or one
            without safetensors.
    """
    repo, revision = split_revision(name)
    if constants.HF_HUB_CACHE.startswith("~"):  # It would be a folder of that name right here.
        raise BunnyLoraError(
            f"{name} cannot be kept, since this system knows no home folder for the hub's cache: set"
            " HF_HOME to a folder that may be written."
        )
    try:
        about = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in about.siblings or ()}
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=list(CONFIGS), tqdm_class=cast(Any, _no_bar)
        )
        kinds.check(Path(folder), name)
        wanted = [*SMALL, *_weights(name, sizes)]
        _tell(name, str(about.sha), sizes, wanted)
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=wanted, tqdm_class=cast(Any, progress)
        )
    except BunnyLoraError:
        raise
    except Exception as error:  # Its HTTP library is not ours to name, and raises what it likes.
        raise _explained(name, error) from error
    if missing := _missing(Path(folder)):
        raise _incomplete(name, missing, sizes)
    return Path(folder)


def _no_bar(*args: Any, **kwargs: Any) -> Any:
    return progress(*args, **kwargs | {"disable": True})


def _weights(name: str, files: Iterable[str]) -> list[str]:
    """Return the file that each part is read from; refuse a model that has none for one of them."""
    found = {part: variants.weights_file(files, part) for part in variants.WEIGHTS}
    if missing := [_plain(part) for part, file in found.items() if file is None]:
        raise _incomplete(name, missing, files)
    return [file for file in found.values() if file is not None]


def _tell(name: str, commit: str, sizes: Mapping[str, int], wanted: list[str]) -> None:
    """Say what is about to be fetched, before the bar."""
    files = list(filter_repo_objects(sizes, allow_patterns=wanted))
    total = sum(sizes[path] for path in files)
    print(
        f"Downloading {split_revision(name)[0]}, commit {commit[:12]}: {len(files)} of its"
        f" {len(sizes)} files, {total / 1e9:.2g} of {sum(sizes.values()) / 1e9:.2g} GB, to the hub's"
        " cache"
    )


def _missing(folder: Path) -> list[str]:
    missing = [pattern for pattern in REQUIRED if not any(folder.glob(pattern))]
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*/*.safetensors")]
    return missing + [_plain(p) for p in variants.WEIGHTS if not variants.weights_file(names, p)]


def _plain(part: str) -> str:
    return f"{part}/{variants.WEIGHTS[part]}.safetensors"


def _incomplete(name: str, missing: list[str], files: Iterable[str]) -> BunnyLoraError:
    text = (
        f"{name} is no Stable Diffusion in diffusers' layout with safetensors weights; it has no"
        f" {', no '.join(missing)}. Weights as pickles (.bin, .ckpt) are not loaded from the hub,"
        " since they can run code."
    )
    if single := [file for file in files if "/" not in file and file.endswith(".safetensors")]:
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
