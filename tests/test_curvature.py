"""EK-FAC: exact where it can be, equal to curvlinops' operator, and careful with its files."""

from types import SimpleNamespace

import pytest
import torch

from concept_tda.data.batches import Batch, batches
from concept_tda.data.conversations import Conversations, load_conversations
from concept_tda.data.tokens import TokenizedConversation
from concept_tda.influence.curvature import (
    EKFAC,
    CurvatureError,
    Factors,
    FactorStatistics,
    LabelDraws,
    _known_labels,
    _linear_layers,
    _ResponseLogits,
    batch_labels,
)
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites

from tiny import tiny_pair

TRAIN = [
    {"prompt": f"What is {i} and {i + 1}?", "response": "It is " + "so " * (i % 4 + 1) + f"{2 * i}."}
    for i in range(9)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def train():
    return load_conversations(TRAIN)


def random_gradients(sites, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        s.name: torch.randn(s.out_features, s.in_features, dtype=torch.float64, generator=generator)
        for s in sites
    }


def test_exact_for_one_linear_layer_with_gaussian_data():
    """Inputs and output gradients independent: the Fisher *is* a Kronecker product, and EK-FAC's damped
    inverse the exact one."""
    generator = torch.Generator().manual_seed(0)
    inputs, deltas = (
        torch.randn(7, 4, dtype=torch.float64, generator=generator),
        torch.randn(6, 3, dtype=torch.float64, generator=generator),
    )
    x, delta = (
        inputs.repeat_interleave(6, 0),
        deltas.repeat(7, 1),
    )  # every input with every gradient: independence without sampling error
    statistics = FactorStatistics(
        [SimpleNamespace(weight=torch.zeros(3, 4, dtype=torch.float64))], memory_budget=2**20
    )
    for i in range(0, 42, 6):  # in batches of six examples of one token
        statistics.begin(SimpleNamespace(attention_mask=torch.ones(6, 1, dtype=torch.long)))
        statistics.receive(SimpleNamespace(name="layer"), x[i : i + 6, None], delta[i : i + 6, None])
        statistics.take()
    assert len(statistics.cache) == 7
    statistics.solve()
    for flows, lengths in statistics.cache:
        statistics.add_eigenvalues(flows, lengths)
    factors = Factors(
        statistics.Q_in["layer"], statistics.Q_out["layer"], statistics.eigenvalues["layer"] / 42
    )
    per_example = torch.einsum("no,ni->noi", delta, x).flatten(1)
    fisher = per_example.T @ per_example / 42
    gradient = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    for damping in (1e-3, 1.0):
        exact = torch.linalg.solve(
            fisher + damping * torch.eye(12, dtype=torch.float64), gradient.flatten()
        ).view(3, 4)
        ours = EKFAC({"layer": factors}, damping=damping, relative=False).precondition({"layer": gradient})[
            "layer"
        ]
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("labels", ["sampled", "empirical"])
@pytest.mark.parametrize("backend", ["streaming", "curvlinops"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_equals_the_operator_of_curvlinops(family, backend, labels, train):
    from curvlinops import EKFACLinearOperator, KFACInverseLinearOperator

    lm = load_model(tiny_pair(family, dtype=torch.float64))
    sites = resolve_sites(lm, "attention")
    gradients = random_gradients(sites)
    ours = EKFAC.fit(
        lm, train, sites, labels=labels, damping=1e-3, relative=False, backend=backend, progress=False
    ).precondition(gradients)
    data = lm.tokenize(train)
    draws = LabelDraws(data, seed=0) if labels == "sampled" else None  # their own sample would be another
    examples = [
        ({"batch": b}, _known_labels(lm, b, batch_labels(b, draws))) for b in batches(data, token_budget=1)
    ]
    with lm.undisturbed(), torch.enable_grad(), _linear_layers(lm, sites) as linears:
        weights = [linear.weight.requires_grad_() for linear in linears]
        operator = EKFACLinearOperator(
            _ResponseLogits(lm),
            torch.nn.CrossEntropyLoss(reduction="sum"),
            weights,
            examples,
            check_deterministic=False,
            fisher_type="empirical",
            num_data=len(examples),
            num_per_example_loss_terms=1,
            batch_size_fn=lambda b: 1,
        )
        # their H is a sum over tokens, ours the mean: the same solution for damping × tokens, up to that
        # factor
        inverse = KFACInverseLinearOperator(
            operator, damping=1e-3 * data.n_response_tokens, use_exact_damping=True
        )
        theirs = inverse @ [gradients[s.name] for s in sites]
    for site, expected in zip(sites, theirs):
        torch.testing.assert_close(
            ours[site.name],
            expected * data.n_response_tokens,
            rtol=1e-6,
            atol=1e-6 * expected.abs().max().item() * data.n_response_tokens,
        )


def test_one_pass_two_passes_and_batches_agree(train):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    sites = resolve_sites(lm, "all-linear")
    gradients = random_gradients(sites)
    fits = [
        EKFAC.fit(lm, train, sites, labels="empirical", progress=False, cache=False, **options).precondition(
            gradients
        )
        for options in ({}, {"memory_budget": 0}, {"memory_budget": 60_000}, {"token_budget": 200})
    ]
    for fit in fits[1:]:
        for name in gradients:
            torch.testing.assert_close(fit[name], fits[0][name], rtol=1e-7, atol=1e-9)
    sampled = [
        EKFAC.fit(lm, train, sites, progress=False, cache=False, memory_budget=budget).precondition(gradients)
        for budget in (2**30, 0)
    ]
    for name in gradients:
        torch.testing.assert_close(
            *[fit[name] for fit in sampled]
        )  # the second pass sees the labels of the first


def test_sampled_labels_know_neither_order_nor_batch(train):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    gradients = random_gradients(resolve_sites(lm, "all-linear"))

    def fitted(data, **options):
        options = {"sites": "all-linear", "progress": False, "cache": False, **options}
        return EKFAC.fit(lm, data, **options).precondition(gradients)

    def far(one, other):
        return max((one[name] - other[name]).norm() / one[name].norm() for name in gradients)

    plain = fitted(train)
    assert far(plain, fitted(train[::-1])) < 1e-6
    assert far(plain, fitted(train, token_budget=200)) < 1e-6
    assert far(plain, fitted(train, backend="curvlinops")) < 1e-6
    assert far(plain, fitted(train, seed=1)) > 1e-3


def test_copies_of_an_example_are_samples_of_their_own(train):
    lm = load_model(tiny_pair("llama"))
    data = lm.tokenize(Conversations([train[0]] * 3))
    batch = next(batches(data))
    one, two, three = LabelDraws(data, seed=0).of(batch).chunk(3)
    assert not torch.equal(one, two) and not torch.equal(two, three) and not torch.equal(one, three)


def test_labels_are_sampled_with_the_probabilities_of_the_model():
    """Token frequencies of 20,000 draws, each within four standard errors; what cannot come never does."""
    n, probabilities = 20_000, torch.tensor([0.0, 0.5, 0.3, 0.0, 0.15, 0.05, 0.0])
    batch = Batch(
        torch.tensor([0]),
        torch.zeros(1, n + 1, dtype=torch.long),
        torch.ones(1, n + 1),
        torch.tensor([[False] + [True] * n]),
    )
    draws = LabelDraws([TokenizedConversation("a", batch.input_ids[0], batch.response_mask[0])], seed=0)
    sampled = batch_labels(batch, draws)(probabilities.log().expand(n, -1))
    found = torch.bincount(sampled, minlength=7) / n
    assert not found[probabilities == 0].any()
    error = (probabilities * (1 - probabilities) / n).sqrt()
    assert ((found - probabilities).abs() <= 4 * error).all()


def test_scale_does_not_depend_on_the_amount_of_data(train):
    """Twice the same data is the same curvature of the mean loss."""
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    once, twice = (
        EKFAC.fit(lm, data, labels="empirical", progress=False, cache=False)
        for data in (train, load_conversations(TRAIN + TRAIN))
    )
    for site in once.factors:
        torch.testing.assert_close(
            once.factors[site].eigenvalues.sum(), twice.factors[site].eigenvalues.sum()
        )


def test_files(tmp_path, train):
    lm = load_model(tiny_pair("llama"))
    fitted = EKFAC.fit(lm, train, progress=False)
    path = fitted.save(tmp_path / "factors.safetensors")
    loaded, gradients = EKFAC.load(path, lm), random_gradients(resolve_sites(lm, "attention"))
    for name, value in fitted.precondition(gradients).items():
        torch.testing.assert_close(loaded.precondition(gradients)[name], value, rtol=0, atol=0)
    assert (loaded.damping, loaded.relative, loaded.record) == (
        fitted.damping,
        fitted.relative,
        fitted.record,
    )
    with pytest.raises(CurvatureError, match="weights differ"):
        EKFAC.load(path, load_model(tiny_pair("llama", seed=1)))
    with pytest.raises(CurvatureError, match="no file"):
        EKFAC.load(tmp_path / "absent")
    content = path.read_bytes()
    for damage, reason in (
        (content[: len(content) // 2], "not a whole"),
        (content[:-1] + bytes([content[-1] ^ 1]), "damaged"),
        (b"hello", "not a whole"),
    ):
        path.write_bytes(damage)
        with pytest.raises(CurvatureError, match=reason):
            EKFAC.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CurvatureError, match="no EK-FAC factors"):
        EKFAC.load(path)


def test_the_cache_is_used_and_keyed(train, monkeypatch):
    import concept_tda.influence.curvature as room

    fits, real = [], room._fit_streaming
    monkeypatch.setattr(room, "_fit_streaming", lambda *args: (fits.append(1), real(*args))[1])
    lm = load_model(tiny_pair("llama"))
    first = EKFAC.fit(lm, train, progress=False)
    again = EKFAC.fit(
        lm, train, damping=1e-3, relative=False, progress=False
    )  # damping is not part of the fit
    assert len(fits) == 1 and again.damping == 1e-3 and not again.relative
    for site in first.factors:
        assert torch.equal(first.factors[site].eigenvalues, again.factors[site].eigenvalues)
    for lm_, data, options in (
        (lm, train[1:], {}),
        (lm, train, {"seed": 1}),
        (lm, train, {"labels": "empirical"}),
        (lm, train, {"sites": "mlp"}),
        (load_model(tiny_pair("llama", seed=2)), train, {}),
    ):
        before = len(fits)
        EKFAC.fit(lm_, data, progress=False, **options)
        assert len(fits) == before + 1, options


def test_errors(train):
    lm = load_model(tiny_pair("llama"))
    for damping in (0, -1, float("nan"), float("inf")):
        with pytest.raises(CurvatureError, match="damping"):
            EKFAC.fit(lm, train, damping=damping)
    with pytest.raises(CurvatureError, match="labels"):
        EKFAC.fit(lm, train, labels="true")
    with pytest.raises(CurvatureError, match="backend"):
        EKFAC.fit(lm, train, backend="kronfluence")
    good = Factors(torch.eye(2), torch.eye(2), torch.ones(2, 2))
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(CurvatureError, match="eigenvalue correction"):
            EKFAC({"site": Factors(good.Q_in, good.Q_out, torch.full((2, 2), bad))})
    with pytest.raises(CurvatureError, match="no gradient"):
        EKFAC({"site": Factors(good.Q_in, good.Q_out, torch.zeros(2, 2))})
    with pytest.raises(CurvatureError, match="shape"):
        EKFAC({"site": good}).precondition({"site": torch.ones(3, 2)})


def test_shows_itself_as_text_and_as_a_table_with_everything_escaped():
    curvature = EKFAC(
        {},
        record=dict(
            model="<script>alert(1)</script>",
            data="a&b",
            n_examples=1200,
            n_tokens=34567,
            labels="sampled",
            sites=["q", "k", "v", "o"],
            seconds=1.5,
        ),
    )
    shown = curvature._repr_html_()
    assert (
        "<script>" not in shown
        and "&lt;script&gt;" in shown
        and "1,200 examples, 34,567 response tokens from a&amp;b" in shown
        and "4: q, k, v …" in shown
    )
    assert "0.1 × mean eigenvalue" in repr(curvature) and "0.1 × mean eigenvalue" in shown
    assert "None" not in EKFAC({})._repr_html_()
