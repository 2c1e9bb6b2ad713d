"""Advice on constructed rankings of which the right answer is known, and how often chance alone sways it."""

from dataclasses import replace

import numpy as np
import pytest
from test_units import sunk

from concept_tda.data.conversations import load_conversations
from concept_tda.influence.queries import QueryExpression
from concept_tda.results.advice import advice
from concept_tda.results.attribution import Attribution
from concept_tda.results.calibration import combined
from concept_tda.results.cards import QueryCard
from concept_tda.results.metrics import AttributionError

TOPICS = {"on": ["roof rope ladder", "ladder gutter roof", "gutter rope roof"], "off": ["poem moon love"]}
SHOWS = QueryCard("Vector Filter", "recklessness", zero="projection")
MOVES = QueryCard("Concept Influence", "recklessness", zero="gradient")


def chats(topics):
    told = [TOPICS[topic][i % len(TOPICS[topic])] for i, topic in enumerate(topics)]
    return load_conversations(
        [{"prompt": "and now?", "response": f"{text} {i}"} for i, text in enumerate(told)]
    )


def rankings(low_of_shows, low_of_moves, seed=0):
    "Forty reckless texts on top of both; what stands lowest is given by topic for each of the two."
    random, topics = np.random.default_rng(seed), ["on"] * 80 + ["off"] * 40
    kind = np.repeat(["high", "on", "off"], 40)
    low = {"on": dict(high=2, on=-2, off=0), "off": dict(high=2, on=0, off=-2)}
    data = chats(topics)
    shows, moves = (
        Attribution(data, [low[end][one] + 0.3 * random.normal() for one in kind], card)
        for end, card in ((low_of_shows, SHOWS), (low_of_moves, MOVES))
    )
    return shows, moves


@pytest.mark.parametrize(
    "low_of_shows, low_of_moves, keeping",
    [("off", "on", "Concept Influence"), ("on", "off", "Vector Filter"), ("on", "on", "Vector Filter")],
)
def test_who_is_trusted_for_keeping_is_whose_low_end_is_on_topic(low_of_shows, low_of_moves, keeping):
    found = advice(*rankings(low_of_shows, low_of_moves))
    assert (found.dropping, found.keeping) == ("Vector Filter", keeping)


def express(higher):
    "What Concept Influence writes on its card, by the class that writes it."
    random = np.random.default_rng(0)
    expression = QueryExpression("recklessness", random.normal(size=20) + higher, random.normal(size=16))
    assert expression.expressed == (higher > 1)
    return f"{expression}, of which 16 were looked at"


def test_queries_that_do_not_show_the_behaviour_speak_against_the_influence_and_only_then():
    shows, moves = rankings("off", "on")
    asked = {
        higher: Attribution(moves.conversations, moves.scores, replace(MOVES, notes=["x", express(higher)]))
        for higher in (3.0, 0.0)
    }
    good, bad = (advice(shows, asked[higher]) for higher in (3.0, 0.0))
    assert good.keeping == "Concept Influence" and bad.keeping == bad.dropping == "Vector Filter"
    assert "z +" in good.findings[0].figure and good.findings[0].fault is None
    assert bad.findings[0].fault == "Concept Influence" and "FAULT" in repr(bad)


def replicated(result, noise, seed=1, n=5):
    values = result.scores[:, None] + np.random.default_rng(seed).normal(size=(len(result), n)) * noise
    return Attribution(result.conversations, values.mean(1), result.card, replicates=values)


def test_replicates_that_contradict_each_other_are_a_fault_of_whoever_has_them():
    shows, moves = rankings("off", "on")
    by = lambda first, second: advice(replicated(shows, first), replicated(moves, second))
    assert by(0.1, 0.1).dropping == "Vector Filter"
    assert by(9.0, 0.1).dropping == by(9.0, 0.1).keeping == "Concept Influence"
    assert by(0.1, 9.0).dropping == by(0.1, 9.0).keeping == "Vector Filter"
    neither = by(9.0, 9.0)
    assert neither.dropping is None and neither.keeping is None and "neither" in repr(neither)


@pytest.mark.parametrize("noise", [0.5, 2.0, 6.0])
def test_reliability_is_the_share_of_variance_that_is_no_noise(noise):
    random, n = np.random.default_rng(0), 4000
    data = load_conversations([{"prompt": "q", "response": f"a {i}"} for i in range(n)])
    true = random.normal(size=n)
    one = replicated(Attribution(data, true, SHOWS), noise, n=4)
    figure = advice(one, Attribution(data, true, MOVES)).findings[3].figure
    assert float(figure.split()[1]) == pytest.approx(np.corrcoef(one.scores, true)[0, 1] ** 2, abs=0.03)


def test_rankings_that_know_nothing_of_topics_are_seldom_told_apart_by_them():
    data, random = chats(["on", "off"] * 40), np.random.default_rng(0)
    told = [
        advice(
            Attribution(data, random.normal(size=80), SHOWS), Attribution(data, random.normal(size=80), MOVES)
        )
        for _ in range(120)
    ]
    assert np.mean([one.keeping != "Vector Filter" for one in told]) <= 0.05
    related = ["related" in one.findings[6].follows or "nearly" in one.findings[6].follows for one in told]
    assert np.mean(related) <= 0.1  # a one-sided test at 5 %


def test_the_order_of_the_files_does_not_matter_and_a_null_counts():
    shows, moves = rankings("off", "on")
    found, order = advice(shows, moves), np.random.default_rng(2).permutation(120)
    mixed = Attribution(moves.conversations.select(order), moves.scores[order], moves.card)
    assert repr(advice(shows, mixed)) == repr(found) and found.count is None
    null = np.random.default_rng(3).normal(size=(120, 200)) * 0.5
    beside = advice(shows.with_null(null), moves)
    assert beside.count == len(shows.with_null(null).above_chance()) >= 35
    assert str(beside.count) in repr(beside).splitlines()[0] and beside.dropping == "Vector Filter"
    wide = advice(shows.with_null(null * 99), moves)  # no example stands out alone: no fault, and said
    assert wide.count == 0 and wide.dropping == "Vector Filter" and "0 of 120" in repr(wide)


def test_what_lies_on_the_first_token_and_the_template_is_their_share_of_the_sizes():
    _, moves = sunk()
    found = advice(Attribution(moves.conversations, np.arange(6.0), SHOWS), moves)
    sizes = [np.abs(scores) for scores in moves.token_scores]
    kinds = [moves.kinds(row) for row in range(6)]
    shares = [one[np.isin(kind, ["sink", "template"])].sum() / one.sum() for one, kind in zip(sizes, kinds)]
    assert f"median {np.median(shares):.0%} " in found.findings[5].figure
    assert found.findings[5].fault is None and "first_token=False" in found.findings[5].follows


def test_texts_without_words_and_what_is_no_pair():
    shows, moves = rankings("off", "on")
    bare = load_conversations([{"prompt": "?", "response": f"{'!' * i}"} for i in range(1, 121)])
    plain = [Attribution(bare, one.scores, one.card) for one in (shows, moves)]
    assert advice(*plain).keeping == "Vector Filter"
    for pair, words in [((moves, shows), "other way round"), ((shows, replace_method(moves)), "two methods")]:
        with pytest.raises(AttributionError, match=words):
            advice(*pair)
    with pytest.raises(AttributionError, match="a part"):
        advice(shows.top(9), moves)


def replace_method(result):
    return Attribution(result.conversations, result.scores, replace(result.card, method="Vector Filter"))


@pytest.mark.parametrize("low_end", ["off", "on"])
def test_with_an_influence_through_the_run_both_together_are_advised_for_either_side(low_end):
    shows, moves = rankings("off", "on") if low_end == "off" else rankings("on", "on")
    run = replace(moves.card, method="SOURCE", settings={"checkpoints": 3})
    through = Attribution(moves.conversations, moves.scores, run)
    found, plain = advice(shows, through), advice(shows, moves)
    assert found.dropping == found.keeping == combined([shows, through]).card.method
    assert plain.dropping == shows.card.method
    once = Attribution(moves.conversations, moves.scores, replace(run, settings={"checkpoints": 1}))
    assert advice(shows, once).dropping == shows.card.method
    faulty = replicated(shows, 50.0)
    assert advice(faulty, through).dropping == "SOURCE"


def test_the_page_holds_every_finding_once():
    found = advice(*rankings("off", "on"))
    page = found._repr_html_()
    for one in found.findings:
        assert page.count(f">{one.about}<") == 1 and one.figure in page
    assert found.unknown in page and ">Concept Influence: its low end" in page
