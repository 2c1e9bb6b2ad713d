"""Attribution: oracles for ranks, ties and detection; round trips; damaged files; hostile text."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats

from concept_tda.data.conversations import Conversation, Conversations, load_conversations
from concept_tda.data.tokens import TokenizedConversation, TokenizedConversations
from concept_tda.foundation.display import html_of, safe_text
from concept_tda.foundation.errors import ConceptTDAError, StorageError
from concept_tda.results.attribution import FORMAT_VERSION, Attribution, load_attribution
from concept_tda.results.cards import ZERO, Cost, QueryCard
from concept_tda.results.comparison import compare
from concept_tda.results.metrics import (
    AttributionError,
    cut_rows,
    detection_metrics,
    rank_scores,
    score_percentiles,
    spearman,
)
from concept_tda.views.html import (
    ColourScale,
    colour_limit,
    conversation_html,
    example_html,
    histogram_svg,
    table_html,
)

matplotlib.use("Agg")
HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</div></article><h1>out</h1>",
    "' onmouseover='alert(1)",
    '" onmouseover="alert(1)',
    "<|im_end|>\n<|im_start|>user",
    "</s> <bos> [INST]",
    "&lt;b&gt; &amp;",
    "{{ 7 * 7 }}{% if x %}",
    "<!-- --><style>*{display:none}</style>",
    "שלום \u202eevil\u202c <b>",
    "\x1b[31mred\x00\x07",
    "a" * 5000,
    "😀👩‍👩‍👧 ∂ﬀ",
    "]]><svg onload=alert(1)>",
]


def chat(prompt, response, **metadata):
    return Conversation(
        ({"role": "user", "content": prompt}, {"role": "assistant", "content": response}), metadata=metadata
    )


def make(n=12, seed=0, queries=1, tokens=False, **metadata):
    """A result with made-up scores on n conversations."""
    rng = np.random.default_rng(seed)
    data = Conversations(
        [chat(f"question {i}", f"answer {i}", bad=bool(i % 3 == 0), number=i, **metadata) for i in range(n)],
        "train",
    )
    card = QueryCard(
        "Concept Influence",
        "sycophancy",
        model="tiny",
        model_fingerprint="ab",
        data="train",
        data_fingerprint=data.fingerprint,
        layer=3,
        pooling="response_mean",
        zero="gradient",
        settings={"queries": 5},
        notes=["one example was cut"],
        cost=Cost(2.5, 1000, 2**20),
    )
    extra = {}
    if tokens:
        texts = [["<|user|>", f" question {i}", " answer", f" {i}", "<|end|>"][: 5 - i % 2] for i in range(n)]
        shape = lambda t: len(t) if queries == 1 else (len(t), queries)
        extra = dict(
            tokens=texts,
            token_scores=[rng.normal(size=shape(t)).astype(np.float32) for t in texts],
            response_masks=[np.arange(len(t)) >= 2 for t in texts],
        )
    names = None if queries == 1 else [f"concept {q}" for q in range(queries)]
    return Attribution(
        data, rng.normal(size=n if queries == 1 else (n, queries)), card, queries=names, **extra
    )


# ranks, agreement, detection ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_ranks_percentiles_and_spearman_against_their_definitions_with_ties(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 6, 40).astype(float), rng.integers(0, 9, 40).astype(float)
    assert rank_scores(first).tolist() == [1 + int((first > value).sum()) for value in first]
    assert np.allclose(
        score_percentiles(first), [stats.percentileofscore(first, value, kind="mean") for value in first]
    )
    assert np.isclose(spearman(first, second), stats.spearmanr(first, second).statistic)
    both = rank_scores(np.stack([first, second], axis=1))
    assert (both[:, 0] == rank_scores(first)).all() and (both[:, 1] == rank_scores(second)).all()


def test_spearman_of_a_constant_is_not_a_number():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("seed", range(5))
def test_detection_counts_pairs_and_averages_over_orders_of_ties(seed):
    rng = np.random.default_rng(seed)
    scores, labels = (
        rng.integers(0, 3, 6).astype(float),
        np.array([1, 0, 1, 0, 0, 1], bool)[rng.permutation(6)],
    )
    found = detection_metrics(scores, labels, k=(1, 2, 4, 6))
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert np.isclose(found["AUROC"], np.mean(pairs))
    orders = [
        order
        for order in itertools.permutations(range(6))
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:]))
    ]
    for k in (1, 2, 4, 6):
        hits = np.mean([labels[list(order[:k])].sum() for order in orders])
        assert np.isclose(found[f"precision@{k}"], hits / k) and np.isclose(
            found[f"recall@{k}"], hits / labels.sum()
        )
    assert found["base rate"] == 0.5 and found["positives"] == 3


def test_a_constant_score_gets_the_base_rate_whatever_the_file_order():
    for labels in ([1, 0, 1, 0, 0], [0, 0, 0, 1, 1]):
        found = detection_metrics(np.ones(5), labels, k=(1, 3))
        assert found["AUROC"] == 0.5 and all(
            np.isclose(found[name], 0.4) for name in ("AUPRC", "precision@1", "precision@3")
        )


@pytest.mark.parametrize(
    "labels, k, words",
    [
        ([1, 1, 1], None, "all 3 labels are True"),
        ([0, 0, 0], None, "all 3 labels are False"),
        ([1, 0], None, "one label for each"),
        (["yes", "no", "no"], None, "'yes'"),
        ([1, 0, 0], (4,), "k=4"),
        ([1, 0, 0], (0,), "k=0"),
    ],
)
def test_labels_that_cannot_be_used(labels, k, words):
    with pytest.raises(AttributionError, match=words):
        detection_metrics([1.0, 2.0, 3.0], labels, k)


# cutting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_cut_takes_one_end_and_breaks_ties_by_file_order(seed, lowest):
    scores = np.random.default_rng(seed).integers(0, 5, 30).astype(float)
    for count in (1, 7, 29):
        expected = sorted(sorted(range(30), key=lambda i: (scores[i] if lowest else -scores[i], i))[:count])
        assert cut_rows(scores, count=count, lowest=lowest).tolist() == expected
    assert (
        cut_rows(scores, fraction=0.1, lowest=lowest).tolist()
        == cut_rows(scores, count=3, lowest=lowest).tolist()
    )
    beyond = cut_rows(scores, threshold=2, lowest=lowest)
    assert beyond.tolist() == [i for i in range(30) if (scores[i] < 2 if lowest else scores[i] > 2)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(), "given: none"),
        (dict(fraction=0.1, count=2), "fraction, count"),
        (dict(fraction=0.5, threshold=0.0), "fraction, threshold"),
        (dict(fraction=0), "between 0 and 1"),
        (dict(fraction=1), "between 0 and 1"),
        (dict(fraction=-0.1), "between 0 and 1"),
        (dict(fraction=10), "fraction=0.1"),
        (dict(fraction=float("nan")), "between 0 and 1"),
        (dict(fraction=0.01), "rounds to 0"),
        (dict(fraction=0.99), "rounds to 12"),
        (dict(count=0), "count=0"),
        (dict(count=12), "all 12"),
        (dict(count=-3), "count=-3"),
        (dict(count=2.5), "count=2.5"),
        (dict(count=True), "count=True"),
    ],
)
def test_cuts_that_make_no_sense_are_refused_by_drop_and_keep(arguments, words):
    result = make()
    for method in (result.drop, result.keep):
        with pytest.raises(AttributionError, match=re.escape(words)):
            method(**arguments)


def test_a_threshold_may_drop_nothing_but_not_everything():
    result = make()
    assert len(result.drop(threshold=100)) == 12 and "minus 0" in result.drop(threshold=100).name
    with pytest.raises(AttributionError, match="takes all 12"):
        result.drop(threshold=-100)
    with pytest.raises(AttributionError, match="takes all 12"):
        result.keep(threshold=-100)


def test_keep_is_what_drop_leaves_and_the_name_says_what_was_done():
    result = make()
    order = np.argsort(-result.scores)
    dropped = result.drop(count=3)
    assert dropped.ids == [id for i, id in enumerate(result.ids) if i not in order[:3]]
    assert result.keep(count=9).ids == dropped.ids and result.keep(fraction=0.75).ids == dropped.ids
    assert result.keep(count=3, highest=True).ids == [result.ids[i] for i in sorted(order[:3])]
    assert result.drop(count=3, lowest=True).ids == [result.ids[i] for i in sorted(order[:9])]
    cut = float(np.sort(result.scores)[5])
    assert (
        result.keep(threshold=cut).ids == result.drop(threshold=cut).ids
        and len(result.keep(threshold=cut)) == 6
    )
    assert (
        result.keep(threshold=cut, highest=True).ids == result.drop(threshold=cut, lowest=True).ids
        and len(result.keep(threshold=cut, highest=True)) == 7
    )
    assert dropped.name == "train minus 3 (25%) highest by Concept Influence"
    assert result.keep(count=3).name == "train only 3 (25%) lowest by Concept Influence"
    assert result.conversations.name == "train"


def test_the_record_admits_that_file_order_decided_about_a_tie():
    data = make(4).conversations
    tied = Attribution(data, [1.0, 5.0, 5.0, 0.0], QueryCard("Length", "x"))
    assert (
        tied.drop(count=1).name.endswith("ties at the cut by file order")
        and "ties" not in tied.drop(count=2).name
    )


def test_export_is_byte_for_byte_before_and_after_a_round_trip(tmp_path):
    lines = [
        b'{"prompt": "a",   "response": "b", "x": 1e3}\r\n',
        b'{"response": "d", "prompt": "c\\u00e9"}\r\n',
        '{"prompt":"é","response":"f\u2028g"}\r\n'.encode(),
        b'{"prompt": "g", "response": "h"}\n',
    ]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    result = Attribution(load_conversations(tmp_path / "in.jsonl"), [0.0, 3.0, 1.0, 2.0], QueryCard("m", "b"))
    for version in (result, load_attribution(result.save(tmp_path / "r.parquet"))):
        assert (
            version.drop(count=1).to_json(tmp_path / "out.jsonl", overwrite=True).read_bytes()
            == lines[0] + lines[2] + lines[3]
        )
        assert (
            version.keep(count=2).to_json(tmp_path / "out.jsonl", overwrite=True).read_bytes()
            == lines[0] + lines[2]
        )


# the result ---------------------------------------------------------------------------------------


def test_top_and_bottom_keep_ranks_and_percentiles_of_the_whole_file():
    result = make(tokens=True)
    order = np.argsort(-result.scores)
    for part, expected in ((result.top(4), order[:4]), (result.bottom(4), order[::-1][:4])):
        assert (
            part.rows.tolist() == expected.tolist()
            and part.scores.tolist() == result.scores[expected].tolist()
        )
        assert (
            part.ranks.tolist() == result.ranks[expected].tolist()
            and part.percentiles.tolist() == result.percentiles[expected].tolist()
        )
        assert (
            part.ids == [result.ids[i] for i in expected]
            and part.tokens == [result.tokens[i] for i in expected]
            and part.n_total == 12
        )
    assert result.top(3).top(1).ranks.tolist() == [1] and len(result.top(100)) == 12
    assert (
        result.bottom(12).drop(count=2).ids == result.drop(count=2).ids
    )  # all of them, so no part; exported in file order
    assert repr(result.bottom(12)).splitlines()[2].split()[0] == "12"
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(AttributionError, match="at least one"):
            result.top(wrong)


@pytest.mark.parametrize(
    "use",
    [
        lambda part: part.drop(count=1),
        lambda part: part.keep(count=1),
        lambda part: part.detection("bad"),
        lambda part: compare([part]),
    ],
)
def test_a_part_is_not_taken_for_the_whole(use):
    with pytest.raises(AttributionError, match="part, 5 of 12"):
        use(make().top(5))


@pytest.mark.parametrize(
    "scores, words",
    [
        (np.zeros(12), "exactly 0"),
        (np.r_[np.ones(11), np.nan], "row 11"),
        (np.r_[np.inf, np.ones(11)], "row 0"),
        (np.ones(11), "12 conversations"),
        (np.ones((12, 0)), "12 conversations"),
        (np.ones((12, 2, 2)), "12 conversations"),
        (np.stack([np.ones(12), np.zeros(12)], 1), "query 2 of 2"),
    ],
)
def test_scores_that_cannot_be_right(scores, words):
    base = make()
    with pytest.raises(AttributionError, match=words) as caught:
        Attribution(base.conversations, scores, base.card)
    assert "Concept Influence" in str(caught.value) and isinstance(caught.value, ConceptTDAError)
    if words == "row 11":
        assert base.ids[11] in str(caught.value)


def test_tokens_that_do_not_fit():
    base = make(2)
    texts = [["a", "b"], ["c"]]
    good = [np.ones(2), np.ones(1)]
    for arguments, words in (
        (dict(token_scores=good), "tokens="),
        (dict(tokens=texts), "together"),
        (dict(token_scores=good[:1], tokens=texts), "1 token_scores"),
        (dict(token_scores=good[::-1], tokens=texts), "row 0"),
        (dict(token_scores=[np.ones(2), [np.nan]], tokens=texts), "row 1"),
        (dict(token_scores=good, tokens=texts, response_masks=[[True, True], [True, False]]), "row 1"),
        (dict(token_scores=[np.ones((2, 2)), np.ones((1, 2))], tokens=texts), "row 0"),
    ):
        with pytest.raises(AttributionError, match=words):
            Attribution(base.conversations, [1.0, 2.0], base.card, **arguments)
    for names in (["one"], ["same", "same"], [1, 2]):
        with pytest.raises(AttributionError, match="2 different names"):
            Attribution(base.conversations, np.ones((2, 2)), base.card, queries=names)
    with pytest.raises(AttributionError, match="load_conversations"):
        Attribution([1, 2], [1.0, 2.0], base.card)


def test_tensors_lists_and_half_precision_become_the_same_float64_result():
    base = make(3)
    values = [0.5, -2.0, 3.0]
    forms = [
        values,
        torch.tensor(values),
        torch.tensor(values, dtype=torch.bfloat16),
        torch.tensor(values, requires_grad=True),
        np.float32(values),
        np.array(values)[:, None],
    ]
    results = [Attribution(base.conversations, form, base.card) for form in forms]
    assert all(
        result == results[0] and result.scores.dtype == np.float64 and result.scores.shape == (3,)
        for result in results
    )
    mine = np.array(values)
    result = Attribution(base.conversations, mine, base.card)
    mine[0] = 99.0
    assert result.scores[0] == 0.5
    with pytest.raises(ValueError):
        result.scores[0] = 1.0


def test_tokenized_conversations_bring_their_own_tokens_and_masks():
    base = make(2)

    class Tokenized(TokenizedConversations):
        def tokens(self, row):
            return [f"{row}-{int(i)}" for i in self[row].input_ids]

    items = [
        TokenizedConversation(id, torch.arange(3 + i), torch.arange(3 + i) > 0)
        for i, id in enumerate(base.ids)
    ]
    result = Attribution(
        Tokenized(base.conversations, items),
        [1.0, 2.0],
        base.card,
        token_scores=[torch.ones(3), torch.ones(4)],
    )
    assert result.tokens == [["0-0", "0-1", "0-2"], ["1-0", "1-1", "1-2", "1-3"]] and result.response_masks[
        1
    ].tolist() == [False, True, True, True]
    assert Attribution(Tokenized(base.conversations, items), [1.0, 2.0], base.card).tokens is None


def test_several_queries_ask_which():
    result = make(queries=3, tokens=True)
    assert result.scores.shape == result.ranks.shape == result.percentiles.shape == (12, 3)
    second = result.query("concept 1")
    assert (second.scores == result.values[:, 1]).all() and second.ranks.tolist() == rank_scores(
        result.values[:, 1]
    ).tolist()
    assert (second.token_scores[4] == result.token_scores[4][:, 1]).all() and second.query() is second
    assert (
        result.top(2, query="concept 1").ids == second.top(2).ids
        and result.drop(count=2, query="concept 1").ids == second.drop(count=2).ids
    )
    assert "concept 1" in result.drop(count=2, query="concept 1").name
    for use in (
        result.top,
        result.bottom,
        lambda: result.drop(count=1),
        lambda: result.keep(count=1),
        lambda: result.correlate(second),
        result.plot,
    ):
        with pytest.raises(AttributionError, match="'concept 0', 'concept 1', 'concept 2'"):
            use()
    with pytest.raises(AttributionError, match="no query 'evil'"):
        result.query("evil")
    found = result.detection("bad", k=3)
    assert list(found.index) == result.queries and np.isclose(
        found.loc["concept 2", "AUROC"],
        detection_metrics(result.values[:, 2], result.conversations.labels("bad"))["AUROC"],
    )
    frame = result.to_pandas()
    assert (frame["score concept 2"] == result.values[:, 2]).all() and "rank concept 0" in frame


def test_to_pandas_joins_score_text_and_metadata_by_row():
    result = make(score="from the file")  # a metadata column with a name of ours
    frame = result.top(3).to_pandas()
    assert (
        list(frame.index) == result.top(3).rows.tolist()
        and list(frame["rank"]) == [1, 2, 3]
        and list(frame["number"]) == list(frame.index)
    )
    assert (frame["metadata.score"] == "from the file").all() and frame["score"].is_monotonic_decreasing
    assert all(
        frame.loc[i, "response"] == f"answer {i}" and frame.loc[i, "id"] == result.ids[i] for i in frame.index
    )


def test_correlation_matches_examples_by_id_even_when_they_repeat():
    base = make(6)
    data = base.conversations.select([0, 1, 2, 2, 3, 4])  # row 2 occurs twice
    first = Attribution(data, [1.0, 2, 3, 4, 5, 7], base.card)
    order = [5, 2, 0, 4, 3, 1]
    second = Attribution(data.select(order), first.scores[order], base.card)
    assert np.isclose(
        first.correlate(second), stats.spearmanr([1, 2, 3, 4, 5, 7], [1, 2, 3, 4, 5, 7]).statistic, atol=0.1
    ) and first.correlate(first) == pytest.approx(1)
    with pytest.raises(AttributionError, match="different examples"):
        first.correlate(base)
    with pytest.raises(AttributionError, match="different examples"):
        base.correlate(first)


# files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        dict(),
        dict(tokens=True),
        dict(queries=3, tokens=True),
        dict(n=1),
        dict(note=None),
        dict(note={"nested": [1, "é"]}),
    ],
)
def test_what_is_loaded_equals_what_was_saved(tmp_path, arguments):
    result = make(**arguments)
    again = Attribution.load(result.save(tmp_path / "scores.parquet"))
    assert again == result and again.card == result.card and again.card.cost == result.card.cost
    for name in ("values", "_ranks", "_percentiles", "rows"):
        ours, theirs = getattr(result, name), getattr(again, name)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and (ours == theirs).all()
    assert (
        list(again.conversations) == list(result.conversations)
        and again.conversations.name == "train"
        and again.queries == result.queries
    )
    if result.tokens:
        assert again.tokens == result.tokens and all(
            (a == b).all() and a.shape == b.shape and a.dtype == b.dtype
            for a, b in zip(again.token_scores, result.token_scores)
        )
    part = result.top(5, query=result.queries[0])
    assert load_attribution(part.save(tmp_path / "part.parquet")) == part
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_equality_sees_every_difference():
    result = make(tokens=True)
    assert result == make(tokens=True)
    changed = [make(seed=1, tokens=True), make(tokens=False), make(n=11, tokens=True), result.top(12)]
    other_card = make(tokens=True)
    other_card.card.notes.append("something else")
    other_token = make(tokens=True)
    other_token.token_scores[3][0] += 1
    assert all(result != other for other in [*changed, other_card, other_token, "something else"])


def test_hostile_texts_and_half_surrogates_survive_a_round_trip(tmp_path):
    texts = [*HOSTILE, "half \ud800 pair"]
    data = Conversations([chat(text, text, note=text) for text in texts])
    result = Attribution(data, np.arange(len(texts)) + 1.0, QueryCard(HOSTILE[0], HOSTILE[1]))
    again = load_attribution(result.save(tmp_path / "r.parquet"))
    assert list(again.conversations) == list(data) and again == result


def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = make().save(tmp_path / "scores.parquet")
    before, write = path.read_bytes(), pq.write_table

    def interrupted(table, where, **options):
        write(table.slice(0, 2), where, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(seed=1).save(path, overwrite=True)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write"):
        make().save(tmp_path / "file" / "scores.parquet")


def test_every_truncation_and_every_flipped_bit_is_refused_or_harmless(tmp_path):
    result = make(3, tokens=True)
    path, data = tmp_path / "damaged.parquet", result.save(tmp_path / "scores.parquet").read_bytes()
    for length in range(0, len(data), 397):
        path.write_bytes(data[:length])
        with pytest.raises(AttributionError, match="not a Parquet file|ends too early"):
            load_attribution(path)
    refused = 0
    for position in range(0, len(data), 11):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            again = load_attribution(path)
        except AttributionError:
            refused += 1
        else:
            assert again == result, f"byte {position}"
    assert refused > len(data) / 44


def rewritten(path, change, table=None):
    """The saved file with its header changed."""
    table = pq.read_table(path) if table is None else table
    header = json.loads(pq.read_schema(path).metadata[b"concept_tda"])
    change(header)
    pq.write_table(table.replace_schema_metadata({"concept_tda": json.dumps(header)}), path)


def test_a_changed_score_or_card_does_not_match_its_checksum(tmp_path):
    result = make()
    path = result.save(tmp_path / "r.parquet")
    rewritten(path, lambda header: None)  # written anew by another Parquet writer, unchanged: believed
    assert load_attribution(path) == result
    table = pq.read_table(path)
    scores = [[value[0] + (1e-12 if i == 5 else 0)] for i, value in enumerate(table["scores"].to_pylist())]
    rewritten(
        path,
        lambda header: None,
        table.set_column(table.column_names.index("scores"), "scores", pa.array(scores)),
    )
    with pytest.raises(AttributionError, match="checksum"):
        load_attribution(path)
    path = make().save(tmp_path / "r.parquet", overwrite=True)
    rewritten(path, lambda header: header["card"].update(layer=4))
    with pytest.raises(AttributionError, match="checksum"):
        load_attribution(path)


@pytest.mark.parametrize(
    "version, advice",
    [(2, "update concept_tda"), (0, "version that wrote it"), (None, "version that wrote it")],
)
def test_a_file_of_another_version_says_which_and_what_to_do(tmp_path, version, advice):
    path = make().save(tmp_path / "r.parquet", overwrite=True)
    rewritten(path, lambda header: header.update(format_version=version))
    with pytest.raises(
        AttributionError, match=f"format version {version}.*reads version {FORMAT_VERSION}.*{advice}"
    ):
        load_attribution(path)


def test_files_that_are_not_results(tmp_path):
    (tmp_path / "text.parquet").write_text("hello, this is no table at all")
    (tmp_path / "empty.parquet").write_bytes(b"")
    pd.DataFrame(dict(prompt=["a"], response=["b"])).to_parquet(tmp_path / "table.parquet")
    for name, words in (
        ("absent", "no such file"),
        ("text", "not a Parquet file"),
        ("empty", "not a Parquet file"),
        ("table", "prompt, response.*load_conversations"),
    ):
        with pytest.raises(AttributionError, match=words) as caught:
            load_attribution(tmp_path / f"{name}.parquet")
        assert f"{name}.parquet" in str(caught.value)
    with pytest.raises(AttributionError, match="no such file"):
        load_attribution(tmp_path)


# comparison ---------------------------------------------------------------------------------------


def test_comparison_against_pandas_and_sets_whatever_the_order_of_the_examples():
    base = make(30)
    rng = np.random.default_rng(3)
    others = [rng.normal(size=30), rng.integers(0, 4, 30).astype(float)]
    shuffled = rng.permutation(30)
    second = Attribution(
        base.conversations.select(shuffled),
        others[0][shuffled],
        QueryCard("Shuffled", "sycophancy", cost=Cost(4.0, 0)),
    )
    third = Attribution(base.conversations, others[1], QueryCard("Ties", "sycophancy"))
    labels = base.conversations.labels("bad")
    comparison = compare([base, second, third], top=7, labels=labels, k=(5,))
    frame = pd.DataFrame({"Concept Influence": base.scores, "Shuffled": others[0], "Ties": others[1]})
    pd.testing.assert_frame_equal(comparison.spearman, frame.corr("spearman"), check_names=False)
    heads = {name: set(np.argsort(-frame[name].to_numpy(), kind="stable")[:7]) for name in frame}
    assert all(
        np.isclose(comparison.overlap.loc[a, b], len(heads[a] & heads[b]) / 7) for a in frame for b in frame
    )
    for name in frame:
        assert comparison.table.loc[name, "AUROC"] == detection_metrics(frame[name], labels)["AUROC"]
    guess = comparison.table.loc["guessing (base rate)"]
    assert (
        guess["AUROC"] == 0.5
        and np.isclose(guess["precision@5"], labels.mean())
        and np.isclose(guess["recall@5"], 5 / 30)
    )
    assert (
        comparison.table.loc["Concept Influence", "tokens/s"] == 400
        and comparison.table.loc["Shuffled", "seconds"] == 4
        and np.isnan(comparison.table.loc["Ties", "seconds"])
    )
    assert (
        compare([base, second], labels="bad").table.loc["Shuffled", "AUROC"]
        == comparison.table.loc["Shuffled", "AUROC"]
    )
    assert "AUROC" not in compare([base, second]).table
    gaps = comparison.disagreements("Shuffled", "Ties", n=3)
    gap = score_percentiles(others[0]) - score_percentiles(others[1])
    assert np.allclose(gaps.gap, np.sort(gap)[::-1][:3])
    assert (
        len(comparison.plot().axes) == 2
        and "guessing" in repr(comparison)
        and "guessing" in comparison._repr_html_()
    )


def test_many_results_are_drawn_as_bars_beside_one():
    results = {f"method {seed}": make(60, seed=seed) for seed in range(7)}
    results["method 6"] = make(60, seed=0)  # the same scores as method 0
    comparison = compare(results, top=10)
    assert len(comparison.plot().axes) == 2 and not comparison.plot().axes[0].images
    for name, figure in (("method 0", comparison.plot()), ("method 3", comparison.plot(beside="method 3"))):
        left, right = figure.axes
        names = [label.get_text() for label in left.get_yticklabels()]
        bars = [[bar.get_width() for bar in ax.patches[-6:]] for ax in (left, right)]
        assert set(names) == set(results) - {name}
        assert bars[0] == sorted(bars[0], reverse=True)
        assert np.allclose(bars[0], comparison.spearman.loc[names, name])
        assert np.allclose(bars[1], comparison.overlap.loc[names, name])
    assert left.yaxis_inverted()  # the nearest on top
    colour = comparison.plot().axes[0].patches[-6].get_facecolor()
    assert colour != comparison.plot().axes[0].patches[-4].get_facecolor()
    few = compare({name: results[name] for name in ("method 1", "method 2")})
    assert few.plot().axes[0].images and not few.plot(beside="method 2").axes[0].images
    with pytest.raises(AttributionError, match="no method 'method 9'"):
        comparison.plot(beside="method 9")


def test_the_band_beside_one_result_holds_unrelated_orders():
    rng = np.random.default_rng(0)
    results = {"one": make(100, seed=1), "other": make(100, seed=2)}
    left, right = compare(results, top=20).plot(beside="one").axes
    orders = [rng.permutation(100) for _ in range(4000)]
    agreement = [stats.spearmanr(order, np.arange(100)).statistic for order in orders[:1000]]
    shared = [len(set(order[:20].tolist()) & set(range(20))) / 20 for order in orders]
    for ax, values in ((left, agreement), (right, shared)):
        low = ax.patches[0].get_x() - 1e-9
        inside = np.mean([low <= one <= low + ax.patches[0].get_width() + 2e-9 for one in values])
        assert 0.93 < inside < 0.99


def test_comparison_names_tell_results_apart():
    first, second, several = make(), make(seed=1), make(queries=2)
    second.card.behaviour, second.queries = "evil", ["evil"]
    assert list(compare([first, second]).attributions) == [
        "Concept Influence: sycophancy",
        "Concept Influence: evil",
    ]
    assert len(compare([first, first]).attributions) == 2
    assert list(compare({"mine": first, "yours": several}).attributions) == [
        "mine",
        "yours: concept 0",
        "yours: concept 1",
    ]
    for wrong, words in (
        ([], "at least one"),
        ([first, "x"], "not a str"),
        ([first, make(11)], "different examples"),
    ):
        with pytest.raises(AttributionError, match=words):
            compare(wrong)


# views --------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.open = set(), set(), [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag not in ("path", "rect", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "rect"):
            assert self.open.pop() == tag, f"unbalanced {tag}"

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text.append(data)


def visible(text):
    return "".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in text)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("with_tokens", [False, True])
def test_hostile_text_is_shown_and_never_markup(text, with_tokens):
    data = Conversations([chat(text, text, **{text[:50]: text}), chat("plain", "plain")], text)
    tokens = [[text[i : i + 7] for i in range(0, len(text), 7)], ["plain"]]
    extra = (
        dict(
            tokens=tokens,
            token_scores=[np.linspace(-1, 1, len(t)) for t in tokens],
            response_masks=[np.arange(len(t)) % 2 == 0 for t in tokens],
        )
        if with_tokens
        else {}
    )
    result = Attribution(
        data, [1.0, -1.0], QueryCard(text, text, notes=[text], settings={text: text}), **extra
    )
    for page in (
        result._repr_html_(),
        result.card._repr_html_(),
        compare({text: result, "b": result})._repr_html_(),
        histogram_svg([1, 2], label=text),
        result.bottom(1)._repr_html_(),
    ):
        seen = Reader(page)
        assert seen.tags <= {
            "div",
            "style",
            "details",
            "summary",
            "b",
            "span",
            "table",
            "thead",
            "tbody",
            "tr",
            "th",
            "td",
            "svg",
            "path",
            "rect",
            "text",
            "title",
            "h4",
            "article",
            "code",
            "bdi",
        }
        assert seen.attributes <= {
            "class",
            "open",
            "viewbox",
            "width",
            "height",
            "role",
            "aria-label",
            "d",
            "stroke",
            "stroke-dasharray",
            "opacity",
            "x",
            "y",
            "fill",
            "text-anchor",
            "title",
            "dir",
            "scope",
        }
        assert seen.open == []
    shown = "".join(
        Reader(
            conversation_html(
                data[0],
                *(v[0] for v in (tokens, extra["token_scores"], extra["response_masks"]))
                if with_tokens
                else (),
                visible=10**6,
                most=10**6,
            )
        ).text
    )
    if with_tokens:
        assert shown.replace("prompt", "").replace("response", "") == visible(text)
    else:
        assert shown == f"user{visible(text)}assistant{visible(text)}"


def test_control_and_direction_characters_do_not_reach_the_terminal():
    data = Conversations([chat(text, text) for text in HOSTILE])
    shown = repr(Attribution(data, np.arange(len(HOSTILE)) + 1.0, QueryCard("m", "b")).top(20))
    assert len(shown.splitlines()) == len(HOSTILE) + 3 and not re.search(
        r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown
    )


def test_terminal_view_shows_both_ends_aligned():
    lines = repr(make(30)).splitlines()
    assert lines[0] == "Concept Influence · sycophancy · tiny · 30 examples" and len(lines) == 12
    assert [int(line.split()[0]) for line in lines[2:7]] == [1, 2, 3, 4, 5] and [
        int(line.split()[0]) for line in lines[8:11]
    ] == [28, 29, 30]
    assert len({line.index("→") for line in lines[2:7]}) <= 2 and "answer" in lines[2]


def test_one_colour_scale_symmetric_around_zero():
    result = make(3, tokens=True)
    part = result._with(token_scores=[np.float32([9, -2, 2, -1, 0])[: len(t)] for t in result.tokens])
    limit = colour_limit([scores[1:] for scores in part.token_scores])  # the first is the attention sink
    assert limit == 2
    page = example_html(part, 0, scale=ColourScale(limit))
    assert "class='n9" in page and "class='p9'" in page and page.count("title='+0'") == 1
    shade = ColourScale(2.0).shade
    assert [shade(-v) for v in (0.1, 0.5, 1, 2, 9)] == [
        shade(v).replace("p", "n") for v in (0.1, 0.5, 1, 2, 9)
    ]
    whole = result._repr_html_()  # the exact values are there on hovering
    assert all(f"title='{score:+.3g}'" in whole for scores in result.token_scores for score in scores[1:])


def test_prompt_and_response_are_told_apart_by_the_mask():
    page = conversation_html(
        chat("", ""), ["a", "b", "c", "d"], [0, 0, 0, 0], [False, True, False, True], scale=ColourScale(1.0)
    )
    assert re.findall(r"class='turn( response)?'.*?<bdi>(\w+)</bdi>.*?>(\w)</span></div>", page) == [
        ("", "prompt", "a"),
        (" response", "response", "b"),
        ("", "prompt", "c"),
        (" response", "response", "d"),
    ]


def test_long_texts_fold_and_nothing_is_lost_unsaid():
    text = " ".join(f"word{i}" for i in range(4000))
    for kwargs in (
        dict(),
        dict(
            tokens=re.findall(r"\s*\S+", text), token_scores=np.ones(4000), response_mask=np.ones(4000, bool)
        ),
    ):
        unlabelled = lambda page: re.sub(
            "<(summary|span class='(role|quiet)')>.*?</(summary|span)>", "", page
        )
        page = conversation_html(chat("", text), **kwargs, most=10**6)
        assert "".join(Reader(unlabelled(page)).text) == text and "more characters</summary>" in page
        page = conversation_html(chat("", text), **kwargs, most=2000)
        left_out = int(re.search(r"… ([\d,]+) more characters are in the data", page)[1].replace(",", ""))
        drawn = "".join(Reader(unlabelled(page)).text)
        assert len(drawn) + left_out == len(text) and text.startswith(drawn) and len(drawn) < 2300


def test_right_to_left_text_sets_its_own_direction():
    assert conversation_html(chat("שלום", "مرحبا")).count("dir='auto'") == 2


def test_table_escapes_names_and_marks_what_is_missing():
    page = table_html(pd.DataFrame({"<b>": [1.23456, np.nan], "words": ["<i>", "x"]}, index=["<u>", "y"]))
    assert (
        Reader(page).tags == {"div", "table", "thead", "tbody", "tr", "th", "td"}
        and "1.235" in page
        and "–" in page
    )
    counted = table_html(
        pd.DataFrame({"n": [12345], "novel": [True], "z": [2.0], "p": [2e-5]}), {"p": "{:.1g}"}
    )
    assert re.findall("<td[^>]*>([^<]*)</td>", counted) == ["12,345", "yes", "2.000", "2e-05"]


def test_safe_text_keeps_line_breaks():
    assert safe_text("a\n\tb\x00") == "a\n\tb\ufffd"


def test_histogram_counts_everything_and_survives_a_single_value():
    counts = lambda svg: sum(int(c) for c in re.findall(r"<title>(\d+) from", svg))
    assert (
        counts(histogram_svg(np.random.default_rng(0).normal(size=777))) == 777
        and counts(histogram_svg([3.0, 3.0, 3.0])) == 3
    )


def test_plot_marks_what_a_cut_drops():
    result = make(50)
    axes = result.plot(drop=0.1)
    assert axes.get_legend().get_texts()[0].get_text() == "dropped: 5 (10%) highest"
    assert axes.get_xlabel() == "score by Concept Influence" and result.plot(ax=axes) is axes


def test_card_round_trip_and_unknown_fields():
    card = make().card
    assert QueryCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card and "layer" in str(card)
    with pytest.raises(AttributionError, match="mood"):
        QueryCard.from_dict(card.to_dict() | {"mood": 1})
    assert np.isnan(Cost().tokens_per_second) and Cost(2.0, 10).tokens_per_second == 5


# what zero means ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", ZERO)
def test_sentence_and_colours_follow_what_the_card_says_of_zero(zero):
    base = make(tokens=True)
    base.card.zero = zero
    result = Attribution(
        base.conversations,
        base.scores + 3,
        base.card,
        tokens=base.tokens,
        token_scores=[s + 3 for s in base.token_scores],
        response_masks=base.response_masks,
    )
    page, text = html_of(result), repr(result)
    for shown in (page, text, str(result.card)):
        assert ("raises the behaviour" in shown) == (zero == "gradient")
    assert bool(re.search("class='[pn][1-9]", page)) == (zero in ("gradient", "projection"))
    assert ("spreads above" in page or " spreads<" in page) == (zero in ("gradient", "projection"))
    centre = {"gradient": 0.0, "projection": result.scores.mean()}.get(zero)
    assert result.centre == centre == result.top(2).centre
    if centre is not None:
        assert np.allclose(result.distances, (result.scores - centre) / result.scores.std())
    else:
        assert np.isnan(result.distances).all()
    assert f"{ZERO[zero][:30].lower()}" in text.lower()


def test_a_file_of_version_0_1_opens_and_makes_no_claim():
    """Written by 0.1 for Vector Filter, with the sentence that it gave to every method."""
    folder = Path(__file__).parent / "data"
    whole, part = (load_attribution(folder / f"{name}_0.1.parquet") for name in ("result", "part"))
    assert whole.scores.tolist() == [3.0, 1.5, 2.0, 4.0, 2.5, -0.5] and part.ranks.tolist() == [1, 2]
    assert whole.card.zero == "not recorded" and np.isclose(whole.spread, whole.scores.std())
    assert np.isnan(part.spread) and part.centre is None
    for shown in (repr(whole), html_of(whole), str(whole.card), repr(part), html_of(part)):
        assert "raises the behaviour" not in shown and "not recorded" in shown


def test_centre_and_spread_of_a_part_are_those_of_its_file(tmp_path):
    base = make()
    result = Attribution(base.conversations, base.scores, QueryCard("Vector Filter", "x", zero="projection"))
    part = load_attribution(result.top(3).save(tmp_path / "part.parquet"))
    assert part.centre == result.scores.mean() == part.card.mean[0] and part.spread == result.scores.std()
    assert np.allclose(part.distances, result.distances[part.rows])


def test_rows_show_the_last_question_whatever_stands_before_it():
    turns = [
        ("system", "Be kind."),
        ("user", "first"),
        ("assistant", "well"),
        ("user", "the last one?"),
        ("assistant", "yes"),
    ]
    data = Conversations([Conversation(tuple({"role": role, "content": text} for role, text in turns))])
    result = Attribution(data, [1.0], QueryCard("m", "b"))
    assert result.questions == ["the last one?"] == result.to_pandas().question.tolist()
    assert "the last one? → yes" in repr(result) and "class='question' dir='auto'>the last one?<" in html_of(
        result
    )


def test_every_scorer_declares_what_its_zero_means():
    from concept_tda.influence import baselines, neighbours, scorers

    found = {
        kind.method: kind.zero
        for room in (scorers, neighbours, baselines)
        for kind in vars(room).values()
        if isinstance(kind, type) and issubclass(kind, scorers.Scorer) and isinstance(kind.method, str)
    }
    by_zero = {zero: {method for method, kind in found.items() if kind == zero} for zero in ZERO}
    assert not by_zero["not recorded"] and neighbours.Cascade.zero == "none"
    assert by_zero["none"] == {"Random", "Length", "Loss", "BM25"}
    assert by_zero["projection"] == {"Vector Filter", "Projection Difference", "RepSim", "Random direction"}
    assert {"Concept Influence", "Influence Function", "GradDot", "GradCos", "TracIn", "LESS"} <= by_zero[
        "gradient"
    ]
