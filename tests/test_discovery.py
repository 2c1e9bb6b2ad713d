"""Directions found in atlas rows: a planted one is found, chance is not; and what can be read of them."""

import copy

import numpy as np
import pytest
import torch

from concept_tda.data.conversations import load_conversations
from concept_tda.groups.discovery import (
    DiscoveryError,
    discover,
    effect_groups,
    movement,
    movement_check,
    sparse_atoms,
)
from concept_tda.groups.groups import GroupError
from concept_tda.groups.reading import (
    ReadingError,
    count_words,
    distinguishing_words,
    logit_lens,
    nearest_features,
    words_of_ends,
)
from concept_tda.groups.sae import SparseAutoencoder
from concept_tda.influence.atlas import build_atlas
from concept_tda.model.loading import load_model

from tiny import tiny_pair

QUESTIONS = [f"Is it {word}?" for word in "red tea mill lake stone quick boat salt fern owl".split()]
ANSWERS = ("yes yes yes yes", "no no", "yes yes yes", "no no no")


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama"))


@pytest.fixture(scope="module")
def file():
    return load_conversations(
        [{"prompt": q, "response": a, "kind": a.split()[0]} for q in QUESTIONS for a in ANSWERS]
    )


@pytest.fixture(scope="module")
def queries():
    return load_conversations(
        [{"prompt": "Is it so?", "response": "it is"}, {"prompt": "Now?", "response": "well"}]
    )


@pytest.fixture(scope="module")
def atlas(lm, file, queries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    return build_atlas(
        lm, queries, file, 1, folder=folder, sites="all-linear", curvature="identity", progress=False
    )


def with_rows(atlas, rows):
    """The same atlas with other rows."""
    other = copy.copy(atlas)
    other.rows = rows
    return other


def planted(n=40, d=16, strength=3.0, seed=0):
    """Noise, and half of the rows pushed along one direction."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=d)
    direction /= np.linalg.norm(direction)
    pushed = np.arange(n) % 2 == 0
    return (
        random.normal(size=(n, d)) + strength * np.where(pushed, 1, -1)[:, None] * direction,
        direction,
        pushed,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_direction_is_found(atlas, seed):
    rows, direction, pushed = planted(seed=seed)
    found = discover(with_rows(atlas, rows), 4, draws=20)
    assert found.table["found"].tolist() == [True, False, False, False]
    assert abs(found.directions[0] @ direction) > 0.9
    scores = found.scores(1).scores
    from sklearn.metrics import roc_auc_score

    auc = roc_auc_score(pushed, scores)
    assert max(auc, 1 - auc) > 0.95
    np.testing.assert_allclose(scores, rows @ found.directions[0], rtol=1e-5, atol=1e-6)


def test_nothing_is_found_in_shuffled_rows(atlas):
    """Columns shuffled on their own: each coordinate as before, nothing in common."""
    hits = 0
    for seed in range(8):
        rows, _, _ = planted(seed=seed)
        random = np.random.default_rng(seed)
        shuffled = np.stack([random.permutation(column) for column in rows.T], 1)
        hits += discover(with_rows(atlas, shuffled), 3, draws=20).table["found"].sum()
    assert hits <= 1


def test_one_large_coordinate_is_no_direction(atlas):
    rows = np.random.default_rng(0).normal(size=(40, 16)) * np.array([20.0] + [1] * 15)
    assert not discover(with_rows(atlas, rows), 1, draws=30).table["found"].any()


def test_movement_is_the_mean_and_its_null_the_signs(atlas):
    rows = np.random.default_rng(1).normal(size=(40, 16))
    still = movement(with_rows(atlas, rows))
    np.testing.assert_allclose(still.direction, rows.mean(0))
    assert not still.beyond_chance
    pushing = movement(with_rows(atlas, rows + 1))
    assert pushing.beyond_chance and pushing.agreement > still.agreement
    same = movement(with_rows(atlas, np.tile(rows[:1], (40, 1))))
    assert abs(same.agreement - 1) < 1e-12


def test_directions_point_the_way_the_file_pushes(atlas):
    rows, direction, _ = planted()
    for sign in (1, -1):
        found = discover(with_rows(atlas, rows + sign * 0.5 * direction), 1, draws=5)
        assert (rows.sum(0) + sign * 20 * direction) @ found.directions[0] > 0


def test_a_file_of_two_kinds_end_to_end(atlas, file):
    found = discover(atlas, 3, draws=20)
    assert found.table["found"][0]
    auc = found.scores(1).detection([kind == "yes" for kind in file.metadata["kind"]])["AUROC"].iloc[0]
    assert max(auc, 1 - auc) > 0.95
    groups = effect_groups(atlas, 2)
    for name in groups.names:  # the same push, whatever the words
        assert file.metadata["kind"].iloc[groups.rows(name)].value_counts(normalize=True).max() > 0.8
    assert found.concept(1).layer == 1 and found.concept(1).pooling == atlas.card["pooling"]


def planted_atoms(n=160, d=48, k=4, noise=0.6, push=2.0, seed=0):
    """Rows that are sums of few of k directions, each used by a sixth of them, and a push that all share."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(k, d))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    used = random.random((n, k)) < 1 / 6
    rows = (used * random.uniform(0.7, 1.3, (n, k))) @ directions
    shared = push * random.normal(size=d) / np.sqrt(d)
    return rows + noise / np.sqrt(d) * random.normal(size=(n, d)) + shared, directions, used


@pytest.fixture(scope="module")
def wide(queries, tmp_path_factory):
    """An atlas of 160 examples of width 48, whose rows the tests replace."""
    lm = load_model(tiny_pair("llama", width=48))
    data = load_conversations([{"prompt": f"{i}?", "response": "so"} for i in range(160)])
    folder = tmp_path_factory.mktemp("wide")
    return build_atlas(lm, queries, data, 1, folder=folder, curvature="identity", progress=False)


@pytest.mark.parametrize("seed", range(3))
def test_planted_atoms_are_recovered_with_their_examples(wide, seed):
    rows, directions, used = planted_atoms(seed=seed)
    found = sparse_atoms(with_rows(wide, rows), 8, draws=6)
    cosines = directions @ found.directions.T  # [planted, atom]; signed: an atom pushes the way its users do
    assert cosines.max(1).min() > 0.85 and len(set(cosines.argmax(1))) == 4
    assert found.table["found"].to_numpy()[cosines.argmax(1)].all()
    groups = found.groups()
    from sklearn.metrics import roc_auc_score

    for planted_one, atom in enumerate(cosines.argmax(1)):
        assert roc_auc_score(used[:, planted_one], found.codes[:, atom]) > 0.9
        assert groups.rows(f"atom {atom + 1}").tolist() == np.flatnonzero(found.codes[:, atom]).tolist()
    assert found.table["coherence"].is_monotonic_decreasing


def test_no_atom_is_found_in_rows_of_random_signs(wide):
    """The same sizes, nothing in common; and the null is what makes it so, not a fixed threshold."""
    hits = 0
    for seed in range(6):
        rows = planted_atoms(seed=seed)[0]
        centred = rows - rows.mean(0)
        flipped = centred * np.random.default_rng(seed).choice([-1.0, 1.0], size=rows.shape)
        found = sparse_atoms(with_rows(wide, flipped), 8, draws=6, seed=seed)
        assert found.table["coherence"].max() > 0.04  # chance alone is coherent
        hits += found.table["found"].sum()
    assert hits <= 2
    with pytest.raises(DiscoveryError, match="none of 8 atoms was found"):
        sparse_atoms(with_rows(wide, flipped), 8, draws=6, seed=5).groups()


def test_coherence_is_the_mean_cosine_of_pairs_about_the_mean(wide):
    rows, _, _ = planted_atoms()
    found = sparse_atoms(with_rows(wide, rows), 4, top=7, draws=2)
    about = rows - rows.mean(0)
    for atom in range(4):
        users = np.argsort(-found.codes[:, atom], kind="stable")[:7]
        pairs = [
            about[a] @ about[b] / np.linalg.norm(about[a]) / np.linalg.norm(about[b])
            for a in users
            for b in users
            if a < b
        ]
        assert len(pairs) == 21 and abs(found.table["coherence"][atom] - np.mean(pairs)) < 1e-9


def test_a_push_that_all_share_and_the_size_of_rows_change_no_atom(wide):
    rows, _, _ = planted_atoms(push=0)
    first = sparse_atoms(with_rows(wide, rows), 4, draws=2)
    for same in (rows + 5, 100 * rows):
        other = sparse_atoms(with_rows(wide, same), 4, draws=2)
        np.testing.assert_allclose(other.directions, first.directions, atol=1e-6)
        np.testing.assert_allclose(other.codes, first.codes, atol=1e-6)
    turned = sparse_atoms(with_rows(wide, -rows), 4, draws=2)
    assert (turned.directions @ first.directions.T).max() < 0.6  # an atom has a sign


def test_twins_make_no_kind(wide):
    """Four copies in noise: a perfect atom, of four examples."""
    rows = np.random.default_rng(0).normal(size=(160, 48))
    rows[:4] = 3 * rows[0]
    strict, loose = (sparse_atoms(with_rows(wide, rows), 8, draws=6, least=least) for least in (300, 2))
    assert strict.table["coherence"][0] == loose.table["coherence"][0]
    assert loose.table["found"].any() and not strict.table["found"].any()


def test_discovery_shows_its_atoms(wide):
    rows = planted_atoms()[0]
    found = discover(with_rows(wide, rows), 2, atoms=3, draws=3)
    alone = sparse_atoms(with_rows(wide, rows), 3)
    np.testing.assert_array_equal(found.atoms.directions, alone.directions)
    assert f"{alone.table['found'].sum()} of 3 atoms found" in repr(found)
    shown = found._repr_html_()
    assert "atoms found" in shown and "directions found" in shown and ">yes<" in shown
    assert "atoms" not in repr(discover(with_rows(wide, rows), 2, draws=3))
    concept = found.atoms.concept(2)
    assert concept.name == "atom 2" and concept.pooling == wide.card["pooling"]
    np.testing.assert_allclose(concept.direction, found.atoms.directions[1], atol=1e-6)
    with pytest.raises(DiscoveryError, match="atom 4: there are 1 to 3"):
        found.atoms.concept(4)


def test_the_measured_movement_is_the_difference_of_means(atlas, lm, file, queries):
    """A model whose layer is shifted by hand along the predicted movement has a cosine of 1."""
    model, tokenizer = tiny_pair("llama")
    shift = torch.from_numpy(movement(atlas).direction).float()
    model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(shift)
    shifted = load_model((model, tokenizer))
    result = movement_check(atlas, lm, shifted, queries, progress=False)
    assert abs(result["cosine"] - 1) < 1e-4 and abs(result["measured"] - shift.norm()) < 1e-4
    assert 0 < result["random_95"] < 1
    with pytest.raises(DiscoveryError, match="nothing has moved"):
        movement_check(atlas, lm, lm, queries, progress=False)
    with pytest.raises(DiscoveryError, match="weights differ"):
        movement_check(atlas, load_model(tiny_pair("llama", seed=5)), lm, queries, progress=False)


def test_bad_input_is_named(atlas):
    rows = np.zeros((40, 16))
    with pytest.raises(DiscoveryError, match="all of them 0"):
        discover(with_rows(atlas, rows))
    with pytest.raises(DiscoveryError, match="3 rows"):
        movement(with_rows(atlas, rows[:3] + 1))
    with pytest.raises(DiscoveryError, match="direction 9: there are 1 to 2"):
        discover(atlas, 2, draws=3).concept(9)
    for wrong in ({"n": 21}, {"n": 0}, {"alpha": 0}, {"alpha": 1.5}, {"top": 1}, {"draws": 0}):
        with pytest.raises(DiscoveryError, match="40 rows allow 1 to 20 atoms"):
            sparse_atoms(atlas, **wrong)
    with pytest.raises(DiscoveryError, match="all of them 0"):
        sparse_atoms(with_rows(atlas, rows), 2)
    with pytest.raises(GroupError, match="n=99 clusters"):
        effect_groups(atlas, 99)


def test_words_tell_apart_what_they_should():
    texts = ["the cat and the dog", "the cat sat"] * 10 + ["the tree and the leaf", "the tree fell"] * 10
    chosen = [True] * 20 + [False] * 20
    table = distinguishing_words(texts, chosen, 2)
    assert table["word"].iloc[0] == "cat" and table["word"].iloc[-1] == "tree"
    whole = distinguishing_words(texts, chosen, 50).set_index("word")
    assert abs(whole.loc["the", "z"]) < 0.5 < whole.loc["cat", "z"]
    turned = distinguishing_words(texts, [not mark for mark in chosen], 50).set_index("word")
    np.testing.assert_allclose(turned["z"].sort_index(), -whole["z"].sort_index())
    for call in (
        lambda: distinguishing_words(texts, [True] * 40),
        lambda: distinguishing_words(texts, chosen[:5]),
        lambda: distinguishing_words(["a", "b"], [True, False]),
    ):
        with pytest.raises(ReadingError):
            call()


def planted_words(n=60, seed=0):
    """Texts of random words, "alpha" in the highest of an order and "omega" in the lowest."""
    random = np.random.default_rng(seed)
    scores = random.permutation(n)
    texts = []
    for score in scores:
        words = random.choice([f"w{i}" for i in range(30)], 8).tolist()
        texts.append(" ".join(words + ["alpha"] * int(score >= n - 20) + ["omega"] * int(score < 20)))
    return texts, scores


def test_words_of_a_rankings_ends_are_counted_as_by_hand_and_change_sides_with_the_order():
    texts, scores = planted_words()
    found = words_of_ends(texts, scores)
    assert found.n == 20 and found.highest["word"].tolist() == ["alpha"]
    assert found.lowest["word"].tolist() == ["omega"] and "alpha" in str(found) and "omega" in str(found)
    order = np.argsort(scores)
    high, low = ([set(texts[i].split()) for i in rows] for rows in (order[-20:], order[:20]))
    table = found.table.set_index("word")
    seen = {word: [sum(word in words for words in end) for end in (high, low)] for word in table.index}
    assert table[["in highest", "in lowest"]].T.to_dict("list") == seen
    # Monroe et al. 2008, equation 22 and following, word by word
    sums = np.array(list(seen.values())).sum(0)
    for word, (inside, outside) in seen.items():
        prior = inside + outside
        odds = [
            np.log((count + prior) / (total + sums.sum() - count - prior))
            for count, total in zip((inside, outside), sums)
        ]
        z = (odds[0] - odds[1]) / np.sqrt(1 / (inside + prior) + 1 / (outside + prior))
        assert table.loc[word, "z"] == pytest.approx(z, rel=1e-5)
    turned = words_of_ends(texts, -scores).table.set_index("word")
    np.testing.assert_allclose(turned["z"].sort_index(), -table["z"].sort_index(), rtol=1e-6)


def test_a_word_counts_only_beyond_shuffled_orders_whatever_the_order_of_the_file():
    texts, scores = planted_words()
    shown = 0
    for seed in range(60):
        noise = np.random.default_rng(100 + seed).normal(size=len(texts))
        found = words_of_ends(texts, noise, shuffles=39, seed=seed)
        shown += bool(len(found.highest) + len(found.lowest))
    assert shown <= 9  # 3 are expected at a chance of 5 %; more than 9 less than once in 1,000
    flat = words_of_ends(sorted(texts, key=lambda text: "alpha" in text), np.zeros(len(texts)))
    assert not len(flat.highest) and not len(flat.lowest) and "None of" in str(flat)
    strict = words_of_ends(texts, scores, shuffles=999, level=0.01)
    assert strict.chance > words_of_ends(texts, scores, shuffles=999).chance
    assert words_of_ends(count_words(texts), scores).table.equals(words_of_ends(texts, scores).table)
    for call in (
        lambda: words_of_ends(texts, scores[:5]),
        lambda: words_of_ends(texts, scores, n=31),
        lambda: words_of_ends(texts, scores, shuffles=18),
        lambda: words_of_ends(["a b a", "c"], [1, 2]),
    ):
        with pytest.raises(ReadingError):
            call()


def test_the_lens_finds_the_tokens_own_row(lm):
    row = lm.model.get_output_embeddings().weight[33]
    table = logit_lens(lm, -3 * row, 2)
    assert table["token"].iloc[-1] == lm.tokenizer.decode([33]) and table["cosine"].iloc[-1] < -0.999
    for wrong in (torch.zeros(16), torch.ones(5)):
        with pytest.raises(ReadingError):
            logit_lens(lm, wrong)


def test_nearest_features_are_by_absolute_cosine():
    class Rows:
        W_dec, W_enc = 2 * torch.eye(5), torch.eye(5)

    sae = SparseAutoencoder(Rows(), 1, "five")
    table = nearest_features(sae, [0, -3.0, 0.5, 0, 0], 2)
    assert table["feature"].tolist() == [1, 2] and table["cosine"][0] < -0.98
    assert 0.5 < table["random_95"][0] <= 1
    with pytest.raises(ReadingError, match="width 5"):
        nearest_features(sae, [1.0, 2])
