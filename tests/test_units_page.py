"""What a reader of the page sees of units and parts: rows, reading pane and histogram, by content."""

from dataclasses import replace

import numpy as np
import pytest
from test_units import GRADIENT, sunk

from concept_tda.results.attribution import Attribution
from concept_tda.views.browser import embedded_browser, offline_page
from concept_tda.views.contents import BROWSER_SCRIPTS

from chromium import Chromium, needs_browser

pytestmark = needs_browser
ROWS = (
    "[...document.querySelectorAll('.row')].sort((a, b) => parseFloat(a.style.top) - parseFloat(b.style.top))"
)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    _, result = sunk()
    result = result.with_null(np.random.default_rng(1).normal(size=(6, 50)) * 9)
    lengths = Attribution(
        result.conversations, np.arange(6.0) + 1, replace(GRADIENT, method="Length", zero="none")
    )
    path = tmp_path_factory.mktemp("page") / "browser.html"
    data = embedded_browser(result, [lengths])
    offline_page("Units", BROWSER_SCRIPTS, "mountEmbedded", data, 600, "x").save(path)
    with Chromium() as browser:
        page = browser.open(path.as_uri(), width=1280)
        page.wait("document.querySelector('.reading .parts') !== null")
        page.wait(f"!{ROWS}.some(row => row.querySelector('.prompt').textContent === '…')")
        yield result, page
        assert page.errors == []


def seen(value):
    "A number as the page writes it, back."
    return float(value.replace("−", "-").split()[0])


def test_rows_lead_with_percentile_and_multiple_and_hold_the_question(opened):
    result, page = opened
    order = np.argsort(-result.scores)
    first = page.value(
        f"{ROWS}.map(row => [...row.querySelectorAll('.numbers .score, .numbers .distance')]"
        ".map(n => [n.textContent, n.title]))"
    )
    for row, parts in zip(order, first):
        (percentile, raw), (distance, raw_too) = parts[:2]
        assert percentile == f"{np.floor(10 * result.percentiles[row]) / 10:.1f} %"
        assert distance.endswith("× null") and np.isclose(seen(distance), result.times_null[row], rtol=0.02)
        assert raw == raw_too and np.isclose(seen(raw.split()[2]), result.scores[row], rtol=1e-4)
    prompts = page.value(f"{ROWS}.map(row => row.querySelector('.prompt').textContent)")
    assert prompts == [" ".join(result.questions[row].split())[:240] for row in order]


def test_the_reading_pane_takes_the_score_apart_and_leaves_the_sink_uncoloured(opened):
    result, page = opened
    top = int(np.argmax(result.scores))
    figures = page.value("[...document.querySelectorAll('.reading .parts .figure')].map(n => n.textContent)")
    total = page.value("document.querySelector('.reading .parts b').textContent")
    parts = result.parts().loc[top] * result.leading.scales[top]
    assert [figure.split()[0] for figure in figures] == [kind for kind, amount in parts.items() if amount]
    assert np.allclose([seen(figure.split()[1]) for figure in figures], parts[parts != 0], rtol=0.02)
    assert np.isclose(seen(total.removeprefix("= ")), result.times_null[top], rtol=0.02)
    assert f"carries {result.sink_shares[top]:.0%}" in page.value(
        "document.querySelector('.reading .parts').textContent"
    )
    sink = page.value(
        "(s => [s.className, s.style.background])(document.querySelector('.reading .tokens span'))"
    )
    assert "sink" in sink[0] and sink[1] == ""


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    "A result with an effect, a gap and replicates, beside one that was scored once."
    _, base = sunk()
    random, card = np.random.default_rng(2), replace(GRADIENT, effect=-0.5, unit="nats", gap=4.0)
    replicates = (
        np.arange(6.0)[:, None] - 2 + random.normal(size=(6, 4)) * [[0.1], [2], [0.2], [1], [0.3], [3]]
    )
    result = Attribution(base.conversations, replicates.mean(1), card, replicates=replicates)
    once = Attribution(base.conversations, np.arange(6.0), replace(GRADIENT, method="Once"))
    path = tmp_path_factory.mktemp("page") / "browser.html"
    page_of = offline_page(
        "Units", BROWSER_SCRIPTS, "mountEmbedded", embedded_browser(result, [once]), 600, "x"
    )
    page_of.save(path)
    with Chromium() as browser:
        page = browser.open(path.as_uri(), width=1280)
        page.wait("document.querySelector('.rows .whisker') !== null")
        yield result, page
        assert page.errors == []


def test_whiskers_are_the_intervals_on_one_axis_and_the_raw_effect_is_in_the_title(repeated):
    result, page = repeated
    leading, order = result.leading, np.argsort(-result.scores, kind="stable")
    drawn = page.value(
        f"{ROWS}.map(row => (w => [w.title, ...['.range', '.dot'].map(part => (b => [b.left, b.right])("
        "w.querySelector(part).getBoundingClientRect())), (b => [b.left, b.right])"
        "(w.getBoundingClientRect())])"
        "(row.querySelector('.whisker')))"
    )
    reach = (np.abs(leading.values) + leading.halves).max()
    for place, (title, ends, dot, box) in zip(order, drawn):
        value, half = leading.values[place], leading.halves[place]
        told = [seen(word) for word in title.removeprefix("95 % interval ").split(" % ")[0].split(" to ")]
        assert np.allclose(told, [value - half, value + half], rtol=0.01) and "% of the gap" in title
        pixel = (box[1] - box[0]) / 2 / reach
        middle = (box[0] + box[1]) / 2
        assert abs(ends[0] - (middle + (value - half) * pixel)) < 0.6
        assert abs((dot[0] + dot[1]) / 2 - (middle + value * pixel)) < 0.6
        assert ends[1] - ends[0] >= 2 and abs(ends[1] - ends[0] - max(2, 2 * half * pixel)) < 0.6
    titles = page.value(f"{ROWS}.map(row => row.querySelector('.distance').title)")
    for place, title in zip(order, titles):
        score, effect = title.removeprefix("raw score ").split(", ")
        assert np.isclose(seen(effect), -result.effects[place], rtol=1e-3) and effect.endswith(" nats")
        assert np.isclose(seen(score), result.scores[place], rtol=1e-4)


def test_the_count_stands_above_the_list_of_the_method_that_has_one(repeated):
    result, page = repeated
    note = "document.querySelector('.count-note')"
    assert result.chance_words.startswith("With 95 % each")
    assert page.value(f"{note}.textContent") == result.chance_words
    choose = (
        "(s => { s.value = '%d'; s.dispatchEvent(new Event('change')); })"
        "(document.querySelector('select[aria-label=Method]'))"
    )
    page.value(choose % 1)
    page.wait("document.querySelector('.rows .whisker') === null")
    assert page.value(f"{note}.hidden")
    page.value(choose % 0)
    page.wait("document.querySelector('.rows .whisker') !== null")


def test_the_histogram_draws_the_null_of_the_method_that_has_one(opened):
    _, page = opened
    line = "document.querySelector('.chart path.null') !== null"
    words = "document.querySelector('.null-words').textContent"
    assert page.value(line) and "50 random directions" in page.value(words)
    choose = (
        "(s => { s.value = '%d'; s.dispatchEvent(new Event('change')); })"
        "(document.querySelector('select[aria-label=Method]'))"
    )
    page.value(choose % 1)
    page.wait(f"!({line})")
    assert page.value("document.querySelector('.null-words').hidden")
    assert set(page.value(f"{ROWS}.map(row => row.querySelector('.distance').textContent)")) == {""}
    page.value(choose % 0)
    page.wait(line)
