"""The concept mixer: adding scores is scoring the mixed direction, in Python and in the page."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from test_atlas import ANSWERS, TRAIN, direction, make_lm
from test_browser import XSS, StandIn
from test_map import CLIPPED

from concept_tda.concepts.concept import LayerSweep, tensor_concept
from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.influence.atlas import AtlasError, build_atlas
from concept_tda.influence.scorers import ConceptInfluence
from concept_tda.model.tracing import pooled_activations
from concept_tda.results.metrics import score_percentiles
from concept_tda.views.contents import WidgetError, front_end
from concept_tda.views.explorer import ConceptExplorer
from concept_tda.views.mixer import ConceptMixer, mixed_concept

from chromium import Chromium, needs_browser

SCRIPTS = ("parts.js", "sources.js", "mixer.js")


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def train():
    return load_conversations(TRAIN)


@pytest.fixture(scope="module")
def answers():
    return load_conversations(ANSWERS)


@pytest.fixture(scope="module")
def atlas(lm, train, answers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas") / "atlas"
    return build_atlas(lm, answers, train, 2, folder=folder, curvature="identity", progress=False)


@pytest.fixture(scope="module")
def concepts(lm):
    return [direction(lm, 2, seed) for seed in range(3)]


@pytest.fixture
def mixer(atlas, concepts):
    return ConceptMixer(atlas, concepts)


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


# numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[1, 0, 0], [0.8, 0.5, -0.3], [-1, 0.01, 0.4], [0.3, 0.3, 0.3]])
def test_added_scores_are_those_of_the_method_for_the_mixed_direction(mixer, lm, train, answers, weights):
    mixer.mix({f"direction {number}": weight for number, weight in enumerate(weights)})
    own = ConceptInfluence(lm, mixer.concept, answers, sites="attention", curvature="identity")
    exact = own.score(train, progress=False).scores
    scale = np.abs(exact).max()
    assert np.abs(mixer.scores - exact).max() < 1e-6 * scale
    assert np.abs(mixer.result.scores - exact).max() < 1e-6 * scale
    assert mixer.result.card.behaviour == mixer.concept.name


def test_a_weight_counts_directions_and_not_their_lengths(atlas, lm):
    long, short = (
        tensor_concept(size * torch.eye(lm.width)[axis], 2, lm=lm, name=f"axis {axis}")
        for axis, size in ((0, 90.0), (1, 0.1))
    )
    found = mixed_concept({"a": long, "b": short}, [1, 1])
    assert torch.allclose(found.direction[:2], torch.tensor([0.5, 0.5]).sqrt().to(found.direction))
    assert np.isclose(found.norm, 2**0.5) and found.provenance["weights"] == {"a": 1, "b": 1}


@needs_browser
@pytest.mark.parametrize("seed", range(3))
def test_the_page_adds_as_python_does(chromium, mixer, seed):
    mixer.weights = np.random.default_rng(seed).uniform(-1, 1, 3).round(2).tolist()
    page = chromium.open("about:blank")
    columns = json.dumps(mixer.scores_NK.T.tolist())
    found = page.value(
        f"(() => {{ {front_end(*SCRIPTS)}; const columns = {columns}.map(one => Float64Array.from(one)); "
        f"const gram = {json.dumps(mixer.table['gram'])}; "
        f"return [...mixedScores({json.dumps(mixer.weights)}, gram, columns)]; }})()"
    )
    page.close()
    assert np.abs(np.array(found) - mixer.scores).max() < 1e-6 * np.abs(mixer.scores).max()


# the view -----------------------------------------------------------------------------------------


def ranking(page):
    """Rows of the examples that the page lists, those at the upper end and those at the lower."""
    return page.value(
        "[...document.querySelectorAll('.two > div')].map(end => [...end.querySelectorAll('summary')].map("
        "one => Number(one.textContent.match(/row ([\\d,]+)/)[1])))"
    )


def ends(scores, n=8):
    order = np.argsort(-scores, kind="stable")
    return [order[:n].tolist(), order[::-1][:n].tolist()]


@needs_browser
def test_a_slider_ranks_at_once_and_tells_python(chromium, tmp_path, mixer):
    view = StandIn(chromium, mixer, tmp_path, ["table", "columns", "saved", "weights"])
    view.wait("document.querySelector('.two .neighbour')")
    assert ranking(view.page) == ends(mixer.scores)
    before = ranking(view.page)
    view.value("document.querySelector('[aria-label=\"Weight of direction 2\"]').focus()")
    for _ in range(4):
        view.page.press("PageDown")
    view.page.press("ArrowLeft")
    view.settle()
    assert mixer.weights[0] == 1 and mixer.weights[1] == 0 and mixer.weights[2] < -0.3
    assert ranking(view.page) == ends(mixer.scores) != before
    mixer.mix({"direction 1": -1})
    view.share()
    view.settle()
    assert ranking(view.page) == ends(mixer.scores)
    dials = view.value("[...document.querySelectorAll('.dial')].map(dial => Number(dial.value))")
    assert dials == [0, -1, 0]
    top = int(np.argmax(mixer.scores))
    line = view.value("document.querySelector('.neighbour summary').textContent")
    assert mixer.conversations[top].response in line
    shown = mixer.scores[top] / mixer.scores.std()
    assert f"{shown:+.3g} spreads" in line and line.startswith("97.9 %")  # above 23 of 24, itself by half
    view.page.click(".neighbour summary")
    view.wait("document.querySelector('.neighbour .turn.answer')")
    assert TRAIN[top]["prompt"] in view.value("document.querySelector('.neighbour .turn').textContent")
    assert view.page.errors == []
    view.page.close()


@needs_browser
def test_one_null_serves_every_mixture(chromium, tmp_path, lm, atlas, train, answers, concepts):
    acts = pooled_activations(lm, train, 2, "response_mean", progress=False)[2]
    mixer = ConceptMixer(atlas, concepts, activations=acts)
    assert mixer.page().save(tmp_path / "mixer.html")
    for weights in ([1.0, 0.0, 0.0], [0.6, -0.3, 0.4]):
        mixer.weights = weights
        scorer = ConceptInfluence(lm, mixer.concept, answers, curvature="identity")
        expected = scorer.score(train, null=100, progress=False)
        assert np.allclose(mixer.scores / mixer.null_spreads, expected.times_null, rtol=1e-3)
    path = mixer.page().save(tmp_path / "mixer.html", overwrite=True)
    page = chromium.open(path.as_uri())
    page.wait("document.querySelector('.two .neighbour')")
    order, higher = np.argsort(-mixer.scores, kind="stable"), score_percentiles(mixer.scores[:, None])[:, 0]
    lines = page.value(
        "[...document.querySelectorAll('.two .neighbour summary')].map(one => one.textContent)"
    )
    for line, row in zip(lines, [*order[:8], *order[::-1][:8]]):
        times = f"{mixer.scores[row] / mixer.null_spreads[row]:+.3g}".replace("-", "−")
        assert line.startswith(f"{np.floor(10 * higher[row]) / 10:.1f} % {times} × null · row {row} ")
    titles = page.value("[...document.querySelectorAll('.two .neighbour b')].map(one => one.title)")
    assert all(title.startswith("raw score ") for title in titles)
    page.close()
    with pytest.raises(WidgetError, match=r"the null needs \[M, \d+\]"):
        ConceptMixer(atlas, concepts, activations=acts[:, :3])


@needs_browser
@pytest.mark.parametrize("width, dark", [(390, False), (768, True), (1280, False)])
def test_without_a_kernel_the_sliders_work(chromium, tmp_path, mixer, width, dark):
    mixer.weights = [0.6, 0, -0.4]
    path = mixer.page().save(tmp_path / "mixer.html")
    page = chromium.open(path.as_uri(), width=width, height=800, dark=dark)
    page.wait("document.querySelector('.two .neighbour')")
    assert ranking(page) == ends(mixer.scores)
    page.value(
        "(() => { const dial = document.querySelectorAll('.dial')[1]; dial.value = '0.75'; "
        "dial.dispatchEvent(new Event('input')); })()"
    )
    mixer.weights = [0.6, 0.75, -0.4]
    assert ranking(page) == ends(mixer.scores)
    said = page.value("document.querySelector('.mixer [role=status]').textContent")
    cosines = [
        float(mixer.concept.direction @ one.direction / mixer.concept.direction.norm())
        for one in mixer.concepts.values()
    ]
    assert all(f"{cosine:+.2g}".replace("-", "−") in said for cosine in cosines)
    assert f"{(mixer.scores > 0).sum()} of 24 examples raise it" in said
    page.value("document.querySelectorAll('.part button')[2].click()")
    mixer.weights = [0, 0, 1]
    assert ranking(page) == ends(mixer.scores)
    page.value(
        "(() => { const dial = document.querySelectorAll('.dial')[2]; dial.value = '0'; "
        "dial.dispatchEvent(new Event('input')); })()"
    )
    assert "All weights are 0" in page.value("document.querySelector('.mixer [role=status]').textContent")
    assert page.value("document.querySelectorAll('.neighbour').length") == 0
    page.value("document.querySelector('.part button').click()")
    page.value("document.querySelector('.neighbour').open = true")
    page.wait("document.querySelector('.neighbour .turn')")
    assert page.value(CLIPPED.replace(".ctda-view.map", ".ctda-view.mixer").replace(".one", "summary")) == []
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.errors == [] and page.requests == [path.as_uri()]
    page.close()


@needs_browser
def test_hostile_names_and_texts_stay_texts(chromium, tmp_path, lm, answers):
    texts = [text for text in XSS if text.strip() and text.isprintable() and len(text) < 200][:10]
    data = Conversations(
        [
            Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": text}))
            for text in texts
        ]
    )
    hostile = build_atlas(lm, answers, data, 2, folder=tmp_path / "a", curvature="identity", progress=False)
    named = [tensor_concept(torch.eye(lm.width)[i], 2, lm=lm, name=text) for i, text in enumerate(texts[:3])]
    path = ConceptMixer(hostile, named).page().save(tmp_path / "mixer.html")
    page = chromium.open(path.as_uri())
    page.wait("document.querySelector('.two .neighbour')")
    assert page.value("document.querySelectorAll('script').length") == 2
    assert page.value("document.querySelectorAll('#browser :is(script, img, iframe, a, svg)').length") == 0
    assert page.errors == [] and page.requests == [path.as_uri()]
    page.close()


# in the explorer, and refusals --------------------------------------------------------------------


def test_the_explorer_mixes_below_its_view(lm, atlas, train, concepts):
    plain = ConceptExplorer(lm, concepts, progress=False)
    assert plain.mixer is None and not any(isinstance(one, ConceptMixer) for one in plain.children)
    explorer = ConceptExplorer(lm, concepts[0], atlas=atlas, mix=concepts, train=train, progress=False)
    assert explorer.children[-1] is explorer.mixer and list(explorer.mixer.concepts) == [
        f"direction {number}" for number in range(3)
    ]
    table = pd.DataFrame({"layer": [1, 2], "auc": [0.9, 0.8], "d_prime": [2.0, 1.0]})
    sweep = LayerSweep("swept", "contrastive", table, {layer: direction(lm, layer) for layer in (1, 2)})
    mixed = ConceptExplorer(lm, sweep, atlas=atlas, progress=False).mixer
    assert mixed.concepts["swept"].layer == 2
    lower = LayerSweep("swept", "contrastive", table[:1], {1: direction(lm, 1)})
    with pytest.raises(WidgetError, match="no layer 2, which is the atlas's; it has 1"):
        ConceptMixer(atlas, lower)


def test_mixtures_that_cannot_be_are_refused(lm, atlas, train, answers, concepts):
    one = concepts[0]
    opposite = tensor_concept(-one.direction, 2, lm=lm, name="opposite")
    cancelled = ConceptMixer(atlas, [one, opposite])
    cancelled.weights = [0.5, 0.5]
    other = train.select(range(20))
    for call, error, words in (
        (lambda: cancelled.concept, WidgetError, "cancel"),
        (lambda: cancelled.scores, WidgetError, "cancel"),
        (
            lambda: ConceptMixer(atlas, [direction(lm, 1)]),
            AtlasError,
            "layer 1, this atlas answers for layer 2",
        ),
        (lambda: ConceptMixer(atlas, [direction(lm, 2, pooling="prompt_last")]), AtlasError, "pooling"),
        (lambda: ConceptMixer(atlas, [tensor_concept(torch.ones(5), 2, name="five")]), AtlasError, "width 5"),
        (lambda: ConceptMixer(atlas, concepts, data=other), WidgetError, "24 examples), not of"),
        (lambda: ConceptMixer(atlas, []), WidgetError, "no concept"),
        (lambda: ConceptMixer(atlas, ["evil"]), WidgetError, "str is not a concept"),
        (lambda: ConceptMixer(atlas, concepts, weights=[1, 2]), WidgetError, "give 3 finite numbers"),
        (lambda: setattr(cancelled, "weights", [np.nan, 1]), WidgetError, "give 2 finite numbers"),
        (lambda: cancelled.mix({"envy": 1}), WidgetError, "no concept 'envy' here"),
        (lambda: cancelled.page(height=3), WidgetError, "height=3"),
        (lambda: ConceptExplorer(lm, concepts, mix=concepts, progress=False), WidgetError, "needs an atlas"),
        (lambda: ConceptExplorer(lm, one, atlas=atlas, train=other, progress=False), WidgetError, "not of"),
    ):
        with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
            call()
    assert cancelled.weights == [0.5, 0.5]


@pytest.mark.parametrize("message", [{"kind": "drop"}, {"kind": "examples", "places": [24]}, {}])
def test_senseless_messages_get_an_answer(mixer, message):
    sent = []
    mixer.send = lambda content, buffers=None: sent.append(content)
    mixer._handle_custom_msg({**message, "number": "m-1"}, [])
    assert sent[0]["reply"] == "m-1" and sent[0]["error"]


def test_the_scripts_parse_no_markup_and_ask_for_nothing():
    script = front_end("mixer.js", "mixer_widget.js")
    for sink in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "fetch(",
        "import(",
    ):
        assert sink not in script, sink
    assert "http" not in script and "url(" not in front_end("mixer.css")
