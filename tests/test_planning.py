"""plan() prices the job it is asked about and disturbs nothing; what fails in its dry run is named."""

import html
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import number_tokenizer, token_windows
from concept_tda.influence import planning
from concept_tda.influence.baselines import BM25, RandomScore
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.neighbours import Cascade
from concept_tda.influence.planning import PlanError, plan, plan_training
from concept_tda.influence.scorers import ConceptInfluence, GradDot, InfluenceFunction, VectorFilter
from concept_tda.model import training
from concept_tda.model.loading import load_model
from concept_tda.model.losses import GradientError
from concept_tda.model.training import TrainingError, TrainingRecipe, first_plan

from tiny import tiny_pair


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def train():
    return load_conversations(
        [{"prompt": f"Is {i} larger?", "response": "No. " * (1 + i % 5)} for i in range(30)]
    )


def concept_of(lm):
    return tensor_concept(torch.ones(lm.width), layer=1, lm=lm, name="size")


def test_plan(train, tmp_path):
    lm = load_model(tiny_pair("llama"))
    weights = lm.fingerprint
    scorers = [
        VectorFilter(lm, concept_of(lm)),
        ConceptInfluence(lm, concept_of(lm), train[:2]),
        RandomScore(),
        BM25(train[:1]),
    ]
    estimate = plan(scorers, train)
    data = lm.tokenize(train)
    assert (
        (estimate.examples, estimate.tokens) == (30, data.n_tokens)
        and estimate.fits
        and estimate.check() is estimate
    )
    assert (
        estimate.seconds > 0 and estimate.fit_seconds > 0 and estimate.peak_memory > 0 and estimate.disk > 0
    )
    assert "tokens/s" in repr(estimate) and "fits" in repr(estimate) and "<table>" in estimate._repr_html_()
    assert (
        lm.fingerprint == weights
        and not any(m._forward_hooks for m in lm.model.modules())
        and all(p.requires_grad for p in lm.model.parameters())
    )
    assert (
        not list((tmp_path / "cache").rglob("*.safetensors")) and scorers[1].curvature == "ekfac"
    )  # nothing was fitted or kept
    fitted = InfluenceFunction(lm, train[:2], curvature=EKFAC.fit(lm, train, progress=False))
    assert plan([fitted], train).fit_seconds == 0
    assert plan([fitted], train, tokens=True).disk > plan([fitted], train).disk
    with pytest.raises(PlanError, match="token_budget=256"):
        replace(estimate, peak_memory=2**50, advice=["token_budget=256"]).check()


def test_plan_says_which_setting_would_fit(train, monkeypatch):
    lm = load_model(tiny_pair("llama"))
    monkeypatch.setattr(planning, "peak_memory", lambda device: 2**60)
    estimate = plan([ConceptInfluence(lm, concept_of(lm), train[:2])], train, token_budget=1024)
    assert not estimate.fits
    with pytest.raises(PlanError, match="token_budget=256.*fewer sites"):
        estimate.check()


def test_bfloat16_is_priced_by_the_measured_product(train, monkeypatch):
    lm = load_model(tiny_pair("llama", dtype=torch.bfloat16))
    monkeypatch.setattr(planning, "bfloat16_ratio", lambda device: 71.0)
    estimate = replace(plan([VectorFilter(lm, concept_of(lm))], train), seconds=7100.0, fit_seconds=0.0)
    assert estimate.slowdown == 71.0
    for shown in (repr(estimate), estimate._repr_html_()):
        words = html.unescape(shown)
        assert "71 times as long as in float32" in words and 'dtype="float32"' in words
        assert "100 s instead of 118 min" in words
    monkeypatch.setattr(planning, "bfloat16_ratio", lambda device: 0.25)
    fast = plan([VectorFilter(lm, concept_of(lm))], train)
    assert fast.slowdown == 0.25 and "0.25 times" in repr(fast) and 'float32"' not in repr(fast)
    monkeypatch.setattr(planning, "bfloat16_ratio", lambda device: pytest.fail("measured for nothing"))
    full = load_model(tiny_pair("llama"))
    assert plan([VectorFilter(full, concept_of(full))], train).slowdown is None


def test_a_smaller_type_is_advised_only_where_it_is_not_slower(train, monkeypatch):
    lm = load_model(tiny_pair("llama"))
    monkeypatch.setattr(planning, "peak_memory", lambda device: 2**60)
    for ratio, advised in ((71.0, False), (0.5, True)):
        monkeypatch.setattr(planning, "bfloat16_ratio", lambda device, ratio=ratio: ratio)
        with pytest.raises(PlanError, match="max_tokens=512") as caught:
            plan([VectorFilter(lm, concept_of(lm))], train).check()
        assert ("bfloat16" in str(caught.value)) == advised


@pytest.mark.parametrize(
    "error", [IndexError("index out of range in self"), KeyError("rope"), RuntimeError("a\nb"), ValueError()]
)
def test_another_librarys_error_in_the_dry_run_names_the_example(train, error):
    lm, bad = load_model(tiny_pair("llama")), train.ids[17]
    tokens = lm.tokenize(train)[17].input_ids

    def strike(module, args, options):
        ids = options.get("input_ids", args[0] if args else None)
        if any(row[: len(tokens)].tolist() == tokens.tolist() for row in ids):
            raise error

    hook = lm.model.register_forward_pre_hook(strike, with_kwargs=True)
    every = list(range(30))
    with pytest.raises(PlanError, match=f"the example {bad} fails with {type(error).__name__}") as caught:
        plan([VectorFilter(lm, concept_of(lm))], train.select(every), token_budget=10**6)
    assert caught.value.__cause__ is error and not set(train.ids) - {bad} & set(str(caught.value).split())
    scorer = ConceptInfluence(lm, concept_of(lm), train[:2])
    with pytest.raises(PlanError, match=f"the example {bad} "):  # one example, and the fit of its curvature
        plan([scorer], train.select([17]))
    hook.remove()
    assert plan([scorer], train.select([17])).fits


def test_an_error_of_all_examples_together_names_them_and_memory_has_its_own_way_out(train, monkeypatch):
    lm = load_model(tiny_pair("llama"))

    def crowded(lm, batch, readouts, watch):
        if len(batch.rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(planning, "run_batch", crowded)
    with pytest.raises(PlanError, match="OutOfMemoryError.*lower token_budget") as caught:
        plan([VectorFilter(lm, concept_of(lm))], train)
    assert sum(id in str(caught.value) for id in train.ids) > 1


def test_what_cannot_be_priced_is_refused_in_words(train):
    lm, other = load_model(tiny_pair("llama")), load_model(tiny_pair("llama", seed=1))
    for scorers, examples, message in (
        ([RandomScore()], train, "have 0: without a model"),
        ([], train, "have 0"),
        (
            [VectorFilter(lm, concept_of(lm)), GradDot(other, train[:1])],
            train,
            "have 2: plan them",
        ),
        (VectorFilter(lm, concept_of(lm)), train, "list of scorers"),
        (["vector-filter"], train, "instead of a str"),
        ([VectorFilter(lm, concept_of(lm))], train.select([]), "no examples"),
        ([Cascade(VectorFilter(lm, concept_of(lm)), GradDot(lm, train[:1]))], train, "passes of its own"),
    ):
        with pytest.raises(PlanError, match=message):
            plan(scorers, examples)


def test_an_error_of_ours_stays_what_it_is(train, monkeypatch):
    lm = load_model(tiny_pair("llama"))

    def refuse(lm, batch, readouts, watch):
        raise GradientError("a gradient is not finite")

    monkeypatch.setattr(planning, "run_batch", refuse)
    with pytest.raises(GradientError, match="^a gradient is not finite$"):
        plan([GradDot(lm, train[:2])], train)


# Trainings


def numbers(lengths, seed=0):
    g = torch.Generator().manual_seed(seed)
    return token_windows([torch.randint(64, (n,), generator=g) for n in lengths])


def small(n_layers=1):
    return GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=n_layers, n_head=2, bos_token_id=0, eos_token_id=0
    )


@pytest.mark.parametrize("recipe", [dict(epochs=3, batch_size=4), dict(steps=9, batch_size=6, seed=2)])
def test_a_training_is_priced_as_it_then_is(tmp_path, recipe):
    data = numbers([8, 31, 16, 12, 9, 30, 5, 7, 11, 13])
    told = plan_training(small(), data, recipe, every=3)
    run = training.train(small(), data, tmp_path / "run", recipe, every=3, progress=False)
    assert (told.steps, told.checkpoints) == (run.total, len(run.checkpoints))
    assert told.tokens == run.steps.tokens.sum() and told.examples == 10
    files = sum(run.path_of(step).stat().st_size for step in run.checkpoints)
    assert told.disk == pytest.approx(files, rel=0.03)
    weights = sum(one.numel() * 4 for one in run.open().model.parameters())
    assert told.seconds > 0 and 4 * weights < told.peak_memory < told.available_memory and told.fits
    assert (
        f"{run.total} steps" in repr(told) and "checkpoints" in repr(told) and "<table>" in told._repr_html_()
    )


def test_the_probe_of_a_training_meets_its_heaviest_piece_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(planning.tempfile, "tempdir", str(tmp_path))
    lengths, seen = [8] * 11 + [32], []
    lm = load_model((AutoModelForCausalLM.from_config(small()), number_tokenizer(64)))
    data, before, state = numbers(lengths), lm.fingerprint, torch.get_rng_state()

    def watched(model, data, *args, **options):
        run = training.train(model, data, *args, **options)
        seen.append(run)
        return run

    monkeypatch.setattr(planning, "train", watched)
    plan_training(lm, data, TrainingRecipe(batch_size=4, micro_batch_size=2, warmup_steps=50))
    middle, heaviest, again = seen[1].plan.rows
    taken = [[seen[1].data.ids[row] for row in rows] for rows in (middle, heaviest, again)]
    assert seen[1].recipe.micro_batch_size == 2 and data.ids[11] in taken[1]
    assert taken[0] == taken[2] and data.ids[11] not in taken[0]
    whole = first_plan(12, TrainingRecipe(batch_size=4))
    assert taken[1] in [[data.ids[row] for row in rows] for rows in whole.rows]
    assert not list(tmp_path.iterdir()) and lm.fingerprint == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_training_that_cannot_be_is_named(monkeypatch):
    data = numbers([8] * 8)
    with pytest.raises(TrainingError, match="a recipe has no 'lr'"):
        plan_training(small(), data, {"lr": 1})
    with pytest.raises(TrainingError, match="40 tokens"):
        plan_training(small(), numbers([40, 8]))
    with pytest.raises(PlanError, match="every=0"):
        plan_training(small(), data, every=0)
    monkeypatch.setattr(planning, "peak_memory", lambda device: 2**60)
    with pytest.raises(PlanError, match="micro_batch_size=2; or shorter windows"):
        plan_training(small(), data, dict(batch_size=8)).check()
