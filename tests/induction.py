"""The small reproduction of Formulas §13, from the benchmark that measures it."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from repeats import config, mixture, repeat

__all__ = ["config", "copy_accuracy", "mixture"]


def copy_accuracy(lm, n: int = 64, seed: int = 99) -> float:
    """Share of the tokens after the first repeat that the model foretells, on fresh repeats."""
    random = np.random.default_rng(seed)
    drawn = [repeat(random) for _ in range(n)]
    ids = torch.from_numpy(np.stack([row for row, _ in drawn])).to(lm.device)
    with torch.no_grad():
        said = lm.model(ids).logits.argmax(-1)
    right = (said[:, :-1] == ids[:, 1:]).float()
    return float(np.mean([right[row, period:].mean().item() for row, (_, period) in enumerate(drawn)]))
