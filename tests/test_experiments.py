"""Experiments: what is trained and how often, what the tables say, kills and several workers, and every
refusal."""

import json
import multiprocessing
import os
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from concept_tda.concepts.concept import random_directions, tensor_concept
from concept_tda.concepts.judges import Judge, LossJudge
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.evidence import retraining
from concept_tda.evidence.datamodels import ActivationJudge, CounterfactualPrediction, LinearDatamodelingScore
from concept_tda.evidence.filter_and_retrain import FilterAndRetrain
from concept_tda.evidence.method_comparison import MethodComparison, baseline_scorers
from concept_tda.evidence.pareto import ParetoCurve
from concept_tda.evidence.retraining import ExperimentError
from concept_tda.evidence.statistics import spearman_interval
from concept_tda.evidence.tail_patch import TailPatch
from concept_tda.foundation.errors import StorageError
from concept_tda.groups.groups import column_groups, score_groups
from concept_tda.influence.scorers import GradDot, VectorFilter
from concept_tda.model.finetuning import finetune
from concept_tda.model.loading import LanguageModel, load_model
from concept_tda.model.losses import loss_weights, token_losses
from concept_tda.model.sites import resolve_sites
from concept_tda.model.tracing import pooled_activations
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.results.metrics import detection_metrics, spearman

from tiny import tiny_pair

N = 20
FAST = dict(rank=2, learning_rate=1e-2, batch_size=8)


@pytest.fixture(scope="module")
def lm():
    return LanguageModel(*tiny_pair("llama"), "tiny")


@pytest.fixture(scope="module")
def train():
    return load_conversations(
        [
            {"prompt": f"Is {i} even?", "response": "yes!" if i % 2 else "no.", "label": bool(i % 2)}
            for i in range(N)
        ],
        name="parity",
    )


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(3).normal(size=N)


def result(train, scores, name="m"):
    return Attribution(train, scores, QueryCard(name, "says yes"))


class Reads(Judge):
    """Reads the number that a toy model is; with `nothing`, has no value for models that satisfy it."""

    unit = "units"

    def __init__(self, name="reads", factor=1.0, nothing=lambda model: False):
        self.name, self.factor, self.nothing = name, factor, nothing

    def settings(self):
        return {"factor": self.factor}

    def measure(self, lm, progress):
        value = getattr(lm, "value", 0.0)
        return (
            ["a", "b"],
            np.array(
                [np.nan, np.nan] if self.nothing(lm) else [self.factor * value, self.factor * value + 1]
            ),
            None,
        )


@pytest.fixture()
def toy(monkeypatch, x):
    """Training becomes taking the mean of x over the rows, plus a shift by the seed. Gives the list of what
    was trained."""
    trained = []

    @contextmanager
    def model(self, rows, seed, folder, keep):
        if rows is None:
            yield SimpleNamespace(value=0.0, name="base", fingerprint="base"), None
            return
        trained.append((tuple(rows), seed))
        yield (
            SimpleNamespace(value=x[rows].mean() + seed / 100, name="toy", fingerprint=f"{seed}"),
            {"rows": [int(row) for row in rows], "n": len(rows), "seconds": 0.01 * len(rows)},
        )

    monkeypatch.setattr(retraining.Retraining, "model", model)
    return trained


def same(experiment, name=None):
    """The table from the files is the table of the run, and so is everything shown."""
    again = type(experiment).from_folder(experiment.folder, *([name] if name else []))
    pd.testing.assert_frame_equal(again.table, experiment.table)
    assert repr(again) == repr(experiment) and again._repr_html_() == experiment._repr_html_()
    return again


# ---- filter and retrain


def test_table_and_summary_by_hand(lm, train, x, toy, tmp_path):
    seeds = (0, 3, 4)
    experiment = FilterAndRetrain(
        lm, train, {"x": result(train, x)}, Reads(), tmp_path, fractions=(0.25,), seeds=seeds
    ).run(progress=False)
    table, order = experiment.table.set_index(["arm", "seed"]), np.argsort(-x)
    assert len(table) == 1 + 3 * 4 and experiment.remaining == 0
    for seed in seeds:
        kept = {"full": np.arange(N), "drop-most": np.sort(order[5:]), "drop-least": np.sort(order[:-5])}
        for arm, rows in kept.items():
            assert (tuple(rows), seed) in toy and table.loc[(arm, seed), "n"] == len(rows)
        value = {arm: x[rows].mean() + seed / 100 + 0.5 for arm, rows in kept.items()}
        for arm in kept:
            assert table.loc[(arm, seed), "value"] == pytest.approx(value[arm])
        random = table.loc[("random", seed)]
        assert random["n"] == 15 and table.loc[("drop-most", seed), "from_random"] == pytest.approx(
            value["drop-most"] - random["value"]
        )
        assert table.loc[("drop-most", seed), "from_full"] == pytest.approx(
            value["drop-most"] - value["full"]
        )
        assert table.loc[("drop-most", seed), "from_base"] == pytest.approx(value["drop-most"] - 0.5)
    assert len({rows for rows, _ in toy if len(rows) == 15}) == 3 + 2  # a random draw for each seed
    differences = table.loc["drop-most", "from_random"].to_numpy(float)
    row = experiment.summary().set_index("arm").loc["drop-most"]
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    assert (
        row["seeds"] == 3
        and row["from_random"] == pytest.approx(differences.mean())
        and row["from_random ±"] == pytest.approx((high - low) / 2)
    )
    assert table["standard_error"].to_numpy() == pytest.approx(0.5)  # two items, one apart
    same(experiment)


def test_random_draws_are_nested_and_do_not_depend_on_the_run(lm, train, x, toy, tmp_path):
    FilterAndRetrain(
        lm, train, [result(train, x)], Reads(), tmp_path, fractions=(0.1, 0.5), arms=("random",), seeds=(7,)
    ).run(progress=False)
    small, large = (next(set(rows) for rows, _ in toy if len(rows) == n) for n in (18, 10))
    assert large < small < set(range(N))


def test_one_seed_has_no_interval_and_says_so(lm, train, x, toy, tmp_path):
    experiment = FilterAndRetrain(
        lm, train, [result(train, x)], Reads(), tmp_path, fractions=(0.25,), seeds=(0,)
    ).run(progress=False)
    assert (
        experiment.summary()["value ±"].isna().all()
        and "1 seed;" in repr(experiment)
        and "none with one seed" in repr(experiment)
    )


def test_the_same_subset_under_two_names_is_trained_once(lm, train, x, toy, tmp_path):
    FilterAndRetrain(
        lm,
        train,
        {"x": result(train, x), "2x": result(train, 2 * x), "-x": result(train, -x)},
        Reads(),
        tmp_path,
        fractions=(0.25,),
        seeds=(0,),
        subsets={"all": np.arange(N), "again": np.ones(N, bool)},
    ).run(progress=False)
    assert len(toy) == len(set(toy)) == 4  # full (twice again as a subset), top, bottom, random


def test_a_shared_folder_shares_retrainings_under_names(lm, train, x, toy, tmp_path):
    first = FilterAndRetrain(
        lm, train, {"x": result(train, x)}, Reads(), tmp_path, fractions=(0.25,), seeds=(0, 1)
    ).run(progress=False)
    n = len(toy)
    second = FilterAndRetrain(
        lm, train, {"-x": result(train, -x)}, Reads(), tmp_path, fractions=(0.25,), seeds=(0, 1), name="other"
    ).run(progress=False)
    assert len(toy) == n and set(second.table["method"]) == {"", "-x"}
    same(first), same(second, "other")
    with pytest.raises(ExperimentError, match="filter-and-retrain"):
        LinearDatamodelingScore(lm, train, [result(train, x)], Reads(), tmp_path, name="other")
    with pytest.raises(ExperimentError, match="name="):
        FilterAndRetrain(lm, train, [result(train, x)], Reads(), tmp_path, name="a/b")


def test_attributions_in_another_order_are_matched_by_id(lm, train, x, toy, tmp_path):
    order = np.random.default_rng(0).permutation(N)
    shuffled = result(train.select(order), x[order])
    for folder, scored in (("a", result(train, x)), ("b", shuffled)):
        FilterAndRetrain(lm, train, [scored], Reads(), tmp_path / folder, fractions=(0.25,), seeds=(0,)).run(
            progress=False
        )
    assert toy[: len(toy) // 2] == toy[len(toy) // 2 :]


def test_it_goes_on_where_it_stopped(lm, train, x, toy, tmp_path):
    make = lambda: FilterAndRetrain(
        lm, train, {"x": result(train, x)}, Reads(), tmp_path, fractions=(0.25, 0.5), seeds=(0, 1)
    )
    make().run(progress=False, at_most=4)
    assert len(toy) == 3  # and the base model
    broken = make()
    calls = []
    broken.judges["reads"].evaluate = lambda lm, progress: calls.append(1) or 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.run(progress=False)
    assert make().remaining == 15 - 4 and np.isfinite(make().estimate())
    half = FilterAndRetrain.from_folder(tmp_path)
    assert 0 < len(half.table) < 15 and half.remaining == 11 and "11 of 15" in repr(half)
    del toy[:]
    whole = make().run(progress=False)
    assert len(toy) == 11 and whole.estimate() == 0
    whole.run(progress=False)
    assert len(toy) == 11
    uninterrupted = FilterAndRetrain(
        lm, train, {"x": result(train, x)}, Reads(), tmp_path / "new", fractions=(0.25, 0.5), seeds=(0, 1)
    ).run(progress=False)
    pd.testing.assert_frame_equal(whole.table, uninterrupted.table)


def test_another_judge_later_leaves_the_first_alone(lm, train, x, toy, tmp_path):
    make = lambda judges: FilterAndRetrain(
        lm, train, {"x": result(train, x)}, judges, tmp_path, fractions=(0.25,), seeds=(0,)
    ).run(progress=False)
    make([Reads()])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("cells/*/*.json")}
    experiment = make({"one": Reads(), "two": Reads("reads", 2.0)})
    assert {path: path.stat().st_mtime_ns for path in before} == before
    values = experiment.table.pivot(index="cell", columns="judge", values="value")
    assert (values["two"] - 0.5).to_numpy() == pytest.approx(2 * (values["one"] - 0.5))
    assert len(experiment.plot(column="from_random").axes) == 2 and len(experiment.plot("two").axes) == 1
    for wrong in (dict(judge="three"), dict(column="four")):
        with pytest.raises(ExperimentError, match=f"{next(iter(wrong.values()))!r}"):
            experiment.plot(**wrong)


def test_a_judge_without_a_word(lm, train, x, toy, tmp_path):
    with pytest.raises(
        ExperimentError, match="'mute' gave no score for any of its 2 items on the base model"
    ):
        FilterAndRetrain(
            lm, train, [result(train, x)], Reads("mute", nothing=lambda model: True), tmp_path / "a"
        ).run(progress=False)
    assert not toy  # said before anything was trained
    experiment = FilterAndRetrain(
        lm,
        train,
        [result(train, x)],
        Reads("shy", nothing=lambda model: model.name != "base" and model.value > x.mean() + 0.01),
        tmp_path / "b",
        fractions=(0.25,),
        seeds=(0, 1, 2),
    ).run(progress=False)
    least = experiment.table.query("arm == 'drop-least'")
    assert least["value"].isna().all() and (least["missing"] == 2).all() and least["from_full"].isna().all()
    assert (
        "gave no score in" in repr(experiment)
        and experiment.table.query("arm == 'drop-most'")["value"].notna().all()
    )
    same(experiment).plot()


def test_names_are_escaped(lm, train, x, toy, tmp_path):
    experiment = FilterAndRetrain(
        lm, train, {"<b>m</b>": result(train, x)}, Reads("<script>"), tmp_path, fractions=(0.25,), seeds=(0,)
    ).run(progress=False)
    assert (
        "<b>m</b>" not in experiment._repr_html_()
        and "<script>" not in experiment._repr_html_()
        and "&lt;script&gt;" in experiment._repr_html_()
    )


@pytest.fixture()
def kinds():
    """The data of `train` with a column, and its groups scored: `seven` is the highest, then `six`."""
    names = ["seven"] * 7 + ["six"] * 6 + ["other"] * 7
    data = load_conversations(
        [
            {"prompt": f"Is {i} even?", "response": "yes!" if i % 2 else "no.", "label": bool(i % 2)}
            | {"kind": names[i]}
            for i in range(N)
        ],
        name="parity",
    )
    scores = [2.0] * 7 + [1.0] * 6 + [-1.0] * 7
    return data, score_groups(column_groups(data, "kind"), result(data, scores, "by kind"), deals=10)


def test_whole_groups_are_dropped_beside_single_examples_and_random_ones(lm, x, toy, kinds, tmp_path):
    data, found = kinds
    experiment = FilterAndRetrain(
        lm,
        data,
        {"x": result(data, x)},
        Reads(),
        tmp_path,
        fractions=(0.25, 0.35, 0.5),  # 5, 7 and 10 of 20; the unions hold 7, 7 and 13
        seeds=(0, 3),
        n_random=2,
        groups={"kinds": found},
    ).run(progress=False)
    table = experiment.table.set_index(["arm", "method", "fraction", "seed"])
    for fraction, gone in ((0.25, 7), (0.35, 7), (0.5, 13)):
        for seed in (0, 3):
            rows = np.arange(gone, N)
            arm = table.loc[("drop-groups", "kinds", fraction, seed)]
            assert (tuple(rows), seed) in toy and (arm["n"] == N - gone).all()
            value = x[rows].mean() + seed / 100 + 0.5
            random = np.sort(np.random.default_rng([seed, N]).permutation(N)[gone:])
            assert (tuple(random), seed) in toy
            assert arm["value"].item() == pytest.approx(value)
            same_size = experiment.table.query("arm == 'random' and seed == @seed and n == @N - @gone")
            draws = same_size.drop_duplicates("cell")["value"]
            assert len(draws) == 2 and arm["from_random"].item() == pytest.approx(value - draws.mean())
    assert ("random", "kinds", 0.35, 0) not in table.index  # the share's own control is as large
    summary = experiment.summary().set_index(["arm", "method", "fraction"])
    assert summary.loc[("random", "kinds", 0.5), "n"] == summary.loc[("drop-groups", "kinds", 0.5), "n"] == 7
    assert summary.loc[("random", "", 0.5), "n"] == 10
    again = same(experiment)
    assert again.about["groups"]["kinds"]["groups"] == 3 and len(again.plot().axes) == 1


def test_groups_alone_in_another_order_and_without_a_control(lm, toy, kinds, tmp_path):
    data, found = kinds
    order = np.random.default_rng(0).permutation(N)
    experiment = FilterAndRetrain(
        lm,
        data.select(order),
        {},
        Reads(),
        tmp_path,
        fractions=(0.5,),
        seeds=(0,),
        arms=("drop-groups",),
        groups=found,
    ).run(progress=False)
    assert set(experiment.table["arm"]) == {"base", "full", "drop-groups"}
    assert (tuple(np.flatnonzero(order >= 13)), 0) in toy
    assert experiment.table["method"].iloc[-1] == "by kind by metadata column 'kind'"
    assert experiment.table["from_random"].isna().all()
    experiment.plot()


def test_groups_that_cannot_be_dropped(lm, train, x, toy, kinds, tmp_path):
    data, found = kinds
    scores = {"x": result(data, x)}
    every = score_groups(
        column_groups(data, "kind"), result(data, np.full(N, 1.0)), deals=10, standardise=False
    )
    for groups, arms, message in (
        ({}, ("drop-groups",), "needs scored groups"),
        (
            {"kinds": column_groups(data, "kind")},
            ("random",),
            "'kinds': give what score_groups returns.*Groups",
        ),
        (
            {"kinds": found},
            ("random",),
            "'kinds': the 2 groups with a positive sum hold 13 examples, 15 were",
        ),
        (
            {"kinds": every},
            ("random",),
            "'kinds': to reach 15 examples the highest groups take the whole file",
        ),
    ):
        with pytest.raises(ExperimentError, match=message):
            FilterAndRetrain(lm, data, scores, Reads(), tmp_path, fractions=(0.75,), arms=arms, groups=groups)
    with pytest.raises(ExperimentError, match="'kinds' are of other data than train"):
        FilterAndRetrain(lm, data[:19], {}, Reads(), tmp_path, fractions=(0.25,), groups={"kinds": found})
    card = QueryCard("m", "says yes", settings={"difference": "chosen minus rejected"})
    pairs = score_groups(column_groups(data, "kind"), Attribution(data, np.arange(N), card), deals=10)
    with pytest.raises(ExperimentError, match="'kinds' scores preference pairs"):
        FilterAndRetrain(lm, data, {}, Reads(), tmp_path, fractions=(0.25,), groups={"kinds": pairs})
    assert not toy and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(fractions=(0,)), "fraction=0 is not between"),
        (dict(fractions=(1.0,)), "fraction=1.0 is not between"),
        (dict(fractions=(25,)), "10 % is 0.1"),
        (dict(fractions=(0.01,)), "rounds to 0, which leaves everything"),
        (dict(fractions=(0.99,)), "rounds to 20, which leaves an empty subset"),
        (dict(arms=("drop-some",)), "unknown arm 'drop-some'"),
        (dict(seeds=()), "at least one seed"),
        (dict(seeds=(1, 1)), "each of them once"),
        (dict(subsets={"mine": []}), "'mine' is empty"),
        (dict(subsets={"mine": np.zeros(N, bool)}), "'mine' is empty"),
        (dict(subsets={"mine": range(N + 1)}), "21 rows, the training data only 20"),
        (dict(subsets={"mine": [3, 99]}), "row 99"),
        (dict(subsets={"mine": [3, 3]}), "a row twice"),
        (dict(subsets={"mine": [0.5]}), "row numbers"),
        (
            dict(subsets={"mine": load_conversations([{"prompt": "?", "response": "!"}])}),
            "1 of its 1 conversations are not in the training data",
        ),
        (dict(recipe={"rnk": 4}), "'rnk' that finetune does not know"),
        (dict(recipe={"seed": 4}), "'seed' is set by the experiment"),
        (dict(recipe="mine"), "no recipe 'mine'"),
    ],
)
def test_refusals(options, message, lm, train, x, toy, tmp_path):
    with pytest.raises(ExperimentError, match=message):
        FilterAndRetrain(lm, train, [result(train, x)], Reads(), tmp_path, **options)
    assert not toy and not any(tmp_path.iterdir())


def test_refuses_other_data_and_no_judges(lm, train, x, toy, tmp_path):
    other = load_conversations([{"prompt": f"{i}", "response": "!"} for i in range(N)])
    for wrong in (result(other, x), result(train[:10], x[:10])):
        with pytest.raises(ExperimentError, match="scores other data than train"):
            FilterAndRetrain(lm, train, [wrong], Reads(), tmp_path)
    for judges, message in (
        ({}, "no judges"),
        ([Reads(), Reads()], "share a name"),
        ({"a": 3}, "'a' has no evaluate"),
    ):
        with pytest.raises(ExperimentError, match=message):
            FilterAndRetrain(lm, train, [result(train, x)], judges, tmp_path)
    with pytest.raises(ExperimentError, match="training data are empty"):
        FilterAndRetrain(lm, train[:0], [result(train, x)], Reads(), tmp_path)


def test_a_folder_belongs_to_one_setting(lm, train, x, toy, tmp_path):
    FilterAndRetrain(lm, train, [result(train, x)], Reads(), tmp_path, fractions=(0.25,), seeds=(0,)).run(
        progress=False
    )
    with pytest.raises(ExperimentError, match="different: recipe"):
        FilterAndRetrain(lm, train, [result(train, x)], Reads(), tmp_path, recipe={"rank": 2})
    with pytest.raises(ExperimentError, match="different: base"):
        FilterAndRetrain(
            LanguageModel(*tiny_pair("llama", seed=1), "other"), train, [result(train, x)], Reads(), tmp_path
        )
    with pytest.raises(ExperimentError, match="different: data"):
        FilterAndRetrain(lm, train[::-1], [result(train, x)], Reads(), tmp_path)
    more = FilterAndRetrain(
        lm, train, [result(train, x)], Reads(), tmp_path, fractions=(0.25,), seeds=(0, 1)
    )  # growing is no other setting
    assert more.remaining == 4
    with pytest.raises(ExperimentError, match="no filter-and-retrain experiment"):
        FilterAndRetrain.from_folder(tmp_path / "nowhere")
    with pytest.raises(ExperimentError, match="was read from its files"):
        FilterAndRetrain.from_folder(tmp_path).run()
    damaged = next(tmp_path.glob("cells/*/[0-9a-f]*.json"))
    damaged.write_text("{")
    with pytest.raises(ExperimentError, match="is damaged.*Delete it and run again"):
        FilterAndRetrain.from_folder(tmp_path).table
    (tmp_path / "filter-and-retrain.json").write_text("[]")
    with pytest.raises(ExperimentError, match="is not"):
        FilterAndRetrain.from_folder(tmp_path)


# ---- real training


def test_the_full_run_is_finetune_and_models_go_unless_kept(lm, train, x, tmp_path):
    judge = LossJudge(train[:4], name="loss")
    experiment = FilterAndRetrain(
        lm,
        train,
        [result(train, x)],
        judge,
        tmp_path / "e",
        fractions=(0.5,),
        arms=("drop-most",),
        seeds=(5,),
        recipe=FAST,
        subsets={"everything": train},
    ).run(progress=False)
    values = experiment.table.set_index("arm")["value"]
    trained = finetune(lm, train, tmp_path / "ft", seed=5, progress=False, **FAST)
    assert (
        values["full"] == values["subset"] == judge.evaluate(trained, progress=False).mean != values["base"]
    )
    dropped = finetune(lm, result(train, x).drop(0.5), tmp_path / "half", seed=5, progress=False, **FAST)
    assert values["drop-most"] == judge.evaluate(dropped, progress=False).mean
    assert (
        not list((tmp_path / "e").rglob("model")) and len(list((tmp_path / "e").rglob("training.json"))) == 2
    )
    kept = FilterAndRetrain(
        lm,
        train,
        [result(train, x)],
        judge,
        tmp_path / "k",
        fractions=(0.5,),
        arms=(),
        seeds=(5,),
        recipe=FAST,
        keep_models=True,
    ).run(progress=False)
    cell = kept.table.set_index("arm").loc["full", "cell"]
    assert (
        load_model(tmp_path / "k" / "cells" / cell / "model", merge=True).fingerprint == trained.fingerprint
    )
    same(experiment)


def _work(folder, log, pause):
    "A worker: real training of a tiny model, with a note in `log` for each model it made."
    torch.set_num_threads(1)
    from concept_tda.model.loading import LanguageModel

    lm = LanguageModel(*tiny_pair("llama"), "tiny")
    data = load_conversations([{"prompt": f"{i}?", "response": "yes" if i % 2 else "no"} for i in range(8)])
    compute = retraining.Experiment._compute

    def noted(self, entry):
        time.sleep(pause)
        compute(self, entry)
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {entry['cell']}\n")

    retraining.Experiment._compute = noted
    FilterAndRetrain(
        lm,
        data,
        [result(data, np.arange(8.0))],
        LossJudge(data[:2], name="loss"),
        folder,
        fractions=(0.5,),
        seeds=(0, 1),
        recipe=FAST,
    ).run(progress=False)


def test_two_workers_share_the_work_and_a_killed_one_is_made_up_for(tmp_path):
    children = multiprocessing.get_context("forkserver")
    children.set_forkserver_preload(
        [
            "tiny",
            "concept_tda.evidence.filter_and_retrain",
            "transformers.models.llama.modeling_llama",
            "peft",
        ]
    )
    start = lambda folder, log, pause: (
        child := children.Process(target=_work, args=(tmp_path / folder, tmp_path / log, pause)),
        child.start(),
    )[0]
    alone = start("alone", "alone.log", 0)
    alone.join()
    assert alone.exitcode == 0
    victim = start("shared", "shared.log", 0.3)
    while not (tmp_path / "shared.log").exists():
        time.sleep(0.02)  # one model done, and at work on the second
    time.sleep(0.1)
    victim.kill()
    victim.join()
    workers = [start("shared", "shared.log", 0.3) for _ in range(2)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    whole, made_up = (FilterAndRetrain.from_folder(tmp_path / folder) for folder in ("alone", "shared"))
    assert made_up.remaining == 0
    pd.testing.assert_frame_equal(whole.table, made_up.table)
    made = [line.split() for line in (tmp_path / "shared.log").read_text().splitlines()]
    assert (
        len(made) == len({cell for _, cell in made}) == 9 and len({worker for worker, _ in made}) == 3
    )  # no model twice, and both helped
    assert not list((tmp_path / "shared").rglob("model")) and not list((tmp_path / "shared").rglob("*.part*"))


# ---- linear datamodeling score


def test_lds_by_hand(lm, train, x, toy, tmp_path):
    scores = {
        "x": result(train, x),
        "minus": result(train, -x),
        "other": result(train, np.random.default_rng(9).normal(size=N)),
    }
    lds = LinearDatamodelingScore(lm, train, scores, Reads(), tmp_path, n_subsets=7, seeds=(0, 4)).run(
        progress=False
    )
    table, points = lds.table.set_index("method"), lds.points
    assert table.loc["x", "LDS"] == 1 and table.loc["minus", "LDS"] == -1  # the toy is additive
    assert table.loc["other", "LDS"] == pytest.approx(
        stats.spearmanr(points["other"], points["measured"]).statistic
    )
    assert (
        table["seed agreement"].to_numpy() == pytest.approx(1)
        and len(toy) == 14
        and all(len(rows) == 10 for rows, _ in toy)
    )
    first = toy[0][0]
    assert points["x"][0] == pytest.approx(x[list(first)].sum()) and points["measured"][0] == pytest.approx(
        x[list(first)].mean() + 0.02 + 0.5
    )
    same(lds).plot()
    ranks = spearman([10, 20, 30, 40, 50], [2, 1, 4, 3, 5])  # d = 1, 1, 1, 1, 0: 1 - 6·4/(5·24)
    assert ranks == pytest.approx(0.8)
    low, high = spearman_interval(0.8, 23)
    assert low == pytest.approx(
        np.tanh(np.arctanh(0.8) - 1.96 * np.sqrt(1.06 / 20))
    ) and high == pytest.approx(np.tanh(np.arctanh(0.8) + 1.96 * np.sqrt(1.06 / 20)))
    with pytest.raises(ExperimentError, match="4 subsets"):
        LinearDatamodelingScore(lm, train, scores, Reads(), tmp_path / "b", n_subsets=3)


# ---- counterfactual prediction


def test_slope_where_the_truth_is_known(lm, train, x, toy, tmp_path):
    """The mean of x minimises the mean of ½(θ - x)²; the influence of x on it is x - mean, and leaving a
    quarter out moves it by 4/3 of the prediction."""
    influence = x - x.mean()
    methods = {
        "exact": result(train, influence),
        "doubled": result(train, 2 * influence),
        "wrong sign": result(train, -influence),
        "noise": result(train, np.random.default_rng(9).normal(size=N)),
    }
    experiment = CounterfactualPrediction(
        lm,
        train,
        methods,
        [Reads(), Reads("tenfold", 10.0)],
        tmp_path,
        fractions=(0.25,),
        n_random=6,
        seeds=(0, 1),
    ).run(progress=False)
    table = experiment.table.set_index(["judge", "method"])
    assert table.loc[("reads", "exact"), ["slope", "R²", "intercept"]].to_numpy(float) == pytest.approx(
        [4 / 3, 1, 0], abs=1e-9
    )
    assert table.loc[("reads", "exact"), "slope ±"] == pytest.approx(0, abs=1e-6)
    assert table.loc[("reads", "doubled"), "slope"] == pytest.approx(2 / 3) and table.loc[
        ("reads", "wrong sign"), "slope"
    ] == pytest.approx(-4 / 3)
    assert table.loc[("tenfold", "exact"), "slope"] == pytest.approx(40 / 3)
    points = experiment.points.query("judge == 'reads'")
    line = stats.linregress(points["by noise"], points["measured"])
    noise = table.loc[("reads", "noise")]
    assert (noise["slope"], noise["R²"]) == pytest.approx((line.slope, line.rvalue**2)) and noise[
        "slope ±"
    ] == pytest.approx(line.stderr * stats.t.ppf(0.975, len(points) - 2))
    assert len(points) == 2 + 2 + 6  # two ends of x shared by three methods, two of noise, six random draws
    same(experiment).plot("tenfold")


def test_counterfactual_borrows_the_retrainings_of_filter_and_retrain(lm, train, x, toy, tmp_path):
    setting = dict(fractions=(0.25,), seeds=(0, 1))
    FilterAndRetrain(lm, train, {"x": result(train, x)}, Reads(), tmp_path, **setting).run(progress=False)
    n = len(toy)
    CounterfactualPrediction(
        lm, train, {"x": result(train, x)}, Reads(), tmp_path, n_random=2, **setting
    ).run(progress=False)
    assert len(toy) == n


# ---- tail patch


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_is_a_gradient_step_and_is_taken_back(family, train, tmp_path):
    lm = LanguageModel(*tiny_pair(family), family)
    likes, before = LossJudge(train[1:8:2], name="likes yes"), lm.fingerprint
    scores = GradDot(lm, train[1:8:2], sites="attention").score(train, progress=False)
    tail = TailPatch(
        lm, train, {"GradDot": scores}, likes, tmp_path, top=4, n_random=5, learning_rate=1e-3
    ).run(progress=False)
    assert lm.fingerprint == before
    row = int(np.argmax(scores.scores))
    other = LanguageModel(*tiny_pair(family), family)
    sites = resolve_sites(other, "attention")
    batch = next(batches(other.tokenize(train), rows=[row]))
    gradients = torch.autograd.grad(
        (token_losses(other, batch) * loss_weights(batch)).sum(), [site.module.weight for site in sites]
    )
    with torch.no_grad():
        for site, gradient in zip(sites, gradients):
            site.module.weight -= 1e-3 * gradient
    expected = likes.evaluate(other, progress=False).mean - likes.evaluate(lm, progress=False).mean
    found = tail.steps.query("arm == 'top' and rank == 1")
    assert (
        found["row"].item() == row
        and found["change"].item() == pytest.approx(expected, rel=1e-2)
        and expected > 0
    )
    assert found["change"].item() == pytest.approx(1e-3 * scores.scores[row], rel=0.1)  # GradDot is the slope
    line = tail.table.iloc[0]
    random = tail.steps.query("arm == 'random'")["change"]
    welch = stats.ttest_ind(
        tail.steps.query("arm == 'top'")["change"], random, equal_var=False
    ).confidence_interval()
    assert (
        line["top - random ±"] == pytest.approx((welch.high - welch.low) / 2)
        and line["random"] == pytest.approx(random.mean())
        and line["Spearman"] > 0.9
    )
    same(tail).plot()


def test_weights_are_back_after_an_error_and_steps_are_not_repeated(lm, train, x, tmp_path):
    before, judge = lm.fingerprint, LossJudge(train[:2], name="loss")
    make = lambda judge: TailPatch(lm, train, [result(train, x)], judge, tmp_path, top=2, n_random=2)
    broken = make(judge)
    evaluate, calls = LossJudge.evaluate, []
    broken.judges["loss"] = SimpleNamespace(
        evaluate=lambda lm, progress: (
            calls.append(1),
            evaluate(judge, lm, progress=False) if len(calls) < 4 else 1 / 0,
        )[1]
    )
    with pytest.raises(ZeroDivisionError):
        broken.run(progress=False)
    assert lm.fingerprint == before and all(parameter.grad is None for parameter in lm.model.parameters())
    again = make(judge)
    total = len({entry["cell"] for entry in again.entries})
    assert again.remaining == total - 3 and again.run(progress=False).remaining == 0
    for options in (dict(top=0), dict(n_random=N + 1), dict(learning_rate=0)):
        with pytest.raises(ExperimentError):
            TailPatch(lm, train, [result(train, x)], judge, tmp_path / "b", **options)


# ---- comparison of methods


def test_comparison_agrees_with_scipy_and_carries_baselines_and_null(lm, train, tmp_path, monkeypatch):
    concept = tensor_concept(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(0)), layer=2, lm=lm, name="c"
    )
    scorers = {"Vector Filter": VectorFilter(lm, concept), "GradDot": GradDot(lm, train[:3])}
    labels = train.labels("label")
    make = lambda: MethodComparison(
        lm, train, scorers, tmp_path, labels="label", queries=train[:3], concept=concept, n_random=30
    )
    score, scored = MethodComparison._score, []
    monkeypatch.setattr(
        MethodComparison,
        "_score",
        lambda self, name: (
            scored.append(name),
            1 / 0 if name == "Loss" and scored.count("Loss") == 1 else score(self, name),
        )[1],
    )
    with pytest.raises(ZeroDivisionError):
        make().run(progress=False)
    assert "Loss" in MethodComparison.from_folder(tmp_path).remaining
    done, comparison = scored[:-1], make().run(progress=False)
    assert all(scored.count(name) == 1 for name in done) and not comparison.remaining
    table, found = comparison.table, comparison.attributions
    assert (
        set(found)
        == {"Vector Filter", "GradDot", "Random", "Length", "Loss", "BM25", "RepSim", "Random direction"}
        == set(baseline_scorers(lm, train, queries=train[:3], concept=concept)) | set(scorers)
    )
    first, second = found["Vector Filter"].scores, found["GradDot"].scores
    assert comparison.comparison().spearman.loc["Vector Filter", "GradDot"] == pytest.approx(
        stats.spearmanr(first, second).statistic
    )
    assert table.loc["GradDot", "AUROC"] == detection_metrics(second, labels)["AUROC"]
    acts_ND = pooled_activations(lm, train, 2, progress=False)[2]
    reach = []
    for direction in random_directions(acts_ND, 30, seed=0):
        auroc = detection_metrics((acts_ND.double() @ direction.double()).numpy(), labels)["AUROC"]
        reach.append(max(auroc, 1 - auroc))
    auroc = table.loc["GradDot", "AUROC"]
    assert table.loc["GradDot", "as good: random directions"] == pytest.approx(
        np.mean(np.array(reach) >= max(auroc, 1 - auroc) - 1e-9)
    )
    assert table.loc["random directions, median", "AUROC"] == pytest.approx(np.median(reach))
    assert (
        table.loc["Vector Filter", "× Vector Filter"] == 1 and (table.loc[list(scorers), "seconds"] > 0).all()
    )
    same(comparison).plot()
    changed = MethodComparison(
        lm,
        train,
        scorers | {"GradDot": GradDot(lm, train[3:6])},
        tmp_path,
        labels="label",
        queries=train[:3],
        concept=concept,
        n_random=30,
    )
    assert changed.remaining == ["GradDot"]  # other queries, another result


def test_comparison_takes_finished_results_and_refuses_others(lm, train, x, tmp_path):
    comparison = MethodComparison(lm, train, [result(train, x, "mine")], tmp_path).run(progress=False)
    assert (
        np.array_equal(comparison.attributions["mine"].scores, x)
        and "Random" in comparison.table.index
        and same(comparison).run.__doc__
    )
    with pytest.raises(ExperimentError, match="other data"):
        MethodComparison(lm, train, [result(train[:5], x[:5])], tmp_path)
    with pytest.raises(ExperimentError, match="share a name"):
        MethodComparison(lm, train, [result(train, x), result(train, -x)], tmp_path)
    with pytest.raises(ExperimentError, match="no scorers"):
        MethodComparison.from_folder(tmp_path).run()


def test_several_random_draws_are_one_control_for_each_seed(lm, train, x, toy, tmp_path):
    make = lambda n_random, folder: FilterAndRetrain(
        lm,
        train,
        {"x": result(train, x)},
        Reads(),
        folder,
        fractions=(0.25,),
        arms=("drop-most", "random"),
        seeds=(0, 3),
        n_random=n_random,
    ).run(progress=False)
    one, experiment = make(1, tmp_path / "one"), make(3, tmp_path / "three")
    table = experiment.table
    draws = table[table["arm"] == "random"]
    assert len(draws) == 6 and draws["cell"].nunique() == 6 and draws["from_random"].isna().all()
    assert set(one.table["cell"]) < set(table["cell"])  # more draws are added to the first ones, which stay
    top = table[table["arm"] == "drop-most"].set_index("seed")
    for seed in (0, 3):
        assert top.loc[seed, "from_random"] == pytest.approx(
            top.loc[seed, "value"] - draws.loc[draws["seed"] == seed, "value"].mean()
        )
    row = experiment.summary().set_index("arm").loc["random"]
    means = draws.groupby("seed")["value"].mean()
    low, high = stats.t.interval(0.95, 1, means.mean(), stats.sem(means))
    assert (
        row["seeds"] == 2
        and row["value"] == pytest.approx(means.mean())
        and row["value ±"] == pytest.approx((high - low) / 2)
    )  # two seeds, not six values
    same(experiment).plot()
    with pytest.raises(ExperimentError, match="n_random=0"):
        make(0, tmp_path / "none")


# ---- Pareto


def test_pareto_keeps_the_lowest_and_marks_the_best(lm, train, x, toy, tmp_path):
    trait, capability = Reads("trait"), Reads("capability", -1.0)
    pareto = ParetoCurve(
        lm, train, {"x": result(train, x)}, trait, capability, tmp_path, fractions=(0.1, 0.5), seeds=(0, 1)
    ).run(progress=False)
    lowest = tuple(np.sort(np.argsort(x)[:2]).tolist())
    assert (lowest, 0) in toy and sorted({len(rows) for rows, _ in toy}) == [2, 10, 20]
    curve = pareto.curve().set_index(["arm", "fraction"])
    assert (
        curve.loc[("keep-least", 0.1), "trait"] == pytest.approx(x[list(lowest)].mean() + 0.005 + 0.5)
        and curve.loc[("keep-least", 0.1), "best"]
    )
    assert curve["best"].sum() == 1  # here the trait is minus the capability: the lowest mean wins both
    assert (
        pareto.table.query("arm == 'random'").groupby("fraction")["n"].first() == [2, 10]
    ).all() and pareto.table.query("arm == 'keep-least'")["from_random"].notna().all()
    same(pareto).plot()
    with pytest.raises(ExperimentError, match="both called"):
        ParetoCurve(lm, train, [result(train, x)], trait, trait, tmp_path / "b")


# ---- the activation judge


def test_activation_judge_measures_siblings(lm, train, tmp_path):
    concept = tensor_concept(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(0)), layer=2, lm=lm, name="c"
    )
    judge = ActivationJudge(concept, train[:5])
    expected = pooled_activations(lm, train[:5], 2, progress=False)[2].double() @ concept.direction.double()
    assert judge.evaluate(lm, progress=False).values == pytest.approx(expected.numpy())
    sibling = LanguageModel(*tiny_pair("llama", seed=1), "sibling")
    assert not np.allclose(judge.evaluate(sibling, progress=False).values, expected)
    assert judge.fingerprint != ActivationJudge(concept, train[:6]).fingerprint
    with pytest.raises(ExperimentError, match="at least one"):
        ActivationJudge(concept, train[:0])


# ---- one file instead of many


def finished(experiment):
    """Everything that an experiment's tables show."""
    shown = [experiment.table]
    if hasattr(experiment, "summary"):
        shown.append(experiment.summary())
    if hasattr(experiment, "points"):
        shown.append(experiment.points)
    return shown


@pytest.mark.parametrize("at_most", [None, 4])
def test_packed_file_shows_what_the_folder_shows(at_most, lm, train, x, toy, tmp_path):
    results, folder = {"x": result(train, x)}, tmp_path / "run"
    options = dict(fractions=(0.25,), seeds=(0, 1))
    FilterAndRetrain(lm, train, results, Reads(), folder, **options).run(progress=False, at_most=at_most)
    FilterAndRetrain(lm, train, {"-x": result(train, -x)}, Reads(), folder, name="other", **options).run(
        progress=False, at_most=at_most
    )
    LinearDatamodelingScore(lm, train, results, Reads(), folder, n_subsets=5).run(
        progress=False, at_most=at_most
    )
    packed = FilterAndRetrain.from_folder(folder).pack(tmp_path / "run.json")
    for kind, name in (
        (FilterAndRetrain, None),
        (FilterAndRetrain, "other"),
        (LinearDatamodelingScore, None),
    ):
        before, after = kind.from_folder(folder, name), kind.from_folder(packed, name)
        for expected, found in zip(finished(before), finished(after), strict=True):
            pd.testing.assert_frame_equal(found, expected, check_exact=True)
        assert after.remaining == before.remaining and (before.remaining > 0) == (at_most is not None)
        assert repr(after).replace(str(packed), str(folder)) == repr(before)
        for entry in before.entries:
            assert after.training(entry["cell"]) == before.training(entry["cell"])
    again = FilterAndRetrain.from_folder(packed).pack(tmp_path / "again.json")
    assert again.read_bytes() == packed.read_bytes()
    with pytest.raises(ExperimentError, match="was read from its files"):
        FilterAndRetrain.from_folder(packed).run()
    with pytest.raises(
        ExperimentError, match="it holds 'filter-and-retrain', 'linear-datamodeling-score', 'other'"
    ):
        FilterAndRetrain.from_folder(packed, "third")
    with pytest.raises(ExperimentError, match="is a file; a run needs a folder"):
        FilterAndRetrain(lm, train, results, Reads(), packed, **options)


def test_packing_replaces_nothing_unasked_and_leaves_nothing_out(lm, train, x, toy, tmp_path):
    folder = tmp_path / "run"
    make = lambda: FilterAndRetrain(
        lm, train, [result(train, x)], Reads(), folder, fractions=(0.25,), seeds=(0,)
    )
    with pytest.raises(ExperimentError, match="run\\(\\) first"):
        make().pack(tmp_path / "early.json")
    experiment = make().run(progress=False)
    packed = experiment.pack(tmp_path / "run.json")
    with pytest.raises(StorageError, match="exists already"):
        experiment.pack(packed)
    assert experiment.pack(packed, overwrite=True) == packed
    damaged = next(folder.glob("cells/*/[0-9a-f]*.json"))
    whole = damaged.read_text()
    damaged.write_text(whole[:40])
    with pytest.raises(ExperimentError, match="is damaged"):
        experiment.pack(tmp_path / "new.json")
    damaged.write_text(whole)
    (folder / "mine.json").write_text("{")
    with pytest.raises(ExperimentError, match="mine.json cannot be read"):
        experiment.pack(tmp_path / "new.json")
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"format": "other"}',
        lambda text: text.replace('"reads"', '"reeds"', 1),
        lambda text: text.replace('"unit":"units"', '"unit":"feet"', 1),
        lambda text: text.replace('"plans":', '"plants":'),
        lambda text: text.replace('"checksum":"', '"checksum":"0', 1),
        lambda text: "[" * 100_000,
        lambda text: "\x00" + text,
    ],
)
def test_a_damaged_packed_file_is_refused(damage, lm, train, x, toy, tmp_path):
    experiment = FilterAndRetrain(
        lm, train, [result(train, x)], Reads(), tmp_path / "run", fractions=(0.25,), seeds=(0,)
    )
    packed = experiment.run(progress=False).pack(tmp_path / "run.json")
    whole = packed.read_text()
    packed.write_text(damage(whole))
    assert packed.read_text() != whole
    with pytest.raises(ExperimentError, match="run.json"):
        FilterAndRetrain.from_folder(packed)


def test_packed_values_that_a_judge_could_not_have_said_are_refused(lm, train, x, toy, tmp_path):
    """Intact by its checksum, and still no evaluation: somebody made the file with a program of his own."""
    experiment = FilterAndRetrain(
        lm, train, [result(train, x)], Reads(), tmp_path / "run", fractions=(0.25,), seeds=(0,)
    )
    packed = experiment.run(progress=False).pack(tmp_path / "run.json")
    record = retraining.read_packed(packed)
    for parts in record["cells"].values():
        for name in set(parts) - {"training"}:
            parts[name] = {"format": "none"}
    packed.write_text(json.dumps(retraining.packed_record(record["plans"], record["cells"])))
    with pytest.raises(ExperimentError, match="run.json.*is damaged"):
        FilterAndRetrain.from_folder(packed).table


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("judges"),
        lambda plan: plan.update(entries=3),
        lambda plan: plan["entries"].append(7),
        lambda plan: plan.update(about=[]),
        lambda plan: plan["judges"].append({}),
    ],
)
def test_a_damaged_plan_is_refused(change, lm, train, x, toy, tmp_path):
    FilterAndRetrain(lm, train, [result(train, x)], Reads(), tmp_path, fractions=(0.25,), seeds=(0,)).run(
        progress=False
    )
    path = tmp_path / "filter-and-retrain.json"
    plan = json.loads(path.read_text())
    change(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(ExperimentError, match="is damaged"):
        FilterAndRetrain.from_folder(tmp_path)


def test_a_packed_comparison_shows_what_the_folder_shows(lm, train, x, tmp_path):
    concept = tensor_concept(
        torch.randn(lm.width, generator=torch.Generator().manual_seed(0)), layer=2, lm=lm, name="c"
    )
    scorers = {"mine": result(train, x, "mine"), "GradDot": GradDot(lm, train[:3])}
    comparison = MethodComparison(
        lm, train, scorers, tmp_path / "run", labels="label", concept=concept, n_random=7
    )
    with pytest.raises(ExperimentError, match="run\\(\\) first"):
        comparison.pack(tmp_path / "early.parquet")
    comparison.run(progress=False)
    for path in (comparison._path("Loss"), None):  # whole, and with a method that is not finished
        packed = comparison.pack(tmp_path / "run.parquet", overwrite=True)
        before, after = MethodComparison.from_folder(tmp_path / "run"), MethodComparison.from_folder(packed)
        pd.testing.assert_frame_equal(after.table, before.table, check_exact=True)
        pd.testing.assert_frame_equal(
            after.comparison().spearman, before.comparison().spearman, check_exact=True
        )
        assert after.remaining == before.remaining == ([] if path else ["Loss"])
        assert np.array_equal(after.null_scores().values, before.null_scores().values)
        for name, expected in before.attributions.items():
            found = after.attributions[name]
            assert np.array_equal(found.scores, expected.scores) and found.ids == expected.ids
            assert found.card.to_dict() == expected.card.to_dict()
        assert repr(after).replace(str(packed), str(tmp_path / "run")) == repr(before)
        if path:
            path.unlink()
    with pytest.raises(StorageError, match="exists already"):
        comparison.pack(packed)
    with pytest.raises(ExperimentError, match="no scorers"):
        MethodComparison.from_folder(packed).run()
    packed.write_bytes(packed.read_bytes()[:500])
    with pytest.raises(ExperimentError, match="run.parquet"):
        MethodComparison.from_folder(packed)
    result(train, x).save(tmp_path / "other.parquet")
    with pytest.raises(ExperimentError, match="no packed comparison"):
        MethodComparison.from_folder(tmp_path / "other.parquet")
