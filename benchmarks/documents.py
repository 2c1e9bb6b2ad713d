"""Which stories built this head? A small GPT-NeoX trained on windows of real text, several seeds.

    python benchmarks/documents.py ../shared/data/tinystories/tiny_stories.txt --seeds 3
    python benchmarks/documents.py corpus.txt --model EleutherAI/pythia-14m   # its size, from scratch

Follows the induction and previous-token scores of every head, and the in-context score on held-out text, over
checkpoints of a recorded run; scores windows for the head that ends strongest by either measure, at the last
checkpoint before it forms; and asks what the top tenth has more of than the rest, beside shuffled rankings
and beside the top tenth by loss. Writes results/documents.json; runs stay in the folder, and an interrupted
call goes on. --as-it-is takes the checkpoints that an interrupted run has left, and trains no further.

What would make the numbers wrong: windows of one story are not independent, while the null takes them to be;
the head is chosen after the run, as the strongest of all."""

import argparse
import json
import re
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerFast

from concept_tda.data.documents import load_documents
from concept_tda.influence.baselines import MeanLoss
from concept_tda.mechanisms.circuits import (
    InductionProbe,
    PreviousTokenProbe,
    UnitEKFAC,
    UnitInfluence,
    head,
    random_sequences,
    repeated_sequences,
)
from concept_tda.mechanisms.emergence import circuit_curves, icl_score
from concept_tda.mechanisms.motifs import find_motifs
from concept_tda.model.training import TrainingRecipe, load_run, train

HELD_OUT, FITTED, SCORED = 300, 400, 1500  # windows


def stories(path):
    """The stories of a file in which paragraphs are separated by blank lines, and stories by a line break."""
    return [one.strip() for one in re.split(r"(?<=\S)\n(?=\S)", path.read_text()) if len(one.strip()) > 100]


def own_tokenizer(texts, size):
    """Byte-level BPE learned from the texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")


def model_of(given, texts):
    """Configuration and tokenizer: those of a hub model, or a small GPT-NeoX of our own."""
    if given.model:
        config = AutoConfig.from_pretrained(given.model)
        config._attn_implementation = "eager"
        return config, AutoTokenizer.from_pretrained(given.model)
    tokenizer = own_tokenizer(texts, given.vocabulary)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=given.width,
        intermediate_size=4 * given.width,
        num_hidden_layers=given.layers,
        num_attention_heads=given.width // 16,
        max_position_embeddings=given.window,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return config, tokenizer


def before_it_forms(curves, measure, block, number):
    """The last checkpoint at which the head has less than a third of its last score, and all its scores."""
    scores = getattr(curves, measure)[:, block, number]
    low = np.flatnonzero(scores < scores[-1] / 3)
    return int(curves.steps[low[-1]]) if len(low) else int(curves.steps[0]), scores


def motif_record(motifs):
    """What was found, as plain numbers."""
    table = motifs.table[["statistic", "auroc", "low", "high", "band", "p_adjusted", "top", "rest"]]
    return {
        "found": motifs.found,
        "table": json.loads(table.to_json(orient="records", double_precision=4)),
        "joint": {name: round(value, 4) for name, value in vars(motifs.joint).items()},
    }


def of_a_seed(seed, given):
    """Run, curves, scores and motifs of one seed; a dict of plain numbers."""
    note = given.folder / f"seed-{seed}.json"
    if note.exists():
        return json.loads(note.read_text())
    started, texts = time.time(), stories(given.text)
    config, tokenizer = model_of(given, texts)
    windows = load_documents(texts, window=given.window).windows(tokenizer)
    windows = windows.select([row for row, one in enumerate(windows) if len(one.tokens) == given.window])
    held_out, learned = windows[:HELD_OUT], windows[HELD_OUT:]
    recipe = TrainingRecipe(
        steps=given.steps, batch_size=32, learning_rate=given.rate, warmup_steps=50, seed=seed
    )
    folder = given.folder / f"run-{seed}"
    if given.as_it_is:
        run = load_run(folder, learned)
    else:
        run = train(config, learned, folder, recipe, tokenizer=tokenizer, every=given.every, progress=False)
    trained = time.time() - started
    loops = repeated_sequences(run.lm, 32, given.window // 2, seed=1)
    curves = circuit_curves(run, loops)
    text_icl = [
        icl_score(run.open(step), held_out, given.window // 4, given.window - 1) for step in curves.steps
    ]
    measure = max(("induction", "previous_token"), key=lambda one: getattr(curves, one)[-1].max())
    block, number = curves.strongest(measure)
    step, head_scores = before_it_forms(curves, measure, block, number)
    lm = run.open(step, attention="eager")
    noise = random_sequences(run.lm, 32, given.window // 2, seed=1)
    probe = {
        "induction": lambda: InductionProbe(block, number, loops),
        "previous_token": lambda: PreviousTokenProbe(block, number, noise),
    }[measure]()
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(len(learned), min(SCORED, len(learned)), replace=False))
    tokens = lm.tokenize(learned.select(chosen.tolist()))
    fitted = tokens.select(np.sort(random.choice(len(tokens), FITTED, replace=False)))
    units = head(lm, block, number).units[:1]
    curvature = UnitEKFAC.fit(lm, fitted, units, progress=False, cache=False)
    scorer = UnitInfluence(lm, probe, units, curvature=curvature)
    scores = scorer.score(tokens, token_budget=4096, progress=False)
    losses = MeanLoss(lm).score(tokens, progress=False)
    size = np.sort(np.abs(scores.scores))[::-1]
    found = {
        "seed": seed,
        "parameters": sum(weight.numel() for weight in run.lm.model.parameters()),
        "windows": len(learned),
        "scored": len(tokens),
        "planned_steps": given.steps,
        "tokens": int(sum(len(one.tokens) for one in learned)),
        "steps": curves.steps.tolist(),
        "highest_induction": curves.induction.max((1, 2)).round(4).tolist(),
        "highest_previous_token": curves.previous_token.max((1, 2)).round(4).tolist(),
        "icl_repeats": curves.icl.round(4).tolist(),
        "icl_text": np.round(text_icl, 4).tolist(),
        "loss": run.steps.loss.iloc[given.every - 1 :: given.every].round(4).tolist(),
        "measure": measure,
        "head": [block, number],
        "head_scores": head_scores.round(4).tolist(),
        "scored_at": step,
        "top10_share": float(size[: len(size) // 10].sum() / size.sum()),
        "influence": motif_record(find_motifs(scores, seed=seed)),
        "loss_ranking": motif_record(find_motifs(losses, seed=seed)),
        "examples": [one.response[:300] for one in scores.top(3).conversations],
        "seconds_of_training": trained,
        "seconds": time.time() - started,
    }
    note.write_text(json.dumps(found, indent=1))
    print(
        {name: found[name] for name in ("seed", "measure", "head", "scored_at", "head_scores", "icl_text")},
        flush=True,
    )
    print({name: found[name]["found"] for name in ("influence", "loss_ranking")}, flush=True)
    return found


def arguments():
    """What can be said on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path, help="stories, one after the other")
    parser.add_argument("--model", help="hub id: its architecture and tokenizer, trained from nothing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--as-it-is", action="store_true", help="train no further")
    parser.add_argument("--folder", type=Path, default=Path("documents-runs"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "documents.json")
    return parser.parse_args()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    given = arguments()
    given.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        name: value for name, value in vars(given).items() if name not in ("text", "folder", "out", "seeds")
    }
    machine = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "text": given.text.name,
        "fitted": FITTED,
    }
    found = []
    for seed in range(given.seeds):
        found.append(of_a_seed(seed, given))
        record = {"seeds": found, "settings": settings | machine}
        given.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
