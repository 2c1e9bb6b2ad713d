"""A circuit over a run, and a run without its examples: against scores by hand, and bit for bit."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import GPT2Config

from concept_tda.data.documents import token_windows
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.scorers import Influence
from concept_tda.mechanisms.circuits import CircuitError, head_scores, random_sequences, repeated_sequences
from concept_tda.mechanisms.emergence import (
    ARMS,
    INSERTING,
    EmergenceExperiment,
    EmergenceResult,
    circuit_curves,
    icl_score,
    plot_curves,
    plot_emergence,
)
from concept_tda.model.training import TrainingRecipe, load_run, train


def config(attention="eager"):
    return GPT2Config(
        vocab_size=24,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_inner=8,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder, random = tmp_path_factory.mktemp("emergence"), np.random.default_rng(0)
    data = token_windows([torch.from_numpy(random.choice(24, 12, replace=False)) for _ in range(64)])
    recipe = TrainingRecipe(steps=12, batch_size=8, learning_rate=3e-3, schedule="constant")
    run = train(config(), data, folder / "run", recipe, every=4, progress=False)
    loops = repeated_sequences(run.lm, 4, 6)
    chosen = data.select(run.rows_between(4, 8))
    scorer = Influence(run.open(4), LossQuery(loops), curvature="identity")
    return run, data, loops, scorer.score(chosen, progress=False), folder


def test_curves_are_the_scores_of_each_checkpoint(prepared):
    run, _, loops, _, _ = prepared
    curves = circuit_curves(run, loops, between=(3, 9))
    assert curves.steps.tolist() == [4, 8]
    for row, step in enumerate(curves.steps):
        lm = run.open(int(step), attention="eager")
        np.testing.assert_allclose(curves.induction[row], head_scores(lm, loops))
        np.testing.assert_allclose(curves.previous_token[row], head_scores(lm, loops, "previous_token"))
    block, number = curves.strongest()
    assert curves.induction[-1, block, number] == curves.induction[-1].max()
    assert curves.table[f"induction {block}.{number}"].tolist() == curves.induction[:, block, number].tolist()
    assert len(plot_curves(curves).axes[0].lines) == 4 + 2


def test_icl_score_is_a_difference_of_losses(prepared):
    run, _, loops, _, _ = prepared
    lm, expected = run.open(), []
    for window in loops:
        logits = lm.model(window.tokens[None]).logits[0].double().log_softmax(-1)
        losses = -logits[:-1].gather(1, window.tokens[1:, None])[:, 0]  # losses[t - 1] of token t
        expected.append((losses[9 - 1] - losses[: 5 - 1].mean()).item())
    assert icl_score(lm, loops, early=5, late=9) == pytest.approx(np.mean(expected), abs=1e-5)


def test_untouched_arm_is_the_run_and_each_arm_its_own(prepared):
    run, _, loops, scores, folder = prepared
    experiment = EmergenceExperiment(folder / "a", [run], [scores], (4, 8), loops, fraction=0.25, every=4)
    result = experiment.run(progress=False)
    again = experiment.run(progress=False)
    pd.testing.assert_frame_equal(result.curves, again.curves)
    assert set(result.table.arm) == set(ARMS) and len(result.curves) == 5 * 2
    full = {name: weight for name, weight in run.open().model.named_parameters()}
    top = set(np.array(scores.conversations.ids)[np.argsort(-scores.scores)][:8])
    assert len(scores.scores) == 32
    assert ARMS["duplicated"] == 2 and ARMS["deleted"] == 0
    for arm, factor in ARMS.items():
        there = load_run(folder / "a" / f"seed-0-{arm}", run.data.conversations)
        weights = there.plan.weights
        changed = [
            (step, run.data.ids[row])
            for step, (rows, given) in enumerate(zip(there.plan.rows, weights), there.plan.start)
            for row, one in zip(rows, given)
            if one != 1
        ]
        same = all(torch.equal(weight, full[name]) for name, weight in there.open().model.named_parameters())
        assert same == (arm == "full")
        assert set(weights.flatten()) <= {1.0, factor}
        if arm == "full":
            assert not changed
            continue
        assert {step for step, _ in changed} <= set(range(4, 8)) and len({id for _, id in changed}) == 8
        assert ({id for _, id in changed} == top) == (not arm.startswith("random"))


def test_inserted_arms_add_each_new_example_once_within_the_window_and_change_nothing_else(prepared):
    run, _, loops, scores, folder = prepared
    insert = {
        "inserted": repeated_sequences(run.lm, 6, 6, seed=3),
        "random_inserted": random_sequences(run.lm, 6, 12),
    }
    arms = ("full", *INSERTING)
    experiment = EmergenceExperiment(
        folder / "b", [run], [scores], (4, 8), loops, fraction=0.25, every=4, arms=arms, insert=insert
    )
    assert set(experiment.run(progress=False).table.arm) == set(arms)
    n, ends = len(run.data), {}
    for arm in INSERTING:
        both = [*run.data.conversations, *insert[arm]]
        there = load_run(folder / "b" / f"seed-0-{arm}", token_windows([one.tokens for one in both]))
        added = [
            (step, row - n)
            for step, rows in enumerate(there.plan.rows, there.plan.start)
            for row in rows
            if row >= n
        ]
        assert sorted(row for _, row in added) == list(range(6)) and {step for step, _ in added} <= set(
            range(4, 8)
        )
        before = run.plan.rows[there.plan.start :]
        assert (
            np.array_equal(there.plan.rows[:, : before.shape[1]], before) and (there.plan.weights == 1).all()
        )
        assert np.array_equal(there.plan.sizes, run.plan.sizes[there.plan.start :])
        shown = {tuple(there.data[n + row].input_ids.tolist()) for row in range(6)}
        assert shown == {tuple(one.tokens.tolist()) for one in insert[arm]}
        ends[arm] = there.open().fingerprint
    assert len({*ends.values(), run.open().fingerprint}) == 3


def test_arms_follow_what_is_there_to_insert(prepared, tmp_path):
    run, _, loops, scores, _ = prepared
    new = repeated_sequences(run.lm, 2, 6)
    plain = EmergenceExperiment(tmp_path, [run], [scores], (4, 8), loops)
    more = EmergenceExperiment(tmp_path, [run], [scores], (4, 8), loops, insert={"inserted": new})
    assert plain.arms == tuple(ARMS) and more.arms == (*ARMS, "inserted")


def curves_of(emergence):
    "Curves that reach .4 at the given steps, by arm; a row of steps for each seed."
    steps = np.arange(0, 110, 10)
    return pd.concat(
        pd.DataFrame(dict(step=steps, induction=np.where(steps >= at, 0.5, 0.1), icl=0.0, seed=seed, arm=arm))
        for arm, row in emergence.items()
        for seed, at in enumerate(row)
    )


def test_beyond_random_is_two_standard_deviations_of_the_control():
    arms = {
        "full": (20, 30, 40),
        "random_deleted": (30, 50, 60),  # 10, 20, 20 later: mean 16.7, sd 5.8
        "deleted": (50, 60, 70),  # 30, 30, 30
        "random_duplicated": (20, 40, 40),  # 0, 10, 0: mean 3.3, sd 5.8
        "duplicated": (10, 20, 30),  # 10 sooner, 13.3 from the control
        "inserted": (20, 20, 20),
    }
    result = EmergenceResult(curves_of(arms), 0.4, (0, 50))
    against = result.against_random()
    assert list(against.index) == ["deleted", "duplicated"], (
        "an arm without its control is compared with nothing"
    )
    assert against.later["deleted"] == 30 and against.random["deleted"] == pytest.approx(50 / 3)
    assert against["2 sd"]["deleted"] == pytest.approx(2 * np.std([10, 20, 20], ddof=1))
    assert against.beyond["deleted"] and against.beyond["duplicated"], "sooner counts as well as later"
    close = EmergenceResult(curves_of(arms | {"deleted": (40, 50, 60)}), 0.4, (0, 50)).against_random()
    assert not close.beyond["deleted"], "20 later, 3.3 from the control, is within"


def test_emergence_is_the_first_step_at_the_threshold():
    steps, frames = [10, 20, 30], []
    for arm, seed, values in (
        ("full", 0, (0.1, 0.4, 0.2)),
        ("deleted", 0, (0.1, 0.2, 0.9)),
        ("full", 1, (0.5, 0.5, 0.5)),
        ("deleted", 1, (0.1, 0.1, 0.39)),
    ):
        frames.append(pd.DataFrame(dict(step=steps, induction=values, icl=0.0, seed=seed, arm=arm)))
    result = EmergenceResult(pd.concat(frames), 0.4, (0, 30))
    found = result.table.set_index(["arm", "seed"]).emergence
    assert found["full", 0] == 20 and found["deleted", 0] == 30 and found["full", 1] == 10
    assert np.isnan(found["deleted", 1]), "never is not the last step"
    delays = result.delays().loc["deleted"]
    assert (delays["mean"], delays["seeds"], delays["never"]) == (10, 1, 1)
    assert plot_emergence(result).axes[0].get_legend() is not None


def test_errors_say_what_to_do(prepared, tmp_path):
    run, data, loops, scores, _ = prepared

    def experiment(runs=(run,), given=(scores,), window=(4, 8), **options):
        return EmergenceExperiment(tmp_path / "x", list(runs), list(given), window, loops, **options)

    fast = train(config("sdpa"), data, tmp_path / "fast", TrainingRecipe(steps=2), progress=False)
    cases = [
        (lambda: circuit_curves(run, loops, between=(5, 7)), "no checkpoint between steps 5 and 7"),
        (lambda: icl_score(run.open(), loops), "do not fit windows of 12"),
        (lambda: icl_score(run.open(), loops, early=1, late=5), "two or more"),
        (lambda: experiment(given=()), "1 runs and 0 scores"),
        (lambda: experiment(arms=("full", "burnt")), "no arm burnt"),
        (lambda: experiment(insert={"added": loops}), "no arm added"),
        (lambda: experiment(arms=("inserted",)), "nothing to insert in the arm inserted"),
        (
            lambda: experiment(insert={"inserted": loops, "random_inserted": loops[:2]}),
            "4 for inserted and 2",
        ),
        (lambda: experiment(runs=[fast]), "attn_implementation"),
        (lambda: experiment(window=(0, 8)).run(progress=False), "have no score"),
        (lambda: experiment(fraction=0.001).run(progress=False), "takes some and leaves some"),
    ]
    for act, message in cases:
        with pytest.raises(CircuitError, match=message):
            act()
