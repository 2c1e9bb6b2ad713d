"""Sequences and models of Formulas §13, for `circuits.py` and the tests: half of the sequences repeat
distinct tokens at a random period, half are sparse bigram text. Copying takes an induction head, so two
layers learn it and one does not. The tutorial on induction heads writes the same out; a test holds the two
together."""

import numpy as np
import torch
from transformers import GPT2Config

from concept_tda.data.documents import token_windows

VOCABULARY, LENGTH, PERIODS = 64, 32, (4, 17)
FOLLOW = np.random.default_rng(123).integers(0, VOCABULARY, (VOCABULARY, 4))


def repeat(random):
    """Distinct tokens over and over, and after how many they come again."""
    period = int(random.integers(*PERIODS))
    return np.resize(random.choice(VOCABULARY, period, replace=False), LENGTH), period


def bigram(random):
    """Text of a sparse table: each token is followed by one of four."""
    row = [int(random.integers(VOCABULARY))]
    while len(row) < LENGTH:
        row.append(int(FOLLOW[row[-1], random.integers(4)]))
    return np.array(row)


def windows(rows, known, name):
    """Rows of token ids as windows."""
    return token_windows([torch.from_numpy(row) for row in rows], metadata=known, name=name)


def mixture(n, seed):
    """Half repeats of distinct tokens with a random period of 4 to 16, half bigram text."""
    random, rows, known = np.random.default_rng(seed), [], []
    for _ in range(n):
        if random.random() < 0.5:
            row, period = repeat(random)
            known.append({"kind": "repeat", "period": period})
        else:
            row = bigram(random)
            known.append({"kind": "bigram"})
        rows.append(row)
    return windows(rows, known, "repeats and bigrams")


def config(n_layers):
    """Four heads of width 16, a small MLP, learned positions, layer norms; attention that can be read."""
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=n_layers,
        n_head=4,
        n_inner=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
