"""Many processes, streams and plans: equal to one process, at what efficiency, in what memory, at what price.

    python benchmarks/scale.py --out benchmarks/results/scale.json
    python benchmarks/scale.py --only memory --rows 10000 1000000 --out scale.json

Sections: `equal` (two and three processes against one in float64), `kills` (two processes of which one is
killed with kill -9 at random moments, `--kills` times, against one), `efficiency` (the same scoring by one
process and by two, one thread each), `memory` (peak of a fresh process that streams so many rows through a
tiny model), `plan` (CPU seconds a token predicted from the configuration alone against the same model run
whole, from 0.4 to 135 million weights). The keys of a section replace those of the same name in the file;
others, such as those of servers, stay as they are.

What would make a number wrong: another process on the machine, for `efficiency` most of all (the load is
written beside it). `plan` compares CPU seconds of one thread, which others disturb less.
"""

import argparse
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig

from concept_tda.concepts.concept import tensor_concept
from concept_tda.data.conversations import load_conversations
from concept_tda.data.documents import token_windows
from concept_tda.foundation.processes import in_processes, rank, wait_for_all
from concept_tda.influence.atlas import build_index
from concept_tda.influence.curvature import EKFAC
from concept_tda.influence.engine import DirectionReadout, shared_pass
from concept_tda.influence.pricing import seconds_per_token
from concept_tda.influence.scorers import ConceptInfluence, VectorFilter, score_together
from concept_tda.influence.streaming import score_stream
from concept_tda.model.loading import load_model
from concept_tda.model.sites import resolve_sites
from concept_tda.model.tiny import tiny_pair

SECTIONS = ("equal", "kills", "efficiency", "memory", "plan")


def records(n):
    """Short questions and answers, all different."""
    for i in range(n):
        yield {"prompt": f"{i} + {i + 1}?", "response": "so " * (i % 7) + f"{2 * i + 1}."}


def setting(dtype=torch.float64, **shape):
    """A tiny model, a direction at its first layer, and examples."""
    torch.set_num_threads(1)
    lm = load_model(tiny_pair("llama", **({"n_layers": 2, "width": 16} | shape), dtype=dtype))
    direction = torch.randn(lm.width, generator=torch.Generator().manual_seed(0))
    return lm, tensor_concept(direction, 1, name="planted", lm=lm)


def die_some_time(folder, kills, seed):
    """This process kills itself at a random moment, until `kills` have died in all."""
    died = len(list(Path(folder).glob("killed-*")))
    draws = random.Random(f"{seed} {died}")
    unlucky, delay = draws.randrange(2), draws.uniform(0, 1.5)
    if died >= kills or rank() != unlucky:
        return

    def die():
        time.sleep(delay)
        (Path(folder) / f"killed-{died}").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=die, daemon=True).start()


def shared_work(folder, n_examples=400, kills=0, seed=0):
    """EK-FAC, scores, an index and a stream in float64; arrays of what came out."""
    if kills:
        die_some_time(folder, kills, seed)
    lm, concept = setting()
    data, quiet = load_conversations(list(records(n_examples))), dict(progress=False)
    fitted = EKFAC.fit(lm, data, layer=1, memory_budget=2**20, **quiet)
    scorers = [ConceptInfluence(lm, concept, data[:3], curvature=fitted), VectorFilter(lm, concept)]
    found = {name: f.eigenvalues.numpy() for name, f in fitted.factors.items()}
    scores = score_together(scorers, data, token_budget=200, tokens=True, **quiet)
    found |= {method: result.scores for method, result in scores.items()}
    index = build_index(lm, data, folder=Path(folder) / "index", rank=4, sample=8, token_budget=200, **quiet)
    streamed = score_stream(scorers, records(n_examples), Path(folder) / "s", part_examples=50, **quiet)
    parts = [part["checksum"] for part in streamed.manifest["parts"]]
    return found | {"index": np.array(index.rows), "parts": np.array(parts)}


def differences(one, other):
    """How many arrays are not the same to the last bit."""
    assert one.keys() == other.keys()
    return sum(not np.array_equal(one[name], other[name]) for name in one)


def fresh(name):
    """An empty folder, and an empty cache for whatever is started from here."""
    place = Path(tempfile.mkdtemp(prefix=name))
    os.environ["CONCEPT_TDA_CACHE"] = str(place / "cache")
    return place


def equal(args):
    """Bitwise equality of two and three processes with one."""
    import scale

    alone = shared_work(fresh("one"))
    found = [in_processes(scale.shared_work, fresh(f"{n}-"), num_processes=n) for n in (2, 3)]
    return {"equal_fp64": all(differences(alone, other) == 0 for other in found)}


def kills(args):
    """What kills at random moments change."""
    import scale

    alone, place = shared_work(fresh("one")), fresh("killed")
    options = dict(num_processes=2, restarts=3 * args.kills + 3)
    killed = in_processes(scale.shared_work, place, kills=args.kills, seed=args.seed, **options)
    died = len(list(place.glob("killed-*")))
    return {"ranks_killed": died, "differences": differences(alone, killed)}


def timed_scoring(rounds, n_examples=960):
    """Wall and CPU seconds of scoring the same examples several times, each time anew. Every process
    reads all examples and asks the query by itself, so a job has to be large enough for these to be small."""
    lm, concept = setting(torch.float32, n_layers=6, width=256)
    data = load_conversations(list(records(n_examples)))
    scorer, found = ConceptInfluence(lm, concept, data[:2], curvature="identity"), []
    scorer.score(data[:8], progress=False)
    for _ in range(rounds):
        wait_for_all()
        start, cpu = time.perf_counter(), time.process_time()
        scorer.score(data, progress=False)
        found.append((time.perf_counter() - start, time.process_time() - cpu))
    return found


def efficiency(args):
    """t(1)/(2 t(2)), medians, each with one thread; by the clock and, for a busy machine, by CPU time."""
    import scale

    torch.set_num_threads(1)
    fresh("speed")
    one, two = timed_scoring(args.rounds), in_processes(scale.timed_scoring, args.rounds, num_processes=2)
    wall, cpu = (np.median(one, axis=0) / (2 * np.median(two, axis=0))).tolist()
    return {
        "efficiency_2": round(wall, 3),
        "efficiency_2_cpu": round(cpu, 3),
        "efficiency_seconds": {"1": [round(s, 2) for s, _ in one], "2": [round(s, 2) for s, _ in two]},
        "efficiency_load": [round(load, 1) for load in os.getloadavg()],
    }


def streamed_memory(n):
    """Peak GiB of this process after streaming n rows, and seconds."""
    lm, concept = setting(torch.float32, n_layers=1)
    start = time.process_time()
    folder = score_stream(
        [VectorFilter(lm, concept)],
        records(n),
        fresh("rows") / "s",
        part_examples=2000,
        token_budget=8192,
        progress=False,
    )
    folder.top(10), folder.histogram()
    assert len(folder) == n
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, time.process_time() - start


def memory(args):
    """Peaks of fresh processes."""
    found, seconds = {}, {}
    for n in args.rows:
        name = f"{n // 10**6}m" if n >= 10**6 else f"{n // 1000}k"
        line = f"import json, scale; print(json.dumps(scale.streamed_memory({n})))"
        said = subprocess.run([sys.executable, "-c", line], check=True, capture_output=True, text=True).stdout
        peak, spent = json.loads(said.splitlines()[-1])
        found[name], seconds[name] = round(peak, 3), round(spent, 1)
    return {"memory_gb": found, "memory_cpu_seconds": seconds}


SHAPES = [(64, 4, 2), (128, 6, 2), (256, 8, 4), (384, 12, 6), (576, 30, 9)]


def measured(config, method, T, token_budget):
    """CPU seconds a token of the whole model, through the pass that scoring uses."""
    from transformers import AutoModelForCausalLM

    from concept_tda.data.documents import number_tokenizer

    torch.manual_seed(0)
    lm = load_model((AutoModelForCausalLM.from_config(config).eval(), number_tokenizer(config.vocab_size)))
    n = 3 * max(1, token_budget // T)  # a job of three blocks: what a job does once is not its price
    generator = torch.Generator().manual_seed(1)
    data = lm.tokenize(token_windows(torch.randint(config.vocab_size, (n, T), generator=generator)))
    if method == "influence":
        sites = resolve_sites(lm, "attention")
        readout = DirectionReadout(sites, {s.name: torch.randn_like(s.weight) for s in sites})
    else:
        concept = tensor_concept(torch.randn(lm.width), lm.n_layers, name="any", lm=lm)
        readout = VectorFilter(lm, concept).prepare(data)
    parts, least = (data.select(range(n // 3)), data), [np.inf, np.inf]
    for _ in range(3):
        for which, part in enumerate(parts):
            start = time.process_time()
            shared_pass(lm, part, {method: readout}, token_budget=token_budget, progress=False)
            least[which] = min(least[which], time.process_time() - start)
    return (least[1] - least[0]) / (parts[1].n_tokens - parts[0].n_tokens)


def plan(args):
    """Prediction from the configuration against the whole model."""
    torch.set_num_threads(1)
    fresh("plan")
    T, token_budget, rows = 128, 512, []
    for width, layers, heads in SHAPES:
        config = LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads if width < 576 else 3,
            intermediate_size=width * 8 // 3,
            vocab_size=49152 if width >= 384 else 4096,
            tie_word_embeddings=True,
        )
        for method in ("reading", "influence"):
            predicted = seconds_per_token(
                config, method, tokens_per_example=T, response=1.0, token_budget=token_budget
            )
            truth = measured(config, method, T, token_budget)
            rows.append(
                {
                    "width": width,
                    "layers": layers,
                    "method": method,
                    "predicted": predicted,
                    "measured": truth,
                }
            )
            print(rows[-1], round(predicted / truth - 1, 3), flush=True)
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    return {
        "plan_error_max": round(max(errors), 3),
        "plan_error_median": round(float(np.median(errors)), 3),
        "plan": rows,
    }


def main():
    """The sections that are asked for, each written as it is done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    here = str(Path(__file__).resolve().parent)
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for section in args.only:
        start = time.perf_counter()
        found |= {"equal": equal, "kills": kills, "efficiency": efficiency, "memory": memory, "plan": plan}[
            section
        ](args)
        found[f"{section}_wall_seconds"] = round(time.perf_counter() - start, 1)
        found["machine"] = {
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        print(section, json.dumps({key: found[key] for key in found if key != "plan"}), flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
