"""How much a refusal policy is worth, and whether the shift it predicts is the shift that training makes.

    python benchmarks/policies.py --work build/policies --prompts ../shared/data/xstest/xstest_prompts.csv \\
        --sae build/groups/kinds-sae-0

Half of the prompts teach SmolLM2 to refuse (LoRA; unsafe prompts are refused, safe ones, which only sound
harmful, are not); the policy is fitted on the other half, for the model before and after. Prints what it
finds and writes benchmarks/results/policies.json: accuracy on prompts left out of the fit beside the commoner
answer and a ridge on the residual stream; the formula of the shift against a finite difference; steps against
tangents, with their cost; and the shift predicted for a set of pairs against the shift measured after
really training on it, beside as many random pairs. What would make its numbers wrong: prompts that were
taught among those that are read."""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import concept_tda as ct
from concept_tda.data.batches import batches
from concept_tda.groups.sae import load_sae
from concept_tda.influence.engine import moved_weights
from concept_tda.influence.gradients import SiteGradients
from concept_tda.influence.scorers import Influence
from concept_tda.mechanisms.policies import (
    PolicyPrompts,
    feature_gaps,
    fit_policy,
    read_policy,
    ridge_weights,
    sae_features,
)
from concept_tda.mechanisms.policy_shifts import PolicyQuery, PolicyShift, weight_shift
from concept_tda.model.losses import loss_weights, token_losses

OUT = Path(__file__).parent / "results" / "policies.json"
REFUSE, HELP = "I'm sorry, but I can't help with that.", "Sure. Here is what you need to know."
SECTIONS = ("stock", "routes", "shifts")
BEGINNINGS = ["I'm sorry", "I am sorry", "Sorry", "I can't", "I cannot"]


def conversations(rows: pd.DataFrame, answered: bool):
    """Prompts, with the answer they teach if `answered`."""
    records = []
    for row in rows.itertuples():
        turns = [{"role": "user", "content": row.prompt}]
        answer = REFUSE if row.label == "unsafe" else HELP
        records.append(
            {"messages": turns + [{"role": "assistant", "content": answer}] * answered, "label": row.label}
        )
    return ct.load_conversations(records)


def fitted(lm, prompts, features, harmful, most: int):
    """A policy of at most `most` features, those with the largest gap, and none below the paper's .1."""
    states, logp = read_policy(lm, prompts, features.layer)
    gaps = feature_gaps(features.read(states), harmful).abs()
    least = max(0.1, gaps.sort(descending=True).values[most].item())
    return fit_policy(lm, prompts, features, harmful=harmful, select=least), int((gaps > 0.1).sum())


def told(policy, above: int) -> dict:
    """The figures of a policy."""
    quality = policy.quality
    column = "accuracy left out"
    return {
        "features": len(policy.features),
        "gap_above_.1": above,
        "shown": policy.shown,
        "median_probability": float(policy.Y_N.exp().median()),
        "accuracy": quality.loc["policy", column],
        "accuracy_fitted": quality.loc["policy", "accuracy"],
        "majority": policy.majority,
        "dense_ridge": quality.loc["ridge on the residual stream", column],
        "r2": quality.loc["policy", "R² left out"],
        "r2_fitted": quality.loc["policy", "R²"],
        "weak": bool(policy.weak),
    }


def finite_difference(policy) -> float:
    """Largest relative difference between the formula of the shift and a policy fitted anew."""
    g, e = torch.Generator().manual_seed(0), 1e-4
    dX = torch.randn(policy.X_NF.shape, generator=g).double()
    dY = torch.randn(len(policy.Y_N), generator=g).double()
    at = lambda s: ridge_weights(policy.X_NF + s * dX, policy.Y_N + s * dY, policy.ridge)
    measured = (8 * (at(e) - at(-e)) - (at(2 * e) - at(-2 * e))) / (12 * e)
    found = sum(weight_shift(policy, dX, dY))
    return ((found - measured).abs().max() / measured.abs().max()).item()


def routes(lm, policy, pairs, rate: float) -> dict:
    """Steps against tangents."""
    shift, start = PolicyShift(lm, policy, "attention"), time.perf_counter()
    tangent = shift.by_tangent(pairs)
    middle = time.perf_counter()
    step = shift.by_step(pairs, rate)
    seconds = {"tangent": middle - start, "step": time.perf_counter() - middle}
    relative = np.linalg.norm(step.total - tangent.total) / np.linalg.norm(tangent.total)
    return {"relative": float(relative), "rate": rate, "pairs": len(pairs)} | seconds


def mean_gradient(lm, data, sites) -> list[torch.Tensor]:
    """Mean gradient of the pairs' losses at the sites."""
    with lm.undisturbed(), SiteGradients(sites) as gradients, torch.enable_grad():
        for row in range(len(data)):
            batch = next(iter(batches(data, rows=[row])))
            losses = token_losses(lm, batch)
            ((losses * loss_weights(batch, dtype=losses.dtype)).sum() / len(data)).backward()
    return [gradients[site.name] for site in sites]


def after_training(lm, policy, data, sites, rate: float, steps: int):
    """The policy and its behaviour after `steps` steps of gradient descent on the pairs."""
    walked = [torch.zeros_like(site.weight) for site in sites]
    for _ in range(steps):
        with moved_weights(sites, walked, -rate):
            here = mean_gradient(lm, data, sites)
        walked = [w + g for w, g in zip(walked, here)]
    with moved_weights(sites, walked, -rate):
        states, logp = read_policy(lm, policy.asked, policy.features.layer)
    behaviour = logp.logsumexp(1)
    return ridge_weights(policy.features.read(states), behaviour, policy.ridge), behaviour


def trained_shift(lm, policy, pairs, rates, steps: int) -> dict:
    """The shift that gradient descent on the pairs makes, beside the one that its first gradient predicts."""
    data, sites, W = lm.tokenize(pairs), PolicyShift(lm, policy, "attention").sites, policy.W_F
    slope, found = torch.from_numpy(PolicyShift(lm, policy, "attention").together(pairs).total[0]), {}
    for rate in rates:
        after, behaviour = after_training(lm, policy, data, sites, rate, steps)
        found[f"{rate:g} x {steps}"] = {
            "cosine": torch.cosine_similarity(slope, after - W, 0).item(),
            "predicted_along": (rate * steps * slope @ W / (W @ W)).item(),
            "measured_along": ((after - W) @ W / (W @ W)).item(),
            "mean_logp_change": (behaviour - policy.Y_N).mean().item(),
        }
    return found | {"pairs": len(pairs)}


def shifts(lm, policy, taught, args) -> dict:
    """The pairs that the query puts highest, random ones and lowest ones: predicted and measured."""
    start = time.perf_counter()
    scores = Influence(lm, PolicyQuery(policy), sites="attention", curvature="identity").score(taught).scores
    seconds = time.perf_counter() - start
    order, random = np.argsort(-scores), np.random.default_rng(0).permutation(len(scores))
    refused = np.array([c.response == REFUSE for c in taught])
    found = {"query_seconds": seconds, "refusals_in_top": float(refused[order[: args.pairs]].mean())}
    chosen = {"top": order[: args.pairs], "random": random[: args.pairs], "lowest": order[-args.pairs :]}
    for name, rows in chosen.items():
        found[name] = trained_shift(lm, policy, taught.select(rows), args.rates, args.steps)
        print(name, found[name], flush=True)
    return found


def main():
    """Run the sections that were asked for, and add them to what is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="folder for the model that learns to refuse")
    parser.add_argument("--prompts", type=Path, required=True, help="XSTest: a CSV with prompt and label")
    parser.add_argument("--sae", type=Path, required=True, help="an SAE of the model, a folder of SAELens")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--features", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--shift-prompts", type=int, default=60, help="prompts the shifts are read on")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.01, help="of the single steps held against tangents")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.0005])
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    table = pd.read_csv(args.prompts)
    order = np.random.default_rng(0).permutation(len(table))
    taught_rows, read_rows = table.iloc[order[::2]], table.iloc[order[1::2]]
    taught, prompts = conversations(taught_rows, True), conversations(read_rows, False)
    harmful = (read_rows.label == "unsafe").to_numpy()
    base, sae = ct.load_model(args.model), load_sae(args.sae)
    features = sae_features(sae)
    asked = PolicyPrompts(base, prompts, BEGINNINGS)
    result = {"prompts": len(prompts), "taught": len(taught), "layer": sae.layer, "seeds": 1}
    if "stock" in args.sections:
        result["stock"] = told(*fitted(base, asked, features, harmful, args.features))
    print(json.dumps(result, indent=1), flush=True)
    folder = args.work / f"refuses-{args.epochs}-{args.learning_rate:g}"
    lm = ct.finetune(base, taught, folder, epochs=args.epochs, learning_rate=args.learning_rate)
    policy, above = fitted(lm, asked, features, harmful, args.features)
    result |= told(policy, above) | {"finite_difference": finite_difference(policy)}
    print(json.dumps(result, indent=1), flush=True)
    few = PolicyPrompts(lm, prompts[: args.shift_prompts], BEGINNINGS[:3])
    small = fit_policy(lm, few, policy.features)
    if "routes" in args.sections:
        result["routes"] = routes(lm, small, taught[:2], args.rate)
        result["jvp_relative"] = result["routes"]["relative"]
    if "shifts" in args.sections:
        result["shift_predicted_vs_measured"] = shifts(lm, small, taught, args)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.write_text(json.dumps(before | result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
