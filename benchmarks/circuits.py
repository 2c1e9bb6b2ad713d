"""Who built the induction head? Two layers, sequences of which half repeat (Formulas §13); several seeds.

    python benchmarks/circuits.py --folder build/circuits --seeds 0 1 2 3 4 5    # five minutes a seed

For each seed: a recorded training; the influence of every example of a window of steps on copying, at the
checkpoint before it and so before the jump; how well that tells the known repeats apart, beside plainer
means and harder negatives; and the window trained again without the top, with twice of it, or with new
repeats added, each beside a random control. Writes benchmarks/results/circuits.json. Trainings and replays
stay in the folder, an interrupted call goes on, and several calls with different seeds may share it.

What would make its numbers wrong: a threshold that a head without a function reaches (the one-layer control
is there to show); a scoring checkpoint at which the head already exists (`induction_at_scoring`); settings
chosen on the seeds that are reported (they were chosen on seeds 100 and 101, which are not). Models of the
hub, such as EleutherAI/pythia-14m, and real text are the business of documents.py (--model)."""

import argparse
import json
import os
import platform
import warnings
from pathlib import Path

import numpy as np
import psutil
import torch
from repeats import LENGTH, bigram, config, mixture, repeat, windows
from sklearn.metrics import roc_auc_score

from concept_tda.data.documents import token_windows
from concept_tda.evidence.statistics import t_interval
from concept_tda.foundation.storage import atomic_file, code_version
from concept_tda.influence.baselines import MeanLoss, RandomScore
from concept_tda.influence.neighbours import GradCos
from concept_tda.influence.scorers import score_together
from concept_tda.mechanisms.circuits import (
    CopyProbe,
    CustomProbe,
    InductionProbe,
    UnitEKFAC,
    UnitInfluence,
    head,
    head_scores,
    heads,
    repeated_sequences,
)
from concept_tda.mechanisms.emergence import EmergenceExperiment
from concept_tda.mechanisms.tails import shared_tops, tail_curve
from concept_tda.model.training import TrainingRecipe, train
from concept_tda.results.attribution import Attribution
from concept_tda.results.cards import QueryCard

N = 12_800  # sequences
WINDOW, END, THRESHOLD, EVERY = (250, 450), 600, 0.4, 5
FRACTION, LARGER, EARLIER = 0.1, 0.3, (100, 450)
FITTED, PROBES, LOOKED_AT = 1500, 256, (200, 250, 300, 350)


def shuffled(random):
    """Tokens that come again as often as in a repeat, each time in another order: nothing can be copied."""
    row, period = repeat(random)
    cycles = [random.permutation(row[:period]) for _ in range(LENGTH // period + 1)]
    return np.concatenate(cycles)[:LENGTH]


def fresh_repeats(n, seed):
    """Repeats that nothing was trained on."""
    random = np.random.default_rng(seed)
    rows, periods = zip(*(repeat(random) for _ in range(n)))
    return windows(rows, [{"kind": "repeat", "period": period} for period in periods], "fresh repeats")


def fresh_bigrams(n, seed):
    """Bigram text that nothing was trained on."""
    random = np.random.default_rng(seed)
    return windows([bigram(random) for _ in range(n)], [{"kind": "bigram"}] * n, "fresh bigrams")


def harder(n, seed):
    """Fresh repeats, and sequences whose tokens come again as often but in no order."""
    random = np.random.default_rng(seed)
    rows = [repeat(random)[0] for _ in range(n)] + [shuffled(random) for _ in range(n)]
    kinds = [{"kind": "repeat"}] * n + [{"kind": "shuffled"}] * n
    return windows(rows, kinds, "repeats and shuffled repeats")


def trained(seed, layers, data, folder):
    """The recorded run."""
    recipe = TrainingRecipe(
        steps=END, batch_size=64, learning_rate=3e-3, warmup_steps=100, schedule="constant", seed=seed
    )
    return train(config(layers), data, folder / f"run-{seed}-{layers}", recipe, every=50, progress=False)


def wrong_targets(probe_data):
    """Log-probability of the token after the right one: a token of the cycle, but not the one to copy."""
    periods = [window.metadata["period"] for window in probe_data]

    def function(logits_BTV, batch):
        values = []
        for logits_TV, ids_T, row in zip(logits_BTV, batch.input_ids, batch.rows.tolist()):
            places = torch.arange(periods[row], LENGTH)
            targets = ids_T[places + 2 - periods[row]]
            values.append(logits_TV[places].log_softmax(-1).gather(1, targets[:, None]).mean())
        return torch.stack(values)

    return CustomProbe(probe_data, function, "a wrong token of the cycle", reads="logits", version="1")


def is_repeat(result):
    """Which examples of a result are known repeats."""
    return np.array([window.metadata["kind"] == "repeat" for window in result.conversations])


def auc(result):
    """Area under the curve of the repeats; ties count half."""
    return float(roc_auc_score(is_repeat(result), result.scores))


def all_units(lm):
    """Every unit of every head."""
    return [unit for one in heads(lm) for unit in one.units]


def scored(lm, chosen, probe, curvature=None):
    """Influence on a probe through all heads."""
    if curvature is None:
        fitted = chosen.select(np.arange(min(FITTED, len(chosen))))
        curvature = UnitEKFAC.fit(lm, fitted, all_units(lm), progress=False, cache=False)
    scorer = UnitInfluence(lm, probe, all_units(lm), curvature=curvature)
    return scorer.score(chosen, progress=False, token_budget=8192)


def detection(run, chosen, loops, found_head):
    """How well repeats are told apart: over checkpoints, and at the window's start by other means."""
    probe, wrong = CopyProbe(fresh_repeats(PROBES, 5)), wrong_targets(fresh_repeats(PROBES, 5))
    hard, over_steps = run.lm.tokenize(harder(400, 6)), {}
    for step in LOOKED_AT:
        lm = run.open(step, attention="eager")
        curvature = UnitEKFAC.fit(lm, chosen, all_units(lm), progress=False, cache=False)
        over_steps[step] = {
            "induction": float(head_scores(lm, loops).max()),
            "bigrams": auc(scored(lm, chosen, probe, curvature)),
            "shuffled": auc(scored(lm, hard, probe, curvature)),
            "shuffled, wrong target": auc(scored(lm, hard, wrong, curvature)),
            "shuffled, loss": auc(MeanLoss(lm).score(hard, progress=False)),
        }
    lm = run.open(WINDOW[0], attention="eager")
    curvature = UnitEKFAC.fit(lm, chosen, all_units(lm), progress=False, cache=False)
    one_period = repeated_sequences(lm, 32, LENGTH // 2, seed=1)
    many = repeated_sequences(lm, PROBES, LENGTH // 2, seed=1)
    induction = InductionProbe(*found_head, fresh_repeats(PROBES, 5))
    qk = UnitInfluence(lm, probe, [head(lm, *found_head).qk], curvature="ekfac")
    others = {
        "wrong target": scored(lm, chosen, wrong, curvature),
        "one period, 32 sequences": scored(lm, chosen, CopyProbe(one_period), curvature),
        "one period": scored(lm, chosen, CopyProbe(many), curvature),
        "induction attention": scored(lm, chosen, induction, curvature),
        "QK of the later induction head": qk.score(chosen, progress=False),
        "no curvature": UnitInfluence(lm, probe, all_units(lm), curvature="identity").score(
            chosen, progress=False
        ),
        "gradient cosine": GradCos(lm, probe, sites=all_units(lm)).score(chosen, progress=False),
        "loss": MeanLoss(lm).score(chosen, progress=False),
        "random": score_together([RandomScore(0)], chosen, lm=lm, progress=False)["Random"],
    }
    return {"over_steps": over_steps, "others": {name: auc(one) for name, one in others.items()}}


def by_head(run, chosen):
    """Scores of each head's own units, [heads, N]."""
    lm = run.open(WINDOW[0], attention="eager")
    probe = CopyProbe(fresh_repeats(PROBES, 5))
    curvature = UnitEKFAC.fit(lm, chosen, all_units(lm), progress=False, cache=False)
    scorers = [UnitInfluence(lm, probe, one.units, curvature=curvature, method=str(one)) for one in heads(lm)]
    return {name: one.scores for name, one in score_together(scorers, chosen, progress=False).items()}


def given(result, scores, method):
    """The same examples with other numbers."""
    return Attribution(result.conversations, scores, QueryCard(method, "copying", zero="none"))


def replayed(seed, folder, run, result, loops):
    """Emergence, induction and ICL at the end in every arm, by name."""
    chosen = run.data.select(run.rows_between(*WINDOW))
    noise = np.random.default_rng(seed).random(len(chosen))
    any_repeats = given(result, is_repeat(result) + noise, "known repeats, in random order")
    tables = {}

    def experiment(name, scores, window=WINDOW, fraction=FRACTION, arms=None, insert=None):
        planned = EmergenceExperiment(
            folder / f"replays-{seed}-{name}",
            [run],
            [scores],
            window,
            loops,
            END,
            fraction,
            THRESHOLD,
            EVERY,
            arms,
            insert,
        )
        return planned.run(progress=False).table.set_index("arm")

    def added(n):
        return {"inserted": fresh_repeats(n, 1000 + seed), "random_inserted": fresh_bigrams(n, 2000 + seed)}

    few, more = (round(fraction * len(chosen)) for fraction in (FRACTION, LARGER))
    both = ("inserted", "random_inserted")
    tables[""] = experiment("main", result, insert=added(few))
    repeats = experiment("repeats", any_repeats, arms=("deleted",))
    tables["repeats"] = repeats.rename({"deleted": "deleted_repeats"})
    doubled = ("duplicated", "random_duplicated")
    larger = experiment("larger", result, fraction=LARGER, arms=(*doubled, *both), insert=added(more))
    tables["larger"] = larger.rename(lambda arm: f"{arm}_larger")
    n = round(more * (EARLIER[1] - EARLIER[0]) / (WINDOW[1] - WINDOW[0]))
    earlier = experiment("earlier", result, window=EARLIER, arms=both, insert=added(n))
    tables["earlier"] = earlier.rename(lambda arm: f"{arm}_earlier")
    columns = ("emergence", "induction", "icl")
    return {
        arm: {key: None if np.isnan(row[key]) else float(row[key]) for key in columns}
        for table in tables.values()
        for arm, row in table.iterrows()
    }


def data_of(run, rows):
    """Some examples of a run."""
    return run.data.select(rows)


def kept(path, make):
    """What a JSON file holds; made and written where there is none."""
    if not path.exists():
        made = make()
        with atomic_file(path) as part:
            part.write_text(json.dumps(made, indent=1))
        print(path.name, json.dumps(made), flush=True)
    return json.loads(path.read_text())


def scores_of(seed, folder, run):
    """The result of a seed, from its file where it is there."""
    path, rows = folder / f"scores-{seed}.parquet", run.rows_between(*WINDOW)
    if not path.exists():
        lm = run.open(WINDOW[0], attention="eager")
        scored(lm, data_of(run, rows), CopyProbe(fresh_repeats(PROBES, 5))).save(path)
    return Attribution.load(path)


def looked_at(seed, folder, run, loops):
    """What the scores say of one seed."""
    last = head_scores(run.open(attention="eager"), loops)
    found_head = tuple(map(int, np.unravel_index(last.argmax(), last.shape)))
    lm, result = run.open(WINDOW[0], attention="eager"), scores_of(seed, folder, run)
    repeats, some = is_repeat(result), data_of(run, run.rows_between(*WINDOW)[::12])
    top = np.argsort(-result.scores)[: round(FRACTION * len(repeats))]
    arrays = by_head(run, some)
    with atomic_file(folder / f"heads-{seed}.npz") as part, open(part, "wb") as file:
        np.savez(file, **arrays)
    return {
        "head": found_head,
        "examples": len(repeats),
        "auc": auc(result),
        "repeats_in_top": float(repeats[top].mean()),
        "repeats_in_all": float(repeats.mean()),
        "induction_at_scoring": float(head_scores(lm, loops).max()),
        "scoring_seconds": result.card.cost.seconds,
        "detection": detection(run, some, loops, found_head),
    }


def of_a_seed(seed, folder):
    """Run, scores and replays of one seed; a dict of plain numbers."""
    run = trained(seed, 2, mixture(N, seed), folder)
    loops = repeated_sequences(run.lm, 32, LENGTH // 2, seed=1)
    found = kept(folder / f"looked-{seed}.json", lambda: looked_at(seed, folder, run, loops))
    result = scores_of(seed, folder, run)
    found["arms"] = kept(folder / f"arms-{seed}.json", lambda: replayed(seed, folder, run, result, loops))

    def one_layer():
        single = trained(seed, 1, run.data.conversations, folder)
        return float(head_scores(single.open(attention="eager"), loops).max())

    found["one_layer"] = kept(folder / f"one-layer-{seed}.json", one_layer)
    return found | {"seed": seed, "training_seconds": float(run.steps.seconds.sum())}


def machine():
    """Where this ran."""
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": None,
        "torch": torch.__version__,
        "concept_tda": code_version(),
        "load_average": [round(one, 2) for one in os.getloadavg()],
    }


def interval(values):
    """Mean and half of its 95 % interval; how many had no value."""
    mean, half, n = t_interval(np.array([np.nan if one is None else one for one in values], float))
    return {"mean": mean, "half": half, "seeds": n, "never": len(values) - n}


def compared(seeds):
    """Delays of every arm, and of each against its control: paired differences, and two of its deviations."""
    steps = {arm: [one["arms"][arm]["emergence"] for one in seeds] for arm in seeds[0]["arms"]}

    def later(arm, than):
        pairs = zip(steps[arm], steps[than])
        return [None if None in pair else pair[0] - pair[1] for pair in pairs]

    delays = {arm: interval(later(arm, "full")) for arm in steps if arm != "full"}
    controls = {arm: f"random_{arm}" for arm in steps if f"random_{arm}" in steps}
    against = {}
    for arm, control in controls.items():
        spread = np.nanstd(np.array(later(control, "full"), float), ddof=1)
        gap = delays[arm]["mean"] - delays[control]["mean"]
        paired = interval(later(arm, control))
        against[arm] = {
            "control": control,
            "paired": paired,
            "two_sd_of_control": 2 * spread,
            "beyond": bool(abs(gap) > 2 * spread),
        }
    against["deleted and any repeats"] = {
        "control": "deleted_repeats",
        "paired": interval(later("deleted", "deleted_repeats")),
    }
    return steps, delays, against


def tails(seeds, folder):
    """Shares of the top on either side of zero beside a bell curve, and which tops heads share."""
    shares, pairs, later_head = {}, [], []
    for one in seeds:
        result = Attribution.load(folder / f"scores-{one['seed']}.parquet")
        curve = tail_curve(result, (0.01, 0.05, 0.1, 0.25)).set_index("fraction")
        for side in curve:
            shares.setdefault(side, []).append({str(at): share for at, share in curve[side].items()})
        with np.load(folder / f"heads-{one['seed']}.npz") as arrays:
            scores = {name: arrays[name] for name in arrays.files}
        rows = next(iter(scores.values())).size
        sample = token_windows([torch.tensor([row // 1000, row % 1000]) for row in range(rows)])
        card = QueryCard("one head", "copying", zero="none")
        shared = shared_tops({name: Attribution(sample, values, card) for name, values in scores.items()})
        found = "head {}.{}".format(*one["head"])
        shared["blocks"] = [
            "-".join(sorted(name.split()[1][0] for name in pair))
            for pair in zip(shared["first"], shared["second"])
        ]
        pairs.append(shared)
        mine = shared[(shared["first"] == found) | (shared["second"] == found)]
        later_head.append(mine["Jaccard"].mean())
    columns = ["Jaccard", "Jaccard by chance", "z", "Spearman"]
    by_blocks = {
        blocks: {name: [float(one[one.blocks == blocks][name].mean()) for one in pairs] for name in columns}
        for blocks in ("0-0", "0-1", "1-1")
    }
    return shares, {"by_blocks": by_blocks, "with_the_later_head": {"Jaccard": later_head}}


def gathered(seeds, folder):
    """The figures of all seeds, a list with a number for each."""
    steps, delays, against = compared(seeds)
    shares, shared = tails(seeds, folder)
    looks = [one["detection"] for one in seeds]
    at_the_end = {
        what: {arm: [one["arms"][arm][what] for one in seeds] for arm in steps}
        for what in ("induction", "icl")
    }
    return {
        "seeds": [one["seed"] for one in seeds],
        "auc_repeats": [one["auc"] for one in seeds],
        "auc_repeats_interval": interval([one["auc"] for one in seeds]),
        "auc_over_steps": {
            step: {
                name: [look["over_steps"][step][name] for look in looks]
                for name in looks[0]["over_steps"][step]
            }
            for step in looks[0]["over_steps"]
        },
        "auc_by_other_means": {name: [look["others"][name] for look in looks] for name in looks[0]["others"]},
        "repeats_in_top": [one["repeats_in_top"] for one in seeds],
        "repeats_in_all": [one["repeats_in_all"] for one in seeds],
        "induction_at_scoring": [one["induction_at_scoring"] for one in seeds],
        "head": [one["head"] for one in seeds],
        "emergence": steps,
        "delays": delays,
        "against_control": against,
        "induction_at_end": at_the_end["induction"],
        "icl_at_end": at_the_end["icl"],
        "top10_share": [one["0.1"] for one in shares["raising"]],
        "share_of_top": shares,
        "shared_tops": shared,
        "one_layer_control": {"induction": [one["one_layer"] for one in seeds]},
        "settings": {
            "window": WINDOW,
            "earlier_window": EARLIER,
            "steps": END,
            "fraction": FRACTION,
            "larger_fraction": LARGER,
            "threshold": THRESHOLD,
            "measured_every": EVERY,
            "examples": N,
            "curvature_examples": FITTED,
            "probe_sequences": PROBES,
        },
        "examples_in_window": [one["examples"] for one in seeds],
        "seconds": {
            "training": [one["training_seconds"] for one in seeds],
            "scoring": [one["scoring_seconds"] for one in seeds],
        },
        "machine": machine(),
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--folder", type=Path, required=True, help="of trainings, replays and single seeds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "circuits.json")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    seeds = [of_a_seed(seed, asked.folder) for seed in asked.seeds]
    asked.out.write_text(json.dumps(gathered(seeds, asked.folder), indent=1) + "\n")
