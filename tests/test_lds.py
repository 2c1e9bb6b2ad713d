"""The linear datamodeling score (Formulas §8) by actual retraining: do the scores foretell what a model
trained on a random half does?

A tiny Llama is fine-tuned on 30 random halves of 40 examples. For each half, the sum of its examples' scores
is a prediction of the fine-tuned model's log-likelihood on a query; the score is Spearman's correlation over
the halves, averaged over ten queries."""

import copy

import numpy as np
import pytest
import torch

from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.preconditioners import DataInf
from concept_tda.influence.scorers import GradDot, InfluenceFunction
from concept_tda.model.loading import load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.results.metrics import spearman

from tiny import tiny_pair

N_SUBSETS, SITES = 30, "all-linear"
WORDINGS = ("Is {} ok?", "{} ok?", "Say: {}?", "So {}?")


def question(thing, wording, answer):
    return {"prompt": wording.format(thing), "response": answer}


def example_losses(lm, batch):
    return (token_losses(lm, batch) * loss_weights(batch)).sum(1)


def train(lm, batch, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        example_losses(lm, batch).mean().backward()
        optimizer.step()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Model fine-tuned on everything, its data and queries, the halves as a 0/1 matrix, and minus the loss on
    every query after each half."""
    random, things = (
        np.random.default_rng(0),
        ("sky", "sea", "sun", "ice", "fox", "elm", "ant", "oak", "bee", "owl"),
    )
    # every thing is asked about four times; the answers vote, not always the same way
    data = load_conversations(
        [
            question(t, w, "yes" if random.random() < (0.8 if i % 2 else 0.2) else "no")
            for i, t in enumerate(things)
            for w in WORDINGS
        ]
    )
    queries = load_conversations(
        [question(t, "Now {}?", "yes" if i % 2 else "no") for i, t in enumerate(things)]
    )
    general = load_conversations(
        [
            question(t, w, "yes" if random.random() < 0.5 else "no")
            for t in ("cat", "dog", "pig", "hen", "cow", "rat", "bat", "elk")
            for w in WORDINGS
        ]
    )
    lm = load_model(tiny_pair("llama"))
    train(
        lm,
        next(batches(lm.tokenize(general), token_budget=10**6)),
        torch.optim.Adam(lm.model.parameters(), 1e-2),
        12,
    )
    base, tokens, asked = (
        copy.deepcopy(lm.model.state_dict()),
        lm.tokenize(data),
        next(batches(lm.tokenize(queries), token_budget=10**6)),
    )

    def outcome(rows):
        lm.model.load_state_dict(base)
        train(
            lm,
            next(batches(tokens, token_budget=10**6, rows=rows)),
            torch.optim.SGD(lm.model.parameters(), 2e-2, momentum=0.9),
            30,
        )
        with torch.no_grad():
            losses = example_losses(lm, asked)
        return -losses[asked.rows.argsort()].double().numpy()

    halves = [np.sort(random.permutation(len(data))[: len(data) // 2]).tolist() for _ in range(N_SUBSETS)]
    outcomes = np.array([outcome(rows) for rows in halves])
    outcome(list(range(len(data))))  # leaves the model that is attributed: trained on everything
    members = np.zeros((N_SUBSETS, len(data)))
    for half, rows in enumerate(halves):
        members[half, rows] = 1
    return lm, data, [queries[i : i + 1] for i in range(len(queries))], members, outcomes


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def test_ekfac_above_identity_above_random(study, capsys):
    lm, data, queries, members, outcomes = study
    assert outcomes.std(0).min() > 0.01  # the halves do differ in what they teach

    def lds(score):
        return np.array(
            [spearman(members @ score(i, query), outcomes[:, i]) for i, query in enumerate(queries)]
        )

    def influence(curvature):
        return lambda i, query: (
            InfluenceFunction(lm, query, sites=SITES, curvature=curvature).score(data, progress=False).scores
        )

    found = {
        "EK-FAC": lds(influence(EKFAC.fit(lm, data, SITES, cache=False, progress=False))),
        "DataInf": lds(influence(DataInf.fit(lm, data, SITES, progress=False))),
        "identity": lds(lambda i, query: GradDot(lm, query, sites=SITES).score(data, progress=False).scores),
        "random": np.mean(
            [
                lds(lambda i, query: np.random.default_rng([seed, i]).normal(size=len(data)))
                for seed in range(20)
            ],
            0,
        ),
    }
    with capsys.disabled():
        print()
        for method, values in found.items():
            print(
                f"    LDS {method:9} {values.mean():+.3f} ± {values.std() / len(values) ** 0.5:.3f} "
                f"over {len(queries)} queries, {len(members)} retrainings"
            )
    mean = {method: values.mean() for method, values in found.items()}
    assert mean["EK-FAC"] > mean["identity"] + 0.05
    assert mean["identity"] > mean["random"] + 0.1
    assert abs(mean["random"]) < 0.1
