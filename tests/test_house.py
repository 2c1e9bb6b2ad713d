"""The house rules: lint, form, types, lengths of lines and cells, and no private name that leaves its room.

What does not keep a rule yet stands in `NOT_YET`, with the reason. The list can only shrink: a room that
breaks a rule and is not listed fails here, and so does one that is listed and keeps it."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import widget_state

from house_figure import below, read_house, telling
from house_style import LIMITS, ROOT, figures, measure, public, rooms_of_the_house, unshown
from public_names import name_of, rooms

PACKAGE = ROOT / "concept_tda"
CODE = ["tests", "tools", "benchmarks", "setup.py"]

# rule: {room (notebook or module): why it does not keep the rule yet}
NOT_YET: dict[str, dict[str, str]] = {
    "lines and cells": {},
    "lint of notebooks": {},
    "lint of modules": {},
    "types": {},
    "private names": {},
    "examples": {},
}


def held(rule: str, broken: dict[str, list[str]]) -> None:
    """Fail for what breaks the rule without being listed, and for what is listed without breaking it."""
    listed = NOT_YET[rule]
    new = {room: places for room, places in broken.items() if room not in listed}
    details = "\n".join(f"{room}:\n    " + "\n    ".join(places[:10]) for room, places in new.items())
    assert not new, f"{rule}: {len(new)} rooms do not keep the rule\n{details}"
    mended = sorted(set(listed) - set(broken))
    assert not mended, f"{rule}: these keep the rule now, take them off the list: {', '.join(mended)}"


def tool(name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run a tool of the dev extra, from this interpreter's environment."""
    path = Path(sys.executable).parent / name
    assert path.exists(), (
        f"{name} is not installed beside {sys.executable}: `make test` installs the dev extra"
    )
    return subprocess.run([path, *arguments], capture_output=True, text=True, cwd=ROOT)


def lint(*paths: str) -> dict[Path, list[str]]:
    """What ruff finds, by file, with the rules of pyproject.toml."""
    done = tool("ruff", "check", "--no-cache", "--output-format", "json", *paths)
    assert done.returncode in (0, 1), done.stderr
    found = defaultdict(list)
    for one in json.loads(done.stdout):
        row = f"cell {one['cell']} line " if one.get("cell") else "line "
        place = f"{row}{one['location']['row']}: {one['code']} {one['message']}"
        found[Path(one["filename"])].append(place)
    return found


def notebook_of(path: Path) -> str:
    """`50_influence/08_atlas`"""
    return path.resolve().relative_to(ROOT / "nbs").with_suffix("").as_posix()


def test_tests_tools_and_benchmarks_pass_the_linter():
    found = lint(*CODE)
    assert not found, "\n".join(f"{path}: {place}" for path, places in found.items() for place in places)


def test_tests_tools_and_benchmarks_are_formatted():
    done = tool("ruff", "format", "--no-cache", "--check", *CODE)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_pass_the_linter():
    broken = lint("concept_tda")
    held("lint of modules", {name_of(path, PACKAGE): places for path, places in broken.items()})


def test_notebooks_pass_the_linter():
    held("lint of notebooks", {notebook_of(path): places for path, places in lint("nbs").items()})


@pytest.fixture(scope="module")
def house():
    return [measure(path) for path in rooms_of_the_house()]


def test_lines_and_cells_of_every_room(house):
    held("lines and cells", {notebook_of(room.path): room.places for room in house if room.places})


def test_the_house_as_a_whole(house):
    found = figures(house)
    assert found["median"] <= LIMITS["median"] and found["p90"] <= LIMITS["p90"], found
    assert found["longest"] <= LIMITS["longest"], found
    assert found["words_per_line"] >= LIMITS["words_per_line"], found


def test_the_measure_finds_what_it_should(tmp_path):
    """Two statements on a line, a one-line loop, a long line are found; a guard clause may share its line."""
    code = (
        "#| export\n"
        "def f(xs: list) -> int:\n"
        "    if not xs: return 0\n"
        "    for x in xs: print(x)\n"
        "    a = 1; b = 2\n"
        f"    return a + b  # {'long ' * 25}\n"
    )
    cells = [
        {"cell_type": "markdown", "id": "a", "source": "Four words of prose."},
        {"cell_type": "code", "id": "b", "source": "#| export\nimport os\nimport sys"},
        {"cell_type": "code", "id": "c", "source": code},
    ]
    path = tmp_path / "room.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    room = measure(path)
    assert room.cells == [5] and room.words == 4 and room.lines == 5
    assert [place.partition("cell ")[2] for place in room.places] == [
        "c line 6: 145 characters",
        "c line 3: two statements",
        "c line 4: two statements",
    ]


def test_every_public_name_has_an_example_in_its_room(house):
    """Used in a cell that is not exported and has visible output or a check: what a reader can copy."""
    assert sum(len(public(room.path)) for room in house) > 400
    held("examples", {notebook_of(room.path): room.unshown for room in house if room.unshown})


def test_an_example_is_a_use_with_output_or_a_check(tmp_path):
    """Neither an import, an assignment, a mere call nor the room's own code counts."""
    output = [{"output_type": "execute_result", "data": {"text/plain": "2"}}]
    cells = [
        {"cell_type": "markdown", "source": "`told`"},
        {"cell_type": "code", "source": "#| export\ndef f(): return exported", "outputs": output},
        {"cell_type": "code", "source": "from room import imported\nassigned = 1", "outputs": output},
        {"cell_type": "code", "source": "silent()", "outputs": []},
        {"cell_type": "code", "source": "seen.attribute", "outputs": output},
        {"cell_type": "code", "source": "%time 1\nassert checked() == 2", "outputs": []},
    ]
    path = tmp_path / "room.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    names = ["told", "exported", "imported", "assigned", "silent", "attribute", "seen", "checked"]
    assert unshown(path, names) == names[:-2]


def test_types():
    """basedpyright in basic mode, as pyproject.toml says, on the whole package."""
    done = tool("basedpyright", "--outputjson", "--pythonpath", sys.executable)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= len(rooms(PACKAGE)), done.stderr
    broken = defaultdict(list)
    for one in report["generalDiagnostics"]:
        if one["severity"] != "error":
            continue
        place = f"line {one['range']['start']['line'] + 1}: {one['message'].splitlines()[0]}"
        broken[name_of(Path(one["file"]), PACKAGE)].append(place)
    held("types", broken)


FRONT_END = ROOT / "tools" / "front_end"
NPM = shutil.which("npm")


@pytest.mark.skipif(
    not NPM or not (FRONT_END / "node_modules").exists(),
    reason="needs npm and tools/front_end/node_modules: `cd tools/front_end && npm install`",
)
def test_scripts_and_styles_of_the_views_are_formatted_and_typed():
    """prettier and the type checker of TypeScript on concept_tda/static, as tools/front_end says."""
    done = subprocess.run([str(NPM), "run", "check"], capture_output=True, text=True, cwd=FRONT_END)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All matched files use Prettier code style!" in done.stdout


def test_the_picture_shows_the_house_that_stands():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "house_figure.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_room_is_in_the_tables_that_list_them():
    """CONTRIBUTING says what each owns; the first page, and so the README, leads to each."""
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    owned = re.findall(r"^\| `([\w.]+)` \|", table, flags=re.MULTILINE)
    assert owned == [name_of(module, PACKAGE) for module in rooms(PACKAGE)]
    page = json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    text = "".join("".join(cell["source"]) for cell in page["cells"])
    links = {f"{notebook_of(path)}.ipynb" for path in rooms_of_the_house()}
    assert links <= set(re.findall(r"\]\(([^)]+)\)", text)), "a room has no link on nbs/index.ipynb"


def test_the_drawn_imports_imply_all_others():
    house, imports = read_house()
    drawn = telling(imports)
    assert below(drawn) == below(imports) and len(drawn) < len(imports)
    assert all(house.index(other) < house.index(room) for room, other in imports)


def private_imports(module: Path) -> list[str]:
    """Private names that a module takes from another one, wherever in it the import stands."""
    found = []
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (
            node.level or (node.module or "").startswith("concept_tda")
        ):
            continue
        names = [
            alias.name for alias in node.names if alias.name.startswith("_") and alias.name != "__version__"
        ]
        found += [f"line {node.lineno}: {name} from {node.module}" for name in names]
    return found


def test_no_private_name_leaves_its_room():
    found = {name_of(module, PACKAGE): private_imports(module) for module in rooms(PACKAGE)}
    held("private names", {room: places for room, places in found.items() if places})


def test_docstrings_are_one_string():
    """A docstring broken into two literals loses its second half without a word."""
    cut = []
    for module in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or len(node.body) < 2:
                continue
            first = [part.value for part in node.body[:2] if isinstance(part, ast.Expr)]
            texts = [part for part in first if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if len(texts) == 2:
                cut.append(f"{module.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not cut, cut


def test_notebooks_keep_no_progress_bars_and_no_state_of_widgets_that_nothing_shows():
    found = {}
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts:
            continue
        notebook = json.loads(path.read_text(encoding="utf-8"))
        if number := widget_state.without_bars(notebook) + len(widget_state.stale(notebook)):
            found[notebook_of(path)] = number
    assert not found, f"run tools/widget_state.py (make export does): {found}"


def test_what_a_shown_widget_is_made_of_is_kept(tmp_path):
    states = {"box": {"state": {"children": ["IPY_MODEL_bar"]}}, "bar": {"state": {}}, "gone": {"state": {}}}
    view = {"data": {widget_state.VIEW: {"model_id": "box"}, "text/plain": "bar"}}
    notebook = {
        "metadata": {"widgets": {widget_state.STATE: {"state": states}}},
        "cells": [{"cell_type": "code", "outputs": [view]}],
    }
    path = tmp_path / "room.ipynb"
    path.write_text(json.dumps(notebook))
    assert widget_state.stale(notebook) == ["gone"] and widget_state.clean(path) == 1
    left = json.loads(path.read_text())
    assert set(widget_state.shown(left)) == {"box", "bar"} and not widget_state.stale(left)
    left["cells"][0]["outputs"][0]["data"]["text/plain"] = "scoring:   0%|          | 0/796 [00:00<?, ?tok/s]"
    path.write_text(json.dumps(left))
    assert widget_state.clean(path) == 3 and "widgets" not in json.loads(path.read_text())["metadata"]
