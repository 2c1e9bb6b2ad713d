"""plan() prices the job it is asked about and disturbs nothing; doctor() finds each illness it knows."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence.baselines import BM25, RandomScore
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.planning import PlanError, doctor, plan
from concept_tda.influence.scorers import ConceptInfluence, InfluenceFunction, VectorFilter
from concept_tda.model.loading import load_model

from tiny import CHATML, tiny_model, tiny_pair, tiny_tokenizer


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


def verdicts(diagnosis):
    return {check.name: check.verdict for check in diagnosis.checks}


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
    import concept_tda.influence.planning as planning

    lm = load_model(tiny_pair("llama"))
    monkeypatch.setattr(planning, "_peak_memory", lambda device: 2**60)
    estimate = plan([ConceptInfluence(lm, concept_of(lm), train[:2])], train, token_budget=1024)
    assert not estimate.fits
    with pytest.raises(PlanError, match="token_budget=256.*fewer sites"):
        estimate.check()


def test_a_healthy_model(train):
    lm = load_model(tiny_pair("llama"))
    diagnosis = doctor(lm, train)
    assert not diagnosis.problems, diagnosis
    assert {"weights", "answers", "BOS", "determinism", "batch invariance", "sites"} <= set(
        verdicts(diagnosis)
    )
    assert "✓" in repr(diagnosis) and "<table>" in diagnosis._repr_html_()


def test_illnesses_of_the_model(train):
    lm = load_model(tiny_pair("llama", n_layers=3))
    assert verdicts(doctor(lm, train, layer=1))["sites"] == "note"
    assert verdicts(doctor(load_model(tiny_pair("llama-tied")), train))["tied embeddings"] == "note"
    assert (
        verdicts(doctor(load_model(tiny_pair("llama", dtype=torch.bfloat16)), train))["precision"] == "note"
    )
    lm.model.gradient_checkpointing_enable()
    assert verdicts(doctor(lm, train))["gradient checkpointing"] == "problem"
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    diagnosis = doctor(load_model((adapted, tiny_tokenizer())), train)
    assert verdicts(diagnosis)["LoRA"] == "note" and "scaling 3.0" in repr(diagnosis)
    adapted.base_model.disable_adapter_layers()
    assert verdicts(doctor(load_model((adapted, tiny_tokenizer())), train))["LoRA"] == "problem"


def test_batch_dependence_is_found(train):
    lm = load_model(tiny_pair("llama"))
    # a norm over the whole batch: a row depends on its mates
    hook = lm.blocks[0].register_forward_hook(lambda block, args, out: out / out.norm())
    assert verdicts(doctor(lm, train))["batch invariance"] == "problem"
    hook.remove()
    hook = lm.blocks[0].register_forward_hook(lambda block, args, out: out + 0.1 * torch.randn_like(out))
    assert verdicts(doctor(lm, train))["determinism"] == "note"
    hook.remove()


def test_illnesses_of_the_data(train):
    lm = load_model(tiny_pair("llama"))
    assert (
        verdicts(doctor(lm, load_conversations([{"messages": [{"role": "user", "content": "Hello?"}]}])))[
            "answers"
        ]
        == "problem"
    )
    found = verdicts(
        doctor(
            lm,
            load_conversations(
                [{"prompt": "a", "response": "b"}] * 2 + [{"prompt": "c", "response": "d " * 50}]
            ),
            max_tokens=40,
        )
    )
    assert found["duplicates"] == "note" and found["length"] == "note"
    model, tokenizer = tiny_pair("llama")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "<|endoftext|><|endoftext|>" + CHATML
    assert verdicts(doctor(load_model((model, tokenizer)), train))["BOS"] == "problem"
    bad = load_model(tiny_pair("llama"))
    with torch.no_grad():
        bad.model.lm_head.weight.fill_(float("inf"))
    assert {check.name for check in doctor(bad, train).problems} == {"weights", "loss"}
