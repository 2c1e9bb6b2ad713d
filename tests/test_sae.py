"""Sparse autoencoders: which layer, which tokens, training that resumes, and what they are worth."""

import json

import pytest
import torch

from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.groups.sae import (
    SAEError,
    SparseAutoencoder,
    check_sae,
    load_sae,
    random_sae,
    read_tokens,
    recurrence,
    sae_quality,
    spliced,
    train_sae,
)
from concept_tda.model.loading import load_model
from concept_tda.model.losses import token_losses

from tiny import tiny_pair

SETTINGS = dict(n_features=32, k=3, tokens=24_000, batch_size=128, learning_rate=3e-3, progress=False)


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama"))


@pytest.fixture(scope="module")
def train():
    return load_conversations(
        [{"prompt": f"Is {i} so?", "response": "yes, " * (i % 7) + "it is not the sea"} for i in range(40)]
    )


@pytest.fixture(scope="module")
def sae(lm, train, tmp_path_factory):
    return train_sae(lm, train, 1, tmp_path_factory.mktemp("sae") / "one", **SETTINGS)


def test_round_trip_with_saelens_in_both_directions(sae, tmp_path, lm, train):
    from sae_lens import SAE

    theirs = SAE.load_from_disk(sae.name)
    acts = torch.randn(20, 16)
    torch.testing.assert_close(theirs.encode(acts), sae.encode(acts))
    torch.testing.assert_close(theirs.decode(theirs.encode(acts)), sae.reconstruct(acts))
    theirs.save_model(tmp_path / "again")
    back = load_sae(tmp_path / "again")
    assert back.layer == 1 and back.fingerprint == sae.fingerprint
    torch.testing.assert_close(back.decoder, sae.decoder)


def test_it_reads_the_layer_it_says(sae, lm, train):
    """hidden_states[l] of transformers is the oracle; the reconstruction is best at the own layer."""
    item = lm.tokenize(train)[0]
    batch = next(batches(lm.tokenize(train[:1])))
    hidden = lm.model(input_ids=item.input_ids[None], output_hidden_states=True).hidden_states
    for layer in range(lm.n_layers):
        acts, counted = read_tokens(lm, batch, layer)
        torch.testing.assert_close(acts, hidden[layer][0, 1:].detach(), atol=1e-5, rtol=1e-4)
        assert not counted[0, 0] and counted[0, 1:].all()
    explained = [
        sae_quality(lm, SparseAutoencoder(sae.sae, layer, "any"), train, progress=False).explained
        for layer in range(3)
    ]
    assert max(explained) == explained[1] > 0.3


def test_padding_and_the_first_token_never_count(lm, train):
    batch = next(batches(lm.tokenize(train[:7])))
    acts, counted = read_tokens(lm, batch, 1)
    assert not counted[:, 0].any() and not counted[batch.attention_mask == 0].any()
    assert len(acts) == int(batch.attention_mask.sum()) - len(batch)
    acts, counted = read_tokens(lm, batch, 1, response=True)
    assert (counted == batch.response_mask).all() and len(acts) == int(batch.response_mask.sum())


def test_a_killed_run_goes_on_and_ends_with_the_same_weights(sae, lm, train, tmp_path, monkeypatch):
    from concept_tda.groups import sae as room

    written = room._write_checkpoint
    calls = []

    def killed(*args):
        written(*args)
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt

    long = SETTINGS | dict(tokens=4 * 16_500)
    whole = train_sae(lm, train, 1, tmp_path / "whole", **long)
    monkeypatch.setattr(room, "_write_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train_sae(lm, train, 1, tmp_path / "killed", **long)
    assert (tmp_path / "killed" / "checkpoint" / "key.json").exists()
    with pytest.raises(SAEError, match="unfinished run with other settings \\(k differ\\)"):
        train_sae(lm, train, 1, tmp_path / "killed", **(long | dict(k=4)))
    monkeypatch.setattr(room, "_write_checkpoint", written)
    resumed = train_sae(lm, train, 1, tmp_path / "killed", **long)
    assert resumed.fingerprint == whole.fingerprint
    assert not (tmp_path / "killed" / "checkpoint").exists()
    monkeypatch.setattr(room, "_fit", lambda *args: pytest.fail("trained again"))
    assert train_sae(lm, train, 1, tmp_path / "killed", **long).fingerprint == whole.fingerprint
    with pytest.raises(SAEError, match=r"another run \(seed differ"):
        train_sae(lm, train, 1, tmp_path / "killed", **long, seed=1)


def test_training_leaves_the_callers_randomness_alone(lm, train, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train_sae(lm, train, 1, tmp_path / "sae", **(SETTINGS | dict(tokens=256)))
    assert torch.equal(torch.rand(2), expected)


def test_quality_does_not_depend_on_batches_and_beats_the_random_sae(sae, lm, train):
    one = sae_quality(lm, sae, train, token_budget=1, progress=False)
    many = sae_quality(lm, sae, train, token_budget=4096, progress=False)
    for name in ("explained", "l0", "dead", "loss", "loss_added", "loss_of_mean"):
        assert abs(getattr(one, name) - getattr(many, name)) < 1e-4, name
    chance = sae_quality(lm, random_sae(lm, sae, train), train, progress=False)
    assert chance.l0 <= round(many.l0) and many.explained > chance.explained
    assert many.to_pandas().loc[sae.name, "recovered"] == many.recovered


def test_splicing_the_same_changes_nothing_and_the_mean_costs_what_it_says(sae, lm, train):
    batch = next(batches(lm.tokenize(train[:5])))
    with lm.undisturbed(), torch.no_grad():
        plain = token_losses(lm, batch)
        for layer in range(lm.n_layers + 1):
            acts, counted = read_tokens(lm, batch, layer)
            with spliced(lm, layer, acts, counted):
                torch.testing.assert_close(token_losses(lm, batch), plain)
            with pytest.raises(ZeroDivisionError), spliced(lm, layer, acts, counted):
                1 / 0
            torch.testing.assert_close(token_losses(lm, batch), plain)


def test_recurrence(sae, lm, train):
    assert recurrence(sae, sae).min() > 0.999
    assert recurrence(sae, random_sae(lm, sae, train)).max() < 0.999


def test_bad_input_is_named(sae, lm, train, tmp_path):
    wide = load_model(tiny_pair("llama", width=32))
    (tmp_path / "empty").mkdir()
    (tmp_path / "release" / "inner").mkdir(parents=True)
    (tmp_path / "release" / "inner" / "cfg.json").write_text("{}")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "cfg.json").write_text("{not json")
    moved = tmp_path / "moved"
    sae.sae.save_model(moved)
    config = json.loads((moved / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.0.hook_mlp_out"
    (moved / "cfg.json").write_text(json.dumps(config))
    del config["metadata"]["hook_name"]
    silent = tmp_path / "silent"
    sae.sae.save_model(silent)
    (silent / "cfg.json").write_text(json.dumps(config))
    assert load_sae(silent, layer=2).layer == 2
    unfolded = tmp_path / "unfolded"
    sae.sae.save_model(unfolded)
    scaled = json.loads((unfolded / "cfg.json").read_text()) | {
        "normalize_activations": "expected_average_only_in"
    }
    (unfolded / "cfg.json").write_text(json.dumps(scaled))
    halved = tmp_path / "halved"
    halved.mkdir()
    (halved / "concept_tda.json").write_text("{half")
    for call, words in (
        (lambda: check_sae(sae, wide), "width 16.*have 32"),
        (lambda: sae_quality(wide, sae, train), "width 16"),
        (lambda: load_sae(tmp_path / "nowhere"), "no folder"),
        (lambda: load_sae(tmp_path / "empty"), "holds no cfg.json"),
        (lambda: load_sae(tmp_path / "release"), "it holds inner: name one of these"),
        (lambda: load_sae(broken), "SAELens could not open"),
        (lambda: load_sae(moved), "hook_mlp_out"),
        (lambda: load_sae(silent), "pass layer="),
        (lambda: load_sae(unfolded), "the scale is not in its weights"),
        (lambda: load_sae(sae.name, layer=2), "layer=1 here"),
        (lambda: train_sae(lm, train, 1, tmp_path / "a", **(SETTINGS | dict(k=64))), "k=64"),
        (lambda: train_sae(lm, train, 1, tmp_path / "a", **(SETTINGS | dict(tokens=5))), "not even one step"),
        (
            lambda: train_sae(lm, train[:1], 1, tmp_path / "a", **(SETTINGS | dict(batch_size=4096))),
            "step of",
        ),
        (lambda: train_sae(lm, train, 1, moved, **SETTINGS), "holds an SAE already"),
        (lambda: train_sae(lm, train, 1, halved, **SETTINGS), "concept_tda.json is damaged"),
    ):
        with pytest.raises(SAEError, match=words):
            call()
    deep = SparseAutoencoder(sae.sae, 9, "deep")
    with pytest.raises(Exception, match="layer"):
        check_sae(deep, lm)
