"""The package as a whole: what importing it costs, and where its public names are."""

import ast
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import concept_tda
from concept_tda._lazy import FLOORS, ROOM_OF
from concept_tda._public import PUBLIC

from public_names import name_of, rooms

ROOT = Path(__file__).resolve().parent.parent
MODULES = rooms(ROOT / "concept_tda")
# bought only where they are used: seconds of import, or absent from an ordinary installation
NEVER_ON_IMPORT = {
    "sae_lens",
    "transformer_lens",
    "openai",
    "wandb",
    "nbdev",
    "fastcore",
    "execnb",
    "ghapi",
    "smalldocs",
    "datasets",
    "matplotlib.pyplot",
    "sklearn",
    "nnsight",
    "curvlinops",
    "peft",
}


def run(code: str, *options: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done


def test_import_is_cheap_and_brings_no_heavy_package():
    code = """
import sys, time, json, torch
start = time.perf_counter()
import concept_tda
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(sys.modules)]))
"""
    seconds, modules = json.loads(run(code).stdout)
    assert seconds < 3
    assert not NEVER_ON_IMPORT & set(modules)
    assert "concept_tda.foundation" not in modules, "rooms are imported when a name of theirs is used"


def test_using_every_public_name_brings_no_optional_package():
    code = """
import sys, json, concept_tda
from importlib import import_module
from concept_tda._public import PUBLIC
for room in PUBLIC: import_module(f"concept_tda.{room}")
for name in concept_tda.__all__: getattr(concept_tda, name)
print(json.dumps(sorted(sys.modules)))
"""
    modules = set(json.loads(run(code).stdout.strip().splitlines()[-1]))
    assert not {"sae_lens", "openai", "wandb", "nbdev", "fastcore"} & modules


def test_the_library_names_no_development_package():
    for module in MODULES + [ROOT / "concept_tda" / "__init__.py"]:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            found = {name.split(".")[0] for name in names} & {
                "nbdev",
                "fastcore",
                "execnb",
                "ghapi",
                "pytest",
                "jupytext",
            }
            assert not found, f"{module.name}:{node.lineno} imports {', '.join(found)}"


def test_the_table_is_what_the_rooms_say():
    command = [sys.executable, ROOT / "tools" / "public_names.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("room", [name_of(module, ROOT / "concept_tda") for module in MODULES])
def test_every_public_name_of_a_room_is_reachable_by_floor(room):
    assert room in PUBLIC
    module = concept_tda
    for part in room.split("."):
        module = getattr(module, part)
    names = PUBLIC[room].split()
    for name in names:
        assert getattr(module, name) is not None
    if room != "cli":
        assert names == list(module.__all__)


def test_the_front_door_is_small_and_everything_at_it_is_used_on_a_page():
    """About sixty names, in the order of the work; each of them on a page that a user reads."""
    names = concept_tda.__all__
    assert len(names) == len(set(names)) <= 65
    for name in names:
        assert getattr(concept_tda, name) is getattr(import_module(f"concept_tda.{ROOM_OF[name]}"), name)
    pages = [path for path in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    unused = [name for name in names if not re.search(rf"\b{name}\b", text)]
    assert not unused, f"at the front door, and on no page: {unused}"


def test_a_name_behind_the_front_door_is_named_with_its_room():
    with pytest.raises(AttributeError, match=r"it is concept_tda\.influence\.curvature\.Factors$"):
        concept_tda.Factors


def test_table_has_no_stale_room_and_no_name_twice():
    assert set(PUBLIC) == {name_of(module, ROOT / "concept_tda") for module in MODULES}
    assert not set(concept_tda.__all__) & FLOORS, "a name that is also a floor would hide it"


def test_a_wrong_name_suggests_the_right_one():
    with pytest.raises(AttributeError, match="did you mean .*load_model"):
        concept_tda.loadmodel
    with pytest.raises(AttributeError, match="no attribute 'qqqq'$"):
        concept_tda.qqqq
    assert {"foundation", "load_model", "__version__"} <= set(dir(concept_tda))


def imported_rooms(node, module: Path) -> list[str]:
    """The rooms an import statement names, as `floor.room`."""
    package = ROOT / "concept_tda"
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level:
        base = list(module.relative_to(ROOT).parts[: -node.level])
        names = [".".join(base + (node.module or "").split("."))]
    else:
        names = [node.module]
    names = [name for name in names if name.startswith("concept_tda.")]
    return [".".join(name.split(".")[1:3]) for name in names if (package / name.split(".")[1]).exists()]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: name_of(path, ROOT / "concept_tda"))
def test_imports_only_point_down(module):
    """At module level a room imports only rooms below it: floors first, then rooms of its own floor."""
    order = [*PUBLIC]
    own = name_of(module, ROOT / "concept_tda")
    before = set(order[: order.index(own)])
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for room in imported_rooms(node, module):
            assert room in before, f"{own}:{node.lineno} imports {room}, which is not below it"
