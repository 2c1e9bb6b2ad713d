"""Tiny random models and tokenizers for tests: built in memory, no network, a few milliseconds each.

    from tiny import tiny_model, tiny_tokenizer, tiny_pair, FAMILIES

    model = tiny_model("llama", dtype=torch.float64)   # two layers, width 16, ready for autograd
    tokenizer = tiny_tokenizer()                       # byte-level, ChatML, 280 tokens
    model, tokenizer = tiny_pair("gpt2", n_layers=3)

Weights are random with a fixed seed, norm weights and biases included, so that no two layers
behave alike by accident and a forgotten factor shows.
"""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = (
    "system",
    "user",
    "assistant",
    "the",
    "yes",
    "no",
)  # a few merges, so that tokens are not all single bytes
FAMILIES = ("llama", "llama-tied", "qwen2", "gemma", "mistral", "gpt_neox", "gpt2")


def tiny_tokenizer(chat_template: str | None = CHATML, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level fast tokenizer that reads any text back exactly; `bos=True` puts `<|endoftext|>` before
    every text the way Llama tokenizers do; `chat_template=None` gives a tokenizer without a template."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    merges = []
    for word in WORDS:
        piece = word[0]
        for letter in word[1:]:
            if (piece, letter) not in merges:
                merges.append((piece, letter))
            piece += letter
            vocabulary.setdefault(piece, len(vocabulary))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=SPECIAL[0],
        eos_token="<|im_end|>",
        pad_token=SPECIAL[0],
        padding_side="right",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(
    family: str = "llama",
    *,
    n_layers: int = 2,
    width: int = 16,
    vocab_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    tied: bool | None = None,
    seed: int = 0,
    attention: str = "sdpa",
):
    """A random model of one of `FAMILIES` in eval mode.

    Four query heads; Llama, Qwen2 and Mistral share two key/value heads (grouped-query attention), Gemma one.
    Mistral's sliding window is longer than any test text. "llama-tied", Gemma and GPT-2 tie the embeddings.
    """
    vocab_size = vocab_size or len(tiny_tokenizer())
    gated = dict(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        attn_implementation=attention,
    )
    if family == "llama-tied":
        family, tied = "llama", True if tied is None else tied
    if tied is None:
        tied = family in ("gemma", "gpt2")
    gated["tie_word_embeddings"] = tied
    if family == "llama":
        config, kind = LlamaConfig(**gated), LlamaForCausalLM
    elif family == "qwen2":
        config, kind = Qwen2Config(**gated), Qwen2ForCausalLM
    elif family == "mistral":
        config, kind = MistralConfig(**gated, sliding_window=4096), MistralForCausalLM
    elif family == "gemma":
        config = GemmaConfig(**{**gated, "num_key_value_heads": 1, "head_dim": width // 4})
        kind = GemmaForCausalLM
    elif family == "gpt_neox":
        config = GPTNeoXConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            max_position_embeddings=4096,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=tied,
            attn_implementation=attention,
        )
        kind = GPTNeoXForCausalLM
    elif family == "gpt2":
        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=width,
            n_inner=2 * width,
            n_layer=n_layers,
            n_head=4,
            n_positions=4096,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=tied,
            attn_implementation=attention,
        )
        kind = GPT2LMHeadModel
    else:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        model = kind(config)  # the caller's random state stays as it was
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # drawn in float64, then cast: the same weights in every dtype
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 2:
                value = noise / parameter.shape[-1] ** 0.5
            else:
                value = 0.1 * noise + (1.0 if name.endswith("weight") and family != "gemma" else 0.0)
            parameter.data = value.to(dtype)
    model.to(dtype)
    model.tie_weights()
    # generate() must not sample or stop by surprise
    model.generation_config.do_sample = False
    return model.eval()


def tiny_pair(family: str = "llama", **options):
    """`(tiny_model(family, **options), tiny_tokenizer())`"""
    tokenizer = tiny_tokenizer()
    return tiny_model(family, vocab_size=len(tokenizer), **options), tokenizer


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
