"""Small tokenizers that carry the chat templates of well-known models, with the special tokens those
templates write.

The templates lie in tests/templates and are our own renditions of what the models' templates produce. Two
kinds of tokenizer occur in the wild: byte-level (SmolLM2, Qwen, Llama 3) and SentencePiece-like with `▁` for
a blank and bytes for unknown characters (Gemma, Mistral, Llama 2)."""

from functools import lru_cache
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CORPUS = [
    "The kettle is on, and the answer to your question is yes.",
    "No, I would not say that the moon is made of cheese.",
    "user assistant system model INST SYS Why is that? Because the evidence says so.",
    "Answer briefly. Yes. Hello there, how are you?",
] * 4
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# name: (kind, special tokens, bos, eos, does the tokenizer itself add bos?, end of an assistant turn)
FAMILIES = {
    "smollm2": ("bytes", CHATML, "<|im_start|>", "<|im_end|>", False, "<|im_end|>"),
    "qwen2.5": ("bytes", CHATML, None, "<|im_end|>", False, "<|im_end|>"),
    "thinking": ("bytes", CHATML, None, "<|im_end|>", False, "<|im_end|>"),
    "llama3": (
        "bytes",
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        True,
        "<|eot_id|>",
    ),
    "llama3.1": (
        "bytes",
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        "<|begin_of_text|>",
        "<|eot_id|>",
        True,
        "<|eot_id|>",
    ),
    "gemma": (
        "pieces",
        ["<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>",
        "<eos>",
        True,
        "<end_of_turn>",
    ),
    "mistral-v0.1": ("prefixed pieces", ["<unk>", "<s>", "</s>"], "<s>", "</s>", True, "</s>"),
    "mistral-v0.3": ("pieces", ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>", True, "</s>"),
    "llama2": ("prefixed pieces", ["<unk>", "<s>", "</s>"], "<s>", "</s>", True, " </s>"),
}


@lru_cache
def _core(kind, special):
    """A trained BPE of one kind."""
    tokens = list(special)
    if kind == "bytes":
        core, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
        core.pre_tokenizer, core.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
    else:
        core, alphabet = (
            Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>")),
            [chr(i) for i in range(33, 127)] + ["▁", "\n"],
        )
        blank = [normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁")] * (kind == "prefixed pieces") + blank
        )
        core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        strip = [decoders.Strip(" ", left=1, right=0)] if kind == "prefixed pieces" else []
        core.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        tokens += [token for token in ["<unk>"] if token not in tokens] + [
            f"<0x{byte:02X}>" for byte in range(256)
        ]
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if (
        kind != "bytes"
    ):  # the byte tokens are vocabulary, not special: text that spells "<0x41>" is not a byte
        import json

        description = json.loads(core.to_str())
        description["added_tokens"] = [
            token for token in description["added_tokens"] if not token["content"].startswith("<0x")
        ]
        core = Tokenizer.from_str(json.dumps(description))
    return core.to_str()


def chat_tokenizer(family, *, template=True, trim_offsets=False):
    """The tokenizer of one of `FAMILIES`; `template` may be the text of another template, or None for none at
    all."""
    kind, special, bos, eos, adds_bos, _ = FAMILIES[family]
    core = Tokenizer.from_str(_core(kind, tuple(special)))
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    elif trim_offsets:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=special[0],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [AddedToken(token, special=True, normalized=False) for token in special]}
    )
    if template is True:
        template = (TEMPLATES / f"{family}.jinja").read_text()
    if template:
        tokenizer.chat_template = template
    return tokenizer
