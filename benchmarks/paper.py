"""The Concept Influence paper's experiments in small, on any model, data and trait, from one YAML file.

    python benchmarks/paper.py benchmarks/paper/sycophancy.yaml --workers 2
    python benchmarks/paper.py my-study.yaml --only filter        # one of the experiments
    python benchmarks/paper.py my-study.yaml --report             # JSON and figures from what is finished

The model is fine-tuned on all the data; a concept is made in the fine-tuned model; every method scores the
training examples; then models are trained again without what the methods point at, and judged. Everything can
be killed and started again: nothing that is finished is computed twice, and several workers share one folder.

What would make the numbers wrong: judging a model with the texts it was trained on; choosing concept, layer
or recipe by the judge's verdict; reading one seed. The YAML's keys are those of `DEFAULTS` below, each with
its comment.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml

import concept_tda as ct
from concept_tda.influence.neighbours import ResidualChange

RESIDUAL = {"Residual Change": "across_tokens", "Residual Change, within tokens": "within_token"}
DEFAULTS = dict(
    model="smollm2-135m-instruct",  # anything load_model opens
    device=None,  # None: a GPU if there is one
    dtype="float32",  # of the model when scoring and judging
    data="sycophancy",  # a bundled data set, or a folder with train.jsonl, heldout.jsonl, the judges' files
    column="label",  # metadata column of the labels
    positive="sycophantic",  # label of the examples that show the behaviour
    negative="honest",  # label of their counterparts
    take=None,  # {label: so many of the first examples}; None trains on the whole file
    layer=20,  # of the concept
    concept="contrastive",  # from the held-out examples; or the name or file of a trait for a persona vector
    queries=20,  # held-out examples that show the behaviour, as queries of the influence methods
    own_answers=True,  # also score with the fine-tuned model's own answers as queries
    curvature_examples=40,  # training examples EK-FAC is fitted on, chosen at random
    damping=0.1,  # times the mean eigenvalue of each site
    recipe=dict(learning_rate=2e-4, rank=16, alpha=32, batch_size=8),  # precision="bf16" where it pays
    own_tokens=60,  # longest answer of a model, for Projection Difference and as a query
    judges={},
    seeds=[0, 1, 2],
    # name: {kind: filter | counterfactual | pareto | lds, methods: [...], and the experiment's own settings};
    # by_label: true adds trainings on the labelled examples alone and on all others, what a perfect filter
    # would leave
    experiments={},
)


def read_config(path):
    "The defaults overlaid with a YAML file; a key that does not exist is refused."
    given = yaml.safe_load(Path(path).read_text())
    if unknown := sorted(set(given) - set(DEFAULTS) - {"name"}):
        raise SystemExit(f"{path}: unknown keys {unknown}; there are {sorted(DEFAULTS)}")
    return {"name": Path(path).stem} | DEFAULTS | given


def conversations(data, file):
    "A file of a bundled data set or of a folder."
    return (
        ct.load_conversations(Path(data) / f"{file}.jsonl") if Path(data).is_dir() else ct.bundled(data, file)
    )


class Study:
    "One row of the matrix: a model fine-tuned on a data set, its scores, and the experiments on them."

    def __init__(self, config, work):
        self.config, self.work = config, Path(work) / config["name"]
        self.lm = ct.load_model(
            config["model"], device=config["device"], dtype=getattr(torch, config["dtype"])
        )
        self.train = self.chosen(conversations(config["data"], "train"))
        held_out = conversations(config["data"], "heldout")
        self.positive, self.negative = (
            held_out.select(np.flatnonzero(held_out.labels(config["column"], config[side])))
            for side in ("positive", "negative")
        )
        self.judges = {name: self.judge(name, **about) for name, about in config["judges"].items()}

    def chosen(self, train):
        "The first examples of each label, as many as `take` says, in the order of the file."
        if self.config["take"] is None:
            return train
        rows = np.concatenate(
            [
                np.flatnonzero(train.labels(self.config["column"], label))[:n]
                for label, n in self.config["take"].items()
            ]
        )
        return train.select(np.sort(rows))

    def judge(
        self, name, kind, file, data=None, trait=None, neutral=None, column=None, value=None, take=None
    ):
        "One of the library's judges, by kind, on the items of a file."
        items = conversations(data or self.config["data"], file)[:take]
        if column:
            items = items.select(np.flatnonzero(items.labels(column, value)))
        return (
            ct.ContrastJudge(items, trait=trait, neutral=neutral, name=name)
            if kind == "contrast"
            else ct.LossJudge(items, name=name)
        )

    def scores(self):
        "Attributions of the fine-tuned model by every method, scored once and kept."
        comparison = self.work / "methods"
        done = self.work / "scored.json"
        if not done.exists():
            start, config = time.perf_counter(), self.config
            tuned = ct.finetune(
                self.lm, self.train, self.work / "tuned", seed=config["seeds"][0], **config["recipe"]
            )
            base_answers = ct.model.answers.cached_generate(
                self.lm, self.train, max_new_tokens=config["own_tokens"], folder=self.work / "answers"
            )
            concept = self.concept(tuned)
            queries = self.positive[: config["queries"]]
            sample = self.train.select(
                np.sort(np.random.default_rng(0).permutation(len(self.train))[: config["curvature_examples"]])
            )
            curvature = ct.EKFAC.fit(tuned, sample, damping=config["damping"])
            influence = lambda queries, suffix: [
                ct.ConceptInfluence(
                    tuned, concept, queries, curvature=curvature, method=f"Concept Influence{suffix}"
                ),
                ct.InfluenceFunction(
                    tuned, queries, curvature=curvature, method=f"Influence Function{suffix}"
                ),
            ]
            scorers = [
                *influence(queries, ""),
                ct.VectorFilter(tuned, concept),
                ct.ActivationGradient(tuned, concept),
                ct.ProjectionDifference(tuned, concept, answers=base_answers, empty="mean"),
                *[ResidualChange(tuned, concept, form=form, method=name) for name, form in RESIDUAL.items()],
                ct.GradDot(tuned, queries),
            ]
            if config["own_answers"]:
                scorers += influence(
                    ct.generate(tuned, queries, max_new_tokens=config["own_tokens"]), ", own answers"
                )
            results = ct.score_together(scorers, self.train) | {
                "GradCos": ct.GradCos(tuned, queries).score(self.train)
            }
            study = ct.MethodComparison(
                tuned,
                self.train,
                results,
                comparison,
                labels=config["column"],
                positive=config["positive"],
                queries=queries,
                concept=concept,
            ).run()
            concept.save(self.work / "concept.safetensors", overwrite=True)
            with ct.foundation.storage.atomic_file(done) as part:
                part.write_text(
                    json.dumps(
                        dict(
                            seconds=time.perf_counter() - start,
                            concept=concept.quality,
                            own_answers=[c.text for c in results and scorers[-1].query.examples]
                            if config["own_answers"]
                            else [],
                        )
                    )
                )
            del study
        return ct.MethodComparison.from_folder(comparison)

    def concept(self, tuned):
        "The concept the methods are asked about, made in the fine-tuned model."
        if self.config["concept"] == "contrastive":
            return ct.contrastive_concept(
                tuned, self.positive, self.negative, self.config["layer"], name=self.config["positive"]
            )
        return ct.persona_concept(
            tuned, self.config["concept"], self.config["layer"], folder=self.work / "persona"
        )

    def experiment(self, name, attributions):
        "One experiment of the configuration."
        settings = dict(self.config["experiments"][name])
        kind, methods = settings.pop("kind"), settings.pop("methods", None)
        chosen = {method: attributions[method] for method in methods or attributions}
        judges = {judge: self.judges[judge] for judge in settings.pop("judges", self.judges)}
        shared = dict(recipe=self.config["recipe"], seeds=self.config["seeds"]) | settings
        folder, shared["name"] = (
            self.work / "retrained",
            name,
        )  # one folder for all of them: a training that two experiments need is done once
        if shared.pop("by_label", False):
            shown = self.train.labels(self.config["column"], self.config["positive"])
            shared["subsets"] = {
                f"only {self.config['positive']}": shown,
                f"without {self.config['positive']}": ~shown,
            }
        if kind == "pareto":
            trait, capability = judges.values()
            return ct.ParetoCurve(self.lm, self.train, chosen, trait, capability, folder, **shared)
        return {
            "filter": ct.FilterAndRetrain,
            "counterfactual": ct.CounterfactualPrediction,
            "lds": ct.LinearDatamodelingScore,
        }[kind](self.lm, self.train, chosen, judges, folder, **shared)

    def run(self, only, progress):
        "Run all experiments, or only those named."
        attributions = self.scores().attributions
        for name in self.config["experiments"]:
            if only and name not in only:
                continue
            self.experiment(name, attributions).run(progress=progress)


def records(table):
    "A table as plain rows for JSON."
    return json.loads(table.to_json(orient="records"))


def report(study, out):
    """One JSON with every table, a figure for each experiment, and the two packed files that `from_folder`
    reads."""
    out.mkdir(parents=True, exist_ok=True)
    comparison = study.scores()
    attributions = comparison.attributions
    result = dict(
        config=study.config,
        code=ct.foundation.storage.code_version(),
        date=time.strftime("%Y-%m-%d"),
        torch=torch.__version__,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        cores=os.cpu_count(),
        n_train=len(study.train),
        train_ids=study.train.ids,
        labels=[c.metadata[study.config["column"]] for c in study.train],
        scoring=json.loads((study.work / "scored.json").read_text()),
        methods=records(comparison.table.reset_index(names="method")),
        spearman=json.loads(comparison.comparison().spearman.to_json()),
        scores={name: result.scores.tolist() for name, result in attributions.items()},
        experiments={},
    )
    comparison.pack(out / "methods.parquet", overwrite=True)
    comparison.plot().savefig(out / "methods.png", dpi=110)
    for name in study.config["experiments"]:
        experiment = study.experiment(name, attributions)
        if not (study.work / "retrained" / f"{name}.json").exists():
            continue
        experiment.pack(out / "retrained.json", overwrite=True)  # all experiments of the folder
        trainings = [
            experiment.training(cell) for cell in sorted({entry["cell"] for entry in experiment.entries})
        ]
        about = dict(
            kind=experiment.kind,
            remaining=experiment.remaining,
            table=records(experiment.table),
            seconds=sum(training["seconds"] for training in trainings if training),
        )
        if hasattr(experiment, "summary"):
            about["summary"] = records(experiment.summary())
        if hasattr(experiment, "points"):
            about["points"] = records(experiment.points)
        if hasattr(experiment, "curve"):
            about["curve"] = records(experiment.curve())
        result["experiments"][name] = about
        if about["table"]:
            experiment.plot().savefig(out / f"{name}.png", dpi=110)
    with ct.foundation.storage.atomic_file(out / f"{study.config['name']}.json") as part:
        part.write_text(json.dumps(result, indent=1, default=str))
    print(f"wrote {out}")


def main():
    "Read the command line, run the study and write its report."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--work", type=Path, default=Path("paper-work"), help="where models and cells are kept while it runs"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="folder of JSON and figures (default: benchmarks/results/paper/NAME)",
    )
    parser.add_argument("--only", nargs="+", help="names of experiments")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that retrain side by side; each gets its share of the cores, or of OMP_NUM_THREADS",
    )
    parser.add_argument(
        "--report", action="store_true", help="only write JSON and figures from what is finished"
    )
    args = parser.parse_args()
    study = Study(read_config(args.config), args.work)
    if not args.report:
        study.scores()
        cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        threads = str(max(1, cores // args.workers))
        command = [
            sys.executable,
            __file__,
            str(args.config),
            "--work",
            str(args.work),
            *(["--only", *args.only] if args.only else []),
        ]
        helpers = [
            subprocess.Popen(
                command + ["--workers", "1"], env=os.environ | dict(OMP_NUM_THREADS=threads, PAPER_WORKER="1")
            )
            for _ in range(args.workers - 1)
        ]
        torch.set_num_threads(int(threads))
        study.run(args.only, progress=True)
        for helper in helpers:
            helper.wait()
    if not os.environ.get("PAPER_WORKER"):
        report(study, args.out or Path(__file__).parent / "results" / "paper" / study.config["name"])


if __name__ == "__main__":
    main()
