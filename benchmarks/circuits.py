"""Who built the induction head? Two layers, sequences of which half repeat (Formulas §13); several seeds.

    python benchmarks/circuits.py --seeds 5 --folder /tmp/circuits    # minutes a seed, on one core

Writes benchmarks/results/circuits.json. Runs and replays stay in the folder; an interrupted call goes on."""

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from transformers import GPT2Config

from concept_tda.data.documents import token_windows
from concept_tda.mechanisms.circuits import (
    CopyProbe,
    UnitEKFAC,
    UnitInfluence,
    head_scores,
    heads,
    repeated_sequences,
)
from concept_tda.mechanisms.emergence import EmergenceExperiment
from concept_tda.model.training import TrainingRecipe, train

VOCABULARY, LENGTH, N = 64, 32, 12800
WINDOW, END, FRACTION, THRESHOLD, FITTED = (250, 450), 700, 0.1, 0.4, 1500


def mixture(seed):
    """Half repeats of distinct tokens with a random period of 4 to 16, half text of a sparse bigram table."""
    random, follow = (
        np.random.default_rng(seed),
        np.random.default_rng(123).integers(0, VOCABULARY, (VOCABULARY, 4)),
    )
    rows, known = [], []
    for _ in range(N):
        if random.random() < 0.5:
            period = int(random.integers(4, 17))
            rows.append(np.resize(random.choice(VOCABULARY, period, replace=False), LENGTH))
            known.append({"kind": "repeat", "period": period})
            continue
        row = [int(random.integers(VOCABULARY))]
        while len(row) < LENGTH:
            row.append(int(follow[row[-1], random.integers(4)]))
        rows.append(np.array(row))
        known.append({"kind": "bigram"})
    return token_windows([torch.from_numpy(row) for row in rows], metadata=known, name="repeats and bigrams")


def trained(seed, layers, data, folder):
    """The recorded run."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=layers,
        n_head=4,
        n_inner=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    recipe = TrainingRecipe(
        steps=END, batch_size=64, learning_rate=3e-3, warmup_steps=100, schedule="constant", seed=seed
    )
    return train(config, data, folder / f"run-{seed}-{layers}", recipe, every=50, progress=False)


def scored(run, data, loops):
    """Influence on copying through all heads, of every example of the window, at the checkpoint before it."""
    lm = run.open(WINDOW[0], attention="eager")
    chosen = data.select(run.rows_between(*WINDOW))
    units = [unit for head in heads(lm) for unit in head.units]
    curvature = UnitEKFAC.fit(lm, chosen.select(np.arange(FITTED)), units, progress=False)
    scorer = UnitInfluence(lm, CopyProbe(loops), units, curvature=curvature)
    return scorer.score(chosen, token_budget=8192, progress=False)


def of_a_seed(seed, folder):
    """Run, score, replays of one seed; a dict of plain numbers."""
    note = folder / f"seed-{seed}.json"
    if note.exists():
        return json.loads(note.read_text())
    started, data = time.time(), mixture(seed)
    run = trained(seed, 2, data, folder)
    loops = repeated_sequences(run.lm, 32, LENGTH // 2, seed=1)
    result = scored(run, data, loops)
    repeats = np.array([window.metadata["kind"] == "repeat" for window in result.conversations])
    top = np.argsort(-result.scores)[: round(FRACTION * len(repeats))]
    size = np.sort(np.abs(result.scores))[::-1]
    experiment = EmergenceExperiment(
        folder / f"replays-{seed}", [run], [result], WINDOW, loops, END, FRACTION, THRESHOLD
    )
    table = experiment.run(progress=False).table.set_index("arm")
    single = trained(seed, 1, data, folder)
    found = {
        "seed": seed,
        "auc": float(roc_auc_score(repeats, result.scores)),
        "repeats_in_top": float(repeats[top].mean()),
        "repeats_in_all": float(repeats.mean()),
        "share": float(size[: len(top)].sum() / size.sum()),
        "induction_at_scoring": float(head_scores(run.open(WINDOW[0], attention="eager"), loops).max()),
        "one_layer": float(head_scores(single.open(attention="eager"), loops).max()),
        "arms": {
            arm: {
                key: None if np.isnan(value) else float(value) for key, value in row.items() if key != "seed"
            }
            for arm, row in table.iterrows()
        },
        "seconds": time.time() - started,
    }
    note.write_text(json.dumps(found, indent=1))
    print(json.dumps(found), flush=True)
    return found


def gathered(seeds):
    """The figures of all seeds, under the names of the issue."""
    arms = list(seeds[0]["arms"])
    return {
        "seeds": [one["seed"] for one in seeds],
        "auc_repeats": [one["auc"] for one in seeds],
        "repeats_in_top": [one["repeats_in_top"] for one in seeds],
        "repeats_in_all": [one["repeats_in_all"] for one in seeds],
        "emergence": {arm: [one["arms"][arm]["emergence"] for one in seeds] for arm in arms},
        "induction_at_end": {arm: [one["arms"][arm]["induction"] for one in seeds] for arm in arms},
        "icl_at_end": {arm: [one["arms"][arm]["icl"] for one in seeds] for arm in arms},
        "top10_share": [one["share"] for one in seeds],
        "induction_at_scoring": [one["induction_at_scoring"] for one in seeds],
        "one_layer_control": {"induction": [one["one_layer"] for one in seeds]},
        "settings": {
            "window": WINDOW,
            "steps": END,
            "fraction": FRACTION,
            "threshold": THRESHOLD,
            "examples": N,
            "curvature_examples": FITTED,
        },
        "seconds": [one["seconds"] for one in seeds],
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--first", type=int, default=0, help="first seed; with others, another process can help"
    )
    parser.add_argument("--folder", type=Path, default=Path("circuits-runs"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "circuits.json")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    found = [of_a_seed(seed, given.folder) for seed in range(given.first, given.first + given.seeds)]
    given.out.write_text(json.dumps(gathered(found), indent=1) + "\n")
