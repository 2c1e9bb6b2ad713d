"""Prices from a configuration alone: operations counted by hand, memory of what is kept, money, refusals."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from concept_tda.data.batches import Batch
from concept_tda.data.documents import number_tokenizer
from concept_tda.influence.engine import DirectionReadout, Stopwatch, run_batch
from concept_tda.influence.planning import PlanError, plan
from concept_tda.influence.pricing import (
    count_operations,
    fit_operations_per_token,
    operations_per_token,
    plan_model,
    seconds_per_token,
)
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites

SMALL = LlamaConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=100,
)


@pytest.mark.parametrize("config", [SMALL, GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=100)])
def test_what_is_counted_is_what_the_engine_does(config):
    """PyTorch's counter on the real pass with real numbers, beside the prediction from empty shapes."""
    T = 16
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    lm = load_model((model, number_tokenizer(config.vocab_size)))
    sites = resolve_sites(lm, "attention")
    ids = torch.randint(100, (1, T))
    batch = Batch(torch.arange(1), ids, torch.ones_like(ids), torch.arange(T)[None] >= 8)
    readouts = {"q": DirectionReadout(sites, {s.name: torch.randn_like(s.weight) for s in sites})}
    readouts["q"].begin(batch, torch.float32)
    with lm.undisturbed(), FlopCounterMode(display=False) as counter:
        run_batch(lm, batch, readouts, Stopwatch(readouts))
    predicted = T * operations_per_token(count_operations(config, T), "influence", "attention", response=0.5)
    # the first layer's inputs need no gradient, which the prediction does not know
    assert 0.85 * predicted < counter.get_total_flops() <= predicted


def test_counts_do_not_depend_on_who_says_the_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL.to_dict()))
    assert vars(count_operations(path)) == vars(count_operations(SMALL)) == vars(count_operations(tmp_path))


def test_time_and_money_are_shared_as_one_would(tmp_path):
    usual = dict(flops_per_second=1e10, price_per_hour=4.0, fit_examples=100)
    one = plan_model(SMALL, 10_000, **usual)
    many = plan_model(SMALL, 10_000, num_processes=8, **usual)
    assert many.seconds == one.seconds / 8 and many.fit_seconds == one.fit_seconds / 8
    assert many.money == pytest.approx(one.money) and many.peak_memory == one.peak_memory
    assert plan_model(SMALL, 20_000, **usual).seconds == 2 * one.seconds
    half = plan_model(SMALL, 10_000, dtype=torch.bfloat16, **usual)
    assert half.peak_memory < one.peak_memory
    assert "8 share" in repr(many) and f"{one.money:,.2f} at 4 an hour" in repr(one)
    counts = count_operations(SMALL)
    assert one.fit_seconds == pytest.approx(100 * 256 * fit_operations_per_token(counts) / 1e10)


def test_plan_prices_a_config_as_plan_model_does(tmp_path):
    SMALL.save_pretrained(tmp_path)
    config = str(tmp_path / "config.json")
    options = dict(flops_per_second=1e10, price_per_hour=4.0, num_processes=2, fit_examples=10)
    assert plan(model=config, examples=1000, **options) == plan_model(SMALL, 1000, **options)
    smaller = plan(model=config, examples=1000, token_budget=256, **options)
    assert smaller == plan_model(SMALL, 1000, token_budget=256, **options)
    assert smaller.peak_memory < plan(model=config, examples=1000, **options).peak_memory
    wrong = [
        (dict(scorers=[], model=config, examples=10), "model of their own"),
        (dict(model=config), "say how many"),
        (dict(model=config, examples=[{"prompt": "a", "response": "b"}]), "say how many"),
        (dict(model=config, examples=10, tokens=True), "tokens_per_example"),
        (dict(model=config, examples=10, max_tokens=99), "tokens_per_example"),
        (dict(examples=10), "goes with model="),
        (dict(scorers=[], examples=[], flops_per_second=1.0), "flops_per_second: goes with model="),
    ]
    for given, message in wrong:
        with pytest.raises(PlanError, match=message):
            plan(**given)


def test_what_does_not_fit_says_what_would_help():
    found = plan_model(SMALL, 10, flops_per_second=1e10, memory=1000)
    assert not found.fits
    with pytest.raises(PlanError, match="bfloat16"):
        found.check()


def test_what_cannot_be_priced_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PlanError, match="no configuration of a model"):
        count_operations(tmp_path)
    for wrong in (dict(method="magic"), dict(sites="everything")):
        with pytest.raises(PlanError, match="must|: attention|'influence' or"):
            plan_model(SMALL, 10, flops_per_second=1.0, **wrong)


def test_a_measured_second_is_a_positive_number_of_seconds():
    assert 0 < seconds_per_token(SMALL, "influence", tokens_per_example=16, token_budget=32) < 1
