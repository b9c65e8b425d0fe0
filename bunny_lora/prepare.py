"""From a configuration's source to training data on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bunny_lora import dataset, stage4
from bunny_lora.config import Config
from bunny_lora.core import files, paths, ranks
from bunny_lora.data import frames, writing
from bunny_lora.errors import BunnyLoraError
from bunny_lora.model import components

SETTINGS = ("source", "min_confidence", "instance_prompt", "allow_outside_paths", "base_model")
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
    return writing.prepare(_read(config), config.data_path, tokenizer=tokenizer, overwrite=overwrite)


def source_changed(config: Config) -> bool:
    """Whether `config.source` is there and says something else than when the data was prepared."""
    summary = dataset.load_summary(config.data_path)
    if summary is None:
        return False
    try:
        return _read(config).digest != summary["input_sha256"]
    except BunnyLoraError:
        return False  # Gone or moved: what was prepared from it is enough.


def _read(config: Config) -> frames.Source:
    if config.source == "bunny-world" and ranks.is_main_process():
        draw_demo_film()
    return stage4.read_source(
        stage4.find_source(config.source),
        min_confidence=config.min_confidence,
        instance_prompt=config.instance_prompt,
        allow_outside_paths=config.allow_outside_paths,
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
