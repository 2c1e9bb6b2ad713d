"""Concepts: directions against independent arithmetic, quality without leaks, files, and every refusal."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import concept_tda.concepts.concept as concepts
from concept_tda.concepts.concept import (
    Concept,
    ConceptError,
    contrastive_concept,
    probe_concept,
    random_concepts,
    random_directions,
    separation,
    sweep_layers,
    tensor_concept,
)
from concept_tda.data.conversations import load_conversations
from concept_tda.model.loading import LanguageModel, LayerError
from concept_tda.model.tracing import TracingError

from tiny import tiny_pair

TOPICS = [
    "tea",
    "bees",
    "rain in May",
    "glass",
    "the moon",
    "an old bridge",
    "salt",
    "chess",
    "a red kite",
    "owls",
    "ice",
    "maps",
]


def answers(pattern, n=12):
    return load_conversations(
        [{"prompt": f"Tell me of {t}.", "response": pattern.format(t)} for t in TOPICS[:n]]
    )


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(*tiny_pair("llama", n_layers=3), "tiny")


@pytest.fixture(scope="module")
def twin():
    return LanguageModel(*tiny_pair("llama", n_layers=3, seed=1), "twin")


@pytest.fixture(scope="module")
def positive():
    return answers("Yes yes, {} is the very best!")


@pytest.fixture(scope="module")
def negative():
    return answers("One may doubt that {} matters.")


def side(acts, first=0):
    """A side whose examples answer the questions first, first + 1, …"""
    return concepts._Side(acts, np.array([f"q{first + i}" for i in range(len(acts))]))


def response_means(lm, data, layer):
    """[N, 16] by transformers alone, one example at a time; layers below the last, where hidden_states is
    unambiguous."""
    rows = []
    for one in lm.tokenize(data):
        with torch.no_grad():
            states = lm.model(one.input_ids[None], output_hidden_states=True).hidden_states[layer][0]
        rows.append(states[one.response_mask].double().mean(0))
    return torch.stack(rows)


# ---- what is computed


def test_contrastive_direction_is_the_difference_of_means(lm, positive, negative):
    for layer in (0, 1, 2):
        difference = response_means(lm, positive, layer).mean(0) - response_means(lm, negative, layer).mean(0)
        concept = contrastive_concept(lm, positive, negative, layer, name="praise")
        sides = [
            response_means(lm, data, layer) @ concept.direction.double() for data in (positive, negative)
        ]
        assert concept.gap == pytest.approx(float(sides[0].mean() - sides[1].mean()), rel=1e-5)
        assert torch.allclose(concept.direction.double(), difference / difference.norm(), atol=1e-5)
        assert concept.norm == pytest.approx(float(difference.norm()), rel=1e-5)
        assert (
            concept.direction.dtype == torch.float32
            and concept.layer == layer
            and concept.model_fingerprint == lm.fingerprint
        )


def test_unequal_sides_work_and_are_recorded(lm, positive, negative):
    concept = contrastive_concept(lm, positive, negative[:7], 1, name="praise")
    difference = response_means(lm, positive, 1).mean(0) - response_means(lm, negative[:7], 1).mean(0)
    assert concept.cosine(difference) > 0.99999 and concept.provenance["questions_on_both_sides"] == 7
    assert (concept.provenance["positive_n"], concept.provenance["negative_n"]) == (12, 7)


@pytest.mark.parametrize("C", [1e-3, 1.0])
def test_probe_reproduces_sklearn(lm, positive, negative, C):
    acts = torch.cat([response_means(lm, side, 2) for side in (positive, negative)])
    labels = [1] * 12 + [0] * 12
    decision = (
        make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000))
        .fit(acts.numpy(), labels)
        .decision_function(acts.numpy())
    )
    probe = probe_concept(lm, positive, negative, 2, name="praise", C=C)
    ours = (acts @ probe.direction.double()).numpy()
    assert np.array_equal(np.argsort(ours), np.argsort(decision))
    assert np.allclose(ours * probe.norm + probe.provenance["intercept"], decision, atol=2e-3)


@pytest.mark.parametrize("shift", [0.0, 0.1, 3.0])
def test_probe_chooses_its_penalty_by_held_out_loss(shift):
    positive, negative = torch.randn(
        2, 60, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    positive, negative = positive + shift, negative - shift
    sides = side(positive), side(negative)
    held = [
        np.isin(np.tile(sides[0].questions, 2), parts[2].questions) for parts in concepts._folds(*sides, 3, 0)
    ]
    folds = [(np.flatnonzero(~rows), np.flatnonzero(rows)) for rows in held]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000)),
        {"logisticregression__C": list(concepts._PENALTIES)},
        scoring="neg_log_loss",
        cv=folds,
    ).fit(torch.cat([positive, negative]).numpy(), [1] * 60 + [0] * 60)
    assert concepts._choose_penalty(*sides, seed=0) == search.best_params_["logisticregression__C"]


def test_separation_agrees_with_sklearn_and_by_hand():
    generator = np.random.default_rng(0)
    positive, negative = (
        generator.integers(0, 6, 40) + 1.0,
        generator.integers(0, 6, 25).astype(float),
    )  # many ties
    result = separation(positive, negative)
    assert result["auc"] == pytest.approx(
        roc_auc_score([1] * 40 + [0] * 25, np.concatenate([positive, negative]))
    )
    assert result["d_prime"] == pytest.approx(
        (positive.mean() - negative.mean()) / np.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    )
    assert separation(-positive, -negative)["auc"] == pytest.approx(1 - result["auc"])
    assert (
        separation([1, 1], [0, 0])["d_prime"] == np.inf and separation([0, 0], [1, 1])["d_prime"] == -np.inf
    )


# ---- quality is honest


def test_quality_of_noise_is_chance():
    """60 dimensions, 40 examples a side: in the fit, noise is separated well; held out it must not be."""
    generator, aucs, nulls = torch.Generator().manual_seed(0), [], []
    for seed in range(20):
        noise = torch.randn(2, 40, 60, generator=generator, dtype=torch.float64)
        quality = concepts._quality(side(noise[0]), side(noise[1]), concepts._mean_difference, 0.25, seed)
        direction = noise[0].mean(0) - noise[1].mean(0)
        assert separation(noise[0] @ direction, noise[1] @ direction)["auc"] > 0.85
        aucs.append(quality["auc"])
        nulls.append(quality["random_auc_95"])
    assert abs(np.mean(aucs) - 0.5) < 0.08 and np.mean(nulls) > 0.6


def test_quality_numbers_come_from_the_held_out_rows():
    generator = torch.Generator().manual_seed(3)
    positive, negative = torch.randn(2, 16, 5, generator=generator, dtype=torch.float64) + torch.tensor(
        [[[0.6]], [[0.0]]]
    )
    fit_p, fit_n, held_p, held_n = concepts._one_split(side(positive), side(negative), 0.25, seed=4)
    held = np.isin(side(positive).questions, held_p.questions)
    direction = positive[~held].mean(0) - negative[~held].mean(0)
    quality = concepts._quality(side(positive), side(negative), concepts._mean_difference, 0.25, 4)
    assert quality["auc"] == pytest.approx(
        roc_auc_score([1] * 4 + [0] * 4, torch.cat([positive[held] @ direction, negative[held] @ direction]))
    )
    assert quality["held_out_positive"] == quality["held_out_negative"] == held.sum() == 4


def sides_for(case):
    """Rows are numbered in acts, so that a split can be read back; questions may repeat, differ, or stand in
    any order."""
    n = {
        "pairs": (12, 12),
        "shuffled pairs": (12, 12),
        "strangers": (9, 14),
        "some shared": (12, 9),
        "repeated": (30, 24),
        "smallest": (4, 4),
    }[case]
    questions = [np.array([f"q{i}" for i in range(count)]) for count in n]
    if case == "shuffled pairs":
        questions[1] = np.random.default_rng(0).permutation(questions[1])
    if case == "strangers":
        questions[1] = np.array([f"other{i}" for i in range(14)])
    if case == "some shared":
        questions[1] = np.array([f"q{i + 7}" for i in range(9)])
    if case == "repeated":
        questions = [np.array([f"q{i % 6}" for i in range(30)]), np.array([f"q{i % 8}" for i in range(24)])]
    return [
        concepts._Side(torch.arange(float(count))[:, None].double(), names)
        for count, names in zip(n, questions)
    ]


@pytest.mark.parametrize(
    "case", ["pairs", "shuffled pairs", "strangers", "some shared", "repeated", "smallest"]
)
@pytest.mark.parametrize("seed", range(3))
def test_a_question_is_never_on_both_sides_of_a_split(case, seed):
    positive, negative = sides_for(case)
    n_folds = min(5, concepts._n_questions(positive, negative) // 2)
    folds = list(concepts._folds(positive, negative, n_folds, seed))
    for held_out in (0.01, 0.25, 0.5, 0.9):
        folds.append(concepts._one_split(positive, negative, held_out, seed))
    for fit_p, fit_n, held_p, held_n in folds:
        assert not {*fit_p.questions, *fit_n.questions} & {*held_p.questions, *held_n.questions}
        for whole, fitted, held in ((positive, fit_p, held_p), (negative, fit_n, held_n)):
            rows = [int(row) for part in (fitted, held) for row in part.acts_ND[:, 0]]
            assert sorted(rows) == list(range(len(whole.questions)))
            for part in (fitted, held):
                assert len(set(part.questions)) >= 2 and [
                    whole.questions[int(row)] for row in part.acts_ND[:, 0]
                ] == list(part.questions)
    for number, whole in ((2, positive), (3, negative)):
        assert sorted(int(row) for fold in folds[:n_folds] for row in fold[number].acts_ND[:, 0]) == list(
            range(len(whole.questions))
        )


def test_the_held_out_share_is_what_was_asked():
    positive, negative = side(torch.zeros(40, 2)), side(torch.zeros(40, 2))
    for share, n in ((0.25, 10), (0.5, 20), (0.1, 4)):
        assert len(concepts._one_split(positive, negative, share, 0)[2].questions) == n
    questions = [set(concepts._one_split(positive, negative, 0.25, seed)[2].questions) for seed in (0, 0, 1)]
    assert questions[0] == questions[1] != questions[2]


def test_questions_are_recognised_in_any_order_and_under_any_system_prompt(lm):
    first = load_conversations(
        [
            {
                "messages": [
                    {"role": "system", "content": "Flatter."},
                    {"role": "user", "content": t},
                    {"role": "assistant", "content": f"Yes, {t}!"},
                ]
            }
            for t in TOPICS
        ]
    )
    second = load_conversations([{"prompt": t, "response": f"Perhaps {t}."} for t in reversed(TOPICS)])
    contrast = concepts._collect(lm, first, second, [1], "response_mean", "x", False)
    assert contrast.provenance["questions_on_both_sides"] == 12
    assert (
        contrast.positive[1].questions.tolist() == TOPICS
        and contrast.negative[1].questions.tolist() == TOPICS[::-1]
    )
    fit_p, fit_n, held_p, held_n = concepts._one_split(contrast.positive[1], contrast.negative[1], 0.25, 0)
    assert set(held_p.questions) == set(held_n.questions) and len(held_p.questions) == 3


def test_shared_questions_do_not_leak_into_the_measurement():
    """Answers to one question are near twins, and the label is a coin tossed per question side by side with
    nothing to learn: held out by rows, a probe would recognise the twin; held out by question, it is at
    chance."""
    generator, aucs = torch.Generator().manual_seed(0), []
    for seed in range(12):
        twins = torch.randn(10, 40, generator=generator, dtype=torch.float64).repeat_interleave(4, 0)
        noisy = twins + 0.05 * torch.randn(40, 40, generator=generator, dtype=torch.float64)
        names, coin = (
            np.repeat([f"q{i}" for i in range(10)], 4),
            np.repeat(np.random.default_rng(seed).permutation([1] * 5 + [0] * 5), 4).astype(bool),
        )
        sides = [concepts._Side(noisy[torch.from_numpy(rows)], names[rows]) for rows in (coin, ~coin)]
        aucs.append(
            concepts._quality(*sides, lambda p, n: concepts._probe_direction(p, n, 1.0), 0.4, seed)["auc"]
        )
    assert abs(np.mean(aucs) - 0.5) < 0.2


def test_few_examples_give_a_concept_and_say_that_nothing_was_measured(lm, positive, negative):
    concept = contrastive_concept(lm, positive[:2], negative[:2], 1, name="praise")
    assert "auc" not in concept.quality and "needs 4" in concept.quality["note"]
    assert "auc" not in contrastive_concept(lm, positive, negative, 1, name="praise", held_out=0).quality
    assert (
        contrastive_concept(lm, positive[:4], negative[:4], 1, name="praise").quality["held_out_positive"]
        == 2
    )


def test_the_same_call_gives_the_same_concept(lm, positive, negative):
    first, second = (probe_concept(lm, positive, negative, 2, name="praise") for _ in range(2))
    assert (
        torch.equal(first.direction, second.direction)
        and first.quality == second.quality
        and first.provenance == second.provenance
    )


# ---- the null


def test_random_directions_have_the_covariance_of_the_data():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    acts = (
        torch.randn(300, 6, generator=generator) @ mixing + 100.0
    )  # far from the origin: centring must matter
    covariance = torch.cov(acts.T)
    directions = random_directions(acts, 20000)
    # normalising changes the scale of each draw, so compare with draws from N(0, Cov) normalised in the same
    # way
    reference = torch.randn(20000, 6, generator=generator) @ torch.linalg.cholesky(covariance).T
    reference = reference / reference.norm(dim=1, keepdim=True)
    assert torch.allclose(directions.norm(dim=1), torch.ones(20000), atol=1e-5)
    assert torch.allclose(directions.T @ directions / 20000, reference.T @ reference / 20000, atol=0.015)
    assert directions.mean(0).norm() < 0.03


def test_random_concepts_follow_the_concept_they_stand_against(lm, positive, negative):
    like = contrastive_concept(lm, positive, negative, 2, name="praise", pooling="all_but_first")
    nulls = random_concepts(lm, positive, like, n=3, seed=5)
    assert [(c.layer, c.pooling, c.norm, c.model_fingerprint) for c in nulls] == [
        (2, "all_but_first", like.norm, lm.fingerprint)
    ] * 3
    assert all(
        torch.equal(a.direction, b.direction)
        for a, b in zip(nulls, random_concepts(lm, positive, like, n=3, seed=5))
    )
    assert not torch.equal(nulls[0].direction, random_concepts(lm, positive, like, n=1, seed=6)[0].direction)
    assert len({c.fingerprint for c in nulls}) == 3 and nulls[0].check(lm) == []


@pytest.mark.parametrize(
    "acts", [torch.ones(5, 3), torch.ones(1, 3), torch.ones(5), torch.full((5, 3), float("nan"))]
)
def test_random_directions_refuse_data_without_a_covariance(acts):
    with pytest.raises(ConceptError, match="random_directions"):
        random_directions(acts, 2)


# ---- layers


def test_sweep_traces_once_a_side_and_agrees_with_single_concepts(lm, positive, negative, monkeypatch):
    calls, real = [], concepts.pooled_activations

    def counting(lm, data, layers, *args, **options):
        calls.append(list(layers))
        return real(lm, data, layers, *args, **options)

    monkeypatch.setattr(concepts, "pooled_activations", counting)
    sweep = sweep_layers(lm, positive, negative, name="praise")
    assert calls == [[0, 1, 2, 3]] * 2 and sweep.table["layer"].tolist() == [0, 1, 2, 3]
    for layer, concept in sweep.concepts.items():
        single = contrastive_concept(lm, positive, negative, layer, name="praise")
        assert (
            concept.cosine(single) > 0.999999
            and concept.layer == layer
            and concept.norm == pytest.approx(single.norm, rel=1e-5)
        )
    assert sweep.table["cosine_to_previous"].iloc[2] == pytest.approx(
        sweep.concepts[2].cosine(sweep.concepts[1])
    )


def test_best_layer_is_the_one_that_carries_the_signal(lm, positive, negative, monkeypatch):
    """Activations made up so that only layer 2 holds the difference, and layers 1 and 3 hold noise."""

    def made_up(lm, data, layers, *args, **options):
        generator = torch.Generator().manual_seed(len(data) + ("best" in data.conversations[0].response))
        shift = 2.0 if "best" in data.conversations[0].response else -2.0
        return {
            layer: torch.randn(len(data), 16, generator=generator) + shift * (layer == 2) for layer in layers
        }

    monkeypatch.setattr(concepts, "pooled_activations", made_up)
    sweep = sweep_layers(lm, positive, negative, name="praise")
    assert sweep.best_layer == 2 and sweep.tied_layers == [2] and sweep.best is sweep.concepts[2]
    assert sweep.table.set_index("layer")["auc"][2] == 1 > sweep.table.set_index("layer")["auc"][[1, 3]].max()
    assert sweep.best.cosine(torch.ones(16)) > 0.9


def test_ties_go_to_the_largest_d_prime_and_never_to_the_embeddings(lm, positive, negative, monkeypatch):
    def made_up(lm, data, layers, *args, **options):
        shift = (
            {0: 9.0, 1: 3.0, 2: 5.0, 3: 4.0}
            if "best" in data.conversations[0].response
            else dict.fromkeys(range(4), 0.0)
        )
        noise = torch.randn(len(data), 16, generator=torch.Generator().manual_seed(7))
        return {layer: noise + shift[layer] for layer in layers}

    monkeypatch.setattr(concepts, "pooled_activations", made_up)
    sweep = sweep_layers(lm, positive, negative, name="praise")
    assert sweep.tied_layers == [1, 2, 3] and sweep.best_layer == 2
    assert sweep_layers(lm, positive, negative, [0], name="praise").best_layer == 0


def test_sweep_with_probes_and_its_plot(lm, positive, negative):
    sweep = sweep_layers(lm, positive, negative, [1, 3], name="<praise>", method="probe", folds=3)
    assert sweep.concepts[3].cosine(probe_concept(lm, positive, negative, 3, name="praise")) > 0.999999
    upper, lower = sweep.plot().axes
    assert (
        upper.lines[0].get_ydata().tolist() == sweep.table["auc"].tolist()
        and lower.lines[0].get_ydata().tolist() == sweep.table["d_prime"].tolist()
    )
    assert "&lt;praise&gt;" in sweep._repr_html_() and "<praise>" not in sweep._repr_html_()


# ---- files


def test_save_and_load_keep_everything(lm, positive, negative, tmp_path):
    concept = probe_concept(lm, positive, negative, 2, name="praise ☂ <b>")
    back = Concept.load(concept.save(tmp_path / "deep" / "praise.safetensors"))
    assert torch.equal(back.direction, concept.direction) and back.fingerprint == concept.fingerprint
    for field in (
        "name",
        "layer",
        "norm",
        "pooling",
        "provenance",
        "quality",
        "model",
        "model_fingerprint",
        "model_width",
    ):
        assert getattr(back, field) == getattr(concept, field), field
    assert back.check(lm) == [] and [path.name for path in (tmp_path / "deep").iterdir()] == [
        "praise.safetensors"
    ]


def written(tmp_path, **changes):
    """A saved concept whose header is then altered."""
    from safetensors import safe_open

    path = Concept("x", torch.tensor([3.0, 4.0]), 1).save(tmp_path / "x.safetensors", overwrite=True)
    with safe_open(path, "pt") as file:
        metadata, direction = file.metadata(), file.get_tensor("direction")
    save_file(
        {"direction": changes.pop("direction", direction)},
        path,
        {k: v for k, v in (metadata | changes).items() if v is not None},
    )
    return path


def test_files_that_are_not_concepts_are_refused(tmp_path):
    with pytest.raises(ConceptError, match="no concept file"):
        Concept.load(tmp_path / "absent.safetensors")
    with pytest.raises(ConceptError, match="no concept file"):
        Concept.load(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ConceptError, match="text.safetensors is damaged or not a safetensors file"):
        Concept.load(tmp_path / "text.safetensors")
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ConceptError, match="damaged"):
        Concept.load(path)
    with pytest.raises(ConceptError, match="not written by Concept.save.*tensor_concept"):
        Concept.load(written(tmp_path, format=None))
    with pytest.raises(ConceptError, match="version '99'.*reads version '1'"):
        Concept.load(written(tmp_path, format_version="99"))
    with pytest.raises(ConceptError, match="checksum"):
        Concept.load(written(tmp_path, direction=torch.tensor([0.8, 0.6])))
    assert Concept.load(written(tmp_path)).norm == 5


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = Concept("x", torch.tensor([3.0, 4.0]), 1).save(tmp_path / "x.safetensors", overwrite=True)
    before = path.read_bytes()
    with pytest.raises(ConceptError, match="plain data"):
        Concept("x", torch.ones(2), 1, provenance={"model": object()}).save(path, overwrite=True)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_numpy_numbers_in_the_record_survive(tmp_path):
    concept = Concept("x", torch.ones(2), np.int64(1), quality={"auc": np.float64(0.75), "n": np.int64(3)})
    assert Concept.load(concept.save(tmp_path / "x")).quality == {"auc": 0.75, "n": 3}


# ---- tensors from elsewhere


def test_tensor_concept_reads_every_kind_of_file(lm, tmp_path):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    torch.save(vector, tmp_path / "v.pt")
    np.save(tmp_path / "v.npy", vector.numpy())
    save_file({"v": vector}, tmp_path / "v.safetensors")
    torch.save({"a": vector, "b": -vector}, tmp_path / "two.pt")
    for source in (
        vector,
        vector.numpy(),
        vector.tolist(),
        vector.bfloat16(),
        tmp_path / "v.pt",
        str(tmp_path / "v.npy"),
        tmp_path / "v.safetensors",
    ):
        concept = tensor_concept(source, 2, name="v", lm=lm)
        assert (
            concept.cosine(vector) > 0.9999
            and concept.check(lm) == []
            and concept.norm == pytest.approx(float(vector.norm()), rel=1e-2)
        )
    assert tensor_concept(tmp_path / "two.pt", 2, name="v", key="b").cosine(vector) < -0.9999
    assert tensor_concept(torch.stack([vector, -vector]), 2, name="v", row=1).cosine(vector) < -0.9999
    with pytest.raises(ConceptError, match="a, b.*key="):
        tensor_concept(tmp_path / "two.pt", 2, name="v")
    with pytest.raises(ConceptError, match="no 'c'"):
        tensor_concept(tmp_path / "two.pt", 2, name="v", key="c")


def test_a_pickle_cannot_run_code(tmp_path):
    class Mischief:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Mischief(), tmp_path / "evil.pt")
    np.save(tmp_path / "evil.npy", np.array([Mischief()], dtype=object), allow_pickle=True)
    for name in ("evil.pt", "evil.npy"):
        with pytest.raises(ConceptError, match="cannot be read"):
            tensor_concept(tmp_path / name, 1, name="x")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "source, message",
    [
        (torch.zeros(16), "zero"),
        (torch.tensor([1.0, float("nan")]), "1 of the direction's 2 entries"),
        (torch.tensor([float("inf"), 1.0]), "infinite"),
        (torch.ones(3, 16), r"shape \[3, 16\].*row="),
        (torch.tensor(1.0), "shape"),
        (torch.ones(1), "d ≥ 2"),
        (torch.ones(0), "shape"),
        ([["a"]], "numeric"),
        (None, "numeric"),
    ],
)
def test_useless_directions_are_refused(source, message):
    with pytest.raises(ConceptError, match=message):
        tensor_concept(source, 1, name="x")


def test_files_without_a_usable_tensor_are_refused(tmp_path):
    with pytest.raises(ConceptError, match="no file"):
        tensor_concept(tmp_path / "absent.pt", 1, name="x")
    (tmp_path / "x.csv").write_text("1,2")
    (tmp_path / "x.pt").write_text("1,2")
    (tmp_path / "x.npy").write_text("1")
    (tmp_path / "x.safetensors").write_text("1")
    with pytest.raises(ConceptError, match="unknown kind of file '.csv'"):
        tensor_concept(tmp_path / "x.csv", 1, name="x")
    for kind in ("pt", "npy", "safetensors"):
        with pytest.raises(ConceptError, match="cannot be read"):
            tensor_concept(tmp_path / f"x.{kind}", 1, name="x")
    for row in (2, -1):
        with pytest.raises(ConceptError, match="rows 0 to 1"):
            tensor_concept(torch.ones(2, 16), 1, name="x", row=row)


# ---- refusals


@pytest.mark.parametrize("layer", [-1, 1.5, True, "2", None])
def test_a_concept_needs_a_layer_number(layer):
    with pytest.raises(ConceptError, match="layer"):
        Concept("x", torch.ones(4), layer)


def test_other_fields_are_checked_too():
    with pytest.raises(ConceptError, match="unknown pooling 'mean'.*response_mean"):
        Concept("x", torch.ones(4), 1, pooling="mean")
    with pytest.raises(ConceptError, match="norm"):
        Concept("x", torch.ones(4), 1, norm=float("nan"))
    with pytest.raises(ConceptError, match="4 entries.*width 8"):
        Concept("x", torch.ones(4), 1, model_width=8)
    with pytest.raises(ConceptError, match="width 4.*5"):
        Concept("x", torch.ones(4), 1).cosine(torch.ones(5))


def test_a_concept_cannot_be_changed_from_outside():
    source = torch.tensor([1.0, 2.0])
    concept = Concept("x", source, 1)
    source[0] = 9
    assert concept.direction[0] == pytest.approx(1 / 5**0.5)
    with pytest.raises(AttributeError):
        concept.layer = 2


def test_concept_and_model_must_belong_together(lm, twin, positive, negative):
    concept = contrastive_concept(lm, positive, negative, 2, name="praise")
    assert concept.check(lm) == []
    with pytest.raises(ConceptError, match="made with 'tiny'.*not with 'twin'.*transfer"):
        concept.check(twin)
    assert "tiny" in concept.check(twin, allow_other_model=True)[0]
    moved = concept.transfer(twin)
    assert (
        torch.equal(moved.direction, concept.direction)
        and "tiny" in moved.check(twin)[0]
        and lm.fingerprint in moved.provenance["transferred_from"]
    )
    with pytest.raises(ConceptError):
        moved.check(lm)
    for method in (
        lambda c: c.check(lm),
        lambda c: c.check(lm, allow_other_model=True),
        lambda c: c.transfer(lm),
        lambda c: random_concepts(lm, positive, c),
    ):
        with pytest.raises(ConceptError, match="width 8.*width 16"):
            method(Concept("narrow", torch.ones(8), 1))
        with pytest.raises(LayerError, match="layer 9"):
            method(Concept("high", torch.ones(16), 9))
    assert "does not record" in Concept("free", torch.ones(16), 1).check(lm)[0]


def test_one_changed_weight_is_another_model(lm, positive, negative):
    concept = contrastive_concept(lm, positive, negative, 2, name="praise")
    weight = next(lm.model.parameters())
    original = weight.data[0, 0].item()
    try:
        weight.data[0, 0] += 1e-3
        with pytest.raises(ConceptError, match="not with"):
            concept.check(lm)
    finally:
        weight.data[0, 0] = original
    assert concept.check(lm) == []


MAKERS = {"contrastive": contrastive_concept, "probe": probe_concept}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_makers_refuse_bad_input(make, lm, positive, negative):
    for layer in (4, -1):
        with pytest.raises(LayerError, match="0.*3"):
            make(lm, positive, negative, layer, name="x")
    with pytest.raises(ConceptError, match="unknown pooling"):
        make(lm, positive, negative, 1, name="x", pooling="last")
    with pytest.raises(ConceptError, match="held_out"):
        make(lm, positive, negative, 1, name="x", held_out=1.0)
    with pytest.raises(ConceptError, match="0 negative examples"):
        make(lm, positive, negative[:0], 1, name="x")
    with pytest.raises(ConceptError, match=f"1 conversations are both.*{positive.ids[3]}"):
        make(
            lm,
            positive,
            load_conversations(
                [
                    *[dict(messages=list(c.messages)) for c in negative],
                    dict(messages=list(positive[3].messages)),
                ]
            ),
            1,
            name="x",
        )


def test_probe_and_sweep_refuse_bad_settings(lm, positive, negative):
    for C in (0, -1):
        with pytest.raises(ConceptError, match="C must be positive"):
            probe_concept(lm, positive, negative, 1, name="x", C=C)
    with pytest.raises(ConceptError, match="unknown method 'svm'"):
        sweep_layers(lm, positive, negative, name="x", method="svm")
    with pytest.raises(ConceptError, match="folds must be a whole number ≥ 2"):
        sweep_layers(lm, positive, negative, name="x", folds=1)
    with pytest.raises(ConceptError, match="at least 1 layer"):
        sweep_layers(lm, positive, negative, [], name="x")
    with pytest.raises(ConceptError, match="3 positive examples with 3 different questions, at least 4"):
        sweep_layers(lm, positive[:3], negative, name="x")
    with pytest.raises(LayerError):
        sweep_layers(lm, positive, negative, [1, 7], name="x")


def test_broken_weights_are_named(lm, positive, negative):
    weight = lm.model.model.layers[1].mlp.down_proj.weight
    original = weight.data.clone()
    try:
        weight.data[0, 0] = float("nan")
        with pytest.raises(TracingError, match="layer 2 are not finite"):
            contrastive_concept(lm, positive, negative, 2, name="x")
        assert (
            contrastive_concept(lm, positive, negative, 1, name="x").layer == 1
        )  # below the fault all is well
    finally:
        weight.data = original


def test_making_concepts_leaves_the_model_alone(lm, positive, negative):
    def state():
        return [
            (name, m.training, list(m._forward_hooks), list(m._forward_pre_hooks), sorted(vars(m)))
            for name, m in lm.model.named_modules()
        ]

    lm.model.train()
    try:
        before, weights = state(), lm.fingerprint
        sweep_layers(lm, positive, negative, name="x")
        assert state() == before and lm.fingerprint == weights
        assert all(p.grad is None and p.requires_grad for p in lm.model.parameters())
    finally:
        lm.model.eval()


def test_html_is_escaped():
    page = Concept(
        "<script>", torch.ones(4), 1, provenance={"source": "<img>"}, quality={"auc": 0.912345}
    )._repr_html_()
    assert "<script>" not in page and "<img>" not in page and "0.912" in page
