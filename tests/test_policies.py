"""Policies: where they are read, what they are fitted to, and what an example does to them."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.templates import chat_template_text, template_names
from concept_tda.data.tokens import readable_tokens, tokenize_prompts
from concept_tda.groups.sae import SparseAutoencoder
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.scorers import Influence
from concept_tda.mechanisms.policies import (
    Policy,
    PolicyError,
    PolicyFeatures,
    PolicyPrompts,
    concept_features,
    feature_gaps,
    fit_policy,
    last_user_token,
    read_policy,
    ridge_weights,
    sae_features,
)
from concept_tda.mechanisms.policy_shifts import PolicyQuery, PolicyShift, Shifts, weight_shift
from concept_tda.model.loading import load_model

from tiny import double_norms, tiny_pair, tiny_tokenizer

WORDS = "lock bomb cake song tree poison letter virus garden knife".split()


def chats(*texts):
    return load_conversations([{"messages": [{"role": "user", "content": text}]} for text in texts])


def questions(n):
    return chats(*[f"how to {'make' if i % 2 else 'sell'} a {WORDS[i % 10]} {i}" for i in range(n)])


def answers(*texts):
    return load_conversations(
        [
            {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": text}]}
            for i, text in enumerate(texts)
        ]
    )


def double_model(family="llama", **options):
    model, tokenizer = tiny_pair(family, dtype=torch.float64, **options)
    return load_model((double_norms(model), tokenizer))


def probes(n, layer=1, width=16):
    return [
        tensor_concept(
            torch.randn(width, generator=torch.Generator().manual_seed(i)), layer, name=f"probe {i}"
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def lm():
    return double_model()


@pytest.fixture(scope="module")
def policy(lm):
    return fit_policy(lm, PolicyPrompts(lm, questions(16), ["no", "Sorry"]), concept_features(probes(3)))


# Where a prompt is read


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize(
    "text", ["May I?", "  blanks around  ", "user", "say <|im_end|> twice twice", "日本語か？"]
)
def test_the_last_token_of_the_question_whatever_the_template(name, text):
    tokenizer = tiny_tokenizer(chat_template_text(name))
    model, _ = tiny_pair("llama")
    lm = load_model((model, tokenizer))
    prompts = load_conversations(
        [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"},
                       {"role": "user", "content": text}]}]
    )  # fmt: skip
    (tokens,) = tokenize_prompts(prompts, tokenizer)
    place = last_user_token(lm, prompts[0])
    pieces = readable_tokens(tokenizer, tokens)
    before, after = "".join(pieces[: place + 1]), "".join(pieces[place + 1 :])
    assert before.endswith(text.strip())
    whole = "".join(pieces)  # nothing of a question stands behind the place: other words there change nothing
    other = load_conversations(
        [{"messages": [*prompts[0].messages[:-1], {"role": "user", "content": "zzz"}]}]
    )
    assert whole.endswith(after) and "".join(
        readable_tokens(tokenizer, tokenize_prompts(other, tokenizer)[0])
    ).endswith(after.lstrip())


def test_a_first_token_that_the_tokenizer_adds_moves_the_place():
    model, _ = tiny_pair("llama")
    places = [
        last_user_token(load_model((model, tiny_tokenizer(bos=bos))), questions(1)[0])
        for bos in (False, True)
    ]
    assert places[1] == places[0] + 1


def test_a_template_that_rewrites_the_question_is_refused():
    shouting = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
    model, _ = tiny_pair("llama")
    lm = load_model((model, tiny_tokenizer(shouting)))
    with pytest.raises(PolicyError, match="rewrites the last message"):
        last_user_token(lm, questions(1)[0])


def test_prompts_that_end_with_no_question_are_refused(lm):
    for turns in ([], [{"role": "system", "content": "be good"}], [{"role": "user", "content": " "}]):
        with pytest.raises(PolicyError, match="p1 does not end with a question"):
            last_user_token(lm, SimpleNamespace(id="p1", prompt=turns))


# What is read


def test_readings_do_not_depend_on_batch_mates(lm):
    prompts = chats("a", "a much longer question than the others, by far", "how?")
    together = read_policy(lm, PolicyPrompts(lm, prompts, ["no", "Sorry I"]), 1)
    for i in range(3):
        alone = read_policy(lm, PolicyPrompts(lm, prompts[i : i + 1], ["no", "Sorry I"]), 1)
        assert torch.allclose(alone[0][0], together[0][i], rtol=1e-10)
        assert torch.allclose(alone[1][0], together[1][i], rtol=1e-10)


def test_a_beginning_of_several_tokens_by_hand(lm):
    prompts = chats("how?")
    (tokens,) = tokenize_prompts(prompts, lm.tokenizer)
    ids = lm.tokenizer("Sorry I", add_special_tokens=False).input_ids
    logits = lm.model(torch.cat([tokens, torch.tensor(ids)])[None]).logits[0].log_softmax(-1)
    by_hand = sum(logits[len(tokens) - 1 + j, id] for j, id in enumerate(ids))
    hidden = lm.model(tokens[None], output_hidden_states=True).hidden_states[1][0]
    states, logp = read_policy(lm, PolicyPrompts(lm, prompts, ["Sorry I"]), 1)
    assert torch.allclose(logp[0, 0], by_hand, rtol=1e-10)
    assert torch.allclose(states[0], hidden[last_user_token(lm, prompts[0])], rtol=1e-10)


def test_strings_that_count_twice_or_are_cut_otherwise_are_refused(lm):
    with pytest.raises(PolicyError, match="count twice"):
        PolicyPrompts(lm, questions(2), ["no", "no way"])
    with pytest.raises(PolicyError, match="none empty"):
        PolicyPrompts(lm, questions(2), ["no", " "])
    joined = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} ye{% endif %}"
    )
    model, _ = tiny_pair("llama")
    other = load_model((model, tiny_tokenizer(joined)))
    with pytest.raises(PolicyError, match="other tokens"):
        PolicyPrompts(other, questions(2), ["s"])  # "ye" + "s" is one token, "yes"


def sae(width=16, latents=8, **cfg):
    g = torch.Generator().manual_seed(0)
    inner = SimpleNamespace(
        W_dec=torch.randn(latents, width, generator=g),
        W_enc=torch.randn(width, latents, generator=g),
        b_enc=torch.randn(latents, generator=g),
        b_dec=torch.randn(width, generator=g),
        cfg=SimpleNamespace(**cfg),
    )
    return SparseAutoencoder(inner, 1, "an SAE")


@pytest.mark.parametrize("centred", [False, True])
def test_latents_are_read_as_the_sae_reads_them(centred):
    one, states = sae(apply_b_dec_to_input=centred), torch.randn(5, 16).double()
    inner = one.sae
    x = states - (inner.b_dec.double() if centred else 0)
    expected = (x @ inner.W_enc.double() + inner.b_enc.double()).relu()
    features = sae_features(one, {3: "flattery"})
    assert torch.allclose(features.read(states), expected) and features.names[3] == "flattery"
    assert ((features.slopes(states) > 0) == (expected > 0)).all()


def test_an_sae_that_rescales_is_refused():
    with pytest.raises(PolicyError, match="rescales"):
        sae_features(sae(normalize_activations="layer_norm"))


# The fit


def test_ridge_is_scikit_learns():
    X, Y = torch.randn(30, 7).double(), torch.randn(30).double()
    found = Ridge(alpha=5, fit_intercept=False).fit(X.numpy(), Y.numpy()).coef_
    assert np.allclose(ridge_weights(X, Y), found, rtol=1e-10)


def test_quality_and_intervals_are_those_of_scikit_learn():
    """Folds, R², accuracy and bootstrap by another implementation."""
    g = torch.Generator().manual_seed(1)
    states, truth = torch.randn(60, 16, generator=g).double(), torch.tensor([1.0, -1.0, 0.5]).double()
    features = concept_features(probes(3))
    Y = features.read(states) @ truth + torch.randn(60, generator=g).double()
    policy = Policy(SimpleNamespace(beginnings=["no"]), features, states, Y[:, None], 5.0, "x")
    X, y, often = policy.X_NF.numpy(), Y.numpy(), Y.numpy() > np.log(0.5)
    folds, unseen = np.random.default_rng(0).permutation(60) % 5, np.zeros(60)
    for fold in range(5):
        out = folds == fold
        unseen[out] = Ridge(alpha=5, fit_intercept=False).fit(X[~out], y[~out]).predict(X[out])
    row = policy.quality.loc["policy"]
    assert row["R² left out"] == pytest.approx(r2_score(y, unseen), rel=1e-9)
    assert row["accuracy left out"] == pytest.approx(np.mean((unseen > np.log(0.5)) == often))
    assert policy.majority == max(often.mean(), 1 - often.mean()) and 0.5 < policy.majority < 0.9
    draw = np.random.default_rng(7)
    rows = [draw.integers(0, 60, 60) for _ in range(40)]
    fits = [Ridge(alpha=5, fit_intercept=False).fit(X[one], y[one]).coef_ for one in rows]
    table = policy.table(draws=40, seed=7).set_index("feature")
    for name, low, high in zip(features.names, *np.percentile(fits, [2.5, 97.5], axis=0)):
        assert table.loc[name, "low"] == pytest.approx(low, rel=1e-8)
        assert table.loc[name, "high"] == pytest.approx(high, rel=1e-8)


def test_features_are_chosen_by_their_gap(lm):
    asked, features = PolicyPrompts(lm, questions(16), ["no"]), concept_features(probes(6))
    harmful = np.arange(16) % 2 == 0
    gaps = feature_gaps(features.read(read_policy(lm, asked, 1)[0]), harmful).abs()
    least = gaps.sort().values[3].item()
    chosen = fit_policy(lm, asked, features, harmful=harmful, select=least)
    assert (
        chosen.features.names == [f"probe {i}" for i in range(6) if gaps[i] > least]
        and len(chosen.features) == 2
    )


def test_left_out_figures_do_not_flatter_noise(lm):
    asked = PolicyPrompts(lm, questions(16), ["no"])
    with pytest.warns(UserWarning, match="can fit anything"):
        fitted = fit_policy(lm, asked, concept_features(probes(40)), ridge=1e-6)
    quality = fitted.quality.loc["policy"]
    assert quality["R²"] > 0.999 and quality["R² left out"] < quality["R²"]
    logp = torch.where(torch.arange(16) % 2 == 0, -0.1, -3.0).double()[:, None]  # so that there is a decision
    decided = Policy(fitted.asked, fitted.features, fitted.states_Nd, logp, 5.0, "x")
    for shown in (decided.verdict, repr(decided), decided._repr_html_()):
        assert "40 features for 16 prompts can fit anything" in shown


def test_a_planted_policy_is_found_and_called_strong(policy):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(200, 16, generator=g).double()
    truth = torch.tensor([2.0, -3.0, 0.0]).double()
    Y = policy.features.read(states) @ truth + np.log(0.5)
    logp = (Y + 0.1 * torch.randn(200, generator=g))[:, None]
    planted = type(policy)(policy.asked, policy.features, states, logp, 5.0, "x")
    table = planted.table().set_index("feature")
    assert (
        table.loc["probe 0", "low"] > 1
        and table.loc["probe 1", "high"] < -2
        and abs(table.loc["probe 2", "weight"]) < 0.3
    )
    assert not planted.weak and "WEAK" not in planted.verdict
    noise = type(policy)(
        policy.asked, policy.features, states, logp[torch.randperm(200, generator=g)], 5.0, "x"
    )
    assert noise.weak and "WEAK" in noise.verdict


def test_a_behaviour_that_never_changes_is_refused(lm):
    with pytest.raises(PolicyError, match="same log-probability"):
        fit_policy(lm, PolicyPrompts(lm, chats(*["same"] * 6), ["no"]), concept_features(probes(2)))


@pytest.mark.parametrize(
    "change, message",
    [(dict(harmful=[True]), "one for each"), (dict(harmful=[True]*16), "harmful and harmless"),
     (dict(harmful=np.arange(16) % 2 == 0, select=99.0), "no feature is left")],
)  # fmt: skip
def test_bad_marks(lm, change, message):
    with pytest.raises(PolicyError, match=message):
        fit_policy(lm, PolicyPrompts(lm, questions(16), ["no"]), concept_features(probes(2)), **change)


def test_features_of_another_model(lm):
    with pytest.raises(PolicyError, match="another model"):
        fit_policy(lm, questions(16), concept_features(probes(2, width=8)))
    with pytest.raises(PolicyError, match="one layer"):
        concept_features([*probes(1), *probes(1, layer=2)])


# What an example does to it


def test_the_shift_is_the_finite_difference(policy):
    g = torch.Generator().manual_seed(3)
    dX, dY = torch.randn(policy.X_NF.shape, generator=g).double(), torch.randn(16, generator=g).double()
    at = lambda e: ridge_weights(policy.X_NF + e * dX, policy.Y_N + e * dY, policy.ridge)
    measured = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / (12 * 1e-4)
    assert torch.allclose(sum(weight_shift(policy, dX, dY)), measured, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_three_routes_to_the_same_shift(family):
    lm = double_model(family)
    policy = fit_policy(lm, PolicyPrompts(lm, questions(8), ["no", "Sorry"]), concept_features(probes(2)))
    pairs, before = answers("no", "yes the user"), lm.fingerprint
    shift = PolicyShift(lm, policy)
    step, tangent = shift.by_step(pairs, 1e-6, progress=False), shift.by_tangent(pairs, progress=False)
    largest = np.abs(tangent.total).max()
    assert np.allclose(step.total, tangent.total, rtol=1e-4, atol=1e-4 * largest)
    for of, expected in [(None, tangent.scores), ("probe 1", tangent.total[:, 1])]:
        query = Influence(lm, PolicyQuery(policy, of), sites="all-linear", curvature="identity")
        assert np.allclose(query.score(pairs, progress=False).scores, expected, rtol=1e-6)
    assert lm.fingerprint == before == policy.model


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_features_and_behaviour_move_alike_by_a_small_step_and_by_tangent(family):
    """ΔX and ΔY themselves, not only what is made of them: to 1e-4 as the learning rate goes to 0."""
    from concept_tda.mechanisms.policy_shifts import _loss_gradients, _read_after_step, _tangents

    lm = double_model(family)
    policy = fit_policy(lm, PolicyPrompts(lm, questions(8), ["no", "Sorry"]), concept_features(probes(3)))
    sites, data = PolicyShift(lm, policy).sites, lm.tokenize(answers("no", "yes the user"))
    for row in range(2):
        gradients = _loss_gradients(lm, data, row, sites)
        by_tangent = _tangents(lm, policy, sites, gradients)
        for rate, near in ((1e-3, 1e-1), (1e-6, 1e-4)):
            by_step = _read_after_step(lm, policy, sites, gradients, rate)
            for step, tangent in zip(by_step, by_tangent):
                assert tangent.norm() > 0 and (step - tangent).norm() < near * tangent.norm()
        dX = by_tangent[0] @ policy.features.weights_Fd.T
        stepped = by_step[0] @ policy.features.weights_Fd.T
        assert (dX - stepped).norm() < 1e-4 * dX.norm()


def test_a_relu_holds_still_what_does_not_fire(lm):
    asked = PolicyPrompts(lm, questions(12), ["no"])
    one = sae()
    one.sae.b_enc[2] = -1e3
    policy = fit_policy(lm, asked, sae_features(one))
    shift = PolicyShift(lm, policy)
    tangent = shift.by_tangent(answers("no"), progress=False)
    assert 0.1 < policy.features.slopes(policy.states_Nd).mean() < 0.9
    assert (policy.X_NF[:, 2] == 0).all() and tangent.total[0, 2] == 0
    query = Influence(lm, PolicyQuery(policy), sites="all-linear", curvature="identity")
    assert np.allclose(query.score(answers("no"), progress=False).scores, tangent.scores, rtol=1e-6)
    step = shift.by_step(answers("no"), 1e-7, progress=False)
    assert np.allclose(step.total, tangent.total, atol=1e-3 * np.abs(tangent.total).max())


def test_a_step_on_the_top_example_strengthens_the_policy(lm, policy):
    pairs = answers("no", "no no the yes", "yes", "the user", "Sorry no")
    scores = Influence(lm, PolicyQuery(policy), sites="all-linear", curvature="identity").score(
        pairs, progress=False
    )
    from concept_tda.mechanisms.policy_shifts import _loss_gradients, moved_weights

    sites, query, moved = PolicyShift(lm, policy).sites, PolicyQuery(policy), []
    for row in (int(np.argmax(scores.scores)), int(np.argmin(scores.scores))):
        with moved_weights(sites, _loss_gradients(lm, lm.tokenize(pairs), row, sites), -1e-4):
            moved.append(query.value(lm) - (policy.W_F @ policy.W_F).item())
    assert moved[0] > 0 > moved[1]


def test_a_policy_takes_curvature_like_any_query(lm, policy):
    pairs = answers("no", "no no the yes", "yes", "the user", "Sorry no")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        curvature = EKFAC.fit(lm, pairs, sites="all-linear", progress=False)
    result = Influence(lm, PolicyQuery(policy), sites="all-linear", curvature=curvature).score(
        pairs, progress=False
    )
    assert np.isfinite(result.scores).all() and result.card.behaviour == "the policy"


def test_what_moved_beside_what_should(lm, policy):
    shifts = PolicyShift(lm, policy).by_tangent(answers("no", "yes"), progress=False)
    every = shifts.interference(policy.features.names)
    assert np.allclose(every.off_target, 0) and not every.flag.any()
    one = shifts.interference(["probe 0"])
    by_hand = 1 - np.abs(shifts.total[:, 0]) / np.abs(shifts.total).sum(1)
    assert np.allclose(one.off_target, by_hand) and (one.flag == (one.largest != "probe 0")).all()
    most = [max(range(3), key=lambda j, row=row: abs(row[j])) for row in shifts.total]
    assert shifts.pair(np.int64(1)).equals(shifts.pair(shifts.ids[1])) and shifts.pair(-1).equals(
        shifts.pair(1)
    )
    assert one.equals(shifts.interference("probe 0"))
    assert one.largest.tolist() == [policy.features.names[j] for j in most]
    still = Shifts(policy, ["x"], 0 * shifts.total[:1], 0 * shifts.total[:1], "tangent")
    assert still.interference(["probe 0"])[["off_target", "flag"]].to_numpy().tolist() == [[0, False]]
    assert np.allclose(np.linalg.solve(policy.U_FF.numpy(), shifts.evidence.T).T, shifts.total)
    assert np.allclose(shifts.pair(0)["shift"].abs().max(), np.abs(shifts.total[0]).max())
    assert [one.response for one in shifts.examples] == ["no", "yes"] and shifts.examples.ids == shifts.ids


def test_evidence_tells_training_from_features_that_fire_together(policy):
    """Two features that are nearly one: training that moves the evidence for the first alone shows in ΔW as a
    shift of both, and is flagged; UΔW names the one."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(80, 16, generator=g).double()
    first, other = torch.randn(2, 16, generator=g).double()
    weights = torch.stack([first, first + 0.1 * other, other])
    twins = PolicyFeatures(1, weights, torch.zeros(3).double(), False, ["a", "twin of a", "b"])
    fitted = Policy(policy.asked, twins, states, torch.randn(80, 1, generator=g).double(), 5.0, "x")
    moved = torch.linalg.solve(fitted.U_FF, torch.eye(3).double()[:1].T).T.numpy()
    shifts = Shifts(fitted, ["pair"], 0 * moved, moved, "tangent")
    assert shifts.interference(["a"]).off_target[0] > 0.4
    assert np.allclose(shifts.evidence, [[1, 0, 0]], atol=1e-9)
    assert shifts.pair(0).set_index("feature").evidence["a"] == pytest.approx(1)


def test_bad_questions_of_a_policy(lm, policy):
    asked, features = policy.asked, policy.features
    broken = PolicyFeatures(1, features.weights_Fd * np.nan, features.bias_F, False, features.names)
    for bad, message in [
        (lambda: fit_policy(lm, asked, probes(2)), "a list is no feature"),
        (lambda: fit_policy(lm, asked, features, ridge=-1.0), "ridge=-1.0: the penalty"),
        (lambda: fit_policy(lm, asked, features, ridge=0), "above 0"),
        (lambda: fit_policy(lm, asked, features, ridge=float("nan")), "finite number"),
        (lambda: fit_policy(lm, asked, features, harmful=["yes", "no"] * 8), "booleans, not .*yes"),
        (lambda: fit_policy(lm, asked, broken), "not finite"),
        (lambda: fit_policy(lm, questions(4), features), "4 prompts: give at least 5"),
        (lambda: PolicyPrompts(lm, questions(2), []), "at least one"),
        (lambda: PolicyPrompts(lm, questions(2), [3]), "list of texts"),
        (lambda: concept_features([]), "no concepts"),
        (lambda: policy.table(draws=1), "two draws"),
        (
            lambda: PolicyFeatures(1, features.weights_Fd, features.bias_F, False, ["a"]),
            "1 names and 3 biases",
        ),
        (lambda: PolicyShift(lm, None), "no policy"),
    ]:
        with pytest.raises(PolicyError, match=message):
            bad()


def test_bad_questions_of_a_shift(lm, policy):
    shifts = PolicyShift(lm, policy).by_tangent(answers("no"), progress=False)
    for bad, message in [
        (lambda: PolicyQuery(policy, "nothing"), "no feature 'nothing'"),
        (lambda: shifts.interference(["nothing"]), "no feature 'nothing'"),
        (lambda: PolicyQuery(policy, 3), "numbers are 0 to 2"),
        (lambda: PolicyQuery(policy, 0.5), "no feature 0.5"),
        (lambda: shifts.interference([]), "no targets"),
        (lambda: shifts.pair(5), "no example 5"),
        (lambda: shifts.pair(True), "no example True"),
        (lambda: shifts.plot(0), "at least one"),
        (lambda: PolicyShift(lm, policy).by_step(answers("no"), float("nan")), "above 0"),
        (lambda: PolicyShift(lm, policy).by_step(answers("no"), "fast"), "above 0"),
        (lambda: PolicyShift(lm, policy).by_step(answers("no"), 0.0), "above 0"),
        (lambda: PolicyShift(double_model(n_layers=3), policy), "another model"),
    ]:
        with pytest.raises(PolicyError, match=message):
            bad()


def test_policies_and_shifts_show_themselves_in_a_notebook(lm, policy):
    page = policy._repr_html_()
    for words in (f"{policy.W_F[0]:.3f}", f"{policy.majority:.3f}", "commoner answer", policy.verdict):
        assert words in page
    shifts = PolicyShift(lm, policy).by_tangent(answers("no", "<b>yes</b>", "the user"), progress=False)
    page, best = shifts._repr_html_(), int(shifts.scores.argmax())
    assert f"{shifts.scores[best]:+.3g}" in page and "&lt;b&gt;yes" in page and policy.verdict in page
    assert page.index(f"{shifts.scores[best]:+.3g}") < page.index(f"{shifts.scores.min():+.3g}")


def test_no_two_features_have_one_name():
    assert sae_features(sae(), {3: "locks", 5: "locks", 6: "songs"}).names[3:7] == [
        "locks (latent 3)", "latent 4", "locks (latent 5)", "songs"]  # fmt: skip
    with pytest.raises(PolicyError, match="2 features are called 'probe 0'"):
        concept_features([*probes(2), *probes(1)])


def test_nothing_to_shift_by_and_examples_that_were_cut_are_refused(lm, policy):
    shift, none = PolicyShift(lm, policy), answers("no").select([])
    long = answers("no", "yes " * 2000)
    for by in (shift.together, shift.by_tangent, shift.by_step):
        with pytest.raises(PolicyError, match="no training examples"):
            by(none)
        with pytest.raises(PolicyError, match="1 examples are longer"):
            by(long)
