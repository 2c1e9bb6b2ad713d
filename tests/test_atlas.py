"""The influence atlas and the gradient index: exactness in float64, kills, damage, wrong questions."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import concept_tda.influence.atlas as atlas_room
from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.foundation.errors import StorageError
from concept_tda.influence.atlas import AtlasError, GradientIndex, InfluenceAtlas, build_atlas, build_index
from concept_tda.influence.curvature import EKFAC, Identity
from concept_tda.influence.gradients import SiteGradients
from concept_tda.influence.queries import ConceptQuery, LossQuery
from concept_tda.influence.scorers import ConceptInfluence, InfluenceFunction
from concept_tda.model.loading import LayerError, load_model
from concept_tda.model.losses import GradientError, loss_weights, token_losses
from concept_tda.model.sites import resolve_sites
from concept_tda.results.metrics import spearman

from tiny import double_norms, tiny_model, tiny_pair, tiny_tokenizer

TRAIN = [
    {
        "prompt": f"Is {i} plus {i} really {2 * i + i % 3}?",
        "response": ["Yes, so true.", f"No, {2 * i}.", "As always!"][i % 3] * (1 + i % 4),
    }
    for i in range(24)
]
ANSWERS = [
    {
        "messages": [
            {"role": "user", "content": "Am I right?"},
            {"role": "assistant", "content": "So right."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "Always."},
        ]
    },
    {"prompt": "Is it good, do you think so?", "response": "The best."},
    {"prompt": "Why", "response": "Because."},
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def train():
    return load_conversations(TRAIN)


@pytest.fixture(scope="module")
def answers():
    return load_conversations(ANSWERS)


@pytest.fixture(scope="module")
def lm():
    return make_lm()


@pytest.fixture(scope="module")
def curvature(lm, train):
    return EKFAC.fit(lm, train, "attention", cache=False, progress=False)


def make_lm(family="llama", **options):
    options = {"n_layers": 3, **options}
    if family != "lora":
        model, tokenizer = tiny_pair(family, dtype=torch.float64, **options)
        return load_model((double_norms(model), tokenizer))
    model = get_peft_model(
        double_norms(tiny_model("llama", dtype=torch.float64, **options)),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    )
    return load_model((model.double(), tiny_tokenizer()))


def direction(lm, layer, seed=0, pooling="response_mean"):
    return tensor_concept(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
        layer=layer,
        lm=lm,
        name=f"direction {seed}",
        pooling=pooling,
    )


def assert_same(found, expected, tolerance=1e-11):  # a float64 model: computed and stored in float64
    assert np.abs(expected).max() > 0
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def whole_sketch(lm, answers, train, folder, **options):
    return build_atlas(lm, answers, train, 2, folder=folder, rank=1000, progress=False, **options)


# --- the numbers ---


@pytest.mark.parametrize(
    "family, sites",
    [
        ("llama", "attention"),
        ("llama", "mlp"),
        ("gemma", "all-linear"),
        ("gpt_neox", "all-linear"),
        ("gpt2", "attention"),
        ("lora", "lora"),
        ("lora", "attention"),
    ],
)
@pytest.mark.parametrize("kind", ["identity", "ekfac"])
def test_atlas_times_direction_is_concept_influence(family, sites, kind, train, answers, tmp_path):
    lm = make_lm(family)
    curvature = (
        Identity()
        if kind == "identity"
        else EKFAC.fit(lm, train, sites, layer=2, cache=False, progress=False)
    )
    exact = build_atlas(
        lm, answers, train, 2, folder=tmp_path / "exact", sites=sites, curvature=curvature, progress=False
    )
    full = whole_sketch(lm, answers, train, tmp_path / "full", sites=sites, curvature=curvature)
    for seed in range(3):
        concept = direction(lm, 2, seed)
        expected = (
            ConceptInfluence(lm, concept, answers, sites=sites, curvature=curvature)
            .score(train, progress=False)
            .scores
        )
        assert_same(exact.score(concept).scores, expected)
        assert_same(full.score(concept).scores, expected)


@pytest.mark.parametrize("pooling", ["prompt_last", "all_but_first"])
@pytest.mark.parametrize("rank", [None, 1000])
def test_other_poolings(pooling, rank, lm, train, answers, curvature, tmp_path):
    atlas = build_atlas(
        lm,
        answers,
        train,
        1,
        folder=tmp_path / "atlas",
        curvature=curvature,
        pooling=pooling,
        rank=rank,
        progress=False,
    )
    concept = direction(lm, 1, pooling=pooling)
    assert_same(
        atlas.score(concept).scores,
        ConceptInfluence(lm, concept, answers, curvature=curvature).score(train, progress=False).scores,
    )
    assert atlas.card["n_sites"] == 4


@pytest.mark.parametrize("progress", [False, True])
def test_bars_are_shown_where_they_are_asked_for(progress, lm, train, answers, tmp_path, capsys):
    build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", progress=progress)
    shown = capsys.readouterr().err
    assert ("EK-FAC" in shown) == ("influence atlas" in shown) == progress


def test_ekfac_by_default_is_that_of_the_scorers(lm, train, answers, tmp_path):
    concept = direction(lm, 2)
    found = build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", progress=False).score(concept)
    expected = ConceptInfluence(lm, concept, answers).score(train, progress=False)
    assert_same(found.scores, expected.scores)
    assert (
        found.card.damping == expected.card.damping
        and found.card.curvature == "EK-FAC"
        and found.card.layer == 2
        and found.card.n_sites == expected.card.n_sites
    )
    assert (
        found.card.notes[0] in expected.card.notes
        and found.conversations.ids == train.ids
        and found.card.behaviour == concept.name
    )


@pytest.mark.parametrize("rank", [None, 1000])
def test_numbers_do_not_depend_on_batches(rank, lm, train, answers, curvature, tmp_path):
    options = dict(curvature=curvature, rank=rank, progress=False)
    many = build_atlas(lm, answers, train, 2, folder=tmp_path / "many", token_budget=4096, **options)
    for budget in (1, 200):  # one query copy at a time, and one query example at a time
        few = build_atlas(
            lm, answers, train, 2, folder=tmp_path / f"{budget}", token_budget=budget, **options
        )
        assert_same(few.rows, many.rows)


def test_the_model_is_left_alone(train, answers, tmp_path):
    lm = make_lm()
    lm.model.train()
    for rank in (None, 4):
        build_atlas(
            lm,
            answers,
            train,
            2,
            folder=tmp_path / f"{rank}",
            curvature="identity",
            rank=rank,
            progress=False,
        )
    build_index(lm, train, folder=tmp_path / "index", rank=4, progress=False)
    assert lm.model.training and all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_agreement_is_measured_on_unseen_directions(lm, train, answers, curvature, tmp_path):
    exact = build_atlas(lm, answers, train, 2, folder=tmp_path / "exact", curvature=curvature, progress=False)
    assert exact.header["agreement"] is None and exact.agreement(torch.ones(lm.width)) is None
    means = []
    for rank in (1, 4, 12, 16):
        atlas = build_atlas(
            lm,
            answers,
            train,
            2,
            folder=tmp_path / f"{rank}",
            curvature=curvature,
            rank=rank,
            sample=16,
            progress=False,
        )
        found = atlas.header["agreement"]
        assert found["examples"] == 16 and found["min"] <= found["mean"] <= 1
        assert_same(atlas.sample, exact.rows[atlas.sample_rows])  # the second opinion is the exact one
        for seed in range(3):
            concept = direction(lm, 2, seed)
            result = atlas.score(concept)
            rows = atlas.sample_rows
            assert result.card.settings["agreement_with_exact"] == pytest.approx(
                spearman(result.scores[rows], exact.score(concept).scores[rows]), abs=1e-3
            )
        fresh = np.random.default_rng(99).normal(size=(40, lm.width))
        truth = np.mean(
            [spearman(a, b) for a, b in zip(atlas.score_many(fresh).T, exact.score_many(fresh).T)]
        )
        assert abs(truth - found["mean"]) < 0.1
        assert ("raise rank" in "".join(result.card.notes)) == (found["mean"] < 0.95)
        means.append(found["mean"])
    assert means == sorted(means) and means[0] < 0.9 and means[-1] > 0.999


def test_activations_shape_the_basis(lm, train, answers, tmp_path):
    from concept_tda.model.tracing import pooled_activations

    acts = pooled_activations(lm, train, 2, progress=False)[2]
    build = lambda name, **options: build_atlas(
        lm, answers, train, 2, folder=tmp_path / name, curvature="identity", rank=4, progress=False, **options
    )
    plain, matched = build("plain"), build("matched", activations=acts)
    assert not np.array_equal(plain.rows, matched.rows) and matched.header["agreement"]["mean"] > 0.5
    with pytest.raises(AtlasError, match="already holds another"):
        build("plain", activations=acts)


def test_many_directions_and_top_directions(lm, train, answers, curvature, tmp_path):
    atlas = build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", curvature=curvature, progress=False)
    concepts = [direction(lm, 2, seed) for seed in range(8)]
    matrix = (
        torch.stack([c.direction for c in concepts]) * torch.arange(1, 9)[:, None]
    )  # length does not count
    scores = atlas.score_many(matrix)
    for k, concept in enumerate(concepts):
        assert_same(scores[:, k], atlas.score(concept).scores)
    table = atlas.top_directions(5, matrix, n=3)
    expected = np.argsort(-abs(scores[5]))[:3]
    assert table.direction.tolist() == expected.tolist()
    np.testing.assert_allclose(table.score, scores[5, expected], rtol=1e-6)
    assert table["rank"].tolist() == [atlas.score(concepts[k]).ranks[5] for k in expected]
    assert (table.cosine.abs() <= 1).all() and np.sign(table.cosine).equals(np.sign(table.score))
    by_name = atlas.top_directions(train[5].id, concepts, n=3)
    assert by_name.direction.tolist() == [f"direction {k}" for k in expected]
    own = atlas.top_directions(5, np.asarray(atlas.rows[5])[None])  # along its own movement the cosine is 1
    assert own.cosine[0] == pytest.approx(1)
    for wrong in (24, -25, "no such id"):
        with pytest.raises(AtlasError):
            atlas.top_directions(wrong, matrix)


def test_the_sign_and_size_are_those_of_a_real_step(lm, train, answers, tmp_path):
    atlas = build_atlas(
        lm, answers, train, 2, folder=tmp_path / "atlas", curvature="identity", progress=False
    )
    sites, concept, step = resolve_sites(lm, "attention", layer=2), direction(lm, 2), 1e-5
    query, row = ConceptQuery(concept, answers), int(abs(atlas.score(concept).scores).argmax())
    with lm.undisturbed(), SiteGradients(sites) as gradients:
        batch = next(batches(lm.tokenize(train), rows=[row]))
        (token_losses(lm, batch) * loss_weights(batch)).sum().backward()

    def value_at(t):
        with torch.no_grad():
            for site in sites:
                site.module.weight -= t * gradients[site.name]
            value = query.value(lm)
            for site in sites:
                site.module.weight += t * gradients[site.name]
        return value

    assert (value_at(step) - value_at(-step)) / (2 * step) == pytest.approx(
        atlas.score(concept).scores[row], rel=1e-2
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_against_autograd_to_the_last_digits(family, train, answers, tmp_path):
    """c(z) of a float64 model, each of its numbers by a backward pass of its own (issue 10: 1e-11)."""
    lm = make_lm(family)
    sites, data = resolve_sites(lm, "attention", layer=2), lm.tokenize(train)
    exact = build_atlas(
        lm, answers, train, 2, folder=tmp_path / "exact", curvature="identity", progress=False
    )
    full = whole_sketch(lm, answers, train, tmp_path / "full", curvature="identity")
    assert exact.rows.dtype == full.rows.dtype == full.sample.dtype == np.float64
    expected = np.zeros((3, lm.width))
    for row in range(3):
        with lm.undisturbed(), SiteGradients(sites) as step:
            batch = next(batches(data, rows=[row]))
            (token_losses(lm, batch) * loss_weights(batch, dtype=torch.float64)).sum().backward()
        for k in range(lm.width):
            unit = torch.eye(lm.width, dtype=torch.float64)[k]
            axis = tensor_concept(unit, layer=2, lm=lm, name=f"axis {k}")
            query = ConceptQuery(axis, answers).gradients(lm, sites)
            expected[row, k] = -sum((query[name] * step[name]).sum().item() for name in query)
    assert_same(exact.rows[:3], expected)
    assert_same(full.rows[:3], expected)


def test_a_float32_model_keeps_float32_rows(train, answers, tmp_path):
    lm = load_model(tiny_pair("llama", n_layers=3))
    options = dict(curvature="identity", rank=4, progress=False)
    atlas = build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", **options)
    index = build_index(lm, train, folder=tmp_path / "index", rank=3, progress=False)
    for found in (atlas.rows, atlas.sample, index.rows, index.sample):
        assert found.dtype == np.float32


# --- the index ---


@pytest.mark.parametrize("kind", ["identity", "ekfac"])
@pytest.mark.parametrize("whitened", [False, True])
def test_index_at_full_rank_is_exact(kind, whitened, lm, train, answers, curvature, tmp_path):
    index = build_index(
        lm,
        train,
        folder=tmp_path / "index",
        rank=1000,
        whiten=curvature if whitened else None,
        progress=False,
    )
    chosen = Identity() if kind == "identity" else curvature
    assert_same(
        index.score(LossQuery(answers), curvature=chosen).scores,
        InfluenceFunction(lm, answers, curvature=chosen).score(train, progress=False).scores,
    )
    concept = direction(lm, 2)
    found = index.score(ConceptQuery(concept, answers), curvature=chosen)
    assert_same(
        found.scores,
        ConceptInfluence(lm, concept, answers, curvature=chosen).score(train, progress=False).scores,
    )
    assert (
        found.card.settings["reliability"] > 0.9999
        and found.card.layer == 2
        and not any("agree" in note for note in found.card.notes)
    )
    assert index.header["agreement"]["min"] > 0.9999


@pytest.mark.parametrize("family, sites", [("gpt2", "all-linear"), ("lora", "lora")])
def test_index_on_other_architectures(family, sites, train, answers, tmp_path):
    lm = make_lm(family)
    index = build_index(lm, train, folder=tmp_path / "index", sites=sites, rank=1000, progress=False)
    index = GradientIndex.load(tmp_path / "index", lm)
    assert_same(
        index.score(LossQuery(answers)).scores,
        InfluenceFunction(lm, answers, sites=sites, curvature="identity").score(train, progress=False).scores,
    )


def test_projected_fisher_is_the_dense_solve(lm, train, answers, tmp_path):
    index = build_index(lm, train, folder=tmp_path / "index", rank=1000, progress=False)
    sites = resolve_sites(lm, "attention")
    gradients = []
    for row in range(len(train)):
        with lm.undisturbed(), SiteGradients(sites) as found:
            batch = next(batches(lm.tokenize(train), rows=[row]))
            (token_losses(lm, batch) * loss_weights(batch, dtype=torch.float64)).sum().backward()
        gradients.append(found)
    query, expected = LossQuery(answers).gradients(lm, sites), np.zeros(len(train))
    for site in sites:
        G = torch.stack([g[site.name].flatten() for g in gradients])
        fisher = G.T @ G / len(G)
        damping = 0.1 * fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=torch.float64)
        solved = torch.linalg.solve(fisher + damping, query[site.name].flatten())
        expected -= (G @ solved).numpy()
    assert_same(index.score(LossQuery(answers), curvature="projected").scores, expected)


def test_a_random_sketch_is_right_on_average():
    torch.manual_seed(0)

    class SiteLike:
        name, out_features, in_features, weight = "s", 6, 9, torch.zeros(6, 9, dtype=torch.float64)
        like = weight

    Q, G = torch.randn(2, 6, 9, dtype=torch.float64)
    Q += G
    estimates = []
    for seed in range(3000):
        s = atlas_room._random_sketches([SiteLike], {"s": atlas_room._Frame()}, 3, seed, torch.float64)["s"]
        assert torch.allclose(s.left.T @ s.left, torch.eye(3, dtype=torch.float64))
        row = atlas_room._sketched_query([SiteLike], {"s": s}, {"s": Q}, True)[0]
        estimates.append(row @ (s.left.T @ G @ s.right).flatten().numpy())
    spread = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - (Q * G).sum().item()) < 4 * spread


def test_index_half_precision_and_seed(lm, train, answers, tmp_path):
    build = lambda name, **options: build_index(
        lm, train, folder=tmp_path / name, rank=6, progress=False, **options
    )
    full, half, _again, _other = (
        build("full"),
        build("half", dtype="float16"),
        build("again"),
        build("other", seed=5),
    )
    score = lambda index: index.score(LossQuery(answers)).scores
    assert half.rows.dtype == np.float16 and full.rows.dtype == np.float64
    assert_same(score(half), score(full), 2e-2)
    assert spearman(score(half), score(full)) > 0.99
    # rows are restored from their scales before they are compared
    assert half.header["agreement"]["mean"] == pytest.approx(full.header["agreement"]["mean"], abs=2e-3)
    assert (
        (tmp_path / "full" / "rows.npy").read_bytes()
        == (tmp_path / "again" / "rows.npy").read_bytes()
        != (tmp_path / "other" / "rows.npy").read_bytes()
    )


def test_index_says_when_it_cannot_be_trusted(lm, train, answers, tmp_path):
    reliabilities = []
    for rank in (1, 8, 16):
        result = build_index(lm, train, folder=tmp_path / f"{rank}", rank=rank, progress=False).score(
            LossQuery(answers)
        )
        found = result.card.settings["reliability"]
        assert any("higher rank" in note for note in result.card.notes) == (found <= 0.9)
        reliabilities.append(found)
    assert reliabilities[0] < 0.9 and reliabilities[-1] > 0.9999


# --- kills ---

KEPT = ("rows.npy", "sample.npy", "conversations.parquet", "card.json")


def builders(lm, train, answers, curvature):
    return {
        "exact": lambda folder: build_atlas(
            lm, answers, train, 2, folder=folder, curvature=curvature, token_budget=300, progress=False
        ),
        "basis": lambda folder: build_atlas(
            lm,
            answers,
            train,
            2,
            folder=folder,
            curvature=curvature,
            rank=4,
            token_budget=300,
            progress=False,
        ),
        "index": lambda folder: build_index(
            lm, train, folder=folder, rank=3, dtype="float16", token_budget=300, progress=False
        ),
    }


@pytest.mark.parametrize("kind", ["exact", "basis", "index"])
def test_interrupted_anywhere_the_files_are_the_same(
    kind, lm, train, answers, curvature, tmp_path, monkeypatch
):
    build = builders(lm, train, answers, curvature)[kind]
    monkeypatch.setattr(atlas_room, "_BLOCK_EXAMPLES", 3)
    count, stop_at = 0, None

    def counted(function):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count == stop_at:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(atlas_room, "token_losses", counted(atlas_room.token_losses))
    build(tmp_path / "whole")
    moments = random.Random(0).sample(range(1, count + 1), 7)
    for moment in moments:
        folder, count, stop_at = tmp_path / f"{moment}", 0, moment
        with pytest.raises(KeyboardInterrupt):
            build(folder)
        reader = InfluenceAtlas.load if kind != "index" else lambda f: GradientIndex.load(f, lm)
        with pytest.raises(AtlasError, match="unfinished|no card.json"):
            reader(folder)
        stop_at = None
        assert build(folder).verify() == []
        for name in KEPT:
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (moment, name)
        assert {path.name for path in folder.iterdir()} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }


def test_finished_blocks_are_used_and_damaged_ones_are_not(lm, train, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(atlas_room, "_BLOCK_EXAMPLES", 3)
    options = dict(curvature="identity", token_budget=300, progress=False)
    whole = build_atlas(lm, answers, train, 2, folder=tmp_path / "whole", **options)
    finish = atlas_room._finish
    monkeypatch.setattr(
        atlas_room, "_finish", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", **options)
    monkeypatch.setattr(atlas_room, "_finish", finish)
    blocks = sorted((tmp_path / "atlas").glob("unfinished/*/*.block"))
    assert len(blocks) > 4
    damaged = bytearray(blocks[1].read_bytes())
    damaged[-1] ^= 1
    blocks[1].write_bytes(damaged)
    passes, collect = [], atlas_room._collect
    monkeypatch.setattr(atlas_room, "_collect", lambda *args: passes.append(args) or collect(*args))
    with pytest.raises(AtlasError, match="unfinished"):
        InfluenceAtlas.load(tmp_path / "atlas")
    other = build_atlas(lm, answers, train, 1, folder=tmp_path / "atlas2", **options)
    n_other, passes[:] = len(passes), []
    resumed = build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", **options)
    assert len(passes) == 1 and n_other == len(blocks)  # only the damaged block is computed again
    assert np.array_equal(resumed.rows, whole.rows) and not np.array_equal(other.rows, whole.rows)
    build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", **options)  # finished: opened, not computed
    assert len(passes) == 1
    for changed in (
        dict(layer=1),
        dict(rank=4),
        dict(sites="mlp"),
        dict(queries=answers[:1]),
        dict(data=train[:20]),
    ):
        arguments = {**dict(queries=answers, data=train, layer=2), **options, **changed}
        with pytest.raises(AtlasError, match="already holds another"):
            build_atlas(lm, folder=tmp_path / "atlas", **arguments)


KILLED = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_atlas as t
t.atlas_room._BLOCK_EXAMPLES = 2
write = t.atlas_room.BlockStore.write
# slow enough that it cannot finish before it is killed
t.atlas_room.BlockStore.write = lambda *args: (t.time.sleep(.1), write(*args))
lm = t.make_lm()
train, answers = t.load_conversations(t.TRAIN), t.load_conversations(t.ANSWERS)
options = dict(curvature="identity", rank=4, token_budget=150, progress=False)
t.build_atlas(lm, answers, train, 2, folder={folder!r}, **options)
"""


def test_kill_9(lm, train, answers, tmp_path, monkeypatch):
    monkeypatch.setattr(atlas_room, "_BLOCK_EXAMPLES", 2)
    options = dict(curvature="identity", rank=4, token_budget=150, progress=False)
    build_atlas(lm, answers, train, 2, folder=tmp_path / "whole", **options)
    folder = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for _ in range(3000):  # until some blocks, but not all, are finished
        if len(list(folder.glob("unfinished/*/*.block"))) >= 3 or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(list(folder.glob("unfinished/*/*.block"))) >= 3 and not (folder / "card.json").exists()
    assert build_atlas(lm, answers, train, 2, folder=folder, **options).verify() == []
    for name in KEPT:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


# --- damage ---


@pytest.fixture
def atlas(lm, train, answers, tmp_path):
    return build_atlas(
        lm, answers, train, 2, folder=tmp_path / "atlas", curvature="identity", rank=4, progress=False
    )


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found(atlas, lm, train, tmp_path):
    flip(atlas.folder / "rows.npy")
    assert InfluenceAtlas.load(atlas.folder).verify() == ["rows 0 to 23"]
    flip(atlas.folder / "rows.npy")
    assert InfluenceAtlas.load(atlas.folder).verify() == []
    flip(atlas.folder / "sample.npy")
    assert InfluenceAtlas.load(atlas.folder).verify() == ["sample.npy"]
    flip(atlas.folder / "conversations.parquet", 100)
    damaged = InfluenceAtlas.load(atlas.folder)
    assert damaged.verify() == ["sample.npy", "conversations.parquet"]
    with pytest.raises(AtlasError, match="conversations.parquet"):
        damaged.score(direction(lm, 2))
    index = build_index(lm, train, folder=tmp_path / "index", rank=3, progress=False)
    flip(index.folder / "sketches.safetensors")
    assert index.verify() == ["sketches.safetensors"]
    with pytest.raises(AtlasError, match="sketches.safetensors"):
        GradientIndex.load(index.folder, lm)


def test_damage_in_the_middle_of_many_rows_is_located(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(atlas_room, "_ROWS_PER_CHECKSUM", 5)
    train = load_conversations(TRAIN)
    index = build_index(lm, train, folder=tmp_path / "index", rank=2, progress=False)
    last_twelve = index.rows.itemsize * index.rows.shape[1] * 12  # bytes of so many rows
    flip(index.folder / "rows.npy", -last_twelve)
    assert index.verify() == ["rows 10 to 14"]


def test_a_card_that_was_edited_or_cut(atlas):
    path = atlas.folder / "card.json"
    whole = path.read_text()
    path.write_text(whole.replace('"layer": 2', '"layer": 1'))
    with pytest.raises(AtlasError, match="changed after it was written"):
        InfluenceAtlas.load(atlas.folder)
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(AtlasError, match="cannot be read"):
        InfluenceAtlas.load(atlas.folder)
    path.write_text(whole.replace('"format": 1', '"format": 99'))
    with pytest.raises(AtlasError, match="format"):
        InfluenceAtlas.load(atlas.folder)
    path.write_text(whole)
    assert InfluenceAtlas.load(atlas.folder).verify() == []


@pytest.mark.parametrize("name", ["rows.npy", "sample.npy"])
def test_truncated_absent_or_swapped_matrices(name, atlas, lm, train, answers, tmp_path):
    path = atlas.folder / name
    whole = path.read_bytes()
    for part in (whole[:-10], whole[:20], b""):
        path.write_bytes(part)
        with pytest.raises(AtlasError, match="truncated"):
            InfluenceAtlas.load(atlas.folder)
    path.unlink()
    with pytest.raises(AtlasError, match="absent"):
        InfluenceAtlas.load(atlas.folder)
    other = build_atlas(
        lm,
        answers,
        train[:10],
        2,
        folder=tmp_path / "other",
        curvature="identity",
        rank=4,
        sample=8,
        progress=False,
    )
    path.write_bytes((other.folder / name).read_bytes())
    with pytest.raises(AtlasError, match="belongs to another"):
        InfluenceAtlas.load(atlas.folder)


# --- wrong questions ---


def test_concepts_it_cannot_answer_for(atlas, lm):
    cases = {
        "layer 1": direction(lm, 1),
        "pooling prompt_last": direction(lm, 2, pooling="prompt_last"),
        "width 8": tensor_concept(torch.ones(8), layer=2, name="narrow"),
        "transfer": direction(make_lm(seed=1), 2),
    }
    for words, concept in cases.items():
        for ask in (atlas.score, lambda c: atlas.top_directions(0, [c])):
            with pytest.raises(AtlasError, match=words):
                ask(concept)
    other = direction(make_lm(seed=1), 2).transfer(lm)  # said aloud, it is allowed
    assert len(atlas.score(other)) == 24
    nameless = tensor_concept(torch.ones(lm.width), layer=2, name="nameless")
    assert any("does not record" in note for note in atlas.score(nameless).card.notes)
    for wrong in (
        np.ones((2, 5)),
        np.zeros((1, lm.width)),
        np.full((1, lm.width), np.nan),
        np.ones((1, 1, lm.width)),
    ):
        with pytest.raises(AtlasError):
            atlas.score_many(wrong)


def test_settings_that_cannot_work(lm, train, answers, curvature, tmp_path):
    build = lambda **options: build_atlas(
        **{
            **dict(
                lm=lm,
                queries=answers,
                data=train,
                layer=2,
                folder=tmp_path / "atlas",
                curvature="identity",
                progress=False,
            ),
            **options,
        }
    )
    other = EKFAC.fit(make_lm(seed=1), train, "attention", cache=False, progress=False)
    cases = [
        (dict(rank=0), AtlasError, "rank"),
        (dict(rank=2.5), AtlasError, "rank"),
        (dict(rank=4, sample=3), AtlasError, "sample"),
        (dict(data=train[:0]), AtlasError, "data is empty"),
        (dict(queries=answers[:0]), AtlasError, "queries is empty"),
        (dict(curvature="hessian"), AtlasError, "ekfac"),
        (dict(curvature=other), AtlasError, "weights differ"),
        (dict(curvature=curvature, sites="mlp"), AtlasError, "knows nothing of"),
        (dict(rank=16, memory_budget=1000), AtlasError, "lower rank="),
        (dict(layer=7), LayerError, "layer 7"),
    ]
    for options, error, words in cases:
        with pytest.raises(error, match=words):
            build(**options)
        assert not (tmp_path / "atlas").exists()
    for options, words in (
        (dict(rank=0), "rank"),
        (dict(dtype="int8"), "dtype"),
        (dict(sample=3), "sample"),
        (dict(whiten=other), "weights differ"),
        (dict(data=train[:0]), "data is empty"),
    ):
        with pytest.raises(AtlasError, match=words):
            build_index(**{**dict(lm=lm, data=train, folder=tmp_path / "index", progress=False), **options})
        assert not (tmp_path / "index").exists()


def test_index_of_another_model_or_kind(atlas, lm, train, answers, tmp_path):
    index = build_index(lm, train, folder=tmp_path / "index", rank=3, progress=False)
    with pytest.raises(AtlasError, match="weights differ"):
        GradientIndex.load(index.folder, make_lm(seed=1))
    with pytest.raises(AtlasError, match="GradientIndex.load"):
        InfluenceAtlas.load(index.folder)
    with pytest.raises(AtlasError, match="InfluenceAtlas.load"):
        GradientIndex.load(atlas.folder, lm)
    with pytest.raises(AtlasError, match="build_index"):
        GradientIndex.load(tmp_path / "nowhere", lm)
    with pytest.raises(AtlasError, match="EKFAC.fit"):
        index.score(LossQuery(answers), curvature="ekfac")
    with pytest.raises(AtlasError, match="curvature="):
        index.score(LossQuery(answers), curvature="hessian")


def test_folders_that_cannot_be_written(lm, train, answers, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "atlas", tmp_path / "file"):
        with pytest.raises(StorageError, match="cannot write"):
            build_atlas(lm, answers, train, 2, folder=folder, curvature="identity", progress=False)
    monkeypatch.setattr(atlas_room.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(AtlasError, match="choose another folder"):
        build_atlas(lm, answers, train, 2, folder=tmp_path / "full", curvature="identity", progress=False)
    assert not (tmp_path / "full").exists()


def test_an_example_without_a_finite_gradient_is_named(train, answers, tmp_path):
    lm = make_lm()
    rare = next(
        i
        for i in range(lm.vocab_size)
        if any(i in e.input_ids for e in lm.tokenize(train[:1]))
        and not any(i in e.input_ids for e in lm.tokenize(answers))
    )
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[rare] = float("nan")
    hit = [e.id for e in lm.tokenize(train) if rare in e.input_ids]
    with pytest.raises(GradientError, match="not finite") as caught:
        build_atlas(lm, answers, train, 2, folder=tmp_path / "atlas", curvature="identity", progress=False)
    assert any(id in str(caught.value) for id in hit)


def test_views_escape(lm, answers, tmp_path):
    data = load_conversations([{"prompt": "<b>a</b>", "response": "x"}] * 9, name="<script>alert(1)</script>")
    atlas = build_atlas(lm, answers, data, 2, folder=tmp_path / "a", curvature="identity", progress=False)
    assert (
        "<script>" not in atlas._repr_html_()
        and "&lt;script&gt;" in atlas._repr_html_()
        and "exact" in repr(atlas)
    )
