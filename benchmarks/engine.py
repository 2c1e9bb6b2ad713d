"""What exact attribution costs, measured side by side in one process on the same tokens.

    python benchmarks/engine.py --model smollm2-135m-instruct --examples 64 --out engine.json
    python benchmarks/engine.py --only scoring fits --examples 16 --out quick.json

Every timing is one of several rounds in which the competitors take turns, and every ratio is a median of the
ratios within a round, so that a machine whose speed drifts drifts for all of them. Ratios say how many times
the *second* name fits into the first: `ci_vs_vector_filter` 4.0 means Concept Influence takes four times a
Vector Filter. Concept, query and EK-FAC factors are made before the clock starts unless they are what is
measured.

What would make a number wrong: another process on the machine; fewer than three rounds; a first round without
the warm-up.
"""

import argparse
import copy
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from scipy.stats import spearmanr

import concept_tda as ct
from concept_tda.influence.engine import shared_pass

SECTIONS = ("scoring", "bf16", "fits", "kronfluence", "paper", "queries", "atlas", "cascade")


def peak_of(args, fit):
    """Peak memory in GiB that one fit adds, in a fresh process that does nothing else (a used heap would hide
    it)."""
    command = [
        sys.executable,
        __file__,
        "--model",
        args.model,
        "--layer",
        str(args.layer),
        "--examples",
        str(args.examples),
        "--fit-examples",
        str(args.fit_examples),
        "--peak-of",
        fit,
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def resident(field):
    "Resident memory (VmRSS) or its peak (VmHWM) of this process in GiB; Linux only."
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) / 2**20


def sync():
    "Wait for the accelerator, so that a clock stops after the work and not after its launch."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(rounds, **competitors):
    "Seconds of every competitor in every round, after one warm-up of each: {name: [seconds]}."
    seconds = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name, run in competitors.items():
            sync()
            start = time.perf_counter()
            run()
            sync()
            if turn:
                seconds[name].append(time.perf_counter() - start)
            print(f"    {name:28} {'warm-up' if not turn else f'{seconds[name][-1]:8.2f} s'}", flush=True)
    return seconds


def ratio(seconds, slow, fast):
    "Median over rounds of how many times the fast one fits into the slow one."
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast]))


def matmul_peak(dtype=torch.float32, device="cpu"):
    "FLOP/s of a large matrix product, the best of a few."
    a, b = (
        torch.randn(1536, 1536, dtype=dtype, device=device),
        torch.randn(1536, 1536, dtype=dtype, device=device),
    )
    best = 0
    for _ in range(12):
        sync()
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        sync()
        best = max(best, 4 * 2 * 1536**3 / (time.perf_counter() - start))
    return best


def flops(lm, data, layer, sites):
    """FLOPs that cannot be avoided over `data`: {pass: FLOPs}, two for each multiply-add; norms, softmax and
    loss are not counted."""
    per_block = [0] * lm.n_layers
    for site in ct.resolve_sites(lm, "all-linear"):
        per_block[site.block] += 2 * site.in_features * site.out_features
    head = 2 * lm.width * lm.vocab_size
    totals = dict(vector_filter=0, forward=0, concept_influence=0)
    unneeded = sum(
        2 * s.in_features * s.out_features for s in sites if s.block == 0 and not s.name.endswith("o_proj")
    )
    for example in data:
        tokens, rows = len(example.input_ids), int(example.response_mask[1:].sum())
        attention = 2 * tokens**2 * lm.width  # q·k and weights·v over the causal half
        below = sum(per_block[:layer]) * tokens + attention * layer
        forward = sum(per_block) * tokens + attention * lm.n_layers + head * rows
        backward = (
            forward - unneeded * tokens + attention * lm.n_layers
        )  # input gradients of every layer; attention twice
        totals["vector_filter"] += below
        totals["forward"] += forward
        totals["concept_influence"] += (
            forward + backward + sum(2 * s.in_features * s.out_features for s in sites) * tokens
        )
    return totals


class Bench:
    "One model, its data and concept, and what was measured so far; a section of the benchmark is a method."

    def __init__(self, args):
        self.args, self.result = (
            args,
            dict(ratios={}, agreement={}, memory={}, floor={}, seconds={}, notes=[]),
        )
        self.lm = ct.load_model(args.model, device=args.device)
        self.layer = args.layer
        self.train = ct.bundled("sycophancy").select(range(args.examples))
        held_out = ct.bundled("sycophancy", "heldout")
        flattering, honest = (
            held_out.filter(lambda c, kind=kind: c.metadata["label"] == kind)
            for kind in ("sycophantic", "honest")
        )
        self.concept = ct.contrastive_concept(
            self.lm, flattering[:20], honest[:20], layer=self.layer, name="sycophancy", progress=False
        )
        self.query_examples = flattering[20:21]
        self.data = self.lm.tokenize(self.train)
        self.sites = ct.resolve_sites(self.lm, "attention", layer=self.layer)
        self.fit_data = self.data.select(range(args.fit_examples))
        self.curvature = (
            None
            if args.peak_of
            else ct.EKFAC.fit(self.lm, self.fit_data, self.sites, labels="empirical", progress=False)
        )

    def influence(self, lm=None, concept=None, curvature=None, **options):
        "Concept Influence with the benchmark's own model, concept and curvature where none is named."
        return ct.ConceptInfluence(
            lm or self.lm,
            concept or self.concept,
            self.query_examples,
            curvature=curvature or self.curvature,
            **options,
        )

    def pass_seconds(self, scorer):
        "A function that runs the scoring pass of a scorer whose query is ready."
        readout = scorer.prepare(self.data)
        return lambda: (
            shared_pass(
                scorer.lm, self.data, {"s": readout}, progress=False, token_budget=self.args.token_budget
            )["s"].scores
        )

    def scoring(self):
        "Vector Filter, activation gradient, Concept Influence and a plain forward pass with loss."
        passes = dict(
            vector_filter=self.pass_seconds(ct.VectorFilter(self.lm, self.concept)),
            forward_with_loss=self.pass_seconds(ct.MeanLoss(self.lm)),
            activation_gradient=self.pass_seconds(ct.ActivationGradient(self.lm, self.concept)),
            concept_influence=self.pass_seconds(self.influence()),
            concept_influence_forward=self.pass_seconds(self.influence(engine="forward")),
            concept_influence_difference=self.pass_seconds(self.influence(engine="difference")),
        )
        self.exact = passes["concept_influence"]()[:, 0]
        for engine in ("forward", "difference"):
            scores = passes[f"concept_influence_{engine}"]()[:, 0]
            self.result["agreement"][f"{engine}_vs_reverse"] = dict(
                spearman=spearmanr(scores, self.exact).statistic,
                relative_error=float(np.abs(scores - self.exact).max() / np.abs(self.exact).max()),
            )
        seconds = take_turns(self.args.rounds, **passes)
        counted = flops(self.lm, self.data, self.layer, self.sites)
        peak = matmul_peak(self.lm.dtype, self.lm.device)
        ratios = self.result["ratios"]
        ratios["ci_vs_vector_filter"] = ratio(seconds, "concept_influence", "vector_filter")
        ratios["activation_gradient_vs_vector_filter"] = ratio(
            seconds, "activation_gradient", "vector_filter"
        )
        ratios["forward_with_loss_vs_vector_filter"] = ratio(seconds, "forward_with_loss", "vector_filter")
        ratios["ci_forward_vs_vector_filter"] = ratio(seconds, "concept_influence_forward", "vector_filter")
        ratios["ci_difference_vs_vector_filter"] = ratio(
            seconds, "concept_influence_difference", "vector_filter"
        )
        floor = counted["concept_influence"] / counted["vector_filter"]
        ratios["ci_over_flop_floor"] = ratios["ci_vs_vector_filter"] / floor
        self.result["floor"] = dict(
            flops=counted,
            ci_vs_vector_filter=floor,
            matmul_peak_gflops=peak / 1e9,
            fraction_of_peak={
                name: counted[key] / statistics.median(seconds[name]) / peak
                for name, key in (
                    ("vector_filter", "vector_filter"),
                    ("forward_with_loss", "forward"),
                    ("concept_influence", "concept_influence"),
                )
            },
        )
        self.result["seconds"]["scoring"] = seconds

    def skips_bf16(self):
        "Whether bfloat16 does not pay here, with a note that says so."
        slower = ct.foundation.probes.bfloat16_ratio(self.lm.device)
        if slower <= 1:
            return False
        note = f"no bfloat16: a product takes {slower:.0f} times as long as in float32 here"
        print(f"    {note}", flush=True)
        if note not in self.result["notes"]:
            self.result["notes"].append(note)
        return True

    def half_pass(self):
        "A function that scores the data with the model in bfloat16 along the query of the float32 model."
        half = ct.load_model(self.args.model, dtype=torch.bfloat16, device=self.args.device)
        query = self.curvature.precondition(
            ct.influence.queries.ConceptQuery(self.concept, self.query_examples).gradients(
                self.lm, self.sites
            )
        )
        readout = ct.influence.engine.DirectionReadout(
            ct.resolve_sites(half, "attention", layer=self.layer), query
        )
        return lambda: shared_pass(
            half, self.data, {"s": readout}, progress=False, token_budget=self.args.token_budget
        )["s"]

    def bf16(self):
        "The same scoring pass with the model in bfloat16, against the float32 Vector Filter."
        if self.skips_bf16():
            return
        half = self.half_pass()
        run = lambda: half().scores
        exact = self.pass_seconds(self.influence())()[:, 0]
        scores = run()[:, 0]
        self.result["agreement"]["bf16_vs_fp32"] = dict(
            spearman=spearmanr(scores, exact).statistic,
            relative_error=float(np.abs(scores - exact).max() / np.abs(exact).max()),
        )
        seconds = take_turns(
            self.args.rounds,
            vector_filter_fp32=self.pass_seconds(ct.VectorFilter(self.lm, self.concept)),
            concept_influence_bf16=run,
        )
        self.result["ratios"]["ci_bf16_vs_vector_filter_fp32"] = ratio(
            seconds, "concept_influence_bf16", "vector_filter_fp32"
        )
        self.result["seconds"]["bf16"] = seconds

    def kronfluence_analyzer(self, folder):
        "kronfluence's analyzer for the same model, sites and losses."
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.task import Task

        bench = self

        class LanguageTask(Task):
            reduction = "sum"

            def compute_train_loss(self, batch, model, sample=False):
                logits = model(input_ids=batch["input_ids"], use_cache=False).logits[0, :-1].float()
                mask = batch["response_mask"][0, 1:]
                targets = batch["input_ids"][0, 1:][mask]
                if sample:
                    with torch.no_grad():
                        targets = torch.multinomial(logits[mask].softmax(-1), 1).flatten()
                return torch.nn.functional.cross_entropy(logits[mask], targets, reduction=self.reduction)

            def compute_measurement(self, batch, model):
                hidden = model(
                    input_ids=batch["input_ids"], output_hidden_states=True, use_cache=False
                ).hidden_states[bench.layer][0]
                return hidden[batch["response_mask"][0]].mean(0) @ bench.concept.direction.to(hidden)

            def get_influence_tracked_modules(self):
                return [site.name for site in bench.sites]

        task = LanguageTask()
        model = prepare_model(copy.deepcopy(self.lm.model), task)
        return task, Analyzer(
            "bench",
            model,
            task,
            output_dir=folder,
            disable_tqdm=True,
            disable_model_save=True,
            cpu=self.lm.device.type == "cpu",
        )

    def _as_dataset(self, tokenized):
        return [
            dict(input_ids=example.input_ids, response_mask=example.response_mask) for example in tokenized
        ]

    def fits(self):
        "EK-FAC: ours, curvlinops, kronfluence; seconds and memory."
        folder = tempfile.mkdtemp()
        competitors = {
            name: (
                lambda backend=name: ct.EKFAC.fit(
                    self.lm, self.fit_data, self.sites, backend=backend, cache=False, progress=False
                )
            )
            for name in ("streaming", "curvlinops")
        }
        try:
            from kronfluence.arguments import FactorArguments

            task, analyzer = self.kronfluence_analyzer(folder)
            competitors["kronfluence"] = lambda: analyzer.fit_all_factors(
                "fit",
                self._as_dataset(self.fit_data),
                per_device_batch_size=1,
                factor_args=FactorArguments("ekfac"),
                overwrite_output_dir=True,
            )
        except ImportError as err:
            self.result["notes"].append(f"kronfluence is not installed ({err})")
        if self.args.peak_of:
            competitors["streaming_two_passes"] = lambda: ct.EKFAC.fit(
                self.lm, self.fit_data, self.sites, memory_budget=0, cache=False, progress=False
            )
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
            before = resident("VmRSS")
            competitors[self.args.peak_of]()
            return print(resident("VmHWM") - before)
        for name in [*competitors, "streaming_two_passes"]:
            self.result["memory"][f"fit_{name}_gb"] = peak_of(self.args, name)
        seconds = take_turns(self.args.rounds, **competitors)
        self.result["ratios"]["curvlinops_fit_vs_ours"] = ratio(seconds, "curvlinops", "streaming")
        if "kronfluence" in seconds:
            self.result["ratios"]["kronfluence_fit_vs_ours"] = ratio(seconds, "kronfluence", "streaming")
        gradients = ct.influence.queries.ConceptQuery(self.concept, self.query_examples).gradients(
            self.lm, self.sites
        )
        flat = {
            name: torch.cat(
                [
                    g.flatten()
                    for g in ct.EKFAC.fit(self.lm, self.fit_data, self.sites, backend=name, progress=False)
                    .precondition(gradients)
                    .values()
                ]
            )
            for name in ("streaming", "curvlinops")
        }
        self.result["agreement"]["ekfac_query_cosine_to_curvlinops"] = torch.nn.functional.cosine_similarity(
            flat["streaming"].double(), flat["curvlinops"].double(), dim=0
        ).item()
        self.result["seconds"]["fits"] = seconds
        self.result["fit_tokens"] = int(self.fit_data.n_tokens)

    def kronfluence(self):
        """One query scored against all examples, its gradient and preconditioning included, by kronfluence
        and by us."""
        try:
            from kronfluence.arguments import FactorArguments, ScoreArguments
        except ImportError as err:
            return self.result["notes"].append(f"kronfluence is not installed ({err})")
        task, analyzer = self.kronfluence_analyzer(tempfile.mkdtemp())
        analyzer.fit_all_factors(
            "f",
            self._as_dataset(self.fit_data),
            per_device_batch_size=1,
            factor_args=FactorArguments("ekfac", use_empirical_fisher=True),
            overwrite_output_dir=True,
        )
        task.reduction = "mean"
        train, query = self._as_dataset(self.data), self._as_dataset(self.lm.tokenize(self.query_examples))

        def theirs():
            analyzer.compute_pairwise_scores(
                "s",
                factors_name="f",
                query_dataset=query,
                train_dataset=train,
                per_device_query_batch_size=1,
                per_device_train_batch_size=1,
                score_args=ScoreArguments(damping_factor=None),
                overwrite_output_dir=True,
            )
            return analyzer.load_pairwise_scores("s")["all_modules"][0]

        ours = lambda: (
            self.influence().score(self.data, token_budget=self.args.token_budget, progress=False).scores
        )
        self.result["agreement"]["kronfluence_spearman"] = spearmanr(
            -theirs().float().numpy(), ours()
        ).statistic
        seconds = take_turns(self.args.rounds, kronfluence=theirs, ours=ours)
        self.result["ratios"]["kronfluence_score_vs_ours"] = ratio(seconds, "kronfluence", "ours")
        self.result["seconds"]["kronfluence"] = seconds
        try:
            import bergson  # noqa: F401
        except ImportError as err:
            self.result["notes"].append(
                f"bergson is not installed here ({err}), so bergson_score_vs_ours is not measured"
            )

    def paper(self):
        """The paper's recipe: one example at a time, each padded to 1,536 tokens, weight gradients built,
        inner product; a few examples, per example."""
        few = self.data.select(range(min(3, len(self.data))))
        query = self.curvature.precondition(
            ct.influence.queries.ConceptQuery(self.concept, self.query_examples).gradients(
                self.lm, self.sites
            )
        )
        weights = {site.name: site.module.weight for site in self.sites}

        def recipe():
            for example in few:
                pad = 1536 - len(example.input_ids)
                ids = torch.nn.functional.pad(example.input_ids, (0, pad), value=self.data.pad_token_id)[
                    None
                ].to(self.lm.device)
                mask = torch.nn.functional.pad(example.response_mask, (0, pad)).to(self.lm.device)
                for weight in weights.values():
                    weight.requires_grad_(True)
                logits = self.lm.model(
                    input_ids=ids,
                    attention_mask=(torch.arange(1536) < len(example.input_ids))[None]
                    .long()
                    .to(self.lm.device),
                    use_cache=False,
                ).logits[0]
                loss = torch.nn.functional.cross_entropy(logits[:-1][mask[1:]].float(), ids[0, 1:][mask[1:]])
                for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values()))):
                    (gradient * query[name]).sum().item()
                for weight in weights.values():
                    weight.requires_grad_(False)

        readout = ct.influence.engine.DirectionReadout(self.sites, query)
        ours = lambda: shared_pass(
            self.lm, few, {"s": readout}, progress=False, token_budget=self.args.token_budget
        )
        with self.lm.undisturbed():
            seconds = take_turns(self.args.rounds, paper_recipe=recipe, ours=ours)
        self.result["ratios"]["paper_recipe_vs_ours"] = ratio(seconds, "paper_recipe", "ours")
        self.result["seconds"]["paper"] = seconds

    def many_directions(self, n, seed=0):
        "Covariance-matched random directions at the layer [n, width]."
        acts = ct.pooled_activations(self.lm, self.train, self.layer, progress=False)[self.layer]
        return ct.concepts.concept.random_directions(acts, n, seed=seed)

    def queries(self):
        """256 directions at once: the exact atlas answers any number of them; and 16 unrelated queries by the
        stacked engine."""
        one = self.pass_seconds(self.influence())
        gradients = self.curvature.precondition(
            ct.influence.queries.ConceptQuery(self.concept, self.query_examples).gradients(
                self.lm, self.sites
            )
        )
        sixteen = {
            name: torch.stack([g.roll(k, 0) for k in range(16)]) for name, g in gradients.items()
        }  # sixteen different queries of the same size
        stacked = ct.influence.engine.StackedReadout(self.sites, sixteen)
        directions = self.many_directions(256)

        def exact_256():
            with tempfile.TemporaryDirectory() as folder:
                atlas = ct.build_atlas(
                    self.lm,
                    self.query_examples,
                    self.data,
                    self.layer,
                    folder=folder,
                    curvature=self.curvature,
                    token_budget=self.args.token_budget,
                    progress=False,
                )
                return atlas.score_many(directions)

        scores = exact_256()
        checks = [
            spearmanr(
                scores[:, k],
                self.influence(
                    concept=ct.tensor_concept(directions[k], self.layer, lm=self.lm, name="random")
                )
                .score(self.data, progress=False, token_budget=self.args.token_budget)
                .scores,
            ).statistic
            for k in (0, 255)
        ]
        self.result["agreement"]["queries_256_spearman_to_exact"] = min(checks)
        seconds = take_turns(
            self.args.rounds,
            one_query=one,
            queries_16_stacked=lambda: shared_pass(
                self.lm, self.data, {"s": stacked}, progress=False, token_budget=self.args.token_budget
            ),
            queries_256=exact_256,
        )
        self.result["ratios"]["queries_256_vs_1"] = ratio(seconds, "queries_256", "one_query")
        self.result["ratios"]["queries_16_stacked_vs_1"] = ratio(seconds, "queries_16_stacked", "one_query")
        self.result["seconds"]["queries"] = seconds

    def atlas(self):
        """The exact atlas: build, agreement with Concept Influence on directions it was not made for, and the
        price of a question afterwards; --ranks adds two-sided bases."""
        acts = ct.pooled_activations(self.lm, self.train, self.layer, progress=False)[self.layer]
        unseen, folder, builds = (
            ct.concepts.concept.random_directions(acts, 4, seed=1234),
            tempfile.mkdtemp(),
            {},
        )
        exact = lambda concept: (
            self.influence(concept=concept)
            .score(self.data, progress=False, token_budget=self.args.token_budget)
            .scores
        )
        truth = [
            exact(self.concept),
            *(exact(ct.tensor_concept(v, self.layer, lm=self.lm, name="random")) for v in unseen),
        ]
        for name, rank in [("exact", None), *((f"rank_{rank}", rank) for rank in self.args.ranks)]:
            builds[name] = lambda rank=rank: ct.build_atlas(
                self.lm,
                self.query_examples,
                self.data,
                self.layer,
                folder=tempfile.mkdtemp(dir=folder),
                rank=rank,
                sample=0,
                curvature=self.curvature,
                activations=acts if rank else None,
                token_budget=self.args.token_budget,
                progress=False,
            )
            atlas = builds[name]()
            answers = atlas.score_many(torch.cat([self.concept.direction[None], unseen]))
            agreement = [spearmanr(answers[:, k], truth[k]).statistic for k in range(len(truth))]
            self.result["agreement"][f"atlas_{name}"] = dict(
                spearman_concept=agreement[0], spearman_random=statistics.mean(agreement[1:])
            )
            if rank is None:
                self.result["agreement"] |= dict(
                    atlas_spearman_concept=agreement[0], atlas_spearman_random=statistics.mean(agreement[1:])
                )
                start = time.perf_counter()
                for _ in range(100):
                    atlas.score_many(self.concept.direction[None])
                answer_seconds = (time.perf_counter() - start) / 100
        seconds = take_turns(self.args.rounds, one_query=self.pass_seconds(self.influence()), **builds)
        self.result["ratios"]["atlas_build_vs_1"] = ratio(seconds, "exact", "one_query")
        for rank in self.args.ranks:
            self.result["ratios"][f"atlas_build_rank_{rank}_vs_1"] = ratio(
                seconds, f"rank_{rank}", "one_query"
            )
        self.result["ratios"]["atlas_query_speedup"] = (
            statistics.median(seconds["one_query"]) / answer_seconds
        )
        self.result["seconds"]["atlas"] = seconds

    def cascade(self):
        """Cheap first, exact for the picked: recall of the exact top 10 against the cost, for several first
        stages."""
        first = {
            "Vector Filter": ct.VectorFilter(self.lm, self.concept),
            "Activation Gradient": ct.ActivationGradient(self.lm, self.concept),
            "RepSim": ct.RepSim(self.lm, self.query_examples, layer=self.layer),
            "Loss": ct.MeanLoss(self.lm),
            "upper sites": ct.influence.scorers.Influence(
                self.lm,
                ct.influence.queries.ConceptQuery(self.concept, self.query_examples),
                sites=[s for s in self.sites if s.block >= self.layer // 2],
                curvature=self.curvature,
                method="upper sites",
            ),
        }
        exact = ct.ConceptInfluence(self.lm, self.concept, self.query_examples, curvature=self.curvature)
        results = ct.score_together(
            [*first.values(), exact], self.data, token_budget=self.args.token_budget, progress=False
        )
        scores = {name: results[scorer.method].scores for name, scorer in first.items()}
        standard = lambda x: (x - x.mean()) / x.std()
        scores["Vector Filter + RepSim"] = standard(scores["Vector Filter"]) + standard(scores["RepSim"])
        half = None if self.skips_bf16() else self.half_pass()()
        if half is not None:
            scores["Concept Influence in bf16"] = half.scores[:, 0]
        exact_scores = results["Concept Influence"].scores
        top = set(np.argsort(-exact_scores)[:10].tolist())
        unit = results["Vector Filter"].card.cost.seconds
        cost = {name: results[first[name].method].card.cost.seconds / unit for name in first} | {
            "Vector Filter + RepSim": 1.0
        }
        if half is not None:
            cost["Concept Influence in bf16"] = half.seconds / unit
        exact_cost = results["Concept Influence"].card.cost.seconds / unit
        curve = []
        for name, values in scores.items():
            order = np.argsort(-values).tolist()
            for keep in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8):
                curve.append(
                    dict(
                        first_stage=name,
                        keep=keep,
                        cost=cost[name] + keep * exact_cost,
                        recall_top10=len(top & set(order[: round(keep * len(order))])) / len(top),
                        spearman_first_stage=spearmanr(values, exact_scores).statistic,
                    )
                )
        self.result["cascade_curve"] = curve
        affordable = max(
            (point for point in curve if point["cost"] <= 2.5),
            key=lambda point: (point["recall_top10"], -point["cost"]),
        )
        enough = min(
            (point for point in curve if point["recall_top10"] >= 0.9),
            key=lambda point: point["cost"],
            default=None,
        )
        (
            self.result["ratios"]["cascade_vs_vector_filter"],
            self.result["agreement"]["cascade_recall_top10"],
        ) = affordable["cost"], affordable["recall_top10"]
        self.result["notes"].append(
            f"cascade: best affordable first stage {affordable['first_stage']} keeping "
            f"{affordable['keep']:.0%}; recall 0.9 costs "
            + (
                f"{enough['cost']:.2f} Vector Filters ({enough['first_stage']}, keep {enough['keep']:.0%})"
                if enough
                else "more than any point of the curve"
            )
        )

    def run(self):
        "Measure the chosen sections in turn; what was measured is saved after each."
        chosen = self.args.only or SECTIONS
        for name in chosen:
            print(f"\n{name}: {getattr(self, name).__doc__}", flush=True)
            start = time.perf_counter()
            getattr(self, name)()
            print(f"    ({time.perf_counter() - start:.0f} s)", flush=True)
            self.save()

    def save(self):
        "Everything measured so far, with the machine and the versions it was measured on, as one JSON."
        machine = dict(
            cpu=next(
                (
                    line.split(":")[1].strip()
                    for line in open("/proc/cpuinfo")
                    if line.startswith("model name")
                ),
                platform.processor(),
            )
            if os.path.exists("/proc/cpuinfo")
            else platform.processor(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            memory_gb=round(psutil.virtual_memory().total / 2**30),
            load=os.getloadavg()[0],
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        )
        self.result["setting"] = dict(
            model=self.args.model,
            model_fingerprint=self.lm.fingerprint,
            dtype=str(self.lm.dtype),
            layer=self.layer,
            n_layers=self.lm.n_layers,
            sites="attention",
            n_sites=len(self.sites),
            examples=len(self.data),
            tokens=int(self.data.n_tokens),
            data=self.train.name,
            data_fingerprint=self.data.fingerprint,
            rounds=self.args.rounds,
            token_budget=self.args.token_budget,
            torch=torch.__version__,
            concept_tda=ct.foundation.storage.code_version(),
            machine=machine,
            date=time.strftime("%Y-%m-%d"),
        )
        if self.args.out:
            with ct.foundation.storage.atomic_file(self.args.out) as part:
                part.write_text(json.dumps(self.result, indent=1, default=float))

    def table(self):
        "Print what was measured as Markdown."
        print("\n| number | value |\n|---|---|")
        for group in ("ratios", "agreement", "memory"):
            for name, value in self.result[group].items():
                values = value.items() if isinstance(value, dict) else [("", value)]
                for key, number in values:
                    print(f"| {name}{' ' + key if key else ''} | {number:.4g} |")
        print(
            f"| FLOP floor of ci_vs_vector_filter | "
            f"{self.result['floor'].get('ci_vs_vector_filter', float('nan')):.3g} |"
        )
        for name, value in self.result["floor"].get("fraction_of_peak", {}).items():
            print(f"| fraction of matmul peak, {name} | {value:.2f} |")
        for note in self.result["notes"]:
            print(f"* {note}")


def main():
    "Read the command line and measure."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="anything load_model opens")
    parser.add_argument("--device", default=None)
    parser.add_argument("--layer", type=int, default=20)
    parser.add_argument("--examples", type=int, default=64, help="examples of the bundled data to score")
    parser.add_argument("--fit-examples", type=int, default=12, help="examples EK-FAC is fitted on")
    parser.add_argument("--token-budget", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="*",
        default=[],
        help="also build atlases with two-sided bases of these ranks (minutes each)",
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak-of", help="only print the memory one fit adds (used by the script itself)")
    bench = Bench(parser.parse_args())
    if bench.args.peak_of:
        return bench.fits()
    bench.run()
    bench.table()


if __name__ == "__main__":
    main()
