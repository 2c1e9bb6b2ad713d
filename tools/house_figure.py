"""Draws the house: floors and rooms of the package, and which room imports which, read from the modules.

    python tools/house_figure.py            # nbs/images/the_house.png, where it is out of date
    python tools/house_figure.py --check    # change nothing; exit 1 where the picture is out of date

Only imports that run when a module is opened are drawn, and of these only the ones that no chain of others
implies: a room that imports `curvature` needs no second line to the `gradients` below it."""

import ast
import hashlib
import json
import struct
import sys
from pathlib import Path

from public_names import name_of, rooms

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "concept_tda"
PICTURE = ROOT / "nbs" / "images" / "the_house.png"
PER_ROW = 4  # rooms beside each other
# of Okabe and Ito, as in concept_tda/static/figures.mplstyle; floors that touch differ
COLOURS = {
    "foundation": "#000000",
    "data": "#E69F00",
    "model": "#0072B2",
    "results": "#009E73",
    "concepts": "#CC79A7",
    "influence": "#D55E00",
    "groups": "#009E73",
    "evidence": "#56B4E9",
    "views": "#0072B2",
    "commands": "#E69F00",
    "roof": "#000000",
}


def floor_of(room: str) -> str:
    """`influence` for influence.curvature; the rooms without a floor stand on the roof."""
    return room.split(".")[0] if "." in room else "roof"


def colour(floor: str) -> str:
    """Of the floor's name, band and lines; grey for one that has none yet."""
    return COLOURS.get(floor, "#666666")


def floors_of(house: list[str]) -> list[str]:
    """The floors from the ground up."""
    return list(dict.fromkeys(floor_of(room) for room in house))


def named_modules(node: ast.AST, module: Path) -> list[str]:
    """Dotted names, below the package, of what an import statement may mean."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = list(module.relative_to(ROOT).parts[: -node.level]) if node.level else []
        base = ".".join(above + [node.module] if node.module else above)
        names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
    else:
        names = []
    return [name.removeprefix("concept_tda.") for name in names if name.startswith("concept_tda.")]


def read_house() -> tuple[list[str], set[tuple[str, str]]]:
    """All rooms from the ground up, and pairs of a room and one it imports when it is opened."""
    modules = {name_of(module, PACKAGE): module for module in rooms(PACKAGE)}
    imports = set()
    for room, module in modules.items():
        for node in ast.parse(module.read_text(encoding="utf-8")).body:
            imports |= {(room, name) for name in named_modules(node, module) if name in modules}
    return list(modules), {(room, other) for room, other in imports if room != other}


def below(imports: set[tuple[str, str]]) -> dict[str, set[str]]:
    """room -> every room it needs, however indirectly."""
    direct: dict[str, set[str]] = {}
    for room, other in imports:
        direct.setdefault(room, set()).add(other)
    reached: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in reached:
            found = direct.get(room, set())
            reached[room] = found.union(*(reach(other) for other in found))
        return reached[room]

    for room in direct:
        reach(room)
    return reached


def telling(imports: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The imports that no chain of others implies."""
    reached = below(imports)
    return {
        (room, other)
        for room, other in imports
        if not any(other in reached.get(step, set()) for start, step in imports if start == room)
    }


def places(house: list[str]) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Centre (x, y) of each room and the (lowest, highest) y of each floor. Rooms stand in rows, the first
    ones at the bottom, so that imports within a floor point down too."""
    where, heights, y = {}, {}, 0.0
    for floor in floors_of(house):
        own = [room for room in house if floor_of(room) == floor]
        start = y
        for first in range(0, len(own), PER_ROW):
            row = own[first : first + PER_ROW]
            for place, room in enumerate(row):
                where[room] = (place - (len(row) - 1) / 2, y)
            y += 1
        heights[floor] = (start, y - 1)
        y += 0.45
    return where, heights


def curve(start: tuple[float, float], end: tuple[float, float]):
    """From the bottom of one room to the top of a lower one; between neighbours in a row straight across, and
    to one further along in it below those that stand between."""
    from matplotlib.path import Path as Curve

    (x0, y0), (x1, y1) = start, end
    if y0 == y1 and abs(x0 - x1) < 1.5:
        side = 0.46 if x1 < x0 else -0.46
        return Curve([(x0 - side, y0), (x1 + side, y1)])
    y0, y1 = y0 - 0.25, y1 + 0.25 if y1 < y0 else y1 - 0.25
    bend = max(0.35, 0.4 * (y0 - y1)) if y1 < y0 else 0.22
    points = [(x0, y0), (x0, y0 - bend), (x1, y1 + bend if y1 < y0 else y1 - bend), (x1, y1)]
    return Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])


def draw_floors(ax, heights: dict[str, tuple[float, float]]) -> None:
    """A pale band for each floor, with its name."""
    from matplotlib.patches import FancyBboxPatch

    for floor, (low, high) in heights.items():
        corner, size = (-2.52, low - 0.44), (4.64, high - low + 0.88)
        style = dict(
            boxstyle="round,pad=0,rounding_size=.08", facecolor=colour(floor), alpha=0.08, linewidth=0
        )
        ax.add_patch(FancyBboxPatch(corner, *size, **style))
        name = dict(rotation=90, ha="center", va="center", color=colour(floor), fontweight="bold")
        ax.text(-2.33, (low + high) / 2, floor, fontsize=10 if high > low else 7, **name)


def draw_room(ax, room: str, place: tuple[float, float], shown: bool, highlighted: bool) -> None:
    """A box with the room's name."""
    from matplotlib.patches import FancyBboxPatch

    style = dict(boxstyle="round,pad=0,rounding_size=.1", facecolor="white", edgecolor=colour(floor_of(room)))
    box = FancyBboxPatch((place[0] - 0.46, place[1] - 0.25), 0.92, 0.5, **style, zorder=3)
    box.set(linewidth=2.2 if highlighted else 0.9, alpha=1 if shown else 0.35)
    ax.add_patch(box)
    text = dict(
        ha="center",
        va="center_baseline",
        fontsize=7.6 if "\n" in label(room) else 9,
        linespacing=0.95,
        zorder=4,
    )
    ax.text(*place, label(room), color="black" if shown else "0.6", **text)


def draw(highlight: str | None = None):
    """The figure. `highlight` names a room: what it needs stands out, everything else recedes."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import PathPatch

    house, imports = read_house()
    where, heights = places(house)
    needed = below(imports).get(highlight, set()) | {highlight} if highlight else set(house)
    top = max(high for _, high in heights.values())
    fig, ax = plt.subplots(figsize=(6.4, 0.52 * top + 0.6))
    draw_floors(ax, heights)
    for room, other in sorted(telling(imports)):
        shown = room in needed and other in needed
        line = dict(facecolor="none", edgecolor=colour(floor_of(room)), linewidth=0.9 if shown else 0.4)
        alpha = (0.8 if highlight else 0.55) if shown else 0.08
        ax.add_patch(PathPatch(curve(where[room], where[other]), **line, alpha=alpha, zorder=2))
    for room, place in where.items():
        draw_room(ax, room, place, room in needed, room == highlight)
    ax.set(xlim=(-2.56, 2.16), ylim=(-0.5, top + 0.5))
    ax.axis("off")
    return fig


def label(room: str) -> str:
    """The room's own name, a long one on two lines."""
    words = room.split(".")[-1].split("_")
    half = (len(words) + 1) // 2 if sum(map(len, words)) > 14 and len(words) > 1 else len(words)
    return "\n".join(" ".join(part) for part in (words[:half], words[half:]) if part)


def drawn_from() -> str:
    """Fingerprint of everything the picture shows, and of this file."""
    house, imports = read_house()
    content = json.dumps([house, sorted(imports)]) + Path(__file__).read_text(encoding="utf-8")
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def description(path: Path) -> str | None:
    """The Description that was written into a PNG file."""
    data, at = path.read_bytes(), 8
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + size]
        if kind == b"tEXt" and body.startswith(b"Description\0"):
            return body.partition(b"\0")[2].decode("latin-1")
        at += 12 + size
    return None


def main(check: bool) -> int:
    """Draw the picture anew, or with `check` only say that it is stale; 1 if it is."""
    wanted = drawn_from()
    if PICTURE.exists() and description(PICTURE) == wanted:
        return 0
    if check:
        print(f"{PICTURE} shows another house than there is; run `make export`.", file=sys.stderr)
        return 1
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.style.use(ROOT / "concept_tda" / "static" / "figures.mplstyle")
    draw().savefig(PICTURE, dpi=130, metadata={"Description": wanted, "Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
