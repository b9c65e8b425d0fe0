"""A film of the heroes, written as a stage-4 run, with all that goes wrong there.

Shots of one to four nearly equal frames; more wide shots than close ones, side characters that
nobody named, some heroes seen far more often than others. On top come the defects that a real stage
4 leaves behind, each once or twice, whatever the length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from bunny_lora.core.files import atomic_path
from bunny_lora.errors import BunnyLoraError
from bunny_lora.world.attributes import (
    HEROES,
    PLACES,
    Picture,
    Traits,
    generator,
    hero_picture,
    pick,
    random_moment,
    random_scene,
    random_traits,
    stage,
)
from bunny_lora.world.captions import caption, scene_description
from bunny_lora.world.drawing import PLAIN, Style
from bunny_lora.world.renderer import Rendering, render

_LEADS = (8, 5, 4, 2)
"""How often the first hero is in the lead, the second and so on; any others as seldom as the last."""
_CAMERAS = ("wide",) * 6 + ("medium",) * 3 + ("close-up",)
_UNUSABLE = (
    "low confidence",
    "low confidence",
    "failed call",
    "missing frame",
    "cut-off answer",
    "nobody",
    "nobody",
)
_FIRST_FRAME, _FRAME_STEP = 120, 8


@dataclass(frozen=True)
class Take:
    """One record to be: what the frame shows and which defect befalls it ("" for none)."""

    picture: Picture
    defect: str = ""

    @property
    def usable(self) -> bool:
        """Whether a careful reader can train on it."""
        return self.defect in ("", "cut-off caption", "long caption")


def write_film(
    run_dir: Path,
    *,
    n_frames: int = 65,
    seed: int = 0,
    size: tuple[int, int] = (640, 360),
    heroes: Mapping[str, Traits] = HEROES,
    style: Style = PLAIN,
) -> Path:
    """Write a stage-4 run with `n_frames` usable frames of `size` pixels, and return `run_dir`.

    Its heroes are the demo's, or any others by name, `attributes.fresh_heroes` for instance; its style
    is the one that Bunny World's models know, or another one of `drawing.STYLES`.

    The run appears whole or not at all, and the same arguments write the same bytes. Its truth (all
    attributes and boxes of every frame) lies beside it in `world_truth.json`.

    Raises:
        BunnyLoraError: `run_dir` exists and is not an empty folder, `n_frames` is below 1, or there are
            no heroes.
    """
    run_dir = Path(run_dir)
    if n_frames < 1:
        raise BunnyLoraError(f"A film needs at least one frame, not {n_frames}.")
    if not heroes:
        raise BunnyLoraError("A film needs at least one hero: name one in `heroes`, or leave it out.")
    if run_dir.exists() and not (run_dir.is_dir() and not any(run_dir.iterdir())):
        raise BunnyLoraError(f"{run_dir} exists and is not empty: choose another folder or remove it.")
    with atomic_path(run_dir) as part:
        part.mkdir()
        _write(part, _takes(n_frames, seed, size[0] / size[1], heroes), seed, size, style)
    return run_dir


def heldout_frames(
    hero: str,
    n: int,
    seed: int = 0,
    size: tuple[int, int] = (128, 128),
    heroes: Mapping[str, Traits] = HEROES,
) -> list[Rendering]:
    """Return `n` pictures of one of `heroes` that no film shows, going round the seven places.

    Raises:
        BunnyLoraError: there is no such hero.
    """
    if hero not in heroes:
        raise BunnyLoraError(f"There is no hero {hero!r}; the heroes are {', '.join(heroes)}.")
    aspect = size[0] / size[1]
    frames = []
    for index in range(n):
        picture = hero_picture([hero], seed, index, aspect=aspect, heroes=heroes)
        place = PLACES[index % len(PLACES)]
        light = "night" if place == "city" else picture.scene.light
        scene = replace(picture.scene, place=place, light=light, details=())
        frames.append(render(replace(picture, scene=scene), size))
    return frames


def _shots(seed: int, aspect: float, heroes: Mapping[str, Traits]) -> Iterator[list[Picture]]:
    """Yield shots without end; the first ones have each hero in the lead once."""
    openers = list(generator(seed, "film openers").permutation(list(heroes)))
    shares = zip_longest(heroes, _LEADS[: len(heroes)], fillvalue=_LEADS[-1])
    leads = [str(name) for name, share in shares for _ in range(int(share))]
    for number in range(1_000_000):
        rng = generator(seed, "film shot", number)
        lead = str(openers[number]) if number < len(openers) else pick(rng, leads)
        yield _shot(rng, lead, aspect, heroes)


def _shot(
    rng: np.random.Generator, lead: str, aspect: float, heroes: Mapping[str, Traits]
) -> list[Picture]:
    scene = random_scene(rng, camera=pick(rng, _CAMERAS))
    moments = [random_moment(rng, lead, heroes[lead], scene.camera)]
    if scene.camera != "close-up":
        others = [name for name in heroes if name != lead]
        for name in rng.permutation(others)[: int(rng.choice(4, p=(0.62, 0.26, 0.08, 0.04)))]:
            moments.append(random_moment(rng, str(name), heroes[str(name)], scene.camera))
        if scene.camera == "wide" and rng.random() < 0.4:
            moments.append(random_moment(rng, "", random_traits(rng), scene.camera))
    cast = stage(rng, moments, scene.camera, aspect)
    drift = rng.uniform(-0.008, 0.008, size=len(cast))
    frames = []
    for t in range(1 + int(rng.integers(4))):
        moved = [replace(c, x=c.x + float(d) * t) for c, d in zip(cast, drift, strict=True)]
        frames.append(Picture(scene, tuple(moved), aspect))
    return frames


def _takes(n_frames: int, seed: int, aspect: float, heroes: Mapping[str, Traits]) -> list[Take]:
    """Return the usable takes in order, with the unusable ones scattered among them."""
    pictures: list[Picture] = []
    longest = max(1, n_frames // len(heroes))
    for shot in _shots(seed, aspect, heroes):
        pictures += shot[:longest]
        if len(pictures) >= n_frames:
            break
    takes = [Take(picture) for picture in pictures[:n_frames]]
    rng = generator(seed, "film defects")
    if n_frames >= 4:
        first, second = rng.choice(n_frames, size=2, replace=False)
        takes[first] = replace(takes[first], defect="cut-off caption")
        takes[second] = replace(takes[second], defect="long caption")
    for defect in _UNUSABLE:
        at = int(rng.integers(len(takes) + 1))
        picture = takes[min(at, len(takes) - 1)].picture
        if defect == "nobody":
            picture = replace(picture, scene=random_scene(rng, camera="wide"), characters=())
        takes.insert(at, Take(picture, defect))
    return takes


def _write(folder: Path, takes: list[Take], seed: int, size: tuple[int, int], style: Style) -> None:
    (folder / "frames").mkdir()
    (folder / "llm_analysis").mkdir()
    records, truths = [], []
    for index, take in enumerate(takes):
        frame_id = f"frame_{_FIRST_FRAME + _FRAME_STEP * index:06d}"
        rendering = render(take.picture, size, style)
        if take.defect not in ("failed call", "missing frame"):
            path = folder / "frames" / f"{frame_id}.jpg"
            rendering.image.save(path, quality=92, subsampling=0)
        records.append(_record(frame_id, take, rendering, seed, index))
        truth = {"frame_id": frame_id, "usable": take.usable, "defect": take.defect}
        truths.append(truth | rendering.as_dict())
    _dump(folder / "llm_analysis" / "llm_analysis.json", records)
    _dump(folder / "world_truth.json", {"seed": seed, "size": list(size), "frames": truths})


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")


def _record(frame_id: str, take: Take, rendering: Rendering, seed: int, index: int) -> dict[str, Any]:
    rng = generator(seed, "film record", index)
    answer = _answer(take.picture, seed, rng)
    raw = json.dumps(answer)
    record = {
        "frame_id": frame_id,
        "frame_path": _frame_path(frame_id, index),
        "composite_path": f"llm_analysis/composites/{frame_id}_composite.jpg",
        "characters_identified": answer["characters_present"],
        "scene_description": answer["scene_description"],
        "sd_caption": answer["sd_caption"],
        "confidence": answer["confidence"],
        "processing_time": round(float(rng.uniform(1.4, 3.2)), 2),
        "model_used": "bunny-world",
        "local_detections": _detections(rendering, rng),
        "llm_raw_response": raw,
        "analyzed_at": (datetime(2026, 1, 1) + timedelta(seconds=3 * index)).isoformat(),
    }
    return record | _damage(take, raw, rng)


def _answer(picture: Picture, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    people = sorted((c for c in picture.characters if c.name), key=lambda c: c.x)
    confidence = rng.uniform(0.66, 0.97) if people else rng.uniform(0.05, 0.2)
    return {
        "characters_present": [character.name for character in people],
        "scene_description": scene_description(picture, seed),
        "sd_caption": caption(picture, int(rng.integers(2**31))),
        "confidence": round(float(confidence), 2),
    }


def _damage(take: Take, raw: str, rng: np.random.Generator) -> dict[str, Any]:
    """Return what the take's defect does to its record."""
    if take.defect == "low confidence":
        return {"confidence": round(float(rng.uniform(0.25, 0.45)), 2)}
    if take.defect == "failed call":
        failure = "Analysis failed: 429 rate limited"
        return {
            "characters_identified": [],
            "scene_description": failure,
            "sd_caption": failure,
            "confidence": 0.0,
            "processing_time": 0.0,
            "model_used": "error",
            "llm_raw_response": "",
        }
    if take.defect == "cut-off caption":
        return {"sd_caption": raw[:90], "llm_raw_response": raw[:90]}
    if take.defect == "cut-off answer":
        return {"scene_description": raw[:40], "sd_caption": raw[:34], "llm_raw_response": raw[:40]}
    if take.defect == "long caption":
        texts = [caption(take.picture, int(number)) for number in rng.integers(2**31, size=4)]
        return {"sd_caption": ", ".join(texts)}
    return {}


def _frame_path(frame_id: str, index: int) -> str:
    """Return the path as one of the machines that a run has been on would have written it."""
    name = f"frames/{frame_id}.jpg"
    if index % 9 == 4:
        return f"pipeline_data/sprite/{name}"
    if index % 9 == 7:
        return "D:\\bunny\\pipeline_data\\sprite\\" + name.replace("/", "\\")
    return name


def _detections(rendering: Rendering, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the face boxes as a detector would: a little off, some missed, tied to no name."""
    found = []
    for box in rendering.faces:
        if rng.random() < 0.08:
            continue
        width, height = rendering.image.size
        jitter = rng.integers(-2, 3, size=4)
        x1, y1, x2, y2 = (int(value) for value in np.array(box) + jitter)
        bbox = [max(0, x1), max(0, y1), min(width, x2), min(height, y2)]
        found.append({"bbox": bbox, "confidence": round(float(rng.uniform(0.55, 0.95)), 3)})
    return found
