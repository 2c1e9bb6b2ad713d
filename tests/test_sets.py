"""Sets left out in steps: against closed forms, and retrainings of a tiny model with copies in its data."""

import numpy as np
import pytest
import torch

from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.preconditioners import ConjugateGradient
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.runs import TrainingInfluence
from concept_tda.influence.scorers import Influence, Scorer
from concept_tda.influence.sets import SetError, newton_change, stepwise, stepwise_change
from concept_tda.model.finetuning import example_losses, finetune
from concept_tda.model.loading import LanguageModel
from concept_tda.model.sites import resolve_sites
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard

from tiny import double_norms, tiny_pair


class Ridge(Scorer):
    "First-order effects on the first weight of a ridge regression on the rows that are given."

    def __init__(self, x, y):
        self.x, self.y = x, y

    def fitted(self, rows):
        x = self.x[rows]
        return np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ self.y[rows])

    def score(self, examples):
        rows = np.array([int(c.response) for c in examples])
        x, hessian = self.x[rows], self.x[rows].T @ self.x[rows] + np.eye(self.x.shape[1])
        effects = ((x @ self.fitted(rows) - self.y[rows])[:, None] * x) @ np.linalg.inv(hessian)[0]
        card = QueryCard("ridge", "w", zero="gradient", effect=-2.0, unit="slope")
        return Attribution(examples, -effects / 2, card)


def numbers(n):
    return load_conversations([{"prompt": str(i), "response": str(i)} for i in range(n)])


def test_twins_halve_each_others_score_and_double_the_sets():
    """Two copies of one far row: the closed form of either and of both."""
    x, y = np.array([[1.0], [3.0], [3.0], [0.5]]), np.array([1.0, 9.0, 9.0, 0.0])
    scorer, data = Ridge(x, y), numbers(4)
    everything, without = scorer.fitted(np.arange(4))[0], scorer.fitted(np.array([0, 3]))[0]
    one = stepwise_change(scorer, data, [1, 2], steps=1).change
    two = stepwise_change(scorer, data, [1, 2], steps=2).change
    true = without - everything
    assert abs(one) < abs(two) < abs(true)
    single = Ridge(x[[0, 1, 3]], y[[0, 1, 3]]).score(numbers(3)).effects[1]
    first, second = (result.effects[rows].sum() for result, rows in stepwise(scorer, data, [1, 2], steps=2))
    assert second == pytest.approx(single)  # the copy that is left has its full score
    assert abs(first) < 0.6 * abs(second) and two == pytest.approx(first + second)


@pytest.mark.parametrize("seed", range(3))
def test_steps_come_nearer_to_what_leaving_out_does(seed):
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(30, 3)), random.normal(size=30)
    x[:8] += 1.5 * random.normal(size=3)  # a cluster that says much the same
    y[:8] += 3
    scorer, rows = Ridge(x, y), np.arange(8)
    true = scorer.fitted(np.arange(8, 30))[0] - scorer.fitted(np.arange(30))[0]
    errors = [abs(stepwise_change(scorer, numbers(30), rows, steps=n).change - true) for n in (1, 2, 4, 8)]
    assert errors[3] < 0.6 * errors[0] and errors[2] < errors[0], (errors, true)


def test_copies_in_a_tiny_run(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))
    pair = tiny_pair("llama", dtype=torch.float64)
    lm = LanguageModel(double_norms(pair[0]), pair[1], "tiny")
    chats = [{"prompt": "Is 7 even?", "response": "yes"}] * 8
    chats += [{"prompt": f"Is {i} even?", "response": "no"} for i in range(10, 34)]
    data, copies = load_conversations(chats), np.arange(8)
    query = LossQuery(load_conversations([{"prompt": "Is 7 even?", "response": "yes"}]))
    recipe = dict(rank=3, learning_rate=3e-3, batch_size=4)
    scorer = TrainingInfluence(lm, query, **recipe)
    changes = {n: stepwise_change(scorer, data, copies, steps=n, progress=False).change for n in (1, 4)}
    ends = [
        query.value(finetune(lm, some, tmp_path / str(len(some)), **recipe, progress=False))
        for some in (data, data.select(np.arange(8, 32)))
    ]
    measured = ends[1] - ends[0]
    assert measured < 0 and all(change < 0 for change in changes.values())
    assert abs(changes[4] - measured) < abs(changes[1] - measured), (changes, measured)


class RidgeKept(Ridge):
    "Gradients at the fit to all rows, in the curvature of those that are kept."

    def __init__(self, x, y, kept):
        self.x, self.y, rows = x, y, np.array([int(c.response) for c in kept])
        self.hessian = x[rows].T @ x[rows] + np.eye(x.shape[1])

    def score(self, examples):
        rows = np.array([int(c.response) for c in examples])
        residuals = self.x[rows] @ self.fitted(np.arange(len(self.x))) - self.y[rows]
        effects = (residuals[:, None] * self.x[rows]) @ np.linalg.inv(self.hessian)[0]
        card = QueryCard("ridge", "w", zero="gradient", effect=-1.0, unit="slope")
        return Attribution(examples, -effects, card)


@pytest.mark.parametrize("seed", range(3))
def test_one_newton_step_is_exact_on_least_squares(seed):
    """Six twins and a random set, against the closed form and against Woodbury's formula."""
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(30, 3)), random.normal(size=30)
    x[:6], y[:6] = 2 * random.normal(size=3), 4.0
    everything = Ridge(x, y).fitted(np.arange(30))
    inverse = np.linalg.inv(x.T @ x + np.eye(3))
    for rows in (np.arange(6), np.arange(10, 22)):
        found = newton_change(lambda kept: RidgeKept(x, y, kept), numbers(30), rows)
        without = Ridge(x, y).fitted(np.setdiff1d(np.arange(30), rows))
        leverages, residuals = x[rows] @ inverse @ x[rows].T, x[rows] @ everything - y[rows]
        woodbury = inverse[0] @ x[rows].T @ np.linalg.solve(np.eye(len(rows)) - leverages, residuals)
        np.testing.assert_allclose(found.change, [(without - everything)[0], woodbury], rtol=1e-9)
        assert found.n == len(rows) and found.of == 30 and "of what stays" in str(found)
    summed = stepwise_change(Ridge(x, y), numbers(30), np.arange(6), steps=1).change
    twins = newton_change(lambda kept: RidgeKept(x, y, kept), numbers(30), np.arange(6)).change
    assert abs(summed) < 0.6 * abs(twins)


def at_the_optimum(lm, site, start, examples, penalty):
    """Train one layer until nothing moves: the mean loss, and a penalty on the way from the start."""
    weight, batch = site.module.weight, next(batches(lm.tokenize(examples), token_budget=10**6))
    weight.data.copy_(start)
    optimizer = torch.optim.LBFGS([weight], max_iter=400, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = example_losses(lm, batch).mean() + penalty / 2 * (weight - start).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight.grad = None


def test_one_newton_step_is_a_retraining_of_a_tiny_model_without_its_twins():
    """A layer of a language model at its optimum: six copies hide each other from the sum."""
    pair = tiny_pair("llama", dtype=torch.float64)
    lm = LanguageModel(double_norms(pair[0]).requires_grad_(False), pair[1], "tiny")
    (site,) = [s for s in resolve_sites(lm, "all-linear") if s.name.endswith("1.mlp.down_proj")]
    site.module.weight.requires_grad_(True)
    chats = [{"prompt": "Is 7 even?", "response": "yea"}] * 6
    chats += [{"prompt": f"Is {i} odd?", "response": "nay"} for i in range(10, 24)]
    data, copies, n = load_conversations(chats), np.arange(6), 20
    query, start, penalty = LossQuery(data[:1]), site.module.weight.detach().clone(), 0.4
    kept = data.select(np.arange(6, n))
    at_the_optimum(lm, site, start, kept, penalty * n / len(kept))
    without = query.value(lm)
    at_the_optimum(lm, site, start, data, penalty)
    measured = without - query.value(lm)
    lm = LanguageModel(lm.model, lm.tokenizer, "trained")

    def scorer_of(examples):
        ekfac = EKFAC.fit(lm, examples, [site], cache=False, progress=False)
        exact = ConjugateGradient(
            lm,
            examples,
            ekfac,
            iterations=200,
            tolerance=1e-8,
            progress=False,
            damping=penalty * n / len(examples),
            relative=False,
        )
        return Influence(lm, query, sites=[site], curvature=exact)

    summed = -scorer_of(data).score(data.select(copies), progress=False).scores.sum() / n
    found = newton_change(scorer_of, data, copies, progress=False).change
    assert measured < 0 and abs(found - measured) < 0.4 * abs(summed - measured), (found, summed, measured)


def test_what_is_no_set_is_refused():
    scorer = Ridge(np.ones((4, 1)), np.arange(4.0))
    for drop, steps in (([], 1), ([0, 0], 1), ([4], 1), ([-1], 1), (range(4), 1), ([0, 1], 3), ([0.5], 1)):
        with pytest.raises(SetError):
            stepwise_change(scorer, numbers(4), drop, steps=steps)
    with pytest.raises(SetError):
        newton_change(lambda kept: scorer, numbers(4), range(4))
    scorer.curvature = "ekfac"
    with pytest.raises(SetError, match="fit it on what is kept"):
        newton_change(lambda kept: scorer, numbers(4), [1])
