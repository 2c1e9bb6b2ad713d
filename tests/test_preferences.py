"""Preference pairs: read, swapped and written back; scored as the derivative of a difference of losses."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import ConversationError, load_conversations
from concept_tda.data.preferences import Preferences, load_preferences
from concept_tda.influence.baselines import BM25, RandomScore, ResponseLength
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.neighbours import Cascade, GradCos, ResidualChange
from concept_tda.influence.pairs import PairAttribution, load_pair_attribution, score_preferences
from concept_tda.influence.queries import ConceptQuery, LossQuery
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    GradDot,
    InfluenceFunction,
    ProjectionDifference,
    ScorerError,
    VectorFilter,
)
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites
from concept_tda.results.attribution import Attribution
from concept_tda.results.comparison import compare
from concept_tda.results.metrics import AttributionError

from tiny import tiny_pair

ASK, YES, NO = (
    {"role": role, "content": text}
    for role, text in (("user", "Tea?"), ("assistant", "Gladly."), ("assistant", "Go away."))
)
SYSTEM = {"role": "system", "content": "Be kind."}
FROM = [{"from": "human", "value": "Tea?"}]
LAYOUTS = {
    "texts": {"prompt": "Tea?", "chosen": "Gladly.", "rejected": "Go away."},
    "message lists": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "single messages": {"prompt": [ASK], "chosen": YES, "rejected": NO},
    "whole chats": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    "prompt and whole chats": {"prompt": "Tea?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
    "messages": {"messages": [ASK], "chosen": "Gladly.", "rejected": "Go away."},
    "sharegpt": {
        "conversations": FROM,
        "chosen": {"from": "gpt", "value": "Gladly."},
        "rejected": {"from": "gpt", "value": "Go away."},
    },
    "alpaca": {"instruction": "Tea?", "input": "", "chosen": "Gladly.", "rejected": "Go away."},
}
PAIRS = [
    {"prompt": f"Is {thing} {quality}?", "chosen": chosen, "rejected": rejected}
    for thing, quality, chosen, rejected in (
        ("sky", "blue", "yes", "no, it is not so"),
        ("sea", "hot", "no it is not", "yes it is"),
        ("sun", "wet", "the yes", "the no"),
        ("ice", "hot", "yes yes yes it is so", "no"),
        ("fire", "wet", "no", "yes, of course, it is"),
    )
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pairs():
    return load_preferences(PAIRS)


@pytest.fixture(scope="module")
def queries():
    return load_conversations([{"prompt": "Is snow wet?", "response": "yes it is"}])


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- reading and writing back ---


@pytest.mark.parametrize("record", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_two_sides_and_is_swapped_in_place(record, tmp_path):
    record = {**record, "source": "web", "scores": {"chosen": 1, "rejected": 2}}
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps(record) + "\n", encoding="utf-8")
    for read in (load_preferences([record]), load_preferences(source)):
        (pair,) = read
        assert (pair.chosen.response, pair.rejected.response) == ("Gladly.", "Go away.")
        assert [m["content"] for m in pair.prompt] == ["Tea?"] and pair.chosen.metadata["source"] == "web"
        assert lines(read.to_json(tmp_path / "b.jsonl", overwrite=True)) == [record]
        swapped = read.swap([0])
        expected = {**record, "chosen": record["rejected"], "rejected": record["chosen"]}
        assert lines(swapped.to_json(tmp_path / "b.jsonl", overwrite=True)) == [expected]
        assert list(lines(tmp_path / "b.jsonl")[0]) == list(record)
        again = load_preferences([expected])
        for side in ("chosen", "rejected"):
            assert getattr(again, side)[0].messages == getattr(swapped, side)[0].messages
            assert getattr(again, side)[0].metadata == getattr(swapped, side)[0].metadata
        assert again.ids == swapped.ids != read.ids and swapped.fingerprint != read.fingerprint
        assert swapped.swap([0]).ids == read.ids and swapped.swap([0])[0] == pair


UNTIDY = (
    b'\xef\xbb\xbf\r\n{"rejected" :"Caf\\u00e9 \\"}\\"",  "prompt": "a", "x": {"chosen": [1.50, "{"]}, '
    b'"chosen"\t:\t[ {"role":"assistant","content":"\xc3\xa9"} ] , "n":1e3 }\r\n\r\n'
    b'  {"prompt": "b","chosen": "c","rejected": "d"}  \n'
    b'{"prompt": "e", "\\u0063hosen": "f", "rejected": "g", "chosen_score": NaN}'
)


def test_bytes_are_kept_apart_from_the_two_values(tmp_path):
    source, target = tmp_path / "dpo.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(UNTIDY)
    read = load_preferences(source)
    assert len(read) == 3 and read.to_json(target, overwrite=True).read_bytes() == UNTIDY
    turned = read.swap(slice(None))
    assert turned.to_json(target, overwrite=True).read_bytes() == (
        b'\xef\xbb\xbf\r\n{"rejected" :[ {"role":"assistant","content":"\xc3\xa9"} ],  "prompt": "a", '
        b'"x": {"chosen": [1.50, "{"]}, "chosen"\t:\t"Caf\\u00e9 \\"}\\"" , "n":1e3 }\r\n\r\n'
        b'  {"prompt": "b","chosen": "d","rejected": "c"}  \n'
        b'{"prompt": "e", "\\u0063hosen": "g", "rejected": "f", "chosen_score": NaN}'
    )
    reread = load_preferences(target)
    assert reread.ids == turned.ids and list(reread) == list(turned)
    assert turned.swap([0, 1, 2]).to_json(target, overwrite=True).read_bytes() == UNTIDY
    assert read.swap([]).to_json(target, overwrite=True).read_bytes() == UNTIDY
    only = read.swap([1, 1, -2]).to_json(target, overwrite=True).read_bytes().split(b"\n")
    assert [a != b for a, b in zip(only, UNTIDY.split(b"\n"))] == [False, False, False, True, False]
    packed = tmp_path / "dpo.jsonl.gz"
    packed.write_bytes(gzip.compress(UNTIDY))
    assert load_preferences(packed).swap([0, 1, 2]).ids == turned.ids


@pytest.mark.parametrize("seed", range(5))
def test_swapping_twice_is_the_identity_for_any_line(seed, tmp_path):
    """Random objects in random spacing: the swapped line is the swapped object, twice gives the bytes."""
    generator = np.random.default_rng(seed)

    def value(depth=0):
        kind = generator.integers(6 if depth < 2 else 4)
        texts = ["", 'a"b', "{]\\", "é\u2028", "chosen", ", : }"]
        if kind == 0:
            return texts[generator.integers(len(texts))]
        if kind == 1:
            return float(generator.normal())
        if kind in (2, 3):
            return [None, True, -3][generator.integers(3)]
        if kind == 4:
            return [value(depth + 1) for _ in range(generator.integers(3))]
        return {f"chosen{i}"[: 6 + i]: value(depth + 1) for i in range(generator.integers(3))}

    texts = []
    for row in range(40):
        record = {f"field {i}": value() for i in range(generator.integers(4))}
        record |= {"prompt": f"p{row}", "chosen": f"yes {value()!r}", "rejected": f"no {row}"}
        names = generator.permutation(list(record))
        separators = ([" , ", ","][generator.integers(2)], [":", " :\t "][generator.integers(2)])
        ascii_only = bool(generator.integers(2))
        text = json.dumps({n: record[n] for n in names}, separators=separators, ensure_ascii=ascii_only)
        texts.append(text)
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(texts), encoding="utf-8", newline="")
    read = load_preferences(source)
    rows = np.flatnonzero(generator.integers(2, size=40))
    turned = read.swap(rows)
    found = turned.to_json(tmp_path / "b.jsonl", overwrite=True).read_bytes().decode().split("\n")
    for row, (old, new) in enumerate(zip(texts, found)):
        before, after = json.loads(old), json.loads(new)
        if row in rows:
            before["chosen"], before["rejected"] = before["rejected"], before["chosen"]
        assert before == after and (row in rows or old == new) and len(old) == len(new)
    assert turned.swap(rows).to_json(tmp_path / "c.jsonl", overwrite=True).read_bytes() == source.read_bytes()


def test_tables_keep_both_answers_as_text(tmp_path):
    records = [
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "03", "n": 1},
        {"prompt": "?", "chosen": "true", "rejected": "1.0", "n": 2},
    ]
    frame, path = pd.DataFrame(records), tmp_path / "a.csv"
    frame.to_csv(path, index=False)
    for source in (path, frame, tmp_path / "a.parquet"):
        frame.to_parquet(tmp_path / "a.parquet")
        read = load_preferences(source)
        assert lines(read.to_json(tmp_path / "out.jsonl", overwrite=True)) == records
        swapped = lines(read.swap([0]).to_json(tmp_path / "out.jsonl", overwrite=True))
        assert swapped == [{**records[0], "chosen": "03", "rejected": "2"}, records[1]]
    good = pd.DataFrame([{"prompt": "Who?", "best": "2", "worst": "03"}])
    good.to_csv(path, index=False)
    other = load_preferences(path, chosen="best", rejected="worst").swap([0])
    assert lines(other.to_json(tmp_path / "out.jsonl", overwrite=True)) == [
        {"prompt": "Who?", "best": "03", "worst": "2"}
    ]


def test_pairs_are_selected_like_conversations(pairs):
    assert isinstance(pairs[1:3], Preferences) and len(pairs[[0, 2]]) == 2
    assert pairs[pairs.ids[3]] is pairs[3] and pairs[np.array([True, False, False, False, True])].ids == [
        pairs.ids[0],
        pairs.ids[4],
    ]
    assert pairs.chosen.ids != pairs.rejected.ids and len(pairs.chosen) == len(pairs.rejected) == 5
    assert pairs.to_pandas().loc[2, "rejected"] == "the no" and "5 pairs" in repr(pairs)
    assert load_preferences(pairs) is pairs


def good(i):
    return json.dumps({"prompt": f"q{i}", "chosen": "a", "rejected": "b"})


BROKEN = {
    "a field that is missing": ('{"prompt": "q", "chosen": "a"}', "line 3: .*no column 'rejected'"),
    "the other field": ('{"prompt": "q", "rejected": "a"}', "line 3: .*no column 'chosen'"),
    "equal sides": ('{"prompt": "q", "chosen": "a", "rejected": "a"}', "line 3: .*are the same"),
    "an empty answer": ('{"prompt": "q", "chosen": "", "rejected": "a"}', "line 3: .*chosen"),
    "no answer at the end": (
        json.dumps({"chosen": [ASK], "rejected": [ASK, NO]}),
        "line 3: .*'chosen'.*without an answer",
    ),
    "two prompts": (
        json.dumps({"chosen": [ASK, YES], "rejected": [SYSTEM, ASK, NO]}),
        "line 3: .*different prompts",
    ),
    "another type": ('{"prompt": "q", "chosen": 3, "rejected": "a"}', "line 3: .*'chosen'"),
    "no JSON": ('{"prompt": "q", chosen: "a"}', "line 3: .*broken JSON"),
}


@pytest.mark.parametrize("line, error", BROKEN.values(), ids=BROKEN)
def test_bad_rows_are_named_with_file_and_line(line, error, tmp_path):
    path = tmp_path / "dpo.jsonl"
    path.write_text(f"{good(1)}\n\n{line}\n{good(2)}\n{line}\n", encoding="utf-8")
    with pytest.raises(ConversationError, match=f"dpo.jsonl, {error}") as caught:
        load_preferences(path)
    assert "1 more broken: line 5" in str(caught.value)


def test_what_is_no_file_of_pairs(pairs, tmp_path):
    with pytest.raises(ConversationError, match="list, row 1: .*are the same"):
        load_preferences([*PAIRS[:1], {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(ConversationError, match="one answer each"):
        load_preferences(pairs.chosen)
    with pytest.raises(ConversationError, match="one answer each"):
        load_preferences(list(pairs.chosen))
    with pytest.raises(ConversationError, match="both 'chosen'"):
        load_preferences(PAIRS, rejected="chosen")
    tree = [
        {"message_id": "a", "parent_id": None, "role": "prompter", "text": "Hi"},
        {"message_id": "b", "parent_id": "a", "role": "assistant", "text": "Hello!"},
    ]
    with pytest.raises(ConversationError, match="threads of a tree"):
        load_preferences(tree)
    with pytest.raises(ConversationError) as caught:
        load_preferences(tmp_path / "none.jsonl")
    assert str(caught.value).count("there is no file") == 1
    with pytest.raises(ConversationError, match="row 9 does not exist"):
        pairs.swap([9])


# --- scores ---


def concept_of(lm):
    vector = torch.randn(lm.width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tensor_concept(vector, 1, lm=lm, name="a direction")


def answer_loss(model, example, reduction):
    mask = example.response_mask[1:]
    logits = model(input_ids=example.input_ids[None]).logits[0, :-1][mask]
    return cross_entropy(logits, example.input_ids[1:][mask], reduction=reduction)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma"])
def test_a_pair_is_scored_by_the_derivative_of_the_difference_of_its_losses(family, pairs, queries):
    lm = load_model(tiny_pair(family, dtype=torch.float64))
    concept, sites = concept_of(lm), resolve_sites(lm, "attention")
    curvature = EKFAC.fit(lm, pairs.chosen, "attention", cache=False, progress=False)
    for query, scorer in (
        (LossQuery(queries), InfluenceFunction(lm, queries, curvature=curvature)),
        (LossQuery(queries), GradDot(lm, queries)),
        (ConceptQuery(concept, queries), ConceptInfluence(lm, concept, queries, curvature="identity")),
    ):
        direction = query.gradients(lm, sites)
        if scorer.curvature is curvature:
            direction = curvature.precondition(direction)
        expected = []
        for chosen, rejected in zip(lm.tokenize(pairs.chosen), lm.tokenize(pairs.rejected)):
            loss = answer_loss(lm.model, chosen, "mean") - answer_loss(lm.model, rejected, "mean")
            found = torch.autograd.grad(loss, [s.module.weight for s in sites], allow_unused=True)
            oriented = {s.name: g.T if s.transposed else g for s, g in zip(sites, found) if g is not None}
            expected.append(-sum((direction[n] * g).sum().item() for n, g in oriented.items()))
        result = score_preferences(scorer, pairs, progress=False)
        np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-8)
        assert (
            result.card.zero == "gradient" and "difference of their two mean losses" in result.card.notes[0]
        )


def test_the_first_step_of_dpo_is_half_beta_times_the_difference_of_summed_losses(pairs):
    """What the page and the card say about DPO, by autograd on the DPO loss itself."""
    lm, beta = load_model(tiny_pair("llama", dtype=torch.float64)), 0.1
    weights = [s.module.weight for s in resolve_sites(lm, "all-linear")]
    for chosen, rejected in zip(lm.tokenize(pairs.chosen), lm.tokenize(pairs.rejected)):
        sums = [answer_loss(lm.model, side, "sum") for side in (chosen, rejected)]
        margin = -(sums[0] - sums[0].detach()) + (sums[1] - sums[1].detach())
        dpo = torch.autograd.grad(-logsigmoid(beta * margin), weights, retain_graph=True)
        sft = torch.autograd.grad(beta / 2 * (sums[0] - sums[1]), weights)
        for ours, theirs in zip(sft, dpo):
            torch.testing.assert_close(ours, theirs)


def test_a_step_on_the_top_pair_raises_the_behaviour_and_on_the_swapped_pair_lowers_it(pairs, queries):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    sites, query = resolve_sites(lm, "attention"), LossQuery(queries)
    result = score_preferences(GradDot(lm, queries), pairs, progress=False)
    row = int(result.top(1).rows[0])

    def change(read):
        (chosen,), (rejected,) = lm.tokenize(read.chosen[[row]]), lm.tokenize(read.rejected[[row]])
        loss = answer_loss(lm.model, chosen, "mean") - answer_loss(lm.model, rejected, "mean")
        gradients = torch.autograd.grad(loss, [s.module.weight for s in sites])
        before = query.value(lm)
        with torch.no_grad():
            for site, gradient in zip(sites, gradients):
                site.module.weight -= 1e-4 * gradient
            after = query.value(lm)
            for site, gradient in zip(sites, gradients):
                site.module.weight += 1e-4 * gradient
        return (after - before) / 1e-4

    assert result.scores[row] > 0 and change(pairs) == pytest.approx(result.scores[row], rel=1e-2)
    assert change(result.swap(count=1)) == pytest.approx(-result.scores[row], rel=1e-2)


def test_every_method_is_scored_as_a_difference_and_swapping_turns_the_sign(pairs, queries):
    lm = load_model(tiny_pair("llama", dtype=torch.float64))
    concept = concept_of(lm)
    scorers = [
        VectorFilter(lm, concept),
        ActivationGradient(lm, concept),
        ResidualChange(lm, concept),
        ResidualChange(lm, concept, form="within_token", method="within"),
        ProjectionDifference(lm, concept, max_new_tokens=4, progress=False, empty="mean"),
        GradDot(lm, queries),
        GradCos(lm, queries),
        ResponseLength(),
        BM25(queries),
        RandomScore(),
    ]
    turned, results = pairs.swap([1, 3]), []
    for scorer in scorers:
        result = score_preferences(scorer, pairs, progress=False, lm=lm)
        results.append(result)
        assert isinstance(result, PairAttribution) and len(result) == len(pairs)
        if isinstance(scorer, RandomScore):
            continue
        if scorer.lm is not None:
            sides = [scorer.score(side, progress=False).scores for side in (pairs.chosen, pairs.rejected)]
            np.testing.assert_allclose(result.scores, sides[0] - sides[1], rtol=1e-5, atol=1e-9)
        again = score_preferences(scorer, turned, progress=False, lm=lm)
        np.testing.assert_allclose(again.scores, result.scores * [1, -1, 1, -1, 1], rtol=1e-5, atol=1e-9)
        assert again.card.data_fingerprint != result.card.data_fingerprint
    assert results[0].centre == 0 and "shows more" in results[0].reading and results[0].card.mean is None
    assert "learning to prefer" in results[5].reading and results[7].card.zero == "none"
    assert results[3].reading.startswith("Chosen minus rejected: above zero, a step that may only")
    assert "Highest scores" in results[0]._repr_html_()
    assert len(compare(results).spearman) == len(scorers)


# --- acting on them ---


def test_drop_keep_and_swap_write_the_records_of_the_file(tmp_path, queries):
    source, out = tmp_path / "dpo.jsonl", tmp_path / "out.jsonl"
    texts = [json.dumps({**record, "row": row}, indent=None) for row, record in enumerate(PAIRS)]
    source.write_text("\r\n".join(texts), newline="")
    read, lm = load_preferences(source), load_model(tiny_pair("llama"))
    result = score_preferences(GradDot(lm, queries), read, progress=False)
    order = np.argsort(-result.scores).tolist()
    dropped, kept = result.drop(count=2), result.keep(count=2)
    assert isinstance(dropped, Preferences) and isinstance(kept, Preferences)
    assert dropped.to_json(out, overwrite=True).read_text().splitlines() == [
        t for r, t in enumerate(texts) if r not in order[:2]
    ]
    assert [pair.chosen.metadata["row"] for pair in kept] == sorted(order[3:])
    swapped = result.swap(count=2)
    assert "2 (40%) highest by GradDot" in swapped.name and "2 (40%) highest" in dropped.name
    written = swapped.to_json(out, overwrite=True).read_bytes().decode().split("\r\n")
    for row, (old, new) in enumerate(zip(texts, written)):
        assert (old != new) == (row in order[:2])
    lowest = result.swap(threshold=float(np.sort(result.scores)[1]), lowest=True)
    assert [a.id != b.id for a, b in zip(read, lowest)] == [row == order[-1] for row in range(len(read))]
    assert "below" in lowest.name
    top = result.top(2)
    assert top.pairs.ids == [read.ids[row] for row in order[:2]]
    for act in (top.swap, top.drop):
        with pytest.raises(AttributionError, match="part, 2 of 5"):
            act(count=1)
    saved = Attribution.load(result.save(tmp_path / "pairs.parquet"))
    assert saved.card == result.card and saved.centre == 0
    assert (
        saved.drop(count=2).to_json(out, overwrite=True).read_bytes()
        == dropped.to_json(tmp_path / "b").read_bytes()
    )
    assert read.swap(saved.top(2).rows).ids == swapped.ids


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_saved_result_opens_with_its_pairs_in_every_layout(layout, tmp_path):
    rows = [LAYOUTS[layout] | {"n": i} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row, indent=None) + "\n" for row in rows))
    for source in (tmp_path / "pairs.jsonl", rows):
        pairs = load_preferences(source)
        card = score_preferences(
            ResponseLength(), pairs, progress=False, lm=load_model(tiny_pair("llama"))
        ).card
        result = PairAttribution(pairs, [3.0, 1.0, 4.0, 2.0], card)
        opened = PairAttribution.load(result.save(tmp_path / "scores.parquet", overwrite=True))
        assert opened.pairs.ids == pairs.ids and (opened.scores == result.scores).all()
        ours = result.swap(count=2).to_json(tmp_path / "ours.jsonl", overwrite=True).read_bytes()
        assert opened.swap(count=2).to_json(tmp_path / "opened.jsonl", overwrite=True).read_bytes() == ours


def test_a_result_without_pairs_is_not_opened_as_pairs(pairs, tmp_path):
    lm = load_model(tiny_pair("llama"))
    single = GradDot(lm, pairs.chosen[:2]).score(pairs.chosen, progress=False)
    with pytest.raises(ScorerError, match="scores of single answers"):
        load_pair_attribution(single.save(tmp_path / "single.parquet"))
    result = score_preferences(ResponseLength(), pairs, progress=False, lm=lm)
    with pytest.raises(AttributionError, match="this is a part"):
        load_pair_attribution(result.top(2).save(tmp_path / "part.parquet"))


def test_ties_are_told(pairs):
    lm = load_model(tiny_pair("llama"))
    result = score_preferences(ResponseLength(), pairs, progress=False, lm=lm)
    even = PairAttribution(pairs, [1.0, 1.0, 0.0, 1.0, 0.0], result.card)
    assert "ties at the cut by file order" in even.swap(count=2).name
    assert "ties at the cut by file order" in even.drop(count=2).name
    assert "ties" not in even.swap(count=3).name


def test_scoring_errors(pairs, queries):
    lm = load_model(tiny_pair("llama"))
    cascade = Cascade(GradDot(lm, queries), InfluenceFunction(lm, queries), keep=0.4, sample=2, top=1)
    with pytest.raises(ScorerError, match="no difference"):
        score_preferences(cascade, pairs)
    with pytest.raises(ScorerError, match="use load_preferences"):
        score_preferences(GradDot(lm, queries), pairs.chosen)
    with pytest.raises(ScorerError, match="pass lm="):
        score_preferences(ResponseLength(), pairs)
    vector = torch.ones(lm.width)
    before = VectorFilter(lm, tensor_concept(vector, 1, lm=lm, name="v", pooling="prompt_last"))
    with pytest.raises(AttributionError, match="exactly 0"):
        score_preferences(before, pairs, progress=False)
