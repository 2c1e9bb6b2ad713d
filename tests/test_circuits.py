"""Parts of models and what they do: against autograd, dense constructions, loops, and small steps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from concept_tda.data.batches import batches
from concept_tda.data.documents import token_windows
from concept_tda.foundation.errors import ConceptTDAError
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.preconditioners import GaussNewton
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.scorers import Influence
from concept_tda.mechanisms.circuits import (
    CircuitError,
    CopyProbe,
    CustomProbe,
    InductionProbe,
    PreviousTokenProbe,
    UnitEKFAC,
    UnitInfluence,
    attention_patterns,
    copy_targets,
    head,
    head_scores,
    heads,
    induction_weights,
    neurons,
    random_sequences,
    repeated_sequences,
    slice_of,
)
from concept_tda.model.loading import SiteError, load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.model.sites import Site, Slice, Unit, resolve_sites

from tiny import double_norms, tiny_pair

FAMILIES = (
    "llama",
    "gemma",
    "gpt_neox",
    "gpt2",
)  # shared keys, one shared key, fused by head, fused and transposed
H, D = 4, 4  # heads of 4 numbers, width 16


def opened(family, attention="eager"):
    model, tokenizer = tiny_pair(family, dtype=torch.float64, attention=attention)
    return load_model((double_norms(model), tokenizer))


def own_gradients(lm, block, number):
    """What autograd left in `.grad`, cut by hand for each family: q, k, v [4, 16] and o [16, 4]."""
    part, span = lm.blocks[block], slice(number * D, (number + 1) * D)
    if hasattr(part, "attn"):
        q, k, v = part.attn.c_attn.weight.grad.T.split(16)
        return q[span], k[span], v[span], part.attn.c_proj.weight.grad.T[:, span]
    if hasattr(part, "attention"):
        fused = part.attention.query_key_value.weight.grad.view(H, 3, D, 16)[number]
        return *fused, part.attention.dense.weight.grad[:, span]
    at = part.self_attn
    group = number * (len(at.k_proj.weight) // D) // H
    shared = slice(group * D, (group + 1) * D)
    return (
        at.q_proj.weight.grad[span],
        at.k_proj.weight.grad[shared],
        at.v_proj.weight.grad[shared],
        at.o_proj.weight.grad[:, span],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_head_are_slices_of_autograd(family):
    lm = opened(family)
    windows = random_sequences(lm, 3, 9)
    for number in range(H):
        one, query = head(lm, 1, number), LossQuery(windows)
        found = query.gradients(lm, one.units)
        lm.model.requires_grad_(True).zero_grad()
        for batch in batches(lm.tokenize(windows)):
            (-(token_losses(lm, batch) * loss_weights(batch, dtype=torch.float64)).sum() / 3).backward()
        q, k, v, o = own_gradients(lm, 1, number)
        for unit, own in zip(one.units, (torch.cat([q, k]), v, o)):
            assert own.abs().max() > 0
            torch.testing.assert_close(found[unit.name], own, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_head_are_those_that_move_its_pattern(family):
    lm = opened(family)
    batch = next(batches(lm.tokenize(random_sequences(lm, 2, 8))))
    with torch.no_grad():
        before = attention_patterns(lm, batch)[1]
        for one in [one for one in heads(lm) if one.block == 1]:
            for part, moved in zip(one.qk.parts, ("queries", "keys")):
                weight, rows = part.site.weight, list(part.rows)
                old = weight[rows].clone()
                weight[rows] += 0.3 * torch.randn_like(old)
                change_H = (attention_patterns(lm, batch)[1] - before).abs().amax((0, 2, 3))
                weight[rows] = old
                expected = {two.number for two in heads(lm) if two.block == 1 and two.group == one.group}
                expected = {one.number} if moved == "queries" else expected
                assert set((change_H > 1e-6).nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_a_head_leave_through_its_output(family):
    lm = opened(family)
    batch = next(batches(lm.tokenize(random_sequences(lm, 2, 8))))
    for one in [one for one in heads(lm) if one.block == 1]:
        (v,), readers = one.v.parts, [two for two in heads(lm) if two.block == 1 and two.group == one.group]
        old = {two.number: two.o.parts[0].cut(two.o.parts[0].site.weight).clone() for two in readers}
        with torch.no_grad():
            values = v.site.weight[list(v.rows)].clone()
            for closed in (False, True):
                if closed:
                    for two in readers:
                        two.o.parts[0].site.weight[:, list(two.o.parts[0].columns)] = 0
                before = token_losses(lm, batch)
                v.site.weight[list(v.rows)] = values + 1
                changed = (token_losses(lm, batch) - before).abs().max()
                v.site.weight[list(v.rows)] = values
                assert (changed < 1e-12) if closed else (changed > 1e-4)
            for two in readers:
                two.o.parts[0].site.weight[:, list(two.o.parts[0].columns)] = old[two.number]


def flows_of(lm, modules, windows):
    """Input [N][T, in] of the first module and output gradients [N][T, out] of all, of each summed loss."""
    found = []
    for batch in batches(lm.tokenize(windows), token_budget=1):
        kept = {}

        def keep(module, args, output):
            output.requires_grad_()
            output.retain_grad()
            kept[module] = args[0].detach(), output

        hooks = [module.register_forward_hook(keep) for module in modules]
        token_losses(lm, batch).sum().backward()
        for hook in hooks:
            hook.remove()
        found.append((kept[modules[0]][0][0], torch.cat([kept[module][1].grad[0] for module in modules], 1)))
    return found


def test_curvature_of_a_joint_block_is_the_dense_construction():
    lm = opened("llama")
    windows, one = random_sequences(lm, 30, 7), head(lm, 0, 2)
    at = lm.blocks[0].self_attn
    rows = [
        *range(8, 12),
        *range(16 + 4, 16 + 8),
    ]  # queries of head 2, and the keys of group 1 after 16 rows of queries
    flows = [(x, delta[:, rows]) for x, delta in flows_of(lm, [at.q_proj, at.k_proj], windows)]
    A = sum(x.T @ x / len(x) for x, _ in flows)
    S = sum(delta.T @ delta for _, delta in flows)
    Q_in, Q_out = torch.linalg.eigh(A)[1], torch.linalg.eigh(S)[1]
    G_Noi = torch.stack([delta.T @ x for x, delta in flows])
    dense = torch.einsum("na,nb->ab", G_Noi.flatten(1), G_Noi.flatten(1)) / (
        30 * 6
    )  # the Fisher, queries × keys included
    U = torch.kron(Q_out, Q_in)
    eigenvalues = (U.T @ dense @ U).diagonal().view(8, 16)
    curvature = UnitEKFAC.fit(lm, windows, one.units, labels="empirical", progress=False, cache=False)
    torch.testing.assert_close(curvature.factors[one.qk.name].eigenvalues, eigenvalues, rtol=1e-8, atol=1e-16)
    assert dense.view(8, 16, 8, 16)[:4, :, 4:].abs().max() > 1e-3 * dense.abs().max(), (
        "queries and keys act together"
    )
    G, λ = torch.randn(8, 16, dtype=torch.float64), max(0.1 * eigenvalues.mean().item(), 1e-5)
    solved = U @ torch.diag(1 / (eigenvalues.flatten() + λ)) @ U.T @ G.flatten()
    found = curvature.precondition({one.qk.name: G})[one.qk.name]
    torch.testing.assert_close(found, solved.view(8, 16), rtol=1e-8, atol=1e-12)
    v, o = curvature.factors[one.v.name], curvature.factors[one.o.name]
    assert v.Q_in.data_ptr() == curvature.factors[one.qk.name].Q_in.data_ptr(), "one input, one A"
    assert o.Q_in.shape == (4, 4) and o.Q_out.shape == (16, 16)


def test_a_unit_that_is_a_layer_has_the_curvature_of_the_layer():
    lm = opened("gpt2")
    windows, layer = random_sequences(lm, 6, 7), resolve_sites(lm, r"0\.attn\.c_attn")[0]
    whole = EKFAC.fit(lm, windows, [layer], progress=False, cache=False)
    unit = slice_of(lm, layer.name, rows=range(48))
    same = EKFAC.fit(lm, windows, [unit], progress=False, cache=False)
    torch.testing.assert_close(same.factors[unit.name].eigenvalues, whole.factors[layer.name].eigenvalues)
    assert same.record["labels"] == "sampled"


def test_smallest_damping():
    lm = opened("gpt2")
    windows, unit = random_sequences(lm, 6, 7), head(lm, 0, 0).qk
    fitted = UnitEKFAC.fit(lm, windows, [unit], progress=False, cache=False)
    mean = fitted.factors[unit.name].eigenvalues.mean().item()
    assert float(fitted.damped(1.0).damping_of(unit.name)) == pytest.approx(max(mean, 1e-5))
    assert float(fitted.damped(1e-12).damping_of(unit.name)) == pytest.approx(1e-5)
    sums = fitted.of_sums()
    assert sums.factors[unit.name].eigenvalues.mean().item() == pytest.approx(6 * mean)
    assert sums.fingerprint != fitted.fingerprint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ("identity", "ekfac"))
def test_a_step_on_the_top_example_raises_the_probe_as_predicted(family, kind):
    lm = opened(family)
    windows, one = random_sequences(lm, 8, 9, seed=3), head(lm, 1, 2)
    probe = PreviousTokenProbe(1, 2, random_sequences(lm, 4, 9))
    curvature = "identity"
    if kind == "ekfac":
        curvature = UnitEKFAC.fit(lm, windows, [one.qk], progress=False, cache=False)
    scorer = UnitInfluence(lm, probe, [one.qk], curvature=curvature)
    result = scorer.score(windows, progress=False)
    top = int(result.scores.argmax())
    step = LossQuery(windows.select([top])).gradients(lm, [one.qk])  # minus the gradient of its loss
    step = scorer.curvature.precondition(step)[one.qk.name]
    size = 0.003 / step.norm().item()
    before = probe.value(lm)
    with torch.no_grad():
        first = 0
        for part in one.qk.parts:
            part.site.weight[list(part.rows)] += size * step[first : first + D]
            first += D
    change = (probe.value(lm) - before) / size
    assert change > 0 and change == pytest.approx(result.scores[top], rel=0.02)


@pytest.mark.parametrize("family", ("llama", "gpt2"))
def test_engines_agree_on_units(family):
    lm = opened(family)
    windows, units = (
        random_sequences(lm, 4, 7),
        [*head(lm, 0, 1).units, *head(lm, 0, 0).units, *neurons(lm, 0, [3, 1])],
    )
    probe = CopyProbe(repeated_sequences(lm, 3, 4))
    curvature = UnitEKFAC.fit(lm, windows, units, progress=False, cache=False)
    scores = {
        engine: UnitInfluence(lm, probe, units, curvature=curvature, engine=engine)
        .score(windows, progress=False)
        .scores
        for engine in ("reverse", "stacked", "forward", "difference")
    }
    for engine in ("stacked", "forward", "difference"):
        rel = 1e-2 if engine == "difference" else 1e-5
        assert scores[engine] == pytest.approx(
            scores["reverse"], rel=rel, abs=rel * np.abs(scores["reverse"]).max()
        )


def test_units_of_all_heads_together_are_the_layers():
    lm = opened("gpt_neox")
    windows, probe = random_sequences(lm, 4, 7), CopyProbe(repeated_sequences(lm, 3, 4))
    everything = [unit for one in heads(lm) for unit in one.units]
    parts = UnitInfluence(lm, probe, everything, curvature="identity").score(windows, progress=False).scores
    whole = (
        Influence(lm, probe, sites="attention", curvature="identity").score(windows, progress=False).scores
    )
    assert parts == pytest.approx(whole, rel=1e-9)


def test_summed_losses_count_tokens():
    lm = opened("gpt2")
    windows = token_windows([[3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15, 16, 17, 18]])
    units, probe = head(lm, 1, 0).units, CopyProbe(repeated_sequences(lm, 3, 4))
    options = dict(curvature="identity")
    mean = UnitInfluence(lm, probe, units, **options).score(windows, tokens=True, progress=False)
    total = UnitInfluence(lm, probe, units, reduction="sum", **options).score(
        windows, tokens=True, progress=False
    )
    assert total.scores == pytest.approx(mean.scores * [4, 2, 7], rel=1e-6)
    assert total.token_scores[2] == pytest.approx(mean.token_scores[2] * 7, rel=1e-5)
    assert (mean.card.reduction, total.card.reduction) == ("mean", "sum")


def forward_of(follow):
    """Logits of a model that finds the last earlier occurrence s of a token, and says that at s + follow."""

    def forward(input_ids, **_):
        logits = torch.zeros(*input_ids.shape, 280)
        for b, ids in enumerate(input_ids.tolist()):
            for t, token in enumerate(ids):
                earlier = [s for s in range(t) if ids[s] == token]
                if earlier:
                    logits[b, t, ids[earlier[-1] + follow]] = 60.0
        return SimpleNamespace(logits=logits)

    return forward


def test_copy_probe_scores_the_token_that_comes_next(monkeypatch):
    lm = opened("llama")
    loops = repeated_sequences(lm, 3, 32)
    probe = CopyProbe(loops)
    for positions, targets in probe.targets:
        assert positions.tolist() == list(range(32, 64)) and len(targets) == 32
    for window, (positions, targets) in zip(loops, probe.targets):
        assert torch.equal(targets[:-1], window.tokens[positions[:-1] + 1])
        assert targets[-1] == window.tokens[0], "the sequence begins again"
    values = {}
    for follow in (0, 1, 2):
        monkeypatch.setattr(lm.model, "forward", forward_of(follow))
        values[follow] = probe.value(lm)
    assert values[1] == pytest.approx(0, abs=1e-6), "a perfect induction head is right everywhere"
    assert values[0] < -50 and values[2] < -50, "its neighbours nowhere"


def test_periods_come_from_the_argument_or_the_metadata():
    ids = [5, 6, 7, 5, 6, 7, 5, 6]
    windows = token_windows([ids], metadata=[{"period": 3}])
    positions, targets = CopyProbe(windows).targets[0]
    assert positions.tolist() == [3, 4, 5, 6, 7] and targets.tolist() == [6, 7, 5, 6, 7]
    assert CopyProbe(token_windows([ids]), period=3).targets[0][1].tolist() == targets.tolist()
    with pytest.raises(CircuitError, match="does not repeat after 4"):
        CopyProbe(token_windows([ids]))


def test_induction_counts_all_earlier_matches():
    lm = opened("llama")
    rows = [[5, 6, 5, 7, 5, 8, 9, 6], [3, 3, 4, 3, 9, 4], [7, 8, 9, 10]]
    data = lm.tokenize(token_windows(rows))
    for batch in batches(data):
        weights = induction_weights(batch)
        for b, row in enumerate(batch.rows.tolist()):
            ids, expected = rows[row], np.zeros(weights.shape[1:])
            for t in range(len(ids)):
                for s in range(t):
                    if s > 0 and ids[s - 1] == ids[t]:
                        expected[t, s] = 1
            expected /= max(1, (expected.sum(1) > 0).sum())
            np.testing.assert_allclose(weights[b].numpy(), expected, rtol=1e-6)
    with torch.no_grad():
        uniform = induction_weights(next(batches(data, rows=[0])))[0]
    assert uniform[4].nonzero().flatten().tolist() == [1, 3], "the third 5 may look at the 6 and at the 7"


def test_scores_of_heads_are_those_of_hand_made_patterns(monkeypatch):
    lm = opened("llama")
    loops, T = repeated_sequences(lm, 2, 5), 10
    look = torch.zeros(T, T)
    for t in range(T):
        look[t, t - 4 if t >= 5 else 0] = 1
    back = torch.diag(torch.ones(T - 1), -1)
    patterns = torch.stack([look, back, torch.eye(T), torch.zeros(T, T)])[None].expand(2, -1, -1, -1)
    monkeypatch.setattr(
        "concept_tda.mechanisms.circuits.attention_patterns", lambda lm, batch: [patterns, patterns]
    )
    np.testing.assert_allclose(head_scores(lm, loops), [[1, 0, 0, 0]] * 2, atol=1e-6)
    np.testing.assert_allclose(head_scores(lm, loops, "previous_token"), [[1 / 9, 1, 0, 0]] * 2, atol=1e-6)


def test_padding_does_not_enter():
    lm = opened("gpt2")
    rows = [[5, 6, 5, 7, 5, 8], [7, 8, 9, 7, 8, 9, 7, 8, 9, 7]]
    apart = [head_scores(lm, token_windows([row])) for row in rows]
    np.testing.assert_allclose(head_scores(lm, token_windows(rows)), np.mean(apart, 0), rtol=1e-8)
    probes = [PreviousTokenProbe(1, 1, token_windows([row])).value(lm) for row in rows]
    assert PreviousTokenProbe(1, 1, token_windows(rows)).value(lm) == pytest.approx(np.mean(probes))


def of_the_first(patterns, batch):
    return patterns[0][:, 0, -1, 0]


def total(patterns, batch):
    return patterns[0].sum()


def test_fingerprints_cover_what_is_asked():
    lm = opened("llama")
    noise, loops = random_sequences(lm, 2, 8), repeated_sequences(lm, 2, 4)
    probes = [
        PreviousTokenProbe(0, 0, noise),
        PreviousTokenProbe(0, 1, noise),
        PreviousTokenProbe(1, 0, noise),
        PreviousTokenProbe(0, 0, loops),
        InductionProbe(0, 0, loops),
        CopyProbe(loops),
        CopyProbe(loops, period=4),
        CustomProbe(noise, of_the_first, "first"),
        CustomProbe(noise, of_the_first, "first", version="2"),
    ]
    prints = [probe.fingerprint for probe in probes]
    assert len(set(prints)) == len(prints) - 1, "only the two copy probes ask the same"


def test_errors_say_what_there_is():
    lm, fast = opened("llama"), opened("llama", "sdpa")
    noise, loops = random_sequences(lm, 2, 8), repeated_sequences(lm, 2, 4)
    cases = [
        (lambda: head(lm, 0, 4), "block 0 has heads 0 to 3"),
        (lambda: head(lm, 2, 0), r"blocks with heads are \[0, 1\]"),
        (lambda: PreviousTokenProbe(0, 9, noise).value(lm), "no head 9 in block 0"),
        (lambda: neurons(lm, 5, [0]), "block 5 .* has no MLP"),
        (lambda: neurons(lm, 0, [0, 0]), "different numbers from 0 to 31"),
        (lambda: neurons(lm, 0, []), "one or more"),
        (lambda: slice_of(lm, "nothing"), "no linear layer 'nothing'"),
        (lambda: slice_of(lm, "model.layers.0.mlp.up_proj", rows=[32]), "0 to 31"),
        (lambda: InductionProbe(0, 0, noise), "repeat no token"),
        (lambda: CopyProbe(noise), "does not repeat after 4"),
        (lambda: copy_targets(torch.arange(4), 0), "does not repeat after 0"),
        (lambda: head_scores(lm, noise), "no token of these windows occurs twice"),
        (lambda: head_scores(lm, noise, "beauty"), "induction, previous_token"),
        (lambda: head_scores(fast, loops), 'attention="eager"'),
        (lambda: PreviousTokenProbe(0, 0, noise).value(fast), 'attention="eager"'),
        (lambda: random_sequences(lm, 2, 1000), "can't be drawn"),
        (lambda: CustomProbe(noise, of_the_first, "x", reads="tea"), "reads"),
        (lambda: CustomProbe(noise, total, "x").value(lm), "one number for each of the 2"),
        (lambda: UnitInfluence(lm, CopyProbe(loops), head(lm, 0, 0).units, reduction="max"), "reduction"),
    ]  # fmt: skip
    for act, message in cases:
        with pytest.raises(CircuitError, match=message):
            act()


def test_units_are_refused_where_only_layers_are_understood():
    lm = opened("llama")
    units, noise = head(lm, 0, 0).units, random_sequences(lm, 3, 6)
    with pytest.raises(SiteError, match="part of a layer"):
        resolve_sites(lm, units)
    with pytest.raises(SiteError, match="part of a layer"):
        GaussNewton(lm, noise, units)
    with pytest.raises(SiteError, match="part of a layer"):
        EKFAC.fit(lm, noise, units, backend="curvlinops", progress=False, cache=False)
    with pytest.raises(SiteError, match="another model"):
        EKFAC.fit(opened("llama"), noise, units, progress=False, cache=False)


def test_slices_of_different_inputs_are_no_unit():
    lm = opened("llama")
    q, other = (Site(f"model.layers.{n}.self_attn.q_proj", n, lm.blocks[n].self_attn.q_proj) for n in (0, 1))
    wrong = Unit("two blocks", 0, q.module, (Slice(q, rows=(0,)), Slice(other, rows=(0,))))
    with pytest.raises(SiteError, match="read different tensors"):
        LossQuery(random_sequences(lm, 2, 6)).gradients(lm, [wrong])
    with pytest.raises(SiteError, match="same tensor"):
        Unit("two widths", 0, q.module, (Slice(q, columns=(0, 1)), Slice(q, columns=(2,))))


def test_an_unknown_layout_is_refused():
    from transformers import FalconConfig, FalconForCausalLM

    lm = opened("llama")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=280)
    falcon = load_model((FalconForCausalLM(FalconConfig(**sizes, multi_query=True)), lm.tokenizer))
    with pytest.raises(ConceptTDAError, match="nobody knows how the heads .* lie"):
        heads(falcon)
