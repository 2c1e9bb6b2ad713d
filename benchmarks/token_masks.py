"""Does masking the tokens that push hardest do what dropping the examples that push hardest does?

    python benchmarks/token_masks.py --work build/token_masks            # a run for each arm and seed
    python benchmarks/token_masks.py --work build/token_masks --most 1   # one more of them, then stop

SmolLM2-135M-Instruct is fine-tuned on as many sycophantic as honest answers, again and again without a
quarter of the response tokens: those of the whole examples with the highest scores, the tokens with the
highest scores wherever they stand, and as many drawn at random in either way. Scores are influence on a
margin (log-probability of sycophantic minus honest held-out answers), without curvature, taken apart by the
losses of tokens (the difference engine). Judged on other questions: the same margin, and the margin of right
over wrong answers to small tasks. What would make the numbers wrong: reading one seed, or comparing arms that
lost different numbers of tokens. Runs go seed by seed, and the file is whole after each."""

import argparse
import json
import time
from pathlib import Path

import numpy as np

import concept_tda as ct
from concept_tda.data.masks import token_mask
from concept_tda.evidence.statistics import t_interval
from concept_tda.foundation.storage import atomic_file
from concept_tda.influence.queries import LossQuery
from concept_tda.influence.scorers import Influence
from concept_tda.model.losses import loss_weights, token_losses

OUT = Path(__file__).parent / "results" / "token_masks.json"
ARMS = ("full", "examples", "tokens", "random examples", "random tokens")
RECIPE = dict(learning_rate=5e-4, rank=16, alpha=32, batch_size=2)


class Margin(LossQuery):
    """Mean log-probability of the first half of the examples minus that of the second half."""

    name = "sycophantic over honest answers"

    def sum_over(self, lm, batch):
        """Losses with the sign of their half, doubled since the mean is over both halves."""
        losses = token_losses(lm, batch)
        each = (losses * loss_weights(batch, dtype=losses.dtype).to(losses.device)).sum(1)
        first = (batch.rows < len(self.examples) // 2).to(each)
        return -2 * (each * (2 * first - 1)).sum()


def labelled(data, label, count):
    """The first examples of a label."""
    return data.select(np.flatnonzero(data.labels("label", label))[:count])


def random_share(lengths, order, budget):
    """Rows in an order until they hold as many tokens as the budget."""
    total = np.cumsum(lengths[order])
    return order[: int(np.searchsorted(total, budget)) + 1]


def arm_weights(arm, result, tokenized, share, seed):
    """Token weights of one arm, [T] for each example; rows that are dropped whole are None."""
    responses = [item.response_mask.numpy() for item in tokenized]
    lengths = np.array([mask.sum() for mask in responses])
    budget, random = int(round(share * lengths.sum())), np.random.default_rng([seed, 1])
    if arm in ("examples", "random examples"):
        order = np.argsort(-result.scores) if arm == "examples" else random.permutation(len(lengths))
        gone = set(random_share(lengths, order, budget).tolist())
        return [None if row in gone else np.ones(len(mask)) for row, mask in enumerate(responses)]
    if arm == "tokens":
        return result.token_mask(count=budget).weights
    flat = np.ones(lengths.sum())
    flat[random.permutation(len(flat))[:budget]] = 0
    weights = [np.zeros(len(mask)) for mask in responses]
    for one, mask, piece in zip(weights, responses, np.split(flat, np.cumsum(lengths)[:-1])):
        one[mask] = piece
    return weights


def facts(weights, tokenized, labels):
    """How many tokens an arm lost, and how many of them are of sycophantic answers."""
    lost = np.array(
        [
            int(item.response_mask.sum() if one is None else (one[item.response_mask.numpy()] == 0).sum())
            for one, item in zip(weights, tokenized)
        ]
    )
    touched = int((lost > 0).sum())
    return {
        "tokens": int(lost.sum()),
        "examples_touched": touched,
        "of_sycophantic": round(float(lost[labels].sum() / max(1, lost.sum())), 4),
    }


def judged(lm, judges):
    """What each judge says of a model."""
    return {name: float(np.mean(judge.evaluate(lm).values)) for name, judge in judges.items()}


def run(arm, seed, lm, tokenized, result, labels, judges, args):
    """Train one arm with one seed, and judge it."""
    place, start, told = args.work / "models" / f"{arm.replace(' ', '-')}-{seed}", time.perf_counter(), {}
    data = tokenized
    if arm != "full":
        weights = arm_weights(arm, result, tokenized, args.share, seed)
        told = facts(weights, tokenized, labels)
        rows = [row for row, one in enumerate(weights) if one is not None]
        data = tokenized.select(rows)
        if "tokens" in arm:
            data = token_mask(data, weights).apply(data)
    tuned = ct.finetune(lm, data, place, seed=seed, **RECIPE)
    values = judged(tuned, judges)
    return {"arm": arm, "seed": seed, **told, **values, "seconds": round(time.perf_counter() - start, 1)}


def scored(lm, tokenized, queries, args):
    """Token scores in the model that was fine-tuned on everything."""
    path = args.work / "scores.parquet"
    if path.exists():
        return ct.load_attribution(path)
    tuned = ct.finetune(lm, tokenized, args.work / "models" / "full-0", seed=0, **RECIPE)
    scorer = Influence(tuned, Margin(queries), curvature="identity", engine="difference")
    result = scorer.score(tokenized, tokens=True)
    result.save(path, overwrite=True)
    return result


def summary(runs):
    """Means over seeds of each arm, half a 95 % interval, and paired differences from its random arm."""
    found = {}
    for arm in ARMS:
        mine = {one["seed"]: one for one in runs if one["arm"] == arm}
        if not mine:
            continue
        found[arm] = {
            "seeds": len(mine),
            **{k: v for k, v in mine[min(mine)].items() if "of_" in k or "tokens" in k},
        }
        control = {one["seed"]: one for one in runs if one["arm"] == f"random {arm}"}
        for judge in ("sycophancy", "capability"):
            mean, half, _ = t_interval(np.array([one[judge] for one in mine.values()]))
            found[arm][judge] = {"mean": round(mean, 4), "half": round(half, 4)}
            both = sorted(set(mine) & set(control))
            if both:
                mean, half, _ = t_interval(np.array([mine[s][judge] - control[s][judge] for s in both]))
                found[arm][f"{judge}_from_random"] = {"mean": round(mean, 4), "half": round(half, 4)}
    return found


def main():
    """Run what is missing; everything is written as soon as it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for models and scores")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--share", type=float, default=0.25, help="of the response tokens")
    parser.add_argument("--take", type=int, default=60, help="training examples of either kind")
    parser.add_argument("--judged", type=int, default=40, help="questions of either judge")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--most", type=int, default=10**9, help="runs in this call")
    args = parser.parse_args()
    lm, train = ct.load_model(args.model), ct.bundled("sycophancy")
    kinds = ("sycophantic", "honest")
    rows = np.concatenate([np.flatnonzero(train.labels("label", one))[: args.take] for one in kinds])
    train, heldout = train.select(np.sort(rows)), ct.bundled("sycophancy", "heldout")
    both = [*labelled(heldout, kinds[0], 6), *labelled(heldout, kinds[1], 6)]
    queries = ct.data.conversations.Conversations(both, "6 sycophantic and 6 honest held-out answers")
    judges = {
        "sycophancy": ct.ContrastJudge(ct.bundled("sycophancy", "evaluation")[: args.judged]),
        "capability": ct.ContrastJudge(
            ct.bundled("careless", "capability")[: args.judged], trait="right", neutral="wrong"
        ),
    }
    tokenized, labels = lm.tokenize(train), np.asarray(train.labels("label", "sycophantic"))
    result = scored(lm, tokenized, queries, args)
    found = json.loads(OUT.read_text()) if OUT.exists() else {"runs": []}
    if "base" not in found:
        found["base"] = judged(lm, judges)
    done = {(one["arm"], one["seed"]) for one in found["runs"]}
    todo = [(arm, seed) for seed in range(args.seeds) for arm in ARMS if (arm, seed) not in done]
    for arm, seed in todo[: args.most]:
        found["runs"].append(run(arm, seed, lm, tokenized, result, labels, judges, args))
        found |= {
            "settings": {
                "model": args.model,
                "examples": len(train),
                "response_tokens": tokenized.n_response_tokens,
                "share": args.share,
                "questions": args.judged,
                "recipe": RECIPE,
                "method": result.label,
                "code": ct.foundation.storage.code_version(),
            },
            "summary": summary(found["runs"]),
        }
        with atomic_file(OUT) as part:
            part.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found["runs"][-1]), flush=True)
    print(f"{len(todo[args.most :])} runs are left")


if __name__ == "__main__":
    main()
