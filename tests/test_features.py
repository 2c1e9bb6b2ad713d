"""Features of a file: against a dense computation, whatever the batches; as groups and as concepts."""

import json

import numpy as np
import pytest
import torch

from concept_tda.data.conversations import load_conversations
from concept_tda.groups import features as room
from concept_tda.groups.features import (
    FeatureError,
    feature_concept,
    feature_groups,
    load_features,
    read_features,
    top_contexts,
)
from concept_tda.groups.sae import SAEError, random_sae, train_sae
from concept_tda.model.loading import load_model

from tiny import tiny_pair


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama"))


@pytest.fixture(scope="module")
def train():
    return load_conversations(
        [
            {"prompt": f"Is {i} so?", "response": "yes, " * (i % 7) + f"it is not the sea {i}"}
            for i in range(25)
        ]
    )


@pytest.fixture(scope="module")
def sae(lm, train, tmp_path_factory):
    settings = dict(n_features=32, k=3, tokens=24_000, batch_size=128, learning_rate=3e-3, progress=False)
    return train_sae(lm, train, 1, tmp_path_factory.mktemp("sae") / "one", **settings)


@pytest.fixture(scope="module")
def features(lm, sae, train, tmp_path_factory):
    return read_features(lm, sae, train, tmp_path_factory.mktemp("features"), progress=False)


def dense(lm, sae, train):
    """Codes of every response token by transformers' own hidden states, one unpadded example at a time."""
    for item in lm.tokenize(train):
        with torch.no_grad():
            hidden = lm.model(input_ids=item.input_ids[None], output_hidden_states=True).hidden_states[1][0]
            yield item, sae.sae.encode(hidden[item.response_mask])


@pytest.mark.parametrize("options", [{}, {"token_budget": 1}, {"token_budget": 100_000}])
def test_the_table_equals_a_dense_computation(lm, sae, train, tmp_path, options):
    found = read_features(lm, sae, train, tmp_path, progress=False, **options)
    for row, (item, codes) in enumerate(dense(lm, sae, train)):
        largest, at = codes.max(0)
        np.testing.assert_allclose(found.max[row].toarray()[0], largest, atol=1e-5)
        np.testing.assert_allclose(found.mean[row].toarray()[0], codes.mean(0), atol=1e-5)
        places = item.response_mask.nonzero()[:, 0][at].numpy()
        fired = largest.numpy() > 0
        assert (found.token[row].toarray()[0][fired] == places[fired]).all()


def test_long_answers_are_read_in_pieces(lm, sae, train, features, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "_PIECE", 3 * sae.n_features)
    pieces = read_features(lm, sae, train, tmp_path, progress=False)
    for name in ("max", "mean", "token"):
        np.testing.assert_allclose(
            getattr(pieces, name).toarray(), getattr(features, name).toarray(), atol=1e-6
        )


def test_order_and_neighbours_change_nothing(lm, sae, train, features, tmp_path):
    order = np.random.default_rng(0).permutation(len(train))
    shuffled = read_features(lm, sae, train[order.tolist()], tmp_path, progress=False)
    np.testing.assert_allclose(shuffled.max.toarray(), features.max.toarray()[order], atol=1e-6)


def test_the_threshold_is_strict(features):
    value = float(features.max.data[3])
    above, at = features.fires(np.nextafter(np.float32(value), np.float32(0))), features.fires(value)
    assert above.nnz > at.nnz and (features.max.toarray() > value).sum() == at.nnz
    assert features.fires(1e9).nnz == 0


def test_a_killed_run_goes_on(lm, sae, train, features, tmp_path, monkeypatch):
    read, calls = room._read_batch, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(room, "_read_batch", killed)
    with pytest.raises(KeyboardInterrupt):
        read_features(lm, sae, train, tmp_path, progress=False, token_budget=64)
    with pytest.raises(FeatureError, match="no finished features"):
        load_features(tmp_path, train)
    resumed = read_features(lm, sae, train, tmp_path, progress=False, token_budget=64)
    again = len(calls)
    np.testing.assert_allclose(resumed.max.toarray(), features.max.toarray(), atol=1e-6)
    read_features(lm, sae, train, tmp_path, progress=False)
    assert len(calls) == again and not list((tmp_path / "blocks").glob("*.npz"))


def test_groups_are_the_examples_on_which_a_feature_fires(features):
    groups = feature_groups(features, threshold=0.2, smallest=2, largest=0.8, names={3: "sea"})
    fired = features.max.toarray() > 0.2
    sizes = fired.sum(0)
    expected = [i for i in range(32) if 2 <= sizes[i] <= 0.8 * 25]
    assert [int(name.split()[0]) for name in groups.names] == expected
    for name in groups.names:
        assert groups.rows(name).tolist() == np.flatnonzero(fired[:, int(name.split()[0])]).tolist()
    assert sum(groups.left_out.values()) == 32 - len(expected)
    with pytest.raises(FeatureError, match="none of the 32 features is left"):
        feature_groups(features, threshold=1e6)


def test_concepts_are_rows_of_decoder_and_encoder(lm, sae, features):
    for side, rows in (("decoder", sae.sae.W_dec), ("encoder", sae.sae.W_enc.T)):
        concept = feature_concept(sae, 5, side=side, lm=lm, features=features)
        cosine = torch.nn.functional.cosine_similarity(concept.direction, rows[5].detach(), dim=0)
        assert cosine > 0.9999 and concept.layer == 1
        assert concept.provenance["fires on"] == (features.max.toarray()[:, 5] > 0.1).mean()
    for number in (32, -1, True, 1.5):
        with pytest.raises(FeatureError, match="features 0 to 31"):
            feature_concept(sae, number)
    with pytest.raises(FeatureError, match="'decoder' or 'encoder'"):
        feature_concept(sae, 1, side="both")


def test_contexts_show_the_token_at_which_it_fires_most(lm, sae, train, features):
    number = int(np.asarray(features.max.sum(0)).argmax())
    table = top_contexts(lm, features, number, 4, around=2)
    column = features.max[:, number].toarray().ravel()
    assert table["activation"].tolist() == sorted(column, reverse=True)[:4]
    row = train.ids.index(table["id"][0])
    item = lm.tokenize(train)[row]
    assert table["token"][0] == lm.tokenizer.decode([item.input_ids[features.token[row, number]]])


def test_bad_input_is_named(lm, sae, train, features, tmp_path):
    other = random_sae(lm, sae, train)
    wide = load_model(tiny_pair("llama", width=32))
    silent = random_sae(lm, sae, train)
    silent.sae.scale.zero_()
    broken = tmp_path / "broken"
    read_features(lm, sae, train, broken, progress=False)
    about = json.loads((broken / "about.json").read_text())
    (broken / "about.json").write_text(json.dumps(about | {"format": "concept_tda features 0"}))
    damaged = tmp_path / "damaged"
    read_features(lm, sae, train, damaged, progress=False)
    (damaged / "about.json").write_text("{half")
    never = int(np.flatnonzero(np.asarray(features.max.sum(0)).ravel() == 0)[:1].sum())
    calls = [
        (
            FeatureError,
            lambda: read_features(lm, other, train, features.folder),
            r"something else \(sae differ",
        ),
        (FeatureError, lambda: load_features(features.folder, train[:5]), "25 examples.*5"),
        (FeatureError, lambda: load_features(tmp_path / "none", train), "no finished features"),
        (FeatureError, lambda: load_features(broken, train), "this version reads"),
        (FeatureError, lambda: load_features(damaged, train), "damaged"),
        (
            FeatureError,
            lambda: read_features(lm, silent, train, tmp_path / "s", progress=False),
            "no feature of",
        ),
        (SAEError, lambda: read_features(wide, sae, train, tmp_path / "w"), "width 16"),
    ]
    if features.max[:, never].nnz == 0:
        calls.append((FeatureError, lambda: top_contexts(lm, features, never), "fires on none"))
    for kind, call, words in calls:
        with pytest.raises(kind, match=words):
            call()
