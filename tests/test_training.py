"""Training whole models: against plain torch, twice the same, killed and resumed, and replayed with examples
taken out, doubled and inserted."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from induction import config, copy_accuracy, mixture
from transformers import AutoModelForCausalLM

from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import load_documents, number_tokenizer, token_windows
from concept_tda.influence.neighbours import TracIn
from concept_tda.model.loading import load_model
from concept_tda.model.training import TrainingError, TrainingRecipe, load_run, replay, train

from tiny import tiny_model, tiny_pair

ROOT = Path(__file__).parent.parent
RECIPE = TrainingRecipe(steps=12, batch_size=4, learning_rate=3e-3, warmup_steps=3)


def windows(n=40, length=9, seed=0):
    return token_windows(torch.randint(0, 64, (n, length), generator=torch.Generator().manual_seed(seed)))


def weights(lm):
    return {name: value.detach().clone() for name, value in lm.model.named_parameters()}


def same(first, second):
    a, b = weights(first), weights(second)
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def run(tmp_path):
    return train(config(1), windows(), tmp_path / "run", RECIPE, every=4, progress=False)


@pytest.fixture
def exact(tmp_path):
    """The same in float64, whose bits of rounding Adam's square root does not blow up."""
    model = AutoModelForCausalLM.from_config(config(1)).double()
    lm = load_model((model, number_tokenizer(64)))
    return train(lm, windows(), tmp_path / "exact", RECIPE, every=4, progress=False)


def by_hand(run, factors=None, extra=None, stretch=(0, 10**9)):
    """The run again with torch alone: {name: weight} at its end."""
    lm, recipe, total = run.open(run.plan.start), run.recipe, run.total
    model = lm.model.train()
    for weight in model.parameters():
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=recipe.weight_decay)
    for done, rows in enumerate(run.plan.rows):
        rows = [row for row in rows if row >= 0]
        inside = stretch[0] <= done < stretch[1]
        rate = recipe.learning_rate * (
            (done + 1) / recipe.warmup_steps
            if done < recipe.warmup_steps
            else 1 - (done - recipe.warmup_steps) / (total - recipe.warmup_steps)
        )
        optimizer.param_groups[0]["lr"] = rate
        loss = 0.0
        for row in rows:
            ids = run.data[row].input_ids
            one = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])
            loss = loss + one * ((factors or {}).get(run.data.ids[row], 1.0) if inside else 1.0)
        for ids in (extra or {}).get(done, []):
            loss = loss + torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:])
        optimizer.zero_grad()
        (loss / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
    return weights(lm)


def close(lm, expected, atol=1e-9):
    for name, value in weights(lm).items():
        torch.testing.assert_close(value, expected[name], atol=atol, rtol=1e-7, msg=name)


def test_a_run_is_plain_adamw_over_the_recorded_order(exact):
    run = exact
    close(run.open(), by_hand(run))
    assert run.steps.step.tolist() == list(range(1, 13)) and run.checkpoints == [0, 4, 8, 12]
    counts = np.bincount(run.plan.rows[run.plan.rows >= 0], minlength=40)
    assert set(counts[:40]) == {1, 2} and counts.sum() == 48


def test_the_same_call_gives_the_same_bits_whatever_the_checkpoints(run, tmp_path):
    again = train(config(1), windows(), tmp_path / "b", RECIPE, every=5, progress=False)
    assert same(run.open(), again.open())
    seconds = ["seconds"]
    assert run.steps.drop(columns=seconds).equals(again.steps.drop(columns=seconds))
    other = train(
        config(1), windows(), tmp_path / "c", {"steps": 12, "batch_size": 4, "seed": 1}, progress=False
    )
    assert not np.array_equal(other.plan.rows, run.plan.rows) and not same(run.open(0), other.open(0))
    watched = train(
        config(1), windows(), tmp_path / "d", RECIPE, progress=False,
        watch={"norm": lambda lm: lm.model.get_input_embeddings().weight.norm()}, watch_every=6,
    )  # fmt: skip
    assert same(run.open(), watched.open())
    assert watched.steps.dropna().step.tolist() == [6, 12]
    expected = [run.open(12).model.get_input_embeddings().weight.norm().item()]
    assert watched.steps.norm.iloc[[11]].tolist() == pytest.approx(expected)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(run, tmp_path, monkeypatch):
    import concept_tda.model.training as training

    step = training._one_step

    def breaks(lm, data, batch, recipe, optimizer, done, total):
        if done == 6:
            raise KeyboardInterrupt
        return step(lm, data, batch, recipe, optimizer, done, total)

    monkeypatch.setattr(training, "_one_step", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(config(1), windows(), tmp_path / "b", RECIPE, every=2, progress=False)
    steps = []
    monkeypatch.setattr(training, "_one_step", lambda *a: steps.append(a[5]) or step(*a))
    again = train(config(1), windows(), tmp_path / "b", RECIPE, every=2, progress=False)
    assert steps == list(range(6, 12)) and same(run.open(), again.open())
    assert again.steps.loss.tolist() == run.steps.loss.tolist()
    steps.clear()
    train(config(1), windows(), tmp_path / "b", RECIPE, every=2, progress=False)
    assert not steps


def _train_slowly(folder):
    torch.set_num_threads(1)
    train(config(1), windows(), folder, {"steps": 150, "batch_size": 4}, every=1, progress=False)


def test_kill_9(tmp_path):
    context = multiprocessing.get_context("spawn")
    recipe = {"steps": 150, "batch_size": 4}
    whole = train(config(1), windows(), tmp_path / "whole", recipe, progress=False)
    killed = 0
    for attempt in range(2):
        process = context.Process(target=_train_slowly, args=(tmp_path / "b",))
        process.start()
        begun = time.time()
        before = len(list((tmp_path / "b").glob("checkpoints/*.safetensors")))
        while time.time() - begun < 60 and process.is_alive():
            if len(list((tmp_path / "b").glob("checkpoints/*.safetensors"))) > before + 15:
                os.kill(process.pid, 9)
                killed += 1
                break
            time.sleep(0.01)
        process.join()
    again = train(
        config(1), windows(), tmp_path / "b", {"steps": 150, "batch_size": 4}, every=1, progress=False
    )
    assert killed and same(whole.open(), again.open())


@pytest.mark.parametrize("stretch", [(0, 12), (4, 8), (5, 11)])
@pytest.mark.parametrize("mask", [None, "ones"])
def test_a_replay_with_an_empty_mask_is_the_run_bit_for_bit(run, tmp_path, stretch, mask):
    mask = dict.fromkeys(run.data.ids, 1.0) if mask == "ones" else mask
    first, last = stretch
    again = replay(run, tmp_path / "r", from_step=first, to_step=last, until=12, weights=mask, progress=False)
    assert same(run.open(), again.open())
    there = run.steps[run.steps.step > again.plan.start].loss.tolist()
    assert again.steps.loss.tolist() == there


def test_dropout_does_not_break_a_replay(tmp_path):
    noisy = config(1)
    noisy.resid_pdrop = noisy.embd_pdrop = noisy.attn_pdrop = 0.3
    run = train(noisy, windows(), tmp_path / "run", RECIPE, every=4, progress=False)
    assert same(run.open(), replay(run, tmp_path / "r", from_step=6, to_step=12, progress=False).open())


@pytest.mark.parametrize("factor", [0, 2, 0.5])
def test_a_replay_multiplies_losses_and_keeps_the_divisor(exact, tmp_path, factor):
    run = exact
    ids = [run.data.ids[row] for row in run.rows_between(2, 9)[:5]]
    again = replay(
        run,
        tmp_path / "r",
        from_step=2,
        to_step=9,
        until=12,
        weights=dict.fromkeys(ids, factor),
        progress=False,
    )
    close(again.open(), by_hand(run, dict.fromkeys(ids, factor), stretch=(2, 9)))
    assert not same(run.open(), again.open())


def test_taking_out_everything_leaves_only_momentum_and_decay(tmp_path):
    recipe = TrainingRecipe(steps=6, batch_size=4, weight_decay=0.0, schedule="constant")
    run = train(config(1), windows(), tmp_path / "run", recipe, every=1, progress=False)
    nothing = replay(
        run, tmp_path / "r", from_step=0, to_step=6, weights=dict.fromkeys(run.data.ids, 0), progress=False
    )
    assert same(run.open(0), nothing.open())


def test_inserted_examples_are_added_on_top(exact, tmp_path):
    run = exact
    new = windows(3, seed=9)
    again = replay(run, tmp_path / "r", from_step=4, to_step=10, until=12, insert=new, progress=False)
    extra = {4: [new[0].tokens], 6: [new[1].tokens], 8: [new[2].tokens]}
    close(again.open(), by_hand(run, extra=extra))
    assert again.data.ids == run.data.ids + new.ids
    nested = replay(again, tmp_path / "n", from_step=5, to_step=12, progress=False)
    assert same(nested.open(), again.open())
    opened = load_run(tmp_path / "r", [*run.data.conversations, *new])
    assert same(opened.open(), again.open()) and opened.fingerprint == again.fingerprint


def test_training_on_an_example_makes_it_likelier_and_taking_it_out_less_likely(tmp_path):
    data = windows(8, seed=3)
    recipe = TrainingRecipe(steps=16, batch_size=8, learning_rate=1e-2, schedule="constant")
    run = train(config(1), data, tmp_path / "run", recipe, progress=False)
    losses = {}
    for factor in (0, 1, 2):
        again = replay(
            run,
            tmp_path / str(factor),
            from_step=0,
            to_step=16,
            weights={data.ids[0]: factor},
            progress=False,
        )
        ids = data[0].tokens
        logits = again.open().model(ids[None]).logits[0, :-1]
        losses[factor] = torch.nn.functional.cross_entropy(logits, ids[1:]).item()
    assert losses[0] > losses[1] > losses[2]


def test_what_can_be_trained_on(tmp_path):
    lm = load_model(tiny_pair("llama"))
    before = lm.fingerprint
    documents = load_documents(["the sky is blue " * 20, "yes no maybe " * 20], window=32)
    recipe = {"steps": 3, "batch_size": 2}
    run = train(lm, documents, tmp_path / "a", recipe, progress=False)
    assert lm.fingerprint == before == run.open(0).fingerprint != run.open().fingerprint
    assert same(run.open(), load_run(tmp_path / "a", documents).open())
    chats = load_conversations([{"prompt": "a" * i, "response": "b" * i} for i in range(1, 9)])
    run = train(
        lm, chats, tmp_path / "b", {"epochs": 2, "batch_size": 3, "micro_batch_size": 1}, progress=False
    )
    assert run.plan.sizes.tolist() == [3, 3, 3, 3, 3, 1]
    parts = train(lm, chats, tmp_path / "c", {"epochs": 2, "batch_size": 3}, progress=False)
    close(run.open(), weights(parts.open()), atol=1e-4)
    scratch = train(
        tiny_model("gpt_neox").config,
        documents,
        tmp_path / "d",
        recipe,
        tokenizer=lm.tokenizer,
        progress=False,
    )
    assert scratch.open().tokenize(documents).ids == scratch.data.ids
    eager = scratch.open(attention="eager")
    assert eager.attention == "eager" and same(eager, scratch.open())
    double = load_model(tiny_pair("llama", dtype=torch.float64))
    assert train(double, documents, tmp_path / "e", recipe, progress=False).open().dtype == torch.float64
    assert load_run(tmp_path / "e", documents).open().dtype == torch.float64


def test_the_history_of_a_run_is_what_tracin_takes(run):
    history = run.history()
    assert [one().fingerprint for one in history["checkpoints"]] == [
        run.open(s).fingerprint for s in (4, 8, 12)
    ]
    recorded = run.steps.set_index("step").learning_rate
    assert history["learning_rates"] == [recorded[step] for step in (4, 8, 12)]
    result = TracIn(queries=run.data.conversations[:2], **run.history()).score(run.data)
    assert np.isfinite(result.scores).all()


def test_mistakes_are_named(run, tmp_path):
    ask = dict(from_step=2, to_step=6, progress=False)
    ids = run.data.ids
    early = {ids[row] for row in run.rows_between(2, 6)}
    late = next(id for id in ids if id not in early)
    for said, options in (
        ("no stretch of this run", {"from_step": 6}), ("no stretch", {"to_step": 13}),
        ("no stretch", {"from_step": -1}), ("none of the 1 examples", {"weights": {late: 0}}),
        ("not in the data", {"weights": {"x": 0}}), ("multiplied with", {"weights": {ids[0]: "0"}}),
        ("multiplied with", {"weights": {ids[0]: float("nan")}}),
        ("lies before to_step", {"until": 5}), ("every must be", {"every": 0}),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=said):
            replay(run, tmp_path / "r", **{**ask, **options})
    assert not (tmp_path / "r").exists()
    run.path_of(0).unlink()
    run.path_of(4).unlink()
    with pytest.raises(TrainingError, match="no checkpoint at or before step 2"):
        replay(run, tmp_path / "r", **ask)
    with pytest.raises(TrainingError, match="no checkpoint after step 4; there are: 8, 12"):
        run.open(4)
    for said, recipe in (
        ("learning_rate must be a positive", {"learning_rate": 0}), ("batch_size", {"batch_size": 0}),
        ("schedule must be one of", {"schedule": "x"}), ("has no 'lr'", {"lr": 1}),
        ("steps must be", {"steps": 0}),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=said):
            train(config(1), windows(), tmp_path / "x", recipe, progress=False)
    with pytest.raises(TrainingError, match="33 tokens and .* reads 32"):
        train(config(1), windows(length=33), tmp_path / "x", progress=False)
    with pytest.raises(TrainingError, match="no tokenizer"):
        train(config(1), load_documents(["a" * 600]), tmp_path / "x", progress=False)
    with pytest.raises(TrainingError, match="another training; different: recipe"):
        train(
            config(1),
            windows(),
            tmp_path / "run",
            {"steps": 12, "batch_size": 4, "learning_rate": 1.0},
            progress=False,
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(TrainingError, match="already holds something else"):
        train(config(1), windows(), tmp_path / "full", RECIPE, progress=False)
    with pytest.raises(TrainingError, match="other data"):
        load_run(tmp_path / "run", windows(seed=5))
    (tmp_path / "run" / "checkpoints" / "step-0000012.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match="Delete it: the run goes on"):
        run.open()
    with pytest.raises(TrainingError, match="the loss is .* at step|the gradient is"):
        train(
            config(1),
            windows(),
            tmp_path / "y",
            {"steps": 40, "learning_rate": 1e30, "clip": None},
            progress=False,
        )


@pytest.mark.slow
def test_two_layers_learn_to_copy_at_random_periods_in_a_jump_and_one_layer_never_does(tmp_path):
    recipe = TrainingRecipe(
        steps=600, batch_size=64, learning_rate=3e-3, warmup_steps=100, schedule="constant"
    )
    data = mixture(recipe.steps * recipe.batch_size, seed=0)
    options = dict(every=100, watch={"copy": copy_accuracy}, watch_every=50, progress=False)
    two = train(config(2), data, tmp_path / "two", recipe, **options).steps.set_index("step")["copy"].dropna()
    one = train(config(1), data, tmp_path / "one", recipe, **options).steps.set_index("step")["copy"].dropna()
    assert two.loc[:200].max() < 0.15 and two.loc[600] > 0.9
    assert one.max() < 0.15


def test_the_tutorial_writes_out_the_sequences_and_models_of_the_benchmark():
    cells = json.loads((ROOT / "nbs/tutorials/where_does_an_induction_head_come_from.ipynb").read_text())[
        "cells"
    ]
    source = {cell["id"]: "".join(cell["source"]) for cell in cells}
    page = {}
    for code in (source["imports"], source["data"], source["trap"].partition("same_period =")[0]):
        exec(code, page)
    theirs, ours = page["sequences"](60, seed=3), mixture(60, seed=3)
    assert [one.tokens.tolist() for one in theirs] == [one.tokens.tolist() for one in ours]
    assert [one.metadata["kind"] for one in theirs] == [one.metadata["kind"] for one in ours]
    assert page["model"](2).to_dict() == config(2).to_dict()
