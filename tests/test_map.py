"""The map of a training set: what a drag, a key or a name in the legend selects, and what becomes of it."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.path import Path as Outline
from scipy.sparse import csr_matrix
from test_browser import XSS, StandIn, chats, harmless, press_at, several

from concept_tda.data.conversations import ConversationError
from concept_tda.groups.groups import GroupError, Groups, score_groups
from concept_tda.groups.maps import map_places
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.views.browser import ExampleBrowser
from concept_tda.views.contents import WidgetError, front_end
from concept_tda.views.map import ExampleMap, MapContents, map_columns, map_table
from concept_tda.views.report import write_report

from chromium import Chromium, needs_browser

N = 40
TRAITS = ["table", "columns", "saved", "selected", "marks", "notes", "undoable"]
SETS = {"first half": range(20), "every third": range(0, N, 3), "last": [N - 1]}
VECTORS = np.random.default_rng(5).normal(size=(N, 6)) * [6, 3, 1, 1, 1, 1]


def grouped(data, sets=SETS):
    cells = [(row, column) for column, rows in enumerate(sets.values()) for row in rows]
    rows, columns = zip(*cells)
    members = csr_matrix((np.ones(len(cells), bool), (rows, columns)), (len(data), len(sets)))
    return Groups(data, list(sets), members, "made up")


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


@pytest.fixture
def live(chromium, tmp_path):
    pages = []

    def open_(shown=None, window={}, **options):
        shown = shown or several()[0]
        data = shown.result.conversations if isinstance(shown, ExampleBrowser) else shown.conversations
        options = {"groups": grouped(data), "labels": "bad"} | options
        if isinstance(shown, Attribution):
            options["author"] = "ada"
        view = StandIn(chromium, ExampleMap(VECTORS, shown, **options), tmp_path, TRAITS, **window)
        pages.append(view)
        view.wait("document.querySelector('.mapplot canvas').width > 100")
        view.settle()
        return view

    yield open_
    for view in pages:
        assert view.page.errors == []
        view.page.close()


def pixels(view):
    """Where each point lies in the window [N, 2], computed from the vectors alone."""
    places, _ = map_places(VECTORS)
    share = (places - places.min(0)) / np.ptp(places, axis=0)
    view.page.value("document.querySelector('.mapplot').scrollIntoView({block: 'center'})")
    x, y, width, height = view.page.value(
        "(() => { const b = document.querySelector('.mapplot canvas').getBoundingClientRect(); "
        "return [b.x, b.y, b.width, b.height]; })()"
    )
    return np.stack([x + 14 + share[:, 0] * (width - 28), y + 14 + (1 - share[:, 1]) * (height - 28)], axis=1)


def within(spots, low, high):
    return np.flatnonzero(((spots > low) & (spots < high)).all(1))


def button(view, words):
    view.settle()
    view.value(
        f"[...document.querySelectorAll('button')].find(b => b.textContent.startsWith({json.dumps(words)}))"
        ".click()"
    )
    view.settle()


def status(view):
    return view.value("document.querySelector('.statusline [role=status]').textContent")


# selecting ----------------------------------------------------------------------------------------


@needs_browser
def test_a_dragged_rectangle_selects_the_points_in_it(live):
    view = live()
    spots, scores = pixels(view), view.widget.result.scores
    low, high = np.quantile(spots, 0.2, axis=0), np.quantile(spots, 0.7, axis=0)
    expected = within(spots, low, high)
    assert 3 < len(expected) < 30
    view.page.drag(*high, *low)  # from any corner
    view.settle()
    assert sorted(view.widget.selected) == expected.tolist()
    table, order = view.widget.selection, expected[np.argsort(-scores[expected])]
    data = view.widget.result.conversations
    assert table.index.tolist() == order.tolist() and table["score"].tolist() == scores[order].tolist()
    assert table["response"].tolist() == [data[int(row)].response for row in order]
    assert np.allclose(table[["x", "y"]], map_places(VECTORS)[0][order])
    ids = [data.ids[row] for row in order]
    assert table["id"].tolist() == ids
    assert view.value("document.querySelector('.ids textarea').value").split("\n") == ids
    assert status(view).startswith(f"{len(expected)} of 40 selected")
    listed = view.value("[...document.querySelectorAll('.picked .words')].map(one => one.textContent)")
    assert listed == [" ".join(data[int(row)].response.split())[:240] for row in order[:12]]


@needs_browser
def test_a_lasso_selects_what_it_goes_around(live):
    view = live()
    button(view, "lasso")
    spots = pixels(view)
    centre, size = spots.mean(0), np.ptp(spots, axis=0)
    corners = centre + size * [[-0.4, -0.1], [0.1, -0.45], [0.3, 0.35], [0.0, 0.0]]  # not convex
    view.page.mouse("mousePressed", *corners[0], clickCount=1, buttons=1)
    for a, b in zip(corners, corners[1:]):
        for step in (0.25, 0.5, 0.75, 1):
            view.page.mouse("mouseMoved", *(a + (b - a) * step), buttons=1)
    view.page.mouse("mouseReleased", *corners[-1], clickCount=1)
    view.settle()
    inside = np.flatnonzero(Outline(corners).contains_points(spots))
    box = within(spots, corners.min(0), corners.max(0))
    assert sorted(view.widget.selected) == inside.tolist() and 2 < len(inside) < len(box)


@needs_browser
def test_shift_adds_alt_takes_away_and_a_click_on_empty_ground_clears(live):
    view = live()
    spots, middle = pixels(view), np.median(pixels(view), axis=0)
    left, top = spots.min(0) - 8
    right, bottom = spots.max(0) + 8

    def drag(x0, y0, x1, y1, modifiers=0):
        view.page.mouse("mousePressed", x0, y0, clickCount=1, buttons=1, modifiers=modifiers)
        view.page.mouse("mouseMoved", x1, y1, buttons=1, modifiers=modifiers)
        view.page.mouse("mouseReleased", x1, y1, clickCount=1, modifiers=modifiers)
        view.settle()

    drag(left, top, middle[0], bottom)
    west = set(np.flatnonzero(spots[:, 0] < middle[0]))
    assert set(view.widget.selected) == west
    drag(left, top, right, middle[1], modifiers=8)
    north = set(np.flatnonzero(spots[:, 1] < middle[1]))
    assert set(view.widget.selected) == west | north
    drag(middle[0], top, right, bottom, modifiers=1)
    assert set(view.widget.selected) == west
    press_at(view.page, left + 2, top + 2)
    view.settle()
    assert view.widget.selected == [] and status(view).startswith("40 examples")


@needs_browser
def test_names_in_the_legend_select_all_examples_of_a_group_or_label(live):
    view = live()
    options = view.value(
        "[...document.querySelector('[aria-label=\"Colour by\"]').options].map(o => o.textContent)"
    )
    assert options == ["influence", "made up", "bad", "kind", "decision"]
    view.choose("Colour by", "1")
    view.settle()
    assert "in several has the colour of the first" in view.value(
        "document.querySelector('.classes').textContent"
    )
    button(view, "every third")
    assert view.widget.selected == list(range(0, N, 3))  # also those drawn in the colour of the first half
    button(view, "none of these")
    assert view.widget.selected == [row for row in range(20, N - 1) if row % 3]
    view.choose("Colour by", "2")
    view.settle()
    button(view, "no")
    assert view.widget.selected == list(range(1, N, 2))


@needs_browser
def test_a_selection_made_in_python_is_drawn(live):
    view = live()
    view.widget.select([3, 5, 8])
    view.share()
    view.settle()
    assert status(view).startswith("3 of 40 selected")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_colours_follow_the_sign_of_the_score(live, dark):
    view = live(window=dict(dark=dark))
    spots, scores = pixels(view), view.widget.result.scores
    distance = np.linalg.norm(spots[:, None] - spots[None], axis=2) + 1e9 * np.eye(N)
    for row in np.argsort(-np.abs(scores)):
        if distance[row].min() < 14 or abs(scores[row]) < 0.7:
            continue
        red, _, blue, alpha = view.value(
            "(() => { const c = document.querySelector('.mapplot canvas'), b = c.getBoundingClientRect(); "
            f"const x = {spots[row, 0]} - b.x, y = {spots[row, 1]} - b.y; "
            "return [...c.getContext('2d').getImageData(x, y, 1, 1).data]; })()"
        )
        assert alpha > 60 and (red > blue) == (scores[row] > 0)


# keys and pointer ---------------------------------------------------------------------------------


@needs_browser
def test_everything_is_reached_by_key(live):
    view = live()
    names = []
    for _ in range(12):
        view.page.press("Tab")
        names.append(
            view.value(
                "(() => { const n = document.activeElement; "
                "return (n.getAttribute('aria-label') || n.textContent || '').slice(0, 40); })()"
            )
        )
    assert names[:4] == ["Colour by", "rectangle", "lasso", "Map of 40 examples. Arrow keys go from p"]
    spots = pixels(view)
    view.value("document.querySelector('.mapplot').focus()")
    view.page.press("ArrowRight")
    start = view.value("document.querySelector('.told-line').textContent")
    top = int(np.argmax(np.abs(view.widget.result.scores - view.widget.table["colours"][0]["centre"])))
    assert start.startswith(f"row {top} ")  # the strongest first
    view.page.press("ArrowDown")
    below = int(view.value("document.querySelector('.told-line').textContent").split()[1])
    assert below != top and spots[below, 1] > spots[top, 1]
    view.page.press(" ")
    view.settle()
    assert view.widget.selected == [below]
    view.page.press(" ")
    view.settle()
    assert view.widget.selected == []
    for key in ("ArrowUp", "ArrowLeft", "ArrowUp", "ArrowLeft", "ArrowLeft"):
        view.page.press(key, modifiers=8)
    view.settle()
    plot = view.page.box(".mapplot canvas")
    corner = spots[below] - [3 * 0.04 * plot[2], 2 * 0.04 * plot[3]]
    assert set(within(spots, corner, spots[below] + 1)) == set(view.widget.selected) and view.widget.selected
    view.page.press("d")
    view.settle()
    assert set(view.widget.decisions.index) == set(view.widget.selected)
    view.page.press("Escape")
    view.settle()
    assert view.widget.selected == [] and set(view.widget.decisions["decision"]) == {"drop"}
    view.page.press("z")
    view.settle()
    assert len(view.widget.decisions) == 0


@needs_browser
def test_the_point_under_the_pointer_shows_question_and_answer(live):
    view = live()
    spots = pixels(view)
    distance = np.linalg.norm(spots[:, None] - spots[None], axis=2) + 1e9 * np.eye(N)
    row = int(distance.min(1).argmax())
    view.page.send("Input.dispatchMouseEvent", type="mouseMoved", x=spots[row, 0], y=spots[row, 1])
    view.wait("document.querySelector('.map-reading .answer')")
    said = view.widget.result.conversations[row]
    assert (
        view.value("document.querySelector('.map-reading .question .text').textContent") == f"question {row}"
    )
    assert (
        view.value("document.querySelector('.map-reading .answer .text').textContent")
        == said.response.strip()
    )
    told = view.value("document.querySelector('.told-line').textContent")
    result = view.widget.result
    higher = np.floor(10 * result.percentiles[row]) / 10
    distance = f"{result.leading.values[row]:+.3g}".replace("-", "−")
    assert told.startswith(f"row {row} · higher than {higher:.1f} % · {distance} spreads (rank")
    assert f"kind: kind {row % 3}" in told and " · raw score " in told
    press_at(view.page, *spots[row])
    view.wait(f"document.querySelector('.map-reading').textContent.includes('id {said.id}')")


@needs_browser
def test_the_map_leads_with_multiples_of_the_null_and_labels_the_raw_number(live):
    result = several()[0]
    draws = np.random.default_rng(1).normal(size=(N, 50)) * np.linspace(0.2, 3, N)[:, None]
    view = live(ExampleBrowser(result.with_null(draws), by="grace"))
    result = view.widget.result
    view.widget.select([0, 1, 2])
    view.share()
    view.settle()
    mean = np.floor(10 * np.mean(result.percentiles[:3].astype(np.float32))) / 10
    assert f"3 of {N} selected; on average higher than {mean:.1f} %" in status(view)
    lines = view.value("[...document.querySelectorAll('.picked .one')].map(one => one.textContent)")
    for line, row in zip(lines, sorted(range(3), key=lambda row: -result.scores[row])):
        times = f"{result.times_null[row]:+.3g}".replace("-", "−")
        assert (
            f"{times} × null row {row}" in line
            and f"{np.floor(10 * result.percentiles[row]) / 10:.1f} %" in line
        )
    titles = view.value("[...document.querySelectorAll('.picked .one b')].map(one => one.title)")
    assert all(title.startswith("raw score ") for title in titles)


# deciding -----------------------------------------------------------------------------------------


@needs_browser
def test_what_is_dropped_on_the_map_is_dropped_in_the_browser_and_the_other_way_round(live):
    result = several()[0]
    browser = ExampleBrowser(result, by="grace")
    view = live(browser)
    spots = pixels(view)
    view.page.drag(*(spots.min(0) - 5), *np.median(spots, axis=0))
    view.settle()
    chosen = list(view.widget.selected)
    button(view, "✕ Drop")
    assert view.widget.browser is browser and len(chosen) > 2
    assert browser.decisions.index.tolist() == chosen
    assert set(browser.decisions["decision"]) == {"drop"} and set(browser.decisions["by"]) == {"grace"}
    assert set(browser.decisions["why"]) == {"selected on the map (rectangle)"}
    assert set(view.widget.selection["decision"]) == {"drop"}
    assert [one.id for one in view.widget.kept] == [
        id for row, id in enumerate(result.ids) if row not in chosen
    ]
    browser.decide([chosen[0]], "keep")
    view.share()
    view.choose("Colour by", "4")
    view.settle()
    legend = view.value("[...document.querySelectorAll('.classes button')].map(b => b.textContent)")
    assert legend == ["keep 1", f"drop {len(chosen) - 1}", f"undecided {N - len(chosen)}"]
    button(view, "Undo")
    button(view, "Undo")
    assert len(browser.decisions) == 0 and set(browser.history["action"]) == {"dropped", "kept", "undo"}


@needs_browser
def test_an_error_of_the_kernel_is_shown(live):
    view = live()
    view.widget.select([1])
    view.share()

    def fail(*_):
        raise WidgetError("the disk is full <b>now</b>")

    view.widget.browser.decide = fail
    button(view, "✕ Drop")
    assert view.value("document.querySelector('.problem').textContent") == "the disk is full <b>now</b>"
    harmless(view.page)


# pages --------------------------------------------------------------------------------------------

CLIPPED = """[...document.querySelectorAll('.ctda-view.map *, #kinds *')].filter(node => {
  const box = node.getBoundingClientRect(), style = getComputedStyle(node);
  if (!box.width || node.closest('.wide') || node.parentElement.closest('.one')) return false;
  if (box.right > window.innerWidth + 1 || box.left < -1) return true;
  const cut = node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0 && style.display !== 'inline';
  return cut && !['visible', 'auto'].includes(style.overflowX) && style.textOverflow !== 'ellipsis';
}).map(node => `${node.tagName}.${node.className} ${node.textContent.slice(0, 40)}`)"""


@needs_browser
@pytest.mark.parametrize(
    "width, dark", [(390, False), (390, True), (768, True), (1280, False), (1600, False)]
)
def test_a_page_without_a_kernel_selects_and_clips_nothing(chromium, tmp_path, width, dark):
    result = several()[0]
    long = {"a very long name of a group of examples that says everything": range(9), "b" * 80: range(9, 30)}
    shown = ExampleMap(VECTORS, result, groups=grouped(result.conversations, long), labels="bad")
    path = shown.page().save(tmp_path / "map.html")
    page = chromium.open(path.as_uri(), width=width, height=900, dark=dark)
    page.wait("document.querySelector('.mapplot canvas').width > 100")
    page.value(
        "(() => { const pick = document.querySelector('[aria-label=\"Colour by\"]'); pick.value = '1'; "
        "pick.dispatchEvent(new Event('change')); })()"
    )
    page.value("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    page.value("document.querySelector('.classes button').click()")
    page.wait("document.querySelector('.picked .words')?.textContent")
    order = sorted(range(9, 30), key=lambda row: -result.scores[row])
    assert page.value("document.querySelector('.ids textarea').value").split("\n") == [
        result.ids[row] for row in order
    ]
    page.value("document.querySelector('.picked button').click()")
    page.wait("document.querySelector('.map-reading .turn')")
    assert f"answer {order[0]} " in page.value("document.querySelector('.map-reading').textContent")
    assert page.value(CLIPPED) == []
    assert page.value("document.documentElement.scrollWidth") <= width
    words = page.value("[...document.querySelectorAll('button')].map(b => b.textContent).join()")
    assert "Drop" not in words and "Undo" not in words  # nothing to decide where nobody listens
    assert page.errors == [] and page.requests == [path.as_uri()]
    page.close()


@needs_browser
def test_hostile_texts_stay_texts(chromium, tmp_path):
    data = chats([text for text in XSS if text.strip()])
    n = len(data)
    card = QueryCard("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", zero="gradient")
    result = Attribution(data, np.arange(n) - n / 2 + 0.25, card)
    sets = {
        text[:70] + str(number): [number, number + 1]
        for number, text in enumerate(XSS[: n - 1])
        if text.isprintable()
    }
    shown = ExampleMap(np.random.default_rng(0).normal(size=(n, 3)), result, groups=grouped(data, sets))
    path = shown.page().save(tmp_path / "map.html")
    page = chromium.open(path.as_uri(), width=800)
    page.wait("document.querySelector('.mapplot canvas').width > 100")
    page.value(
        "(() => { const pick = document.querySelector('[aria-label=\"Colour by\"]'); pick.value = '1'; "
        "pick.dispatchEvent(new Event('change')); document.querySelector('.classes button').click(); })()"
    )
    page.wait("document.querySelector('.picked .words')?.textContent")
    assert page.value("document.querySelectorAll('script').length") == 2
    assert (
        page.value(
            "document.querySelectorAll('#browser :is(script, img, iframe, a, style, svg[onload])').length"
        )
        == 0
    )
    assert page.errors == [] and page.requests == [path.as_uri()]
    page.close()


@needs_browser
def test_ten_thousand_points_are_brushed_without_a_kernel(chromium, tmp_path):
    n = 10_000
    rng = np.random.default_rng(0)
    result = Attribution(chats([f"{i}" for i in range(n)]), rng.normal(size=n), QueryCard("one", "b"))
    vectors = rng.normal(size=(n, 2)) * [3, 1]
    path = ExampleMap(vectors, result).page().save(tmp_path / "map.html")
    page = chromium.open(path.as_uri())
    page.wait("document.querySelector('.mapplot canvas').width > 100")
    x, y, width, height = page.box(".mapplot canvas")
    page.drag(x + 1, y + 1, x + width / 2, y + height - 1)
    expected = (map_columns(MapContents(vectors, result))["x"] < 0.5).sum()
    told = page.value("document.querySelector('.statusline [role=status]').textContent")
    assert abs(int(told.split()[0].replace(",", "")) - expected) < 40 and page.errors == []
    page.close()


# numbers and refusals -----------------------------------------------------------------------------


def test_a_part_lies_where_it_lies_in_the_whole():
    result = several()[0]
    whole, part = MapContents(VECTORS, result), MapContents(VECTORS, result.top(9))
    assert np.array_equal(part.places, whole.places[part.result.rows])
    assert map_table(part)["n"] == 9 and map_table(part)["n_total"] == N
    assert map_columns(part)["row"].tolist() == part.result.rows.tolist()


def test_vectors_of_one_direction_lie_on_a_line():
    result = several()[0]
    columns = map_columns(MapContents(np.outer(np.arange(N), [1.0, 2.0]), result))
    assert set(columns["y"]) == {0.5} and np.ptp(columns["x"]) == 1


def test_the_scale_of_colours_is_read_from_the_zero_or_the_median():
    data = several()[0].conversations
    scores = np.random.default_rng(0).normal(size=N) + 5
    for zero, centre in (("gradient", 0.0), ("none", np.median(scores)), ("projection", scores.mean())):
        colour = MapContents(VECTORS, Attribution(data, scores, QueryCard("m", "b", zero=zero))).colours[0]
        assert np.isclose(colour["centre"], centre) and colour["limit"] > 0


class AtlasLike:
    def __init__(self, conversations, rows):
        self.conversations, self.rows = conversations, rows


def test_an_atlas_of_the_same_file_is_taken_and_of_another_refused():
    result = several()[0]
    atlas = AtlasLike(result.conversations, VECTORS)
    assert np.array_equal(MapContents(atlas, result).places, MapContents(VECTORS, result).places)
    assert len(MapContents(atlas, result.top(5)).places) == 5
    for other in (chats([f"other {i}" for i in range(N)]), result.conversations.select(range(30))):
        with pytest.raises(WidgetError, match="these are other examples: map and score the same file"):
            MapContents(AtlasLike(other, VECTORS[: len(other)]), result)
    turned = AtlasLike(result.conversations.select(range(N)[::-1]), VECTORS)  # the same examples, other rows
    with pytest.raises(WidgetError, match="other examples"):
        MapContents(turned, result)


def test_maps_that_cannot_be_are_refused():
    result = several()[0]
    other = grouped(chats([f"other {i}" for i in range(N)]))
    broken = VECTORS.copy()
    broken[7, 2] = np.nan
    for vectors, options, error, words in (
        (VECTORS[:9], {}, WidgetError, "vectors have 9 rows, the file has 40 examples"),
        (broken, {}, GroupError, "the first is row 7"),
        (VECTORS[:, :1], {}, GroupError, "shape"),
        (np.ones((N, 4)), {}, GroupError, "nothing to map"),
        (VECTORS, {"groups": other}, WidgetError, "group and score the same file"),
        (VECTORS, {"groups": [1, 2]}, WidgetError, "groups= is a list"),
        (VECTORS, {"labels": "taste"}, ConversationError, "taste"),
        (VECTORS, {"labels": [True] * 3}, WidgetError, "the result has 40 examples"),
    ):
        with pytest.raises(error, match=words):
            ExampleMap(vectors, result, **options)
    with pytest.raises(WidgetError, match="author= belongs to the browser"):
        ExampleMap(VECTORS, ExampleBrowser(result), author="ada")
    with pytest.raises(WidgetError, match="a DataFrame has no scores"):
        ExampleMap(VECTORS, pd.DataFrame())
    with pytest.raises(GroupError, match="no group is left"):
        Groups(result.conversations, [], csr_matrix((N, 0), dtype=bool), "nothing")


def test_selections_and_decisions_that_cannot_be_change_nothing():
    shown = ExampleMap(VECTORS, several()[0])
    shown.select([4, 2, 4])
    assert shown.selected == [2, 4]
    for call, words in (
        (lambda: shown.select([N]), f"row {N} is not on this map"),
        (lambda: setattr(shown, "selected", [-1]), "position -1"),
        (lambda: shown.decide("burn"), "not 'burn'"),
        (lambda: shown.page(height=9), "height=9"),
    ):
        with pytest.raises(WidgetError, match=words):
            call()
    assert shown.selected == [2, 4] and len(shown.decisions) == 0
    shown.selected = []
    assert len(shown.selection) == 0 and shown.selection.columns[0] == "id"
    with pytest.raises(WidgetError, match="nothing is selected"):
        shown.decide("drop")


@pytest.mark.parametrize(
    "message",
    [
        {"kind": "shout"},
        {"kind": "decide", "places": [99], "mark": 1},
        {"kind": "examples", "places": [-1]},
        {"kind": "undo"},
        {"kind": "decide", "places": [1], "mark": 7},
    ],
)
def test_senseless_messages_get_an_answer_and_change_nothing(message):
    shown = ExampleMap(VECTORS, several()[0])
    sent = []
    shown.send = lambda content, buffers=None: sent.append(content)
    shown._handle_custom_msg({**message, "number": "a-1"}, [])
    assert sent[0]["reply"] == "a-1" and sent[0]["error"] and len(shown.decisions) == 0


def test_a_record_outlives_the_map(tmp_path):
    record = tmp_path / "review.json"
    shown = ExampleMap(VECTORS, several()[0], author="ada", record=record)
    shown.select([1, 2])
    shown.decide("drop", note="same joke")
    again = ExampleMap(VECTORS, several()[0], author="bob", record=record)
    assert again.decisions.index.tolist() == [1, 2] and set(again.decisions["note"]) == {"same joke"}
    assert again.marks == shown.marks
    again.undo() if again.undoable else None
    assert len(again.decisions) == 2  # what another session did stays


def test_the_scripts_parse_no_markup_and_ask_for_nothing():
    script = front_end("map_plot.js", "map.js", "map_widget.js", "report_map.js")
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
        "import(",
        ".href",
    ):
        assert sink not in script, sink
    assert "http" not in script and "url(" not in front_end("map.css")


# in the report ------------------------------------------------------------------------------------


def report_parts(texts=None):
    results = several(texts=texts)
    data = results[0].conversations
    found = score_groups(grouped(data), results[0], labels="bad", deals=20)
    return results, found


def test_sections_of_the_report_are_there_only_when_given(tmp_path):
    results, found = report_parts()
    plain = write_report(results, tmp_path / "plain.html").read_text()
    assert 'id="kinds"' not in plain and 'id="map"' not in plain and "mapplot" not in plain
    assert 'href="#where"' not in plain and 'id="where"' not in plain
    bars = write_report(results, tmp_path / "bars.html", groups=[found, found]).read_text()
    assert bars.count("class='kind'") == 2 * len(SETS) and 'id="map"' not in bars
    assert "groups, from both ends" not in bars
    many = {f"group {row}": [row, (row + 1) % N] for row in range(N)}
    cut = score_groups(grouped(results[0].conversations, many), results[0], deals=20)
    bars = write_report(results, tmp_path / "bars.html", groups=cut, overwrite=True).read_text()
    assert "20 of 40 groups, from both ends" in bars and bars.count("class='kind'") == 20
    mapped = write_report(results, tmp_path / "map.html", map=VECTORS).read_text()
    assert 'id="map"' in mapped and 'id="kinds"' not in mapped
    embedded = json.loads(re.findall(r'id="data">(.*?)</script>', mapped, flags=re.S)[0])["map"]
    assert embedded["places"] == list(range(N)) and embedded["table"]["ids"] == results[0].ids


def test_groups_or_a_map_of_other_examples_leave_no_report(tmp_path):
    results, found = report_parts()
    other = [Attribution(chats([f"other {i}" for i in range(N)]), results[0].scores, results[0].card)]
    for options, words in (
        ({"groups": found}, "groups= is of 'train'"),
        ({"groups": "topic"}, "groups= holds a str"),
        ({"map": ExampleMap(VECTORS, results[0])}, "map= is of 'train'"),
        ({"map": VECTORS[:5]}, "vectors have 5 rows"),
    ):
        with pytest.raises(WidgetError, match=words):
            write_report(other, tmp_path / "report.html", **options)
    with pytest.raises(WidgetError, match="another order"):
        write_report(results, tmp_path / "report.html", map=ExampleMap(VECTORS, results[0].top(5)))
    assert not (tmp_path / "report.html").exists()


@needs_browser
@pytest.mark.parametrize("width, dark", [(390, False), (768, True), (1280, False)])
def test_kinds_and_map_of_a_report_work_without_a_kernel(chromium, tmp_path, width, dark):
    results, found = report_parts()
    path = write_report(
        results, tmp_path / "report.html", labels="bad", groups=found, map=VECTORS, rows=10, examples=2
    )
    page = chromium.open(path.as_uri(), width=width, height=900, dark=dark)
    page.wait("document.querySelector('#map .mapplot canvas')?.width > 100")
    page.wait("document.querySelector('#browser .reading .turn')")
    assert page.value("document.querySelector('#kinds .example').checkVisibility()") is False
    page.click("#kinds summary.kind")
    assert page.value("document.querySelectorAll('#kinds [open] .example').length") == 3
    highest = found.attribution.select(found.groups.rows(str(found.ordered("sum")["group"].iloc[0]))).top(1)
    assert highest.conversations[0].response.split()[1] in page.value(
        "document.querySelector('#kinds [open] .example').textContent"
    )
    page.value("document.querySelector('.mapplot').scrollIntoView({block: 'center'})")
    x, y, w, h = page.box(".mapplot canvas")
    page.drag(x + 1, y + 1, x + w - 1, y + h - 1)
    ids = page.value("document.querySelector('#map .ids textarea').value").split("\n")
    assert ids == [results[0].ids[row] for row in np.argsort(-results[0].scores, kind="stable")]
    top = int(np.argmax(results[0].scores))
    page.wait("document.querySelector('#map .picked .words').textContent")
    page.value("document.querySelector('#map .picked button').click()")
    page.wait("document.querySelector('#map .map-reading .turn')")
    assert f"answer {top} " in page.value("document.querySelector('#map .map-reading').textContent")
    inside = set(json.loads(page.value("document.getElementById('data').textContent"))["map"]["places"])
    listed = np.argsort(-results[0].scores, kind="stable")[:12]
    words = page.value("[...document.querySelectorAll('#map .words')].map(w => w.textContent)")
    assert [w == "(its text is not in this page)" for w in words] == [row not in inside for row in listed]
    assert "(its text is not in this page)" in words
    assert page.value(CLIPPED) == [] and page.value("document.documentElement.scrollWidth") <= width
    assert page.errors == [] and page.requests == [path.as_uri()]
    page.close()
