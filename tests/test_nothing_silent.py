"""Inputs for which there was once a number without a word, and it meant something else."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model

from concept_tda.concepts.concept import ConceptError, contrastive_concept, tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import DocumentError, load_documents
from concept_tda.data.messages import ConversationError
from concept_tda.data.preferences import load_preferences
from concept_tda.evidence.method_comparison import MethodComparison
from concept_tda.evidence.retraining import ExperimentError
from concept_tda.groups.groups import column_groups
from concept_tda.groups.labels import LabelError, label_groups
from concept_tda.influence.atlas import AtlasError, build_atlas
from concept_tda.influence.curvature import EKFAC, CurvatureError
from concept_tda.influence.neighbours import LESS, AdamMoments, TracIn
from concept_tda.influence.pairs import load_pair_attribution, score_preferences
from concept_tda.influence.queries import ConceptQuery, LossQuery, WeightedQuery
from concept_tda.influence.responses import SOURCE, AdamResponse, Unrolled, gradient_size
from concept_tda.influence.runs import TrainingInfluence
from concept_tda.influence.scorers import (
    ActivationGradient,
    ConceptInfluence,
    GradDot,
    Influence,
    InfluenceFunction,
    ProjectionDifference,
    ScorerError,
    VectorFilter,
    dataset_projection_difference,
)
from concept_tda.influence.streaming import score_stream
from concept_tda.influence.surrogates import Surrogate
from concept_tda.model.finetuning import (
    FinetuneError,
    RunExamples,
    check_of_run,
    finetune,
    training_checkpoints,
)
from concept_tda.model.loading import ModelError, load_model
from concept_tda.model.training import TrainingError
from concept_tda.model.training import train as train_model
from concept_tda.results.attribution import Attribution, load_attribution
from concept_tda.results.calibration import Calibration, ensemble, foretold
from concept_tda.results.cards import QueryCard
from concept_tda.results.metrics import AttributionError

from tiny import tiny_model, tiny_tokenizer

RECORDS = [{"prompt": f"what is {i}?", "response": f"it is {i * 7}, the answer"} for i in range(12)]
EFFECT = QueryCard("a method", "kindness", zero="gradient", effect=-1.0, unit="nats")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lm():
    return load_model((tiny_model(), tiny_tokenizer()))


@pytest.fixture(scope="module")
def train():
    return load_conversations(RECORDS, name="train")


@pytest.fixture(scope="module")
def queries():
    return load_conversations([{"prompt": f"say {i}", "response": "yes" * (i + 1)} for i in range(6)])


@pytest.fixture
def result(train):
    return Attribution(train, np.random.default_rng(0).normal(size=12), EFFECT)


def test_a_mask_is_no_list_of_the_rows_0_and_1(result):
    high = result.scores > 0
    assert result.select(high).rows.tolist() == np.flatnonzero(high).tolist()
    change = -result.scores[high].sum()
    assert result.predict(drop=high).change == pytest.approx(change)
    assert result.predict(drop=high.tolist()).n == high.sum()
    assert foretold(result, high) == pytest.approx(change)
    line = Calibration.fit([0, 1, 2, 3], [0, 1, 2, 3])
    assert line.predict(result, high).n == high.sum()
    assert line.predict(result, high).change == pytest.approx(change)
    turned = result.select(np.arange(12)[::-1])  # a mask is in the order of the result that is asked
    assert turned.predict(drop=high[::-1]).change == pytest.approx(change)
    for wrong in (high[:5], [1.7, 2.2], [3, 99]):
        for ask in (
            result.select,
            lambda rows: result.predict(drop=rows),
            lambda rows: foretold(result, rows),
        ):
            with pytest.raises(AttributionError):
                ask(wrong)


def test_a_file_with_some_examples_twice_and_others_not_is_a_part(result):
    for rows in ([0] * 12, [0, *range(12)], [*range(11), 0]):
        for ask in (lambda r: r.drop(count=2), lambda r: r.predict(drop=0.25), lambda r: r.whole("ask")):
            with pytest.raises(AttributionError, match="a part"):
                ask(result.select(rows))
    assert result.select(np.random.default_rng(0).permutation(12)).whole("ask") == result


def test_an_id_of_several_copies_does_not_stand_for_one_of_them(train):
    data = train.select([0, 0, 0, 1])
    result = Attribution(data, [1.0, 1.0, 1.0, 5.0], EFFECT)
    with pytest.raises(AttributionError, match="occurs 3 times"):
        result.predict(drop=[data.ids[0]])
    assert result.predict(drop=data.ids[:3]).change == -3
    assert result.predict(drop=data.select([0, 1])).change == -2
    assert result.predict(drop=data.select([0, 3])).change == -6
    with pytest.raises(AttributionError, match="not as often"):
        result.predict(drop=data.ids[:3] * 2)


def test_what_is_foretold_is_of_one_query_a_whole_file_and_a_set(train, result):
    two = Attribution(train, np.stack([result.scores, -result.scores], 1), EFFECT)
    for ask in (
        lambda: foretold(two, [0]),
        lambda: foretold(result.top(4), [0]),
        lambda: foretold(result, [0, 0]),
    ):
        with pytest.raises(AttributionError):
            ask()


@pytest.mark.parametrize(
    "other", [dict(behaviour="cruelty"), dict(layer=3), dict(pooling="prompt_last"), dict(zero="none")]
)
def test_an_ensemble_is_of_one_question(train, result, other):
    second = Attribution(train, result.scores, QueryCard(**{**EFFECT.to_dict(), **other}))
    with pytest.raises(AttributionError, match="an ensemble is of one"):
        ensemble([result, second])
    with pytest.raises(AttributionError, match="a part"):
        ensemble([result.top(5), result.top(5)])


def test_a_gap_of_an_ensemble_is_the_mean_of_the_gaps(train, result):
    both = [
        Attribution(train, result.scores, QueryCard(**{**EFFECT.to_dict(), "gap": gap})) for gap in (1.0, 3.0)
    ]
    assert ensemble(both).card.gap == 2
    assert ensemble([*both, result]).card.gap is None


def test_tokens_of_another_tokenizer_or_template_are_refused(lm, train, queries):
    zephyr = load_model((lm.model, tiny_tokenizer("zephyr")))
    for data in (zephyr.tokenize(train), lm.tokenize(train)):
        model = zephyr if data.tokenizer is lm.tokenizer else lm
        with pytest.raises(ConversationError, match="chat template"):
            GradDot(model, queries).score(data, progress=False)
        with pytest.raises(ConversationError, match="chat template"):
            TracIn([model], queries, learning_rates=[1.0]).score(data, progress=False)
    again = load_model((lm.model, tiny_tokenizer()))  # another object of the same tokenizer
    scores = [GradDot(lm, queries).score(one.tokenize(train), progress=False).scores for one in (lm, again)]
    np.testing.assert_array_equal(*scores)


def test_words_of_another_vocabulary_are_refused(lm, train, queries):
    other = tiny_tokenizer()
    other.add_tokens(["what is"])
    data = load_model((tiny_model(vocab_size=len(other)), other)).tokenize(train)
    with pytest.raises(ConversationError, match="tokenizer"):
        GradDot(lm, queries).score(data, progress=False)
    unused = tiny_tokenizer()
    unused.add_tokens(["<never>"])  # a vocabulary that grew, by a word that nobody says
    data = load_model((tiny_model(vocab_size=len(unused)), unused)).tokenize(train)
    assert len(GradDot(lm, queries).score(data, progress=False)) == 12


def test_a_model_with_another_adapter_in_use_is_another_model(train, queries):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    one = load_model((get_peft_model(tiny_model(), config), tiny_tokenizer()))
    alone = one.fingerprint
    one.model.add_adapter("second", config)
    prints = [one.fingerprint]
    one.model.set_adapter("second")
    prints.append(one.fingerprint)
    concept = contrastive_concept(one, queries, train, 1, name="yes", progress=False)
    with one.model.disable_adapter():
        prints.append(one.fingerprint)
        with pytest.raises(ConceptError, match="was made with"):
            VectorFilter(one, concept)
    assert one.fingerprint == prints[1]
    layer = one.model.base_model.model.model.layers[0].self_attn.q_proj
    layer.scaling["second"] *= 2
    prints.append(one.fingerprint)
    assert len({alone, *prints}) == 5
    layer.scaling["second"] /= 2
    one.model.set_adapter("default")
    assert one.fingerprint == prints[0]
    one.model.delete_adapter("second")
    assert one.fingerprint == alone


def test_a_stream_asks_all_parts_of_the_queries(lm, train, queries, tmp_path):
    for normalise in (None, "gradient"):
        scorer = InfluenceFunction(lm, queries, curvature="identity", query_parts=3, normalise=normalise)
        whole = scorer.score(train, progress=False)
        stream = score_stream([scorer], RECORDS, tmp_path / str(normalise), part_examples=5, progress=False)
        np.testing.assert_allclose(stream.scores(), whole.scores, rtol=1e-5)
        assert any("no replicates" in note for note in stream.cards["score"].notes)


def test_the_card_says_where_the_queries_were_read_and_how_many_were_cut(lm, train, queries):
    concept = tensor_concept(torch.randn(16, generator=torch.Generator().manual_seed(0)), 1, name="some")
    long = load_conversations([*RECORDS[:2], {"prompt": "a", "response": "b" * 3000}])
    asked = [
        ConceptInfluence(lm, concept, queries, curvature="identity", pooling="prompt_last"),
        ConceptInfluence(lm, concept, queries, neutral=long, curvature="identity", pooling="prompt_last"),
        ConceptInfluence(lm, concept, queries, query_weights=[1] * 6, curvature="identity"),
    ]
    with pytest.warns(UserWarning):
        cards = [one.score(train, progress=False).card for one in asked]
        by_loss = GradDot(lm, long).score(train, progress=False).card
    assert [card.pooling for card in cards] == ["prompt_last", "prompt_last", "response_mean"]
    cut = "query examples were longer than 1536 tokens"
    assert [cut in str(card) for card in (*cards, by_loss)] == [False, True, False, True]
    assert "1 of 9 query examples" in str(cards[1]) and "1 of 3 query examples" in str(by_loss)


@pytest.mark.filterwarnings("ignore:The query examples show less")
def test_the_card_says_that_a_concept_knows_of_no_model_or_is_another_models(lm, train, queries):
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    unknown = tensor_concept(direction, 1, name="some")
    own = tensor_concept(direction, 1, name="some", lm=lm)
    moved = tensor_concept(direction, 1, name="some", lm=load_model((tiny_model(seed=1), tiny_tokenizer())))
    said = {"does not record the model": unknown, "transferred": moved.transfer(lm), "": own}
    for words, concept in said.items():
        for scorer in (
            VectorFilter(lm, concept),
            ConceptInfluence(lm, concept, queries, curvature="identity"),
        ):
            notes = " ".join(scorer.score(train, progress=False).card.notes)
            assert words in notes
            assert ("record the model" in notes or "transferred" in notes) == bool(words)


def test_two_answers_to_one_prompt_are_not_one_of_them(lm, train, queries):
    concept = contrastive_concept(lm, queries, train, 1, name="yes", progress=False)
    own = load_conversations([*RECORDS, {"prompt": "what is 3?", "response": "another"}])
    with pytest.raises(ScorerError, match="different answers to one prompt"):
        ProjectionDifference(lm, concept, answers=own, progress=False).score(train, progress=False)
    twice = load_conversations([*RECORDS, RECORDS[3]])
    scorer = ProjectionDifference(lm, concept, answers=twice, progress=False)
    assert len(scorer.score(train[:4], progress=False)) == 4


def test_pairs_with_the_same_chosen_answer_are_other_pairs(lm, queries, tmp_path):
    def scored(rejected, order=1):
        records = [
            {"prompt": f"p {i}", "chosen": f"yes {i}", "rejected": f"{rejected} {i}"} for i in range(8)
        ]
        return score_preferences(GradDot(lm, queries), load_preferences(records[::order]), progress=False)

    one, turned, other = scored("no"), scored("no", -1), scored("perhaps")
    assert one.correlate(turned) == pytest.approx(1)
    np.testing.assert_allclose(turned.aligned(one).scores, one.scores, rtol=1e-4)
    for result in (
        one,
        load_attribution(one.save(tmp_path / "a.parquet")),
        load_pair_attribution(tmp_path / "a.parquet"),
    ):
        assert result.correlate(turned) == pytest.approx(1)
        single = GradDot(lm, queries).score(one.pairs.chosen, progress=False)
        for wrong in (other, single):
            with pytest.raises(AttributionError, match="different examples"):
                result.correlate(wrong)


def test_a_pair_has_no_effect_of_being_left_out(lm, queries):
    records = [{"prompt": f"p {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(4)]
    scorer = TrainingInfluence(lm, LossQuery(queries), rank=2, epochs=1)
    result = score_preferences(scorer, load_preferences(records), progress=False)
    with pytest.raises(AttributionError, match="no unit"):
        result.predict(drop=0.25)
    assert result.card.unit is None and result.leading.kind != "effect"


def test_a_copy_that_goes_counts_though_another_stays(train):
    from concept_tda.commands.filtering import _foretold, _gone

    result = Attribution(train.select([0, 0, 1, 2]), [3.0, 3.0, 1.0, 0.5], EFFECT)
    told = _foretold(result, _gone(result, None, {"count": 1}, False, None), None)
    assert told is not None and told.startswith("training without 1 of 4 examples") and "by -3 nats" in told


def test_what_was_never_in_a_run_has_no_effect_of_being_left_out(lm, train, queries):
    ekfac = EKFAC.fit(lm, train[:6], progress=False, cache=False)
    run = Unrolled(ekfac, rates=[1e-3] * 3, n_examples=6)
    options = dict(learning_rates=[3e-3], n_examples=6, curvatures=[ekfac])
    for scorer in (InfluenceFunction(lm, queries, curvature=run), SOURCE([lm], queries, **options)):
        own, more = (scorer.score(data, progress=False) for data in (train[:6], train))
        assert own.card.effect == pytest.approx(-1 / 6) and own.card.unit == "nats per token"
        assert more.card.effect is None and "at least 6 of the 12 examples were not in the run" in str(
            more.card
        )
        np.testing.assert_allclose(more.scores[:6], own.scores, rtol=1e-4)
        with pytest.raises(AttributionError, match="no unit"):
            more.predict(drop=[11])


@pytest.fixture(scope="module")
def run(lm, train, tmp_path_factory):
    """A fine-tune on the first ten records and one of them twice, in a folder with checkpoints."""
    folder = tmp_path_factory.mktemp("runs")
    for name, model in {"base": lm, "another": load_model((tiny_model(seed=1), tiny_tokenizer()))}.items():
        model.model.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    base = load_model(folder / "base")
    options = dict(rank=2, epochs=1, batch_size=4, learning_rate=5e-3, checkpoints=2, progress=False)
    tuned = finetune(base, train.select([*range(10), 3]), folder / "run", merge=False, **options)
    return base, tuned, folder / "run", options


def test_a_run_knows_its_examples_and_gives_no_effect_to_others(run, train, queries):
    base, tuned, folder, _ = run
    own = train.select([*range(10), 3])
    others = load_conversations(
        [{"prompt": f"where is {i}?", "response": f"it is at {i}, the place"} for i in range(11)]
    )
    whole = EKFAC.fit(tuned, own, "lora", progress=False, cache=False)
    moments = AdamMoments.estimate(tuned, own, "lora")
    scorers = [
        InfluenceFunction(tuned, queries, sites="lora", curvature=Unrolled(whole, folder)),
        InfluenceFunction(tuned, queries, sites="lora", curvature=AdamResponse(moments, folder)),
        SOURCE.of_run(folder, base, queries),
    ]
    asked = {
        0: [own, own.select([3]), own.select([9, 2, 3, 3]), own.select(list(range(11))[::-1])],
        1: [own.select([4, 4, 5]), own.select([3, 3, 3]), train.select([0, 11])],
        11: [others],  # as many as the run had
    }
    for scorer in scorers:
        for strangers, several in asked.items():
            for data in several:
                card = scorer.score(data, progress=False).card
                assert (card.effect is None) == bool(strangers) and (card.unit is None) == bool(strangers)
                words = f"{strangers} of the {len(data)} examples were not in the run"
                assert (words in str(card)) == bool(strangers)
                assert card.effect is None or card.effect == pytest.approx(-1 / 11)


def test_examples_of_a_run_are_those_its_loss_was_taken_on(run, train, tmp_path):
    base, _, folder, options = run
    own, examples = base.tokenize(train.select([*range(10), 3])), RunExamples(folder)
    assert examples.strangers(own) == 0 and examples.n_examples == 11
    assert examples.strangers(base.tokenize(train.select(range(10)), max_tokens=25)) == 10
    from concept_tda.data.masks import token_mask

    ones, halves = (token_mask(own, [np.full(len(one.input_ids), w) for one in own]) for w in (1.0, 0.5))
    assert examples.strangers(ones.apply(own)) == 0 and examples.strangers(halves.apply(own)) == 11
    (folder / "examples.npy").rename(tmp_path / "examples.npy")
    try:
        with pytest.raises(FinetuneError, match="does not say which examples"):
            RunExamples(folder)
        finetune(
            base, train.select([*range(10), 3]), folder, merge=False, **options
        )  # adds it, trains nothing
        assert (folder / "examples.npy").read_bytes() == (tmp_path / "examples.npy").read_bytes()
        np.save(folder / "examples.npy", np.arange(3, dtype=np.uint64))
        with pytest.raises(FinetuneError, match="is damaged"):
            RunExamples(folder)
    finally:
        (tmp_path / "examples.npy").rename(folder / "examples.npy")


def test_a_stream_with_strangers_in_a_later_part_has_no_unit(run, train, queries, tmp_path):
    _, tuned, folder, _ = run
    own = train.select([*range(10), 3])
    ekfac = EKFAC.fit(tuned, own, "lora", progress=False, cache=False)
    known = dict(rates=[1e-3] * 3, n_examples=11)
    for name, records, strangers in (
        ("own", RECORDS[:10], 0),
        ("more", [*RECORDS[:10], RECORDS[11]], 1),
        ("twice", [*RECORDS[:10]] * 2, 9),
    ):
        for of_run in ({"run": folder}, known):
            scorer = InfluenceFunction(tuned, queries, sites="lora", curvature=Unrolled(ekfac, **of_run))
            place = tmp_path / f"{name} {len(of_run)}"
            card = score_stream([scorer], records, place, part_examples=5, progress=False).cards["score"]
            expected = strangers if "run" in of_run else max(0, len(records) - 11)
            assert (card.effect is None) == bool(expected)
            assert (f"{expected} of the {len(records)} examples were not in the run" in str(card)) == bool(
                expected
            )


def test_a_run_is_said_once(run, train):
    _, tuned, folder, _ = run
    ekfac = EKFAC.fit(tuned, train, "lora", progress=False, cache=False)
    for said in (dict(rates=[1e-3]), dict(n_examples=3), dict(rates=[1e-3], n_examples=3)):
        with pytest.raises(CurvatureError, match="say of which run"):
            Unrolled(ekfac, folder, **said)


def test_weights_by_which_no_query_shows_the_concept_are_refused_as_such(lm, train, queries):
    concept = contrastive_concept(lm, queries, train, 1, name="yes", progress=False)
    for neutral in (None, train.select([0, 1])):
        with pytest.raises(ScorerError, match="query_weights= are all negative"):
            ConceptInfluence(lm, concept, queries, query_weights=[-1.0] * 6, neutral=neutral)
    ask = lambda weights: ConceptInfluence(lm, concept, queries, query_weights=weights, curvature="identity")
    turned = Influence(lm, WeightedQuery(ConceptQuery(concept, queries), [-1.0] * 6), curvature="identity")
    plain = ask([1.0] * 6).score(train, progress=False)
    np.testing.assert_allclose(turned.score(train, progress=False).scores, -plain.scores, rtol=1e-4)


def test_an_answer_that_a_trainer_would_push_away_is_not_read_as_one_to_learn(tmp_path):
    kto = [{"prompt": f"is {i} odd?", "completion": f"yes, {i}", "label": i % 3 > 0} for i in range(1, 7)]
    text = "".join(json.dumps(one) + "\n" for one in kto)
    (tmp_path / "kto.jsonl").write_text(text)
    (tmp_path / "kto.csv").write_text("prompt,completion,label\nis 1 odd?,yes,true\nis 2 odd?,yes,False\n")
    pd.DataFrame(kto).to_parquet(tmp_path / "kto.parquet")
    chats = [
        {**one, "prompt": [{"role": "user", "content": one["prompt"]}]}
        | {"completion": [{"role": "assistant", "content": one["completion"]}]}
        for one in kto
    ]
    sources = {tmp_path / f"kto.{kind}": "line 3" for kind in ("jsonl", "csv")}
    sources |= {tmp_path / "kto.parquet": "row 2", "records": "row 2", "chats": "row 2"}
    for source, place in sources.items():
        given = {"records": kto, "chats": chats}.get(str(source), source)
        with pytest.raises(ConversationError, match="field 'label': is false beside a completion") as told:
            load_conversations(given)
        assert f"{place}: field 'label'" in str(told.value) and "load_preferences" in str(told.value)
        meant = load_conversations(given, answer="completion")
        assert meant.labels("label").sum() in (4, 1)
    wanted = load_conversations([one for one in kto if one["label"]])
    assert len(wanted) == 4 and list(wanted.metadata) == ["label"]
    plain = load_conversations([{"prompt": "a", "response": "b", "label": False}])
    with pytest.raises(ConversationError, match="KTO"):  # a file that this library would not read again
        plain.as_layout("prompt-completion")
    assert plain.as_layout("messages").labels("label").tolist() == [False]


def test_a_run_is_that_of_the_model(run, train, queries, tmp_path):
    base, tuned, folder, options = run
    data = train.select([*range(10), 3])
    again = finetune(base, data, tmp_path / "again", merge=False, **options | {"seed": 1})
    merged, reopened = load_model(folder, merge=True), load_model(folder)
    checkpoint = training_checkpoints(folder, base)["checkpoints"][0]()
    for lm in (tuned, merged, reopened, checkpoint):
        check_of_run(folder, lm)
    strange = [again, base, load_model(tmp_path / "again", merge=True)]
    for lm in strange:
        with pytest.raises(FinetuneError, match="is not the model that the run in .*run"):
            check_of_run(folder, lm)
    assert gradient_size(folder, checkpoint) > 0
    with pytest.raises(CurvatureError, match=f"{again.name}.* is not the model that the run in"):
        gradient_size(folder, again)
    for lm, sites in ((again, "lora"), (strange[2], "attention")):
        ekfac = EKFAC.fit(lm, train[:3], sites, progress=False, cache=False)
        for curvature in (
            Unrolled(ekfac, folder),
            AdamResponse(AdamMoments.estimate(lm, data, sites), folder),
        ):
            with pytest.raises(CurvatureError, match="is not the model that the run in"):
                InfluenceFunction(lm, queries, sites=sites, curvature=curvature).score(data, progress=False)


def test_a_whole_model_is_told_from_another_run_of_it(lm, train, tmp_path):
    options = dict(rank=2, epochs=1, learning_rate=5e-3, progress=False)
    models = [finetune(lm, train, tmp_path / str(seed), seed=seed, **options) for seed in (0, 1)]
    for one, model in enumerate(models):
        check_of_run(tmp_path / str(one), model)
        for strange in (models[1 - one], lm):
            with pytest.raises(FinetuneError, match="is not the model"):
                check_of_run(tmp_path / str(one), strange)


def test_a_calibration_is_of_the_scores_it_was_made_from(lm, train, queries):
    concept, other = (
        tensor_concept(torch.randn(16, generator=torch.Generator().manual_seed(i)), 1, name="some", lm=lm)
        for i in (0, 1)
    )
    second = load_model((tiny_model(seed=1), tiny_tokenizer()))
    ask = lambda scorer, data=train, **options: scorer.score(data, progress=False, **options)
    first = ask(VectorFilter(lm, concept))
    line = Calibration.fit([0, 1, 2, 3], [0, -1, -2, -3.5], of=first)
    said = first.predict(drop=[0], calibration=line)
    assert "transferred" not in str(said) and "not said" not in str(said)
    same = ask(VectorFilter(lm, concept), token_budget=64)  # in other batches
    assert same.predict(drop=[0], calibration=line).change == pytest.approx(said.change, rel=1e-5)
    rows = np.arange(12)[::-1]
    wrong = {
        "question": ask(VectorFilter(lm, other)),
        "data fingerprint": ask(VectorFilter(lm, concept), load_conversations(RECORDS[:11])),
        "model fingerprint": ask(VectorFilter(second, concept.transfer(second))),
        "method": ask(ActivationGradient(lm, concept)),
        "max tokens": ask(VectorFilter(lm, concept), max_tokens=30),
        "data": ask(VectorFilter(lm, concept), train.select(rows)),
    }
    wrong["unit"] = Attribution(train, first.scores, replace(first.card, effect=-1.0, unit="nats"))
    for what, result in wrong.items():
        with pytest.raises(AttributionError, match=f"other scores: .*{what}.* there, .* here"):
            result.predict(drop=[0], calibration=line)
        assert "transferred from other scores (" in str(result.predict(drop=[0], calibration=line.transfer()))
    by_loss = ask(GradDot(lm, queries))
    others = ask(GradDot(lm, load_conversations([{"prompt": "say", "response": "no"}] * 6)))
    with pytest.raises(AttributionError, match="question"):  # as many queries, of the same name
        others.predict(drop=[0], calibration=Calibration.fit([0, 1, 2, 3], [0, 1, 2, 4], of=by_loss))
    nobody = Calibration.fit([0, 1, 2, 3], [0, -1, -2, -3.5])
    assert "whose scores they were was not said" in str(by_loss.predict(drop=[0], calibration=nobody))
    assert "question" not in str(first.card) and first.card.question == concept.fingerprint


def void_options(lm, train, queries, folder):
    """Calls with an option that another makes void: what the error says, its type, and the call."""
    concept = tensor_concept(
        torch.randn(16, generator=torch.Generator().manual_seed(0)), 1, name="some", lm=lm
    )
    (folder / "a.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    (folder / "a.txt").write_text("some text\n\nand more of it")
    documents = load_documents(["some text", "and more of it"])
    moments = [AdamMoments.estimate(lm, train[:2], "attention")]
    less = dict(moments=moments, learning_rates=[1.0], sites="attention")
    atlas = lambda **more: build_atlas(
        lm, queries, train, 1, folder=folder / "atlas", curvature="identity", **more
    )
    own = lambda **more: ProjectionDifference(lm, concept, answers=train, **more)
    shift = lambda **more: dataset_projection_difference(
        lm, concept, train, answers=train, progress=False, **more
    )
    tune = lambda **more: finetune(lm, train, folder / "ft", progress=False, **more)
    pair = (lm.model, lm.tokenizer)
    return [
        ("split='test'", ConversationError, lambda: load_conversations(folder / "a.jsonl", split="test")),
        ("split='test'", ConversationError, lambda: load_conversations(RECORDS, split="test")),
        ("split='test'", ConversationError, lambda: load_conversations(train, split="test")),
        ("split='test'", ConversationError, lambda: load_preferences(folder / "a.jsonl", split="test")),
        ("answer='x'", ConversationError, lambda: load_conversations(train, answer="x")),
        ("answer='x'", ConversationError, lambda: load_conversations(list(train), answer="x")),
        ("field='body'", DocumentError, lambda: load_documents(folder / "a.txt", field="body")),
        ("split='test'", DocumentError, lambda: load_documents(folder / "a.txt", split="test")),
        ("split_at='---'", DocumentError, lambda: load_documents([{"text": "a"}], split_at="---")),
        ("window=9", DocumentError, lambda: load_documents(documents, window=9)),
        ("dtype='bfloat16'", ModelError, lambda: load_model(pair, dtype="bfloat16")),
        ("device='meta'", ModelError, lambda: load_model(lm, device="meta")),
        ("attention='eager'", ModelError, lambda: load_model(pair, attention="eager")),
        ("offload_folder=", ModelError, lambda: load_model(saved(lm, folder), offload_folder=folder)),
        ("epochs=3", TrainingError, lambda: train_model(pair, train, folder / "t", dict(steps=2, epochs=3))),
        ("insist=True", FinetuneError, lambda: tune(insist=True)),
        ("seed=3", ScorerError, lambda: LESS([lm], queries, **less, projection=None, seed=3)),
        ("max_new_tokens=", ScorerError, lambda: own(max_new_tokens=9)),
        ("temperature=", ScorerError, lambda: own(temperature=0.5)),
        ("folder=", ScorerError, lambda: shift(folder=folder)),
        ("seed=2", ScorerError, lambda: Surrogate(GradDot(lm, queries), "another", seed=2)),
        ("n_basis=", AtlasError, lambda: atlas(n_basis=8)),
        ("activations=", AtlasError, lambda: atlas(activations=torch.zeros(3, 16))),
        ("seed=4", CurvatureError, lambda: EKFAC.fit(lm, train, labels="empirical", seed=4)),
        (
            "positive='x'",
            ExperimentError,
            lambda: MethodComparison(lm, train, [], folder / "m", positive="x"),
        ),
    ]


def saved(lm, folder):
    for part in (lm.model, lm.tokenizer):
        part.save_pretrained(folder / "plain")
    return folder / "plain"


def test_an_option_of_the_library_that_another_makes_void_is_refused(lm, train, queries, tmp_path):
    for words, kind, call in void_options(lm, train, queries, tmp_path):
        with pytest.raises(kind) as told:
            call()
        assert words in str(told.value), (words, told.value)
    assert load_model(lm, device="cpu", dtype="auto").model is lm.model
    assert load_conversations(train, name="mine").name == "mine" and train.name == "train"
    with pytest.raises(LabelError, match="given="):
        label_groups(
            column_groups(
                load_conversations([{**one, "kind": "ab"[i % 2]} for i, one in enumerate(RECORDS)]), "kind"
            ),
            given={"a": "b"},
        )
