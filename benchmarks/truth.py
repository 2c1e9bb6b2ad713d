"""Do scores foretell what a retraining does? Every variant of a method on retrainings that exist already.

    python benchmarks/truth.py --work build/truth                 # score what is not scored yet, and report
    python benchmarks/truth.py --work build/truth --report        # only the report
    python benchmarks/truth.py --work build/truth --only careless --groups through-0 lora   # some of it
    python benchmarks/truth.py my-sets.json --work build/truth    # other sets

A **pool** is the retrainings of one data set: `paper.py` and `groups.py` have left hundreds of them behind,
each with the rows it was trained on and a judge's verdict. One pool serves all variants, since a variant only
has to score the examples once: the sum of its scores over what was left out is laid against the change that
was measured. Only new scores are computed here; those that `paper.py` kept are read. They come in groups, a
few scorers at a time, each written as soon as it is there: a run may be killed and started again.

The file of sets is a JSON list of `SETS` below: the study's YAML for `paper.py` (model, data, recipe, judges,
seeds), the packed retrainings of it, the scores that are there, and the share that filters drop. A larger
study is a longer file: write a YAML for each set with the seeds and draws that are wanted, let `paper.py`
retrain, and name the results here.

What would make the numbers wrong: choosing a variant by the very retrainings it is then praised with (the
screening here *is* such a choice, so it names candidates); counting seeds of one subset as subsets, or sets
that share most of their examples as independent ones (intervals and comparisons leave out, or draw, whole
groups of such sets); comparing the sums of scores over sets of different sizes by rank only (the size alone
foretells something, and the baseline "number left out" says how much).
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from advice import advice_right, decisions
from paper import Study, conversations, read_config
from scipy.stats import rankdata, t

import concept_tda as ct
from concept_tda.evidence.datamodels import LinearDatamodelingScore, left_out
from concept_tda.evidence.filter_and_retrain import FilterAndRetrain
from concept_tda.foundation.errors import ConceptTDAError
from concept_tda.foundation.storage import atomic_file
from concept_tda.influence.neighbours import AdamMoments, TracIn
from concept_tda.influence.preconditioners import ConjugateGradient
from concept_tda.influence.queries import (
    ConceptQuery,
    ContrastQuery,
    LossQuery,
    MarginQuery,
    WeightedQuery,
    within_questions,
)
from concept_tda.influence.responses import SOURCE, AdamResponse, Unrolled, gradient_size
from concept_tda.influence.runs import TrainingInfluence
from concept_tda.influence.scorers import Influence
from concept_tda.model.finetuning import run_segments
from concept_tda.results.attribution import Attribution
from concept_tda.results.calibration import Calibration, combined, ensemble, foretold
from concept_tda.results.cards import QueryCard
from concept_tda.results.metrics import spearman

HERE = Path(__file__).parent
RESULTS = HERE / "results"
KINDS = {
    "filter-and-retrain": FilterAndRetrain,
    "linear-datamodeling-score": LinearDatamodelingScore,
    "counterfactual-prediction": ct.CounterfactualPrediction,
    "pareto-curve": ct.ParetoCurve,
}


def of_paper(name, dropped, draws, *more_pools, seeds=5):
    "A set whose study, scores and retrainings lie where `paper.py` puts them."
    place = f"results/paper/{name}"
    return dict(
        study=f"paper/{name}.yaml",
        scores=f"{place}/{name}.json",
        pools=[f"{place}/retrained.json", *more_pools],
        dropped=dropped,
        draws=draws,
        seeds=seeds,
    )


SETS = [
    of_paper("sycophancy", 0.25, 3, "results/kinds/retrained.json"),
    of_paper("careless", 0.5, 3),
    of_paper("flattery", 0.25, 3),
    of_paper("arithmetic", 0.5, 3),
]

DEFAULT = "Concept Influence"
# What an example shows and what it teaches, as one ranking: the mean of both, each by its own spread.
TOGETHER = [("Vector Filter", DEFAULT), ("Vector Filter", f"{DEFAULT}, LoRA, SOURCE")]

# ---------------------------------------------------------------- what was measured


def experiments_of(pools):
    "Every experiment of some packed files."
    found = []
    for path in pools:
        for name, plan in json.loads((HERE / path).read_text())["plans"].items():
            found.append(KINDS[plan["kind"]].from_folder(HERE / path, name))
    return found


def halves_of(experiments):
    "Rows and the judge's value for each random half (seed 0), where there are such."
    halves = [one for one in experiments if one.kind == "linear-datamodeling-score"]
    found = []
    for one in halves:
        judge = one.judge_records[0]
        for entry in one.entries:
            training, said = one.training(entry["cell"]), one.evaluation(entry["cell"], judge)
            if entry["arm"] == "subset" and training and said is not None:
                found.append((np.array(training["rows"]), said.mean))
    return found


def noise_of(pool):
    "Variance between seeds of the change by leaving one set out."
    return float((pool.loc[pool["seeds"] > 1, "spread"] ** 2).mean())


def ceiling(measured, noise):
    """Highest correlation with the measured changes to be expected of the true ones: τ/√(τ² + σ²), σ² the
    noise of the measured values and τ the spread of the true effects (Formulas §9)."""
    whole = float(np.var(measured, ddof=1))
    return (max(0.0, whole - noise) / whole) ** 0.5


def beyond_number(values, left_out):
    """What a line on the number left out does not explain of values [..., S]: a shorter run changes something
    whoever is missing, and no ranking of examples has that merit."""
    design_S2 = np.column_stack([np.ones(len(left_out)), left_out])
    values = np.asarray(values, float)
    return values - (design_S2 @ np.linalg.lstsq(design_S2, values.T, rcond=None)[0]).T


def chance(pool, n, draws=2000):
    """The partial R² that one in twenty random rankings reaches on a pool. It is large where the sets are
    few, or variations of a few."""
    member_SN = np.array([np.isin(np.arange(n), rows) for rows in pool["rows"]], float)
    sums_DS = beyond_number(np.random.default_rng(0).normal(size=(draws, n)) @ member_SN.T, pool["n"])
    measured = beyond_number(pool["measured"], pool["n"])
    r2 = [np.corrcoef(sums, measured)[0, 1] ** 2 for sums in sums_DS]
    return float(np.quantile(r2, 0.95))


# ---------------------------------------------------------------- what is foretold


class Scores:
    "Scores by name of one set, new ones computed in groups and kept."

    def __init__(self, about, work, kept=RESULTS / "truth", at_once=16):
        self.about, self.at_once = about, at_once
        self.config = read_config(HERE / about["study"])
        self.work, self.folder = Path(work) / self.config["name"], Path(kept) / self.config["name"]
        self.study = None

    def opened(self):
        "Model, data and judges, opened when something has to be scored."
        if self.study is None:
            self.study = Study(self.config, self.work.parent)
        return self.study

    def file(self, group):
        "Where the scores of a group of variants are kept."
        return self.folder / f"{group}.json"

    def kept(self, group, computed):
        "Scores of a group, from its file; what is missing is computed and written, a few scorers at a time."
        path = self.file(group)
        told = json.loads(path.read_text()) if path.exists() else dict(group={}, failed={}, finished=False)
        if told["finished"]:
            return told
        for results, failed in computed(told["group"]):
            told["group"] |= {name: record_of(result) for name, result in results.items()}
            told["failed"] |= failed
            self.write(path, told)
            print(self.config["name"], ", ".join([*results, *failed]), flush=True)
        told["finished"] = True
        self.write(path, told)
        return told

    def write(self, path, told):
        "A group's file anew."
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as part:
            part.write_text(json.dumps(told, indent=0))

    def tuned(self, merge, seed=None):
        "The fine-tuned model of a seed, the first if None."
        study, config = self.opened(), self.config
        folder = self.work / ("lora" if seed is None else f"lora-{seed}")
        seed = config["seeds"][0] if seed is None else seed
        adapted = ct.finetune(study.lm, study.train, folder, seed=seed, merge=False, **config["recipe"])
        return ct.load_model(folder, merge=True) if merge else adapted

    def asked(self, lm):
        "Concept, answers that show it, and neutral ones."
        study, n = self.opened(), self.config["queries"]
        return study.concept(lm), study.positive[:n], study.negative[:n]

    def sample(self):
        "The examples that curvature is measured on, as `paper.py` draws them."
        train = self.opened().train
        drawn = np.random.default_rng(0).permutation(len(train))
        return train.select(np.sort(drawn[: self.config["curvature_examples"]]))

    def fitted(self, lm):
        "EK-FAC in the attention weights of a model."
        return ct.EKFAC.fit(lm, self.sample(), damping=self.config["damping"])

    def in_weights(self, done):
        "Concept Influence in the attention weights of the merged model, one option at a time."
        tuned = self.tuned(merge=True)
        concept, shows, neutral = self.asked(tuned)
        ekfac, judge = self.fitted(tuned), next(iter(self.study.judges.values()))
        asked, unasked = once(ConceptQuery(concept, shows)), ConceptQuery(concept, neutral)
        margin = ContrastQuery(LossQuery(shows), LossQuery(neutral))
        on = lambda name, query, **more: Influence(
            tuned, query, **{"curvature": ekfac, "method": name} | more
        )
        scorers = [
            on("Concept Influence, neutral queries", unasked),
            on("Concept Influence, without the first token", asked, first_token=False),
            on("Concept Influence, identity", asked, curvature="identity"),
            on("Concept Influence, norm", asked, normalise="gradient"),
            on("Concept Influence, query parts", ConceptQuery(concept, shows), query_parts=5),
            on("Concept Influence, prompts alone", ConceptQuery(concept, shows, pooling="prompt_last")),
            on("Margin", margin),
            on("Judge's margin", MarginQuery(judge)),
        ]
        yield from self.few_at_a_time(scorers, done)

    def in_seed(self, seed, done):
        "There, in the model of another seed, with its own concept and curvature."
        tuned = self.tuned(merge=True, seed=seed)
        concept, shows, neutral = self.asked(tuned)
        queries = questions(concept, shows, neutral) | {"Influence Function": LossQuery(shows)}
        ekfac, shown = self.fitted(tuned), ct.VectorFilter(tuned, concept)
        shown.method = f"Vector Filter, seed {seed}"
        influences = [
            Influence(tuned, one, curvature=ekfac, method=f"{name}, seed {seed}")
            for name, one in queries.items()
        ]
        yield from self.few_at_a_time([shown, *influences], done)

    def in_solved(self, done):
        "There, by the exact Gauss-Newton matrix of the same examples: conjugate gradients on top of EK-FAC."
        tuned = self.tuned(merge=True)
        ekfac, sample = self.fitted(tuned), self.sample()
        solve = lambda: ConjugateGradient(tuned, sample, ekfac, iterations=20)
        scorers = [
            Influence(tuned, one, curvature=solve(), method=f"{name}, conjugate gradients")
            for name, one in questions(*self.asked(tuned)).items()
        ]
        yield from self.few_at_a_time(scorers, done)

    def in_queries(self, done):
        "There, by fewer and by more queries, and by all of both kinds, by how likely they are."
        tuned = self.tuned(merge=True)
        concept, shows, neutral = self.asked(tuned)
        study, ekfac, few = self.study, self.fitted(tuned), self.config["queries"] // 2
        held_out = conversations(self.config["data"], "heldout")
        likely = ct.LossJudge(held_out, name="likelihood").evaluate(tuned).values
        weights = within_questions(held_out, likely)  # what the model prefers among the answers
        queries = {
            "Concept Influence, half the queries": ConceptQuery(concept, shows[:few]),
            "Concept Influence, all queries": ConceptQuery(concept, study.positive),
            "Concept Influence, weighted queries": WeightedQuery(ConceptQuery(concept, held_out), weights),
            "Margin, half the queries": ContrastQuery(LossQuery(shows[:few]), LossQuery(neutral[:few])),
            "Margin, all queries": ContrastQuery(LossQuery(study.positive), LossQuery(study.negative)),
        }
        scorers = [Influence(tuned, one, curvature=ekfac, method=name) for name, one in queries.items()]
        yield from self.few_at_a_time(scorers, done)

    def in_base(self, done):
        "The same questions to the model before the fine-tune, where a retraining starts."
        base = self.opened().lm
        concept, shows, neutral = self.asked(base)
        queries = {
            "Concept Influence, base model": ConceptQuery(concept, shows),
            "Concept Influence, neutral queries, base model": ConceptQuery(concept, neutral),
            "Margin, base model": ContrastQuery(LossQuery(shows), LossQuery(neutral)),
        }
        ekfac = self.fitted(base)
        scorers = [Influence(base, one, curvature=ekfac, method=name) for name, one in queries.items()]
        yield from self.few_at_a_time(scorers, done)

    def in_lora(self, done):
        "In the parameters that were trained, plainly and in Adam's metric."
        study, folder = self.opened(), self.work / "lora"
        tuned = self.tuned(merge=False)
        batch_size = self.config["recipe"]["batch_size"]
        moments = AdamMoments.estimate(tuned, study.train, "lora", batch_size=batch_size)
        responses = {
            "Adam": AdamResponse(moments, folder),
            "Adam without agreement": AdamResponse(moments, folder, agreement=False),
            "identity": "identity",
        }
        yield from self.few_at_a_time(self.with_responses(tuned, responses), done)

    def in_unrolled(self, done):
        "There, by the response of a run that stops, in EK-FAC's eigenbasis."
        study, folder, n = self.opened(), self.work / "lora", self.config["curvature_examples"]
        tuned = self.tuned(merge=False)
        ekfac = ct.EKFAC.fit(tuned, study.train[:n], "lora", damping=self.config["damping"])
        responses = {"unrolled": Unrolled(ekfac, folder, gradient_size=gradient_size(folder, tuned))}
        yield from self.few_at_a_time(self.with_responses(tuned, responses), done)

    def of_the_run(self):
        "The folder of the fine-tune of the first seed with three checkpoints, and the queries asked of it."
        study, folder = self.opened(), self.work / "segments"
        options = dict(seed=self.config["seeds"][0], merge=False, checkpoints=3, **self.config["recipe"])
        return folder, questions(*self.asked(ct.finetune(study.lm, study.train, folder, **options)))

    def in_segments(self, done):
        "There, by SOURCE: three segments of the run, each with its own checkpoint and EK-FAC."
        folder, queries = self.of_the_run()
        sample, damping = self.study.train[: self.config["curvature_examples"]], self.config["damping"]
        fit = lambda lm, sites: ct.EKFAC.fit(lm, sample, sites, damping=damping)
        for name, query in queries.items():
            method = f"{name}, LoRA, SOURCE"
            scorer = SOURCE.of_run(folder, self.study.lm, query, curvatures=[fit] * 3, method=method)
            yield from self.few_at_a_time([scorer], done)

    def in_history(self, done):
        "There, by TracIn: the same checkpoints and the model before the run, without any curvature."
        folder, queries = self.of_the_run()
        for name, query in queries.items():
            pieces = run_segments(folder, self.study.lm)
            scorer = TracIn(queries=query, **pieces, sites="lora", method=f"{name}, LoRA, TracIn")
            yield from self.few_at_a_time([scorer], done)

    def costs(self):
        """CPU seconds of one training, and of each ranking that users would run: curvature, queries, scores.
        All of it from nothing, the model and the concept at hand. Beside other work CPU seconds are longer,
        so only their ratios are read."""
        if self.file("cost").exists():
            return json.loads(self.file("cost").read_text())
        study, (folder, of_run), seconds = self.opened(), self.of_the_run(), {}
        tuned = self.tuned(merge=True)
        sample, damping = self.sample(), self.config["damping"]
        fit = lambda lm, sites: ct.EKFAC.fit(lm, sample, sites, damping=damping, cache=False)
        concept, shows, neutral = self.asked(tuned)
        rankings = {"Vector Filter": lambda: ct.VectorFilter(tuned, concept)}
        rankings |= {
            name: lambda query=query: Influence(tuned, query, curvature=fit(tuned, "attention"))
            for name, query in (
                questions(concept, shows, neutral) | {"Influence Function": LossQuery(shows)}
            ).items()
        }
        rankings[f"{DEFAULT}, LoRA, SOURCE"] = lambda: SOURCE.of_run(
            folder, study.lm, of_run[DEFAULT], curvatures=[fit] * 3
        )
        for name, ranking in rankings.items():
            started = time.process_time()
            ranking().score(study.train, progress=False)
            seconds[name] = time.process_time() - started
        with TemporaryDirectory() as fresh:
            started, seed = time.process_time(), self.config["seeds"][0]
            ct.finetune(study.lm, study.train, Path(fresh) / "run", seed=seed, **self.config["recipe"])
            seconds["One training"] = time.process_time() - started
        self.write(self.file("cost"), seconds)
        return seconds

    def with_responses(self, tuned, responses):
        "A scorer in LoRA's matrices for each query and response."
        concept, shows, neutral = self.asked(tuned)
        queries = questions(concept, shows, neutral) | {
            "Concept Influence, neutral queries": ConceptQuery(concept, neutral),
            "Judge's margin": MarginQuery(next(iter(self.study.judges.values()))),
        }
        return [
            Influence(tuned, query, sites="lora", curvature=response, method=f"{name}, LoRA, {metric}")
            for name, query in ((name, once(query)) for name, query in queries.items())
            for metric, response in responses.items()
        ]

    def few_at_a_time(self, scorers, done):
        "Results of those that are not done, and what went wrong: a scorer that fails costs only its batch."
        left = [scorer for scorer in scorers if scorer.method not in done]
        for batch in (left[i : i + self.at_once] for i in range(0, len(left), self.at_once)):
            try:
                yield ct.score_together(batch, self.opened().train, progress=False), {}
            except ConceptTDAError as err:
                results = getattr(err, "results", {})
                yield results, {one.method: str(err) for one in batch if one.method not in results}

    def through(self, seed, smoothing=None):
        "The derivative of the judge's margin through the whole run; names an unusual smoothing."
        study = self.opened()
        judge = next(iter(study.judges.values()))
        other, named = (
            ({}, "") if smoothing is None else (dict(smoothing=smoothing), f"smoothing {smoothing:g}, ")
        )
        scorer = TrainingInfluence(study.lm, MarginQuery(judge), seed=seed, **other, **self.config["recipe"])
        yield {f"Training Influence, {named}seed {seed}": scorer.score(study.train)}, {}

    def computed(self, groups, only_kept):
        "All groups by name, or those that are there."
        jobs = {"weights": self.in_weights, "lora": self.in_lora, "unrolled": self.in_unrolled}
        jobs |= {
            "segments": self.in_segments,
            "history": self.in_history,
            "base": self.in_base,
            "queries": self.in_queries,
            "solved": self.in_solved,
            "sharper": lambda _: self.through(self.config["seeds"][0], 0.003),
        }
        jobs |= {
            f"through-{seed}": lambda _, seed=seed: self.through(seed) for seed in range(self.about["seeds"])
        }
        jobs |= {
            f"seed-{seed}": lambda done, seed=seed: self.in_seed(seed, done)
            for seed in self.config["seeds"][1:]
        }
        for group in groups or jobs:
            if not only_kept:
                yield group, self.kept(group, jobs[group])
            elif self.file(group).exists():
                yield group, json.loads(self.file(group).read_text())

    def retrain(self, results, shares, halves, labels, dry=False):
        """Train again without what some results put highest, beside random removal; without the labelled
        examples, beside random removal of as many; and on random halves, in a folder with the retrainings of
        the first pool; pack all of it anew. `dry`: only say how many are to come."""
        study, about = self.opened(), self.about
        packed = HERE / about["pools"][0]
        self.unpack(json.loads(packed.read_text()))
        trait = next(iter(study.judges))
        shown = study.train.labels(self.config["column"], self.config["positive"])
        plan = (study.lm, study.train, results, {trait: study.judges[trait]}, self.work / "retrained")
        common = dict(
            n_random=about["draws"], seeds=list(range(about["seeds"])), recipe=self.config["recipe"]
        )
        finalists = FilterAndRetrain(
            *plan,
            fractions=shares or [about["dropped"]],
            arms=["drop-most", "random"],
            name="-".join(["without", *(f"{100 * share:g}" for share in shares)]) if shares else "finalists",
            **common,
        )
        plans = [finalists]
        if labels:
            unlabelled = {f"without {self.config['positive']}": ~shown}
            by_label = dict(fractions=[shown.mean()], arms=["random"], subsets=unlabelled, name="labels")
            plans.append(FilterAndRetrain(*plan, **by_label, **common))
        if halves:
            more = dict(fraction=0.5, n_subsets=halves, seeds=[0], recipe=self.config["recipe"], name="lds")
            plans.append(LinearDatamodelingScore(*plan, **more))
        for one in plans:
            print(self.config["name"], one.name, one.remaining, "retrainings to come", flush=True)
            if not dry:
                one.run().pack(packed, overwrite=True)

    def unpack(self, told):
        "The retrainings of a packed file as the folder they came from."
        folder = self.work / "retrained"
        for cell, parts in told["cells"].items():
            (folder / "cells" / cell).mkdir(parents=True, exist_ok=True)
            for part, record in parts.items():
                (folder / "cells" / cell / f"{part}.json").write_text(json.dumps(record))
        for name, plan in told["plans"].items():
            (folder / f"{name}.json").write_text(json.dumps(plan))


def questions(concept, shows, neutral):
    "What is asked of a model: where the concept lies, and how far answers that show it are ahead."
    return {
        "Concept Influence": ConceptQuery(concept, shows),
        "Margin": ContrastQuery(LossQuery(shows), LossQuery(neutral)),
    }


def once(query):
    "The query, its gradients computed once for all scorers that ask for them at the same sites."
    known, computed = {}, query.gradients

    def gradients(lm, sites, *options):
        key = lm.fingerprint, tuple(site.name for site in sites), options
        if key not in known:
            known[key] = computed(lm, sites, *options)
        return {name: one.clone() for name, one in known[key].items()}

    query.gradients = gradients
    return query


def record_of(result):
    "Scores, card and replicates as plain values."
    short = lambda values: [short(x) if isinstance(x, list) else float(f"{x:.7g}") for x in values]
    replicates = None if result.replicates is None else short(result.replicates.tolist())
    card = result.card.to_dict()
    card["model"] = Path(card["model"] or "").name  # not where it lay
    return dict(scores=short(result.scores.tolist()), card=card, replicates=replicates)


# ---------------------------------------------------------------- the report


def as_result(train, scores, card=None, replicates=None):
    "An attribution of scores from a file."
    card = QueryCard.from_dict(card) if isinstance(card, dict) else card
    return Attribution(train, scores, card, replicates=None if replicates is None else np.array(replicates))


def with_means(kept):
    "Means of scores that are there: over the seeds of the run, and over its two ends."
    seeds = [one for name, one in kept.items() if name.startswith("Training Influence, seed")]
    if len(seeds) > 1:
        kept[f"Training Influence, {len(seeds)} seeds"] = ensemble(seeds)
    asked = "query parts", "neutral queries"
    pairs = {
        "contrast": (*asked, -1, False),
        "both kinds": (*asked, 1, False),
        "both models": (asked[0], "base model", 1, True),
        "neutral queries, both models": (asked[1], f"{asked[1]}, base model", 1, True),
    }
    for name, (one, other, sign, standard) in pairs.items():
        parts = [f"Concept Influence, {part}" for part in (one, other)]
        if not set(parts) <= set(kept):
            continue
        sizes = [kept[part].scores.std() if standard else 1.0 for part in parts]
        scores = kept[parts[0]].scores / sizes[0] + sign * kept[parts[1]].scores / sizes[1]
        kept[f"Concept Influence, {name}"] = Attribution(
            kept[parts[0]].conversations, scores, kept[parts[0]].card
        )
    for name in ("Vector Filter", "Concept Influence", "Influence Function", "Margin"):
        others = [one for one in kept if one.startswith(f"{name}, seed ")]
        if others:
            first, parts = kept[name], [kept[one] for one in [name, *others]]
            scores = np.mean([one.scores / one.scores.std() for one in parts], axis=0)
            kept[f"{name}, {len(parts)} seeds"] = as_result(first.conversations, scores, first.card)
    for parts in TOGETHER:
        if set(parts) <= set(kept):
            both = combined([kept[part] for part in parts])
            kept[in_fewer_words(both.card.method)] = both


def in_fewer_words(name):
    "A combination's name, in fewer words."
    return name.replace(f"{DEFAULT}, LoRA, ", "")


def verdict(result, labels, pool, halves, groups, unit):
    "What a variant's scores are worth on a pool."
    measured = pool["measured"].to_numpy()
    sums = np.array([foretold(result, rows) for rows in pool["rows"]])
    line = Calibration.fit(sums, measured)
    half = np.array([-foretold(result, np.setdiff1d(np.arange(len(result)), rows)) for rows, _ in halves])
    whole = np.array([value for _, value in halves])
    _, outside = foretold_by_others(sums, measured, groups)
    covered, calibrated = foretold_by_others(sums, measured, groups, pool["n"].to_numpy())
    found = dict(
        r2=line.r2,
        r2_outside=outside,
        r2_calibrated=calibrated,
        r2_partial=partial_r2(sums, measured, pool["n"]),
        slope=line.slope,
        rank=spearman(sums, measured),
        lds=spearman(-half, whole) if len(halves) else None,
        auroc=result.detection(labels)["AUROC"].iloc[0],
        residual=line.residual,
        covered=covered,
    )
    if result.card.effect is not None and result.card.unit == unit:  # the judge's: an amount without any line
        error = measured - sums
        found["r2_uncalibrated"] = float(1 - (error**2).mean() / measured.var())
        if result.replicates is not None:
            ends = [result.predict(drop=rows, level=0.9) for rows in pool["rows"]]
            inside = [one.low < value < one.high for one, value in zip(ends, measured)]
            found["covered_by_seeds"] = float(np.mean(inside))
    return found


def partial_r2(sums, measured, left_out):
    "Share of the changes beyond the number left out that the sums beyond it explain."
    x, y = beyond_number([sums, measured], left_out)
    flat = np.ptp(x) < 1e-6 * np.abs(sums).max() + 1e-300  # sums that only count
    return 0.0 if flat else float(np.corrcoef(x, y)[0, 1] ** 2)


def foretold_by_others(sums, measured, groups, left_out=None, level=0.9):
    """How often the interval of a calibration holds a set's change, and the R² of its line, where each group
    of related sets is foretold from the other groups. The R² can be below zero: worse than the mean. With
    `left_out`, how many examples each set holds, it is the calibration that users get."""
    inside, squares = [], 0.0
    sizes = np.full(len(sums), None) if left_out is None else left_out
    for group in np.unique(groups):
        left = groups == group
        if np.ptp(sums[~left]) < 1e-6 * np.abs(sums).max():  # nothing to draw a line through
            squares += ((measured[left] - measured[~left].mean()) ** 2).sum()
            continue
        told = {} if left_out is None else dict(left_out=left_out[~left], related=groups[~left])
        line = Calibration.fit(sums[~left], measured[~left], **told)
        for x, y, n in zip(sums[left], measured[left], sizes[left]):
            change, low, high = line.interval(x, n, level=level)
            inside.append(low < y < high)
            squares += (y - change) ** 2
    return float(np.mean(inside)) if inside else None, float(
        1 - squares / ((measured - measured.mean()) ** 2).sum()
    )


def weighted_correlations(x_MS, y_S, w_DS):
    "Correlation [D, M] of each row of x with y, for each row of weights."
    w_DS = w_DS / w_DS.sum(1, keepdims=True)
    y_D, x_DM = w_DS @ y_S, w_DS @ x_MS.T
    both = w_DS @ (x_MS * y_S).T - x_DM * y_D[:, None]
    spread = (w_DS @ (x_MS**2).T - x_DM**2) * (w_DS @ y_S**2 - y_D**2)[:, None]
    enough = spread > 1e-9 * ((w_DS @ (x_MS**2).T) * (w_DS @ y_S**2)[:, None])
    return np.where(enough, both / np.sqrt(np.where(enough, spread, 1.0)), 0.0)


def against(default, sums, measured, groups, draws=2000):
    """What each variant has before the default, in partial R² (a negative slope counts as minus) and in rank
    correlation, both beyond the number left out, with 95 % intervals over drawn groups of related sets."""
    names, members = list(sums), np.unique(groups)
    x_MS = np.array([sums[name] for name in names])
    x_MS = (x_MS - x_MS.mean(1, keepdims=True)) / x_MS.std(1, keepdims=True)
    drawn_DG = np.random.default_rng(0).multinomial(
        len(members), np.full(len(members), 1 / len(members)), draws
    )
    w_DS = np.vstack([np.ones(len(measured)), drawn_DG[:, np.searchsorted(members, groups)]])
    enough = [(row > 0).sum() > 3 for row in w_DS]  # a handful of sets has no correlation
    r_DM = weighted_correlations(x_MS, measured, w_DS[enough])
    rank_DM = weighted_correlations(rankdata(x_MS, axis=1), rankdata(measured), w_DS[enough])
    found, own = {}, names.index(default)
    for i, name in enumerate(names):
        found[name] = {}
        for what, value_DM in dict(r2=np.sign(r_DM) * r_DM**2, rank=rank_DM).items():
            ahead = value_DM[:, i] - value_DM[:, own]
            low, high = np.quantile(ahead[1:], [0.025, 0.975])
            found[name][what] = dict(mean=float(ahead[0]), low=float(low), high=float(high))
    return found


def scored(scores):
    """Every result that there is for a set, and what each costs in Vector Filters: from nothing where
    timed so, else its part of the one pass of `paper.py` if it needs no curvature, which all share there."""
    told = json.loads((HERE / scores.about["scores"]).read_text())
    trait = next(iter(scores.config["judges"]))
    data = conversations(scores.config["data"], "train")
    train = data.select([data.ids.index(id) for id in told["train_ids"]])
    kept = {
        name: as_result(train, values, QueryCard(name, trait, zero=zero_of(name)))
        for name, values in told["scores"].items()
    }
    shared = {row["method"]: row.get("seconds") for row in told["methods"]}
    alone = json.loads(scores.file("cost").read_text()) if scores.file("cost").exists() else {}
    cost = {name: of for name, of in shared.items() if of and "Influence" not in name}
    cost = in_vector_filters(cost) | in_vector_filters(alone)
    for _, record in scores.computed(None, True):
        for name, one in record["group"].items():
            kept[name] = as_result(train, **one)
    with_means(kept)
    for parts in TOGETHER:
        if set(parts) <= set(cost):
            cost[in_fewer_words(" and ".join(parts))] = sum(cost[part] for part in parts)
    return kept, cost


def in_vector_filters(seconds):
    "Costs as multiples of a Vector Filter in the same run."
    return {name: of / seconds["Vector Filter"] for name, of in seconds.items()}


def report_of(scores):
    "Everything about one set, from files."
    about = scores.about
    told = json.loads((HERE / about["scores"]).read_text())
    experiments = experiments_of(about["pools"])
    trait = next(iter(scores.config["judges"]))
    unit = next(one["unit"] for one in experiments[0].judge_records if one["name"] == trait)
    pool, halves = left_out(experiments, trait), halves_of(experiments)
    labels = [label == scores.config["positive"] for label in told["labels"]]
    kept, cost = scored(scores)
    train = kept[DEFAULT].conversations
    plain = {"Labels": np.array(labels, float), "Number left out": 1 + 1e-9 * np.arange(len(train))}
    for name, values in plain.items():
        kept[name] = as_result(train, values, QueryCard(name, trait, zero="gradient"))
    groups, noise, measured = pool["group"].to_numpy(), noise_of(pool), pool["measured"].to_numpy()
    found = {name: verdict(one, labels, pool, halves, groups, unit) for name, one in kept.items()}
    sums = {name: [foretold(one, rows) for rows in pool["rows"]] for name, one in kept.items()}
    left = pool["n"].to_numpy()
    beyond = {name: beyond_number(of, left) for name, of in sums.items() if name != "Number left out"}
    changes = beyond_number(measured, left)
    labels_effect, effects = effects_by_method(experiments, trait, about["dropped"])
    at = {str(share): effects_by_method(experiments, trait, share)[1] for share in (0.1, 0.25, 0.5, 0.75)}
    top = ceiling(measured, float((noise / pool["seeds"]).mean()))
    half_top = ceiling([value for _, value in halves], noise) if halves else None
    return dict(
        labels_effect=labels_effect,
        dropped=about["dropped"],
        n=len(train),
        sets_left_out=len(pool),
        groups=len(np.unique(groups)),
        halves=len(halves),
        noise=noise**0.5,
        ceiling=top,
        chance=chance(pool, len(train)),
        effects=effects,
        effects_at={share: of for share, of in at.items() if of},
        counterfactual={name: {k: v for k, v in one.items() if k != "lds"} for name, one in found.items()},
        against_default=against(DEFAULT, beyond, changes, groups),
        against_margin=against("Margin", beyond, changes, groups) if "Margin" in beyond else None,
        lds={name: one["lds"] for name, one in found.items()} | {"ceiling": half_top},
        cost=cost,
        advised=list(
            decisions(
                scores.config["name"],
                (HERE / about["scores"]).parent,
                experiments,
                trait,
                kept[f"{DEFAULT}, LoRA, SOURCE"],
            )
        ),
        runs={
            name: {k: one.card.settings[k] for k in ("query_before", "query_after", "by_log_rate")}
            for name, one in kept.items()
            if "query_after" in one.card.settings
        },
        points=dict(
            measured=measured.tolist(),
            left_out=pool["n"].tolist(),
            group=groups.tolist(),
            foretold={name: [float(f"{x:.5g}") for x in one] for name, one in sums.items()},
        ),
    )


ORACLES = "Judge", "Labels", "Training", "Number", "Random"
PART = ", seed "  # in the name of what only counts as part of a mean
ENOUGH = 8  # groups of related sets, for a data set to have a say


def large(reports):
    "The data sets with enough groups of related retrainings."
    return {set_: one for set_, one in reports.items() if one["groups"] >= ENOUGH}


def reason(reports):
    "Variants that are ahead of the default on every set, surely, and in words why the default is what it is."
    told = large(reports)
    whole = lambda one: [name for name in one["counterfactual"] if PART not in name]
    names = {name for one in told.values() for name in whole(one) if name.startswith(DEFAULT)}
    names = sorted(n for n in names - {DEFAULT} if all(n in one["counterfactual"] for one in told.values()))
    ahead = {name: [one["against_default"][name]["r2"] for one in told.values()] for name in names}
    surely = [name for name, one in ahead.items() if all(x["low"] > 0 for x in one)]
    higher = [name for name, one in ahead.items() if all(x["mean"] > 0 for x in one)]
    best = {
        set_: max(
            (name for name in whole(one) if not name.startswith(ORACLES)),
            key=lambda name: one["counterfactual"][name]["r2_partial"],
        )
        for set_, one in told.items()
    }
    sets = f"on all {len(told)} sets with {ENOUGH} or more groups of related retrainings ({', '.join(told)})"
    words = (
        f"{len(names)} variants of {DEFAULT} were scored {sets}. Higher in partial R² on each: "
        f"{', '.join(higher) or 'none'}; higher on each by more than chance (95 %, groups drawn again): "
        f"{', '.join(surely) or 'none, so the shipped form stays'}. "
        "Highest of everything that needs no judge: "
        + ", ".join(f"{name} on {set_}" for set_, name in best.items())
    )
    return surely, words


def side_by_side(reports):
    "Each variant's figures as means over the larger sets that it was scored on, the best first."
    rows = {}
    for told in large(reports).values():
        for name, one in told["counterfactual"].items():
            figures = one | dict(lds=told["lds"][name], cost=told["cost"].get(name))
            for key, value in figures.items():
                if key not in ("slope", "residual") and value is not None:  # those are in units of a set
                    rows.setdefault(name, {}).setdefault(key, []).append(value)
    means = {
        name: dict(sets=len(row["r2"])) | {key: float(np.mean(of)) for key, of in row.items()}
        for name, row in rows.items()
    }
    return dict(sorted(means.items(), key=lambda item: (-item[1]["sets"], -item[1]["r2_partial"])))


def zero_of(name):
    "What zero means for the scores that `paper.py` kept."
    gradient = ("Influence", "Gradient", "Grad", "Residual Change")
    return "gradient" if any(word in name for word in gradient) else "not recorded"


def effects_by_method(experiments, trait, dropped):
    "Change of the trait against random removal of as many where a method's highest share is dropped; labels."
    found, labels = {}, None
    for one in experiments:
        rows = json.loads(one.summary().to_json(orient="records")) if hasattr(one, "summary") else []
        for row in (row for row in rows if row.get("judge") == trait):
            if row["arm"] == "subset" and str(row["method"]).startswith("without"):
                labels = larger(labels, labels_row(row))
            share = dict({"drop-most": row["fraction"]}, **{"keep-least": 1 - (row["fraction"] or 0)}).get(
                row["arm"]
            )
            known = found.get(row["method"])
            if share == dropped and row["from_random"] is not None:
                if known is None or row["seeds"] >= known["seeds"]:
                    change = dict(mean=row["from_random"], half=row["from_random ±"])
                    found[row["method"]] = change | dict(seeds=row["seeds"])
    return labels, found


def labels_row(row):
    "Change by leaving out what is labelled: against random removal of as many examples where there was such."
    random = row["from_random"] is not None
    name = "from_random" if random else "from_full"
    mean, half = row[name], row[f"{name} ±"]
    errors = float(abs(mean) * t.ppf(0.975, row["seeds"] - 1) / half) if half else None
    against = "as many random examples" if random else "all data"
    return dict(mean=mean, half=half, n=row["n"], seeds=row["seeds"], standard_errors=errors, against=against)


def larger(one, other):
    "Of two rows, the one against random removal; of two such, the one with more seeds."
    rank = lambda row: (row["against"] != "all data", row["seeds"])
    return other if one is None or rank(other) >= rank(one) else one


def main():
    "Read the command line, score and report."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="?", type=Path, help="JSON list of sets; the project's if left out")
    parser.add_argument("--work", type=Path, default=Path("truth-work"), help="for models and retrainings")
    parser.add_argument("--scores", type=Path, default=RESULTS / "truth", help="where scores are kept")
    parser.add_argument("--out", type=Path, default=RESULTS / "truth.json")
    parser.add_argument("--only", nargs="+", help="names of studies to score")
    parser.add_argument(
        "--groups",
        nargs="+",
        default=["weights", "lora"],
        help="also queries, solved, seed-1 …, unrolled, segments, history, base, through-0 …, sharper",
    )
    parser.add_argument(
        "--costs", action="store_true", help="time each ranking from nothing, and one training"
    )
    parser.add_argument("--at-once", type=int, default=16, help="scorers that share one pass")
    parser.add_argument("--retrain", nargs="+", default=[], help="results to drop the highest share of")
    parser.add_argument("--shares", nargs="+", type=float, help="with --retrain: other shares than the set's")
    parser.add_argument("--halves", type=int, default=0, help="with --retrain: so many random halves besides")
    parser.add_argument("--labels", action="store_true", help="with --retrain: also without those labelled")
    parser.add_argument("--dry", action="store_true", help="with --retrain: only say how many are to come")
    parser.add_argument("--report", action="store_true", help="score nothing")
    args = parser.parse_args()
    sets = json.loads(args.sets.read_text()) if args.sets else SETS
    every = [Scores(about, args.work, args.scores, args.at_once) for about in sets]
    for scores in every:
        if args.report or (args.only and scores.config["name"] not in args.only):
            continue
        if args.retrain:
            kept, _ = scored(scores)
            chosen = {name: kept[name] for name in args.retrain}
            scores.retrain(chosen, args.shares, args.halves, args.labels, args.dry)
            continue
        if args.costs:
            print(scores.config["name"], scores.costs(), flush=True)
            continue
        for _ in scores.computed(args.groups, False):
            pass
    reports = {scores.config["name"]: report_of(scores) for scores in every}
    covered = [one["covered"] for told in large(reports).values() for one in told["counterfactual"].values()]
    covered = [share for share in covered if share is not None]
    better, why = reason(reports)
    result = dict(
        sets=reports,
        means=side_by_side(reports),
        default=DEFAULT,
        default_reason=why,
        better_on_every_set=better,
        coverage=dict(level=0.9, mean=float(np.mean(covered)), lowest=min(covered)),
        advice_right=advice_right([one for told in reports.values() for one in told["advised"]]),
        code=ct.foundation.storage.code_version(),
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
    )
    with atomic_file(args.out) as part:
        part.write_text(json.dumps(result, indent=1))
    for name, told in reports.items():
        print(f"\n{name}: {told['sets_left_out']} sets in {told['groups']} groups, {told['runs']}")
        print(pd.DataFrame(told["counterfactual"]).T.assign(lds=told["lds"]).to_string(float_format="%.3g"))
    print("\nmeans over the larger sets")
    print(pd.DataFrame(result["means"]).T.to_string(float_format="%.3g"))
    print(f"{why}\nwrote {args.out}")


if __name__ == "__main__":
    main()
