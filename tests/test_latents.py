"""All latents of an SAE against one at a time; a latent that is asked about only where it fires."""

import copy
import time

import numpy as np
import pytest
import torch

from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.groups.features import FeatureError, feature_concept, read_features
from concept_tda.groups.latents import LatentError, LatentQuery, rank_latents
from concept_tda.groups.sae import SAEError, SparseAutoencoder
from concept_tda.influence.atlas import build_atlas
from concept_tda.influence.gradients import SiteGradients
from concept_tda.influence.queries import ConceptQuery
from concept_tda.influence.scorers import ConceptInfluence, Influence
from concept_tda.model.loading import load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.model.sites import resolve_sites

from tiny import tiny_model, tiny_pair, tiny_tokenizer

F = 12


class Code(torch.nn.Module):
    """A plain ReLU autoencoder with random weights, as SAELens names its parts."""

    def __init__(self, width, dtype=torch.float64, seed=0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.W_enc = torch.nn.Parameter(torch.randn(width, F, generator=random, dtype=dtype))
        self.W_dec = torch.nn.Parameter(torch.randn(F, width, generator=random, dtype=dtype))

    def encode(self, acts):
        return (acts @ self.W_enc).relu()

    def decode(self, codes):
        return codes @ self.W_dec


@pytest.fixture(scope="module")
def lm():
    model, tokenizer = tiny_pair("llama")
    return load_model((model.double(), tokenizer))


@pytest.fixture(scope="module")
def sae(lm):
    return SparseAutoencoder(Code(lm.width), 1, "random code")


@pytest.fixture(scope="module")
def train():
    return load_conversations(
        [{"prompt": f"Is {i} so?", "response": "yes, " * (i % 5) + f"not the sea {i}"} for i in range(18)]
    )


@pytest.fixture(scope="module")
def queries():
    return load_conversations(
        [{"prompt": f"Is it {w}?", "response": f"it is {w}, {w} and well"} for w in ("so", "tea", "red")]
    )


@pytest.fixture(scope="module")
def atlas(lm, queries, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    return build_atlas(lm, queries, train, 1, folder=folder, curvature="identity", progress=False)


@pytest.fixture(scope="module")
def features(lm, sae, train, tmp_path_factory):
    return read_features(lm, sae, train, tmp_path_factory.mktemp("features"), progress=False)


@pytest.mark.parametrize("side", ["decoder", "encoder"])
def test_totals_equal_the_sum_of_scores_of_each_latent(lm, sae, queries, train, atlas, side):
    table = rank_latents(atlas, sae, side=side).set_index("latent")
    assert sorted(table.index) == list(range(F)) and (table["total"].diff().dropna() <= 0).all()
    for number in range(F):
        concept = feature_concept(sae, number, side=side)
        alone = ConceptInfluence(lm, concept, queries, curvature="identity").score(train, progress=False)
        np.testing.assert_allclose(table["total"][number], alone.scores.sum(), rtol=1e-6)
        np.testing.assert_allclose(table["mean"][number], alone.scores.mean(), rtol=1e-6)


def test_share_fires_on_and_z_by_hand(sae, atlas, features):
    table = rank_latents(atlas, sae, features=features, threshold=0.5).set_index("latent")
    movement = np.asarray(atlas.rows, float).sum(0)
    for number in range(F):
        direction = sae.decoder[number].double().numpy()
        cosine = direction @ movement / np.linalg.norm(direction) / np.linalg.norm(movement)
        np.testing.assert_allclose(table["share"][number], cosine**2, rtol=1e-6)
        assert table["fires_on"][number] == (features.max[:, number].toarray() > 0.5).mean()
    # a random unit direction has mean 0 and variance |movement|²/d
    many = rank_latents(atlas, sae, n_random=200_000).set_index("latent")
    exact = many["total"] / (np.linalg.norm(movement) / len(movement) ** 0.5)
    np.testing.assert_allclose(many["z"], exact, rtol=0.02, atol=0.02)


def test_the_null_follows_the_activations(sae, atlas):
    """Activations that only vary across the movement make it look large, those along it make it small."""
    movement = np.asarray(atlas.rows, float).sum(0)
    noise = np.random.default_rng(0).normal(size=(200, len(movement)))
    unit = movement / np.linalg.norm(movement)
    across = noise - 0.99 * np.outer(noise @ unit, unit)
    along = noise + 10 * np.outer(noise @ unit, unit)
    largest = [rank_latents(atlas, sae, activations=a)["z"].abs().max() for a in (across, noise, along)]
    assert largest[0] > 2 * largest[1] > 4 * largest[2]


def test_five_thousand_latents_take_under_two_seconds(lm, atlas):
    big = SparseAutoencoder(
        type("B", (), {"W_dec": torch.randn(5000, lm.width), "W_enc": torch.randn(lm.width, 5000)}), 1, "big"
    )
    start = time.perf_counter()
    assert len(rank_latents(atlas, big)) == 5000 and time.perf_counter() - start < 2


def test_a_decoder_row_of_zeros_has_no_influence(sae, atlas):
    dead = copy.copy(sae)
    dead.decoder = sae.decoder.clone()
    dead.decoder[3] = 0
    assert rank_latents(atlas, dead).set_index("latent")["total"][3] == 0


def test_what_does_not_belong_together_is_refused(lm, sae, atlas, features, train, tmp_path):
    other_layer = SparseAutoencoder(Code(lm.width), 2, "of layer 2")
    with pytest.raises(LatentError, match="reads layer 2 .* atlas answers for layer 1"):
        rank_latents(atlas, other_layer)
    with pytest.raises(LatentError, match="of width 7"):
        rank_latents(atlas, SparseAutoencoder(Code(7), 1, "narrow"))
    same_name = SparseAutoencoder(Code(lm.width, seed=1), 1, "random code")
    with pytest.raises(LatentError, match="table of features is of"):
        rank_latents(atlas, same_name, features=features)
    fewer = read_features(lm, sae, train[:9], tmp_path / "few", progress=False)
    with pytest.raises(LatentError, match="9 examples.*the atlas of"):
        rank_latents(atlas, sae, features=fewer)
    with pytest.raises(LatentError, match="side='both'"):
        rank_latents(atlas, sae, side="both")
    with pytest.raises(LatentError, match="width 5"):
        rank_latents(atlas, sae, activations=np.random.default_rng(0).normal(size=(20, 5)))


def firing(lm, sae, number, examples, threshold):
    """Hidden states and gates, one unpadded example at a time, by transformers alone."""
    for item in lm.tokenize(examples):
        hidden = lm.model(input_ids=item.input_ids[None], output_hidden_states=True).hidden_states[1][0]
        yield hidden, item.response_mask & (sae.sae.encode(hidden)[:, number] > threshold)


def by_hand(lm, sae, number, examples, threshold):
    """The value of the gated query."""
    unit = sae.decoder[number].double() / sae.decoder[number].double().norm()
    means = [
        (hidden[gate] @ unit).mean()
        for hidden, gate in firing(lm, sae, number, examples, threshold)
        if gate.any()
    ]
    return torch.stack(means).mean()


def a_latent_that_fires_sometimes(lm, sae, examples):
    for number in range(F):
        with torch.no_grad():
            gates = [gate for _, gate in firing(lm, sae, number, examples, 0.1)]
        counts = [int(gate.sum()) for gate in gates]
        if 0 in counts and max(counts) > 1:
            return number
    raise AssertionError("no latent fires on some of the examples only")


@pytest.mark.parametrize("threshold", [0.1, 1.0])
def test_gated_value_and_gradient_equal_those_by_hand(lm, sae, train, threshold):
    number = a_latent_that_fires_sometimes(lm, sae, train)
    query, sites = (
        LatentQuery(lm, sae, number, train, threshold=threshold),
        resolve_sites(lm, "attention", layer=1),
    )
    found = query.gradients(lm, sites)
    with SiteGradients(sites) as expected, torch.enable_grad():
        value = by_hand(lm, sae, number, train, threshold)
        value.backward()
    np.testing.assert_allclose(query.value(lm), value.item(), rtol=1e-6)
    for site in sites:
        torch.testing.assert_close(
            found[site.name], expected[site.name], rtol=1e-5, atol=1e-7
        )  # float32 directions
    assert query.left_out > 0 and len(query.examples) == len(train) - query.left_out


def test_a_step_on_an_example_moves_the_gated_latent_as_its_score_says(lm, sae, train):
    number = a_latent_that_fires_sometimes(lm, sae, train)
    query = LatentQuery(lm, sae, number, train)
    scores = Influence(lm, query, sites="attention", curvature="identity").score(train, progress=False)
    before = query.value(lm)
    for row in np.abs(scores.scores).argsort()[-3:].tolist():
        stepped = load_model((copy.deepcopy(lm.model), lm.tokenizer))
        sites = resolve_sites(stepped, "attention", layer=1)
        batch = next(batches(stepped.tokenize(train), rows=[row]))
        with SiteGradients(sites) as gradients, torch.enable_grad():
            (token_losses(stepped, batch) * loss_weights(batch, dtype=torch.float64)).sum().backward()
        with torch.no_grad():
            for site in sites:
                site.weight.sub_(1e-5 * gradients[site.name])
        change = (query.value(stepped) - before) / 1e-5
        np.testing.assert_allclose(change, scores.scores[row], rtol=1e-3)


def test_open_gates_are_the_ungated_query(lm, sae, train):
    gated = LatentQuery(lm, sae, 4, train, threshold=-1)
    plain = ConceptQuery(feature_concept(sae, 4), train)
    sites = resolve_sites(lm, "attention", layer=1)
    first, second = gated.gradients(lm, sites), plain.gradients(lm, sites)
    np.testing.assert_allclose(gated.value(lm), plain.value(lm), rtol=1e-9)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-8, atol=1e-12)


def test_the_fingerprint_covers_the_gates(lm, sae, train):
    number = a_latent_that_fires_sometimes(lm, sae, train)
    low, high = (LatentQuery(lm, sae, number, train, threshold=t) for t in (0.1, 1.0))
    assert low.fingerprint != high.fingerprint
    assert low.fingerprint == LatentQuery(lm, sae, number, train).fingerprint


def test_gated_queries_without_sense_are_refused(lm, sae, train):
    with pytest.raises(FeatureError, match=r"fires above 1e\+09 on none of the 18"):
        LatentQuery(lm, sae, 0, train, threshold=1e9)
    with pytest.raises(FeatureError, match="has features 0 to 11"):
        LatentQuery(lm, sae, F, train)
    with pytest.raises(SAEError, match="width 7"):
        LatentQuery(lm, SparseAutoencoder(Code(7), 1, "narrow"), 0, train)
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer = tiny_tokenizer(template)
    reader = load_model((tiny_model("llama").double(), tokenizer))
    with pytest.raises(LatentError, match="different tokens"):
        LatentQuery(lm, sae, 0, train, reader=reader)
