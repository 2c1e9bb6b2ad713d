"""Files that kronfluence and bergson wrote themselves (tests/make_kronfluence.py, tests/make_bergson.py), and
an oracle: with kronfluence's factors our influence function gives kronfluence's scores."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_tda.data.conversations import load_conversations
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.other_tools import (
    OtherToolError,
    load_bergson_scores,
    load_kronfluence_factors,
    load_kronfluence_scores,
)
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.scorers import InfluenceFunction
from concept_tda.model.loading import load_model
from concept_tda.results.attribution import Attribution, load_attribution

from make_kronfluence import DAMPING, data, model
from tiny import tiny_pair

HERE = Path(__file__).parent / "data"
KRON, BERG = HERE / "kronfluence", HERE / "bergson"
SITES = r"(q|v|o)_proj"


@pytest.fixture(scope="module")
def lm():
    return model()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def test_with_kronfluences_factors_our_scores_are_kronfluences(lm):
    """Sign, 1/N, eigenbases and damping at once, against scores that kronfluence computed by itself."""
    train, queries = data()
    factors = load_kronfluence_factors(KRON / "factors_ekfac", lm, damping=DAMPING, relative=False)
    theirs = load_kronfluence_scores(KRON / "scores_all", train, measured="loss")
    for number in range(len(queries)):
        scorer = InfluenceFunction(lm, queries[[number]], sites=SITES, curvature=factors)
        ours = scorer.score(train, progress=False)
        np.testing.assert_allclose(ours.scores, theirs.query(f"query {number + 1}").scores, rtol=1e-9)
        assert "fitted by kronfluence" in str(ours.card)
    other = InfluenceFunction(lm, queries[[0]], sites=SITES, curvature=factors.damped(0.1))
    assert "fitted by kronfluence" in str(other.score(train, progress=False).card)


def test_a_step_on_the_top_example_makes_the_query_likelier(lm):
    """The sign by what it means, not by another formula."""
    train, queries = data()
    theirs = load_kronfluence_scores(KRON / "scores_modules", train, measured="loss").query("query 1")
    assert theirs.top(1).scores[0] > 0 > theirs.bottom(1).scores[0]
    factors = load_kronfluence_factors(KRON / "factors_ekfac", lm, damping=DAMPING, relative=False)
    for end, likelier in ((theirs.top(1), True), (theirs.bottom(1), False)):
        stepped = model()
        scorer = InfluenceFunction(stepped, queries[[0]], sites=SITES, curvature=factors)
        before = scorer.query.value(stepped)
        gradients = LossQuery(end.conversations).gradients(stepped, scorer.sites)
        known = LossQuery(end.conversations).value(stepped)
        with torch.no_grad():
            for site, step in factors.precondition(gradients).items():
                stepped.model.get_submodule(site).weight += 1e-6 * step  # LossQuery is the log-likelihood
        assert LossQuery(end.conversations).value(stepped) > known  # the step is one of learning
        assert (scorer.query.value(stepped) > before) == likelier


def test_scores_by_module_and_by_token_add_up(tmp_path):
    train, _ = data()
    whole, modules = (
        load_kronfluence_scores(KRON / name, train, measured="loss")
        for name in ("scores_all", "scores_modules")
    )
    np.testing.assert_allclose(whole.scores, modules.scores, rtol=1e-12)
    shutil.copytree(KRON / "scores_all", tmp_path / "s")
    [(name, total)] = load_file(KRON / "scores_all/pairwise_scores.safetensors").items()
    tokens = torch.stack([total * 0.25, total * 0.75, torch.zeros_like(total)], 2).contiguous()
    save_file({name: tokens}, tmp_path / "s/pairwise_scores.safetensors")
    again = load_kronfluence_scores(tmp_path / "s", train, measured="loss")
    np.testing.assert_allclose(whole.scores, again.scores, rtol=1e-12)


def test_the_card_says_where_the_scores_are_from_and_a_result_is_a_result(tmp_path):
    train, queries = data()
    one = load_kronfluence_scores(
        KRON / "scores_all", train, measured="loss", behaviour="short", queries=queries.ids
    )
    assert one.card.method == "kronfluence, EK-FAC" and one.card.damping == f"{DAMPING} absolute"
    assert "kronfluence and read from its files" in str(one.card) and one.card.zero == "gradient"
    assert isinstance(one, Attribution) and one.queries == queries.ids and one.card.model is None
    part = one.query(queries.ids[1])
    part.save(tmp_path / "a.parquet")
    assert load_attribution(tmp_path / "a.parquet").card.settings["made by"] == "kronfluence"
    assert len(part.drop(count=2)) == 8
    turned = load_kronfluence_scores(KRON / "scores_all", train, measured="behaviour")
    assert np.array_equal(turned.scores, -one.scores)


def test_a_data_set_that_was_scored_in_another_order_is_put_in_that_order(tmp_path):
    train, _ = data()
    shutil.copytree(KRON / "scores_all", tmp_path / "s")
    plain, order = load_kronfluence_scores(tmp_path / "s", train, measured="loss"), [*range(5, 10), *range(5)]
    about = {"type": "Rows", "dataset_size": 10, "indices": order}
    (tmp_path / "s/train_dataset_metadata.json").write_text(json.dumps(about))
    found = load_kronfluence_scores(tmp_path / "s", train, measured="loss")
    assert found.ids == [train[row].id for row in order]
    np.testing.assert_array_equal(found.scores, plain.scores)


def test_a_part_of_a_data_set_is_found(tmp_path):
    train, _ = data()
    shutil.copytree(KRON / "scores_all", tmp_path / "s")
    [(name, total)] = load_file(KRON / "scores_all/pairwise_scores.safetensors").items()
    save_file({name: total[:, :3].contiguous()}, tmp_path / "s/pairwise_scores.safetensors")
    about = {"type": "Rows", "dataset_size": 10, "indices": [7, 2, 5]}
    (tmp_path / "s/train_dataset_metadata.json").write_text(json.dumps(about))
    for given in (train, train[[7, 2, 5]]):
        found = load_kronfluence_scores(tmp_path / "s", given, measured="loss")
        assert found.ids == [train[row].id for row in (7, 2, 5)]
    about |= {"indices": list(reversed(range(3)))}  # of a data set of ten, so never the three in their order
    (tmp_path / "s/train_dataset_metadata.json").write_text(json.dumps(about))
    found = load_kronfluence_scores(tmp_path / "s", train[:3][::-1], measured="loss")
    assert found.ids == [train[row].id for row in (2, 1, 0)]
    (tmp_path / "s/train_dataset_metadata.json").write_text(json.dumps(about | {"indices": [7, 2]}))
    with pytest.raises(OtherToolError, match="names 2 rows"):
        load_kronfluence_scores(tmp_path / "s", train, measured="loss")
    with pytest.raises(OtherToolError, match="3 examples, and 'train' has 5"):
        (tmp_path / "s/train_dataset_metadata.json").write_text(json.dumps(about | {"indices": [7, 2, 5]}))
        load_kronfluence_scores(tmp_path / "s", train[:5], measured="loss")


def test_factors_that_cannot_be_mapped_are_refused(lm, tmp_path):
    folder = tmp_path / "f"
    shutil.copytree(KRON / "factors_ekfac", folder)
    sums = load_file(folder / "lambda_matrix.safetensors")
    name = next(iter(sums))
    wider = {**sums, name: torch.ones(sums[name].shape[0], sums[name].shape[1] + 1, dtype=torch.float64)}
    save_file(wider, folder / "lambda_matrix.safetensors")
    with pytest.raises(OtherToolError, match=f"{name} has a bias"):
        load_kronfluence_factors(folder, lm)
    with pytest.raises(OtherToolError, match="no layer"):
        load_kronfluence_factors(KRON / "factors_ekfac", load_model(tiny_pair("gpt2", width=8)))
    (folder / "activation_eigenvectors.safetensors").unlink()
    with pytest.raises(OtherToolError, match="activation_eigenvectors.safetensors can't be read"):
        load_kronfluence_factors(folder, lm)
    about = json.loads((folder / "factor_arguments.json").read_text())
    (folder / "factor_arguments.json").write_text(json.dumps(about | {"strategy": "diagonal"}))
    with pytest.raises(OtherToolError, match="'diagonal'"):
        load_kronfluence_factors(folder, lm)
    assert isinstance(load_kronfluence_factors(KRON / "factors_ekfac", lm), EKFAC)


def examples(n):
    return load_conversations([{"prompt": f"q{i}", "response": f"a{i}"} for i in range(n)], name="x")


def test_bergsons_tables_in_every_form():
    expected = {name: np.load(BERG / name / "expected.npy") for name in ("sequence", "bfloat16", "tokens")}
    found = load_bergson_scores(BERG / "sequence", examples(5), queries=["a", "b"])
    assert np.array_equal(found.scores, expected["sequence"]) and found.queries == ["a", "b"]
    assert found.card.model == "EleutherAI/pythia-160m" and found.card.method == "bergson"
    turned = load_bergson_scores(BERG / "bfloat16", examples(3))  # config.yaml says higher_is_better: false
    assert turned.scores.tolist() == [-1.5, 2.0, -0.25]
    tokens = load_bergson_scores(BERG / "tokens", examples(3))
    sums = [expected["tokens"][a:b].sum() for a, b in ((0, 3), (3, 3), (3, 9))]
    np.testing.assert_allclose(tokens.scores, sums, rtol=1e-6)


def test_bergsons_sign_is_never_guessed(tmp_path):
    shutil.copytree(BERG / "sequence", tmp_path / "s")
    with pytest.raises(OtherToolError, match="says higher_is_better: true, and you say False"):
        load_bergson_scores(tmp_path / "s", examples(5), higher_is_better=False)
    (tmp_path / "s/config.yaml").unlink()
    with pytest.raises(OtherToolError, match="higher_is_better=True where"):
        load_bergson_scores(tmp_path / "s", examples(5))
    found = load_bergson_scores(tmp_path / "s", examples(5), higher_is_better=False)
    assert np.array_equal(found.scores, -np.load(BERG / "sequence/expected.npy"))


def test_bergsons_broken_and_chosen_tables(tmp_path):
    with pytest.raises(OtherToolError, match="1 of 3 scores were never written"):
        load_bergson_scores(BERG / "half", examples(3), higher_is_better=True)
    with pytest.raises(OtherToolError, match="5 examples, and 'x' has 4"):
        load_bergson_scores(BERG / "sequence", examples(4))
    shutil.copytree(BERG / "sequence", tmp_path / "s")
    np.save(tmp_path / "s/candidates.npy", np.array([6, 0, 3, 9, 1]))
    assert load_bergson_scores(tmp_path / "s", examples(10)).ids == examples(10)[[6, 0, 3, 9, 1]].ids
    whole = (tmp_path / "s/scores.bin").read_bytes()
    (tmp_path / "s/scores.bin").write_bytes(whole[:-16])
    with pytest.raises(OtherToolError, match="has 4 rows, info.json says 5"):
        load_bergson_scores(tmp_path / "s", examples(5))
    with pytest.raises(OtherToolError, match="no info.json"):
        load_bergson_scores(tmp_path, examples(5))
