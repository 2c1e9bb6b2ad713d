"""Writes concept_tda/_public.py, the table of public names, from the `__all__` of each room.

    python tools/public_names.py            # rewrite the table where it is out of date
    python tools/public_names.py --check    # change nothing; exit 1 and say what is missing or stale

Reads the modules as text, so it needs none of their dependencies."""

import ast
import re
import sys
from pathlib import Path

HEAD = '"""Public names by room. Written by tools/public_names.py."""\n\n'
NOT_FLAT = {
    "cli"
}  # its functions are commands of the terminal: reachable as concept_tda.cli, not as concept_tda.show
PACKAGE = Path(__file__).resolve().parent.parent / "concept_tda"


def rooms(package: Path) -> list[Path]:
    """The modules in import order: floors first, then rooms, by the numbers of their notebooks."""

    def numbers(path):
        notebook = re.search(r"File to edit: \S*?nbs/(\S+)\.ipynb", path.read_text(encoding="utf-8"))
        return notebook and [int(part.split("_")[0]) for part in notebook[1].split("/")]

    modules = [path for path in package.rglob("*.py") if not path.name.startswith("_")]
    return sorted(filter(numbers, modules), key=numbers)


def name_of(module: Path, package: Path) -> str:
    """`influence.curvature` for concept_tda/influence/curvature.py"""
    return ".".join(module.relative_to(package).with_suffix("").parts)


def names_of(module: Path) -> list[str]:
    """The module's `__all__`, without running it."""
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            getattr(target, "id", None) == "__all__" for target in node.targets
        ):
            return list(ast.literal_eval(node.value))
    return []


def table(package: Path) -> dict[str, list[str]]:
    """room -> its public names; SystemExit when two rooms, or a room and a name, would hide each other."""
    found, owner = {}, {}
    for module in rooms(package):
        room = name_of(module, package)
        found[room] = [] if room in NOT_FLAT else names_of(module)
        for name in found[room]:
            if name in owner:
                sys.exit(f"{name!r} is public in {owner[name]} and in {room}; rename one of the two")
            owner[name] = room
    floors = {room.split(".")[0] for room in found}
    for clash in owner.keys() & floors:
        sys.exit(f"{clash!r} is a floor and also a public name of {owner[clash]}; rename one of the two")
    return found


def written(found: dict[str, list[str]]) -> str:
    """The table as Python source."""
    lines = ["PUBLIC = {"]
    for room, names in found.items():
        line = f'    "{room}": "'
        for i, name in enumerate(names):
            if len(line) + len(name) > 108:
                lines.append(line.rstrip() + ' "')
                line = '        "'
            line += name + (" " if i + 1 < len(names) else "")
        lines.append(line + '",')
    return "\n".join(lines + ["}"])


def main(check: bool) -> int:
    """Write the table, or with `check` only say that it is stale; 1 if it is."""
    path = PACKAGE / "_public.py"
    new = HEAD + written(table(PACKAGE)) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") == new:
        return 0
    if check:
        print(f"{path} is out of date with the rooms' public names; run `make export`.", file=sys.stderr)
        return 1
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(check="--check" in sys.argv[1:]))
