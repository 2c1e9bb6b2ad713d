"""Shifts by queries against tangents, features in standard deviations, and what curation would leave out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from test_policies import answers, double_model, probes, questions

from concept_tda.mechanisms.policies import (
    CONSTANT,
    PolicyFeatures,
    PolicyPrompts,
    concept_features,
    fit_policy,
    ridge_weights,
    standardised_features,
)
from concept_tda.mechanisms.policy_shifts import PolicyShift, Shifts

TEXTS = "no", "no no the yes", "yes", "Sorry no", "the user the user no"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("relu", [False, True])
def test_queries_for_all_weights_give_both_parts_of_the_tangents(family, relu):
    lm = double_model(family)
    plain = concept_features(probes(3))
    features = PolicyFeatures(plain.layer, plain.weights_Fd, plain.bias_F, relu, plain.names)
    policy = fit_policy(lm, PolicyPrompts(lm, questions(12), ["no", "Sorry"]), features)
    shift = PolicyShift(lm, policy)
    query, tangent = (way(answers(*TEXTS), progress=False) for way in (shift.by_query, shift.by_tangent))
    for part in ("by_features", "by_behaviour"):
        found, oracle = getattr(query, part), getattr(tangent, part)
        assert np.abs(oracle).max() > 0
        assert np.allclose(found, oracle, rtol=1e-7, atol=1e-9 * np.abs(oracle).max()), part
    assert query.ids == tangent.ids and query.route == "query"
    assert not any(parameter.grad is not None for parameter in lm.model.parameters())


def test_sites_above_the_features_move_the_behaviour_alone():
    lm = double_model()
    policy = fit_policy(lm, PolicyPrompts(lm, questions(12), ["no", "Sorry"]), concept_features(probes(3)))
    above = [site for site in PolicyShift(lm, policy).sites if ".1." in site.name]
    shift = PolicyShift(lm, policy, above)
    query, tangent = (way(answers(*TEXTS), progress=False) for way in (shift.by_query, shift.by_tangent))
    assert above and not query.by_features.any() and not tangent.by_features.any()
    assert np.allclose(query.total, tangent.total, rtol=1e-7, atol=1e-9 * np.abs(tangent.total).max())


def test_the_constant_is_the_intercept():
    states_Nd, Y_N = torch.randn(40, 16).double() + 3, torch.randn(40).double() - 5
    features = standardised_features(concept_features(probes(4)), states_Nd)
    X_NF = features.read(states_Nd)
    W_F = ridge_weights(X_NF, Y_N, 1e-9)
    fitted = LinearRegression().fit(concept_features(probes(4)).read(states_Nd).numpy(), Y_N.numpy())
    assert features.names[0] == CONSTANT and abs(W_F[0] - Y_N.mean()) < 1e-6
    assert np.allclose(
        (X_NF @ W_F).numpy(), fitted.predict(concept_features(probes(4)).read(states_Nd).numpy())
    )


def shifts_of(total_PF):
    lm = double_model()
    policy = fit_policy(lm, PolicyPrompts(lm, questions(12), ["no"]), concept_features(probes(2)))
    total_PF = np.array(total_PF, dtype=float)
    ids = [f"pair {i}" for i in range(len(total_PF))]
    return Shifts(policy, ids, total_PF / 4, total_PF * 3 / 4, "query")


def test_curation_takes_flagged_examples_by_their_off_target_share():
    shifts = shifts_of([[3, 1], [1, 3], [-1, -9], [0, 0], [-2, 1], [0, 5]])
    assert shifts.to_drop(["probe 0"]) == ["pair 5", "pair 2", "pair 1"]
    assert shifts.to_drop(["probe 0"], most=2) == ["pair 5", "pair 2"]
    assert shifts.to_drop(["probe 1"]) == ["pair 0", "pair 4"]
    assert shifts.to_drop(["probe 0", "probe 1"]) == []


def test_curation_by_the_score_takes_what_weakens_the_policy():
    shifts = shifts_of(np.zeros((4, 2)))
    along = shifts.policy.W_F.numpy()
    shifts = shifts_of([2 * along, -1 * along, 0 * along, -3 * along])
    assert shifts.to_drop() == ["pair 3", "pair 1"] and shifts.to_drop(most=1) == ["pair 3"]
