"""A surrogate scores as its scorer does; its agreement is that of the sample; its card claims no more."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from concept_tda.data.conversations import bundled
from concept_tda.influence.scorers import GradDot, ScorerError, score_together
from concept_tda.influence.surrogates import Surrogate
from concept_tda.model.loading import load_model

from tiny import tiny_pair


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def test_scores_agreement_and_words():
    closed, mine = (load_model(tiny_pair("llama", seed=seed)) for seed in (1, 2))
    train, shown = bundled("sycophancy")[:24], bundled("sycophancy")[-3:]
    plain = GradDot(mine, shown).score(train, progress=False)
    truth = GradDot(closed, shown).score(train.select(list(range(12, 24))), progress=False)
    scorer = Surrogate(GradDot(mine, shown), "the closed one", truth)
    result = score_together([scorer], train, progress=False)["GradDot (surrogate)"]
    assert np.array_equal(result.scores, plain.scores)
    agreement = result.card.settings["agreement"]
    wanted = spearmanr(plain.scores[12:], truth.scores).statistic
    assert agreement["spearman"] == pytest.approx(wanted) and agreement["examples"] == 12
    assert agreement["interval"][0] < wanted < agreement["interval"][1]
    text = str(result.card)
    assert f"{wanted:.3f}" in text and "not claimed" in text and "the closed one" in text
    assert (result.card.access, result.card.zero, result.card.effect) == ("text", "none", None)
    assert result.centre is None  # no sign is read from it

    same = Surrogate(GradDot(mine, shown), "itself", dict(zip(plain.ids, plain.scores)))
    assert same.score(train, progress=False).card.settings["agreement"]["spearman"] == pytest.approx(1)
    silent = Surrogate(GradDot(mine, shown), "x").score(train, progress=False)
    assert silent.card.settings["agreement"] is None and "unknown" in silent.card.notes[0]
    with pytest.raises(ScorerError, match="3 of 4 true scores"):
        few = dict.fromkeys([*plain.ids[:3], "nobody"], 1.0)
        Surrogate(GradDot(mine, shown), "x", few).score(train, progress=False)
