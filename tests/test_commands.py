"""Every command and every example in the README, in docs/ and in notebooks/README.md is run here.

A project with toy frames, a toy model and a finished run stands in for the reader's. What needs a hub,
other machines, Windows or hours is recognised by a rule of `CHECKED`, and as much of it is checked as
can be.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from conftest import CHECKOUT, draw_frames, tiny_config

from bunny_lora.cli import build_parser, main

DOCS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELLS = ("bash", "powershell")
RUN_ANEW = ("train", "sweep")  # begun without the run that is there, whose settings are others


def commands(text: str) -> list[str]:
    """The commands in a document's fences, without comments, continued lines in one."""
    found = []
    for language, block in FENCE.findall(text):
        if language in SHELLS:
            lines = re.sub(r"\\\n\s*", "", block).splitlines()
            found += [bare for line in lines if (bare := re.sub(r"(^|\s+)#.*$", "", line).strip())]
    return found


def examples(text: str) -> list[str]:
    """The Python in a document's fences."""
    return [block for language, block in FENCE.findall(text) if language == "python"]


# Checked, not run: what a command begins with, and as much as can be said of it.


def is_target(words: list[str]) -> None:
    """`make test` runs this file, and make demo takes minutes: both are in the Makefile."""
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf-8")
    target, *settings = words[1:]
    assert re.search(rf"^{target}: ", makefile, re.MULTILINE)
    for setting in settings:
        assert re.search(rf"^{setting.split('=')[0]} \?=", makefile, re.MULTILINE)


def is_papermill(words: list[str]) -> None:
    """test_notebooks.py runs papermill, `make test` all notebooks: the names here are right."""
    notebook, _, *options = words[1:]
    cells = nbformat.read(CHECKOUT / notebook, 4).cells
    parameters = next(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    while options:
        option, name, *options = options
        if option == "-f":
            assert (CHECKOUT / name).is_file()
            continue
        assert option == "-p"
        assert re.search(rf"^{name} = ", parameters, re.MULTILINE)
        options.pop(0)


def is_launched(words: list[str]) -> None:
    """Other machines: what is launched is a command that there is; test_processes.py starts some."""
    build_parser().parse_args(words[words.index("bunny_lora") + 1 :])


def is_watching(words: list[str]) -> None:
    """Of runs that work: the command is one that there is; test_watch.py watches some and asks them."""
    build_parser().parse_args(words[1:])


def is_on_a_cluster(words: list[str]) -> None:
    """SLURM: the command is one that there is; test_sweep.py has submitit run jobs without one."""
    build_parser().parse_args(words[1:])


def is_benchmark(words: list[str]) -> None:
    """Minutes and more: test_benchmarks.py runs each of them in short."""
    assert (CHECKOUT / words[1]).is_file()
    assert Path(words[1]).stem in (CHECKOUT / "tests" / "test_benchmarks.py").read_text(
        encoding="utf-8"
    )


def names_files(words: list[str]) -> None:
    """Windows, or an installation: the files that it names are there."""
    for name in (word for word in words if word.endswith((".txt", ".lock", ".yml"))):
        assert (CHECKOUT / name).is_file()


CHECKED: dict[str, Callable[[list[str]], None]] = {
    r"make ": is_target,
    r"papermill ": is_papermill,
    r"accelerate launch ": is_launched,
    r".* --slurm ": is_on_a_cluster,
    r"bunny-lora watch(?!.* --once)": is_watching,
    r"python benchmarks/": is_benchmark,
    r"(pip|conda|py -3\.11|\.venv\\|\. \.venv/)": names_files,
}


def rule_of(command: str) -> Callable[[list[str]], None] | None:
    """Return what checks a command that is not run."""
    return next((check for start, check in CHECKED.items() if re.match(start, command)), None)


def every(found: Callable[[str], list[str]]) -> list:
    return [
        pytest.param(item, id=f"{path.stem}: {' '.join(item.split())[:60]}")
        for path in DOCS
        for item in found(path.read_text(encoding="utf-8"))
    ]


@pytest.fixture(scope="module")
def finished(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which everything has been done once, with one step of a toy model."""
    root = tmp_path_factory.mktemp("finished")
    (root / "notebooks").mkdir()
    (root / "params" / "sweeps").mkdir(parents=True)
    draw_frames(root / "my_pictures", 4)
    config = tiny_config(
        tiny_model,
        source="my_pictures",
        output_dir="outputs/lora_weights",
        data_dir="training_data/instance_images",
        training={"max_train_steps": 1},
        character_names=["ellie"],
    )
    for name in ("cpu", "demo"):
        (root / "params" / f"{name}.yaml").write_text(config.to_yaml())
    grid = {"config": "params/demo.yaml", "output_dir": "outputs/sweep", "grid": {"lora.rank": [1, 2]}}
    (root / "params" / "sweeps" / "rank.yaml").write_text(json.dumps(grid))
    (root / "prompts.txt").write_text("ellie\nellie, waving\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUNNY_LORA_ROOT", str(root))
        patch.chdir(root)
        for command in ("prepare", "train", "evaluate"):
            assert main([command, "--config", "params/cpu.yaml"]) == 0
        exported = root / "exported"
        run = str(root / "outputs" / "lora_weights")
        assert main(["export", "--lora-weights", run, "--out", str(exported), "--format", "kohya"]) == 0
        shutil.copy(next(exported.glob("*.safetensors")), root / "style.safetensors")
    return root


@pytest.fixture
def reader(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project, as the working folder of one command."""
    root = tmp_path / "project"
    shutil.copytree(finished, root)
    monkeypatch.setenv("BUNNY_LORA_ROOT", str(root))
    monkeypatch.delenv("BUNNY_LORA_PARAMS", raising=False)
    monkeypatch.chdir(root)
    return root


@pytest.mark.parametrize("command", every(commands))
def test_a_command_of_the_documents_does_what_it_says(command: str, reader: Path) -> None:
    if check := rule_of(command):
        check(shlex.split(command, posix="\\" not in command))
        return
    program, name, *arguments = shlex.split(command)
    assert program == "bunny-lora", f"{command}: run it here, or give it a rule in CHECKED"
    if name in RUN_ANEW:
        shutil.rmtree(reader / "outputs")
    assert main([name, *arguments]) == 0
    if "--out" in arguments:
        assert (reader / arguments[arguments.index("--out") + 1]).exists()


@pytest.mark.parametrize("example", every(examples))
def test_an_example_in_python_runs(example: str, reader: Path) -> None:
    if "LoRATrainer" in example:  # The others read the run that is there.
        shutil.rmtree(reader / "outputs")
    if '"config.yaml"' in example:
        section = (reader / "params" / "cpu.yaml").read_text()
        (reader / "config.yaml").write_text("pipeline:\n  stages: [finetuning]\n" + section)
    exec(compile(example, "example", "exec"), {})
    assert (reader / "outputs" / "lora_weights" / "final" / "unet").is_dir()


def test_a_command_that_nothing_knows_is_no_command_that_passes() -> None:
    assert rule_of("bunny-lora train") is None and rule_of("rm -rf outputs") is None
    assert commands("```bash\na \\\n    b  # why\n# nothing\n```\n") == ["a b"]


@pytest.mark.parametrize("path", [*DOCS, CHECKOUT / "notebooks" / "README.md"], ids=lambda p: p.stem)
def test_links_of_the_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    broken = [
        link for link in links if "://" not in link and not (path.parent / link.split("#")[0]).exists()
    ]
    assert not broken


# What the program says


def said() -> str:
    """Every text in the package, with … for what is filled in, a line each."""
    import ast

    texts = []
    for path in (CHECKOUT / "bunny_lora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(text.replace("\n", " ") for text in texts)


def test_troubleshooting_quotes_what_the_program_says() -> None:
    text = (CHECKOUT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        piece.strip()
        for language, block in FENCE.findall(text)
        if language == "text"
        for line in block.splitlines()
        for piece in line.split("…")
        if len(piece.strip()) > 3
    ]
    assert len(quoted) > 30
    everything = said()
    assert not [piece for piece in quoted if piece not in everything]
