"""Responses of runs: closed forms of least squares, runs of logistic regression, loops written out, units."""

import numpy as np
import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.curvature import EKFAC, CurvatureError, Factors
from concept_tda.influence.neighbours import AdamMoments
from concept_tda.influence.preconditioners import GaussNewton
from concept_tda.influence.queries import ConceptQuery, ContrastQuery, LossQuery
from concept_tda.influence.responses import SOURCE, AdamResponse, Unrolled, gradient_size
from concept_tda.influence.scorers import ConceptInfluence, Influence, ScorerError
from concept_tda.model.finetuning import finetune, run_beginning, run_segments
from concept_tda.model.loading import LanguageModel, load_model
from concept_tda.model.sites import resolve_sites

from tiny import double_norms, tiny_pair


def least_squares(n=1500, n_in=4, n_out=3):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = draw(n, n_in) * torch.tensor([2.0, 1.0, 0.3, 0.1])
    y = x @ draw(n_in, n_out) + draw(n, n_out)
    values, Q_in = torch.linalg.eigh(x.T @ x / n)
    ekfac = EKFAC({"W": Factors(Q_in, torch.eye(n_out).double(), values.repeat(n_out, 1))}, damping=0.1)
    return x, y, ekfac, draw(n_out, n_in), torch.linalg.lstsq(x, y).solution.T


@pytest.mark.parametrize("n_steps", [5, 60, 4000])
def test_unrolled_is_the_change_of_a_run_that_stops(n_steps):
    x, y, ekfac, asked, W = least_squares()
    n, rates = len(x), [0.002] * n_steps
    gradients = torch.einsum("no,ni->noi", x @ W.T - y, x)
    q = Unrolled(ekfac, rates=rates, n_examples=n).precondition({"W": asked})["W"]
    effects, true = torch.einsum("oi,noi->n", q, gradients) / n, []
    hessian = x.T @ x / n
    for z in range(12):  # the run without example z, from the weights that fit all of them
        delta, own = torch.zeros_like(W), torch.outer(x[z], x[z]) / n
        for rate in rates:
            delta = delta - rate * (delta @ (hessian - own) - gradients[z] / n)
        true.append((delta * asked).sum())
    np.testing.assert_allclose(
        effects[:12], torch.stack(true), rtol=0.02, atol=0.002 * float(max(map(abs, true)))
    )


def test_a_run_without_end_is_the_inverse_and_a_short_one_the_identity():
    *_, ekfac, asked, _ = least_squares()
    response = lambda reach: Unrolled(ekfac, rates=[reach], n_examples=7).precondition({"W": asked})["W"]
    exact = ekfac.damped(1e-14, relative=False).precondition({"W": asked})["W"]
    torch.testing.assert_close(response(1e9), exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(response(1e-8), 1e-8 * asked, rtol=1e-6, atol=0)
    scaled = Unrolled(ekfac, rates=[0.3], n_examples=7, gradient_size=0.1).precondition({"W": asked})["W"]
    torch.testing.assert_close(scaled, response(3.0), rtol=1e-12, atol=0)


def segmented(asked, states, rates, n_segments, gradients_of, hessian_of, n):
    """Derivatives by the examples' weights over segments of a run, each linearised at its middle."""
    carried, found = {"W": asked}, 0.0
    for steps in reversed(np.array_split(np.arange(len(rates)), n_segments)):
        w = states[steps[len(steps) // 2]]
        values, Q_in = torch.linalg.eigh(hessian_of(w))
        factors = Factors(Q_in, torch.eye(len(asked)).double(), values.clamp(min=0).repeat(len(asked), 1))
        own = [rates[step] for step in steps]
        segment = Unrolled(EKFAC({"W": factors}), rates=own, n_examples=n)
        found = found - torch.einsum("noi,oi->n", gradients_of(w), segment.precondition(carried)["W"]) / n
        carried = segment.through(carried)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["logistic", "least squares"])
def test_segments_are_the_derivative_of_the_whole_run(kind, seed):
    """Gradient descent from zero with falling rates, and autograd through all of it."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    n, n_in, rates = 100, 4, [0.01 * (1 - t / 150) for t in range(150)]
    n_out = 1 if kind == "logistic" else 2
    x, asked, weights = (
        draw(n, n_in) * torch.tensor([3.0, 1.0, 0.5, 0.2]),
        draw(n_out, n_in),
        draw(n_in, n_out),
    )
    y = (x @ weights + draw(n, n_out) > 0).double() if kind == "logistic" else x @ weights + draw(n, n_out)
    said = torch.sigmoid if kind == "logistic" else lambda z: z
    bend = (lambda p: p * (1 - p)) if kind == "logistic" else torch.ones_like
    gradients_of = lambda w: torch.einsum("no,ni->noi", said(x @ w.T) - y, x)
    hessian_of = lambda w: x.T @ (x * bend(said(x @ w.T))[:, :1]) / n
    by, w, states = (
        torch.ones(n, dtype=torch.float64, requires_grad=True),
        torch.zeros(n_out, n_in).double(),
        [],
    )
    for rate in rates:
        states.append(w.detach())
        w = w - rate * torch.einsum("n,noi->oi", by, gradients_of(w)) / n
    (exact,) = torch.autograd.grad((asked * w).sum(), by)
    errors = []
    for n_segments in (1, 20):
        found = segmented(asked, states, rates, n_segments, gradients_of, hessian_of, n)
        errors.append(float((found - exact).norm() / exact.norm()))
    assert errors[1] < 0.02 and errors[0] > 2 * errors[1], errors


def test_one_segment_is_unrolled_and_more_are_a_written_out_loop():
    first, last = language_model(), language_model()
    with torch.no_grad():
        for weight in first.model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()
    data, asked = chats(8), LossQuery(chats(2, 40))
    options = dict(n_examples=8, gradient_size=1e-4)
    ekfacs = [EKFAC.fit(lm, data, "attention", cache=False, progress=False) for lm in (first, last)]
    one = SOURCE([last], asked, learning_rates=[3e-4], curvatures=ekfacs[1:], **options)
    plain = Unrolled(ekfacs[1], rates=[1e-4] * 3, n_examples=8, gradient_size=1e-4)
    expected = Influence(last, asked, curvature=plain).score(data, progress=False)
    found = one.score(data, tokens=True, progress=False)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-12)
    assert found.card.unit == "nats per token" and found.card.effect == -1 / 8
    np.testing.assert_allclose([t.sum() for t in found.token_scores], found.scores, rtol=1e-5)
    # two segments: matrices written out
    rates = [5e-4, 2e-4]
    both = SOURCE([first, last], asked, learning_rates=rates, curvatures=ekfacs, **options).score(
        data, progress=False
    )
    sites = resolve_sites(last, "attention")
    query, expected = asked.gradients(last, sites), np.zeros(8)
    for lm, ekfac, rate in zip((last, first), reversed(ekfacs), reversed(rates)):
        reach, met = rate / 1e-4, {}
        for name, f in ekfac.factors.items():
            coordinates, stiff = f.Q_out.T @ query[name] @ f.Q_in, f.eigenvalues.clamp(min=1e-12)
            met[name] = f.Q_out @ (coordinates * (1 - torch.exp(-stiff * reach)) / stiff) @ f.Q_in.T
            query[name] = f.Q_out @ (coordinates * torch.exp(-stiff * reach)) @ f.Q_in.T
        for row in range(8):
            gradients = LossQuery(data.select([row])).gradients(lm, resolve_sites(lm, "attention"))
            expected[row] += sum(float((met[name] * g).sum()) for name, g in gradients.items())
    np.testing.assert_allclose(both.scores, expected, rtol=1e-6)
    assert both.card.settings["learning_rates"] == rates
    assert not np.allclose(both.scores, found.scores, rtol=0.05)
    with pytest.raises(ScorerError, match="as many curvatures"):
        SOURCE([first, last], asked, learning_rates=rates, curvatures=ekfacs[:1], **options)


def test_a_run_says_its_segments_and_the_size_of_its_gradients(tmp_path):
    model, tokenizer = tiny_pair("llama")
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    lm, data, asked = load_model(tmp_path / "base"), chats(6), LossQuery(chats(2, 40))
    recipe = dict(rank=2, learning_rate=1e-3, batch_size=6, merge=False, progress=False)
    tuned = finetune(lm, data, tmp_path / "one", **recipe)  # a single step, on all the examples
    beginning = run_beginning(tmp_path / "one", lm)
    gradients = LossQuery(data).gradients(beginning, resolve_sites(beginning, "lora"))
    squares = sum(float(g.square().sum()) for g in gradients.values())
    n = sum(g.numel() for g in gradients.values())
    assert gradient_size(tmp_path / "one", tuned) == pytest.approx((squares / n) ** 0.5, rel=1e-4)
    with pytest.raises(CurvatureError, match="merge=False"):
        gradient_size(tmp_path / "one", lm)

    tuned = finetune(lm, data, tmp_path / "more", **recipe | dict(batch_size=1), checkpoints=3)
    pieces = run_segments(tmp_path / "more", lm, base=False)
    size = gradient_size(tmp_path / "more", tuned)
    by_hand = SOURCE(queries=asked, **pieces, n_examples=6, gradient_size=size, sites="lora")
    read = SOURCE.of_run(tmp_path / "more", lm, asked)
    expected, found = (one.score(data, progress=False) for one in (by_hand, read))
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-12)
    assert len(set(found.card.settings["learning_rates"])) > 1


@pytest.mark.parametrize("agreement", [True, False])
def test_adams_metric_is_a_written_out_loop(agreement):
    random = np.random.default_rng(0)
    shape, beta_1, beta_2, step = (3, 2), 0.9, 0.999, 12
    m, v = random.normal(size=shape) * 0.01, random.random(shape) * 1e-3
    v[1, 1] = 0
    m[1, 1] = 0
    moments = AdamMoments({"s": torch.tensor(m)}, {"s": torch.tensor(v)}, step)
    found = AdamResponse(moments, rates=[0.1, 0.2], n_examples=5, agreement=agreement)
    g = random.normal(size=shape)
    expected = np.zeros(shape)
    for i in range(3):
        for j in range(2):
            if v[i, j] == 0:
                continue
            m_hat, v_hat = m[i, j] / (1 - beta_1**step), v[i, j] / (1 - beta_2**step)
            free = max(0, 1 - m_hat**2 / v_hat) if agreement else 1
            expected[i, j] = 0.3 * free * g[i, j] / (v_hat**0.5 + 1e-8)
    np.testing.assert_allclose(found.precondition({"s": torch.tensor(g)})["s"], expected, rtol=1e-12)
    assert found.effect == -0.2


def test_adams_metric_is_the_derivative_of_adam_where_losses_are_linear():
    """Gradients that are drawn once: the end of a run by torch's Adam, by a shift of all of them."""
    generator = torch.Generator().manual_seed(1)
    T, P, rate = 3000, 40, 0.01
    gradients = torch.randn(T, P, generator=generator).double() + torch.linspace(-2, 2, P).double()

    def end(shift):
        weights = torch.zeros(P, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([weights], lr=rate)
        for one in gradients:
            weights.grad = one + shift
            optimizer.step()
        return weights.detach()

    measured = (end(0.01) - end(-0.01)) / 0.02
    mean, square = gradients.mean(0)[None], gradients.square().mean(0)[None]
    moments = AdamMoments({"s": mean}, {"s": square}, 10**6)
    ask = lambda agreement: AdamResponse(moments, rates=[rate] * T, n_examples=1, agreement=agreement)
    found = -ask(True).precondition({"s": torch.ones(1, P).double()})["s"][0]
    np.testing.assert_allclose(found, measured, rtol=0.15)
    assert (found - measured).abs().sum() < 0.2 * (-ask(False).response("s")[0] - measured).abs().sum()


def language_model():
    pair = tiny_pair("llama", dtype=torch.float64)
    return LanguageModel(double_norms(pair[0]), pair[1], "tiny")


def chats(n, start=0):
    return load_conversations(
        [
            {"prompt": f"Is {i} even?", "response": "no, odd" if i % 2 else "yes"}
            for i in range(start, start + n)
        ]
    )


def test_eigenvalues_have_the_scale_of_the_mean_loss():
    """What the unrolled formula multiplies by learning rates of the mean loss: their sum is the trace of its
    Gauss-Newton matrix, up to the sampling of labels."""
    lm, data = language_model(), chats(24)
    site = resolve_sites(lm, "attention")[0]
    ekfac = EKFAC.fit(lm, data, [site], cache=False, progress=False, seed=0)
    operator = GaussNewton(lm, data, [site])
    generator, traces = torch.Generator().manual_seed(0), []
    for _ in range(60):
        v = torch.randn(site.weight.shape, generator=generator, dtype=torch.float64).sign()
        traces.append(float((v * operator.product({site.name: v})[site.name]).sum()))
    assert abs(float(ekfac.factors[site.name].eigenvalues.sum()) / np.mean(traces) - 1) < 0.35


def test_scores_of_a_response_carry_a_unit_and_other_scores_do_not():
    lm, data = language_model(), chats(10)
    ekfac = EKFAC.fit(lm, data, "attention", cache=False, progress=False)
    ask = lambda **more: Influence(lm, LossQuery(chats(2, 40)), **more).score(data, progress=False)
    plain = ask(curvature=ekfac)
    assert plain.card.effect is None and plain.card.unit is None
    unrolled = ask(curvature=Unrolled(ekfac, rates=[1e-9] * 3, n_examples=10))
    assert unrolled.card.unit == "nats per token" and unrolled.card.curvature == "EK-FAC, unrolled"
    dots = ask(curvature="identity")
    np.testing.assert_allclose(unrolled.effects, -3e-9 * dots.scores / 10, rtol=1e-5)
    assert unrolled.card.gap is None  # a likelihood has no two sides; a contrast has
    shows, neutral = LossQuery(chats(2, 40)), LossQuery(chats(2, 60))
    sides = sorted([shows, neutral], key=lambda query: query.value(lm))
    response = Unrolled(ekfac, rates=[1e-9] * 3, n_examples=10)
    ahead, behind = (
        Influence(lm, ContrastQuery(*order), curvature=response).score(data, progress=False)
        for order in (sides[::-1], sides)
    )
    apart = sides[1].value(lm) - sides[0].value(lm)
    assert behind.card.gap is None and ahead.card.gap == pytest.approx(apart, rel=1e-5)
    np.testing.assert_allclose(ahead.leading.values, -100 * ahead.effects / apart, rtol=1e-5)
    divided = ask(curvature=ekfac, normalise="self-influence")
    assert divided.card.effect is None


def test_options_are_what_they_say():
    lm, data = language_model(), chats(6)
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(3))
    concept = tensor_concept(direction, layer=2, lm=lm, name="c")
    shown, neutral = chats(4, 20), chats(3, 31)
    ekfac = EKFAC.fit(lm, data, "attention", layer=2, cache=False, progress=False)
    ask = lambda queries=shown, curvature=ekfac, **more: ConceptInfluence(
        lm, concept, queries, curvature=curvature, **more
    ).score(data, progress=False)
    plain = ask()
    np.testing.assert_allclose(
        ask(neutral=neutral).scores, plain.scores - ask(neutral).scores, rtol=1e-7, atol=1e-12
    )
    for parts in (2, 3):  # of different sizes where three
        by_parts = ask(query_parts=parts)
        np.testing.assert_allclose(by_parts.scores, plain.scores, rtol=1e-7, atol=1e-12)
        assert by_parts.replicates.shape == (6, parts)
    tokens = ConceptInfluence(lm, concept, shown, curvature=ekfac, query_parts=2).score(
        data, tokens=True, progress=False
    )
    np.testing.assert_allclose([t.sum() for t in tokens.token_scores], plain.scores, rtol=1e-4)
    # self-influence by scoring each example against itself
    scorer = ConceptInfluence(lm, concept, shown, curvature=ekfac)
    own = [
        -Influence(lm, LossQuery(data[i : i + 1]), curvature=ekfac, sites=scorer.sites)
        .score(data[i : i + 1], progress=False)
        .scores[0]
        for i in range(3)
    ]
    divided = ask(normalise="self-influence").scores[:3]
    np.testing.assert_allclose(divided, plain.scores[:3] / np.sqrt(np.abs(own)), rtol=1e-6)
    both = (
        ask(curvature="identity", normalise="gradient"),
        ask(curvature="identity", normalise="self-influence"),
    )
    np.testing.assert_allclose(both[0].scores, both[1].scores, rtol=1e-9)
    with pytest.raises(ScorerError, match="normalise"):
        ask(normalise="cosine")
    with pytest.raises(ScorerError, match="query_parts"):
        ask(query_parts=9)
    with pytest.raises(ScorerError, match="reverse engine"):
        ask(normalise="gradient", engine="stacked")


def test_a_contrast_is_linear_in_its_gradients():
    lm = language_model()
    concept = tensor_concept(torch.ones(lm.width), layer=1, lm=lm, name="c")
    sites = resolve_sites(lm, "attention")
    first, second = ConceptQuery(concept, chats(2)), ConceptQuery(concept, chats(3, 9), pooling="prompt_last")
    contrast = ContrastQuery(first, second)
    assert contrast.value(lm) == pytest.approx(first.value(lm) - second.value(lm), rel=1e-9)
    a, b, c = (query.gradients(lm, sites) for query in (first, second, contrast))
    for site in c:
        torch.testing.assert_close(c[site], a[site] - b[site], rtol=1e-9, atol=1e-12)


def test_responses_refuse_what_they_cannot_do():
    *_, ekfac, asked, _ = least_squares()
    with pytest.raises(CurvatureError, match="of which run"):
        Unrolled(ekfac)
    with pytest.raises(CurvatureError, match="no run"):
        Unrolled(ekfac, rates=[], n_examples=3)
    with pytest.raises(CurvatureError, match="knows nothing"):
        Unrolled(ekfac, rates=[1.0], n_examples=3).precondition({"V": asked})
