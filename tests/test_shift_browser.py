"""Shifts of a policy as a heat map: the page is told what they are; order, text, targets in a browser."""

import json
import re

import numpy as np
import pytest
import torch
from test_browser import StandIn

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.mechanisms.policies import Policy, PolicyPrompts, concept_features
from concept_tda.mechanisms.policy_shifts import Shifts
from concept_tda.model.loading import load_model
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.views.contents import WidgetError, front_end
from concept_tda.views.policies import (
    SHIFT_SCRIPTS,
    ShiftBrowser,
    quality_words,
    shift_numbers,
    shift_table,
    shifts_html,
)
from concept_tda.views.report import write_report

from chromium import Chromium, needs_browser
from tiny import tiny_pair

NASTY = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def asked():
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    texts = [[{"role": "user", "content": f"q {i}"}] for i in range(6)]
    return PolicyPrompts(lm, load_conversations([{"messages": one} for one in texts]), ["no", "Sorry"])


def made_up(asked, features=6, examples=30, noise=0.3, seed=0):
    """Shifts drawn at random, of a policy that is planted."""
    draw = np.random.default_rng(seed)
    names = [f"feature {i} {NASTY if i == 1 else ''}".strip() for i in range(features)]
    directions = [tensor_concept(torch.tensor(draw.normal(size=16)), 1, name=name) for name in names]
    reads, states = concept_features(directions), torch.tensor(draw.normal(size=(120, 16)))
    Y = reads.read(states) @ torch.tensor(draw.normal(size=features)) + np.log(0.5)
    Y = Y + noise * torch.tensor(draw.normal(size=120))
    texts = [
        [
            {"role": "user", "content": f"question {i} {NASTY}"},
            {"role": "assistant", "content": f"answer {i} {NASTY}"},
        ]
        for i in range(examples)
    ]
    pairs = load_conversations([{"messages": one} for one in texts])
    sizes = draw.gamma(1.0, size=(examples, 1))
    by_features, by_behaviour = (draw.normal(size=(examples, features)) * sizes for _ in range(2))
    policy = Policy(asked, reads, states, Y[:, None], 5.0, "a model")
    return Shifts(policy, list(pairs.ids), by_features, by_behaviour, "tangent", pairs)


@pytest.fixture(scope="module")
def shifts(asked):
    return made_up(asked)


def parts_of(shifts, evidence=False):
    """X, Y and both [P, F], for ΔW or UΔW."""
    U = shifts.policy.U_FF.numpy() if evidence else np.eye(len(shifts.policy.features))
    parts = [shifts.by_features @ U, shifts.by_behaviour @ U]
    return {"features": parts[0], "behaviour": parts[1], "both": parts[0] + parts[1]}


# What the page is told


def test_the_page_is_told_the_shifts(shifts):
    told, names = shift_table(shifts), shifts.policy.features.names
    numbers = np.frombuffer(shift_numbers(shifts), "<f4").reshape(4, 30, 6)
    at = [names.index(feature["name"]) for feature in told["features"]]
    assert sorted(at) == list(range(6)) and (np.diff(shifts.policy.W_F.abs().numpy()[at]) <= 0).all()
    for evidence in (False, True):
        for part, found in zip(("features", "behaviour"), numbers[2 * evidence :]):
            assert np.allclose(found, parts_of(shifts, evidence)[part][:, at], rtol=1e-6)
    assert np.allclose(told["scores"], shifts.scores, rtol=1e-5)
    assert np.allclose(np.sum(told["parts"], 1), shifts.scores, rtol=1e-4, atol=1e-4)
    table = shifts.policy.table().set_index("feature")
    for feature in told["features"]:
        for key in ("weight", "low", "high"):
            assert feature[key] == pytest.approx(table.loc[feature["name"], key], rel=1e-5)
    assert told["ids"] == shifts.ids
    json.dumps(told, allow_nan=False)


def test_the_quality_is_that_of_the_policy(asked, shifts):
    quality = shifts.policy.quality
    verdict, figures = quality_words(shifts.policy)
    assert f"Right on {quality.loc['policy', 'accuracy left out']:.0%} of the prompts left out" in verdict
    assert f"the commoner answer on {shifts.policy.majority:.0%}" in verdict
    assert f"R² {quality.loc['policy', 'R² left out']:.2f} on prompts left out" in figures
    dense = quality.loc["ridge on the residual stream"]
    assert f"right on {dense['accuracy left out']:.0%}, with R² {dense['R² left out']:.2f}" in figures
    noise = made_up(asked, noise=100.0)
    assert shift_table(noise)["weak"] is True and shift_table(noise)["verdict"].startswith("WEAK")
    assert shift_table(shifts)["weak"] is False


def test_rows_and_targets_are_checked(shifts):
    names = shifts.policy.features.names
    view = ShiftBrowser(shifts, [names[2], names[2], names[0]])
    assert view.targets == [names[2], names[0]]
    assert view.interference.equals(shifts.interference([names[0], names[2]]))
    view.select(shifts.ids[7])
    assert view.row == 7 and view.pair.equals(shifts.pair(7))
    broken = Shifts(shifts.policy, shifts.ids, shifts.by_features * np.nan, shifts.by_behaviour, "tangent")
    for words, call in (
        ("there is no example 30: there are 0 to 29", lambda: view.select(30)),
        ("no feature 'nothing'", lambda: ShiftBrowser(shifts, ["nothing"])),
        ("no example is open", lambda: ShiftBrowser(shifts).pair),
        ("no feature is ticked", lambda: ShiftBrowser(shifts).interference),
        ("pass what PolicyShift", lambda: ShiftBrowser(shifts.policy)),
        (f"by example {shifts.ids[0]} has numbers that are not finite", lambda: ShiftBrowser(broken)),
    ):
        with pytest.raises(WidgetError, match=words):
            call()


def test_long_texts_are_cut_and_counted(shifts):
    text = ShiftBrowser(shifts, most=8).texts[3]
    assert [turn["text"] for turn in text["turns"]] == ["question", "answer 3"]
    assert text["cut"] == sum(len(turn["content"]) - 8 for turn in shifts.examples[3].messages)
    together = Shifts(shifts.policy, ["3 together"], shifts.total[:1], shifts.total[:1], "tangent")
    assert ShiftBrowser(together).texts == [{"turns": [], "cut": 0}]


def cells_of(table):
    """Rows of a drawn table: a name, and the class and the text of every cell."""
    rows = re.findall(r"<tr><th scope='row' class='words'>(.*?)</th>(.*?)</tr>", table, re.S)
    return {name: re.findall(r"<td(?: class='(.*?)')?>(.*?)</td>", cells) for name, cells in rows}


def test_without_a_script_the_same_shifts_are_drawn(shifts):
    drawn = shifts_html(ShiftBrowser(shifts), each=4, features=3)
    told, order = shift_table(shifts), np.argsort(-shifts.scores)
    weights, heat, *pairs = (cells_of(part) for part in drawn.split("<table>")[1:])
    assert "8 of 30 examples, 3 of 6 features" in drawn and len(pairs) == drawn.count("<details>") == 8
    for one, found in zip(told["features"], weights.values(), strict=True):
        assert [float(text) for _, text in found[:3]] == pytest.approx(
            [one["weight"], one["low"], one["high"]], abs=5e-4
        )
        assert found[3][1] == ("holds zero" if one["low"] <= 0 <= one["high"] else "beyond zero")
    shown = [*order[:4], *order[-4:]]
    assert list(heat) == [shifts.ids[row] for row in shown]
    columns = [shifts.policy.features.names.index(one["name"]) for one in told["features"]][:3]
    for row, cells, pair in zip(shown, heat.values(), pairs, strict=True):
        assert float(cells[0][1]) == pytest.approx(shifts.scores[row], rel=6e-3)
        for column, (shade, text) in zip(columns, cells[1:], strict=True):
            value = shifts.total[row, column]
            assert float(text) == pytest.approx(value, rel=0.06)
            level = round(9 * abs(value) / np.abs(shifts.total).max())
            assert shade == (f"{'p' if value > 0 else 'n'}{level}" if level else "")
        first = shifts.pair(int(row)).iloc[0]
        assert float(next(iter(pair.values()))[3][1]) == pytest.approx(first["shift"], rel=6e-3)
    assert "<img" not in drawn and "&lt;img src=x" in drawn
    assert "992 characters left out" in shifts_html(
        Shifts(shifts.policy, ["long"], shifts.total[:1], shifts.total[:1], "tangent", told_long()), most=8
    )


def told_long():
    """One example with a thousand characters."""
    return load_conversations([{"prompt": "short", "response": "x" * 1000}])


def test_a_report_holds_the_shifts_where_they_are_given(shifts, tmp_path):
    result = Attribution(shifts.examples, shifts.scores, QueryCard("a method", "refusing"))
    page = write_report(result, tmp_path / "with.html", shifts=shifts).read_text()
    assert page.count('id="policy"') == 1 and 'href="#policy"' in page and shifts_html(shifts) in page
    assert 'id="policy"' not in write_report(result, tmp_path / "without.html").read_text()
    broken = Shifts(shifts.policy, shifts.ids, shifts.by_features * np.nan, shifts.by_behaviour, "tangent")
    for wrong, words in ((shifts.policy, "no table of shifts"), (broken, "not finite")):
        with pytest.raises(WidgetError, match=words):
            write_report(result, tmp_path / "wrong.html", shifts=wrong)
    assert not (tmp_path / "wrong.html").exists()


def test_the_page_asks_for_nothing():
    script = front_end(*SHIFT_SCRIPTS, "shifts_widget.js")
    assert "innerHTML" not in script and "http" not in script and "fetch(" not in script


# In a browser


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


def opened(chromium, view, tmp_path_factory, **window):
    path = tmp_path_factory.mktemp("page") / "shifts.html"
    view.page().save(path)
    page = chromium.open(path.as_uri(), **window)
    page.wait("document.querySelector('.heat-row .heat-cell')")
    return page


@pytest.fixture
def page(chromium, shifts, tmp_path_factory):
    names = shifts.policy.features.names
    page = opened(chromium, ShiftBrowser(shifts, [names[0], names[1]]), tmp_path_factory)
    yield page
    assert page.errors == [] and len(page.requests) == 1 and page.value("document.title") != "broken"
    page.close()


def number(text):
    return float(text.replace("−", "-"))


def rows(page):
    """Numbers of the examples drawn, in their order on the page."""
    texts = page.value(
        "[...document.querySelectorAll('.heat-row')].sort((a, b) => parseFloat(a.style.top) - "
        "parseFloat(b.style.top)).map(row => row.querySelector('.snippet').textContent)"
    )
    return [int(re.match(r"question (\d+) ", text)[1]) for text in texts]


def cells(page):
    """The numbers of the cells drawn [rows, features], and the names of the features."""
    labels = page.value(
        "[...document.querySelectorAll('.heat-row')].sort((a, b) => parseFloat(a.style.top) - "
        "parseFloat(b.style.top)).map(row => "
        "[...row.querySelectorAll('.heat-cell')].map(cell => cell.getAttribute('aria-label')))"
    )
    names = [label.rpartition(": ")[0] for label in labels[0]]
    return np.array([[number(label.rpartition(": ")[2]) for label in row] for row in labels]), names


def full_colour(values):
    """The size beyond which a cell has the full colour."""
    return np.quantile(np.abs(values), 0.99, method="higher")


def choose(page, label, value):
    page.value(
        f"(() => {{ const pick = document.querySelector('select[aria-label=\"{label}\"]'); "
        f"pick.value = {json.dumps(value)}; pick.dispatchEvent(new Event('change')); }})()"
    )


@needs_browser
def test_cells_are_the_shifts_in_every_part_and_view(page, shifts):
    names = shifts.policy.features.names
    for evidence in (False, True):
        if evidence:
            page.click("input.evidence")
        for part, wanted in parts_of(shifts, evidence).items():
            choose(page, "Part of the shift", part)
            drawn, order = cells(page)
            at = [names.index(name) for name in order]
            assert np.allclose(drawn, wanted[np.ix_(rows(page), at)], rtol=1e-3)
            suffix = {"features": "_X", "behaviour": "_Y", "both": ""}[part]
            legend = page.value("document.querySelector('.shift-left .legend').textContent")
            assert legend.startswith(f"{'U' if evidence else ''}ΔW{suffix}, per unit of learning rate")
            end = number(re.search(r"([+−][\d.e+-]+) or more", legend)[1])
            assert end == pytest.approx(full_colour(wanted), rel=0.05)


@needs_browser
def test_colours_follow_sign_and_size(page, shifts):
    drawn, _ = cells(page)
    grounds = page.value(
        "[...document.querySelectorAll('.heat-row')].sort((a, b) => parseFloat(a.style.top) - "
        "parseFloat(b.style.top)).flatMap(row => "
        "[...row.querySelectorAll('.heat-cell')].map(cell => cell.style.background))"
    )
    drawn, limit = drawn.ravel(), full_colour(shifts.total)
    for value, colour in zip(drawn, grounds):
        if abs(value) > 0.06 * limit:
            assert ("--more" in colour) == (value > 0) and ("--less" in colour) == (value < 0)
        if abs(value) < 0.04 * limit:
            assert colour == ""
    assert "0.7" in grounds[int(np.abs(drawn).argmax())]


@needs_browser
def test_every_order_is_that_of_the_numbers(page, shifts):
    names = shifts.policy.features.names
    against = shifts.interference(names[:2])
    drawn, order = cells(page)
    values = {
        "score": shifts.scores,
        "size": np.abs(shifts.total).sum(1),
        "off": against.off_target.to_numpy(),
        "flag": np.where(against.flag, 1 + against.off_target, 0),
        "file": -np.arange(30.0),
    } | {str(at): shifts.total[:, names.index(name)] for at, name in enumerate(order)}
    for by, wanted in values.items():
        choose(page, "Order", by)
        shown = rows(page)
        assert shown == np.argsort(-wanted, kind="stable")[: len(shown)].tolist(), by
        assert len(shown) > 12
    page.value("[...document.querySelectorAll('.heat-name')].at(2).click()")
    column = shifts.total[:, names.index(order[2])]
    assert rows(page)[:5] == np.argsort(-column)[:5].tolist()
    assert page.value("document.querySelector('[aria-sort]').textContent").startswith(order[2])
    page.value("[...document.querySelectorAll('.heat-name')].at(2).click()")  # the other way round
    assert rows(page)[:5] == np.argsort(column)[:5].tolist()
    assert "smallest first" in page.value("document.querySelector('.filters button').textContent")


@needs_browser
def test_a_click_opens_text_and_decomposition(page, shifts):
    page.click(".heat-row:nth-child(3) .snippet")
    row = rows(page)[2]
    reading = page.value("document.querySelector('.shift-reading').textContent")
    assert f"question {row} {NASTY}" in reading and f"answer {row} {NASTY}" in reading  # as text
    assert f"#3 of {len(shifts.ids)}" in reading and shifts.ids[row] in reading
    against = shifts.interference(shifts.policy.features.names[:2]).loc[row]
    assert f"{100 * against.off_target:.0f} % of Σ|ΔW| is off target" in reading
    assert ("not meant to move" in reading) == bool(against.flag)
    found = shifts.pair(row)
    for evidence, column in ((False, "shift"), (True, "evidence")):
        if evidence:
            page.click("input.evidence")
        lines = page.value(
            "[...document.querySelectorAll('.shift-bars li')].map(line => "
            "[line.querySelector('bdi').textContent, line.title, line.querySelector('.tag')?.textContent])"
        )
        wanted = found.sort_values(column, key=np.abs, ascending=False).set_index("feature")
        assert [name for name, _, _ in lines] == wanted.index.tolist()
        for name, words, tag in lines:
            both, x, y = map(number, re.findall(r"[+−][\d.e+-]+", words))
            assert both == pytest.approx(wanted.loc[name, column], rel=1e-3)
            place = shifts.policy.features.names.index(name)
            parts = parts_of(shifts, evidence)
            assert x == pytest.approx(parts["features"][row, place], rel=1e-3)
            assert y == pytest.approx(parts["behaviour"][row, place], rel=1e-3)
            assert (tag == "off target") == (name not in shifts.policy.features.names[:2])
    bars = page.value(
        "[...document.querySelectorAll('.shift-bars li:first-child rect')].map(bar => "
        "[bar.getAttribute('class'), parseFloat(bar.getAttribute('width'))])"
    )
    top = wanted.index[0]
    sizes = [
        parts_of(shifts, True)[p][row, shifts.policy.features.names.index(top)]
        for p in ("features", "behaviour")
    ]
    assert [kind.split()[1] for kind, _ in bars] == ["more" if size > 0 else "less" for size in sizes]
    assert bars[0][1] / bars[1][1] == pytest.approx(abs(sizes[0] / sizes[1]), rel=1e-3)


@needs_browser
def test_ticking_a_feature_holds_the_examples_against_it(page, shifts):
    names = shifts.policy.features.names
    shown = page.value(
        "[...document.querySelectorAll('.weights-of-policy li bdi')].map(one => one.textContent)"
    )
    order = np.argsort(-shifts.policy.W_F.abs().numpy()).tolist()
    assert shown == [names[at] for at in order]
    page.click(f".weights-of-policy li:nth-child({shown.index(names[4]) + 1}) input")
    against = shifts.interference([names[0], names[1], names[4]])
    told = page.value("document.querySelector('.weights-of-policy p').textContent")
    assert f"3 features ticked as meant to move; {against.flag.sum()} examples of 30" in told
    off = page.value("[...document.querySelectorAll('.heat-row .off')].map(one => parseFloat(one.title))")
    assert np.allclose(off, 100 * against.off_target[rows(page)], rtol=1e-3)
    flags = page.value(
        "[...document.querySelectorAll('.heat-row .flag')].map(one => one.textContent === '⚑')"
    )
    assert flags == against.flag[rows(page)].tolist()


@needs_browser
def test_weights_stand_with_their_intervals(page, shifts):
    table = shifts.policy.table().set_index("feature")
    for name, words in page.value(
        "[...document.querySelectorAll('.weights-of-policy li')].map(line => "
        "[line.querySelector('bdi').textContent, line.querySelector('svg').getAttribute('aria-label')])"
    ):
        weight, low, high = map(number, re.findall(r"[+−][\d.e+-]+", words))
        for found, key in zip((weight, low, high), ("weight", "low", "high")):
            assert found == pytest.approx(table.loc[name, key], rel=6e-3)


@needs_browser
def test_keys_lead_through_the_map(page, shifts):
    page.value("document.querySelector('.heat').focus()")
    order = rows(page)
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.press(key)
    drawn, names = cells(page)
    current = "document.querySelector('.heat-row.current .snippet').textContent"
    assert page.value(current).startswith(f"question {order[1]} ")
    told = page.value("document.querySelector('.told-line').textContent")
    assert told.startswith(f"#2 by score, {names[1]}: ΔW ")
    assert number(re.search(r"ΔW (\S+) =", told)[1]) == pytest.approx(drawn[1][1], rel=1e-3)
    page.press("s")
    column = shifts.total[:, shifts.policy.features.names.index(names[1])]
    assert rows(page)[:4] == np.argsort(-column)[:4].tolist()
    page.press("End")
    assert page.value(current).startswith(f"question {column.argmin()} ")
    assert page.value("document.activeElement.className").startswith("heat")
    page.press("Tab")
    assert "shift-reading" in page.value("document.activeElement.className")


@needs_browser
@pytest.mark.parametrize("width", [390, 768, 1280])
@pytest.mark.parametrize("weak", [False, True])
def test_nothing_is_cut_and_the_quality_stays_in_sight(chromium, asked, tmp_path_factory, width, weak):
    shifts = made_up(asked, noise=100.0 if weak else 0.3)
    view = ShiftBrowser(shifts, shifts.policy.features.names[:1])
    view.select(2)
    page = opened(chromium, view, tmp_path_factory, width=width, height=700)
    wide = page.value(
        "[document.documentElement, ...document.querySelectorAll('.quality, .filters, .shift-reading, "
        ".parts, .weights-of-policy ol, .heat-side.corner, .shift-bars li')].filter(one => one.scrollWidth > "
        "one.clientWidth + 1).map(one => `${one.className}: ${one.scrollWidth} in ${one.clientWidth}`)"
    )
    assert wide == []
    assert page.value("document.querySelector('.quality').classList.contains('problem')") == weak
    page.value("window.scrollTo(0, 350)")
    top, bottom = page.value(
        "(() => { const box = document.querySelector('.quality').getBoundingClientRect(); "
        "return [box.top, box.bottom]; })()"
    )
    assert -1 <= top and bottom < 300
    words = page.value("document.querySelector('.quality').textContent")
    assert words == " ".join(quality_words(shifts.policy)) and words.startswith("WEAK") == weak
    assert "question 2 " in page.value("document.querySelector('.shift-reading').textContent")
    page.close()


@needs_browser
def test_a_thousand_examples_are_drawn_as_they_come_into_view(chromium, asked, tmp_path_factory):
    shifts = made_up(asked, features=40, examples=1000)
    page = opened(chromium, ShiftBrowser(shifts), tmp_path_factory)
    assert page.value("document.querySelectorAll('.heat-cell').length") < 40 * 40
    page.value("document.querySelector('.heat').focus()")
    page.press("End")
    page.wait("document.querySelector('.heat-row.current')")
    assert page.value("document.querySelectorAll('.heat-cell').length") < 40 * 40
    lowest = int(shifts.scores.argmin())
    assert page.value("document.querySelector('.heat-row.current .snippet').textContent").startswith(
        f"question {lowest} "
    )
    assert f"#{1000:,} of 1,000" in page.value("document.querySelector('.shift-reading h4').textContent")
    assert page.errors == []
    page.close()


@needs_browser
def until(stand_in, condition):
    """Let page and Python talk until something holds; a loaded machine may take its time."""
    for _ in range(40):
        stand_in.settle()
        if condition():
            return
    raise AssertionError("page and Python did not come to agree")


def test_row_and_targets_are_shared_with_python(chromium, shifts, tmp_path):
    view, names = ShiftBrowser(shifts), shifts.policy.features.names
    stand_in = StandIn(chromium, view, tmp_path, ["table", "numbers", "texts", "row", "targets"])
    stand_in.wait("document.querySelector('.heat-row .heat-cell')")
    # rows are drawn anew when their texts arrive, and a click between press and release would be lost
    stand_in.wait("(document.querySelector('.heat-row:nth-child(2) .snippet')?.textContent ?? '').length > 3")
    stand_in.page.click(".heat-row:nth-child(2) .snippet")
    until(stand_in, lambda: view.row == int(np.argsort(-shifts.scores)[1]))
    view.select(17)
    view.targets = [names[3]]
    stand_in.share()
    ticked = "document.querySelector('.weights-of-policy li:has(input:checked) bdi')?.textContent"
    until(stand_in, lambda: stand_in.value(ticked) == names[3])
    reading = "document.querySelector('.shift-reading')?.textContent ?? ''"
    until(stand_in, lambda: "question 17 " in stand_in.value(reading))
    assert view.row == 17 and view.targets == [names[3]]
    stand_in.page.click(".weights-of-policy input:checked")
    until(stand_in, lambda: view.targets == [])
    assert stand_in.page.errors == []
