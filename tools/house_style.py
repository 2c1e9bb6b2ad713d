"""How the rooms read: lengths of lines and cells, statements on a line, prose beside code.

    python tools/house_style.py                        # a row for each room, and the whole house
    python tools/house_style.py nbs/10_data/*.ipynb    # these rooms, with every place that breaks a rule

The rules (`LIMITS`, and an example for every public name) are held by tests/test_house.py."""

import ast
import json
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

from public_names import NOT_FLAT, PACKAGE, names_of

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"line": 110, "median": 12, "p90": 28, "longest": 60, "words_per_line": 3.5}
GUARDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


@dataclass
class Room:
    """What was measured in one notebook."""

    path: Path
    cells: list[int] = field(default_factory=list)  # lines of each exported cell, imports left out
    words: int = 0  # of prose
    places: list[str] = field(default_factory=list)  # what breaks a rule, and where
    unshown: list[str] = field(default_factory=list)  # public names without an example

    @property
    def lines(self) -> int:
        """Exported lines."""
        return sum(self.cells)


def crowded(tree: ast.AST) -> list[int]:
    """Lines that hold more than one statement; `if …: return` (or raise, continue, break) may share one."""
    found = []
    for node in ast.walk(tree):
        blocks = [getattr(node, name, None) for name in ("body", "orelse", "finalbody")]
        for block in blocks:
            if not isinstance(block, list) or not block or not isinstance(block[0], ast.stmt):
                continue
            found += [b.lineno for a, b in zip(block, block[1:]) if b.lineno <= (a.end_lineno or a.lineno)]
            if isinstance(node, ast.Module) or block is not getattr(node, "body", None):
                continue
            guard = isinstance(node, ast.If) and not node.orelse and isinstance(block[0], GUARDS)
            if block[0].lineno == header_end(node) and not guard:
                found.append(block[0].lineno)
    return sorted(set(found))


def header_end(node: ast.AST) -> int:
    """The line on which the header of a compound statement ends, its colon's."""
    parts = [
        child
        for name, child in ast.iter_fields(node)
        if name not in ("body", "orelse", "finalbody", "handlers")
    ]
    nodes = [
        n for part in parts for n in (part if isinstance(part, list) else [part]) if isinstance(n, ast.AST)
    ]
    ends = [n.end_lineno for top in nodes for n in ast.walk(top) if getattr(n, "end_lineno", None)]
    return max([getattr(node, "lineno", 0), *ends])


def measure(path: Path) -> Room:
    """One notebook: exported cells, prose, what breaks a rule of a line, and names without an example."""
    room = Room(path, unshown=unshown(path, public(path)))
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            room.words += len(re.findall(r"\w+", source))
            continue
        code = re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE)
        where = f"{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path} cell {cell['id']}"
        for number, line in enumerate(source.split("\n"), 1):
            if len(line) > LIMITS["line"] and not line.startswith("#| fig-alt:"):  # a directive is one line
                room.places.append(f"{where} line {number}: {len(line)} characters")
        if not re.match(r"#\| ?exporti?\b", source) or not code.strip():
            continue
        tree = ast.parse(code)
        for number in crowded(tree):
            room.places.append(f"{where} line {number}: two statements")
        if all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body):
            continue
        length = len(code.strip().split("\n"))
        room.cells.append(length)
        if length > LIMITS["longest"]:
            room.places.append(f"{where}: {length} lines")
    return room


def public(path: Path) -> list[str]:
    """The public names of the room that a notebook exports, as its module says them; of the command line
    none, whose examples are lines of a terminal."""
    found = re.search(r"#\| ?default_exp ([\w.]+)", path.read_text(encoding="utf-8"))
    if not found or found[1] in NOT_FLAT:
        return []
    return names_of(PACKAGE / f"{found[1].replace('.', '/')}.py")


def shown(cells: list[dict]) -> set[str]:
    """Names that some example uses: code that is not exported, and has visible output or a check."""
    names = set()
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or re.search(r"^#\| ?exporti?\b", source, flags=re.MULTILINE):
            continue
        tree = ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))
        checked = any(isinstance(node, ast.Assert) for node in ast.walk(tree))
        if not checked and not cell.get("outputs"):
            continue
        loaded = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
        names |= {node.id for node in loaded if isinstance(node.ctx, ast.Load)}
    return names


def unshown(path: Path, names: list[str]) -> list[str]:
    """Those of the names that no example in the notebook uses."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    used = shown(cells)
    return [name for name in names if name not in used]


def figures(rooms: list[Room]) -> dict[str, float]:
    """Median, 90th percentile and maximum of the exported cells; words of prose for each exported line."""
    cells = sorted(length for room in rooms for length in room.cells) or [0]
    lines = sum(room.lines for room in rooms) or 1
    return {
        "cells": len(cells),
        "median": statistics.median(cells),
        "p90": cells[int(0.9 * (len(cells) - 1))],
        "longest": cells[-1],
        "words_per_line": sum(room.words for room in rooms) / lines,
        "broken": sum(len(room.places) for room in rooms),
        "unshown": sum(len(room.unshown) for room in rooms),
    }


def rooms_of_the_house() -> list[Path]:
    """The notebooks that export."""
    return [
        path
        for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if ".ipynb_checkpoints" not in path.parts and "default_exp" in path.read_text(encoding="utf-8")
    ]


def main(names: list[str]) -> None:
    """Print the table."""
    paths = [Path(name).resolve() for name in names] or rooms_of_the_house()
    rooms = [measure(path) for path in paths]
    print(
        f"{'room':36} {'cells':>5} {'median':>6} {'p90':>4} {'longest':>7} {'words/line':>10} {'broken':>6} "
        f"{'unshown':>7}"
    )
    for label, group in [(str(room.path.relative_to(ROOT / "nbs")), [room]) for room in rooms] + [
        ("all", rooms)
    ]:
        f = figures(group)
        print(
            f"{label:36} {f['cells']:5} {f['median']:6.0f} {f['p90']:4} {f['longest']:7} "
            f"{f['words_per_line']:10.1f} {f['broken']:6} {f['unshown']:7}"
        )
    if names:
        for room in rooms:
            print(*room.places, *(f"{name}: no example" for name in room.unshown), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
