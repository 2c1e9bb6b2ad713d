"""Tiny random models and tokenizers for tests. They are the library's own, `concept_tda.model.tiny`.

from tiny import tiny_model, tiny_tokenizer, tiny_pair, FAMILIES

model = tiny_model("llama", dtype=torch.float64)   # two layers, width 16, ready for autograd
tokenizer = tiny_tokenizer()                       # byte-level, ChatML, 280 tokens
model, tokenizer = tiny_pair("gpt2", n_layers=3)
"""

import torch

from concept_tda.data.templates import chat_template_text
from concept_tda.model.tiny import FAMILIES, tiny_model, tiny_pair, tiny_tokenizer

__all__ = ["CHATML", "FAMILIES", "SPECIAL", "double_norms", "tiny_model", "tiny_pair", "tiny_tokenizer"]

CHATML = chat_template_text("chatml")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def double_norms(model):
    """transformers' RMS norms compute in float32 whatever the model's precision; an oracle to the last digits
    needs float64 throughout."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind not in ("LlamaRMSNorm", "GemmaRMSNorm"):
            continue
        eps = module.variance_epsilon if kind == "LlamaRMSNorm" else module.eps
        norm = torch.nn.RMSNorm(len(module.weight), eps=eps, dtype=torch.float64)
        norm.weight = module.weight if kind == "LlamaRMSNorm" else torch.nn.Parameter(1 + module.weight)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, norm)
    return model
