"""The unit of a score: multiples of its null against oracles, planted examples, order, files; which leads."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
from test_attribution import make

from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import load_documents
from concept_tda.data.tokens import token_kinds, tokenize
from concept_tda.results.attribution import Attribution, load_attribution
from concept_tda.results.cards import STEPS, Null, QueryCard, expected_counts
from concept_tda.results.metrics import AttributionError, percent_text
from concept_tda.views.contents import Contents, browser_table, example_to_read
from concept_tda.views.html import colour_scale, example_html, score_parts
from concept_tda.views.report import write_report

from tiny import tiny_tokenizer

GRADIENT = QueryCard("Concept Influence", "sycophancy", zero="gradient")
PROJECTION = replace(GRADIENT, method="Vector Filter", zero="projection")


def linear(n=400, draws=300, seed=0, plant=0.0, width=12):
    """Scores [N] along a direction and [N, K] along others like it: null ones. `plant` moves the first
    example along the direction."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, width)) * np.exp(rng.normal(size=(n, 1)))  # lengths differ tenfold
    directions = rng.normal(size=(draws + 1, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rows[0] += plant * directions[-1]
    scores = rows @ directions.T
    return scores[:, -1], scores[:, :-1]


def result_of(scores, card=GRADIENT):
    return Attribution(make(len(scores)).conversations, scores, card)


@pytest.mark.parametrize("card", [GRADIENT, PROJECTION])
def test_scores_that_are_null_have_multiples_of_spread_one(card):
    spreads = []
    for seed in range(20):  # one direction at a time; twenty of them average out
        scores, draws = linear(seed=seed)
        times = result_of(scores, card).with_null(draws).times_null
        spreads.append((times**2).mean())
        assert abs(np.mean(times)) < 0.3
    assert 0.93 < np.sqrt(np.mean(spreads)) < 1.07


def test_a_planted_example_stands_out_and_short_ones_do_not_hide():
    scores, draws = linear(plant=40.0)
    found = result_of(scores).with_null(draws)
    assert found.times_null[0] > 3 > np.abs(found.times_null[1:]).mean() * 2
    # an example ten times as long is not ten times as far from chance
    longer = result_of(np.append(scores, 10 * scores[0])).with_null(np.vstack([draws, 10 * draws[0]]))
    assert np.isclose(longer.times_null[-1], longer.times_null[0])


def test_multiples_keep_the_sign_and_are_those_of_the_definition():
    scores, draws = linear(n=60, draws=50)
    gradient, projection = (result_of(scores, card).with_null(draws) for card in (GRADIENT, PROJECTION))
    assert (np.sign(gradient.times_null) == np.sign(scores)).all()
    assert np.allclose(gradient.times_null, scores / np.sqrt((draws**2).mean(1)))
    away = draws - draws.mean(0)
    expected = (scores - scores.mean()) / np.sqrt((away**2).mean(1))
    assert np.allclose(projection.times_null, expected)
    flipped = result_of(-scores).with_null(-draws)
    assert np.allclose(flipped.times_null, -gradient.times_null)


def test_multiples_do_not_depend_on_the_order_of_the_file_nor_of_the_draws():
    scores, draws = linear(n=50, draws=40)
    for card in (GRADIENT, PROJECTION):
        result, order = result_of(scores, card), np.random.default_rng(1).permutation(50)
        shuffled = Attribution(result.conversations.select(order), scores[order], card)
        expected = result.with_null(draws).times_null
        assert np.allclose(shuffled.with_null(draws[order]).times_null, expected[order])
        assert np.allclose(result.with_null(draws[:, ::-1]).times_null, expected)
        as_results = [Attribution(shuffled.conversations, one, card) for one in draws[order].T]
        assert np.allclose(result.with_null(as_results).times_null, expected)  # matched by id
        assert np.allclose(result.with_null(draws).select(order).times_null, expected[order])


def test_a_null_is_saved_and_loaded_with_its_result_and_its_parts(tmp_path):
    scores, draws = linear(n=40, draws=100)
    two = Attribution(make(40).conversations, np.stack([scores, 2 * scores], 1), GRADIENT, queries=["a", "b"])
    for number, one in enumerate((result_of(scores), two)):
        beside = one.with_null(draws, of="random directions of a test", seed=7)
        for part in (beside, beside.query(beside.queries[0]).top(5)):
            path = tmp_path / f"{number}-{len(part)}.parquet"
            part.save(path)
            again = load_attribution(path)
            assert again == part and again.null == part.null
            assert (
                again.null.draws == 100 and again.null.seed == 7 and len(again.null.quantiles[0]) == STEPS + 1
            )
            assert (again.times_null == part.times_null).all()
        assert beside != one and load_attribution(path) != one
    assert np.allclose(two.with_null(draws).times_null[:, 1], 2 * two.with_null(draws).times_null[:, 0])
    plain = tmp_path / "plain.parquet"
    result_of(scores).save(plain)
    assert load_attribution(plain).null is None and np.isnan(load_attribution(plain).times_null).all()


def test_the_line_of_the_null_counts_what_the_draws_put_between_the_edges():
    scores, draws = linear(n=200, draws=150)
    for card in (GRADIENT, PROJECTION):
        result = result_of(scores, card).with_null(draws)
        away = draws - (draws.mean(0) if card.zero == "projection" else 0)
        edges = np.linspace(-4, 4, 17) + result.centre
        counted = np.histogram(away + result.centre, edges)[0] / 150
        assert np.allclose(expected_counts(result.null, edges, result.centre, 200), counted, atol=1)
        line = result.plot().patches[-1]
        assert np.isclose(line.get_data().values.sum(), 200, atol=25)
    everything = expected_counts(result.null, np.array([-1e9, 1e9]), 0, 200)
    assert np.isclose(everything[0], 200)


def test_which_number_leads():
    scores, draws = linear(n=30, draws=20)
    assert result_of(scores).leading.kind == "spread"
    assert result_of(scores).with_null(draws).leading.unit == "× null"
    unsigned = result_of(scores, replace(GRADIENT, method="Length", zero="none"))
    assert unsigned.leading.kind == "none" and unsigned.distance_words(0) == "" and unsigned.unit_words == ""
    in_nats = replace(GRADIENT, method="Training Influence", effect=-0.5, unit="nats per token")
    adds = result_of(scores, in_nats).with_null(draws)  # its own unit leads, whatever else is there
    assert adds.leading.kind == "effect" and np.allclose(adds.leading.values, 0.5 * scores)
    assert np.allclose(adds.leading.values, -adds.effects)
    assert adds.distance_words(3) == f"{0.5 * scores[3]:+.3g} nats per token"
    for result, words in ((adds, "nats per token"), (result_of(scores).with_null(draws), "× null")):
        assert words in repr(result).splitlines()[1]
        assert result.leading.text(int(result.top(1).rows[0])).split()[0] in repr(result).splitlines()[2]
    table = result_of(scores).with_null(draws).to_pandas()
    assert np.allclose(table["times_null"], result_of(scores).with_null(draws).times_null)


def test_what_is_no_null_is_refused():
    scores, draws = linear(n=30, draws=20)
    result = result_of(scores)
    for null, words in [
        (draws[:, :4], "at least 5"),
        (draws[:9], "got shape"),
        (np.full_like(draws, np.nan), "finite"),
        (result_of(scores[:9]), "different examples"),
    ]:
        with pytest.raises(AttributionError, match=words):
            result.with_null(null)
    with pytest.raises(AttributionError, match="no sign"):
        result_of(scores, replace(GRADIENT, zero="none")).with_null(draws)
    with pytest.raises(AttributionError, match="part"):
        result.top(5).with_null(draws[:5])
    same = np.tile(draws[:, :1], 9) * np.append(0, np.ones(29))[:, None]  # an example that no draw moves
    assert np.isnan(result.with_null(same).times_null[0]) and result.with_null(same).distance_words(0) == ""
    assert str(Null("signs", 128, None, [])) == "128 signs"


# what lies where


def sunk(n=6, kind="gradient"):
    "Chats in ChatML with made-up token scores, most of them on the first token."
    data = tokenize(make(n).conversations, tiny_tokenizer())
    rng = np.random.default_rng(0)
    scores = [rng.normal(size=length) * np.append(30, np.ones(length - 1)) for length in data.lengths]
    return data, Attribution(
        data, [s.sum() for s in scores], replace(GRADIENT, zero=kind), token_scores=scores
    )


def test_parts_add_up_to_the_score_and_each_token_is_of_one_kind(tmp_path):
    data, result = sunk()
    parts, sizes = result.parts(), result.parts(absolute=True)
    assert list(parts) == ["sink", "template", "prompt", "response"] and list(parts.index) == list(range(6))
    assert np.allclose(parts.sum(axis=1), result.scores, atol=1e-4)  # token scores are kept in float32
    for row, item in enumerate(data):
        kinds, texts = result.kinds(row), np.array(data.tokens(row))
        assert kinds[0] == "sink" and (kinds == "response").tolist() == item.response_mask.tolist()
        said = lambda kind: "".join("".join(texts[kinds == kind]).split())
        asked = "".join(m["content"] for m in data.conversations[row].prompt)
        assert said("prompt") == "".join(asked.split()) and "<|im_start|>" in said("template")
        by_hand = sum(float(np.float32(s)) for s, k in zip(result.token_scores[row], kinds) if k == "prompt")
        assert np.isclose(parts["prompt"][row], by_hand)
    assert np.allclose(result.sink_shares, sizes["sink"] / sizes.sum(axis=1))
    assert f"{np.median(result.sink_shares):.0%}" in result.sink_words
    result.save(tmp_path / "scores.parquet")  # known without the tokenizer
    again = load_attribution(tmp_path / "scores.parquet")
    assert again.parts().equals(parts) and again.top(2).parts().equals(parts.loc[again.top(2).rows])


@pytest.mark.parametrize("asked", ["user", "assistant", "hi", "a\n\n  b", "😀 emoji", "<|im_end|>x", " x "])
@pytest.mark.parametrize("cut", [None, 25])
def test_the_kinds_of_prompts_that_look_like_a_template(asked, cut):
    chats = load_conversations([{"prompt": asked, "response": "yes, " * 20}])
    tokenizer = tiny_tokenizer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = tokenize(chats, tokenizer, max_tokens=cut)
    tokens, mask = data.tokens(0), data[0].response_mask
    kinds = token_kinds(tokens, mask, chats[0].messages)
    said = "".join(np.array(tokens)[kinds == "prompt"])
    assert "".join(said.split()) == "".join(asked.split()) or asked in ("assistant", "<|im_end|>x")
    assert (kinds[mask.numpy()] == "response").all() and len(kinds) == len(tokens)


def test_a_cut_prompt_and_a_rewritten_one():
    tokens = ["<|im_start|>", "user", "\n", "a long", " question th"]
    long = [{"role": "user", "content": "a long question that was cut"}]
    kinds = token_kinds(tokens, [False] * 5, long)
    assert kinds.tolist() == ["sink", "template", "template", "prompt", "prompt"]
    other = [{"role": "user", "content": "WORDS THAT ARE NOWHERE"}]
    kinds = token_kinds([*tokens, "<|im_end|>", "yes"], [False] * 6 + [True], other)
    assert kinds.tolist() == ["sink", *["prompt"] * 4, "template", "response"]
    assert token_kinds(["a", "b", "c"], [False, True, True], None).tolist() == ["sink", "text", "text"]


def test_a_window_of_a_document_has_sink_and_text():
    texts = [{"text": "one two three four five six seven eight"}] * 2
    data = tokenize(load_documents(texts, window=16), tiny_tokenizer())
    scores = [np.arange(1.0, 1 + length) for length in data.lengths]
    result = Attribution(data, [s.sum() for s in scores], GRADIENT, token_scores=scores)
    parts = result.parts()
    assert list(parts) == ["sink", "text"] and (parts["sink"] == 1).all()
    assert np.allclose(parts.sum(axis=1), result.scores)


def test_views_take_a_score_apart_in_the_unit_that_leads():
    _, result = sunk()
    draws = np.random.default_rng(1).normal(size=(6, 50)) * 9
    shifted = Attribution(  # a projection that is read from its mean
        sunk()[0], result.scores, PROJECTION, token_scores=result.token_scores
    )
    unit = {"gradient": "spreads", "null": "× null", "projection": "spreads"}
    cases = {"gradient": result, "null": result.with_null(draws), "projection": shifted}
    for name, one in cases.items():
        found = score_parts(one, 2)
        assert np.isclose(sum(amount for _, amount in found.parts), found.total, rtol=1e-5)
        assert found.unit == unit[name] and np.isclose(found.total, one.leading.values[2])
        page, example = example_html(one, 2), example_to_read(one, 2)
        assert f"= {found.total:+.2f} {found.unit}" in page and found.sink_words in page
        assert example["parts"]["unit"] == found.unit and example["turns"][0]["sink"]
    assert ("mean of the file" in dict(score_parts(shifted, 2).parts)) and "the attention sink" in page
    assert score_parts(result.without_token_scores(), 2) is None


def test_colours_are_scaled_without_the_first_token():
    _, result = sunk()
    without = [np.append(0, one[1:]) for one in result.token_scores]
    assert colour_scale(result.token_scores) == colour_scale(without)
    assert colour_scale(result.token_scores).limit < max(np.abs(one[0]) for one in result.token_scores) / 5
    shown = Contents(result)
    assert shown.scales == [colour_scale(without)]
    assert browser_table(shown)["methods"][0]["sink_words"] == result.sink_words


def test_a_report_and_a_figure_draw_the_null(tmp_path):
    result, rng = make(40), np.random.default_rng(0)
    draws = rng.normal(size=(40, 100))
    plain = write_report(result, tmp_path / "plain.html").read_text()
    page = write_report([result, make(40, seed=1)], tmp_path / "null.html", null=draws).read_text()
    carried = write_report(result.with_null(draws), tmp_path / "carried.html").read_text()
    assert "class='null'" not in plain and "× null" not in plain
    for text in (page, carried):
        assert text.count("class='null'") == 1 and "where 100 random directions put the examples" in text
        best = result.with_null(draws).top(1)
        assert f"higher than {percent_text(best.percentiles[0])} · {best.distance_words(0)}" in text
        assert '"kind":"null"' in text and "1 × null is how far 100 random directions" in text
