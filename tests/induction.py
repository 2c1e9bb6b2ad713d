"""The small reproduction of Formulas §13: sequences of which half repeat distinct tokens at a random period,
half are sparse bigram text. Copying takes an induction head, so two layers learn it and one does not."""

import numpy as np
import torch
from transformers import GPT2Config

from concept_tda.data.documents import Windows, token_windows

VOCABULARY, LENGTH, PERIODS = 64, 32, (4, 16)


def repeat(random: np.random.Generator) -> tuple[np.ndarray, int]:
    """Distinct tokens, repeated to the full length, and after how many they come again."""
    period = int(random.integers(PERIODS[0], PERIODS[1] + 1))
    return np.resize(random.choice(VOCABULARY, period, replace=False), LENGTH), period


def sequences(n: int, share: float = 0.5, seed: int = 0) -> Windows:
    """`n` sequences, a `share` of them repeats; metadata: repeats, period."""
    random = np.random.default_rng(seed)
    followers = np.stack([random.choice(VOCABULARY, 4, replace=False) for _ in range(VOCABULARY)])
    ids, known = np.empty((n, LENGTH), np.int64), []
    for row in range(n):
        period = 0
        if random.random() < share:
            ids[row], period = repeat(random)
        else:
            ids[row, 0] = random.integers(VOCABULARY)
            for place, choice in enumerate(random.integers(4, size=LENGTH - 1)):
                ids[row, place + 1] = followers[ids[row, place], choice]
        known.append({"repeats": period > 0, "period": period})
    return token_windows(torch.from_numpy(ids), metadata=known, name="random periods")


def config(n_layers: int) -> GPT2Config:
    """Four heads of width 16, learned positions, layer norms."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=n_layers,
        n_head=4,
        n_inner=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
    )


def copy_accuracy(lm, n: int = 64, seed: int = 99) -> float:
    """Share of the tokens after the first repeat that the model foretells, on fresh repeats."""
    random = np.random.default_rng(seed)
    drawn = [repeat(random) for _ in range(n)]
    ids = torch.from_numpy(np.stack([row for row, _ in drawn])).to(lm.device)
    with torch.no_grad():
        said = lm.model(ids).logits.argmax(-1)
    right = (said[:, :-1] == ids[:, 1:]).float()
    return float(np.mean([right[row, period:].mean().item() for row, (_, period) in enumerate(drawn)]))
