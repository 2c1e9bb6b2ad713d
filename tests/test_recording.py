"""A training by transformers' own Trainer, recorded, against what the trainer was seen to do; and what reads
the folder."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from concept_tda.data.batches import batches
from concept_tda.data.conversations import bundled
from concept_tda.influence.neighbours import LESS, AdamMoments, TracIn, recorded_moments
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.runs import RunError, TrainingInfluence
from concept_tda.influence.scorers import GradDot, ScorerError
from concept_tda.model.finetuning import run_segments, training_checkpoints, training_record
from concept_tda.model.loading import LanguageModel, load_model
from concept_tda.model.losses import token_losses
from concept_tda.model.recording import RecordingError, TrainingRecorder
from concept_tda.model.sites import resolve_sites

from tiny import double_norms, tiny_pair

N = 11
SHORT = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    num_train_epochs=2,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
    use_cpu=True,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def train():
    return bundled("sycophancy")[:N]


class Spy(TrainerCallback):
    """What the trainer does, seen from another side: weights after each step, and the live optimiser."""

    def on_step_end(self, args, state, control, **kwargs):
        self.optimizer, self.model = kwargs["optimizer"], kwargs["model"]
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}


def trained(folder, train, adapter=True, recorder=None, lm=None, lora=None, **options):
    """Train, and return the base model, the spy, the trainer and the row numbers as the collator saw them."""
    base = lm or LanguageModel(*tiny_pair("llama"), "tiny")
    model, data = base.model, base.tokenize(train)
    rows = [
        {
            "input_ids": item.input_ids,
            "labels": torch.where(item.response_mask, item.input_ids, -100),
            "row": row,
        }
        for row, item in enumerate(data)
    ]
    recorder = recorder or TrainingRecorder(folder, base, checkpoints=2, ids=train.ids)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **(lora or {})))
    seen = []

    def collate(batch):
        seen.append([one["row"] for one in batch])
        ids = torch.nn.utils.rnn.pad_sequence([one["input_ids"] for one in batch], batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(
            [one["labels"] for one in batch], batch_first=True, padding_value=-100
        )
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(one["input_ids"]) for one in batch], batch_first=True
        )
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    settings = SHORT | {"remove_unused_columns": False} | options
    arguments = TrainingArguments(str(folder.parent / "out"), **settings)
    spy = Spy()
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows, callbacks=[recorder, spy])
    trainer.train()
    return base, spy, trainer, seen


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "recorded"
    return folder, *trained(folder, train)


def test_order_rates_and_losses_are_those_of_the_trainer(run, train):
    folder, base, spy, trainer, seen = run
    record = training_record(folder)
    steps = record["steps"]
    assert len(steps) == trainer.state.global_step == 6  # 11 rows, 4 in a step, 2 epochs
    assert sorted(sum(steps.rows[:3], [])) == sorted(sum(steps.rows[3:], [])) == list(range(N))
    assert sum(steps.rows, []) == sum(seen, [])  # as the collator saw them
    assert steps.rows[0] != sorted(steps.rows[0]) or steps.rows[1] != sorted(steps.rows[1])  # shuffled
    assert steps.examples.tolist() == [4, 4, 3, 4, 4, 3]
    np.testing.assert_allclose(steps.learning_rate, [1e-3 * (1 - i / 6) for i in range(6)], rtol=1e-9)
    logged = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    np.testing.assert_allclose(steps.loss, logged)
    assert (
        record["ids"] == train.ids
        and record["key"]["base_fingerprint"] == load_model(tiny_pair("llama")).fingerprint
    )


def test_checkpoints_and_moments_are_those_of_the_moment(run):
    folder, base, spy, trainer, _ = run
    lm = load_model(tiny_pair("llama"))
    history = training_checkpoints(folder, lm)
    last = history["checkpoints"][-1]()
    for name, weight in spy.weights.items():
        assert torch.equal(dict(last.model.named_parameters())[name], weight)
    sites = resolve_sites(last, "lora")
    found = recorded_moments(folder)[-1](last, sites)
    wanted = AdamMoments.from_optimizer(
        spy.optimizer, resolve_sites(LanguageModel(spy.model, lm.tokenizer, "t"), "lora")
    )
    assert found.step == wanted.step == 6 and found.betas == wanted.betas
    for name in wanted.second:
        assert torch.equal(found.first[name], wanted.first[name]) and wanted.first[name].any()
        assert torch.equal(found.second[name], wanted.second[name])


def test_tracin_and_less_read_it(run, train):
    folder = run[0]
    lm, shown = load_model(tiny_pair("llama")), train[:2]
    history = training_checkpoints(folder, lm)
    assert len(history["checkpoints"]) == 2
    found = TracIn(queries=shown, sites="lora", **history).score(train, progress=False)
    wanted = sum(
        rate * GradDot(open_one(), shown, sites="lora").score(train, progress=False).scores
        for rate, open_one in zip(history["learning_rates"], history["checkpoints"])
    )
    np.testing.assert_allclose(found.scores, wanted, rtol=1e-4, atol=1e-7)
    less = LESS(queries=shown, sites="lora", moments=recorded_moments(folder), projection=None, **history)
    estimated = [lambda lm, sites: AdamMoments.estimate(lm, train, sites)] * 2
    other = LESS(queries=shown, sites="lora", moments=estimated, projection=None, **history)
    scores, guessed = (one.score(train, progress=False).scores for one in (less, other))
    assert (np.abs(scores) <= 1 + 1e-6).all() and not np.allclose(scores, guessed)


def in_float64():
    model, tokenizer = tiny_pair("llama", dtype=torch.float64)
    return LanguageModel(double_norms(model), tokenizer, "tiny")


@pytest.mark.parametrize("options", [{}, dict(weight_decay=0.1, adam_beta2=0.95, max_grad_norm=0.05)])
def test_a_recorded_run_is_repeated_to_the_end_and_differentiated(train, tmp_path, options):
    base, spy, *_ = trained(tmp_path / "r", train, lm=in_float64(), **options)
    scorer = TrainingInfluence(in_float64(), LossQuery(train[:2]), run=tmp_path / "r", smoothing=0)
    run = scorer.repeated(scorer.lm.tokenize(train), 10**6)
    zero = torch.zeros_like(run.beginning_P)
    run.lm.model.train()
    *_, (state, gradient_P) = run.walked(0, len(run.steps), (run.beginning_P, zero, zero))
    end = run.after(len(run.steps) - 1, *state, gradient_P)
    theirs = torch.cat([spy.weights[name].flatten() for name in run.names])
    assert float((theirs - run.beginning_P).abs().max()) > 1e-3
    torch.testing.assert_close(end[0], theirs, rtol=0, atol=1e-6)
    result = scorer.score(train, progress=False)
    shared = scorer.by_rate / N
    for row in (0, 7):
        measured = slope(lambda weight, row=row: value_after(scorer, train, {row: weight}))
        np.testing.assert_allclose(result.scores[row] - shared, measured, rtol=5e-4, atol=1e-8)
    measured = slope(lambda rate: value_after(scorer, train, rate=rate))
    np.testing.assert_allclose(scorer.by_rate, measured, rtol=5e-4)
    assert "transformers.Trainer" in " ".join(result.card.notes) and result.card.effect == -1


def slope(of, step=1e-4):
    return (of(1 + step) - of(1 - step)) / (2 * step)


def value_after(scorer, train, weights=None, rate=1.0):
    """The query after the recorded steps by torch's optimiser, some examples weighted: a second way there."""
    run, told = scorer.repeated(scorer.lm.tokenize(train), 10**6), scorer.settings["recorded"]
    optimizer = torch.optim.AdamW(
        run.parameters,
        lr=1.0,
        betas=told["betas"][0],
        eps=told["eps"][0],
        weight_decay=told["weight_decay"][0],
    )
    for rows, one_rate in zip(told["rows"], told["rates"]):
        optimizer.param_groups[0]["lr"] = rate * one_rate
        optimizer.zero_grad()
        batch = next(batches(run.data, rows=rows, token_budget=10**6))
        by_row = torch.tensor([(weights or {}).get(row, 1.0) for row in batch.rows.tolist()])
        losses_BT = token_losses(run.lm, batch)
        counted = sum(int(run.data[row].response_mask[1:].sum()) for row in rows)
        ((by_row.double() * losses_BT.sum(1)).sum() / counted).backward()
        torch.nn.utils.clip_grad_norm_(run.parameters, told["max_grad_norm"])
        optimizer.step()
    run.lm.model.eval()
    return scorer.query.value(run.lm)


def test_a_run_that_ends_elsewhere_is_not_differentiated(run, train, tmp_path):
    lm = load_model(tiny_pair("llama"))
    fine = TrainingInfluence(lm, LossQuery(train[:2]), run=run[0])
    assert np.isfinite(fine.score(train, progress=False).scores).all()  # in the float32 it was trained in
    fine.settings["recorded"]["rates"][2] *= 1.5  # as if the record were of another run
    with pytest.raises(RunError, match="ends .*% of its way from the recorded weights"):
        fine.score(train, progress=False)
    with pytest.raises(RunError, match="other examples"):
        TrainingInfluence(lm, LossQuery(train[:2]), run=run[0]).score(train.select(np.arange(N)[::-1]))
    trained(tmp_path / "sgd", train, num_train_epochs=1, lora=dict(lora_dropout=0.3))
    with pytest.raises(RunError, match="was there dropout"):
        TrainingInfluence(lm, LossQuery(train[:2]), run=tmp_path / "sgd").score(train, progress=False)


def test_segments_of_a_recorded_run_begin_with_its_adapters(run):
    lm = load_model(tiny_pair("llama"))
    pieces = run_segments(run[0], lm)
    np.testing.assert_allclose(
        sum(pieces["learning_rates"]), sum(training_record(run[0])["steps"].learning_rate)
    )
    beginning = dict(pieces["checkpoints"][0]().model.named_parameters())
    last = dict(pieces["checkpoints"][-1]().model.named_parameters())
    names = [name for name in beginning if "lora_B" in name]
    assert len(names) == 4 and all(not beginning[name].any() and last[name].any() for name in names)


def test_a_whole_model(train, tmp_path):
    _, spy, _, _ = trained(tmp_path / "r", train, adapter=False, num_train_epochs=1)
    history = training_checkpoints(tmp_path / "r")
    last = load_model(history["checkpoints"][-1])
    for name, weight in spy.weights.items():
        assert torch.equal(dict(last.model.named_parameters())[name], weight)
    found = TracIn(queries=train[:2], **history).score(train, progress=False)
    assert np.isfinite(found.scores).all()
    assert len(run_segments(tmp_path / "r", load_model(tiny_pair("llama")))["checkpoints"]) == 3
    with pytest.raises(RunError, match="without the adapters it started with"):
        TrainingInfluence(load_model(tiny_pair("llama")), LossQuery(train[:2]), run=tmp_path / "r")
    moments = recorded_moments(tmp_path / "r")[-1](last, resolve_sites(last, "attention"))
    assert moments.step == 3
    again = training_checkpoints(tmp_path / "r", load_model(tiny_pair("llama")))  # the base does no harm
    assert again["checkpoints"] == history["checkpoints"]


def test_a_dropped_last_batch_is_in_no_step(train, tmp_path):
    _, _, trainer, seen = trained(tmp_path / "r", train, dataloader_drop_last=True)
    steps = training_record(tmp_path / "r")["steps"]
    assert len(steps) == trainer.state.global_step == 6
    assert sum(steps.rows, []) == sum(seen, []) and steps.examples.tolist() == [4, 4, 2, 4, 4, 2]


def test_rows_that_are_not_those_of_the_ids(train, tmp_path):
    model, tokenizer = tiny_pair("llama")
    recorder = TrainingRecorder(tmp_path / "r", LanguageModel(model, tokenizer, "tiny"), ids=train.ids[1:])
    with pytest.raises(RecordingError, match="has 11 rows and there are 10 ids.*packing"):
        trained(tmp_path / "r", train, recorder=recorder)
    assert not (tmp_path / "r").exists()


def sft(folder, train, **options):
    """A training by TRL's own trainer, recorded: spy, trainer and the batches as the collator saw them."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    model, tokenizer = tiny_pair("llama")
    texts = [one.messages for one in train]
    told = lambda messages: [{"role": one["role"], "content": one["content"]} for one in messages]
    rows = [{"prompt": told(one[:-1]), "completion": told(one[-1:])} for one in texts]
    recorder = TrainingRecorder(folder, LanguageModel(model, tokenizer, "tiny"), checkpoints=2, ids=train.ids)
    settings = SHORT | {"bf16": False, "max_length": 512} | options
    arguments = trl.SFTConfig(str(folder.parent / "out"), **settings)
    spy, seen = Spy(), []
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        callbacks=[recorder, spy],
    )
    collate = trainer.data_collator

    def noted(batch):
        seen.append([one["input_ids"] for one in batch])
        return collate(batch)

    trainer.data_collator = noted
    trainer.train()
    return spy, trainer, seen


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_training_by_trl(train, tmp_path):
    """Rows, rates, weights and moments are those that TRL's trainer saw; row n is example n of the data."""
    folder = tmp_path / "r"
    spy, trainer, seen = sft(folder, train)
    record = training_record(folder)
    steps = record["steps"]
    assert record["ids"] == train.ids and steps.examples.tolist() == [4, 4, 3, 4, 4, 3]
    np.testing.assert_allclose(steps.learning_rate, [1e-3 * (1 - i / 6) for i in range(6)], rtol=1e-9)
    logged = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    np.testing.assert_allclose(steps.loss, np.array(logged, float), rtol=1e-3)
    lm = load_model(tiny_pair("llama"))
    own = [item.input_ids.tolist() for item in lm.tokenize(train)]
    texts = [list(ids) for batch in seen for ids in batch]
    for ids, row in zip(texts, sum(steps.rows, []), strict=True):
        shared = min(len(ids), len(own[row]))  # TRL may end a text with one token more or less
        assert shared > 20 and ids[: shared - 2] == own[row][: shared - 2]
    last = training_checkpoints(folder, lm)["checkpoints"][-1]()
    for name, weight in spy.weights.items():
        assert torch.equal(dict(last.model.named_parameters())[name], weight)
    found = recorded_moments(folder)[-1](last, resolve_sites(last, "lora"))
    assert found.step == 6 and all(one.any() for one in found.second.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_rows_that_trl_has_packed_or_dropped(train, tmp_path):
    with pytest.raises(RecordingError, match="11 ids.*packing"):
        sft(tmp_path / "a", train, packing=True, packing_strategy="wrapped")
    lm = load_model(tiny_pair("llama"))
    begins = sorted(int(item.response_mask.int().argmax()) for item in lm.tokenize(train))  # of the answers
    with pytest.raises(RecordingError, match="11 ids.*without a token to learn"):
        sft(tmp_path / "b", train, max_length=begins[N // 2])  # half of them are cut off whole


def test_what_cannot_be_recorded(run, train, tmp_path):
    with pytest.raises(RecordingError, match="another folder"):
        TrainingRecorder(run[0], run[1])
    with pytest.raises(RecordingError, match="adamw_torch"):
        trained(tmp_path / "a", train, optim="adafactor")
    with pytest.raises(ScorerError, match="no Adam moments of these sites"):
        lm = load_model(tiny_pair("llama"))
        last = training_checkpoints(run[0], lm)["checkpoints"][-1]()
        recorded_moments(run[0])[-1](last, resolve_sites(last, "attention"))
    recorder = TrainingRecorder(tmp_path / "b", run[1])
    with pytest.raises(RecordingError, match="2 processes"):
        recorder.on_train_begin(type("A", (), {"world_size": 2}), None, None)


def test_a_training_without_its_beginning_and_a_second_one_are_refused(train, tmp_path):
    out = tmp_path / "out"
    *_, trainer, _ = trained(tmp_path / "a", train, save_strategy="steps", save_steps=2)
    before = (tmp_path / "a" / "training.json").read_bytes()
    with pytest.raises(RecordingError, match="another recorder"):
        trainer.train()
    assert (tmp_path / "a" / "training.json").read_bytes() == before
    recorder = TrainingRecorder(tmp_path / "b", LanguageModel(*tiny_pair("llama"), "tiny"), ids=train.ids)
    trainer.remove_callback(TrainingRecorder)
    trainer.add_callback(recorder)
    with pytest.raises(RecordingError, match="goes on after step 2"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_a_try_that_is_repeated_with_smaller_batches_is_recorded_as_it_went(train, tmp_path):
    """What auto_find_batch_size does after a lack of memory."""

    class Full(TrainingRecorder):
        tries = []

        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self.tries.append(state.train_batch_size)

        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 2 and len(self.tries) == 1:
                raise RuntimeError("CUDA out of memory.")

    base = LanguageModel(*tiny_pair("llama"), "tiny")
    recorder = Full(tmp_path / "a", base, checkpoints=2, ids=train.ids)
    options = dict(auto_find_batch_size=True, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    *_, trainer, seen = trained(tmp_path / "a", train, recorder=recorder, **options)
    steps = training_record(tmp_path / "a")["steps"]
    assert len(recorder.tries) == 2 and recorder.tries[1] < 4 and len(steps) == trainer.state.global_step
    assert max(map(len, steps.rows)) == recorder.tries[1]
    assert steps.rows.tolist() == seen[-len(steps) :]
