"""Sets left out in steps: against closed forms, and retrainings of a tiny model with copies in its data."""

import numpy as np
import pytest
import torch

from concept_tda.data.conversations import load_conversations
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.runs import TrainingInfluence
from concept_tda.influence.scorers import Scorer
from concept_tda.influence.sets import SetError, stepwise, stepwise_change
from concept_tda.model.finetuning import finetune
from concept_tda.model.loading import LanguageModel
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


def test_what_is_no_set_is_refused():
    scorer = Ridge(np.ones((4, 1)), np.arange(4.0))
    for drop, steps in (([], 1), ([0, 0], 1), ([4], 1), ([-1], 1), (range(4), 1), ([0, 1], 3), ([0.5], 1)):
        with pytest.raises(SetError):
            stepwise_change(scorer, numbers(4), drop, steps=steps)
