"""GradCos, Residual Change, TracIn, LESS and Cascade against written-out loops of autograd in float64."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import load_documents
from concept_tda.influence.baselines import BM25, RandomScore
from concept_tda.influence.curvature import Identity
from concept_tda.influence.neighbours import (
    LESS,
    RESIDUAL_FORMS,
    AdamMoments,
    Cascade,
    GradCos,
    ResidualChange,
    Sketch,
    TracIn,
    estimated_recall,
    exact_rows,
    walsh_hadamard,
)
from concept_tda.influence.queries import ConceptQuery
from concept_tda.influence.scorers import (
    ActivationGradient,
    GradDot,
    InfluenceFunction,
    Scorer,
    ScorerError,
    score_together,
)
from concept_tda.model.loading import LanguageModel, load_model
from concept_tda.model.sites import resolve_sites
from concept_tda.model.tracing import pooled_activations
from concept_tda.results.attribution import Attribution, load_attribution

from tiny import tiny_model, tiny_pair, tiny_tokenizer

TRAIN = [
    {"prompt": f"Is {thing} {quality}?", "response": answer}
    for i, thing in enumerate(("sky", "sea", "sun", "ice"))
    for quality, answer in (("blue", "yes" * (i + 1)), ("hot", "no, it is not so"), ("wet", "the yes"))
]
QUERIES = [
    {"prompt": "Is fire hot?", "response": "yes it is"},
    {"prompt": "Is snow wet?", "response": "the snow"},
]
SITES = "attention"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def train():
    return load_conversations(TRAIN)


@pytest.fixture(scope="module")
def queries():
    return load_conversations(QUERIES)


def plain_loss(model, example):
    mask = example.response_mask[1:]
    return cross_entropy(
        model(input_ids=example.input_ids[None]).logits[0, :-1][mask], example.input_ids[1:][mask]
    )


def plain_gradient(lm, example, sites):
    found = torch.autograd.grad(plain_loss(lm.model, example), [s.module.weight for s in sites])
    return torch.cat([(g.T if s.transposed else g).flatten() for s, g in zip(sites, found)])


def training_run(family="llama", lora=False):
    """Checkpoints of a short Adam run in float64, and its optimizer state after each: (checkpoints, Adam's
    moments by hand, optimizer, model)."""
    model = tiny_model(family, dtype=torch.float64, vocab_size=len(tiny_tokenizer()))
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).double()
    lm = load_model((model, tiny_tokenizer()))
    data = lm.tokenize(load_conversations(TRAIN))
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], 3e-3, betas=(0.8, 0.95), eps=1e-6
    )
    checkpoints, moments = [], []
    for step in range(6):
        optimizer.zero_grad()
        (sum(plain_loss(model, z) for z in data) / len(data)).backward()
        optimizer.step()
        if step % 3 == 2:
            checkpoints.append(
                LanguageModel(copy.deepcopy(model).requires_grad_(True), lm.tokenizer, f"step {step + 1}")
            )
            moments.append(
                AdamMoments.from_optimizer(optimizer, resolve_sites(lm, "lora" if lora else SITES))
            )
    return checkpoints, moments, optimizer, lm


@pytest.fixture(scope="module")
def run():
    return training_run()


# --- GradCos ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradcos_equals_the_cosine_of_autograd_gradients(family, train, queries):
    lm = load_model(tiny_pair(family, dtype=torch.float64))
    sites = resolve_sites(lm, "all-linear")
    query = sum(plain_gradient(lm, z, sites) for z in lm.tokenize(queries)) / len(queries)
    expected = [
        torch.cosine_similarity(query, plain_gradient(lm, z, sites), dim=0).item() for z in lm.tokenize(train)
    ]
    for budget in (1, 4096):
        result = GradCos(lm, queries, sites="all-linear").score(
            train, tokens=True, token_budget=budget, progress=False
        )
        np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(
            [t.sum() for t in result.token_scores], result.scores, rtol=1e-4, atol=1e-6
        )
    assert "norms" in " ".join(result.card.notes)


def test_both_ways_to_the_norm_agree():
    generator = torch.Generator().manual_seed(0)
    for tokens, n_in, n_out in ((3, 40, 50), (60, 4, 5), (2, 2, 2)):  # Gram matrices, gradients, the border
        x, delta = (
            torch.randn(4, tokens, n_in, generator=generator, dtype=torch.float64),
            torch.randn(4, tokens, n_out, generator=generator, dtype=torch.float64),
        )
        torch.testing.assert_close(
            Identity().squared_norms("s", x, delta),
            torch.stack([(d.T @ y).square().sum() for d, y in zip(delta, x)]),
        )


def test_gradcos_of_a_concept_takes_norms_where_the_concept_reaches(train, queries):
    lm = load_model(tiny_pair("llama", dtype=torch.float64, n_layers=2))
    concept = tensor_concept(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(0)), layer=1, lm=lm, name="flattery"
    )
    scorer = GradCos(lm, ConceptQuery(concept, queries), sites=SITES)
    sites = resolve_sites(lm, SITES, layer=1)
    assert {s.block for s in scorer.sites} == {0} and scorer.method == "GradCos"
    gradient = torch.cat([g.flatten() for g in scorer.query.gradients(lm, sites).values()])
    expected = [
        -torch.cosine_similarity(gradient, plain_gradient(lm, z, sites), dim=0).item()
        for z in lm.tokenize(train)
    ]
    np.testing.assert_allclose(scorer.score(train, progress=False).scores, expected, rtol=1e-5, atol=1e-7)


# --- Residual Change ---

RESIDUAL_FAMILIES = ["llama", "qwen2", "gemma", "mistral", "gpt_neox", "gpt2"]


def a_concept(lm, pooling="response_mean", layer=1):
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return tensor_concept(vector, layer, lm=lm, name="a direction", pooling=pooling)


def step_of_an_adapter(lm, concept, example, form, length=1.0):
    """How far the pooled tokens of an example move along the concept when a small model behind the layer (one
    linear map, or a gain for each token) takes one step of gradient descent on it; and the loss before and
    after. The step is the one of autograd, the formula of the scorer does not occur."""
    counted = (pooling_weights_of(concept, example) > 0)[None, :, None]
    n_tokens, width = counted.shape[1], lm.width
    shape = (width, width) if form == "across_tokens" else (1, n_tokens, 1)
    adapter = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    seen = {}

    def change():
        z = seen["z"] * counted
        return z @ adapter.T if form == "across_tokens" else z * adapter

    def hook(block, args, out):
        first = out[0] if isinstance(out, tuple) else out
        seen["z"] = first.detach()
        moved = first + change()
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = lm.blocks[concept.layer - 1].register_forward_hook(hook)
    try:
        before = plain_loss(lm.model, example)
        (gradient,) = torch.autograd.grad(before, adapter)
        with torch.no_grad():
            adapter -= length * gradient
            moved = (change() @ concept.direction.double()).sum().item()
            seen_before = seen["z"]
            after = plain_loss(lm.model, example).item()
            assert torch.equal(seen_before, seen["z"])
    finally:
        handle.remove()
    return moved / length, before.item(), after


def pooling_weights_of(concept, example):
    "Weights [T] by hand: the pooled tokens of one example without padding."
    counted = torch.ones_like(example.response_mask, dtype=torch.float64)
    if concept.pooling == "response_mean":
        counted = example.response_mask.double()
    counted[0] = 0
    return counted


@pytest.mark.parametrize("form", list(RESIDUAL_FORMS))
@pytest.mark.parametrize("family", RESIDUAL_FAMILIES)
def test_residual_change_is_a_step_of_one_linear_map_or_of_gains(family, form, train):
    lm = load_model(tiny_pair(family, dtype=torch.float64))
    for pooling in ("response_mean", "all_but_first"):
        concept = a_concept(lm, pooling)
        expected = [step_of_an_adapter(lm, concept, z, form)[0] for z in lm.tokenize(train)]
        for budget in (1, 4096):
            result = ResidualChange(lm, concept, form=form).score(
                train, tokens=True, token_budget=budget, progress=False
            )
            np.testing.assert_allclose(result.scores, expected, rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(
                [t.sum() for t in result.token_scores], result.scores, rtol=1e-4, atol=1e-6
            )
        for tokens, z in zip(result.token_scores, lm.tokenize(train)):
            assert not tokens[pooling_weights_of(concept, z) == 0].any()


@pytest.mark.parametrize("form", list(RESIDUAL_FORMS))
def test_residual_change_has_the_sign_it_promises(form, train):
    """A small step on an example lowers its loss and moves its stream by what the score says, up or down."""
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    concept = a_concept(lm)
    result = ResidualChange(lm, concept, form=form).score(train, progress=False)
    assert result.card.zero == "gradient" and (result.scores > 0).any() and (result.scores < 0).any()
    for score, z in zip(result.scores, lm.tokenize(train)):
        moved, before, after = step_of_an_adapter(lm, concept, z, form, length=1e-3)
        assert after < before and np.sign(moved) == np.sign(score)
    opposite = ResidualChange(
        lm, tensor_concept(-concept.direction, 1, lm=lm, name="its opposite"), form=form
    ).score(train, progress=False)
    np.testing.assert_allclose(opposite.scores, -result.scores, rtol=1e-9)


def moved_by_training(lm, concept, train, rate=1e-4):
    "Change of each example's own activation along the concept, per unit of an SGD step on all weights."
    weights = [weight.requires_grad_(True) for weight in lm.model.parameters()]
    originals, changes = [weight.detach().clone() for weight in weights], []

    def along(row):
        acts = pooled_activations(lm, train[[row]], concept.layer, progress=False)[concept.layer][0]
        return (acts.double() @ concept.direction.double()).item()

    for row, z in enumerate(lm.tokenize(train)):
        gradients = torch.autograd.grad(plain_loss(lm.model, z), weights, allow_unused=True)
        with torch.no_grad():
            before = along(row)
            for weight, gradient in zip(weights, gradients):
                if gradient is not None:
                    weight -= rate * gradient
            changes.append((along(row) - before) / rate)
            for weight, original in zip(weights, originals):
                weight.copy_(original)
    return np.array(changes)


def test_real_training_agrees_with_the_sign_across_tokens(train):
    """The layer as one linear map is a rough picture of a network: the sign is right more often than not, and
    no more is claimed. Within tokens not even that holds, and the card says so."""
    agreed = {form: [] for form in RESIDUAL_FORMS}
    for family in ("llama", "qwen2", "gpt2"):
        for seed in range(3):
            lm = load_model(tiny_pair(family, dtype=torch.float64, n_layers=3))
            vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            concept = tensor_concept(vector, 1, lm=lm, name="a direction")
            results = {f: ResidualChange(lm, concept, form=f).score(train, progress=False) for f in agreed}
            moved = moved_by_training(lm, concept, train)
            for form, result in results.items():
                agreed[form].append((np.sign(result.scores) == np.sign(moved)).mean())
    assert np.mean(agreed["across_tokens"]) > 0.7 > 0.6 > np.mean(agreed["within_token"])
    assert "hardly more often than chance" in results["within_token"].reading
    assert results["across_tokens"].reading.startswith("Above zero, training more on the example raises")


def test_residual_change_does_not_see_its_batch_mates(train):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    scorer = ResidualChange(lm, a_concept(lm))
    together = scorer.score(train, progress=False).scores
    order = np.random.default_rng(0).permutation(len(train))
    np.testing.assert_allclose(scorer.score(train[order], progress=False).scores, together[order], rtol=1e-9)
    alone = [scorer.score(train[row : row + 1], progress=False).scores[0] for row in range(len(train))]
    np.testing.assert_allclose(alone, together, rtol=1e-9)


def test_residual_change_shares_a_pass_and_says_what_it_did(train):
    lm = load_model(tiny_pair("llama"))
    concept = a_concept(lm)
    scorers = [ResidualChange(lm, concept), ResidualChange(lm, concept, form="within_token", method="within")]
    results = score_together([*scorers, ActivationGradient(lm, concept)], train, progress=False)
    for scorer in scorers:
        card = results[scorer.method].card
        assert card.settings["form"] == scorer.form and scorer.form in card.notes[0] and card.layer == 1
        np.testing.assert_allclose(
            results[scorer.method].scores, scorer.score(train, progress=False).scores, rtol=1e-5, atol=1e-9
        )
    assert not np.allclose(results["Residual Change"].scores, results["within"].scores)
    with pytest.raises(ScorerError, match="'written'.*'across_tokens', 'within_token'"):
        ResidualChange(lm, concept, form="written")


# --- TracIn ---


@pytest.mark.parametrize("family, lora", [("llama", False), ("gpt2", False), ("llama", True)])
def test_tracin_equals_the_written_out_loop(family, lora, train, queries):
    checkpoints, _, _, _ = training_run(family, lora)
    pattern, rates, expected = "lora" if lora else SITES, [3e-3, 1e-3], np.zeros(len(train))
    for rate, lm in zip(rates, checkpoints):
        sites = resolve_sites(lm, pattern)
        query = sum(plain_gradient(lm, z, sites) for z in lm.tokenize(queries)) / len(queries)
        expected += [rate * (query @ plain_gradient(lm, z, sites)).item() for z in lm.tokenize(train)]
    result = TracIn(checkpoints, queries, learning_rates=rates, sites=pattern).score(
        train, tokens=True, progress=False
    )
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-6 * abs(expected).max())
    np.testing.assert_allclose(
        [t.sum() for t in result.token_scores], result.scores, rtol=1e-3, atol=1e-5 * abs(expected).max()
    )
    assert (
        result.card.model == "step 3, step 6"
        and result.card.settings["checkpoints"] == 2
        and result.card.cost.tokens == 2 * lm.tokenize(train).n_tokens
    )


def test_tracin_foretells_a_step(run, train, queries):
    """The sign and the size: one SGD step on an example lowers the query's loss by its score."""
    lm = run[0][0]
    score = TracIn([lm], queries, learning_rates=[1e-4], sites=SITES).score(train, progress=False)
    sites, data = resolve_sites(lm, SITES), lm.tokenize(train)
    loss = lambda model: sum(plain_loss(model, z) for z in lm.tokenize(queries)).item() / len(queries)
    for row in (score.scores.argmax(), score.scores.argmin()):
        stepped = copy.deepcopy(lm.model)
        gradients = torch.autograd.grad(
            plain_loss(stepped, data[row]), [stepped.get_submodule(s.name).weight for s in sites]
        )
        with torch.no_grad():
            for s, g in zip(sites, gradients):
                stepped.get_submodule(s.name).weight -= 1e-4 * g
        assert loss(lm.model) - loss(stepped) == pytest.approx(score.scores[row], rel=0.02)


def test_one_model_at_a_time_and_folders_are_opened(tmp_path, train, queries):
    checkpoints, _, _, _ = training_run()
    folders, alive, most = [], [], []
    for i, lm in enumerate(checkpoints * 2):
        lm.model.float().save_pretrained(tmp_path / str(i))
        lm.tokenizer.save_pretrained(tmp_path / str(i))
        folders.append(tmp_path / str(i))

    def opener(folder):
        def open_one():
            lm = load_model(folder)
            alive.append(weakref.ref(lm.model))
            most.append(sum(ref() is not None for ref in alive))
            return lm

        return open_one

    opened = TracIn([opener(f) for f in folders], queries, learning_rates=[1] * 4, sites=SITES).score(
        train, progress=False
    )
    assert most == [1, 1, 1, 1]
    gc.collect()
    assert not any(ref() for ref in alive)
    named = TracIn(folders, queries, learning_rates=[1] * 4, sites=SITES).score(train, progress=False)
    np.testing.assert_array_equal(opened.scores, named.scores)


def test_a_killed_run_continues_at_the_checkpoint_it_reached(run, train, queries, monkeypatch, tmp_path):
    import concept_tda.influence.neighbours as room

    checkpoints, passes, real = run[0], [], room.shared_pass
    monkeypatch.setattr(
        room,
        "shared_pass",
        lambda lm, *args, **options: (passes.append(lm.name), real(lm, *args, **options))[1],
    )
    whole = TracIn(checkpoints, queries, learning_rates=[1, 2], sites=SITES).score(
        train, tokens=True, progress=False
    )

    def dead():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TracIn([checkpoints[0], dead], queries, learning_rates=[1, 2], sites=SITES).score(
            train, tokens=True, progress=False
        )
    del passes[:]
    again = TracIn(checkpoints, queries, learning_rates=[1, 2], sites=SITES).score(
        train, tokens=True, progress=False
    )
    assert passes == ["step 6"]
    np.testing.assert_array_equal(again.scores, whole.scores)
    for a, b in zip(again.token_scores, whole.token_scores):
        np.testing.assert_array_equal(a, b)
    assert not list((tmp_path / "cache").rglob("*.block"))  # nothing is left behind


# --- LESS ---


def plain_less(checkpoints, moments, rates, train, queries, pattern):
    "Xia et al.'s score, written out for each checkpoint and example."
    total = np.zeros(len(train))
    for rate, lm, adam in zip(rates, checkpoints, moments):
        sites = resolve_sites(lm, pattern)
        query = sum(plain_gradient(lm, z, sites) for z in lm.tokenize(queries)) / len(queries)
        m, v = (torch.cat([moment[s.name].flatten() for s in sites]) for moment in (adam.first, adam.second))
        (b1, b2), t = adam.betas, adam.step + 1
        for row, z in enumerate(lm.tokenize(train)):
            g = plain_gradient(lm, z, sites)
            step = ((b1 * m + (1 - b1) * g) / (1 - b1**t)) / (
                ((b2 * v + (1 - b2) * g * g) / (1 - b2**t)).sqrt() + adam.epsilon
            )
            total[row] += rate * torch.cosine_similarity(query, step, dim=0).item() / sum(rates)
    return total


@pytest.mark.parametrize("family, lora", [("llama", False), ("gpt2", False), ("llama", True)])
def test_less_equals_the_written_out_loop(family, lora, train, queries):
    checkpoints, moments, _, _ = training_run(family, lora)
    pattern, rates = "lora" if lora else SITES, [3e-3, 1e-3]
    expected = plain_less(checkpoints, moments, rates, train, queries, pattern)
    for projection in (None, 1 << 20):  # exact, and a sketch with more dimensions than weights
        result = LESS(
            checkpoints, queries, moments=moments, learning_rates=rates, sites=pattern, projection=projection
        ).score(train, progress=False)
        np.testing.assert_allclose(result.scores, expected, rtol=1e-4, atol=1e-6)
    assert np.ptp(expected) > 1e-3


def test_moments_are_those_of_the_optimizer(run):
    _, moments, optimizer, lm = run
    sites = resolve_sites(lm, SITES)
    adam = moments[-1]
    assert adam.step == 6 and adam.betas == (0.8, 0.95) and adam.epsilon == 1e-6
    before = [s.module.weight.detach().clone() for s in sites]
    model, twin = copy.deepcopy(lm.model), copy.deepcopy(optimizer.state_dict())
    stepper = torch.optim.Adam(model.parameters(), 3e-3, betas=(0.8, 0.95), eps=1e-6)
    stepper.load_state_dict(twin)
    plain_loss(model, lm.tokenize(load_conversations(TRAIN))[0]).backward()
    gradients = [model.get_submodule(s.name).weight.grad.clone() for s in sites]
    stepper.step()
    for s, old, g in zip(sites, before, gradients):
        torch.testing.assert_close(
            old - 3e-3 * adam.steps(s.name, g),
            model.get_submodule(s.name).weight.detach(),
            rtol=1e-9,
            atol=1e-12,
        )


def test_estimated_moments_are_those_of_adam_standing_still(run, train):
    lm = run[0][0]
    sites = resolve_sites(lm, SITES)
    estimate = AdamMoments.estimate(lm, train, SITES, batch_size=5, seed=3)
    order, data = np.random.default_rng(3).permutation(len(train)), lm.tokenize(train)
    still = copy.deepcopy(lm.model)
    optimizer = torch.optim.Adam(still.parameters(), 0.0)  # moments move, weights do not
    for start in range(0, len(train), 5):
        optimizer.zero_grad()
        rows = order[start : start + 5]
        (sum(plain_loss(still, data[r]) for r in rows) / len(rows)).backward()
        optimizer.step()
    assert estimate.step == 3
    for s in sites:
        state = optimizer.state[still.get_submodule(s.name).weight]
        torch.testing.assert_close(estimate.first[s.name], state["exp_avg"], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(estimate.second[s.name], state["exp_avg_sq"], rtol=1e-5, atol=1e-14)


def test_sketches_are_seeded_rademacher_and_unbiased():
    size, k = 100, 32
    matrix = Sketch(size, k, seed=5)(torch.eye(size, dtype=torch.float64)).T  # [k, size]
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, k**-0.5))
    assert torch.equal(
        matrix, Sketch(size, k, seed=5)(torch.eye(size, dtype=torch.float64)).T
    ) and not torch.equal(matrix, Sketch(size, k, seed=6)(torch.eye(size, dtype=torch.float64)).T)
    H = walsh_hadamard(torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(H @ H.T, 16 * torch.eye(16, dtype=torch.float64))
    a, b = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = [
        (s(a[None]) * s(b[None])).sum().item() for s in (Sketch(size, k, seed) for seed in range(400))
    ]
    assert abs(np.mean(products) - (a @ b).item()) < 4 * np.std(products) / 20 and np.std(products) > 0.5
    for k in (100, 128, 1000):  # as many dimensions as there are: nothing is lost
        torch.testing.assert_close((Sketch(size, k)(a[None]) * Sketch(size, k)(b[None])).sum(), a @ b)
    assert Sketch(1, 1)(torch.ones(1, 1)).abs().item() == 1


def test_sketch_reliability_is_measured_not_claimed(run, train, queries):
    checkpoints, moments, _, _ = run
    score = lambda projection, seed=0: LESS(
        checkpoints,
        queries,
        moments=moments,
        learning_rates=[1, 1],
        sites=SITES,
        projection=projection,
        seed=seed,
    ).score(train, progress=False)
    small, large, exact = score(8), score(512), score(None)
    reliability = lambda result: result.card.settings["reliability"]
    from concept_tda.results.metrics import spearman

    assert reliability(small)["with_exact"] == pytest.approx(spearman(small.scores, exact.scores), abs=1e-9)
    assert reliability(small)["with_exact"] < reliability(large)["with_exact"]
    assert reliability(small)["between_seeds"] < reliability(large)["between_seeds"] < 1
    assert not np.allclose(small.scores, score(8, seed=1).scores)
    np.testing.assert_array_equal(small.scores, score(8).scores)
    assert "no sketch" in exact.card.notes[0]


# --- Cascade ---


class Given(Scorer):
    "A scorer whose scores are written down, by conversation id."

    def __init__(self, method, conversations, scores):
        self.method, self.by_id, self.seen = method, dict(zip(conversations.ids, scores)), []

    lm = None

    def score(self, examples, **options):
        self.seen.append(len(examples))
        from concept_tda.results.cards import Cost, QueryCard

        return Attribution(
            examples,
            [self.by_id[i] for i in examples.ids],
            QueryCard(
                method=self.method,
                behaviour="given",
                cost=Cost(seconds=1.0, tokens=len(examples), peak_memory=None),
            ),
        )


@pytest.fixture(scope="module")
def many():
    return load_conversations([{"prompt": f"number {i}", "response": "yes"} for i in range(200)])


def test_cascade_ranks_picked_by_exact_and_the_rest_below(many):
    random = np.random.default_rng(0)
    exact = random.normal(size=200)
    cheap = 1000 * (exact + random.normal(size=200))  # another scale altogether
    cascade = Cascade(
        Given("cheap", many, cheap), truth := Given("exact", many, exact), keep=0.2, sample=30, top=10
    )
    result = cascade.score(many)
    assert truth.seen == [70]  # 40 picked and 30 sampled, in one pass
    picked = np.sort(np.argsort(-cheap)[:40])
    assert exact_rows(result).tolist() == picked.tolist()
    np.testing.assert_array_equal(result.scores[picked], exact[picked])
    others = np.setdiff1d(np.arange(200), picked)
    assert result.scores[others].max() < result.scores[picked].min()
    assert (np.argsort(-result.scores[others]) == np.argsort(-cheap[others])).all()
    assert (
        result.card.settings["recall_at"] == 10
        and result.card.cost.tokens == 270
        and result.card.method == "Cascade (cheap → exact)"
    )
    assert "estimated recall of the exact top 10" in " ".join(result.card.notes)


def test_cascade_survives_saving(many, tmp_path):
    scores = np.random.default_rng(1).normal(size=200)
    result = Cascade(
        Given("cheap", many, scores), Given("exact", many, scores / 3), keep=0.1, sample=10, top=5
    ).score(many)
    opened = load_attribution(result.save(tmp_path / "cascade.parquet"))
    np.testing.assert_array_equal(exact_rows(opened), exact_rows(result))
    np.testing.assert_array_equal(opened.scores, result.scores)


def test_cascade_at_the_edges(many):
    scores = np.random.default_rng(2).normal(size=200)
    everything = Cascade(
        Given("cheap", many, -scores), Given("exact", many, scores), keep=1.0, sample=10
    ).score(many)
    np.testing.assert_array_equal(everything.scores, scores)  # nothing is left below
    assert everything.card.settings["recall"] == [1, 1, 1]
    whole_rest = Cascade(
        Given("cheap", many, -scores), Given("exact", many, scores), keep=0.2, sample=10**6
    ).score(many)
    assert whole_rest.card.settings["recall"] == [
        0,
        0,
        0,
    ]  # the cheap scorer was perfectly wrong, and that is certain
    large = Cascade(
        Given("cheap", many, scores), Given("exact", many, 1e15 + np.arange(200) % 2), keep=0.2, sample=5
    ).score(many)
    assert len(exact_rows(large)) == 40  # spread lost in rounding, border still sharp


def test_recall_intervals_hold_what_they_promise():
    random, inside, estimates, truths = np.random.default_rng(0), 0, [], []
    for trial in range(400):
        exact = random.normal(size=400)
        rows = np.argsort(-(exact + random.uniform(0.3, 3) * random.normal(size=400)))
        truth = np.isin(np.argsort(-exact)[:20], rows[:80]).mean()
        estimate, low, high = estimated_recall(
            exact[rows[:80]], exact[random.choice(rows[80:], 60, replace=False)], 320, 20
        )
        assert 0 <= low <= estimate <= high <= 1
        inside += low <= truth <= high
        estimates.append(estimate)
        truths.append(truth)
    assert inside / 400 > 0.93
    assert np.corrcoef(estimates, truths)[0, 1] > 0.7 and abs(np.mean(estimates) - np.mean(truths)) < 0.05
    exact = random.normal(size=50)
    assert estimated_recall(exact[:20], exact[20:], 30, 10) == pytest.approx(
        (np.isin(np.argsort(-exact)[:10], range(20)).mean(),) * 3
    )


def test_cascade_of_real_scorers(run, train, queries):
    lm = run[0][-1]
    cheap, exact = (
        GradDot(lm, queries, sites=SITES),
        InfluenceFunction(lm, queries, sites=SITES),
    )  # EK-FAC still to be fitted, "on the scored data"
    result = Cascade(cheap, exact, keep=0.5, sample=3, top=2).score(train, progress=False, tokens=True)
    assert exact.curvature.record["n_examples"] == len(train)  # all of it, not only the picked
    full = InfluenceFunction(lm, queries, sites=SITES).score(train, progress=False)
    rows = exact_rows(result)
    np.testing.assert_allclose(result.scores[rows], full.scores[rows], rtol=1e-4)
    assert (
        len(rows) == 6
        and result.token_scores is None
        and any("not kept" in note for note in result.card.notes)
    )
    assert (
        result.card.curvature == "EK-FAC" and result.card.method == "Cascade (GradDot → Influence Function)"
    )


# --- together, and errors ---


def test_together_with_scorers_of_one_pass(run, train, queries):
    checkpoints, moments, _, _ = run
    lm = checkpoints[-1]
    tracin = TracIn(checkpoints, queries, learning_rates=[1, 1], sites=SITES)
    less = LESS(checkpoints, queries, moments=moments, learning_rates=[1, 1], sites=SITES)
    cascade = Cascade(GradDot(lm, queries), GradCos(lm, queries, method="exact"), keep=0.5, top=3)
    scorers = [tracin, GradDot(lm, queries), less, RandomScore(), cascade, GradCos(lm, queries)]
    results = score_together(scorers, train, tokens=True, progress=False)
    assert list(results) == [s.method for s in scorers]
    for scorer in (tracin, less, cascade, scorers[1]):
        np.testing.assert_allclose(
            results[scorer.method].scores, scorer.score(train, progress=False).scores, rtol=1e-9
        )
    assert list(score_together([tracin], train, progress=False)) == ["TracIn"]
    for scorer in (tracin, less, cascade):
        with pytest.raises(ScorerError, match="passes of its own"):
            scorer.prepare(lm.tokenize(train))


def test_a_cascade_without_a_model_says_that_nobody_reads_the_texts(tmp_path):
    """Two scorers without a model have no tokenizer, so documents are refused."""
    (tmp_path / "book.txt").write_text("once upon a time there was a cat. " * 400)
    documents = load_documents(tmp_path / "book.txt")
    scorer = Cascade(RandomScore(), BM25([{"prompt": "who?", "response": "the cat"}]), keep=0.5, top=1)
    with pytest.raises(
        ScorerError, match="neither Random nor BM25 has a model: score with each of them alone"
    ):
        scorer.score(documents)


def test_errors(run, train, queries):
    checkpoints, moments, optimizer, lm = run
    with pytest.raises(ScorerError, match="at least one checkpoint"):
        TracIn([], queries, learning_rates=[])
    with pytest.raises(ScorerError, match="as many learning rates, got 1"):
        TracIn(checkpoints, queries, learning_rates=[1])
    for rate in (0, -1, float("nan")):
        with pytest.raises(ScorerError, match="positive"):
            TracIn(checkpoints, queries, learning_rates=[1, rate])
    with pytest.raises(ScorerError, match="LanguageModel, not a"):
        TracIn([lambda: 3], queries, learning_rates=[1]).score(train)
    other = LanguageModel(
        tiny_model("llama", dtype=torch.float64, vocab_size=len(tiny_tokenizer())),
        tiny_tokenizer(bos=True),
        "with BOS",
    )
    other.tokenizer.chat_template = "{{ bos_token }}" + other.tokenizer.chat_template
    with pytest.raises(ScorerError, match="other tokens"):
        TracIn([checkpoints[0], other], queries, learning_rates=[1, 1]).score(train, progress=False)
    with pytest.raises(ScorerError, match="Adam moments, got 1"):
        LESS(checkpoints, queries, moments=moments[:1], learning_rates=[1, 1])
    for projection in (0, -5, 2.5):
        with pytest.raises(ScorerError, match="projection"):
            LESS(checkpoints, queries, moments=moments, learning_rates=[1, 1], projection=projection)
    with pytest.raises(ScorerError, match="no Adam moments for .*mlp"):
        LESS(checkpoints, queries, moments=moments, learning_rates=[1, 1], sites="mlp").score(
            train, progress=False
        )
    with pytest.raises(ScorerError, match="did it train this model"):
        AdamMoments.from_optimizer(optimizer, resolve_sites(checkpoints[0], SITES))
    first = resolve_sites(lm, SITES)[0].name
    with pytest.raises(ScorerError, match="shape"):
        moments[0].steps(first, torch.ones(3, 3))
    with pytest.raises(ScorerError, match="not finite, or a negative"):
        AdamMoments({"a": torch.zeros(2)}, {"a": -torch.ones(2)}, 1)
    with pytest.raises(ScorerError, match="different sites"):
        AdamMoments({"a": torch.zeros(2)}, {}, 1)
    cheap, exact = GradDot(lm, queries), GradCos(lm, queries)
    for keep in (0, 1.5, -1):
        with pytest.raises(ScorerError, match="keep"):
            Cascade(cheap, exact, keep=keep)
    with pytest.raises(ScorerError, match="sample"):
        Cascade(cheap, exact, sample=0)
    with pytest.raises(ScorerError, match="cannot hold the top 10"):
        Cascade(cheap, exact, keep=0.2).score(train, progress=False)
    with pytest.raises(ScorerError, match="not the result of a Cascade"):
        exact_rows(cheap.score(train, progress=False))


def test_nothing_is_left_on_the_models(run, train, queries):
    checkpoints, moments, _, _ = run
    before = [lm.fingerprint for lm in checkpoints]
    TracIn(checkpoints, queries, learning_rates=[1, 1], sites=SITES).score(train, progress=False)
    AdamMoments.estimate(checkpoints[0], train, SITES)
    LESS(
        checkpoints,
        queries,
        moments=[lambda lm, sites: AdamMoments.estimate(lm, train, SITES)] * 2,
        learning_rates=[1, 1],
        sites=SITES,
    ).score(train, progress=False)
    assert [lm.fingerprint for lm in checkpoints] == before
    for lm in checkpoints:
        assert all(p.grad is None and p.requires_grad for p in lm.model.parameters()) and not any(
            m._forward_hooks for m in lm.model.modules()
        )
