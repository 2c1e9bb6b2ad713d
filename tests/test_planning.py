"""plan() prices the job it is asked about and disturbs nothing; what fails in its dry run is named."""

import html
from dataclasses import replace

import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence import planning
from concept_tda.influence.baselines import BM25, RandomScore
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.neighbours import Cascade
from concept_tda.influence.planning import PlanError, plan
from concept_tda.influence.scorers import ConceptInfluence, GradDot, InfluenceFunction, VectorFilter
from concept_tda.model.loading import load_model
from concept_tda.model.losses import GradientError

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
