"""`eval.json`: written and read back, older versions too, and described in docs/eval.md."""

import inspect
import json
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel
from test_scores import make_result

from bunny_lora import report
from bunny_lora.core import choice, eval_parts, eval_result, files
from bunny_lora.core.eval_result import EvalResult, Intervals
from bunny_lora.errors import BunnyLoraError

ROOT = Path(__file__).resolve().parents[1]
# What `evaluate` of commit 942fb87 wrote of the run in data/old_run.
VERSION_1 = Path(__file__).parent / "data" / "eval_version_1.json"
PARTS = (
    EvalResult,
    eval_result.EvalSettings,
    eval_result.ScoreTable,
    Intervals,
    eval_result.Interval,
    eval_parts.DriftScore,
    eval_parts.Copies,
    eval_parts.Sameness,
    eval_parts.NearestView,
    eval_parts.Pairs,
    eval_parts.PairImage,
    eval_result.TraitScores,
    eval_result.TraitScore,
    eval_result.IdentityScores,
    eval_result.Anchors,
    eval_result.Axis,
    eval_result.ReferenceScores,
    eval_result.ImageScores,
    eval_result.RunInfo,
)
CHOICE_PARTS = (choice.Choice, choice.CheckpointLoss, choice.Candidate)


def written(tmp_path: Path, data: object) -> Path:
    files.write_json(tmp_path / "evaluation" / "eval.json", data)
    return tmp_path


def test_what_was_written_is_read_back_and_sent_to_other_processes(tmp_path: Path) -> None:
    result = make_result(["rex", "ellie"])
    eval_result.write(tmp_path, result)
    assert eval_result.read(tmp_path) == eval_result.find(tmp_path) == result
    assert pickle.loads(pickle.dumps(result)) == result
    assert files.read_json(tmp_path / "evaluation" / "eval.json")["schema_version"] == 2


def test_a_run_without_an_evaluation_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    assert eval_result.find(tmp_path) is None
    with pytest.raises(BunnyLoraError, match="run `bunny-lora evaluate` first"):
        eval_result.read(tmp_path)


@pytest.mark.parametrize("key", ["", "schema_version", "warning"])
def test_version_1_is_read_under_the_names_of_today(tmp_path: Path, key: str) -> None:
    old = json.loads(VERSION_1.read_text(encoding="utf-8"))
    expected = old["models"]["final"]["all"]["max_copy"]["mean"]
    nearest = [picture.get("max_copy") for picture in old["pictures"]]
    old.pop(key, None)
    result = eval_result.read(written(tmp_path, old))
    assert (result.schema_version, result.models["final"].all.memorisation.mean) == (2, expected)
    assert [image.memorisation for image in result.images] == nearest
    assert result.reference.similarity_of_crops["subject"].n == 3
    assert result.run_info.config == old["run_info"]["config"]
    assert "memorisation   0.211   0.211" in report.scores_table(result)
    eval_result.write(tmp_path, result)
    text = (tmp_path / "evaluation" / "eval.json").read_text(encoding="utf-8")
    assert eval_result.read(tmp_path) == result and "max_copy" not in text


def test_what_an_older_version_did_not_say_is_named(tmp_path: Path) -> None:
    old = json.loads(VERSION_1.read_text(encoding="utf-8"))
    del old["reference"]["n_frames"]
    with pytest.raises(BunnyLoraError, match=r"of an older version, without reference\.n_frames; run"):
        eval_result.read(written(tmp_path, old))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema_version": 3}, "has schema_version 3, and this bunny_lora reads up to 2"),
        ({"schema_version": "2"}, "is damaged"),
        ({"models": {}}, "is damaged: models: .*lacks base and final"),
        ({"seconds_per_image": -1}, "is damaged: seconds_per_image"),
        ({"seconds_per_image": float("nan")}, "is damaged: seconds_per_image"),
        ({"images": [{}]}, r"is damaged: images\.0\.model"),
    ],
)
def test_a_later_version_and_damage_are_refused_in_one_line(
    tmp_path: Path, change: dict, reason: str
) -> None:
    data = make_result(["rex"]).model_dump(mode="json") | change
    with pytest.raises(BunnyLoraError, match=reason) as refusal:
        eval_result.find(written(tmp_path, data))
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000, "3"])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, {}) / "evaluation" / "eval.json"
    path.write_text(text)
    with pytest.raises(BunnyLoraError, match=r"eval\.json"):
        eval_result.read(tmp_path)


def test_keys_that_are_not_known_are_ignored(tmp_path: Path) -> None:
    result = make_result(["rex"])
    data = result.model_dump(mode="json") | {"mood": "good"}
    assert eval_result.read(written(tmp_path, data)) == result


# The documentation


def named(annotation: object) -> str:
    """`dict[str, Interval | None]`, without modules, and as today's syntax has it."""
    text = re.sub(r"\b[a-z_]+(\.[a-z_]+)*\.(?=[A-Z])", "", inspect.formatannotation(annotation))
    return re.sub(r"Optional\[(.*)\]$", r"\1 | None", text).replace("None", "null").replace("|", "\\|")


def tables() -> Iterator[str]:
    """The tables of docs/eval.md, one a model."""
    for part in (*PARTS, *CHOICE_PARTS):
        yield f"## {part.__name__}\n\n{inspect.getdoc(part)}\n\n| key | type | |\n|---|---|---|\n"
        for name, field in part.model_fields.items():
            yield f"| `{name}` | {named(field.annotation)} | {field.description} |\n"
        yield "\n"


def models_in(part: type[BaseModel]) -> set[str]:
    return set(part.model_json_schema()["$defs"]) | {part.__name__}


def test_every_key_has_a_description_and_the_document_says_it() -> None:
    expected = "".join(tables()).strip()
    text = (ROOT / "docs" / "eval.md").read_text(encoding="utf-8")
    assert text.endswith(f"{expected}\n"), f"The end of docs/eval.md should read:\n\n{expected}"
    assert all(field.description for part in PARTS for field in part.model_fields.values())
    names = {re.sub(r"\W+", "_", part.__name__).strip("_") for part in PARTS}
    assert {name.strip("_") for name in models_in(EvalResult)} == names


def test_the_example_of_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "outputs" / "lora_weights"
    (run_dir / "evaluation").mkdir(parents=True)
    shutil.copy(VERSION_1, run_dir / "evaluation" / "eval.json")
    text = (ROOT / "docs" / "eval.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert example
    exec(example[1], {})
