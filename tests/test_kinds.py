"""Kinds of example: which bars are drawn, and one decision for each example in all its kinds."""

import re

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from test_attribution import HOSTILE

from concept_tda.data.conversations import load_conversations
from concept_tda.groups.groups import GroupError, Groups, score_groups
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.views.contents import WidgetError
from concept_tda.views.kinds import KindBrowser, bar_svg, chosen_groups

from chromium import Chromium, needs_browser

N = 12
SETS = {"salt and iron": [0, 1, 2, 3], "Iron": [2, 3, 4], "one": [5], "rust": [6, 7, 8, 9, 10]}


def scored(sets=SETS, texts=None):
    records = [
        {"prompt": f"question {i}", "response": f"answer {i}", "good": i % 2 == 0, "text": "same"}
        for i in range(N)
    ]
    if texts:
        for record, text in zip(records, texts):
            record["response"] = text
    data = load_conversations(records)
    places = tuple(zip(*[(row, column) for column, rows in enumerate(sets.values()) for row in rows]))
    groups = Groups(
        data, list(sets), csr_matrix((np.ones(len(places[0]), bool), places), (N, len(sets))), "x"
    )
    result = Attribution(data, np.arange(N, 0, -1.0) - 6.5, QueryCard("any", "any", zero="gradient"))
    return score_groups(groups, result, labels="good", deals=20)


def drawn(browser):
    return [line.children[0].description for line in browser.bars.children]


def test_bars_are_sorted_filtered_and_cut_from_both_ends():
    found = scored()
    browser = found.inspect()
    assert isinstance(browser, KindBrowser)
    assert drawn(browser) == ["salt and iron", "Iron", "one", "rust"] and browser.kind == "salt and iron"
    browser.words.value = "iron"
    assert drawn(browser) == ["salt and iron", "Iron"]
    browser.words.value = "IRON salt"
    assert drawn(browser) == ["salt and iron"]
    browser.words.value = "lead"
    assert drawn(browser) == [] and "No group fits" in browser.legend.value
    browser.words.value, browser.order.value = "", "mean"
    assert drawn(browser) == list(found.table.sort_values("mean", ascending=False)["group"])
    browser.most.value = 3
    assert len(drawn(browser)) == 3 and drawn(browser)[-1] == "rust" and "3 of 4" in browser.legend.value
    browser.beyond.value = True
    assert drawn(browser) == list(found.table.query("p_adjusted < .05")["group"])
    assert len(chosen_groups(found, n=2)[0]) == 2 and chosen_groups(found, n=2)[1] == 4


def test_a_click_opens_the_examples_of_a_kind():
    browser = scored().inspect()
    browser.bars.children[2].children[0].click()
    assert browser.kind == "one" and browser.opened.children[0].result.rows.tolist() == [5]
    assert browser.opened.children[0].result.ranks.tolist() == [6]  # in the whole file
    assert browser.show("one") is browser.browsers["one"]
    browser._clicked("gone")
    assert "no group &#x27;gone&#x27;" in browser.heading.value and browser.kind == "one"


def test_an_example_has_one_decision_in_all_its_kinds():
    found = scored()
    browser = found.inspect(author="ada")
    browser.drop_button.click()
    assert browser.decisions["decision"].tolist() == ["drop"] * 4
    iron = browser.show("Iron")
    assert iron.decisions["decision"].to_dict() == {2: "drop", 3: "drop"}
    assert "salt and iron" in iron.decisions["why"][2]
    iron.decide([2], "keep", note="rare")
    iron.undo()
    iron.decide([3], "", note="look again")
    salt = browser.show("salt and iron")
    assert salt.decisions["decision"].to_dict() == {0: "drop", 1: "drop", 2: "drop", 3: ""}
    assert salt.decisions["note"][3] == "look again"
    told = browser.decisions
    assert told.index.tolist() == [0, 1, 2, 3] and set(told["by"]) == {"ada"}
    assert told["group"].to_dict()[0] == "salt and iron" and told["group"].to_dict()[3] == "Iron"
    data = found.groups.conversations
    assert browser.kept.ids == [data.ids[row] for row in range(N) if row not in (0, 1, 2)]
    assert "3 drop" in repr(browser)
    browser.decide("keep", "rust")
    assert browser.kind == "rust" and len(browser.decisions) == 9


def test_nothing_decided_is_an_empty_table_and_everything_dropped_is_refused():
    halves = scored({"first": list(range(6)), "last": list(range(6, N))})
    browser = halves.inspect()
    assert len(browser.decisions) == 0 and len(browser.kept) == N
    browser.decide("drop", "first"), browser.decide("drop", "last")
    with pytest.raises(WidgetError, match="nothing would be left"):
        browser.kept


def test_labels_reach_the_browser_also_where_all_of_a_kind_have_one():
    good = np.arange(N) % 2 == 0
    for labels in ("good", good):
        browser = scored({"even": [0, 2, 4], "mixed": [1, 2, 3], "odd": [1, 3]}).inspect(labels=labels)
        for name in ("even", "mixed", "odd"):
            assert browser.show(name).result.rows.tolist() == browser.found.groups.rows(name).tolist()
    with pytest.raises(WidgetError, match="5 entries; the scored file has 12"):
        scored().inspect(labels=good[:5])


def test_bars_are_drawn_from_zero_to_both_sides():
    drawing = bar_svg([3, -1], (-1, 4), "<x>")
    rects = re.findall(r"<rect x='([\d.]+)%' width='([\d.]+)%'", drawing)
    assert rects == [("20.00", "60.00"), ("0.00", "20.00")]  # 0 to 3, and -1 to 0
    assert "x1='20.00%'" in drawing and "x1='60.00%'" in drawing and "&lt;x&gt;" in drawing
    assert bar_svg([2], (0, 2), "x").count("<line") == 1


def test_wrong_questions_are_refused():
    found = scored()
    for call, error, words in (
        (lambda: found.inspect("size"), TypeError, "positional"),
        (lambda: found.inspect(by="size"), GroupError, "by='size'"),
        (lambda: found.inspect().show("gold"), GroupError, "no group 'gold'"),
        (lambda: found.inspect().page("tall"), WidgetError, "height='tall'"),
    ):
        with pytest.raises(error, match=words):
            call()


def test_names_and_texts_are_never_markup():
    names = [f"{text} {i}" for i, text in enumerate([*HOSTILE, "</title><script>alert(1)</script>"])]
    found = scored({name: [i % N, (i + 1) % N] for i, name in enumerate(names)}, texts=(HOSTILE * N)[:N])
    browser = found.inspect(n=50)
    assert len(browser.bars.children) == len(names)
    shown = browser.page(examples=2).html + browser.heading.value + browser.legend.value
    shown += "".join(line.children[1].value + line.children[2].value for line in browser.bars.children)
    assert not re.search("<script|<img|<iframe|<a ", shown)


@needs_browser
def test_a_page_without_a_kernel_unfolds(tmp_path):
    path = scored().inspect().page(examples=2).save(tmp_path / "kinds.html")
    with Chromium() as chromium:
        page = chromium.open(path.as_uri(), width=400, height=700)
        assert page.value("document.querySelectorAll('details').length") == 4
        assert page.value("document.querySelector('details .example').checkVisibility()") is False
        page.click("summary.kind")
        assert page.value("document.querySelector('details .example').checkVisibility()") is True
        assert page.value("document.querySelectorAll('details[open] .example').length") == 2
        assert page.value("document.documentElement.scrollWidth") <= 400
        assert not page.errors and page.requests == [path.as_uri()]
