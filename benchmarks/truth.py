"""Do scores foretell what a retraining does? Every variant of a method on retrainings that exist already.

    python benchmarks/truth.py --work build/truth                 # score what is not scored yet, and report
    python benchmarks/truth.py --work build/truth --report        # only the report
    python benchmarks/truth.py my-sets.json --work build/truth    # other sets

A **pool** is the retrainings of one data set: `paper.py` and `groups.py` have left hundreds of them behind,
each with the rows it was trained on and a judge's verdict. One pool serves all variants, since a variant only
has to score the examples once: the sum of its scores over what was left out is laid against the change that
was measured. Only new scores are computed here; those that `paper.py` kept are read.

The file of sets is a JSON list of `SETS` below: the study's YAML for `paper.py` (model, data, recipe, judges,
seeds), the packed retrainings of it, the scores that are there, and the share that filters drop. A larger
study is a longer file: write a YAML for each set with the seeds and draws that are wanted, let `paper.py`
retrain, and name the results here.

What would make the numbers wrong: choosing a variant by the very retrainings it is then praised with (the
screening here *is* such a choice, so it names candidates); counting seeds of one subset as subsets; comparing
the sums of scores over sets of different sizes by rank only (the size alone foretells something, and the
baseline "number left out" says how much).
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from advice import advice_right, decisions
from paper import Study, conversations, read_config

import concept_tda as ct
from concept_tda.evidence.datamodels import LinearDatamodelingScore, left_out
from concept_tda.evidence.filter_and_retrain import FilterAndRetrain
from concept_tda.foundation.storage import atomic_file
from concept_tda.influence.neighbours import AdamMoments
from concept_tda.influence.queries import ConceptQuery, ContrastQuery, LossQuery, MarginQuery
from concept_tda.influence.responses import AdamResponse, Unrolled
from concept_tda.influence.runs import TrainingInfluence
from concept_tda.influence.scorers import Influence
from concept_tda.results.attribution import Attribution
from concept_tda.results.calibration import Calibration, foretold
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
SETS = [
    dict(
        study="paper/sycophancy.yaml",
        scores="results/paper/sycophancy/sycophancy.json",
        pools=["results/paper/sycophancy/retrained.json", "results/kinds/retrained.json"],
        dropped=0.25,
    ),
    dict(
        study="paper/careless.yaml",
        scores="results/paper/careless/careless.json",
        pools=["results/paper/careless/retrained.json"],
        dropped=0.5,
    ),
]


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


def ceiling(pool):
    """Highest rank correlation with the measured changes to be expected of the true ones: τ/√(τ² + σ²), σ the
    spread between seeds of one subset and τ that of the true effects (Formulas §9)."""
    seeds = pool["seeds"].to_numpy()
    repeated = pool[seeds > 1]
    noise = float((repeated["spread"] ** 2).mean())
    signal = max(0.0, float(pool["measured"].var(ddof=1)) - float((noise / seeds).mean()))
    return (signal / (signal + float((noise / seeds).mean()))) ** 0.5


def chance(pool, n, draws=2000):
    """The R² that one in twenty random rankings reaches on a pool. It is large where the sets are few, or
    variations of a few."""
    member_SN = np.array([np.isin(np.arange(n), rows) for rows in pool["rows"]], float)
    scores_DN = np.random.default_rng(0).normal(size=(draws, n))
    sums_DS = (scores_DN - scores_DN.mean(1, keepdims=True)) @ member_SN.T
    r2 = [np.corrcoef(sums, pool["measured"])[0, 1] ** 2 for sums in sums_DS]
    return float(np.quantile(r2, 0.95))


# ---------------------------------------------------------------- what is foretold


class Scores:
    "Scores by name of one set, new ones computed in groups and kept."

    def __init__(self, about, work):
        self.about = about
        self.config = read_config(HERE / about["study"])
        self.work = Path(work) / self.config["name"]
        self.study = None

    def opened(self):
        "Model, data and judges, opened when something has to be scored."
        if self.study is None:
            self.study = Study(self.config, self.work.parent)
        return self.study

    def kept(self, group, compute):
        "Scores of a group of variants, from its file or computed."
        path = self.work / f"scores-{group}.json"
        if not path.exists():
            start, cpu = time.perf_counter(), time.process_time()
            results = compute()
            spent = dict(seconds=time.perf_counter() - start, cpu=time.process_time() - cpu)
            record = {
                name: dict(
                    scores=result.scores.tolist(),
                    card=result.card.to_dict(),
                    replicates=None if result.replicates is None else result.replicates.tolist(),
                )
                for name, result in results.items()
            }
            self.work.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as part:
                part.write_text(json.dumps(dict(group=record, spent=spent)))
        return json.loads(path.read_text())

    def tuned(self, merge):
        "The fine-tuned model of the first seed."
        study, config = self.opened(), self.config
        folder = self.work / "lora"
        told = ct.finetune(
            study.lm, study.train, folder, seed=config["seeds"][0], merge=False, **config["recipe"]
        )
        return ct.load_model(folder, merge=True) if merge else told

    def asked(self, lm):
        "Concept, answers that show it, neutral ones, and all of them."
        study, n = self.opened(), self.config["queries"]
        shows, neutral = study.positive[:n], study.negative[:n]
        both = ct.load_conversations(
            [{"messages": c.messages} for part in (shows, neutral) for c in part], name="both"
        )
        return study.concept(lm), shows, neutral, both

    def in_weights(self):
        "Concept Influence in the attention weights of the merged model, one option at a time."
        study, config = self.opened(), self.config
        tuned = self.tuned(merge=True)
        concept, shows, neutral, both = self.asked(tuned)
        sample = study.train.select(
            np.sort(np.random.default_rng(0).permutation(len(study.train))[: config["curvature_examples"]])
        )
        ekfac = ct.EKFAC.fit(tuned, sample, damping=config["damping"])
        judge = next(iter(study.judges.values()))
        on = lambda name, queries, **more: ct.ConceptInfluence(
            tuned, concept, queries, **{"curvature": ekfac, "method": name} | more
        )
        scorers = [
            on("Concept Influence, query parts", shows, query_parts=5),
            on("Concept Influence, neutral queries", neutral),
            on("Concept Influence, both kinds", both),
            on("Concept Influence, prompts alone", shows, pooling="prompt_last"),
            on("Concept Influence, without the first token", shows, first_token=False),
            on("Concept Influence, identity", shows, curvature="identity"),
            on("Concept Influence, norm", shows, normalise="gradient"),
            ct.InfluenceFunction(tuned, shows, neutral=neutral, curvature=ekfac, method="Margin"),
            Influence(tuned, MarginQuery(judge), curvature=ekfac, method="Judge's margin"),
        ]
        found = ct.score_together(scorers, study.train)
        contrast = found["Concept Influence, query parts"], found["Concept Influence, neutral queries"]
        found["Concept Influence, contrast"] = Attribution(  # linear: no pass is needed
            study.train, contrast[0].scores - contrast[1].scores, contrast[0].card
        )
        return found

    def in_lora(self):
        "In the parameters that were trained, by responses that know the run."
        study, folder = self.opened(), self.work / "lora"
        tuned = self.tuned(merge=False)
        concept, shows, neutral, _ = self.asked(tuned)
        batch_size, n = self.config["recipe"]["batch_size"], self.config["curvature_examples"]
        moments = AdamMoments.estimate(tuned, study.train, "lora", batch_size=batch_size)
        ekfac = ct.EKFAC.fit(tuned, study.train[:n], "lora", damping=self.config["damping"])
        squares = [v / (1 - 0.999**moments.step) for v in moments.second.values()]
        size = float(sum(v.sum() for v in squares) / sum(v.numel() for v in squares)) ** 0.5
        adam, less = AdamResponse(moments, folder), AdamResponse(moments, folder, agreement=False)
        unrolled = Unrolled(ekfac, folder, gradient_size=size)
        judge = next(iter(study.judges.values()))
        queries = {
            "Concept Influence": ConceptQuery(concept, shows),
            "Concept Influence, neutral queries": ConceptQuery(concept, neutral),
            "Margin": ContrastQuery(LossQuery(shows), LossQuery(neutral)),
            "Judge's margin": MarginQuery(judge),
        }
        curvatures = {"Adam": adam, "Adam without agreement": less, "unrolled": unrolled}
        curvatures["identity"] = "identity"
        scorers = [
            Influence(tuned, query, sites="lora", curvature=curvature, method=f"{name}, LoRA, {metric}")
            for name, query in queries.items()
            for metric, curvature in curvatures.items()
        ]
        return ct.score_together(scorers, study.train)

    def through(self, seed):
        "The exact derivative of the judge's margin through the whole run."
        study = self.opened()
        judge = next(iter(study.judges.values()))
        scorer = TrainingInfluence(study.lm, MarginQuery(judge), seed=seed, **self.config["recipe"])
        return {f"Training Influence, seed {seed}": scorer.score(study.train)}

    def computed(self, groups, only_kept):
        "All groups by name, or those that are there."
        jobs = {"weights": self.in_weights, "lora": self.in_lora}
        jobs |= {f"through-{seed}": (lambda seed=seed: self.through(seed)) for seed in self.config["seeds"]}
        for group in groups:
            if only_kept and not (self.work / f"scores-{group}.json").exists():
                continue
            yield group, self.kept(group, jobs[group])


# ---------------------------------------------------------------- the report


def as_result(train, scores, card=None):
    "An attribution of scores from a file."
    return Attribution(train, scores, QueryCard.from_dict(card) if isinstance(card, dict) else card)


def verdict(result, labels, pool, halves):
    "What a variant's scores are worth on a pool."
    sums = np.array([foretold(result, rows) for rows in pool["rows"]])
    line = Calibration.fit(sums, pool["measured"].to_numpy())
    half = np.array([-foretold(result, np.setdiff1d(np.arange(len(result)), rows)) for rows, _ in halves])
    whole = np.array([value for _, value in halves])
    found = dict(
        r2=line.r2,
        slope=line.slope,
        rank=spearman(sums, pool["measured"]),
        lds=spearman(-half, whole) if len(halves) else None,
        auroc=result.detection(labels)["AUROC"].iloc[0],
        residual=line.residual,
        covered=cover(sums, pool["measured"].to_numpy()),
    )
    if result.card.effect is not None:
        error = pool["measured"].to_numpy() - sums
        found["r2_uncalibrated"] = float(1 - (error**2).sum() / pool["measured"].var(ddof=0) / len(error))
    return found


def cover(sums, measured, level=0.9):
    "How often the interval of a calibration on the other sets holds a set's change: leave one out."
    inside = []
    for left in range(len(sums)):
        others = np.arange(len(sums)) != left
        _, low, high = Calibration.fit(sums[others], measured[others]).interval(sums[left], level)
        inside.append(low < measured[left] < high)
    return float(np.mean(inside))


def report_of(about, work):
    "Everything about one set, from files."
    scores = Scores(about, work)
    told = json.loads((HERE / about["scores"]).read_text())
    experiments = experiments_of(about["pools"])
    trait = next(iter(scores.config["judges"]))
    pool, halves = left_out(experiments, trait), halves_of(experiments)
    data = conversations(scores.config["data"], "train")
    train = data.select([data.ids.index(id) for id in told["train_ids"]])
    labels = [label == scores.config["positive"] for label in told["labels"]]
    kept = {
        name: as_result(train, values, QueryCard(name, trait, zero=zero_of(name)))
        for name, values in told["scores"].items()
    }
    seconds = {row["method"]: row.get("seconds") for row in told["methods"]}
    groups = ["weights", "lora", *[f"through-{seed}" for seed in scores.config["seeds"]]]
    for group, record in scores.computed(groups, True):
        for name, one in record["group"].items():
            kept[name] = as_result(train, one["scores"], one["card"])
            seconds[name] = record["spent"]["cpu"] / len(record["group"])
    plain = {"Labels": np.array(labels, float), "Number left out": 1 + 1e-9 * np.arange(len(train))}
    for name, values in plain.items():
        kept[name] = as_result(train, values, QueryCard(name, trait, zero="gradient"))
    found = {name: verdict(result, labels, pool, halves) for name, result in kept.items()}
    labels_effect, effects = effects_by_method(experiments, trait, about["dropped"])
    return dict(
        labels_effect=labels_effect,
        dropped=about["dropped"],
        n=len(train),
        sets_left_out=len(pool),
        halves=len(halves),
        noise=float((pool[pool["seeds"] > 1]["spread"] ** 2).mean() ** 0.5),
        ceiling=ceiling(pool),
        chance=chance(pool, len(train)),
        effects=effects,
        counterfactual={name: {k: v for k, v in one.items() if k != "lds"} for name, one in found.items()},
        lds={name: one["lds"] for name, one in found.items()} | {"ceiling": ceiling(pool)},
        seconds=seconds,
        advised=list(decisions(scores.config["name"], (HERE / about["scores"]).parent, experiments, trait)),
        points=dict(
            measured=pool["measured"].tolist(),
            left_out=pool["n"].tolist(),
            foretold={name: [foretold(kept[name], rows) for rows in pool["rows"]] for name in kept},
        ),
    )


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
                labels = dict(mean=row["from_full"], half=row["from_full ±"], n=row["n"], against="all data")
            share = dict({"drop-most": row["fraction"]}, **{"keep-least": 1 - (row["fraction"] or 0)}).get(
                row["arm"]
            )
            if share == dropped and row["from_random"] is not None:
                found[row["method"]] = dict(mean=row["from_random"], half=row["from_random ±"])
    return labels, found


def main():
    "Read the command line, score and report."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sets", nargs="?", type=Path, help="JSON list of sets; the project's if left out")
    parser.add_argument("--work", type=Path, default=Path("truth-work"), help="for scores and models")
    parser.add_argument("--out", type=Path, default=RESULTS / "truth.json")
    parser.add_argument("--only", nargs="+", help="names of studies to score")
    parser.add_argument("--groups", nargs="+", default=["weights", "lora"], help="also through-0 …")
    parser.add_argument("--report", action="store_true", help="score nothing")
    args = parser.parse_args()
    sets = json.loads(args.sets.read_text()) if args.sets else SETS
    for about in sets:
        scores = Scores(about, args.work)
        if args.report or (args.only and scores.config["name"] not in args.only):
            continue
        for group, _ in scores.computed(args.groups, False):
            print(scores.config["name"], group, "scored", flush=True)
    reports = {Scores(about, args.work).config["name"]: report_of(about, args.work) for about in sets}
    covered = [one["covered"] for told in reports.values() for one in told["counterfactual"].values()]
    result = dict(
        sets=reports,
        default="Concept Influence",
        coverage=dict(level=0.9, mean=float(np.mean(covered)), lowest=min(covered)),
        advice_right=advice_right([one for told in reports.values() for one in told["advised"]]),
        code=ct.foundation.storage.code_version(),
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
    )
    with atomic_file(args.out) as part:
        part.write_text(json.dumps(result, indent=1))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
