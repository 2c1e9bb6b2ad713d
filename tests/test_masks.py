"""Token masks: the weighted loss and its gradient, whose a mask is, and what is handed to other trainers."""

import copy
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

import concept_tda.model.finetuning as finetuning
from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.batches import batches
from concept_tda.data.conversations import load_conversations
from concept_tda.data.masks import MaskError, TokenMask, token_mask, tokenizer_record
from concept_tda.data.tokens import tokenize
from concept_tda.influence.scorers import GradDot, VectorFilter, score_together
from concept_tda.model.finetuning import FinetuneError, finetune, finetune_many, training_record
from concept_tda.model.loading import LanguageModel, load_model
from concept_tda.model.losses import loss_weights
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard
from concept_tda.results.metrics import AttributionError

from tiny import CHATML, double_norms, tiny_pair, tiny_tokenizer

FAST = dict(rank=2, learning_rate=1e-2, epochs=2, batch_size=4, progress=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm():
    return load_model(tiny_pair("llama"))


@pytest.fixture(scope="module")
def double():
    model, tokenizer = tiny_pair("llama")
    return load_model((double_norms(model.double()), tokenizer))


@pytest.fixture(scope="module")
def data():
    return load_conversations(
        [{"prompt": f"Is {i} so?", "response": "yes, " * (i % 3) + f"it is the sea {i}"} for i in range(10)]
    )


@pytest.fixture(scope="module")
def queries():
    return load_conversations([{"prompt": "Now?", "response": "well, it is"}])


def random_weights(tokenized, seed=0):
    """Zeros, ones and numbers between, one array for each example."""
    random = np.random.default_rng(seed)
    return [random.choice([0, 1, 0.25, 0.7], len(item.input_ids)) for item in tokenized]


def with_adapters(lm):
    """New adapters whose second factors are not zero, so that both have a gradient."""
    model = finetuning.new_adapters(lm, 2, 4, False)
    for number, (name, weight) in enumerate(model.named_parameters()):
        if weight.requires_grad:
            torch.manual_seed(number)
            torch.nn.init.normal_(weight, std=0.1)
    return LanguageModel(model, lm.tokenizer, lm.name)


def gradients(lm):
    """Gradients of the adapters, taken away from them."""
    found = {n: p.grad.clone() for n, p in lm.model.named_parameters() if p.requires_grad}
    lm.model.zero_grad()
    return found


def by_autograd(lm, tokenized, weights):
    """The loss of Formulas §0 with explicit weights, by transformers' logits, one unpadded example a time."""
    total = 0.0
    for item, weights_T in zip(tokenized, weights):
        logits = lm.model(input_ids=item.input_ids[None]).logits[0]
        losses = F.cross_entropy(logits[:-1], item.input_ids[1:], reduction="none")
        inside = item.response_mask[1:]
        total += (torch.as_tensor(weights_T)[1:] * losses)[inside].sum() / inside.sum() / len(tokenized)
    return total


@pytest.mark.parametrize("micro", [None, 3])
def test_the_gradient_equals_autograd_with_explicit_weights(double, data, micro):
    adapted, tokenized = with_adapters(double), double.tokenize(data)
    weights = random_weights(tokenized)
    masked = token_mask(tokenized, weights).apply(tokenized)
    settings = {"micro_batch_size": micro, "precision": "fp32"}
    loss = finetuning._add_gradient(adapted, masked, list(range(len(data))), settings)
    ours, expected = gradients(adapted), by_autograd(adapted, tokenized, weights)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-12)
    for name, theirs in gradients(adapted).items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-9, atol=1e-13)


def test_a_silent_example_keeps_its_place_and_adds_nothing(double, data):
    adapted, tokenized = with_adapters(double), double.tokenize(data)
    weights = [
        np.zeros(len(item.input_ids)) if row == 3 else np.ones(len(item.input_ids))
        for row, item in enumerate(tokenized)
    ]
    masked = token_mask(tokenized, weights).apply(tokenized)
    settings = {"micro_batch_size": None, "precision": "fp32"}
    finetuning._add_gradient(adapted, masked, list(range(10)), settings)
    ours = gradients(adapted)
    finetuning._add_gradient(adapted, tokenized, [row for row in range(10) if row != 3], settings)
    for name, others in gradients(adapted).items():  # a mean over nine, ours is one over ten
        torch.testing.assert_close(ours[name], others * 0.9, rtol=1e-9, atol=1e-13)


def test_ones_are_the_ordinary_run_bit_for_bit(lm, data, tmp_path):
    plain = finetune(lm, data, tmp_path / "plain", **FAST)
    ones = token_mask(lm.tokenize(data))
    weighted = finetune(lm, data, tmp_path / "ones", token_weights=ones, **FAST)
    assert plain.fingerprint == weighted.fingerprint
    records = [training_record(tmp_path / name) for name in ("plain", "ones")]
    assert (records[0]["steps"]["loss"] == records[1]["steps"]["loss"]).all()
    tokens = lm.tokenize(data).n_response_tokens
    assert records[1]["token_weights"] == {"response_tokens": tokens, "zero": 0, "sum": float(tokens)}
    assert "token_weights" not in records[0]


def test_other_weights_are_another_run(lm, data, tmp_path):
    tokenized = lm.tokenize(data)
    mask = token_mask(tokenized, random_weights(tokenized))
    masked = finetune(lm, data, tmp_path / "run", token_weights=mask, **FAST)
    assert masked.fingerprint != finetune(lm, data, tmp_path / "plain", **FAST).fingerprint
    again = finetune(lm, data, tmp_path / "run", token_weights=mask, **FAST)
    assert again.fingerprint == masked.fingerprint
    for other in (None, token_mask(tokenized), token_mask(tokenized, random_weights(tokenized, 1))):
        with pytest.raises(FinetuneError, match="holds another fine-tune.*data_fingerprint"):
            finetune(lm, data, tmp_path / "run", token_weights=other, **FAST)
    # tokens that carry their weights are the same run
    assert finetune(lm, mask.apply(tokenized), tmp_path / "run", **FAST).fingerprint == masked.fingerprint


def test_subsets_keep_their_weights(lm, data, tmp_path):
    tokenized = lm.tokenize(data)
    masked = token_mask(tokenized, random_weights(tokenized)).apply(tokenized)
    runs = {"few": list(range(5)), "all": list(range(10))}
    settings = {name: value for name, value in FAST.items() if name != "progress"}
    found = list(finetune_many(lm, runs, tmp_path / "many", data=masked, progress=False, **settings))
    for one in found:
        weights = [masked[row].token_weights[masked[row].response_mask] for row in runs[one.subset]]
        assert one.record["token_weights"]["sum"] == pytest.approx(torch.cat(weights).sum().item())


def test_what_cannot_be_trained_on_is_refused(lm, data, tmp_path):
    tokenized = lm.tokenize(data)
    nothing = token_mask(tokenized, [np.zeros(len(item.input_ids)) for item in tokenized])
    with pytest.raises(FinetuneError, match="every response token of the data weighs 0"):
        finetune(lm, data, tmp_path / "x", token_weights=nothing, **FAST)
    with pytest.raises(FinetuneError, match="token_weights is a TokenMask, not a list"):
        finetune(lm, data, tmp_path / "x", token_weights=[1.0], **FAST)
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_padding_and_order_leave_weights_with_their_tokens(lm, data):
    tokenized = lm.tokenize(data)
    masked = token_mask(tokenized, random_weights(tokenized)).apply(tokenized)
    for budget in (1, 60, 10_000):
        for batch in batches(masked, token_budget=budget):
            found = loss_weights(batch, "sum")
            for place, row in enumerate(batch.rows.tolist()):
                expected = masked[row].token_weights * masked[row].response_mask
                np.testing.assert_allclose(found[place, : len(expected)], expected.float())
                assert not found[place, len(expected) :].any()


@pytest.mark.parametrize("engine", ["reverse", "forward", "difference"])
def test_scores_of_a_masked_file_are_scores_minus_those_of_the_masked_tokens(double, data, queries, engine):
    tokenized = double.tokenize(data)
    scorer = GradDot(double, queries, engine="forward")
    whole = scorer.score(tokenized, tokens=True, progress=False)
    mask = whole.token_mask(drop=0.2)
    masked = GradDot(double, queries, engine=engine).score(mask.apply(tokenized), progress=False)
    gone = [scores[(weights == 0)].sum() for scores, weights in zip(whole.token_scores, mask.weights)]
    np.testing.assert_allclose(masked.scores, whole.scores - np.array(gone), rtol=1e-3, atol=1e-5)
    assert np.array(gone).any() and mask.about["by"] == "losses of tokens"


def test_examples_with_equal_tokens_and_other_weights_are_scored_apart(lm, queries):
    twins = load_conversations([{"prompt": "Is it?", "response": "it is so"}] * 2)
    tokenized = lm.tokenize(twins)
    length = len(tokenized[0].input_ids)
    masked = token_mask(tokenized, [np.ones(length), np.linspace(0, 1, length)]).apply(tokenized)
    scores = GradDot(lm, queries).score(masked, progress=False).scores
    assert scores[0] != scores[1]


CARD = QueryCard(method="by hand", behaviour="letters", zero="gradient")


def hand_made(tokenized, seed=0):
    """A result with known token scores."""
    random = np.random.default_rng(seed)
    scores = [random.normal(size=len(item.input_ids)) for item in tokenized]
    return Attribution(tokenized, np.arange(len(tokenized)), CARD, token_scores=scores)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("lowest", [False, True])
def test_the_mask_takes_one_end_of_all_response_tokens(lm, data, weight, lowest):
    tokenized = lm.tokenize(data)
    result = hand_made(tokenized)
    inside = np.concatenate(
        [scores[item.response_mask.numpy()] for scores, item in zip(result.token_scores, tokenized)]
    )
    order = np.argsort(inside if lowest else -inside)
    for options, n in (
        (dict(drop=0.25), round(len(inside) * 0.25)),
        (dict(keep=0.75), len(inside) - round(len(inside) * 0.75)),
        (dict(count=7), 7),
    ):
        mask = result.token_mask(**options, weight=weight, lowest=lowest)
        assert set(np.flatnonzero(mask.response_weights == weight)) == set(order[:n])
        assert (np.delete(mask.response_weights, order[:n]) == 1).all()
    high = result.token_mask(threshold=0.3, weight=weight, lowest=lowest)
    chosen = inside < np.float32(0.3) if lowest else inside > np.float32(0.3)
    np.testing.assert_array_equal(high.response_weights == weight, chosen)
    assert mask.apply(tokenized).fingerprint != tokenized.fingerprint


def test_weights_by_a_function_of_the_scores(lm, data):
    result = hand_made(lm.tokenize(data))
    mask = result.token_mask(by=lambda scores: 1 / (1 + np.exp(scores)))
    flat = np.concatenate([s[m] for s, m in zip(result.token_scores, result.response_masks)])
    np.testing.assert_allclose(mask.response_weights, 1 / (1 + np.exp(flat)), rtol=1e-6)
    with pytest.raises(AttributionError, match="one weight for each score"):
        result.token_mask(by=lambda scores: scores[:-1])
    with pytest.raises(MaskError, match="not negative"):
        result.token_mask(by=lambda scores: scores)


def test_what_no_mask_can_be_made_of(lm, data):
    tokenized = lm.tokenize(data)
    plain = Attribution(tokenized, np.arange(10), CARD)
    with pytest.raises(AttributionError, match="no token scores.*tokens=True"):
        plain.token_mask(drop=0.1)
    result = hand_made(tokenized)
    with pytest.raises(AttributionError, match="exactly one way"):
        result.token_mask(drop=0.1, keep=0.2)
    with pytest.raises(AttributionError, match="a mask of .* response tokens"):
        result.token_mask(drop=1.5)
    with pytest.raises(AttributionError, match="this is a part.*mask the whole"):
        result.top(3).token_mask(drop=0.1)
    with pytest.raises(MaskError, match="weight of -1"):
        result.token_mask(drop=0.1, weight=-1)


def test_a_mask_belongs_to_its_data_tokenizer_and_template(lm, data):
    tokenized = lm.tokenize(data)
    result = hand_made(tokenized)
    mask = result.token_mask(drop=0.2)
    assert len(mask.apply(tokenized.select([7, 2]))) == 2
    others = load_conversations([{"prompt": "Who?", "response": "I."}])
    with pytest.raises(MaskError, match=r"knows nothing of 1 of the 1 examples"):
        mask.apply(lm.tokenize(others))
    with pytest.raises(MaskError, match="knows nothing of 1 of the 11"):  # one more often than there
        mask.apply(lm.tokenize(load_conversations([*map(dict_of, data), dict_of(data[0])])))
    template = load_model((lm.model, tiny_tokenizer(CHATML + " ")))
    with pytest.raises(MaskError, match="another chat template"):
        mask.apply(template.tokenize(data))
    vocabulary = copy.deepcopy(lm.tokenizer)
    vocabulary.add_tokens(["sea"])
    with pytest.raises(MaskError, match="another tokenizer"):
        mask.apply(tokenize(data, vocabulary))
    with pytest.warns(UserWarning, match="were cut"), pytest.raises(MaskError, match="max_tokens="):
        mask.apply(lm.tokenize(data, max_tokens=30))
    # without a record of the tokenizer the tokens themselves still tell
    unknown = copy.copy(mask)
    object.__setattr__(unknown, "tokenizer", None)
    with pytest.raises(MaskError, match="that are not the same"):
        unknown.apply(tokenize(data, vocabulary))


def dict_of(conversation):
    return {"messages": [dict(message) for message in conversation.messages]}


def test_a_saved_result_still_knows_its_tokenizer(lm, data, tmp_path):
    result = hand_made(lm.tokenize(data))
    again = Attribution.load(result.save(tmp_path / "scores.parquet"))
    assert again == result and again.tokenizer == tokenizer_record(lm.tokenizer)
    assert again.token_mask(drop=0.2).fingerprint == result.token_mask(drop=0.2).fingerprint
    assert again.without_token_scores().tokenizer is None


def test_the_tokenizer_of_a_saved_model_is_the_same(lm, data, tmp_path):
    tuned = finetune(lm, data, tmp_path / "run", **FAST)
    opened = load_model(tmp_path / "run")
    assert (
        tokenizer_record(lm.tokenizer)
        == tokenizer_record(opened.tokenizer)
        == tokenizer_record(tuned.tokenizer)
    )


def test_saved_and_read(lm, data, tmp_path):
    tokenized = lm.tokenize(data)
    mask = token_mask(tokenized, random_weights(tokenized), how="drawn")
    path = mask.save(tmp_path / "mask.parquet")
    again = TokenMask.load(path)
    assert again.fingerprint == mask.fingerprint and again.about == {"how": "drawn"}
    assert again.apply(tokenized).fingerprint == mask.apply(tokenized).fingerprint
    with pytest.raises(MaskError, match="no such file"):
        TokenMask.load(tmp_path / "none.parquet")
    result = hand_made(tokenized).save(tmp_path / "scores.parquet")
    with pytest.raises(MaskError, match="no token mask"):
        TokenMask.load(result)
    (tmp_path / "broken.parquet").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(MaskError, match="damaged"):
        TokenMask.load(tmp_path / "broken.parquet")
    table = pq.read_table(path)
    header = json.loads(table.schema.metadata[b"concept_tda_mask"])
    for key, value, match in (("name", "other", "checksum"), ("format", "9", "this version reads")):
        changed = table.replace_schema_metadata({"concept_tda_mask": json.dumps(header | {key: value})})
        pq.write_table(changed, tmp_path / "changed.parquet")
        with pytest.raises(MaskError, match=match):
            TokenMask.load(tmp_path / "changed.parquet")


def test_labels_for_trl(lm, data):
    tokenized = lm.tokenize(data)
    mask = hand_made(tokenized).token_mask(drop=0.3)
    rows = mask.to_trl(tokenized)
    assert rows.column_names == ["input_ids", "labels"]
    for row, item, weights in zip(rows, tokenized, mask.weights):
        assert row["input_ids"] == item.input_ids.tolist()
        trained = item.response_mask.numpy() & (weights == 1)
        assert row["labels"] == np.where(trained, item.input_ids.numpy(), -100).tolist()
    half = hand_made(tokenized).token_mask(drop=0.3, weight=0.5)
    with pytest.raises(MaskError, match="weights other than 0 and 1"):
        half.to_trl(tokenized)
    with_column = half.to_trl(tokenized, weights=True)
    assert with_column["token_weights"][4] == half.weights[4].tolist()
    # what transformers' models make of these labels: a mean over unmasked tokens
    item = rows[2]
    ids, labels = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
    with torch.no_grad():
        loss = lm.model(input_ids=ids, labels=labels).loss
        logits = lm.model(input_ids=ids).logits[0]
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    kept = labels[0, 1:] != -100
    np.testing.assert_allclose(loss, losses[kept].mean(), rtol=1e-5)


def test_the_default_engine_is_told_apart(lm, data, queries):
    concept = tensor_concept(torch.ones(lm.width), 1, name="up", lm=lm)
    scorers = [VectorFilter(lm, concept), GradDot(lm, queries)]
    found = score_together(scorers, data, tokens=True, progress=False)
    assert found["GradDot"].token_mask(drop=0.1).about["by"] == "gradients at places"
    assert found["Vector Filter"].token_mask(drop=0.1).about["by"] == "activations at places"
