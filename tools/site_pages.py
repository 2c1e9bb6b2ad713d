"""What our documentation pages do beyond nbdev's defaults (`doc_procs` in pyproject.toml).

Exported cells are replaced by nbdev with an entry per symbol. This processor rewrites these entries: in the
order of the code, classes shown as classes with an entry for each public method, and the source folded below,
because in a literate library the reader wants to see it. Everything is read from the modules, so that no cell
has to run while the site is built (`skip_procs`). tools/with_quarto.sh puts this folder where nbdev finds it.
"""

import configparser
import dataclasses
import functools
import importlib
import inspect
import itertools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from fastcore.docments import MarkdownRenderer
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor

import concept_tda
from concept_tda._lazy import ROOM_OF
from concept_tda._public import PUBLIC

PRIVATE_LINK = re.compile(r"\[(`(?:\w+\.)*_\w*(?:\(\))?`)\]\([^)]*\)")
MODULE_PREFIX = re.compile(
    r"\b(?:torch\.nn\.modules\.\w+|pandas(?:\.\w+)*|pathlib|collections\.abc|transformers(?:\.\w+)*|concept_tda(?:\.\w+)+)\.(?=[A-Z])"
)
CITED_SECTION = re.compile(r"\bFormulas(\s+)§(\d+)((?:,\s*§\d+)*)")
GUESSED_TYPE = re.compile(r":NoneType(?=\s*=\s*None)")  # made of a default where the code names no type
TEMPORARY = re.compile(r"(?:/tmp|/var/folders/\w+/\w+/T)/tmp\w+/?")
NO_TEXT = re.compile(r"[\ufffd\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
SHOW_DOC = re.compile(r"^show_doc\(([\w.]+)", re.MULTILINE)
WIDTH = 88  # characters of a line of code that fit a page beside its two columns on a laptop


def find(name: str, room: str | None):
    """The object behind a (dotted) name: in the page's own room, or anywhere in the library."""
    head, *rest = name.split(".")
    room = room or ROOM_OF.get(head)
    module = importlib.import_module(f"concept_tda.{room}") if room else concept_tda
    thing = getattr(module, head)
    for part in rest:
        thing = inspect.getattr_static(thing, part)
    return thing


def plain(thing):
    """The function under a property, classmethod or staticmethod."""
    if isinstance(thing, property):
        return thing.fget
    return getattr(thing, "__func__", getattr(thing, "func", thing))


def cite(text: str, module: str) -> str:
    """`Formulas §3` in a docstring as a link to that section of the page of formulas."""
    place = "../" * (module.count(".") - 1) + "explained/formulas.html"

    def linked(match: re.Match) -> str:
        more = re.sub(r"§(\d+)", lambda one: f"[§{one[1]}]({place}#s{one[1]})", match[3])
        return f"[Formulas §{match[2]}]({place}#s{match[2]}){more}"

    return CITED_SECTION.sub(linked, text)


def rendering(function, short: str) -> str:
    """The definition in Markdown. A type that the room imports for type checkers only is shown by its bare
    name."""
    while True:
        try:
            if inspect.isclass(function):  # before Python 3.11.4 an inherited __new__ was asked in its place
                own = inspect.signature(function.__init__, eval_str=True)
                function.__signature__ = own.replace(parameters=[*own.parameters.values()][1:])
            return MarkdownRenderer(function, name=short)._repr_markdown_()
        except NameError as err:
            scope = vars(sys.modules[function.__module__])
            if err.name is None or err.name in scope:
                raise
            scope[err.name] = type(err.name, (), {"__module__": "builtins"})


def signature(thing, name: str) -> str:
    """The definition with a comment for each parameter; a class with its bases where it takes nothing of its
    own."""
    short = name.split(".")[-1]
    if inspect.isclass(thing):
        own = own_parts(thing)
        bases = ", ".join(base.__name__ for base in own[-1].__bases__ if base is not object)
        if not any("__init__" in vars(part) for part in own):
            return f"class {short}({bases})" if bases else f"class {short}"
    rendered = rendering(plain(thing), short)
    code = re.search(r"```python\n(.*?)\n```", rendered, re.DOTALL)[1].strip().removesuffix(":")
    code = GUESSED_TYPE.sub("", MODULE_PREFIX.sub("", code))
    if isinstance(thing, classmethod):
        code = "@classmethod\n" + code
    return code.replace("def ", "class ", 1).removesuffix("->None") if inspect.isclass(thing) else code


def source(thing) -> str:
    """The folded source, or nothing where there is none to show."""
    pieces = reversed(own_parts(thing)) if inspect.isclass(thing) else [plain(thing)]
    try:
        code = "\n\n".join(textwrap.dedent(inspect.getsource(piece)).rstrip() for piece in pieces)
    except (OSError, TypeError):
        return ""
    return (
        f'<details class="api-source">\n<summary>Source</summary>\n\n```python\n{code}\n```\n\n</details>\n'
    )


def docstring(thing) -> str:
    """The docstring, sections of the page of formulas as links; not what dataclasses and `typing` write."""
    if type(thing).__module__ == "typing":
        return ""  # an alias has no words of its own
    text = inspect.getdoc(plain(thing)) or ""
    if dataclasses.is_dataclass(thing) and text.startswith(f"{thing.__name__}("):
        return ""  # written by dataclasses
    return cite(text, getattr(plain(thing), "__module__", ""))


def entry(thing, name: str, level: int = 3, with_source: bool = True) -> str:
    """One symbol in Markdown: heading, signature, docstring, folded source."""
    parts = [
        f"{'#' * level} {name}",
        f"```python\n{signature(thing, name)}\n```",
        docstring(thing),
        source(thing) if with_source else "",
    ]
    return "\n\n".join(part for part in parts if part)


def is_property(member) -> bool:
    """Whether a class member is read like a value."""
    return isinstance(member, (property, functools.cached_property))


def own_parts(cls) -> list[type]:
    """The class and the private bases it was put together from; the last of them comes first in code."""
    return [cls, *itertools.takewhile(lambda base: base.__name__.startswith("_"), cls.__mro__[1:])]


def members(cls) -> dict[str, object]:
    """The public methods and properties of a class that say something about themselves, in the order of code;
    those of the private bases it was put together from are its own."""
    return {
        name: member
        for part in reversed(own_parts(cls))
        for name, member in vars(part).items()
        if not name.startswith("_")
        and not inspect.isclass(member)
        and callable(plain(member))
        and (inspect.getdoc(plain(member)) or "")
    }


def class_entry(cls, name: str, elsewhere: set[str]) -> str:
    """A class with its properties as a list and an entry for each method not shown elsewhere on the page."""
    found = {key: member for key, member in members(cls).items() if f"{name}.{key}" not in elsewhere}
    properties = [
        f'* <code id="{name.lower()}.{key.lower()}">{key}</code>: {" ".join(docstring(member).split())}'
        for key, member in found.items()
        if is_property(member)
    ]
    parts = [entry(cls, name), "\n".join(properties)]
    parts += [
        entry(member, f"{name}.{key}", level=4, with_source=False)
        for key, member in found.items()
        if not is_property(member)
    ]
    return "\n\n".join(part for part in parts if part)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring on one line, or all of it where it does not end."""
    text = " ".join(text.split("\n\n")[0].split())
    ends = (match.start() for match in re.finditer(r"\.(?=\s+[A-Z`])", text))
    end = next((at for at in ends if not text[:at].endswith(("et al", "e.g", "i.e", "vs", "Eq"))), None)
    return text[:end].removesuffix(".").replace("|", "\\|")


def place(name: str, thing) -> int:
    """Where a name belongs in a summary: what users open first, then the rest, then checks, errors last."""
    if is_error(thing):
        return 3
    if name.startswith("check_"):
        return 2
    return int(name not in concept_tda.__all__)


def summary(things: dict[str, object]) -> str:
    """What a page has, as a table of names and first sentences: the front door first, errors last."""
    order = sorted(things, key=lambda name: place(name, things[name]))
    rows = [
        f"| [`{name}`](#{name.lower()}) | {first_sentence(docstring(things[name]))} |"
        for name in order
        if "." not in name
    ]
    return "\n".join(["::: {.api-summary}", "", "| name | what it is |", "|---|---|", *rows, "", ":::"])


def is_error(thing) -> bool:
    """Whether it is there to be raised."""
    return inspect.isclass(thing) and issubclass(thing, Exception)


ABOUT_ERRORS = re.compile(r"^#+ .*(?:error|wrong|refus|fail|family)", re.IGNORECASE | re.MULTILINE)


def errors_last(cells: list, things: dict[int, object]) -> None:
    """Move the entries of errors that stand before everything else of a page to its end, under a heading of
    their own; a section that is about errors keeps them. `things` are the objects by the cells of entries."""
    first = next((i for i in sorted(things) if not is_error(things[i])), 0)
    moved, section = [], ""
    for i, cell in enumerate(cells[:first]):
        if cell.cell_type == "markdown" and re.search(r"^##+ ", cell.source, re.MULTILINE):
            section = cell.source
        if i in things and not ABOUT_ERRORS.search(section):
            moved.append(i)
    last = [cells[i] for i in moved]
    for i in reversed(moved):
        del cells[i]
    if last:
        text = "".join(last[0].outputs[0]["data"]["text/markdown"])
        last[0].outputs[0]["data"]["text/markdown"] = f"## Errors\n\n{text}".splitlines(True)
        cells.extend(last)


def readable(text: str) -> str:
    """An output without the folder it was made in, and with a dot for each byte that is no text (a random
    model writes such)."""
    return NO_TEXT.sub("·", TEMPORARY.sub("…/", text))


def make_readable(cell) -> None:
    """The texts among the outputs of a cell."""
    for output in cell.get("outputs", []):
        parts = output.get("data", {})
        for kind, value in parts.items():
            if kind.startswith("text/"):
                parts[kind] = readable("".join(value)).splitlines(True)
        if "text" in output:
            output["text"] = readable("".join(output["text"])).splitlines(True)


def fitted(source: str) -> str:
    """Code with lines longer than a page is wide, broken by ruff. What it cannot read stays as it is, and so
    do comments: the page lets their end hang."""
    lines = source.split("\n")
    if all(len(line) <= WIDTH for line in lines if not line.startswith("#|")):
        return source
    n = sum(1 for _ in itertools.takewhile(lambda line: line.startswith("#|"), lines))
    command = [sys.executable, "-m", "ruff", "format", "--isolated", f"--line-length={WIDTH}", "-"]
    done = subprocess.run(command, input="\n".join(lines[n:]), capture_output=True, text=True)
    return source if done.returncode else "\n".join([*lines[:n], done.stdout.rstrip("\n")])


def settings() -> dict[str, str]:
    """What settings.ini says."""
    parser = configparser.ConfigParser(delimiters=["="], interpolation=None)
    parser.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def colab_line(repository: str, page: str) -> str:
    """A line that opens a notebook in Colab; empty where the repository has no public address yet."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)/?", repository.strip())
    if not match:
        return ""
    place = f"https://colab.research.google.com/github/{match[1]}/blob/main/nbs/{page}"
    return f"[Open in Colab]({place}) (first cell there: `%pip install git+{match[0].rstrip('/')}`)"


class api_entries(Processor):
    """Rewrites the entries in place; hands over their links to nbdev's lookup."""

    def begin(self):
        """Replace nbdev's entries of a page by ours, before any cell of it is processed."""
        cells = self.nb.cells
        room = room_of(Path(self.nb.path_))
        named = {
            i: match[1]
            for i, cell in enumerate(cells)
            if cell.cell_type == "code"
            for match in [SHOW_DOC.search(cell.source)]
            if match
        }
        for i in [
            i for i, name in named.items() if name.startswith("_")
        ]:  # a method patched into a private base class
            cells[i].source, cells[i].outputs = "#| echo: false", []
            del named[i]
        for i, name in in_code_order(named, room).items():
            thing = find(name, room)
            shown = set(named.values())
            text = (
                class_entry(thing, name, shown)
                if inspect.isclass(thing)
                else entry(thing, name, level=4 if "." in name else 3)
            )
            cells[i].source = f"#| echo: false\n#| output: asis\nshow_doc({name})"
            cells[i].outputs = [
                {
                    "output_type": "display_data",
                    "metadata": {},
                    "data": {"text/markdown": unlink_private(NbdevLookup().linkify(text)).splitlines(True)},
                }
            ]
        for cell in cells:
            if cell.cell_type == "markdown":
                cell.source = unlink_private(cell.source)
            elif not re.match(r"#\| *export|show_doc\(|#\| echo: false", cell.source):
                cell.source = fitted(cell.source)
            make_readable(cell)
        page = Path(self.nb.path_)
        line = colab_line(settings().get("repository", ""), f"tutorials/{page.name}")
        if page.parent.name == "tutorials" and line:
            self.first_text().source = f"{line}\n\n{self.first_text().source}"
        if named and room:
            errors_last(cells, {i: find(name, room) for i, name in in_code_order(named, room).items()})
            self.summarise({name: find(name, room) for name in in_code_order(named, room).values()})

    def summarise(self, things: dict[str, object]):
        """Put the table of names into the first text below the title."""
        below = self.first_text()
        below.source = f"{summary(things)}\n\n{below.source}"

    def first_text(self):
        """The first text below the title."""
        texts = [cell for cell in self.nb.cells if cell.cell_type == "markdown"]
        return next(cell for cell in texts if not cell.source.lstrip().startswith(("# ", "---")))


def room_of(page: Path) -> str | None:
    """`influence.curvature` for nbs/50_influence/01_curvature.ipynb; None for a page that is no room."""
    parts = [re.sub(r"^\d+_", "", part) for part in page.with_suffix("").parts]
    return next((room for room in (".".join(parts[-2:]), parts[-1]) if room in PUBLIC), None)


def unlink_private(text: str) -> str:
    """nbdev links every name it knows; private ones have no entry to lead to."""
    return PRIVATE_LINK.sub(r"\1", text)


def in_code_order(named: dict[int, str], room: str | None) -> dict[int, str]:
    """nbdev puts the entries of one exported cell in reverse: neighbours are put back in order."""
    if room is None:
        return named
    order = importlib.import_module(f"concept_tda.{room}").__all__
    ordered, run = {}, []
    for i in [*sorted(named), None]:
        if run and (i is None or i != run[-1] + 1):
            ordered |= dict(
                zip(run, sorted((named[j] for j in run), key=lambda name: order.index(name.split(".")[0])))
            )
            run = []
        run.append(i)
    return ordered
