"""The shape of the project itself: layers, lengths, notebooks, the documents' tree and tables."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from bunny_lora.config import known_keys, load_config

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bunny_lora"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
PARAMS = sorted((ROOT / "params").glob("*.yaml"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A module imports what stands below it, or its neighbours where that makes no circle. A folder is one
# name, with all that lies in it.
LAYERS = {
    "ground": {"config", "core", "errors"},
    "data": {"data", "dataset", "stage4"},
    "model": {"model"},
    "training": {"inference", "prepare", "trainer", "training"},
    "judgement": {"evaluation", "export", "report"},
    "entry": {
        "__main__",
        "arguments",
        "batch",
        "cli",
        "compare",
        "explorer",
        "live",
        "session",
        "sweep",
        "watch",
    },
}
SIBLINGS = ("trainer", "inference")
# Bunny World stands beside: it uses the lowest three layers, and these know of it, each for one thing.
WORLD_USES = ("ground", "data", "model")
WORLD_USERS = {"cli", "evaluation", "prepare"}

MAX_FUNCTION_LINES = 80
MAX_MODULE_LINES = 400
MAX_CODE_CELLS = 16
MAX_CELL_LINES = 18
MAX_README_LINES = 100


def name_of(path: Path) -> str:
    """`trainer`, or `world` for everything in that folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> set[str]:
    """The modules that an import statement names, `bunny_lora.core.paths` and `torch.nn` among them."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return set()


def imports(tree: ast.AST, *, typing_too: bool = True) -> set[str]:
    """All modules imported anywhere in the tree, inside functions as well."""
    found = set()
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        found |= imported(node)
        only_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        nodes += node.orelse if only_for_types and not typing_too else ast.iter_child_nodes(node)
    return found


def ours(names: set[str]) -> set[str]:
    """The first part after `bunny_lora.` of each name that is a module of this package."""
    existing = {name_of(path) for path in MODULES}
    parts = {name.split(".")[1] for name in names if name.startswith("bunny_lora.")}
    return parts & existing


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def layer_of(module: str) -> str:
    return next(layer for layer, modules in LAYERS.items() if module in modules)


def tracked_files() -> list[Path]:
    """What git keeps, without what has been removed but not committed."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in files if path.is_file()]


# Layers


def test_every_module_has_its_place_in_one_layer():
    placed = [module for modules in LAYERS.values() for module in modules]
    assert len(placed) == len(set(placed))
    assert {name_of(path) for path in MODULES} - {"world"} <= set(placed)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    module, uses = name_of(path), ours(imports(tree_of(path)))
    order = list(LAYERS)
    if module == "world":
        assert {layer_of(use) for use in uses - {"world"}} <= set(WORLD_USES)
        return
    assert "world" not in uses or module in WORLD_USERS
    above = {
        use for use in uses - {"world"} if order.index(layer_of(use)) > order.index(layer_of(module))
    }
    assert not above


def test_neighbours_import_each_other_in_no_circle():
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        module = name_of(path)
        graph.setdefault(module, set())
        graph[module] |= ours(imports(tree_of(path), typing_too=False)) - {module}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # Else: CycleError.


@pytest.mark.parametrize("module", SIBLINGS)
def test_trainer_and_inference_do_not_know_each_other(module):
    path = PACKAGE / f"{module}.py"
    uses = ours(imports(tree_of(path))) if path.is_file() else set()
    assert not uses & set(SIBLINGS)


@pytest.mark.parametrize("module", ["config", "core/paths", "errors"])
def test_configuration_and_paths_never_import_torch(module):
    names = imports(tree_of(PACKAGE / f"{module}.py"))
    assert not {name for name in names if name.split(".")[0] == "torch"}


def test_the_ground_layer_loads_without_torch():
    files = [path for path in MODULES if name_of(path) in LAYERS["ground"]]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    modules = ", ".join(names)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Lengths


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_are_short_enough_to_read_in_one_sitting(path):
    n_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert n_lines <= MAX_MODULE_LINES
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree_of(path))
        if isinstance(node, functions)
    }
    assert not {name for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


# Notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_short_calls_between_prose(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) <= MAX_CODE_CELLS
    assert max(len(source.splitlines()) for source in code) <= MAX_CELL_LINES
    for source in code:
        python = re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE)
        definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not [node for node in ast.walk(ast.parse(python)) if isinstance(node, definitions)]
    tags = [tag for cell in cells for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    assert "?**" in prose[0], "the question that it answers"
    assert "On two cores:" in prose[0], "how long it takes"
    assert "## What next" in prose[-1]
    assert any("report.config_details(config)" in source for source in code)


def test_make_runs_every_notebook_in_its_order():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    names = re.search(r"^NOTEBOOKS := (.*)$", makefile, re.MULTILINE)
    assert names
    assert names[1].split() == [path.stem for path in NOTEBOOKS]


# Configuration


def test_every_key_of_the_configuration_is_read_somewhere():
    read = {
        node.attr
        for path in MODULES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute)
    }
    allows_one_word_only = {"method"}
    dead = {key for key in known_keys() if key.split(".")[-1] not in read | allows_one_word_only}
    assert not dead


@pytest.mark.parametrize("path", PARAMS, ids=lambda path: path.name)
def test_a_params_file_is_valid_and_keeps_to_relative_paths(path):
    config = load_config(path)
    places = [config.output_dir, config.data_dir, config.prior_preservation.class_data_dir]
    assert not [place for place in places if Path(place).is_absolute()]


# Traces of one machine


def test_no_tracked_file_names_a_place_on_one_machine():
    places = [str(place) for place in (ROOT, Path.home()) if len(place.parts) > 1]
    here = re.compile(r"(?<![\w.])(?:" + "|".join(map(re.escape, places)) + r")(?![\w.-])")
    # Tests and documents of formats have made-up ones, the paths of other people's runs.
    anywhere = re.compile(r"(?<![\w.])(?:/home|/Users|[A-Z]:\\+Users)[/\\]+\w")
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        made_up = path.is_relative_to(ROOT / "tests") or path == PACKAGE / "stage4.py"
        patterns = [here] if made_up else [here, anywhere]
        found += [(path.name, match[0]) for pattern in patterns for match in pattern.finditer(text)]
    assert not found


# The README, and the tree of docs/architecture.md


def test_the_readme_is_a_first_visit_and_leads_to_all_documents():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= MAX_README_LINES
    documents = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    assert not [path for path in documents if f"]({path})" not in readme]


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "notebooks" / "README.md"], ids=str)
def test_every_notebook_is_in_the_tables_with_its_question(path):
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if ".ipynb)" in line]
    named = [re.search(r"(\w+\.ipynb)\) \| (.+?\?) \|", row).groups() for row in rows]
    assert [name for name, _ in named] == [notebook.name for notebook in NOTEBOOKS]
    for notebook, (_, question) in zip(NOTEBOOKS, named, strict=True):
        first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
        assert question in " ".join(first.split())


def layout_paths() -> list[str]:
    """The paths in the fence of docs/architecture.md: two spaces a level, name, two spaces, comment."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    fence = re.search(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert fence, "docs/architecture.md has no fenced tree"
    paths, folders = [], []
    for line in filter(str.strip, fence[1].splitlines()):
        depth = (len(line) - len(line.lstrip())) // 2
        name = re.split(r"\s{2,}", line.strip())[0]
        folders = folders[:depth]
        paths.append("".join(folders) + name)
        folders.append(name)
    return paths


def test_every_path_in_the_tree_exists_as_it_is_called():
    paths = layout_paths()
    assert paths
    assert len(paths) == len(set(paths))
    missing = [
        path
        for path in paths
        if not ((ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file())
    ]
    assert not missing


def test_the_tree_names_every_top_level_path_and_every_module():
    inside = [path.relative_to(ROOT).parts for path in tracked_files()]
    top_level = {parts[0] + "/" * (len(parts) > 1) for parts in inside}
    modules = {
        f"bunny_lora/{path.name}{'/' * path.is_dir()}"
        for path in PACKAGE.iterdir()
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").is_file()
    }
    unnamed = (top_level | modules) - set(layout_paths())
    assert not unnamed
