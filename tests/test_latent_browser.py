"""Latents as a scatter: told of them is what the ranking says; brush, table and texts in a browser."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_tda.concepts.diffing import LatentSide, PairedLatents, StagedLatents, novel_latents, read_pair
from concept_tda.concepts.stages import FiringText
from concept_tda.views.contents import WidgetError, front_end
from concept_tda.views.latents import LATENT_SCRIPTS, LatentBrowser, latent_table

from chromium import Chromium, needs_browser
from planted import Planted, exact_crosscoder


@pytest.fixture(scope="module")
def by_stages():
    draw = np.random.default_rng(0)
    cosines = 1 - np.abs(draw.normal(scale=0.02, size=(4, 60)))
    cosines[:2, :6] = draw.uniform(0.2, 0.6, size=(2, 6))
    alive = np.ones(60, bool)
    alive[50:] = False
    side = LatentSide(
        torch.ones(20, 4), torch.ones(20, 60), torch.ones(60, 4), torch.zeros(4), torch.ones(60)
    )
    pair = PairedLatents(side, side, (1,), torch.ones(1), torch.ones(4))
    return novel_latents("stage-wise", StagedLatents(pair, *cosines, alive))


@pytest.fixture(scope="module")
def by_cosine():
    world = Planted()
    return novel_latents("decoder cosine", read_pair(exact_crosscoder(world), world.draw(3000, seed=1)))


def a_text(latent, word="<b>|</b>"):
    return FiringText(
        latent, "row-7", ["see ", word, " here"], np.array([0, 0.5, 0], "f4"), np.array([0, 4, 1], "f4")
    )


def test_each_latent_stands_where_the_ranking_has_it(by_stages, by_cosine):
    told, table = latent_table(by_stages), by_stages.table
    assert [row["latent"] for row in told["rows"]] == table["latent"].tolist()
    for place, column in (("x", "cos_D_DF"), ("y", "cos_M_MF")):
        at = np.array([row[place] for row in told["rows"]])
        assert np.corrcoef(at, table[column])[0, 1] > 0.99999 and at.min() >= 0 and at.max() <= 1
    kinds = np.array([row["kind"] for row in told["rows"]])
    assert (kinds == np.where(table["alive"], np.where(table["novel"], 0, 1), 2)).all()
    assert {row["latent"] for row, kind in zip(told["rows"], kinds) if kind == 2} == set(range(50, 60))
    plain = latent_table(by_cosine)
    rates = by_cosine.table["rate_tuned"]
    rates = np.log10(np.maximum(rates, rates[rates > 0].min()))
    assert np.corrcoef([row["x"] for row in plain["rows"]], rates)[0, 1] > 0.99999
    assert plain["contour"] == plain["lines"] == []


def test_beyond_the_lines_and_nowhere_else_a_latent_is_novel(by_stages):
    told = latent_table(by_stages)
    across, up = (line["at"] for line in told["lines"])
    for row in told["rows"]:
        if row["kind"] == 0:
            assert row["x"] <= across + 1e-3 and row["y"] <= up + 1e-3
    corners = np.array(told["contour"])
    assert len(corners) > 2 and corners.min() > 0.5  # the floor lies at the upper right


def test_a_selection_is_latents_and_becomes_concepts(by_cosine):
    view = LatentBrowser(by_cosine)
    view.select([13, 12])
    assert view.selection["latent"].isin([12, 13]).all() and len(view.concepts()) == 2
    wanted = by_cosine.directions()[view.selection["latent"].iloc[0]]
    assert view.concepts()[0].cosine(wanted) == pytest.approx(1, abs=1e-6)
    for words, call in (
        ("there is no latent 16", lambda: view.select([16])),
        ("nothing is selected", lambda: LatentBrowser(by_cosine).concepts()),
        ("pass stages.novel", lambda: LatentBrowser(by_cosine.table)),
    ):
        with pytest.raises(WidgetError, match=words):
            call()


def test_numbers_that_are_none_travel_as_null_and_the_page_asks_for_nothing(by_stages):
    nan = replace(by_stages, table=by_stages.table.assign(nu_error=np.nan))
    page = LatentBrowser(nan, [a_text(1)]).page()
    assert "NaN" not in page.html.partition('type="application/json"')[2].partition("</script>")[0]
    script = front_end(*LATENT_SCRIPTS)
    assert "innerHTML" not in script and "http://" not in script.replace("http://www.w3.org", "")


@pytest.fixture(scope="module")
def page(by_stages, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "latents.html"
    LatentBrowser(by_stages, [a_text(by_stages.novel[0])]).page().save(path)
    with Chromium() as browser:
        page = browser.open(path.as_uri())
        page.wait("document.querySelector('.mapplot canvas').width > 100")
        yield page


@needs_browser
def test_a_click_opens_the_texts_in_both_models(page, by_stages):
    page.click(".latent-list tbody button")
    texts = page.value("[...document.querySelectorAll('.firing .tokens')].map(node => node.textContent)")
    assert texts == ["see <b>|</b> here"] * 2  # escaped, once for each model
    roles = page.value("[...document.querySelectorAll('.firing .role')].map(node => node.textContent)")
    assert roles == ["base model: 0.5 at most", "fine-tuned model: 4 at most"]
    grounds = page.value(
        "[...document.querySelectorAll('.firing .tokens span')].map(one => one.style.background)"
    )
    assert grounds[0] == grounds[3] == "" and "0.7" in grounds[4] and "0.087" in grounds[1]
    assert f"Latent {by_stages.novel[0]}, novel" in page.value(
        "document.querySelector('.told-line').textContent"
    )
    assert page.errors == [] and len(page.requests) == 1


@needs_browser
def test_a_brush_over_the_corner_lists_what_is_in_it(page, by_stages):
    table = latent_table(by_stages)
    x, y, width, height = page.box(".mapplot canvas")
    page.drag(x + 1, y + height / 2, x + width / 2, y + height - 1)
    wanted = {row["latent"] for row in table["rows"] if row["x"] < 0.5 and row["y"] < 0.5}
    listed = page.value(
        "[...document.querySelectorAll('.latent-list tbody button')].map(one => one.textContent)"
    )
    assert wanted == set(map(int, listed)) == set(range(6))
    page.press("Escape")
    assert "Drag over" in page.value("document.querySelector('[role=status]').textContent")
    assert page.errors == []


@needs_browser
def test_the_legend_selects_a_kind_and_the_floor_is_drawn(page):
    page.value("[...document.querySelectorAll('.classes button')].at(-1).click()")
    listed = page.value(
        "[...document.querySelectorAll('.latent-list tbody button')].map(one => one.textContent)"
    )
    assert set(map(int, listed)) == set(range(50, 60))  # the dead
    points = page.value("document.querySelector('polygon.floor').getAttribute('points')")
    assert len(points.split()) > 2 and "NaN" not in points
