"""Coverage-guided fuzzing: `python tests/fuzz.py source|entries|metadata|png [-max_total_time=900]`.

Needs `pip install atheris` (Linux, and no dependency of the project); more arguments are libFuzzer's.
What must hold for any bytes is said by the four functions; whatever else is raised is a finding.
"""

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["bunny_lora"]):
    from bunny_lora import dataset, errors, inference, stage4
    from bunny_lora.core.image_file import read_metadata
    from bunny_lora.data import captions, images
    from bunny_lora.data.metadata import _line
    from bunny_lora.data.summary import describe
    from bunny_lora.errors import BunnyLoraError

from PIL import Image

ROOT = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
RUN = ROOT / "outputs" / "run"
ENTRY = {
    "frame_id": "frame_1",
    "frame_path": "C:\\film\\frames\\a.png",
    "characters_identified": ["rex", "ellie"],
    "scene_description": "A green dinosaur in the rain",
    "sd_caption": '{"sd_caption": "rex',
    "confidence": 0.9,
    "model_used": "a-model",
    "local_detections": [{"bbox": [1, 2, 3, 4], "confidence": 0.5}],
}


def source(data: bytes) -> None:
    """A stage-4 JSON is read or refused; nothing is lost, and all of it can be written down."""
    (RUN / "llm_analysis" / "llm_analysis.json").write_bytes(data)
    try:
        found = stage4.read_source(RUN)
    except BunnyLoraError:
        return
    assert len(found.frames) + len(found.dropped) == len(json.loads(data, parse_int=float))
    assert all(frame.path.is_relative_to(ROOT) for frame in found.frames)
    assert all(item.reason and item.frame_id for item in found.dropped)
    summary = describe(found, found.frames, None)
    json.dumps(summary, ensure_ascii=False, allow_nan=False).encode()
    for frame in found.frames:
        _line(frame.path.name, frame.caption).encode()


def entries(data: bytes) -> None:
    """The same of entries whose values may be anything, so that more than broken JSON is tried."""
    provider = atheris.FuzzedDataProvider(data)
    records = []
    while provider.remaining_bytes() and len(records) < 4:
        record = dict(ENTRY)
        for _ in range(provider.ConsumeIntInRange(0, 4)):
            record[provider.PickValueInList(list(ENTRY))] = anything(provider)
        records.append(record)
    source(json.dumps(records).encode())


def anything(provider: atheris.FuzzedDataProvider, depth: int = 2) -> object:
    """A JSON value, most often a text."""
    kind = provider.ConsumeIntInRange(0, 9 if depth else 7)
    if kind < 4:
        return provider.ConsumeUnicode(60)
    if kind < 8:
        number = provider.ConsumeFloat()
        return [None, bool(number > 0), number, provider.ConsumeInt(9)][kind - 4]
    return [anything(provider, depth - 1) for _ in range(2)] if kind == 8 else {"bbox": [1, 2, 3, 4]}


def metadata(data: bytes) -> None:
    """Any metadata.jsonl is read or refused; any caption that we write is read back the same."""
    folder = ROOT / "mine"
    (folder / "metadata.jsonl").write_bytes(data)
    for read in (stage4.read_source, lambda f: dataset.ImageDataset(f, resolution=8, center_crop=True)):
        with contextlib.suppress(BunnyLoraError):
            read(folder)
    text = captions.clean(data.decode("utf-16" if len(data) % 2 else "utf-8", "replace"))
    if text:
        (folder / "metadata.jsonl").write_bytes(_line("a.png", text).encode())
        assert [sample.caption for sample in dataset.read_samples(folder)] == [text]


def png(data: bytes) -> None:
    """Settings in a PNG come back as they were; a damaged PNG has none and is no crash."""
    provider = atheris.FuzzedDataProvider(data)
    prompt = provider.ConsumeUnicode(200)
    image, path = Image.new("RGB", (8, 8)), ROOT / "out.png"
    image.info["parameters"] = json.dumps({"prompt": prompt}, ensure_ascii=False)
    inference.save_image(image, path)
    expected = {"prompt": prompt.encode("utf-8", "replace").decode()}
    assert read_metadata(path) == expected
    spoilt = bytearray(path.read_bytes())
    while provider.remaining_bytes() > 3:
        place = provider.ConsumeIntInRange(0, len(spoilt) - 1)
        spoilt[place] = provider.ConsumeIntInRange(0, 255)
    path.write_bytes(spoilt[: provider.ConsumeIntInRange(0, len(spoilt))])
    assert read_metadata(path) is None or isinstance(read_metadata(path), dict)
    with contextlib.suppress(errors.LeftOutError):
        images.inspect(path)


TARGETS = {"source": source, "entries": entries, "metadata": metadata, "png": png}


def seeds(name: str, folder: Path) -> Path:
    """Write what is worth changing: a good input of each kind, and words that matter."""
    folder.mkdir()
    good = {
        "source": [
            json.dumps([ENTRY]),
            json.dumps([ENTRY | {"sd_caption": "rex is in the green rain"}]),
        ],
        "entries": ["x" * 300, json.dumps([ENTRY])],
        "metadata": ['{"file_name": "a.png", "text": "rex, a café 🦖"}\n'] * 2,
        "png": ["rex, a café 🦖", "x" * 300],
    }
    for number, text in enumerate(good[name]):
        (folder / str(number)).write_text(text)
    words = [*ENTRY, "file_name", "text", "Analysis failed", "NaN", "../", "\\\\ud800", "1e999", "```"]
    (ROOT / "words").write_text("".join(f'"{word}"\n' for word in words))
    return folder


def main() -> None:
    os.environ["BUNNY_LORA_ROOT"] = str(ROOT)
    for folder in (RUN / "llm_analysis", RUN / "frames", ROOT / "mine"):
        folder.mkdir(parents=True)
    for folder in (RUN / "frames", ROOT / "mine"):
        Image.new("RGB", (40, 40)).save(folder / "a.png")
    name = sys.argv.pop(1)
    corpus = str(seeds(name, ROOT / "corpus"))
    atheris.Setup([*sys.argv, f"-dict={ROOT / 'words'}", corpus], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
