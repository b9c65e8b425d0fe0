"""From a configuration's source to training data on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bunny_lora import dataset, stage4
from bunny_lora.config import Config
from bunny_lora.core import files, paths, ranks
from bunny_lora.core.files import is_inside
from bunny_lora.data import frames, shots, weak_spots, writing
from bunny_lora.data.folder import CAPTION_NOT_READ, READ
from bunny_lora.data.summary import describe, remarks
from bunny_lora.data.weak_spots import WeakSpot
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components

SETTINGS = (
    "source", "min_confidence", "instance_prompt", "caption_column", "character_names",
    "allow_outside_paths", "base_model",
)  # fmt: skip
"""What prepared data depend on, `base_model` for its tokenizer."""
FILM_RECORD = "drawn_by.json"


def prepare_data(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Write `config.data_dir` from `config.source` and return the summary, `data_summary.json`.

    Args:
        config: source, data_dir, min_confidence, instance_prompt, allow_outside_paths and base_model
            (for its tokenizer) are read.
        overwrite: also where the prepared data was edited by hand; the edited folder is kept beside.

    Raises:
        BunnyLoraError: no source, nothing usable in it, or edited data would be replaced.
    """
    tokenizer = components.load_tokenizer(config.base_model)
    source = _read(config)
    before = _refuse_to_mix(source, config)
    _refuse_captionless(describe(source, source.frames, None), config, source.origin)
    summary = writing.prepare(source, config.data_path, tokenizer=tokenizer, overwrite=overwrite)
    return summary | ({"replaced": before} if before not in ("", summary["source"]) else {})


def reading(config: Config) -> dict[str, Any]:
    """Return what a configuration says of how data are read, for `read_source` and `read_samples`."""
    return {
        "instance_prompt": config.instance_prompt,
        "caption_column": config.caption_column,
        "character_names": config.character_names,
        "allow_outside_paths": config.allow_outside_paths,
    }


def read_split(
    config: Config, data_dir: Path | None = None
) -> tuple[list[dataset.Sample], list[dataset.Sample]]:
    """Return the pictures that training sees, and those that `config.held_out` keeps from it.

    Args:
        config: how data are read, and how much is held out.
        data_dir: None is the configuration's.

    Raises:
        BunnyLoraError: as `dataset.read_samples`.
    """
    samples = dataset.read_samples(data_dir or config.data_path, **reading(config))
    return shots.split(samples, config.held_out)


def check_as_it_is(config: Config) -> list[str]:
    """Return what nobody should miss of a `data_dir` that no one prepared: lines as of `remarks`.

    Raises:
        BunnyLoraError: it cannot be read, or has no captions and nobody asked for one for all.
    """
    tokenizer = components.load_tokenizer(config.base_model)
    about = dataset.describe_as_it_is(config.data_path, tokenizer, **reading(config))
    _refuse_captionless(about, config, config.data_path)
    return remarks(about)


def find_weak_spots(config: Config) -> list[WeakSpot]:
    """Return what a run would learn badly of the data in `data_dir`, the gravest first.

    Raises:
        BunnyLoraError: they cannot be read.
    """
    tokenizer = components.load_tokenizer(config.base_model)
    samples = dataset.read_samples(config.data_path, **reading(config))
    samples = [writing.fitted(sample, tokenizer) for sample in samples]
    pictures = [sample.path for sample in samples]
    shot, group = shots.shots(pictures), shots.near_duplicates(pictures)
    facts = weak_spots.Facts(samples, config, tokenizer, shot, group)
    return weak_spots.find_weak_spots(facts)


def source_changed(config: Config) -> bool:
    """Whether `config.source` is there and says something else than when the data was prepared.

    Raises:
        BunnyLoraError: the one is the demo's film, the other is not.
    """
    summary = dataset.load_summary(config.data_path)
    if summary is None:
        return False
    try:
        source = _read(config)
    except BunnyLoraError:
        return False  # Gone or moved: what was prepared from it is enough.
    _refuse_to_mix(source, config)
    return source.digest != summary["input_sha256"]


def _read(config: Config) -> frames.Source:
    if config.source == "bunny-world" and ranks.is_main_process():
        draw_demo_film()
    return stage4.read_source(
        stage4.find_source(config.source),
        min_confidence=config.min_confidence,
        **reading(config),
    )


def _refuse_to_mix(source: frames.Source, config: Config) -> str:
    """Return what `data_dir` was prepared from, if anything; stop if just one is the demo's film."""
    film, data_dir = paths.demo_film_dir(), paths.relative(config.data_path)
    is_film = source.origin.resolve() == film.resolve()
    if not is_film and is_inside(config.data_path, [film.parent.resolve()]):
        raise BunnyLoraError(
            f"data_dir {data_dir} is the demo's, and {source.origin.name} are frames of your own: set"
            " data_dir to another folder, or take params/cpu.yaml instead of the demo's settings."
        )
    summary = dataset.load_summary(config.data_path) if dataset.is_data(config.data_path) else None
    before = str(summary["source"]) if summary else ""
    if before and (before == paths.relative(film)) != is_film:
        raise BunnyLoraError(
            f"data_dir {data_dir} was prepared from {before}, and the source is now"
            f" {source.origin.name}. The demo's film and frames of your own are kept apart: set"
            " data_dir to another folder, or delete this one."
        )
    return before


def _refuse_captionless(data: Mapping[str, Any], config: Config, folder: Path) -> None:
    """Stop if one made-up caption would stand for all, unless it was asked for.

    A configuration written out in full sets it as well, so captions that are not read are asked about.
    """
    unread = [item["file"] for item in data["unused"] if item["reason"] == CAPTION_NOT_READ]
    meant = config.is_set("instance_prompt") and not unread
    if meant or not 0 < data["n_images"] == data["n_instance_prompt"]:
        return
    found = f" There is {unread[0]} beside a picture, which is not read." if unread else ""
    found += "".join(f" {note}." for note in data["notes"])
    away = "move such files away and " if unread else ""
    raise BunnyLoraError(
        f"None of the {data['n_images']} pictures in {paths.relative(folder)} has a caption, so all"
        f" would be trained on one and the same, the instance_prompt {config.instance_prompt!r}."
        f" Captions are read from {READ}.{found} If one caption for all is meant, {away}say which:"
        " --set instance_prompt='zorblax the fox', or instance_prompt: in the configuration."
    )


def draw_demo_film() -> None:
    """Draw the demo's own stage-4 run, unless the one that is there is what this version would draw.

    It says which it is, in its `drawn_by.json`: a hash over the code that draws, and one over what that
    made, so that neither another version's film nor one that was edited is taken for it.
    """
    from bunny_lora.world.film import write_film

    folder = paths.demo_film_dir()
    code = files.sha256(*sorted((paths.PACKAGE_DIR / "world").glob("*.py")))
    is_there = folder.exists()
    if is_there and _film_record(folder) == {"code": code, "film": _film_sha256(folder)}:
        return
    with files.atomic_path(folder) as part:
        write_film(part)
        files.write_json(part / FILM_RECORD, {"code": code, "film": _film_sha256(part)})
    why = ", drawn anew: the one that was there is not what this version draws" if is_there else ""
    print(f"The demo's film: {paths.relative(folder)}{why}")


def _film_sha256(folder: Path) -> str:
    names = (path for path in folder.rglob("*") if path.is_file() and path.name != FILM_RECORD)
    return files.sha256(*sorted(names))


def _film_record(folder: Path) -> Any:
    try:
        return json.loads((folder / FILM_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
