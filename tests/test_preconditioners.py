"""DataInf, LoGra and conjugate gradients against dense matrices in float64, on a small trained Llama."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from concept_tda.data.conversations import load_conversations
from concept_tda.influence.curvature import (
    EKFAC,
    CurvatureError,
    _linear_layers,
    _ResponseLogits,
    batch_labels,
)
from concept_tda.influence.preconditioners import ConjugateGradient, DataInf, GaussNewton, LoGra
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.scorers import InfluenceFunction
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites

from tiny import double_norms, tiny_model, tiny_pair, tiny_tokenizer

TRAIN = [
    {"prompt": f"Is {thing} {quality}?", "response": "yes" if (i + j) % 2 else "no, no"}
    for i, thing in enumerate(("sky", "sea", "sun"))
    for j, quality in enumerate(("blue", "hot"))
]
PATTERN = r"(q|v)_proj"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def plain_losses(lm, example, reduction="mean", labels=None):
    mask = example.response_mask[1:]
    logits = lm.model(input_ids=example.input_ids[None]).logits[0, :-1][mask]
    return cross_entropy(
        logits, example.input_ids[1:][mask] if labels is None else labels, reduction=reduction
    )


@pytest.fixture(scope="module")
def trained():
    "A Llama trained for some steps, its data, the gradient of a query at the sites."
    lm = load_model(
        (
            double_norms(tiny_model("llama", dtype=torch.float64, vocab_size=len(tiny_tokenizer()))),
            tiny_tokenizer(),
        )
    )
    train = load_conversations(TRAIN)
    optimizer = torch.optim.Adam(lm.model.parameters(), 1e-2)
    for _ in range(15):
        optimizer.zero_grad()
        (sum(plain_losses(lm, z) for z in lm.tokenize(train)) / len(train)).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    query = LossQuery(load_conversations([{"prompt": "Is ice hot?", "response": "no"}]))
    return lm, train, query.gradients(lm, resolve_sites(lm, PATTERN))


def flat(named):
    return torch.cat([g.flatten() for g in named.values()])


def like(vector, named):
    parts = vector.split([g.numel() for g in named.values()])
    return {name: part.view(g.shape) for (name, g), part in zip(named.items(), parts)}


def example_gradients(lm, train, sites, reduction="mean"):
    "[n, weights] by a plain loop of autograd."
    weights = [s.module.weight for s in sites]
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(plain_losses(lm, z, reduction), weights)])
            for z in lm.tokenize(train)
        ]
    )


@pytest.fixture(scope="module")
def dense(trained):
    """The Gauss-Newton matrix from autograd: E over the model's own labels of ∇log p ∇log pᵀ, every label of
    every response token, mean over tokens."""
    lm, train, gradients = trained
    weights, total, n = [s.module.weight for s in resolve_sites(lm, PATTERN)], 0, 0
    with sdpa_kernel(SDPBackend.MATH):
        for example in lm.tokenize(train):
            mask = example.response_mask[1:]
            for log_p in lm.model(input_ids=example.input_ids[None]).logits[0, :-1][mask].log_softmax(1):
                J = torch.autograd.grad(
                    log_p,
                    weights,
                    torch.eye(len(log_p), dtype=log_p.dtype),
                    is_grads_batched=True,
                    retain_graph=True,
                )
                J = torch.cat([j.flatten(1) for j in J], 1) * log_p.exp().sqrt()[:, None].detach()
                total, n = total + J.T @ J, n + 1
    assert n == lm.tokenize(train).n_response_tokens
    return total / n


# --- Gauss-Newton and conjugate gradients ---


def test_products_equal_the_dense_gauss_newton_matrix(trained, dense):
    lm, train, gradients = trained
    v = torch.randn(len(dense), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for budget in (1, 4096):  # one at a time, and padded together
        product = GaussNewton(lm, train, PATTERN, token_budget=budget).product(like(v, gradients))
        torch.testing.assert_close(flat(product), dense @ v, rtol=1e-9, atol=1e-12)
    first = next(iter(gradients))  # a direction at one site alone: the others are fixed
    n = gradients[first].numel()
    alone = GaussNewton(lm, train, PATTERN).product({first: v[:n].view_as(gradients[first])})
    torch.testing.assert_close(flat(alone), dense[:n, :n] @ v[:n], rtol=1e-9, atol=1e-12)
    assert all(w.grad is None and w.requires_grad for w in lm.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "lora"])
def test_products_equal_curvlinops(family):
    from curvlinops import GGNLinearOperator

    train = load_conversations(TRAIN[:3])
    model = tiny_model(
        "llama" if family == "lora" else family, dtype=torch.float64, vocab_size=len(tiny_tokenizer())
    )
    if family == "lora":
        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        ).double()
    lm = load_model((model, tiny_tokenizer()))
    data, sites = lm.tokenize(train), resolve_sites(lm, "lora" if family == "lora" else "attention")
    from concept_tda.data.batches import batches

    examples = [({"batch": batch}, batch_labels(batch)) for batch in batches(data, token_budget=1)]
    generator = torch.Generator().manual_seed(0)
    directions = {
        s.name: torch.randn(s.out_features, s.in_features, dtype=torch.float64, generator=generator)
        for s in sites
    }
    ours = GaussNewton(lm, data, sites).product(directions)
    lm.model.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), _linear_layers(lm, sites) as linears:
        weights = [linear.weight.requires_grad_() for linear in linears]
        operator = GGNLinearOperator(
            _ResponseLogits(lm),
            torch.nn.CrossEntropyLoss(reduction="sum"),
            weights,
            examples,
            check_deterministic=False,
            num_data=len(examples),
            batch_size_fn=lambda inputs: 1,
        )
        theirs = operator @ [directions[s.name] for s in sites]
    for s, expected in zip(sites, theirs):
        torch.testing.assert_close(
            ours[s.name],
            expected.detach() / data.n_response_tokens,
            rtol=1e-4,
            atol=1e-6 * expected.abs().max().item(),
        )


def test_conjugate_gradients_reach_the_exact_solution(trained, dense):
    lm, train, gradients = trained
    ekfac = EKFAC.fit(lm, train, PATTERN, cache=False, progress=False)
    mean = torch.cat([f.eigenvalues.flatten() for f in ekfac.factors.values()]).mean().item()
    for damping, relative, lam in ((1.0, True, mean), (1e-2, False, 1e-2)):
        solver = ConjugateGradient(
            lm,
            train,
            ekfac,
            iterations=600,
            tolerance=1e-9,
            damping=damping,
            relative=relative,
            progress=False,
        )
        assert solver.lam == pytest.approx(lam, rel=1e-9) and solver.notes == []
        solution = flat(solver.precondition(gradients))
        exact = torch.linalg.solve(dense + lam * torch.eye(len(dense)).double(), flat(gradients))
        assert (solution - exact).norm() < 1e-6 * exact.norm()
        assert (
            solver.record["converged"]
            and solver.record["residuals"][-1] <= 1e-9
            and f"{len(solver.record['residuals'])} iterations" in solver.notes[0]
        )


def test_every_iteration_improves_on_ekfac(trained, dense):
    lm, train, gradients = trained
    ekfac = EKFAC.fit(lm, train, PATTERN, cache=False, progress=False)
    previous, lam = np.inf, None
    for iterations in (1, 3, 10, 30):
        solver = ConjugateGradient(lm, train, ekfac, iterations=iterations, tolerance=0, progress=False)
        solution = solver.precondition(gradients)
        if iterations == 1:  # the first iteration is EK-FAC, up to its length
            cosine = torch.nn.functional.cosine_similarity(
                flat(solution), flat(ekfac.damped(solver.lam, relative=False).precondition(gradients)), dim=0
            )
            assert cosine > 1 - 1e-12
        lam = solver.lam
        exact = torch.linalg.solve(dense + lam * torch.eye(len(dense)).double(), flat(gradients))
        difference = flat(solution) - exact
        error = (
            (difference @ (dense @ difference + lam * difference)).sqrt().item()
        )  # the norm conjugate gradients decrease in
        assert error < previous
        previous = error
        assert (
            len(solver.record["residuals"]) == iterations
            and not solver.record["converged"]
            and "above the tolerance" in solver.notes[0]
        )


def test_a_solve_that_fell_short_is_on_the_card(trained):
    lm, train, _ = trained
    ekfac = EKFAC.fit(lm, train, PATTERN, cache=False, progress=False)
    answers = load_conversations([{"prompt": "Is ice hot?", "response": "no"}])
    result = InfluenceFunction(
        lm,
        answers,
        sites=PATTERN,
        curvature=ConjugateGradient(lm, train, ekfac, iterations=2, progress=False),
    ).score(train, progress=False)
    assert (
        any("after 2 iterations, above the tolerance" in note for note in result.card.notes)
        and "mean of all EK-FAC eigenvalues" in result.card.damping
    )


# --- DataInf ---


@pytest.mark.parametrize("damping, relative", [(0.1, True), (3e-3, False)])
def test_datainf_equals_the_written_out_loop(trained, damping, relative):
    lm, train, gradients = trained
    sites = resolve_sites(lm, PATTERN)
    fitted = DataInf.fit(
        lm, train, PATTERN, damping=damping, relative=relative, token_budget=100, progress=False
    ).precondition(gradients)
    columns = example_gradients(lm, train, sites).split([g.numel() for g in gradients.values()], 1)
    for (name, G), g_nk in zip(gradients.items(), columns):
        lam = damping * g_nk.square().sum(1).mean() / G.numel() if relative else damping
        expected = torch.zeros(G.numel(), dtype=torch.float64)
        for g in g_nk:
            expected += torch.linalg.solve(
                torch.outer(g, g) + lam * torch.eye(len(g)).double(), G.flatten()
            ) / len(g_nk)  # the mean of exact inverses
        torch.testing.assert_close(
            fitted[name].flatten(), expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item()
        )  # the mean over tokens has float32 weights


def test_datainf_says_its_price_and_refuses_it(trained):
    lm, train, gradients = trained
    price = DataInf.price(lm, train, PATTERN)
    assert price == len(train) * flat(gradients).numel() * 8
    kept = DataInf.fit(lm, train, PATTERN, memory_budget=price, progress=False)
    assert sum(g.nbytes for g in kept.gradients.values()) == price == kept.record["bytes"]
    with pytest.raises(CurvatureError, match="memory_budget"):
        DataInf.fit(lm, train, PATTERN, memory_budget=price - 1)


def test_datainf_on_lora():
    model = get_peft_model(
        tiny_model("llama", dtype=torch.float64, vocab_size=len(tiny_tokenizer())),
        LoraConfig(r=2, target_modules="all-linear"),
    )
    lm, train = load_model((model.double(), tiny_tokenizer())), load_conversations(TRAIN)
    with pytest.raises(CurvatureError, match="no gradient.*untrained LoRA"):
        DataInf.fit(lm, train, progress=False)  # B = 0, so A has none
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    result = InfluenceFunction(
        lm, train[:1], sites="lora", curvature=DataInf.fit(lm, train, progress=False)
    ).score(train, progress=False)
    assert (
        result.scores.argmax() == 0 and result.card.curvature == "DataInf"
    )  # nothing helps an example like itself


# --- LoGra ---


@pytest.mark.parametrize("damping, relative", [(0.1, True), (3e-3, False)])
def test_logra_at_full_rank_is_the_exact_solve_of_each_block(trained, damping, relative):
    lm, train, gradients = trained
    sites = resolve_sites(lm, PATTERN)
    columns = example_gradients(lm, train, sites, "sum").split([g.numel() for g in gradients.values()], 1)
    for seed in (0, 1):
        logra = LoGra.fit(
            lm,
            train,
            PATTERN,
            rank=64,
            labels="empirical",
            damping=damping,
            relative=relative,
            seed=seed,
            token_budget=100,
            progress=False,
        )
        fitted = logra.precondition(gradients)
        for (name, G), g_nk in zip(gradients.items(), columns):
            F = g_nk.T @ g_nk / lm.tokenize(train).n_response_tokens
            lam = damping * F.diagonal().mean() if relative else damping
            exact = torch.linalg.solve(F + lam * torch.eye(len(F)).double(), G.flatten())
            torch.testing.assert_close(fitted[name].flatten(), exact, rtol=1e-8, atol=1e-10)


def test_logra_scores_are_those_between_projected_gradients(trained):
    lm, train, _ = trained
    sites, answers = (
        resolve_sites(lm, PATTERN),
        load_conversations([{"prompt": "Is ice hot?", "response": "no"}]),
    )
    logra = LoGra.fit(lm, train, PATTERN, rank=(3, 5), labels="empirical", progress=False)
    assert all(P_out.shape[0] == 3 and P_in.shape[0] == 5 for P_out, P_in in logra.projections.values())
    scores = (
        InfluenceFunction(lm, answers, sites=PATTERN, curvature=logra).score(train, progress=False).scores
    )
    shapes = {s.name: torch.empty(s.out_features, s.in_features) for s in sites}
    expected = np.zeros(len(train))
    for name, F in logra.fisher.items():
        P_out, P_in = logra.projections[name]
        small = lambda row: (P_out @ like(row, shapes)[name] @ P_in.T).flatten()
        summed = torch.stack([small(row) for row in example_gradients(lm, train, sites, "sum")])
        torch.testing.assert_close(F, summed.T @ summed / lm.tokenize(train).n_response_tokens)
        solved = torch.linalg.solve(
            F + 0.1 * F.diagonal().mean() * torch.eye(len(F)).double(),
            small(example_gradients(lm, answers, sites)[0]),
        )
        expected += [(solved @ small(row)).item() for row in example_gradients(lm, train, sites)]
    np.testing.assert_allclose(scores, expected, rtol=1e-5)  # the mean over tokens has float32 weights


def test_logra_projections_are_seeded_by_site_and_orthonormal(trained):
    lm, train, _ = trained
    first = LoGra.fit(lm, train, PATTERN, rank=4, progress=False)
    fewer = LoGra.fit(
        lm, train, r"layers\.1.*v_proj", rank=4, progress=False
    )  # a site's projection does not depend on the others
    other = LoGra.fit(lm, train, PATTERN, rank=4, seed=1, progress=False)
    single = load_model(tiny_pair("llama"))  # nor on the precision, up to rounding
    for name, (P_out, P_in) in first.projections.items():
        for P in (P_out, P_in):
            torch.testing.assert_close(P @ P.T, torch.eye(4).double())
        assert not torch.allclose(P_in, other.projections[name][1])
        if name in fewer.projections:
            torch.testing.assert_close(P_in, fewer.projections[name][1])
        torch.testing.assert_close(
            P_in.float(), LoGra.fit(single, train, PATTERN, rank=4, progress=False).projections[name][1]
        )
    inputs = [P_in for _, P_in in first.projections.values()]
    assert not torch.allclose(inputs[0], inputs[1])


def test_logra_on_the_leading_eigenvectors(trained):
    lm, train, gradients = trained
    ekfac = EKFAC.fit(lm, train, PATTERN, cache=False, progress=False)
    logra = LoGra.fit(lm, train, PATTERN, rank=2, basis=ekfac, progress=False)
    for name, f in ekfac.factors.items():
        assert torch.equal(logra.projections[name][1], f.Q_in[:, -2:].T)
    captured = lambda l: sum(F.trace() for F in l.fisher.values())
    assert captured(logra) > 2 * captured(LoGra.fit(lm, train, PATTERN, rank=2, progress=False))
    with pytest.raises(CurvatureError, match="basis"):
        LoGra.fit(lm, train, "mlp", basis=ekfac)


# --- all of them ---


@pytest.fixture(scope="module")
def fitted(trained):
    lm, train, _ = trained
    ekfac = EKFAC.fit(lm, train, PATTERN, cache=False, progress=False)
    return [
        DataInf.fit(lm, train, PATTERN, progress=False),
        LoGra.fit(lm, train, PATTERN, rank=4, progress=False),
        ConjugateGradient(lm, train, ekfac, iterations=3, progress=False),
    ]


def test_a_step_on_the_top_example_raises_the_behaviour(trained, fitted):
    """The sign: the curvature is positive, so moving along H⁻¹∇f raises f, and so does training on the
    example with the highest score."""
    lm, train, gradients = trained
    for curvature in fitted:
        direction = curvature.precondition(gradients)
        assert (flat(direction) @ flat(gradients)).item() > 0
        assert {name: g.shape for name, g in direction.items()} == {
            name: g.shape for name, g in gradients.items()
        }
        result = InfluenceFunction(lm, train[:1], sites=PATTERN, curvature=curvature).score(
            train, progress=False
        )
        assert result.scores[0] > 0 and result.card.curvature == curvature.name and result.card.n_sites == 4


def test_preconditioning_is_linear_and_changes_nothing(trained, fitted):
    lm, train, gradients = trained
    before, copies = lm.fingerprint, {name: g.clone() for name, g in gradients.items()}
    for curvature in fitted[:2]:
        once, twice = (
            curvature.precondition(gradients),
            curvature.precondition({name: 2 * g for name, g in gradients.items()}),
        )
        torch.testing.assert_close(flat(twice), 2 * flat(once))
        half = curvature.precondition({name: g.float() for name, g in gradients.items()})
        assert all(g.dtype == torch.float32 for g in half.values())
    fitted[2].precondition(gradients)
    assert lm.fingerprint == before and all(torch.equal(g, copies[name]) for name, g in gradients.items())


def test_fingerprints_tell_settings_apart(trained, fitted):
    lm, train, _ = trained
    ekfac = fitted[2].preconditioner
    prints = [c.fingerprint for c in fitted] + [
        DataInf.fit(lm, train, PATTERN, damping=1, progress=False).fingerprint,
        DataInf.fit(lm, train[1:], PATTERN, progress=False).fingerprint,
        fitted[1].damped(1).fingerprint,
        LoGra.fit(lm, train, PATTERN, rank=4, seed=1, progress=False).fingerprint,
        ConjugateGradient(lm, train, ekfac, iterations=4).fingerprint,
        ConjugateGradient(lm, train, ekfac, iterations=3, damping=1).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    again = [
        DataInf.fit(lm, train, PATTERN, progress=False),
        LoGra.fit(lm, train, PATTERN, rank=4, progress=False),
    ]
    assert [c.fingerprint for c in again] == prints[:2]


def test_errors(trained, fitted):
    lm, train, gradients = trained
    ekfac = EKFAC.fit(lm, train, PATTERN, cache=False, progress=False)
    name, G = next(iter(gradients.items()))
    for curvature in fitted:
        with pytest.raises(CurvatureError, match="knows nothing of elsewhere"):
            curvature.precondition({"elsewhere": G})
        with pytest.raises(CurvatureError, match="shape"):
            curvature.precondition({name: G[1:]})
    for damping in (0, -1, float("nan"), float("inf")):
        with pytest.raises(CurvatureError, match="damping"):
            DataInf.fit(lm, train, PATTERN, damping=damping)
        with pytest.raises(CurvatureError, match="damping"):
            LoGra.fit(lm, train, PATTERN, damping=damping)
        with pytest.raises(CurvatureError, match="damping"):
            ConjugateGradient(lm, train, ekfac, damping=damping)
    for rank in (0, -1, (4,), (4, 0), 2.5):
        with pytest.raises(CurvatureError, match="rank"):
            LoGra.fit(lm, train, PATTERN, rank=rank)
    with pytest.raises(CurvatureError, match="labels"):
        LoGra.fit(lm, train, PATTERN, labels="true")
    with pytest.raises(CurvatureError, match="rank.*memory_budget|memory_budget.*rank"):
        LoGra.fit(lm, train, PATTERN, rank=8, memory_budget=1000)
    with pytest.raises(CurvatureError, match="EKFAC"):
        ConjugateGradient(lm, train, fitted[0])
    with pytest.raises(CurvatureError, match="iterations"):
        ConjugateGradient(lm, train, ekfac, iterations=0)
    with pytest.raises(CurvatureError, match="tolerance"):
        ConjugateGradient(lm, train, ekfac, tolerance=1)
    with pytest.raises(CurvatureError, match="whose weights differ"):
        ConjugateGradient(load_model(tiny_pair("llama", seed=3)), train, ekfac)
    with pytest.raises(CurvatureError, match="nothing to solve"):
        fitted[2].precondition({name: torch.zeros_like(G)})
    with pytest.raises(CurvatureError, match="not finite"):
        DataInf({name: torch.full((2, 3, 3), float("nan"))})
    with pytest.raises(CurvatureError, match="not finite"):
        LoGra({}, {name: torch.full((3, 3), float("inf"))})


def test_a_broken_model_is_named():
    model, tokenizer = tiny_pair("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:] = float("nan")
    lm, train = load_model((model, tokenizer)), load_conversations(TRAIN)
    with pytest.raises(CurvatureError, match="not finite"):
        LoGra.fit(lm, train, PATTERN, progress=False)
    with pytest.raises(CurvatureError, match="not finite"):
        DataInf.fit(lm, train, PATTERN, progress=False)
    sites = resolve_sites(lm, PATTERN)
    with pytest.raises(CurvatureError, match="not finite"):
        GaussNewton(lm, train, PATTERN).product({s.name: torch.ones(s.weight.shape) for s in sites})
    assert all(p.requires_grad for p in model.parameters())
