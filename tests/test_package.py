"""The package as a whole: what importing it costs, and where its public names are."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import concept_tda

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(path for path in (ROOT / "concept_tda").glob("*.py") if not path.name.startswith("_"))
# bought only where they are used: seconds of import, or absent from an ordinary installation
NEVER_ON_IMPORT = {"sae_lens", "transformer_lens", "openai", "wandb", "nbdev", "fastcore", "execnb", "ghapi",
                   "smalldocs", "datasets", "matplotlib.pyplot", "sklearn", "nnsight", "curvlinops", "peft"}


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
    assert "concept_tda.storage" not in modules, "rooms are imported when a name of theirs is used"


def test_using_every_public_name_brings_no_optional_package():
    code = """
import sys, json, concept_tda
for name in concept_tda.__all__: getattr(concept_tda, name)
print(json.dumps(sorted(sys.modules)))
"""
    modules = set(json.loads(run(code).stdout.strip().splitlines()[-1]))
    assert not {"sae_lens", "openai", "wandb", "nbdev", "fastcore"} & modules


def test_the_library_names_no_development_package():
    for module in MODULES + [ROOT / "concept_tda" / "__init__.py"]:
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found = {name.split(".")[0] for name in names} & {"nbdev", "fastcore", "execnb", "ghapi", "pytest", "jupytext"}
            assert not found, f"{module.name}:{node.lineno} imports {', '.join(found)}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_every_public_name_of_a_room_is_in_the_table(module):
    done = subprocess.run([sys.executable, ROOT / "tools" / "public_names.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert module.stem in concept_tda._PUBLIC
    room = getattr(concept_tda, module.stem)
    names = concept_tda._PUBLIC[module.stem].split()
    for name in names: assert getattr(concept_tda, name) is getattr(room, name)
    if module.stem != "cli": assert names == list(room.__all__)


def test_table_has_no_stale_room_and_no_name_twice():
    assert set(concept_tda._PUBLIC) == {module.stem for module in MODULES}
    assert len(concept_tda.__all__) == len(set(concept_tda.__all__))
    assert not set(concept_tda.__all__) & set(concept_tda._PUBLIC), "a name that is also a room would hide it"


def test_a_wrong_name_suggests_the_right_one():
    with pytest.raises(AttributeError, match="did you mean .*cache_folder"): concept_tda.cachefolder
    with pytest.raises(AttributeError, match="no attribute 'qqqq'$"): concept_tda.qqqq
    assert {"storage", "cache_folder", "__version__"} <= set(dir(concept_tda))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_imports_only_point_down(module):
    """At module level a room imports only rooms that come before it (methods may open higher ones late)."""
    order = [*concept_tda._PUBLIC]
    before = set(order[:order.index(module.stem)])
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            if node.level: rooms = {(node.module or "").split(".")[0]} if node.module else {alias.name for alias in node.names}
            elif (node.module or "").startswith("concept_tda."): rooms = {node.module.split(".")[1]}
            else: continue
            assert rooms <= before, f"{module.name}:{node.lineno} imports {', '.join(rooms - before)}, which comes after it"
