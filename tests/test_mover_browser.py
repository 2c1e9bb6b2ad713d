"""Two results side by side: moves are differences of percentiles, words of movers are held against chance,
and the view shows both, with a kernel and from a file."""

import json

import numpy as np
import pytest
from test_browser import StandIn, harmless, hostile_results, lexical, several, too_wide

from concept_tda.groups.reading import words_of_ends
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.results.comparison import compare
from concept_tda.results.metrics import AttributionError
from concept_tda.views.contents import WidgetError
from concept_tda.views.movers import MoverBrowser, card_differences, mover_columns, mover_table, mover_words

from chromium import Chromium, needs_browser

TRAITS = ["table", "columns", "saved", "selected"]


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


@pytest.fixture
def live(chromium, tmp_path):
    pages = []

    def open_(results, window={}, **options):
        view = StandIn(chromium, MoverBrowser(results, **options), tmp_path, TRAITS, **window)
        pages.append(view)
        view.wait("document.querySelector('.mover-reading .turn')")
        return view

    yield open_
    for view in pages:
        assert view.page.errors == []
        view.page.close()


def moved():
    """Two methods with token scores of their own; the second likes "lantern", not "harbour"."""
    first = several(n=60, texts=[c.response for c in lexical()[0].conversations])[0]
    says = np.array(["lantern" in c.response for c in first.conversations])
    scores = np.random.default_rng(5).normal(size=60)
    card = QueryCard("Vector Filter", "sycophancy", zero="projection", model="tiny", data="train", layer=3)
    pieces = dict(tokens=first.tokens, response_masks=first.response_masks)
    tokens = [np.arange(len(one)) / 10 for one in first.tokens]
    second = Attribution(
        first.conversations, scores + np.where(says, 1.5, -1.5), card, token_scores=tokens, **pieces
    )
    return Attribution(
        first.conversations, scores, first.card, token_scores=first.token_scores, **pieces
    ), second


# numbers ------------------------------------------------------------------------------------------


def test_a_move_is_the_difference_of_two_percentiles_by_id_whatever_the_order():
    first, second = moved()
    view = MoverBrowser([first, second])
    by_hand = [
        100 * ((b.scores < b.scores[i]).sum() - (a.scores < a.scores[i]).sum()) / 60
        for a, b in [(first, second)]
        for i in range(60)
    ]
    np.testing.assert_allclose(view.moves, by_hand, atol=1e-6)
    table = view.selection
    assert table["move"].tolist() == sorted(view.moves, key=lambda move: -abs(move))
    for row, line in table.head(5).iterrows():
        assert line["id"] == first.ids[row] and line["response"] == first.conversations[row].response
        assert line["rank by Concept Influence"] == first.ranks[row]
        assert line["rank by Vector Filter"] == second.ranks[row]
    turned = MoverBrowser([second, first])
    np.testing.assert_allclose(turned.moves, -view.moves)
    with pytest.raises(AttributionError, match="different examples"):
        MoverBrowser([first, several(n=30)[1]])


def test_the_words_of_movers_are_those_of_the_order_by_move():
    first, second = moved()
    words = mover_words(first, second)
    assert words["highest"][0][0] == "lantern" and words["lowest"][0][0] == "harbour"
    texts = ["\n".join(m["content"] for m in c.messages).lower() for c in first.conversations]
    found = words_of_ends(texts, second.percentiles - first.percentiles)
    assert [row[0] for row in words["highest"]] == found.highest["word"].tolist()
    noise = Attribution(first.conversations, np.random.default_rng(9).normal(size=60), second.card)
    assert mover_words(first, noise)["highest"] == [] and "None of" in mover_words(first, noise)["words"]


def test_the_cards_are_laid_over_each_other_and_the_agreement_has_its_yardstick():
    first, second = moved()
    differs = dict((field, both) for field, *both in card_differences(first.card, second.card))
    assert differs["method"] == ["Concept Influence", "Vector Filter"] and differs["layer"] == ["–", "3"]
    assert "model" not in differs and "created" not in differs
    told = mover_table({"a": first, "b": second})
    agreement = compare([first, second]).spearman.iloc[0, 1]
    assert f"{agreement:+.2f}" in told["subtitle"] and "33" in told["subtitle"]
    unrelated = np.random.default_rng(0).random((2, 100_000)) * 100
    assert np.abs(unrelated[0] - unrelated[1]).mean() == pytest.approx(33.3, abs=0.3)
    assert mover_columns({"a": first, "b": second})["rank1"].tolist() == second.ranks.tolist()


def test_runs_of_one_method_are_named_by_what_differs_and_two_are_needed():
    first, second = moved()
    runs = [
        Attribution(first.conversations, one.scores, QueryCard("LoGra", "sycophancy", model=model))
        for one, model in ((first, "small"), (second, "large"))
    ]
    assert MoverBrowser(runs).table["title"] == "What moved from LoGra (small) to LoGra (large)"
    three = compare([first, second, Attribution(first.conversations, second.scores, QueryCard("BM25", "x"))])
    assert three.inspect("BM25", "Vector Filter").table["title"] == "What moved from BM25 to Vector Filter"
    for wrong in (first, [first], three):
        with pytest.raises(WidgetError, match="two different results"):
            MoverBrowser(wrong)
    with pytest.raises(WidgetError, match="two different results"):
        three.inspect("BM25", "BM25")
    with pytest.raises(WidgetError, match="no example at position 60"):
        MoverBrowser([first, second]).selected = [60]
    with pytest.raises(WidgetError, match="row 99"):
        MoverBrowser([first, second]).select([99])


# the view -----------------------------------------------------------------------------------------


LINES = (
    "[...document.querySelectorAll('.mover')].map(line => [Number(line.dataset.place), "
    "line.querySelector('.answered').textContent])"
)


def number(text):
    return float(text.split(",")[0].replace("−", "-"))


def tab(view, words):
    view.value(
        "[...document.querySelectorAll('.classes button')]"
        f".find(one => one.textContent.includes({json.dumps(words)})).click()"
    )
    view.settle()


@needs_browser
def test_the_movers_are_listed_with_both_ranks_and_read_in_both_colourings(live):
    first, second = moved()
    view = live([first, second])
    view.settle()
    moves, order = view.widget.moves, np.argsort(-view.widget.moves, kind="stable")
    rising = [int(place) for place in order if moves[place] > 0]
    listed = view.value(LINES)
    assert [place for place, _ in listed] == rising
    assert listed[0][1] == " ".join(first.conversations[rising[0]].response.split())
    line = view.value("document.querySelector('.mover').textContent")
    assert f"+{moves[rising[0]]:.0f} points" in line
    assert f"#{first.ranks[rising[0]]} → #{second.ranks[rising[0]]}" in line
    tab(view, "fell most")
    falling = [int(place) for place in np.argsort(moves, kind="stable") if moves[place] < 0]
    assert [place for place, _ in view.value(LINES)] == falling
    place = falling[0]
    view.page.click(f".mover[data-place='{place}']")
    view.wait(f"document.querySelector('.mover-reading code')?.textContent === '{first.ids[place]}'")
    for side, result in enumerate((first, second)):
        scores = view.value(
            f"[...document.querySelectorAll('.both > div')[{side}].querySelectorAll('.tokens span')]"
            ".map(span => span.title)"
        )
        np.testing.assert_allclose([number(one) for one in scores], result.token_scores[place], rtol=1e-3)
    heads = view.value("[...document.querySelectorAll('.both h4')].map(one => one.textContent)")
    assert heads == [f"{r.card.method} · rank {r.ranks[place]} of 60" for r in (first, second)]
    tab(view, "high in both")
    worse = np.minimum(first.percentiles, second.percentiles)
    assert view.value(LINES)[0][0] == int(np.argmax(worse))


@needs_browser
def test_brush_words_and_python_select_the_same_examples(live):
    first, second = moved()
    view = live([first, second])
    x, y, width, height = view.page.box(".mapplot canvas")
    view.page.drag(x + 2, y + 2, x + width / 2, y + height / 2)  # low for the first, high for the second
    view.settle()
    inside = {i for i in range(60) if first.percentiles[i] < 50 < second.percentiles[i]}
    assert set(view.widget.selected) == inside and len(inside) > 3
    assert {place for place, _ in view.value(LINES)} == inside
    view.widget.select([3, 5])
    view.share()
    view.settle()
    assert {place for place, _ in view.value(LINES)} == {3, 5}
    view.value(
        "[...document.querySelectorAll('.chips button')].find(one => /harbour/.test(one.textContent)).click()"
    )
    view.wait("document.querySelector('.classes').textContent.includes('with “harbour”')")
    view.settle()
    assert all("harbour" in said for _, said in view.value(LINES)) and len(view.value(LINES)) == 30


@needs_browser
def test_a_file_needs_neither_kernel_nor_network_and_fits_its_window(chromium, tmp_path):
    path = MoverBrowser(list(moved())).page().save(tmp_path / "movers.html")
    for width, dark in ((390, True), (768, False), (1280, True)):
        page = chromium.open(path.as_uri(), width=width, dark=dark)
        page.wait(
            "document.querySelector('.mover-reading .turn') && "
            "document.querySelector('.answered')?.textContent"
        )
        assert page.value("document.documentElement.scrollWidth") <= width
        assert page.errors == [] and all(one.startswith(("file:", "data:")) for one in page.requests)
        page.close()


@needs_browser
def test_hostile_texts_stay_texts(live, chromium, tmp_path):
    results = hostile_results()
    view = live(results[:2])
    harmless(view.page)
    assert too_wide(view.page) == []
    named = MoverBrowser({"</title><img src=x>": results[0], '" onload=alert(1)': results[1]})
    page = chromium.open(named.page().save(tmp_path / "page.html", overwrite=True).as_uri())
    page.wait("document.querySelector('.mover-reading .turn')")
    assert (
        page.errors == []
        and page.value("document.querySelectorAll('#browser :is(script, img, iframe)').length") == 0
    )
    assert page.value("document.title") == named.table["title"]
    assert '" onload' not in named.page()._repr_html_().split("srcdoc")[0]
    page.close()
