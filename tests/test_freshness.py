"""What is generated is what its source gives: modules, notebook metadata, README, package metadata.

The checks run in a temporary copy of the files git knows, so that they can never change the working tree."""

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import concept_tda

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def settings() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The tracked files as they stand in the working tree."""
    folder = tmp_path_factory.mktemp("copy") / "concept_tda"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of the files that belong to it")
    for name in filter(None, listed.stdout.split("\0")):
        if not (ROOT / name).is_symlink() and not (ROOT / name).exists():
            continue  # deleted, not yet committed
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def nbdev(command: str, folder: Path) -> None:
    """One of nbdev's commands, in `folder`, with its package and the stand-in for quarto first."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "tools", folder / "tests"))),
        "PATH": os.pathsep.join(
            [str(folder / "tools" / "stand_in"), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
    }
    environment.pop("IN_TEST", None)  # nbdev skips its index while a notebook is tested
    done = subprocess.run(
        [Path(sys.executable).parent / command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"


def differences(folder: Path, pattern: str) -> list[str]:
    """Files under `folder` that match and differ from the working tree's, or are missing there."""
    paths = {path.relative_to(folder) for path in folder.glob(pattern)}
    return sorted(
        str(path)
        for path in paths
        if not (ROOT / path).exists() or (ROOT / path).read_bytes() != (folder / path).read_bytes()
    )


def test_modules_are_what_the_notebooks_export(copy):
    by_hand = {"__init__.py", "_lazy.py", "_public.py"}
    by_hand_at_the_top = {copy / "concept_tda" / name for name in ("storage.py", "_registry.py")}
    before = set((copy / "concept_tda").rglob("*.py"))
    notebooks = [
        path for path in (copy / "nbs").rglob("*.ipynb") if "default_exp" in path.read_text(encoding="utf-8")
    ]
    for module in before:
        if module.name not in by_hand and module not in by_hand_at_the_top:
            module.unlink()
    nbdev("nbdev-export", copy)
    after = set((copy / "concept_tda").rglob("*.py"))
    written = [path for path in after - by_hand_at_the_top if path.name not in by_hand | {"_modidx.py"}]
    assert len(written) == len(notebooks)
    assert before == after, "a module without a notebook, or the reverse; run `make export`"
    # __init__.py too: nbdev writes a version and a docstring into one that has none, and must leave ours
    # alone
    assert not differences(copy, "concept_tda/**/*.py"), "edited by hand, or not exported; run `make export`"


def test_notebooks_are_clean(copy):
    nbdev("nbdev-clean", copy)
    assert not differences(copy, "nbs/**/*.ipynb"), "run `make export`"


def test_readme_is_what_index_gives(copy):
    (copy / "README.md").write_text("stale")
    nbdev("nbdev-readme", copy)
    assert not differences(copy, "README.md"), "run `make readme`"
    assert "stale" not in (copy / "README.md").read_text(encoding="utf-8")


def test_site_files_are_what_pyproject_gives(copy):
    """nbdev rewrites nbs/nbdev.yml, and nbs/_quarto.yml when that is absent: ours is a link to the one at the
    top."""
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink()
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    code = "from nbdev.quarto import refresh_quarto_yml as refresh; refresh()"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    assert not differences(copy, "nbs/*.yml")


def test_settings_and_pyproject_say_the_same():
    ini, project, tool = settings(), PYPROJECT["project"], PYPROJECT["tool"]["nbdev"]
    assert project["name"] == ini["lib_name"]
    assert project["description"] == ini["description"]
    assert project["requires-python"] == f">={ini['min_python']}"
    assert project["license"] == ini["license"]
    assert [author["name"] for author in project["authors"]] == [ini["author"]]
    assert project["keywords"] == ini["keywords"].split()
    assert {key: tool[key] for key in ("lib_path", "nbs_path", "doc_path")} == {
        key: ini[key] for key in ("lib_path", "nbs_path", "doc_path")
    }
    assert concept_tda.__version__ == ini["version"]


def test_setup_reads_settings(tmp_path):
    """What a built package says of itself: every requirement, every extra, and `all` as the users' extras
    together."""
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "concept_tda").mkdir()
    (tmp_path / "concept_tda" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    metadata = (
        (tmp_path / "concept_tda.egg-info" / "PKG-INFO")
        .read_text(encoding="utf-8")
        .split("\n\n")[0]
        .split("\n")
    )
    ini = settings()
    assert f"Version: {ini['version']}" in metadata and "License-Expression: Apache-2.0" in metadata
    for requirement in filter(None, ini["requirements"].split("\n")):
        name = requirement.split(">")[0]
        assert any(line.startswith(f"Requires-Dist: {name}>") and "extra" not in line for line in metadata), (
            requirement
        )
    assert {
        line.removeprefix("Provides-Extra: ") for line in metadata if line.startswith("Provides-Extra")
    } == {"sae", "judge", "ray", "quantised", "docs", "bench", "dev", "all"}
    everything = [line for line in metadata if 'extra == "all"' in line]
    assert any("sae-lens" in line for line in everything) and any("openai" in line for line in everything)


def test_constraints_name_every_requirement():
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "tools" / "constraints.txt").read_text().split("\n")
        if "==" in line
    }
    ini = settings()
    for key in ini:
        if key != "requirements" and not key.endswith("_requirements"):
            continue
        for line in filter(None, ini[key].split("\n")):
            name = line.replace(">", "=").split("=")[0].strip().lower()
            assert name in pinned, (
                f"{name} ({key}) has no version in tools/constraints.txt; run tools/make_constraints.py"
            )
