"""doctor() finds each illness it knows, says how grave it is, and shows one example as the model reads it."""

import html
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from concept_tda.data.conversations import load_conversations
from concept_tda.data.messages import ConversationError
from concept_tda.foundation.errors import ConceptTDAError
from concept_tda.foundation.probes import ProbeError
from concept_tda.influence import doctor as room
from concept_tda.influence.doctor import SEVERITIES, Check, Diagnosis, DoctorError, doctor
from concept_tda.model.loading import LanguageModel, LayerError, load_model

from chromium import Chromium, needs_browser
from tiny import CHATML, tiny_model, tiny_pair, tiny_tokenizer

END = "<|im_end|>"


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """A machine on which bfloat16 is fast, whatever this one is; a test about slow ones says so."""
    monkeypatch.setattr(room, "bfloat16_ratio", lambda device: 0.5)


@pytest.fixture(scope="module")
def train():
    return load_conversations(
        [{"prompt": f"Is {i} larger?", "response": "No. " * (1 + i % 5)} for i in range(30)]
    )


@pytest.fixture
def folder(tmp_path):
    for part in tiny_pair("llama"):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def severities(diagnosis):
    return {check.name: check.severity for check in diagnosis.checks}


def check_of(diagnosis, name):
    (found,) = [check for check in diagnosis.checks if check.name == name]
    return found


def test_a_healthy_model(train, folder):
    diagnosis = doctor(load_model(folder), train)
    assert not diagnosis.errors, diagnosis
    assert {"weights", "answers", "BOS", "determinism", "batch invariance", "sites"} <= set(
        severities(diagnosis)
    )
    assert "✓" in repr(diagnosis) and "<table>" in diagnosis._repr_html_()


# ---- severity


def test_findings_have_a_severity_in_text_in_html_and_as_data(train):
    lm = load_model(tiny_pair("llama"))
    data = load_conversations(
        [{"prompt": "a <b>", "response": "b"}] * 2 + [{"prompt": "c", "response": "d " * 50}]
    )
    diagnosis = doctor(lm, data, max_tokens=40, sites="nowhere")
    found = severities(diagnosis)
    assert found["sites"] == "error" and found["length"] == "warning"
    assert found["duplicates"] == "note" and found["weights"] == "ok"
    order = [SEVERITIES.index(check.severity) for check in diagnosis.checks]
    assert order == sorted(order)
    frame = diagnosis.to_pandas()
    assert dict(zip(frame["name"], frame["severity"])) == found
    assert frame["name"][0] == "sites" and "matches no linear layer" in frame["finding"][0]
    lines = repr(diagnosis).splitlines()[: len(diagnosis.checks)]
    assert [line.split()[1] for line in lines] == [check.severity for check in diagnosis.checks]
    page = diagnosis._repr_html_()
    rows = re.findall(r"<tr class='finding (\w+)'><td>. (\w+)</td><td><b>([^<]+)</b>", page)
    assert [row[0] for row in rows] == [row[1] for row in rows]
    assert {name: severity for severity, _, name in rows} == found
    assert "1 error, " in page and [check.name for check in diagnosis.errors] == ["sites"]
    assert "length" in [check.name for check in diagnosis.warnings]
    folded = page.split("checks in order</summary>")[1].split("</details>")[0]
    assert re.findall(r"finding (\w+)", folded) == ["ok"] * list(found.values()).count("ok")


# ---- one example in colour

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is 7 prime?"},
    {"role": "assistant", "content": "No.", "weight": 0},
    {"role": "user", "content": "Sure? <script>alert(1)</script>"},
    {"role": "assistant", "content": "Yes & no."},
]


def stretch_texts(example):
    return [(part, "".join(example.tokens[where])) for part, where in example.stretches]


def test_every_token_of_the_example_is_prompt_answer_or_weight_0(train):
    lm = load_model(tiny_pair("llama"))
    data = load_conversations([{"messages": CHAT}, {"prompt": "Hi", "response": "Hello"}])
    example = doctor(lm, data).example
    text = lm.tokenizer.apply_chat_template([dict(m) for m in data[0].messages], tokenize=False)
    assert example.id == data.ids[0] and "".join(example.tokens) == text
    assert stretch_texts(example) == [
        ("prompt", text[: text.index("No.")]),
        ("weight 0", f"No.{END}"),
        ("prompt", text[text.index("No.") + len(f"No.{END}") : text.index("Yes")]),
        ("answer", f"Yes & no.{END}"),
        ("prompt", "\n"),
    ]
    special = [token for token, marked in zip(example.tokens, example.special) if marked]
    assert special == re.findall(r"<\|im_\w+\|>", text)
    trained = lm.tokenize(data)[0].response_mask.tolist()
    assert [part == "answer" for part in example.parts] == trained
    ids, rows = doctor(lm, data, example=data.ids[1]).example, doctor(lm, data, example=1).example
    assert ids == rows and ("answer", f"Hello{END}") in stretch_texts(ids)
    for wrong in ("no-such-id", 2, 10**9):
        with pytest.raises(ConversationError, match="no-such-id|does not exist"):
            doctor(lm, data, example=wrong)


def test_the_example_of_a_file_that_cannot_be_scored_is_shown(train):
    lm = load_model(tiny_pair("llama"))
    asked = {"messages": [{"role": "user", "content": "Anybody there?"}]}
    spared = {"messages": [CHAT[1], {"role": "assistant", "content": "No.", "train": False}]}
    for first, parts in ((asked, {"prompt"}), (spared, {"prompt", "weight 0"})):
        diagnosis = doctor(lm, load_conversations([first]))
        assert severities(diagnosis)["answers"] == "error"
        assert (
            set(diagnosis.example.parts) == parts
            and diagnosis.example.id in check_of(diagnosis, "answers").finding
        )
    diagnosis = doctor(lm, load_conversations([{"prompt": "a", "response": "b"}, asked]))
    assert severities(diagnosis)["answers"] == "error" and set(diagnosis.example.parts) == {
        "prompt",
        "answer",
    }
    lm.tokenizer.chat_template = None
    diagnosis = doctor(lm, train)
    assert diagnosis.example is None and "chat template" in {check.name for check in diagnosis.errors}
    assert repr(diagnosis) and diagnosis._repr_html_()


def test_the_example_is_cut_where_the_job_would_cut_it_and_begins_as_the_model_does():
    tokenizer = tiny_tokenizer(bos=True)
    lm = load_model((tiny_model("llama"), tokenizer))
    data = load_conversations([{"prompt": "Is it?", "response": "yes " * 60}])
    whole, cut = doctor(lm, data, max_tokens=None).example, doctor(lm, data, max_tokens=50).example
    for example, limit in ((whole, None), (cut, 50)):
        tokens = lm.tokenize(data, max_tokens=limit or 10**6)[0]
        assert len(example.tokens) == len(tokens.input_ids) and example.n_cut == tokens.n_cut
        assert [part == "answer" for part in example.parts] == tokens.response_mask.tolist()
    assert whole.tokens[0] == "<|endoftext|>" and whole.parts[0] == "prompt" and whole.special[0]
    assert f"{cut.n_cut} cut off" in repr(cut) and cut.n_cut > 0


def test_the_example_is_plain_text_in_a_terminal():
    lm = load_model(tiny_pair("llama"))
    evil = "x\x1b[2J\x07\u202e\ttab\nline"
    text = repr(doctor(lm, load_conversations([{"prompt": evil, "response": "yes"}])).example)
    assert not set(text) & set("\x1b\x07\u202e\t") and "t·a·b" in text
    lines = text.splitlines()
    assert [line[:8].strip() for line in lines[1:]] == ["prompt", "answer", "prompt"]
    assert (
        lines[2].split("│ ")[1] == f"yes·⟦{END}⟧" and "⟦<|im_start|>⟧·user·⏎" in lines[1] and "⇥" in lines[1]
    )
    long = doctor(lm, load_conversations([{"prompt": "a", "response": "b" * 1000}])).example
    assert "more tokens" in repr(long) and len(repr(long)) < 2000


def test_the_example_is_escaped_html():
    lm = load_model(tiny_pair("llama"))
    data = load_conversations([{"messages": CHAT}])
    diagnosis = doctor(lm, data)
    for page in (diagnosis._repr_html_(), diagnosis.example._repr_html_()):
        marked = page.split("<div class='marked' dir='auto'>")[1].rpartition("</div>")[0]
        spans = re.findall(r"<span class='([\w -]+)' title='token (\d+): [^']*'>([^<]*)</span>", marked)
        assert len(spans) == len(diagnosis.example.tokens) == marked.count("<span")
        shown = "".join(html.unescape(text).replace("⏎\n", "\n") for _, _, text in spans)
        assert shown == "".join(diagnosis.example.tokens) and "<script" not in page
        kinds = [kind.split(" ")[0].replace("-", " ") for kind, _, _ in spans]
        assert kinds == diagnosis.example.parts
        assert [" framed" in kind for kind, _, _ in spans] == diagnosis.example.special
    lm.placement[:] = ["<img src=x onerror=alert(1)>"]
    assert "<img" not in doctor(lm, data)._repr_html_()


@needs_browser
def test_the_example_can_be_read_in_light_and_dark(tmp_path):
    lm = load_model(tiny_pair("llama"))
    shown = doctor(lm, load_conversations([{"messages": CHAT}]))._repr_html_()
    page = tmp_path / "page.html"
    style = "<style>:root{color-scheme:light dark}</style>"
    page.write_text(f"<!doctype html><meta charset=utf-8>{style}{shown}")
    look = """['prompt', 'answer', 'weight-0'].map(name => {
        const style = getComputedStyle(document.querySelector('.marked .' + name));
        const page = getComputedStyle(document.body).color;
        return [style.color, style.backgroundColor, style.borderBottomStyle, page];
    })"""
    with Chromium() as browser:
        seen = [browser.open(page.as_uri(), width=900, dark=dark).value(look) for dark in (False, True)]
    for prompt, answer, spared in seen:
        assert prompt[0] == answer[0] == spared[0] == prompt[3]  # the page's own colour of text
        assert len({prompt[1], answer[1], spared[1]}) == 3
        assert all(part[1].startswith("rgba(") for part in (prompt, answer, spared))  # translucent
        assert [part[2] for part in (prompt, answer, spared)] == ["none", "solid", "dotted"]
    assert seen[0][0][0] != seen[1][0][0]


# ---- what was placed from where


def test_placement_says_what_came_from_which_file(train, folder, tmp_path):
    found = check_of(doctor(load_model(folder), train), "placement")
    assert found.severity == "ok" and found.finding == f"all 21 weights from {folder}"
    adapted = get_peft_model(load_model(folder).model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    found = check_of(doctor(load_model(folder, adapter=tmp_path / "adapter"), train), "placement")
    assert found.severity == "ok" and "all 21 weights" in found.finding
    assert f"all 8 adapter weights from {tmp_path / 'adapter'}" in found.finding
    for part in tiny_pair("llama-tied"):
        part.save_pretrained(tmp_path / "tied")
    found = check_of(doctor(load_model(tmp_path / "tied"), train), "placement")
    assert "tied: lm_head.weight is model.embed_tokens.weight" in found.finding


def test_placement_says_what_nobody_has_compared(train):
    model, tokenizer = tiny_pair("llama")
    found = check_of(doctor(load_model((model, tokenizer)), train), "placement")
    assert found.severity == "note" and "caller's own" in found.finding and "load_model" in found.advice
    found = check_of(doctor(LanguageModel(model, tokenizer, "mine"), train), "placement")
    assert found.severity == "warning" and "nobody recorded" in found.finding


def test_missing_weights_are_an_error_that_names_them(train):
    lm = load_model(tiny_pair("llama"))
    lm.blocks[1].mlp.up_proj.to("meta")
    diagnosis = doctor(lm, train)
    found = check_of(diagnosis, "placement")
    assert (
        found.severity == "error"
        and "1 weights are missing: model.layers.1.mlp.up_proj.weight" in found.finding
    )
    assert "loss" not in severities(diagnosis)  # it would be that of no model


def test_embeddings_that_say_they_are_tied(train):
    lm = load_model(tiny_pair("llama-tied"))
    assert severities(doctor(lm, train))["tied embeddings"] == "note"
    lm.model.lm_head.weight = torch.nn.Parameter(lm.model.lm_head.weight.detach().clone())
    diagnosis = doctor(lm, train)
    assert severities(diagnosis)["tied embeddings"] == "warning"
    assert "tied:" not in check_of(diagnosis, "placement").finding


# ---- the chat template


def test_the_chat_template_and_where_it_came_from(train, folder, tmp_path):
    def found(**options):
        return check_of(doctor(load_model(folder, **options), train), "chat template")

    mine = CHATML + "{# mine #}"
    ours = doctor(load_model((tiny_model("llama"), tiny_tokenizer(mine))), train)
    finding = check_of(ours, "chat template").finding
    assert finding.startswith("the tokenizer's own; ") and repr(END) in finding
    named = found(chat_template="chatml")
    assert named.severity == "ok" and named.finding.startswith("'chatml', a named one of the library; ")
    own = tmp_path / "own.jinja"
    own.write_text(mine)
    assert found(chat_template=own).finding.startswith(f"the file {own}; ")
    assert found(chat_template=mine).finding.startswith("own text ")
    assert found().finding.startswith("the tokenizer's own (the same text as 'chatml'); ")


def test_a_template_that_is_not_what_was_asked_for_or_never_ends(train, folder):
    lm = load_model(folder, chat_template="chatml")
    lm.tokenizer.chat_template = CHATML.replace("assistant", "helper")
    found = check_of(doctor(lm, train), "chat template")
    assert found.severity == "warning" and "another text by now" in found.finding
    lm = load_model(folder)
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    found = check_of(doctor(lm, train), "chat template")
    assert found.severity == "warning" and "nothing ends an answer" in found.finding
    lm.tokenizer.chat_template = "{{ raise_exception('no') }}"
    diagnosis = doctor(lm, train)
    assert check_of(diagnosis, "chat template").severity == "error" and diagnosis.example is None
    lm.tokenizer.chat_template = None
    found = check_of(doctor(lm, train), "chat template")
    assert found.severity == "error" and "chat_template=…) takes alpaca, chatml" in found.advice


# ---- bfloat16


def test_the_verdict_on_bfloat16_is_the_measured_one(train, monkeypatch):
    full, half = (load_model(tiny_pair("llama", dtype=kind)) for kind in (torch.float32, torch.bfloat16))
    for ratio, lm, severity in (
        (0.5, full, "ok"),
        (0.5, half, "ok"),
        (71.0, full, "note"),
        (71.0, half, "warning"),
    ):
        monkeypatch.setattr(room, "bfloat16_ratio", lambda device, ratio=ratio: ratio)
        found = check_of(doctor(lm, train), "bfloat16")
        assert found.severity == severity and f"{ratio:.2g} times as long as in float32" in found.finding
        assert (severity == "ok") == (not found.advice) and ("float32" in found.advice) == (ratio > 1)
    assert severities(doctor(half, train))["precision"] == "note"

    def nowhere(device):
        raise ProbeError("bfloat16 cannot be measured on device 'abacus'")

    monkeypatch.setattr(room, "bfloat16_ratio", nowhere)
    found = check_of(doctor(full, train), "bfloat16")
    assert found.severity == "note" and "abacus" in found.finding


# ---- coverage


def counted(lm, wanted):
    weights = {n: w for n, w in lm.blocks.named_parameters() if w.ndim > 1 and ".lora_" not in n}
    return sum(w.numel() for n, w in weights.items() if wanted(n)) / sum(w.numel() for w in weights.values())


def test_coverage_is_the_share_of_the_block_weights(train):
    lm = load_model(tiny_pair("llama", n_layers=3))
    for sites, wanted in (
        ("attention", "self_attn"),
        ("mlp", "mlp"),
        ("all-linear", ""),
        (r"q_proj|up_proj", None),
    ):
        inside = (
            (lambda n, wanted=wanted: wanted in n)
            if wanted is not None
            else lambda n: "q_proj" in n or "up_" in n
        )
        found = check_of(doctor(lm, train, sites=sites), "coverage")
        assert f"the sites hold {counted(lm, inside):.0%} of the block weights" in found.finding
        assert found.severity == "ok" and "all linear layers together hold 100%" in found.finding
    below = check_of(doctor(lm, train, layer=1), "coverage").finding
    assert f"hold {counted(lm, lambda n: n.startswith('0.self_attn')):.0%} " in below
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    found = check_of(doctor(load_model((adapted, tiny_tokenizer())), train, sites="lora"), "coverage")
    share = counted(load_model(tiny_pair("llama")), lambda n: "q_proj" in n)
    assert f"the adapters sit on {share:.0%} of the block weights" in found.finding


def test_experts_that_no_site_can_reach_are_named(train):
    tokenizer = tiny_tokenizer()
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    lm = load_model((MixtralForCausalLM(config).eval(), tokenizer))
    found = check_of(doctor(lm, train), "coverage")
    experts = [n for n, w in lm.blocks.named_parameters() if "experts" in n and w.ndim > 2]
    assert experts, "transformers keeps experts as one tensor"
    share = counted(
        lm, lambda n: n not in experts and "router" not in n and not n.endswith("mlp.gate.weight")
    )
    assert found.severity == "warning" and f"layers together hold {share:.0%}" in found.finding
    assert "layers.*.mlp.experts." in found.finding and share < 0.5


def test_sites_that_match_nothing_are_a_finding_and_a_layer_that_is_not_there_an_error(train):
    lm = load_model(tiny_pair("llama"))
    diagnosis = doctor(lm, train, sites="nothing")
    assert severities(diagnosis)["sites"] == "error" and "nothing" in check_of(diagnosis, "sites").finding
    with pytest.raises(LayerError):
        doctor(lm, train, layer=9)
    with pytest.raises(DoctorError, match="a model from load_model, not a tuple"):
        doctor(tiny_pair("llama"), train)


# ---- the illnesses


def test_illnesses_of_the_model(train):
    lm = load_model(tiny_pair("llama", n_layers=3))
    assert severities(doctor(lm, train, layer=1))["sites"] == "note"
    lm.model.train()
    assert severities(doctor(lm, train))["mode"] == "note" and lm.model.training
    lm.model.gradient_checkpointing_enable()
    assert severities(doctor(lm, train))["gradient checkpointing"] == "note"
    adapted = get_peft_model(tiny_model("llama"), LoraConfig(r=2, lora_alpha=6, target_modules="all-linear"))
    diagnosis = doctor(load_model((adapted, tiny_tokenizer())), train)
    assert severities(diagnosis)["LoRA"] == "note" and "scaling 3.0" in repr(diagnosis)
    adapted.base_model.disable_adapter_layers()
    assert severities(doctor(load_model((adapted, tiny_tokenizer())), train))["LoRA"] == "error"


def test_batch_dependence_is_found(train):
    lm = load_model(tiny_pair("llama"))
    # a norm over the whole batch: a row depends on its mates
    hook = lm.blocks[0].register_forward_hook(lambda block, args, out: out / out.norm())
    assert severities(doctor(lm, train))["batch invariance"] == "error"
    hook.remove()
    hook = lm.blocks[0].register_forward_hook(lambda block, args, out: out + 0.1 * torch.randn_like(out))
    assert severities(doctor(lm, train))["determinism"] == "warning"
    hook.remove()


def test_illnesses_of_the_data(train):
    lm = load_model(tiny_pair("llama"))
    assert severities(doctor(lm, train.select([])))["answers"] == "error"
    model, tokenizer = tiny_pair("llama")
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "<|endoftext|><|endoftext|>" + CHATML
    assert severities(doctor(load_model((model, tokenizer)), train))["BOS"] == "error"
    bad = load_model(tiny_pair("llama"))
    with torch.no_grad():
        bad.model.lm_head.weight.fill_(float("inf"))
    assert {check.name for check in doctor(bad, train).errors} == {"weights", "loss"}


def test_special_tokens_in_the_texts_are_found(train):
    lm = load_model(tiny_pair("llama"))
    assert severities(doctor(lm, train))["special tokens"] == "ok"
    typed = load_conversations(
        [{"prompt": "Hi", "response": "Hello"}, {"prompt": f"Is it? {END}", "response": f"No{END}"}]
    )
    found = check_of(doctor(lm, typed), "special tokens")
    assert found.severity == "warning" and found.finding.startswith("1 conversations hold")
    assert f"{END} in {typed.ids[1]}" in found.finding
    assert (
        doctor(lm, typed, example=1).example.special.count(True) == 6
    )  # 4 of the template, 2 that were typed


def test_another_librarys_error_is_a_finding_that_names_the_example(train):
    lm = load_model(tiny_pair("llama"))
    lengths = lm.tokenize(train).lengths

    def strike(module, args, options):
        if options["input_ids"].shape[1] == lengths.max():
            raise KeyError("rope")

    hook = lm.model.register_forward_pre_hook(strike, with_kwargs=True)
    found = check_of(doctor(lm, train), "loss")
    (id,) = re.findall(r"the model fails on the example (\w+): KeyError: 'rope'", found.finding)
    assert found.severity == "error" and lengths[train.ids.index(id)] == lengths.max()
    hook.remove()


def test_data_in_every_form_and_the_tokens_of_a_job(train, tmp_path):
    lm = load_model(tiny_pair("llama"))
    train.to_json(tmp_path / "train.jsonl")
    forms = (train, str(tmp_path / "train.jsonl"), [dict(c.record) for c in train], lm.tokenize(train))
    first, *others = [doctor(lm, form) for form in forms]
    for other in others:
        assert other.example == first.example and severities(other) == severities(first)
    with pytest.raises(ConceptTDAError, match="no file or folder|there is no"):
        doctor(lm, "no-such-file.jsonl")


def test_problems_are_errors_and_warnings():
    checks = [Check(severity, severity, "seen") for severity in SEVERITIES]
    found = Diagnosis(checks)
    assert [check.name for check in found.problems] == ["error", "warning"]
    assert [check.verdict for check in checks] == ["problem", "problem", "note", "ok"]
