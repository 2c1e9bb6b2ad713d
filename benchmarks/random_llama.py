"""Writes a Llama of random weights, for measurements of speed on a machine that can fetch no model.

    python benchmarks/random_llama.py 135m FOLDER

Speed and memory do not depend on what the weights are; scores, agreement and everything else do. The
tokenizer takes a token for each byte, so texts are about four times as long as with a trained one.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from concept_tda.model.tiny import tiny_tokenizer

SIZES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4),
    "135m": dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32),
}
KEY_VALUE_HEADS = {"tiny": 2, "135m": 3, "1b": 8}


def main():
    "Write model and tokenizer as a folder that load_model opens."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder")
    parser.add_argument("--vocabulary", type=int, default=49152)
    args = parser.parse_args()
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES[args.size],
        num_key_value_heads=KEY_VALUE_HEADS[args.size],
        vocab_size=args.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)


if __name__ == "__main__":
    main()
