"""The derivative through a run, against finite differences of whole trainings in float64."""

import numpy as np
import pytest
import torch

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.influence import runs
from concept_tda.influence.queries import ConceptQuery, LossQuery
from concept_tda.influence.runs import RunError, TrainingInfluence, adamw_step
from concept_tda.model.finetuning import FinetuneError, finetune
from concept_tda.model.loading import LanguageModel
from concept_tda.model.losses import token_losses
from concept_tda.results.metrics import AttributionError

from tiny import double_norms, tiny_pair

RECIPE = dict(rank=3, learning_rate=3e-3, batch_size=4, smoothing=0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCEPT_TDA_CACHE", str(tmp_path / "cache"))


def model(family="llama"):
    pair = tiny_pair(family, dtype=torch.float64)
    return LanguageModel(double_norms(pair[0]), pair[1], family)


def parity(n=12):
    return load_conversations(
        [{"prompt": f"Is {i} even?", "response": "no, it is odd" if i % 2 else "yes"} for i in range(n)]
    )


def query():
    return LossQuery(load_conversations([{"prompt": "Is 50 even?", "response": "yes"}]))


def value_after(scorer, data, weights=None, rate=1.0):
    """The query after the run, with some examples weighted and all learning rates scaled: a second way to the
    same number, by torch's optimiser and the library's own losses."""
    run = scorer.repeated(scorer.lm.tokenize(data), 10**6)
    run.put(run.beginning_P)
    settings = scorer.settings
    optimizer = torch.optim.AdamW(run.parameters, lr=1.0, weight_decay=settings["weight_decay"])
    for done, rows in enumerate(run.steps):
        optimizer.param_groups[0]["lr"] = rate * runs.step_rate(settings, done, len(run.steps))
        optimizer.zero_grad()
        for batch in run.pieces(done):
            mask_BT = batch.response_mask.clone()
            mask_BT[:, 0] = False
            means_B = token_losses(run.lm, batch).sum(1) / mask_BT.sum(1)
            by_row = torch.tensor([(weights or {}).get(row, 1.0) for row in batch.rows.tolist()])
            ((by_row.double() * means_B).sum() / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(run.parameters, runs.GRADIENT_CLIP)
        optimizer.step()
    run.lm.model.eval()
    return scorer.query.value(run.lm)


def slope(of, at, step=1e-4):
    return (of(at + step) - of(at - step)) / (2 * step)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", dict(epochs=2, warmup_steps=1, weight_decay=0.1, seed=3)),
        ("gpt_neox", {}),
        ("gpt2", {}),
    ],
)
def test_scores_are_the_derivative_of_the_whole_training(family, more):
    data, scorer = parity(), TrainingInfluence(model(family), query(), **RECIPE, **more)
    result = scorer.score(data, progress=False)
    shared = scorer.by_rate / len(data)
    for row in (0, 5, 10):
        measured = slope(lambda weight, row=row: value_after(scorer, data, {row: weight}), 1.0)
        np.testing.assert_allclose(result.scores[row] - shared, measured, rtol=2e-4, atol=1e-8)
    measured = slope(lambda rate: value_after(scorer, data, rate=rate), 1.0)
    np.testing.assert_allclose(scorer.by_rate, measured, rtol=2e-4)
    assert abs(scorer.values[1] - value_after(scorer, data)) < 1e-10


def test_a_step_is_torchs_step_where_the_gradient_is_clipped_and_where_it_is_not():
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 10.0):
        theirs = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
        state = theirs.detach().clone(), torch.zeros(9).double(), torch.zeros(9).double()
        optimizer = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3)
        for step in range(1, 4):
            theirs.grad = size * torch.randn(9, generator=generator, dtype=torch.float64)
            state = adamw_step(*state, theirs.grad.clone(), step=step, rate=0.1, decay=0.3)
            torch.nn.utils.clip_grad_norm_([theirs], 1.0)
            optimizer.step()
        torch.testing.assert_close(state[0], theirs.detach(), rtol=1e-12, atol=0)


def test_a_coordinate_that_never_had_a_gradient_passes_nothing_on():
    still = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    with torch.no_grad():
        still[3][1] = 0.5
    after = adamw_step(*still, step=1, rate=0.1)
    by_gradient = torch.autograd.grad(after[0].sum(), still[3])[0]
    assert torch.isfinite(by_gradient).all() and by_gradient[0] == 0


def test_smoothing_softens_the_derivative_and_leaves_the_step():
    generator = torch.Generator().manual_seed(0)
    given = [torch.rand(6, generator=generator, dtype=torch.float64) for _ in range(3)]
    gradient = torch.tensor([1e-9, 0.1, -0.2, 0.3, -0.1, 0.2], dtype=torch.float64)
    given[1:] = torch.zeros(6).double(), torch.zeros(6).double()
    exact, soft = (
        adamw_step(*given, gradient.requires_grad_(), step=1, rate=0.1, smoothing=s) for s in (0, 0.1)
    )
    torch.testing.assert_close(exact[0], soft[0], rtol=1e-14, atol=0)
    sharp, smooth = (torch.autograd.grad(after[0][0], gradient)[0][0].abs() for after in (exact, soft))
    assert smooth < sharp / 1e3


def test_token_scores_add_up_and_lie_on_response_tokens():
    data, scorer = parity(), TrainingInfluence(model(), query(), **RECIPE)
    result = scorer.score(data, tokens=True, progress=False)
    for row, tokens_T in enumerate(result.token_scores):
        np.testing.assert_allclose(tokens_T.sum(), result.scores[row], rtol=1e-5)
        assert not tokens_T[~result.response_masks[row]].any()


def test_pieces_order_of_the_file_and_cached_parts_change_nothing():
    data, lm = parity(), model()
    whole = TrainingInfluence(lm, query(), **RECIPE).score(data, progress=False)
    single = TrainingInfluence(lm, query(), **RECIPE).score(data, token_budget=1, progress=False)
    np.testing.assert_allclose(single.scores, whole.scores, rtol=1e-6)
    turned = TrainingInfluence(lm, query(), **RECIPE).score(data.select(np.arange(12)[::-1]), progress=False)
    np.testing.assert_allclose(turned.scores[::-1], whole.scores, rtol=1e-6)


@pytest.mark.parametrize("killed", ["forth", "back"])
def test_a_killed_call_goes_on_to_the_same_numbers(killed, monkeypatch):
    data, lm = parity(20), model()
    expected = TrainingInfluence(lm, query(), **RECIPE | dict(batch_size=2)).score(data, progress=False)
    calls, name = [], "after" if killed == "forth" else "through"
    real = getattr(runs._StepBack, name)

    def dying(self, *given):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(runs._StepBack, name, dying)
    scorer = TrainingInfluence(lm, query(), **RECIPE | dict(batch_size=2))
    with pytest.raises(KeyboardInterrupt):
        scorer.score(data, progress=False)
    before = len(calls)
    again = scorer.score(data, progress=False)
    np.testing.assert_array_equal(again.scores, expected.scores)
    full = 10 if killed == "back" else None
    assert full is None or len(calls) - before < full  # what was finished is not done again


def test_each_step_is_taken_twice_and_differentiated_once(monkeypatch):
    taken = {"gradient": 0, "through": 0}

    def counted(name, real):
        def count(self, *given):
            taken[name] += 1
            return real(self, *given)

        return count

    for name in taken:
        monkeypatch.setattr(runs._StepBack, name, counted(name, getattr(runs._StepBack, name)))
    TrainingInfluence(model(), query(), **RECIPE | dict(batch_size=2)).score(parity(20), progress=False)
    assert taken == {"gradient": 20, "through": 10}


def test_a_concept_is_asked_where_it_is_read():
    lm, data = model(), parity()
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(1))
    asked = ConceptQuery(tensor_concept(direction, layer=1, lm=lm, name="c"), parity(2))
    scorer = TrainingInfluence(lm, asked, **RECIPE)
    result = scorer.score(data, progress=False)
    measured = slope(lambda weight: value_after(scorer, data, {3: weight}), 1.0)
    np.testing.assert_allclose(result.scores[3] - scorer.by_rate / len(data), measured, rtol=2e-4, atol=1e-8)
    assert result.card.unit == "activation" and result.card.effect == -1 and result.card.gap is None


def test_examples_are_cut_where_the_run_cut_them(tmp_path):
    lm, data = model(), parity()
    recipe = {name: value for name, value in RECIPE.items() if name != "smoothing"} | dict(max_tokens=28)
    finetune(lm, data, tmp_path / "run", **recipe, progress=False)
    from_folder = TrainingInfluence(lm, query(), run=tmp_path / "run").score(data, progress=False)
    from_settings = TrainingInfluence(lm, query(), **recipe).score(data, progress=False)
    assert any("were cut there" in note for note in from_folder.card.notes)
    assert from_folder.card.settings["max_tokens"] == from_settings.card.settings["max_tokens"] == 28
    np.testing.assert_array_equal(from_folder.scores, from_settings.scores)


def test_predictions_come_true_after_retraining(tmp_path):
    lm, draw, words = model(), np.random.default_rng(0), "red green blue pear house sun stone".split()
    asked = lambda i: f"Q{i} " + " ".join(draw.choice(words, 2))
    answer = lambda kind: " ".join(draw.choice(words[:3] if kind else words[3:], 3))
    data = load_conversations([{"prompt": asked(i), "response": answer(i % 2)} for i in range(40)])
    colours = LossQuery(
        load_conversations([{"prompt": asked(i), "response": answer(1)} for i in range(50, 54)])
    )
    recipe = dict(rank=4, learning_rate=2e-3, batch_size=2)
    scorer = TrainingInfluence(lm, colours, **recipe)  # smoothed, as by default
    result = scorer.score(data, progress=False)
    order = np.argsort(result.scores)
    sets = [order[:10], order[-10:], *(np.random.default_rng(seed).permutation(40)[:10] for seed in range(3))]
    predicted, measured = [], []
    for number, rows in enumerate(sets):
        left = data.select(np.setdiff1d(np.arange(40), rows))
        tuned = finetune(lm, left, tmp_path / str(number), **recipe, progress=False)
        predicted.append(result.predict(drop=rows).change)
        measured.append(scorer.query.value(tuned) - scorer.values[1])
    assert np.corrcoef(predicted, measured)[0, 1] > 0.75, (predicted, measured)
    assert 0.5 < np.polyfit(predicted, measured, 1)[0] < 2.5, (predicted, measured)


def test_what_cannot_be_repeated_is_refused(tmp_path):
    lm, data = model(), parity()
    recipe = {name: value for name, value in RECIPE.items() if name != "smoothing"}
    tuned = finetune(lm, data, tmp_path / "run", **recipe, progress=False)
    with pytest.raises(RunError, match="did not start from"):
        TrainingInfluence(tuned, query(), run=tmp_path / "run")
    with pytest.raises(RunError, match="not both"):
        TrainingInfluence(lm, query(), run=tmp_path / "run", epochs=2)
    with pytest.raises(FinetuneError, match="no setting 'epoch'"):
        TrainingInfluence(lm, query(), epoch=2)
    with pytest.raises(RunError, match="smoothing"):
        TrainingInfluence(lm, query(), smoothing=-1)
    with pytest.raises(RunError, match="belongs to the model"):
        TrainingInfluence(lm, query(), chat_template="chatml")
    with pytest.raises(RunError, match="other data"):
        TrainingInfluence(lm, query(), run=tmp_path / "run").score(data[:5], progress=False)
    scored = TrainingInfluence(lm, query(), run=tmp_path / "run").score(data, progress=False)
    with pytest.raises(AttributionError, match="not in this result"):
        scored.predict(drop=["nobody"])
    for drop in (3, scored.ids[0]):
        with pytest.raises(AttributionError, match="a list of ids or rows"):
            scored.predict(drop=drop)
