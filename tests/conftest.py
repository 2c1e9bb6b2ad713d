"""Settings shared by all tests. The user's CONCEPT_TDA_CACHE is left as it is."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each process of tests and for what it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tiny import tiny_pair


@pytest.fixture(scope="session")
def tiny_lm():
    """A tiny random float32 Llama and its tokenizer as `(model, tokenizer)`; shared, so leave it as you found
    it."""
    return tiny_pair("llama", dtype=torch.float32)
