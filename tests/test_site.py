"""The documentation site: every notebook has its place, every public name its entry, every internal link its
target."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import check_pages
import finish_site
import pytest
import site_pages
import yaml

from concept_tda._public import PUBLIC

import check_links
from chromium import Chromium, needs_browser

ROOT = Path(__file__).resolve().parent.parent


def places(contents) -> set[str]:
    """The notebooks a sidebar's `contents` names, globs read."""
    if isinstance(contents, str):
        return (
            {str(path.relative_to(ROOT / "nbs")) for path in (ROOT / "nbs").glob(contents)}
            if "*" in contents
            else {contents}
        )
    if isinstance(contents, dict):
        return places(contents.get("contents", [])) | ({contents["href"]} if "href" in contents else set())
    return set().union(*map(places, contents))


def pages() -> set[str]:
    """Every page there is, relative to nbs/."""
    return {
        str(path.relative_to(ROOT / "nbs"))
        for path in (ROOT / "nbs").rglob("*")
        if path.suffix in (".ipynb", ".md") and ".ipynb_checkpoints" not in path.parts
    }


def sidebar() -> list:
    return yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"][
        "contents"
    ]


def test_every_page_is_in_the_sidebar():
    assert places(sidebar()) == pages()


def test_every_page_is_rendered():
    patterns = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["project"]["render"]
    assert {
        str(path.relative_to(ROOT / "nbs"))
        for pattern in patterns
        for path in (ROOT / "nbs").glob(pattern.lstrip("/"))
    } == pages()


def test_the_sidebar_has_its_sections():
    names = [
        entry if isinstance(entry, str) else entry.get("section") or entry["href"] for entry in sidebar()
    ]
    assert names == ["Start here", "Tutorials", "Explained", "How to", "API", "changelog.md"]


def test_the_changelog_on_the_site_is_the_changelog():
    assert (ROOT / "nbs" / "changelog.md").resolve() == ROOT / "CHANGELOG.md"


PROSE_PAGES = sorted(
    path
    for folder in ("explained", "how-to", ".")
    for path in (ROOT / "nbs" / folder).glob("*.ipynb")
    if folder != "." or path.stem == "limits"
)


def test_no_introduction_stands_in_the_cell_of_the_title():
    """nbdev makes title and description of a page from that cell and drops whatever else is in it."""
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        if ".ipynb_checkpoints" in path.parts:
            continue
        first = next(
            (cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown"), None
        )
        lost = [
            line
            for line in "".join(first["source"]).splitlines()
            if line.strip() and not line.startswith(("# ", ">"))
        ]
        assert not lost, f"{path}: move to a cell of its own: {lost[0][:60]}"


@pytest.mark.parametrize("page", PROSE_PAGES, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_page_shows_results_and_describes_its_pictures(page):
    cells = json.loads(page.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert outputs and not any(
        output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs
    )
    for cell in cells:
        source = "".join(cell["source"])
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert "#| fig-alt:" in source, source
        assert "default_exp" not in source and "#| export" not in source
    if page.parent.name == "explained":
        assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_of_documents(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in link:
            assert ((ROOT / document).parent / link).exists(), f"{document}: {link} is not there"


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in PUBLIC:
        assert f"`{room}`" in text, f"CONTRIBUTING.md does not name {room}"


def texts() -> dict[str, str]:
    """Every text of the repository that a reader sees: sources of cells, scripts, documents."""
    found = {}
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if not path.is_file() or path.is_symlink():
            continue
        if path.suffix == ".ipynb":
            cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
            found[name] = "\n".join("".join(cell["source"]) for cell in cells)
        elif path.suffix in (".py", ".md", ".yml", ".yaml", ".sh", ".toml", ".ini"):
            found[name] = path.read_text(encoding="utf-8")
    return found


def test_only_documents_that_are_here_are_cited():
    elsewhere = re.compile(r"\b(?:METHODS|ARCHITECTURE|STACK|STYLE)(?:\.md\b|,?\s+§)")
    cited = {name: match[0] for name, text in texts().items() for match in [elsewhere.search(text)] if match}
    assert not cited, (
        f"these cite what no reader has; say Formulas §n (nbs/explained/formulas.ipynb): {cited}"
    )


def test_every_section_that_is_cited_is_there():
    page = json.loads((ROOT / "nbs" / "explained" / "formulas.ipynb").read_text(encoding="utf-8"))
    sections = set(
        re.findall(r"^## (\d+)\. .*\{#s\1\}$", "\n".join("".join(c["source"]) for c in page["cells"]), re.M)
    )
    assert sections == {str(n) for n in range(14)}, "a section of the page of formulas keeps its number"
    n_cited = 0
    for name, text in texts().items():
        for cited in site_pages.CITED_SECTION.finditer(text):
            numbers = {cited[2], *re.findall(r"§(\d+)", cited[3])}
            assert numbers <= sections, f"{name}: {cited[0]} is not on the page of formulas"
            n_cited += 1
        for anchor in re.findall(r"formulas\.(?:ipynb|html)#s(\d+)", text):
            assert anchor in sections, f"{name}: there is no section {anchor} on the page of formulas"
    assert n_cited > 50


def test_sections_in_docstrings_become_links():
    assert site_pages.cite("as in Formulas §3, §9", "concept_tda.influence.curvature") == (
        "as in [Formulas §3](../explained/formulas.html#s3), [§9](../explained/formulas.html#s9)"
    )
    assert site_pages.cite("Formulas\n§12.", "concept_tda.cli") == (
        "[Formulas §12](explained/formulas.html#s12)."
    )


def notebooks() -> dict[str, list[dict]]:
    """The cells of every notebook, by its place in nbs/."""
    return {
        str(path.relative_to(ROOT / "nbs")): json.loads(path.read_text(encoding="utf-8"))["cells"]
        for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
        if ".ipynb_checkpoints" not in path.parts
    }


def test_every_picture_is_described():
    for name, cells in notebooks().items():
        for cell in cells:
            if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
                source = "".join(cell["source"])
                described = re.search(r'^#\| fig-alt: "?[^"]{30,}"?$', source, re.M)
                assert described, f"{name}: say what the picture shows, #| fig-alt: ...\n{source[:200]}"


class Tables(HTMLParser):
    """The tables of an output: for each the most values in a row, and the words in its cells."""

    def __init__(self, page: str):
        super().__init__()
        self.widths, self.cells, self.open = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        """Count the values of a row; its name at the left is none."""
        if tag == "table":
            self.widths.append(0)
        elif tag == "tr":
            self.in_row = 0
        elif tag in ("td", "th") and self.widths:
            self.open = tag == "td"
            self.in_row += self.open * int(dict(attributes).get("colspan") or 1)
            self.widths[-1] = max(self.widths[-1], self.in_row)
            if self.open:
                self.cells.append("")

    def handle_endtag(self, tag):
        """Nothing more belongs to a cell that is closed."""
        self.open = self.open and tag not in ("td", "tr")

    def handle_data(self, data):
        """Collect what stands in a cell."""
        if self.open:
            self.cells[-1] += data


def is_rounded(cell: str) -> bool:
    """Whether a cell that holds a number shows no more of it than a reader can use: four decimals, or four
    digits after the zeros of a small one."""
    number = re.fullmatch(r"[+\-−]?(\d+)\.(\d+)(?:e[+-]?\d+)?", cell.strip())
    return not number or len(number[2]) <= 4 or len((number[1] + number[2]).lstrip("0")) <= 4


def test_tables_that_are_too_wide_and_numbers_that_are_too_long_are_found():
    row = "<tr><th>name</th>" + "<td>1</td>" * 6
    assert Tables(f"<table>{row}</tr></table>").widths == [6]
    assert Tables(f"<table>{row}<td colspan=2>x</td></tr></table><table>{row}</table>").widths == [8, 6]
    assert Tables("<table><tr><td>0.12<b>34</b></td> <td>x</td></tr></table>").cells == ["0.1234", "x"]
    for cell in ("0.1234", "12.5", "-0.000014", "0.00012", "1.5e-07", "17", "words", "0.5 ± 0.12345"):
        assert is_rounded(cell), cell
    for cell in ("0.123456", "-12.34567", "100.000000", "6.287185e-11", "−0.0123456"):
        assert not is_rounded(cell), cell


def test_tables_have_six_columns_at_most_and_rounded_numbers():
    wrong = []
    for name, cells in notebooks().items():
        for cell in cells:
            for output in cell.get("outputs", []):
                tables = Tables("".join(output.get("data", {}).get("text/html", "")))
                place = f"{name}: cell {cell['id']}"
                wrong += [f"{place}: {width} columns" for width in tables.widths if width > 6]
                wrong += [f"{place}: {one.strip()}" for one in tables.cells if not is_rounded(one)][:1]
    assert not wrong, "choose columns, turn the table, or round its numbers:\n" + "\n".join(wrong)


def test_guides_run_without_the_repository():
    """Somebody who installed the package has neither tests/ nor the files beside the pages. (The page about
    the house is about the repository itself.)"""
    outside = re.compile(r"sys\.path|^\s*(?:from|import) (?:tiny|chat_tokenizers|planted)\b|mplstyle", re.M)
    for name, cells in notebooks().items():
        if name.split("/")[0] in ("how-to", "tutorials", "explained") and name != "explained/the_house.ipynb":
            for cell in cells:
                found = cell["cell_type"] == "code" and outside.search("".join(cell["source"]))
                assert not found, f"{name}: {found[0]!r} is only there in the repository"


def test_tutorials_open_in_colab_once_the_repository_has_an_address():
    line = site_pages.colab_line("https://github.com/somebody/concept_tda/", "tutorials/quickstart.ipynb")
    assert (
        "colab.research.google.com/github/somebody/concept_tda/blob/main/nbs/tutorials/quickstart.ipynb"
        in line
    )
    assert site_pages.colab_line("", "tutorials/quickstart.ipynb") == ""
    assert "repository" in site_pages.settings()


def test_tutorials_say_how_long_they_run():
    for name, cells in notebooks().items():
        if name.startswith("tutorials/"):
            text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
            assert re.search(r"Runtime|minutes|seconds", text), f"{name}: say how long it runs, and on what"


def a_notebook(path: Path, *pages: str) -> Path:
    """An executed notebook that shows these pages in frames, as `OfflinePage` does."""
    from concept_tda.views.browser import OfflinePage

    shown = [OfflinePage(page, 500, "words")._repr_html_() for page in pages]
    cells = [{"outputs": [{"data": {"text/html": one.splitlines(True)}}]} for one in shown]
    path.write_text(json.dumps({"cells": [{"source": "no outputs"}, *cells]}), encoding="utf-8")
    return path


def test_the_picture_of_the_browser_becomes_the_browser(tmp_path):
    site, page = tmp_path / "site", '<!doctype html>\n<p title="a &amp; b">The result & more</p>'
    (site / "tutorials").mkdir(parents=True)
    (site / "index.html").write_text(
        '<p><img src="images/example_browser.png" alt="x"></p> <img src="y.png">'
    )
    (site / "tutorials" / "quickstart.html").write_text('<img alt="x" src="../images/example_browser.png"/>')
    (site / "other.html").write_text("<p>example_browser.png</p>")
    opened = finish_site.place_browser(site, a_notebook(tmp_path / "run.ipynb", page))
    assert [file.name for file in opened] == ["index.html", "quickstart.html"]
    assert (site / "example_browser.html").read_text(encoding="utf-8") == page
    first, second = (file.read_text(encoding="utf-8") for file in opened)
    assert 'src="example_browser.html"' in first and "height:500px" in first and '<img src="y.png">' in first
    assert "<img" not in second and 'src="../example_browser.html"' in second
    assert (site / "other.html").read_text() == "<p>example_browser.png</p>"


@pytest.mark.parametrize("pages", [(), ("one", "two")])
def test_without_one_browser_in_the_quickstart_the_site_is_not_finished(tmp_path, pages):
    with pytest.raises(SystemExit, match=f"shows {len(pages)} example browsers"):
        finish_site.place_browser(tmp_path, a_notebook(tmp_path / "run.ipynb", *pages))


def test_outputs_are_made_readable():
    cell = {
        "outputs": [
            {"text": ["in /tmp/tmpab_12x/exact\n"]},
            {"data": {"text/plain": ["a\ufffd\x0f b"], "image/png": "/tmp/tmp1"}},
        ]
    }
    site_pages.make_readable(cell)
    assert cell["outputs"][0]["text"] == ["in …/exact\n"]
    assert cell["outputs"][1]["data"] == {"text/plain": ["a·· b"], "image/png": "/tmp/tmp1"}


def test_signatures_name_no_type_that_the_code_does_not_name():
    def function(questions=None, number: int = 1): ...

    shown = site_pages.signature(function, "function")
    assert "questions=None" in shown and "NoneType" not in shown and "number:int=1" in shown


def test_summary_has_every_name_once_and_errors_last():
    class Wrong(Exception):
        "Something et al. is wrong; says why."

    def right():
        """Do a thing (Kowal et al. 2026) | well. Then more."""

    table = site_pages.summary({"Wrong": Wrong, "right": right}).splitlines()
    assert table[4:6] == [
        r"| [`right`](#right) | Do a thing (Kowal et al. 2026) \| well |",
        "| [`Wrong`](#wrong) | Something et al. is wrong; says why |",
    ]


def test_errors_that_come_before_everything_else_stand_at_the_end_of_the_page():
    class Wrong(Exception): ...

    class WrongToo(Wrong): ...

    def cell(kind, source):
        outputs = [{"data": {"text/markdown": [f"### {source}"]}}] if kind == "code" else []
        return SimpleNamespace(cell_type=kind, source=source, outputs=outputs)

    def page(*words):
        cells = [cell("markdown" if " " in word else "code", word) for word in words]
        errors = {"Wrong": Wrong, "WrongToo": WrongToo}
        things = {i: errors.get(word, len) for i, word in enumerate(words) if " " not in word}
        site_pages.errors_last(cells, things)
        return cells

    def order(*words):
        return [one.source for one in page(*words)]

    cells = page("some words", "Wrong", "## The first part", "WrongToo", "right", "## Another part", "better")
    names = ["some words", "## The first part", "right", "## Another part", "better", "Wrong", "WrongToo"]
    assert [one.source for one in cells] == names
    shown = ["".join(one.outputs[0]["data"]["text/markdown"]) for one in cells[-2:]]
    assert shown == ["## Errors\n\n### Wrong", "### WrongToo"]
    for words in (
        ["some words", "right", "Wrong", "better"],  # where it belongs
        ["some words", "## What is refused", "Wrong", "## A part", "right"],
        ["only errors", "Wrong", "WrongToo"],
    ):
        assert order(*words) == words


def test_page_checker_finds_what_is_wrong(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<img src="a.png"><img src="b.png" alt="a curve"><pre>in /tmp/tmpa1b2/x</pre><p>cafÃ©</p>'
        '<details class="api-source"></details><code>x:NoneType=None</code><script>"/tmp/tmpzz"</script>'
        + 2
        * f"<p>What <code>it</code> does is told {'again and ' * 6}again.</p>"
    )
    wrong = check_pages.problems_of(page)
    kinds = (
        "no alt text",
        "summary table",
        "a temporary path",
        "mojibake",
        "an untrue annotation",
        "said twice",
    )
    assert len(wrong) == len(kinds)
    assert all(any(kind in one for one in wrong) for kind in kinds)
    page.write_text('<img src="b.png" alt="a curve"><pre>fine, in /tmp too</pre>')
    assert check_pages.problems_of(page) == []


def test_link_checker_finds_what_is_broken(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="sub/page.html#here">good</a><a href="sub/">no index there</a><a href="gone.html">bad</a>'
        '<a href="sub/page.html#nowhere">bad</a><a href="https://elsewhere.example/x">not followed</a>'
        '<a href="#top">bad</a><img src="no.png"><a href="../outside.html">bad</a>'
    )
    (tmp_path / "sub" / "page.html").write_text(
        '<h2 id="here">x</h2><a href="../index.html">good</a><a href="/index.html">good</a>'
    )
    broken = check_links.broken_links(tmp_path)
    assert [problem.split(": ")[1] for problem in broken] == [
        "sub/",
        "gone.html",
        "sub/page.html#nowhere",
        "#top",
        "no.png",
        "../outside.html",
    ]
    assert check_links.main(str(tmp_path)) == 1
    (tmp_path / "index.html").write_text('<a href="sub/page.html">good</a>')
    assert check_links.main(str(tmp_path)) == 0
    assert check_links.main(str(tmp_path / "sub" / "nothing")) == 1


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, built by the stand-in for quarto in a copy of the working tree."""
    folder = tmp_path_factory.mktemp("site") / "concept_tda"
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        if not (ROOT / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (folder, folder / "tools", folder / "tests"))),
        "PATH": os.pathsep.join(
            [str(folder / "tools" / "stand_in"), str(Path(sys.executable).parent), os.environ["PATH"]]
        ),
    }
    environment.pop("IN_TEST", None)
    command = [Path(sys.executable).parent / "nbdev-docs", "--n-workers", "1"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "_docs"


def test_site_has_no_broken_link(site):
    assert not check_links.broken_links(site)


def test_site_shows_no_leftovers(site):
    pages = sorted(site.rglob("*.html"))
    wrong = [f"{file.relative_to(site)}: {one}" for file in pages for one in check_pages.problems_of(file)]
    assert not wrong, "\n".join(wrong)


@needs_browser
def test_search_answers_a_question_from_a_folder_and_the_sidebar_shows_the_page(site):
    finish_site.write_index(site)
    with Chromium() as browser:
        page = browser.open(f"file://{site}/90_views/report.html", height=600)
        link = "document.querySelector('#quarto-sidebar [aria-current=page]').getBoundingClientRect()"
        assert page.value(f"{link}.top > 0 && {link}.bottom < innerHeight")
        page.value("document.querySelector('.smalldocs-search input').focus()")
        page.type("how do I use my own model")
        page.wait("document.querySelector('.search-result')")
        first = page.value("document.querySelector('.search-result').href")
    assert first.split("/")[-1].startswith("own_model.html"), first


def test_site_loads_nothing_from_elsewhere(site):
    pytest.importorskip("pypandoc", reason="without pandoc formulas are shown by a script from a CDN")
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|img|link)\b[^>]*>", page.read_text(encoding="utf-8")):
            fetched = re.search(r"(?:src|href)=.https?://", tag) and not re.search(r"rel=.canonical", tag)
            assert not fetched, f"{page.relative_to(site)}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"@import url\(.?https?:", style.read_text(encoding="utf-8")), style
    assert "<math" in (site / "explained" / "influence.html").read_text(encoding="utf-8")


@needs_browser
def test_pages_open_without_errors_and_fit_the_screen(site):
    problems = []
    with Chromium() as browser:
        for file in sorted(site.rglob("*.html")):
            page, name = browser.open(f"file://{file}"), str(file.relative_to(site))
            problems += [f"{name}: {error}" for error in page.errors]
            problems += [
                f"{name}: asks for {address}"
                for address in page.requests
                if not address.startswith(("file:", "data:", "blob:"))
            ]
            for width in check_pages.WIDTHS:
                page.send(
                    "Emulation.setDeviceMetricsOverride",
                    width=width,
                    height=900,
                    deviceScaleFactor=1,
                    mobile=False,
                )
                if (needed := page.value("document.documentElement.scrollWidth")) > width:
                    problems.append(f"{name}: {needed} pixels wide at {width}")
                problems += [
                    f"{name}: {tag} {over} pixels too wide at {width}: {text!r}"
                    for tag, text, over in page.value(check_pages.MEASURE)
                ]
            page.close()
    assert not problems, "\n".join(problems)


def test_site_has_an_entry_for_every_public_function_and_class(site):
    missing = []
    for room, names in PUBLIC.items():
        module = importlib.import_module(f"concept_tda.{room}")
        notebook = re.search(r"nbs/(\S+)\.ipynb", Path(module.__file__).read_text(encoding="utf-8"))[1]
        page = check_links.Page((site / notebook).with_name(f"{room.split('.')[-1]}.html"))
        for name in names.split() or module.__all__:
            thing = getattr(module, name)
            if not callable(thing) or getattr(thing, "__module__", None) != module.__name__:
                continue  # a constant
            if name.lower() not in page.anchors:
                missing.append(f"{room}.{name}")
    assert not missing
