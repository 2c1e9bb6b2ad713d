"""Crosscoders: losses against written-out formulas and SAELens, planted latents, killed runs, bad input."""

import json
from dataclasses import replace

import pytest
import torch

from concept_tda.concepts import crosscoders as room
from concept_tda.concepts.crosscoders import (
    Crosscoder,
    CrosscoderError,
    CrosscoderRecipe,
    aligned_activations,
    crosscoder_losses,
    crosscoder_quality,
    difference_of_means,
    difference_sae,
    differences,
    load_paired_activations,
    measure_normalisation,
    paired_activations,
    train_crosscoder,
)
from concept_tda.data.conversations import load_conversations
from concept_tda.model.loading import load_model

from planted import Planted, found
from tiny import tiny_pair

QUICK = CrosscoderRecipe(latents=24, k=2, tokens=6_400, batch=64, learning_rate=3e-3)


def drawn(F=12, S=2, D=5, seed=0, dtype=torch.float64):
    """A crosscoder with random weights of all kinds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    names = tuple(f"m{s}:1" for s in range(S))
    return Crosscoder(
        names,
        normal(S, D, F),
        normal(F, S, D),
        normal(F),
        normal(S, D),
        normal(S, D),
        normal(S).abs() + 0.5,
        threshold=1.5,
    )


def batch(N=20, S=2, D=5, seed=3, dtype=torch.float64):
    return torch.randn(N, S, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- formulas


def written_out(c, x_NSD, k, difference=0.0, dead=None, auxk=None, weight=1 / 32):
    """The BatchTopK objective, loop by loop."""
    N, S, D = x_NSD.shape
    F = c.latents
    pre = [
        [c.bias_F[f] + sum(x_NSD[n, s] @ c.encoder_SDF[s, :, f] for s in range(S)) for f in range(F)]
        for n in range(N)
    ]
    length = [sum(c.decoder_FSD[f, s] @ c.decoder_FSD[f, s] for s in range(S)).sqrt() for f in range(F)]
    places = [(n, f) for n in range(N) for f in range(F)]
    ranked = sorted(places, key=lambda place: -(pre[place[0]][place[1]] * length[place[1]]).item())
    codes = {place: pre[place[0]][place[1]] for place in ranked[: int(k * N)] if pre[place[0]][place[1]] > 0}
    total = 0
    for n in range(N):
        errors = []
        for s in range(S):
            rebuilt = c.decoder_bias_SD[s].clone()
            for f in range(F):
                if (n, f) in codes:
                    rebuilt = rebuilt + codes[n, f] * c.decoder_FSD[f, s]
            errors.append(x_NSD[n, s] - rebuilt)
        total = total + sum(e @ e for e in errors) + 2 * difference * (errors[0] @ errors[-1])
        if dead is not None:
            best = sorted(dead, key=lambda f: -(pre[n][f] * length[f]).item())[:auxk]
            share = min(1.0, len(dead) / auxk)
            for s in range(S):
                said = sum(pre[n][f] * c.decoder_FSD[f, s] for f in best)
                total = total + weight * share * (said - errors[s].detach()).square().sum()
    return total / N, codes


def gradients(c, loss):
    learnt = (c.encoder_SDF, c.decoder_FSD, c.bias_F, c.decoder_bias_SD)
    return torch.autograd.grad(loss, learnt)


def learning(c):
    for tensor in (c.encoder_SDF, c.decoder_FSD, c.bias_F, c.decoder_bias_SD):
        tensor.requires_grad_()
    return c


@pytest.mark.parametrize("difference", [0.0, -1.0, -0.5])
@pytest.mark.parametrize("dead", [None, [1, 4, 7], [2]])
def test_batchtopk_loss_and_gradients_are_the_formulas(difference, dead):
    c, x = learning(drawn()), batch(8)
    recipe = CrosscoderRecipe(latents=12, k=1.5, difference=difference, auxk=2)
    mask = None if dead is None else torch.tensor([f in dead for f in range(12)])
    parts = crosscoder_losses(c, x, recipe, dead_F=mask)
    expected, codes = written_out(c, x, 1.5, difference, dead, 2)
    torch.testing.assert_close(parts.total, expected, rtol=1e-12, atol=0)
    assert {tuple(place) for place in parts.codes_NF.nonzero().tolist()} == set(codes)
    for ours, theirs in zip(gradients(c, parts.total), gradients(c, expected)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_difference_of_minus_one_only_sees_what_differs():
    c, x = drawn(), batch()
    recipe = CrosscoderRecipe(latents=12, k=2, difference=-1.0)
    parts = crosscoder_losses(c, x, recipe)
    e = parts.errors_NSD
    torch.testing.assert_close(parts.reconstruction, (e[:, 1] - e[:, 0]).square().sum(1).mean())


def test_l1_loss_and_gradients_are_the_formulas():
    c, x = learning(drawn()), batch(8)
    recipe = CrosscoderRecipe(latents=12, kind="l1", l1=0.3)
    parts = crosscoder_losses(c, x, recipe)
    expected = 0
    for n in range(8):
        pre = c.bias_F + sum(x[n, s] @ c.encoder_SDF[s] for s in range(2))
        codes = pre.clamp(min=0)
        for s in range(2):
            error = x[n, s] - codes @ c.decoder_FSD[:, s] - c.decoder_bias_SD[s]
            expected = expected + error @ error
            expected = expected + 0.3 * 5**0.5 * (codes * c.decoder_FSD[:, s].norm(dim=1)).sum()
    torch.testing.assert_close(parts.total, expected / 8, rtol=1e-12, atol=0)
    for ours, theirs in zip(gradients(c, parts.total), gradients(c, expected / 8)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    half = crosscoder_losses(c, x, recipe, l1=0.15)
    torch.testing.assert_close(half.sparsity, parts.sparsity / 2)


@pytest.mark.parametrize("n_dead", [0, 1, 3, 9])
def test_the_objective_is_that_of_saelens_on_concatenated_activations(n_dead):
    lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import TrainStepInput

    c, x = learning(drawn()), batch(32)
    config = lens.BatchTopKTrainingSAEConfig(
        d_in=10,
        d_sae=12,
        k=2.5,
        dtype="float64",
        device="cpu",
        apply_b_dec_to_input=False,
        rescale_acts_by_decoder_norm=True,
        aux_loss_coefficient=1 / 32,
    )
    theirs = lens.BatchTopKTrainingSAE(config)
    copies = {
        "W_enc": c.encoder_SDF.flatten(0, 1),
        "W_dec": c.decoder_FSD.flatten(1),
        "b_enc": c.bias_F,
        "b_dec": c.decoder_bias_SD.flatten(),
    }
    with torch.no_grad():
        for name, tensor in copies.items():
            getattr(theirs, name).copy_(tensor)
    dead = torch.arange(12) < n_dead
    fields = TrainStepInput.__dataclass_fields__
    known = dict(
        sae_in=x.flatten(1), dead_neuron_mask=dead, coefficients={}, n_training_steps=1, is_logging_step=False
    )
    step = theirs.training_forward_pass(
        TrainStepInput(**{name: value for name, value in known.items() if name in fields})
    )
    parts = crosscoder_losses(c, x, CrosscoderRecipe(latents=12, k=2.5), dead_F=dead)
    torch.testing.assert_close(parts.total, step.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts.codes_NF * c.lengths(), step.feature_acts, rtol=1e-10, atol=1e-12)
    assert (parts.auxiliary > 0) == (n_dead > 0)
    step.loss.backward()
    ours = dict(zip(("W_enc", "W_dec", "b_enc", "b_dec"), gradients(c, parts.total)))
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient.reshape(-1) if gradient.ndim < 3 else gradient.flatten(),
            getattr(theirs, name).grad.flatten(),
            rtol=1e-9,
            atol=1e-12,
        )


def test_inference_is_that_of_saelens_jumprelu():
    """After training SAELens keeps one threshold on the score; ours on the same score gives the same."""
    c, x = drawn(), batch(50)
    normal = c.normalise(x)
    pre = normal.flatten(1) @ c.encoder_SDF.flatten(0, 1) + c.bias_F
    scores = pre * c.decoder_FSD.flatten(1).norm(dim=1)
    expected = torch.where(scores > 1.5, pre, 0.0)
    torch.testing.assert_close(c.encode(x), expected)
    assert 0 < (expected > 0).sum() < (pre > 0).sum()
    rebuilt = (expected @ c.decoder_FSD.flatten(1)).reshape(50, 2, 5) + c.decoder_bias_SD
    torch.testing.assert_close(c.decode(expected), rebuilt * c.scale_S[:, None] + c.mean_SD)
    step = c.decode(torch.eye(12)[:1].double()) - c.decode(torch.zeros(1, 12).double())
    torch.testing.assert_close(step[0, 1], c.decoder("m1:1")[0])


# --- invariances


def test_a_tokens_code_depends_on_no_other_token():
    c, x = drawn(dtype=torch.float32), batch(40, dtype=torch.float32)
    together = c.encode(x)
    alone = torch.cat([c.encode(one[None]) for one in x])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)
    assert torch.equal(alone > 0, together > 0)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(c.encode(x[shuffled]), together[shuffled], rtol=1e-5, atol=1e-6)


def test_how_the_stream_is_cut_changes_nothing():
    rows = Planted().draw(3000)
    whole = train_crosscoder([rows], QUICK, progress=False)
    for size in (1, 7, 999):
        if size == 1:
            parts = list(rows[:200].split(1)) + [rows[200:]]
        else:
            parts = list(rows.split(size))
        assert train_crosscoder(parts, QUICK, progress=False).fingerprint == whole.fingerprint, size
    once = train_crosscoder(iter([rows, rows, rows]), QUICK, progress=False)
    assert once.fingerprint == whole.fingerprint


def test_normalisation_is_exact():
    """float64 sums about a mean that is far from zero, whatever the batch; a scale of 1 where it is due."""
    rows = batch(5000, D=7) * torch.tensor([1.0, 100.0])[:, None] + 1e4
    expected_mean = rows.mean(0)
    expected = (rows - expected_mean).square().mean((0, 2)).sqrt()
    for size in (1, 64, 5000):
        found = measure_normalisation(rows.split(size), ("a", "b"))
        torch.testing.assert_close(found.mean_SD, expected_mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(found.scale_S, expected, rtol=1e-6, atol=0)
    c = drawn(D=7)
    c = replace(c, mean_SD=found.mean_SD, scale_S=found.scale_S)
    normal = c.normalise(rows)
    torch.testing.assert_close(normal.square().mean((0, 2)), torch.ones(2).double(), rtol=1e-6, atol=0)
    assert normal.mean(0).abs().max() < 1e-9


def test_a_normalisation_can_be_given_and_is_noticed(tmp_path):
    rows, small = Planted().draw(500), replace(QUICK, tokens=128)
    given = measure_normalisation([Planted().draw(500, seed=7)], ("a", "b"))
    crosscoder = train_crosscoder([rows], small, normalisation=given, folder=tmp_path, progress=False)
    torch.testing.assert_close(crosscoder.scale_S.double(), given.scale_S)
    torch.testing.assert_close(crosscoder.mean_SD.double(), given.mean_SD)
    with pytest.raises(CrosscoderError, match=r"\(normalisation differ\)"):
        train_crosscoder([rows], small, folder=tmp_path, progress=False)


def test_units_of_the_activations_do_not_matter():
    """Another unit or offset for one model: the same codes, up to rounding."""
    rows = Planted().draw(3000)
    one = train_crosscoder([rows], QUICK, progress=False)
    moved = rows * torch.tensor([8.0, 0.25])[:, None]
    two = train_crosscoder([moved], QUICK, progress=False)
    torch.testing.assert_close(two.decoder_FSD, one.decoder_FSD, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(two.decoder(0), one.decoder(0) * 8, rtol=1e-2, atol=1e-2)


def test_the_random_state_of_the_caller_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train_crosscoder([Planted().draw(500)], replace(QUICK, tokens=128), progress=False)
    assert torch.equal(torch.rand(2), expected)


# --- what it finds


@pytest.mark.parametrize("kind", ["batchtopk", "l1"])
def test_planted_latents_are_recovered(kind):
    world = Planted()
    recipe = CrosscoderRecipe(
        latents=32, k=2.5, kind=kind, l1=0.15, tokens=300_000, batch=256, learning_rate=3e-3
    )
    crosscoder = train_crosscoder(world.batches(), recipe, progress=False)
    nearest = found(world, crosscoder)
    assert nearest.values.min() > 0.9, nearest.values
    lengths = crosscoder.decoder_FSD[nearest.indices].norm(dim=2)
    share = lengths[:, 1] / lengths.sum(1)
    for number, what in enumerate(world.kinds):
        low, high = (0.85, 1.0) if what == "exclusive" else (0.35, 0.65)
        assert low <= share[number] <= high, (number, what, share[number])
    quality = crosscoder_quality(crosscoder, world.draw(4000, seed=5).split(500))
    assert quality.fvu.max() < 0.15
    if kind == "batchtopk":
        assert abs(quality.l0.iloc[0] - 2.5) < 0.3
    torch.testing.assert_close(crosscoder.lengths(), torch.ones(32))


def test_quality_is_the_formula_and_does_not_depend_on_batches():
    world = Planted()
    crosscoder, rows = train_crosscoder([world.draw(3000)], QUICK, progress=False), world.draw(1000, seed=4)
    rebuilt = crosscoder.decode(crosscoder.encode(rows))
    expected = (rows - rebuilt).square().sum((0, 2)) / (rows - rows.mean(0)).square().sum((0, 2))
    for size in (1, 300, 1000):
        quality = crosscoder_quality(crosscoder, rows.split(size))
        torch.testing.assert_close(torch.tensor(quality.fvu.values).float(), expected, rtol=1e-4, atol=1e-6)
        assert quality.l0.iloc[0] == pytest.approx((crosscoder.encode(rows) > 0).sum(1).float().mean().item())


def test_dead_latents_come_back():
    """Twenty latents too faint to win a place: AuxK brings most of them back, nothing else brings any."""
    world = Planted(latents=24)
    rows = world.draw(4000)
    first = train_crosscoder([rows], replace(QUICK, latents=32), progress=False)
    faint = torch.ones(32)
    faint[:20] = 0.1
    start = replace(first, encoder_SDF=first.encoder_SDF * faint, bias_F=first.bias_F * faint)
    alive = {}
    assert not start.encode(rows)[:, :20].any()
    for weight in (0.0, 1 / 32):
        recipe = replace(QUICK, latents=32, tokens=32_000, auxk_weight=weight)
        after = train_crosscoder([rows], recipe, start=start, progress=False)
        alive[weight] = (after.encode(rows)[:, :20] > 0).any(0).sum().item()
    assert alive[0.0] == 0 and alive[1 / 32] >= 10, alive


def test_k_is_annealed_and_the_threshold_gives_the_l0_that_was_asked_for():
    world = Planted()
    crosscoder = train_crosscoder([world.draw(4000)], replace(QUICK, tokens=64_000), progress=False)
    history = crosscoder.history
    assert history.k.iloc[0] > 10 and history.k.is_monotonic_decreasing
    assert (history.k[history.step > 0.2 * 1000] == 2).all()
    codes = crosscoder.encode(world.draw(4000))
    assert abs((codes > 0).sum(1).float().mean() - 2) < 0.25


def test_decoders_of_length_one_change_nothing():
    """What is folded in at the end leaves scores and reconstructions as they were."""
    c, x = drawn(), batch(50)
    whole = room._Kept(replace(c, bias_F=c.bias_F.clone()), CrosscoderRecipe(latents=12, k=2), True)
    whole.bars = [1.0, 2.0]
    folded = whole.finished({})
    torch.testing.assert_close(folded.lengths(), torch.ones(12).double())
    torch.testing.assert_close(folded.encode(x), c.encode(x) * c.lengths())
    torch.testing.assert_close(folded.decode(folded.encode(x)), c.decode(c.encode(x)))
    assert c.encode(x).any() and folded.threshold == c.threshold


def test_short_runs_have_a_threshold_and_a_schedule():
    for tokens in (64, 128, 320):
        crosscoder = train_crosscoder([Planted().draw(500)], replace(QUICK, tokens=tokens), progress=False)
        assert crosscoder.threshold > 0 and crosscoder.provenance["steps"] == tokens // 64


# --- going on


def test_start_keeps_latents_and_normalisation_and_leaves_the_start_alone():
    world = Planted()
    first = train_crosscoder([world.draw(3000)], QUICK, sources=("a:1", "b:1"), progress=False)
    before = first.fingerprint
    second = train_crosscoder(
        [world.draw(3000, seed=1)], QUICK, start=first, sources=("a:1", "c:1"), progress=False
    )
    assert first.fingerprint == before != second.fingerprint
    assert second.sources == ("a:1", "c:1") and second.provenance["start"] == before
    assert torch.equal(second.scale_S, first.scale_S) and torch.equal(second.mean_SD, first.mean_SD)
    own = torch.cosine_similarity(first.decoder_FSD.flatten(1), second.decoder_FSD.flatten(1), dim=1)
    assert own.median() > 0.9, "latents lost their indices"
    assert second.history.k.iloc[0] == QUICK.k


def killed_after(monkeypatch, saves):
    """Interrupt the run right after so many checkpoints."""
    written, calls = room._Kept.save, []

    def save(self, path, key):
        written(self, path, key)
        calls.append(self.step)
        if len(calls) == saves:
            raise KeyboardInterrupt

    monkeypatch.setattr(room._Kept, "save", save)
    return lambda: monkeypatch.setattr(room._Kept, "save", written)


@pytest.mark.parametrize("kind", ["batchtopk", "l1"])
@pytest.mark.parametrize("saves", [1, 19])
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(kind, saves, tmp_path, monkeypatch):
    parts, recipe = list(Planted().draw(3000).split(100)), replace(QUICK, kind=kind, dead_after=0.02)
    whole = train_crosscoder(parts, recipe, folder=tmp_path / "whole", progress=False)
    mend = killed_after(monkeypatch, saves)
    with pytest.raises(KeyboardInterrupt):
        train_crosscoder(parts, recipe, folder=tmp_path / "killed", progress=False)
    mend()
    assert (tmp_path / "killed" / "checkpoint.pt").exists()
    with pytest.raises(CrosscoderError, match=r"unfinished run of other settings \(k differ\)"):
        train_crosscoder(parts, replace(recipe, k=3), folder=tmp_path / "killed", progress=False)
    with pytest.raises(CrosscoderError, match=r"unfinished run of other settings \(data differ\)"):
        train_crosscoder([part + 1 for part in parts], recipe, folder=tmp_path / "killed", progress=False)
    steps = []
    advance = room._Run.advance
    monkeypatch.setattr(
        room._Run, "advance", lambda self, acts: (steps.append(self.step), advance(self, acts))
    )
    resumed = train_crosscoder(parts, recipe, folder=tmp_path / "killed", progress=False)
    assert steps == list(range(5 * saves, 100))
    assert resumed.fingerprint == whole.fingerprint
    for name in room.TENSORS:
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    assert resumed.provenance == whole.provenance and resumed.threshold == whole.threshold
    assert not (tmp_path / "killed" / "checkpoint.pt").exists()
    again = train_crosscoder(parts, recipe, folder=tmp_path / "killed", progress=False)
    assert again.fingerprint == whole.fingerprint and steps[-1] == 99 and len(steps) == 100 - 5 * saves


def test_save_and_load(tmp_path):
    crosscoder = train_crosscoder(
        [Planted().draw(500)], replace(QUICK, tokens=128), provenance={"why": "a test"}, progress=False
    )
    opened = Crosscoder.load(crosscoder.save(tmp_path / "one"))
    assert opened.fingerprint == crosscoder.fingerprint and opened.provenance == crosscoder.provenance
    assert opened.provenance["why"] == "a test" and opened.provenance["seed"] == 0
    rows = Planted().draw(50)
    assert torch.equal(opened.encode(rows), crosscoder.encode(rows))


# --- harvest


@pytest.fixture(scope="module")
def models():
    return {"base": load_model(tiny_pair("llama")), "tuned": load_model(tiny_pair("llama", seed=1))}


@pytest.fixture(scope="module")
def chats():
    return load_conversations(
        [{"prompt": f"Is {i} so?", "response": "yes, " * (i % 7) + "it is not the sea"} for i in range(40)]
    )


HARVEST = dict(layers=[2, 1], block_tokens=300, buffer_tokens=700, progress=False)


def hidden_states(lm, item):
    with torch.no_grad():
        return lm.model(input_ids=item.input_ids[None], output_hidden_states=True).hidden_states


@pytest.mark.parametrize("response", [False, True])
def test_the_harvest_is_transformers_hidden_states_without_first_token_and_padding(models, chats, response):
    pairs = paired_activations(models, chats, response=response, **HARVEST)
    assert pairs.sources == ("base:2", "base:1", "tuned:2", "tuned:1")
    texts, seen = models["base"].tokenize(chats), set()
    for number in range(len(pairs.counts)):
        block = pairs.read(number)
        assert len(block["acts"]) == pairs.counts[number]
        for row in block["rows"].unique().tolist():
            item, own = texts[row], block["rows"] == row
            positions = block["positions"][own].long()
            expected = (
                item.response_mask.nonzero()[:, 0] if response else torch.arange(1, len(item.input_ids))
            )
            assert torch.equal(positions, expected)
            for s, (name, layer) in enumerate((("base", 2), ("base", 1), ("tuned", 2), ("tuned", 1))):
                if layer == 2:  # the last entry of transformers has the final norm in it
                    continue
                hidden = hidden_states(models[name], item)[layer][0, positions]
                torch.testing.assert_close(block["acts"][own][:, s], hidden, atol=1e-5, rtol=1e-4)
            seen.add(row)
    assert seen == set(range(len(chats)))


def test_batch_mates_and_budget_do_not_matter(models, chats):
    one, many = (
        list(paired_activations(models, chats, token_budget=budget, **HARVEST)) for budget in (1, 4096)
    )
    for alone, together in zip(one, many, strict=True):
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-4)


def test_every_pass_shuffles_all_tokens_anew_and_any_row_can_be_jumped_to(models, chats):
    pairs = paired_activations(models, chats, **HARVEST)
    stream, parts = pairs.batches(), []
    while sum(map(len, parts)) < 2 * pairs.n_tokens:
        parts.append(next(stream))
        assert len(parts[-1]) <= 700
    rows = torch.cat(parts)
    first, second = rows[: pairs.n_tokens], rows[pairs.n_tokens : 2 * pairs.n_tokens]
    ordered = torch.cat(list(pairs))

    def as_set(acts):
        return acts.flatten(1).double().sum(1).sort().values

    torch.testing.assert_close(as_set(first), as_set(ordered))
    torch.testing.assert_close(as_set(second), as_set(ordered))
    assert not torch.equal(first, ordered) and not torch.equal(first, second)
    single = paired_activations(models, chats, **(HARVEST | {"block_tokens": 10**6}))
    passes = single.batches()
    assert not torch.equal(next(passes), next(passes)), "every pass in the same order"
    for skip in (1, 699, 701, pairs.n_tokens - 1, pairs.n_tokens, pairs.n_tokens + 5):
        jumped = next(pairs.batches(skip))
        torch.testing.assert_close(jumped, rows[skip : skip + len(jumped)])


def test_an_interrupted_harvest_goes_on_with_what_is_missing(models, chats, tmp_path, monkeypatch):
    whole = paired_activations(models, chats, folder=tmp_path / "whole", **HARVEST)
    read, calls = room._read_batch, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(room, "_read_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        paired_activations(models, chats, folder=tmp_path / "cut", **HARVEST)
    monkeypatch.setattr(room, "_read_batch", read)
    with pytest.raises(CrosscoderError, match=r"interrupted harvest \(\d+ blocks\): call paired_activations"):
        load_paired_activations(tmp_path / "cut")
    with pytest.raises(CrosscoderError, match="unfinished harvest of other models"):
        paired_activations(models, chats, folder=tmp_path / "cut", **(HARVEST | {"layers": [1]}))
    damaged = next((tmp_path / "cut").glob("blocks/*/*.block"))
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    cut = paired_activations(models, chats, folder=tmp_path / "cut", **HARVEST)
    assert cut.fingerprint == whole.fingerprint
    for a, b in zip(cut, whole, strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(room, "_read_batch", lambda *args: pytest.fail("read again"))
    again = paired_activations(models, chats, folder=tmp_path / "cut", **HARVEST)
    assert torch.equal(next(again.batches()), next(whole.batches()))
    with pytest.raises(CrosscoderError, match=r"activations of other settings \(layers differ\)"):
        paired_activations(models, chats, folder=tmp_path / "cut", **(HARVEST | {"layers": [1]}))
    opened = load_paired_activations(tmp_path / "cut", buffer_tokens=700)
    assert torch.equal(next(opened.batches()), next(whole.batches()))


def test_a_run_on_a_harvest_resumes_without_reading_what_it_has_seen(models, chats, tmp_path, monkeypatch):
    pairs = paired_activations(models, chats, folder=tmp_path / "pairs", **HARVEST)
    streamed = paired_activations(models, chats, **HARVEST)
    recipe = replace(QUICK, tokens=3200, batch=32)
    whole = train_crosscoder(pairs, recipe, progress=False)
    exact = torch.cat(list(pairs)).double()
    torch.testing.assert_close(whole.mean_SD.double(), exact.mean(0), atol=1e-6, rtol=1e-5)
    assert whole.provenance["normalised_on"] == pairs.n_tokens
    assert whole.provenance["activations"]["models"]["base"] == models["base"].fingerprint
    assert train_crosscoder(streamed, recipe, progress=False).provenance["normalised_on"] == 512
    mend = killed_after(monkeypatch, 15)
    with pytest.raises(KeyboardInterrupt):
        train_crosscoder(pairs, recipe, folder=tmp_path / "run", progress=False)
    mend()
    resumed = train_crosscoder(pairs, recipe, folder=tmp_path / "run", progress=False)
    assert resumed.fingerprint == whole.fingerprint


def test_the_models_are_left_as_they_were(models, chats):
    lm = models["base"]
    lm.model.train()
    side = lm.tokenizer.padding_side
    list(paired_activations(models, chats[:3], layers=1, progress=False))
    assert lm.model.training and lm.tokenizer.padding_side == side
    assert all(parameter.grad is None and parameter.requires_grad for parameter in lm.model.parameters())
    lm.model.eval()


# --- the simple things


def test_difference_of_means_is_the_difference_of_the_means():
    rows = Planted().draw(1000)
    for size in (7, 1000):
        shift = difference_of_means(rows.split(size))
        torch.testing.assert_close(shift, (rows[:, 1] - rows[:, 0]).mean(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(difference_of_means([rows], 1, 0), -shift)


def test_a_diff_sae_is_a_crosscoder_of_the_differences(models, chats, tmp_path):
    rows = Planted().draw(3000)
    ours = difference_sae([rows], QUICK, progress=False)
    plain = train_crosscoder([(rows[:, 1] - rows[:, 0])[:, None]], QUICK, sources=("1 - 0",), progress=False)
    assert ours.sources == ("1 - 0",) and ours.fingerprint == plain.fingerprint
    pairs = paired_activations(models, chats, folder=tmp_path, **HARVEST)
    view = differences(pairs, "base:1", "tuned:1")
    assert view.sources == ("tuned:1 - base:1",) and view.fingerprint != pairs.fingerprint
    stored = torch.cat(list(pairs))
    torch.testing.assert_close(torch.cat(list(view))[:, 0], stored[:, 3] - stored[:, 1])
    torch.testing.assert_close(
        view.normalisation.mean_SD,
        (stored[:, 3].double() - stored[:, 1].double()).mean(0)[None],
        atol=1e-6,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        next(view.batches(5))[:, 0], next(pairs.batches(5))[:, 3] - next(pairs.batches(5))[:, 1]
    )


def test_a_model_diffed_with_itself_gives_nothing(models, chats):
    itself = paired_activations({"one": models["base"], "two": models["base"]}, chats, layers=1)
    assert not difference_of_means(itself).any()
    with pytest.raises(CrosscoderError, match="two:1 - one:1 are the same at all"):
        difference_sae(itself, replace(QUICK, tokens=320), progress=False)
    crosscoder = train_crosscoder(itself, replace(QUICK, tokens=3200), progress=False)
    torch.testing.assert_close(crosscoder.decoder_FSD[:, 0], crosscoder.decoder_FSD[:, 1])


# --- bad input


def test_bad_settings_and_activations_are_named(tmp_path):
    rows = Planted().draw(500)
    small = replace(QUICK, tokens=128)
    hole = rows.clone()
    hole[300, 1, 2] = float("nan")
    other = train_crosscoder([rows], small, progress=False)
    constant = rows.clone()
    constant[:, 1] = 3.0
    for call, words in (
        (lambda: train_crosscoder([rows], replace(small, k=25)), "k=25 of 24 latents"),
        (lambda: train_crosscoder([rows], replace(small, kind="topk")), "'batchtopk' or 'l1'"),
        (lambda: train_crosscoder([rows], replace(small, tokens=5)), "not even one step"),
        (lambda: train_crosscoder([rows], replace(small, k_start=1)), "k falls"),
        (lambda: train_crosscoder([rows], replace(small, anneal=200)), "shares of the run"),
        (lambda: train_crosscoder([rows], replace(small, difference=0.5)), "between -1 and 0"),
        (lambda: train_crosscoder([rows[:, :1]], replace(small, difference=-1)), "can't be halved"),
        (lambda: train_crosscoder([rows], replace(small, learning_rate=0)), "learning_rate is above 0"),
        (lambda: train_crosscoder(rows, small), r"a single tensor goes in as \[tensor\]"),
        (lambda: train_crosscoder([], small), "hold no activations"),
        (lambda: train_crosscoder([rows[:, 0]], small), r"tensors \[tokens, sources, width\]"),
        (lambda: train_crosscoder(["rows"], small), "not str"),
        (lambda: train_crosscoder([hole], small), "activations of 1 are not finite"),
        (lambda: train_crosscoder([rows, rows[:, :1]], replace(small, tokens=640)), "hold 1 sources"),
        (lambda: train_crosscoder([rows, rows[:, :, :9]], replace(small, tokens=640)), "9 wide, 16"),
        (lambda: train_crosscoder([rows], small, sources=("a", "b", "c")), "3 are read here"),
        (lambda: train_crosscoder([rows], small, sources=("a", "a")), "different names"),
        (lambda: train_crosscoder([constant], small), "activations of 1 are the same at all"),
        (lambda: train_crosscoder(iter([rows]), replace(QUICK, batch=100)), "ended after 500 of 6,400"),
        (lambda: train_crosscoder(iter([rows]), replace(QUICK, batch=90)), "ended after 500 of 6,400"),
        (lambda: train_crosscoder([rows], replace(small, latents=30), start=other), "start has 24 latents"),
        (lambda: train_crosscoder([rows[:, :1]], small, start=other), "start reads 2 sources"),
        (lambda: train_crosscoder([rows[:, :, :9]], small, start=other), "start reads 2 sources of width 16"),
        (
            lambda: train_crosscoder(
                [rows], small, start=other, normalisation=measure_normalisation([rows], ("a", "b"))
            ),
            "leave normalisation= out",
        ),
        (lambda: other.encode(rows[:, :, :9]), "9 wide, 16 is expected"),
        (lambda: other.encode(hole), "not finite"),
        (lambda: other.decoder("tuned:2"), "there are 0, 1"),
        (lambda: replace(other, bias_F=torch.zeros(3)), r"bias_F has shape \[3\]"),
        (lambda: replace(other, bias_F=torch.full((24,), float("nan"))), "bias_F holds NaN"),
        (lambda: difference_of_means([]), "to take a mean of"),
        (lambda: difference_of_means([rows], "a", "b"), "no names for their sources"),
        (lambda: crosscoder_quality(other, []), "no activations to measure"),
    ):
        with pytest.raises(CrosscoderError, match=words):
            call()


def test_all_dead_is_said(monkeypatch):
    """An L1 price that nothing can pay: the run stops instead of handing out an empty dictionary."""
    recipe = replace(QUICK, kind="l1", l1=500.0, tokens=64_000, learning_rate=0.03)
    with pytest.raises(CrosscoderError, match="all 24 latents are dead at step .* Lower l1"):
        train_crosscoder([Planted().draw(2000)], recipe, progress=False)


def test_a_run_that_explodes_is_said():
    rows = Planted().draw(1000)
    with pytest.raises(CrosscoderError, match="(loss is (nan|inf) at step|not finite)"):
        train_crosscoder([rows], replace(QUICK, learning_rate=1e18), progress=False)


def test_folders_that_hold_something_else_are_named(tmp_path):
    small = replace(QUICK, tokens=128)
    crosscoder = train_crosscoder([Planted().draw(500)], small, progress=False)

    def folder(name, text=None, weights=None):
        place = crosscoder.save(tmp_path / name)
        if text is not None:
            (place / "crosscoder.json").write_text(text)
        if weights is not None:
            (place / "crosscoder.safetensors").write_bytes(weights)
        return place

    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    about = json.loads((folder("good") / "crosscoder.json").read_text())
    other = train_crosscoder([Planted().draw(500)], replace(small, seed=1), progress=False)
    exchanged = folder(
        "exchanged", weights=(other.save(tmp_path / "o") / "crosscoder.safetensors").read_bytes()
    )
    later = json.dumps(about | {"format": "concept_tda crosscoder 2"})
    for place, words in (
        (tmp_path / "nowhere", "not there"),
        (tmp_path / "sae", "it holds cfg.json"),
        (folder("text", "{half"), "is damaged"),
        (folder("list", "[]"), "holds 'list'"),
        (folder("later", later), "holds 'concept_tda crosscoder 2'"),
        (folder("cut", weights=b"1234"), "is damaged"),
        (folder("poor", json.dumps({"format": about["format"]})), "is damaged"),
        (exchanged, "other weights"),
    ):
        with pytest.raises(CrosscoderError, match=words):
            Crosscoder.load(place)
    with pytest.raises(CrosscoderError, match=r"of other settings \(seed differ\)"):
        train_crosscoder([Planted().draw(500)], replace(small, seed=1), folder=tmp_path / "good")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CrosscoderError, match="checkpoint.pt is damaged"):
        train_crosscoder([Planted().draw(500)], small, folder=tmp_path / "broken", progress=False)
    with pytest.raises(CrosscoderError, match="no about.json"):
        load_paired_activations(tmp_path / "sae")


def test_models_that_do_not_fit_are_named(models, chats, tmp_path):
    wide = load_model(tiny_pair("llama", width=32))
    strange = load_model(tiny_pair("llama"))
    strange.tokenizer.add_tokens(["<new>"])
    broken = load_model(tiny_pair("llama"))
    with torch.no_grad():
        broken.model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    base = models["base"]
    for call, words in (
        (lambda: paired_activations({"a": base, "b": wide}, chats, 1), "a is 16 wide and b 32"),
        (lambda: paired_activations({"a": base, "b": strange}, chats, 1), "different tokenizers .'<new>'"),
        (lambda: paired_activations([base, models["tuned"]], chats, 1), "2 models and 1 different names"),
        (lambda: paired_activations({}, chats, 1), "models is empty"),
        (lambda: paired_activations(models, chats, []), "layers is empty"),
        (lambda: paired_activations(models, chats, 1, block_tokens=0), "block_tokens=0"),
        (
            lambda: list(paired_activations({"a": base, "b": broken}, chats[:2], 1)),
            "activations of b are not",
        ),
    ):
        with pytest.raises(CrosscoderError, match=words):
            call()
    with pytest.raises(Exception, match="layer 7 does not exist"):
        paired_activations(models, chats, 7)


def test_streams_that_do_not_keep_step_are_refused():
    one, other = Planted().draw(100).unbind(1)
    joined = torch.cat(list(aligned_activations({"a": one.split(30), "b": other.split(30)})))
    assert torch.equal(joined, torch.stack([one, other], 1))
    for streams, words in (
        ({"a": one.split(30), "b": other[:90].split(30)}, "activations of b end after 3 parts"),
        ({"a": one.split(30), "b": other[:95].split(30)}, "differ in shape at part 3"),
        ({"a": one.split(30), "b": other[:, :9].split(30)}, "differ in shape at part 0"),
    ):
        with pytest.raises(CrosscoderError, match=words):
            list(aligned_activations(streams))
