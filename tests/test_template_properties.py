"""Masks over random chats and the shapes of template that models come with, written here.

What holds for all of them: a mask decodes to the answers as the template shows them, each with its end of
turn; the same tokens have the same mask, whatever path made them; nothing that was given is missing from the
text."""

import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from concept_tda.data.conversations import load_conversations
from concept_tda.data.messages import ConversationError
from concept_tda.data.templates import TemplateProfile, chat_template_text, rendered_chats, template_names
from concept_tda.data.tokens import tokenize, tokenize_prompts

from chat_tokenizers import chat_tokenizer

GENERATE = "{% if add_generation_prompt %}{{ HEADER }}{% endif %}"
LOOP = "{% for m in messages %}BODY{% endfor %}"


def simple(before, after, *, content="m.content", header=None):
    """A template that writes `before`, the content and `after` for each message; Jinja expressions all of
    them."""
    body = LOOP.replace("BODY", "{{ " + before + " + " + content + " + " + after + " }}")
    return body + (GENERATE.replace("HEADER", header) if header else "")


# in the manner of Qwen3: thoughts after the last question only, an empty block where there is none
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages if m.role == 'user' %}{% set ns.last = "
    "loop.index0 %}"
    "{% endfor %}{% set ns.users = -1 %}{% for m in messages %}{% if m.role == 'assistant' %}{% set "
    "words = m.content %}"
    "{% set thought = '' %}{% if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
    "{% elif '</think>' in words %}"
    "{% set thought = words.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set words = words.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if ns.users >= ns.last %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ words.lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{% if m.role == 'user' %}{% set ns.users = ns.users + 1 %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    + GENERATE.replace("HEADER", r"'<|im_start|>assistant\n'")
)
# in the manner of R1's distillations: whatever stands before </think> is cut, the prompt opens the thought
DISTILLED = (
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'assistant' %}{% set words = m.content %}{% if "
    "'</think>' in words %}"
    "{% set words = words.split('</think>')[-1] %}{% endif %}{{ '<Assistant>' + words + '<end>' }}"
    "{% elif m.role == 'user' %}{{ '<User>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    + GENERATE.replace("HEADER", r"'<Assistant><think>\n'")
)
HARMONY = (  # channels; another end for the last answer
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.reasoning_content and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else "
    "'<|end|>') }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    + GENERATE.replace("HEADER", "'<|start|>assistant'")
)
INST = (  # no headers, a blank before the answer, the question trimmed
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' "
    "[/INST]' }}"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %}{{ ' ' + m.content | trim + '</s>' }}{% "
    "endif %}{% endfor %}"
)
LISTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' }}{% for part in m.content %}{% if "
    "part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    + GENERATE.replace("HEADER", "'<|im_start|>assistant: '")
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% "
    "generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif "
    "%}{{ '\n' }}"
    "{% endfor %}" + GENERATE.replace("HEADER", r"'<|im_start|>assistant\n'")
)

# name: (template, end after an earlier answer, end after the last, what the template does to an answer)
SHAPES = {
    "chatml": (chat_template_text("chatml"), "<|im_end|>", "<|im_end|>", str),
    "llama3": (chat_template_text("llama3"), "<|eot_id|>", "<|eot_id|>", str.strip),
    "zephyr": (
        simple(r"'<|' + m.role + '|>\n'", r"'</s>\n'", header=r"'<|assistant|>\n'"),
        "</s>",
        "</s>",
        str,
    ),
    "phi": (
        simple(r"'<|' + m.role + '|>\n'", r"'<|end|>\n'", header=r"'<|assistant|>\n'"),
        "<|end|>",
        "<|end|>",
        str,
    ),
    "command": (
        simple("'<|START|><|' + m.role | upper + '|>'", "'<|END|>'", header="'<|START|><|ASSISTANT|>'"),
        "<|END|>",
        "<|END|>",
        str,
    ),
    "right-trimmed": (
        simple(r"m.role + ':\n'", r"'<|im_end|>\n'", content="m.content.rstrip()"),
        "<|im_end|>",
        "<|im_end|>",
        str.rstrip,
    ),
    "no generation prompt": (
        simple(r"'<|im_start|>' + m.role + '\n'", r"'<|im_end|>\n'"),
        "<|im_end|>",
        "<|im_end|>",
        str,
    ),
    "no end": (
        simple(r"'<|im_start|>' + m.role + '\n'", "''", header=r"'<|im_start|>assistant\n'"),
        "",
        "",
        str,
    ),
    "plain": (simple("m.role + ': '", r"'\n'", header="'assistant:'"), "", "", str),
    "inst": (INST, "</s>", "</s>", str.strip),
    "thinking": (THINKING, "<|im_end|>", "<|im_end|>", lambda answer: answer.lstrip("\n")),
    "distilled": (DISTILLED, "<end>", "<end>", str),
    "harmony": (HARMONY, "<|end|>", "<|return|>", str),
    "lists": (LISTS, "<|im_end|>", "<|im_end|>", str),
    "marked": (MARKED, "<|im_end|>", "<|im_end|>", str),
}

words = st.sampled_from(
    [
        "a",
        "Yes.",
        "No.",
        " ",
        "  ",
        "\n",
        "\n\n",
        "assistant",
        "user",
        "<",
        "<|im_end|>",
        "<|im_start|>",
        "</s>",
        "<|end|>",
        "[/INST]",
        "é",
        "漢字",
        "🙂",
        "{{ x }}",
        "{% raw %}",
        "\\n",
        "'",
        "Zq",
        "system",
    ]
)
texts = st.lists(words, min_size=1, max_size=8).map("".join)
said = texts.filter(str.strip)


@st.composite
def chats(draw, system=True):
    """System prompt or not, one to three rounds; an answer may repeat the question."""
    turns = [{"role": "system", "content": draw(said)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        question = draw(said)
        answer = draw(st.one_of(said, st.just(question)))
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def marked(tokenizer, text, chat):
    """The stretches of the text that are response."""
    return [text[start:end] for start, end in chat.spans]


def check_shape(name, turns):
    template, earlier, last, shown = SHAPES[name]
    tokenizer = chat_tokenizer("smollm2", template=template)
    data = load_conversations([turns])
    [chat] = rendered_chats(data, tokenizer)
    answers = [m["content"] for m in turns if m["role"] == "assistant"]
    ends = [earlier] * (len(answers) - 1) + [last]
    found = marked(tokenizer, chat.text, chat)
    if name in (
        "inst",
        "plain",
    ):  # a blank or a line break that the header ends with may also be the answer's own
        found = [stretch.strip() for stretch in found]
        expected = [(shown(answer) + end).strip() for answer, end in zip(answers, ends)]
    else:
        expected = [shown(answer) + end for answer, end in zip(answers, ends)]
    assert found == expected, (found, expected, chat.text)
    [item] = tokenize(data, tokenizer, max_tokens=None)
    decoded = tokenizer.decode(item.input_ids[item.response_mask])
    assert "".join("".join(expected).split()) == "".join(decoded.split())


SLOWLY = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("name", SHAPES)
@SLOWLY
@given(turns=chats())
def test_masks_are_the_answers_and_their_ends(name, turns):
    check_shape(name, turns)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@settings(SLOWLY, max_examples=600, derandomize=False)
@given(turns=chats())
def test_masks_are_the_answers_and_their_ends_at_length(name, turns):
    check_shape(name, turns)


thoughts = st.sampled_from(["Three threes.", "hm", "Is it?\nIt is.", "divide it <|im_end|> twice", "漢字"])


@SLOWLY
@given(
    turns=chats(system=False),
    thinks=st.lists(thoughts, min_size=3, max_size=3),
    seen=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_equal_tokens_have_equal_masks_however_a_thought_was_given(turns, thinks, seen):
    """In a field of its own, inside the content, or (in earlier turns, where the template drops it) not at
    all."""
    tokenizer = chat_tokenizer("smollm2", template=THINKING)
    field, inside, dropped = [], [], []
    number = iter(range(3))
    final = sum(m["role"] == "assistant" for m in turns) - 1
    for m in turns:
        if m["role"] == "user":
            for chat in (field, inside, dropped):
                chat.append(m)
            continue
        k, answer = next(number), m["content"].strip()
        has = seen[k]
        field.append(
            {"role": "assistant", "content": answer, **({"reasoning_content": thinks[k]} if has else {})}
        )
        inside.append(
            {"role": "assistant", "content": f"<think>\n{thinks[k]}\n</think>\n\n{answer}" if has else answer}
        )
        dropped.append(inside[-1] if k == final else {"role": "assistant", "content": answer})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        items = [tokenize([chat], tokenizer, max_tokens=None)[0] for chat in (field, inside, dropped)]
    for item in items[1:]:
        assert item.input_ids.tolist() == items[0].input_ids.tolist()
        assert item.response_mask.tolist() == items[0].response_mask.tolist()
    said_ = tokenizer.decode(items[0].input_ids[items[0].response_mask])
    assert (f"<think>\n{thinks[final]}\n</think>" in said_) == seen[final]
    assert ("<think>" in said_) == seen[final], "the empty block is the template's"
    assert items[0].thoughts_left_out == sum(seen[:final])


@SLOWLY
@given(turns=chats(), train=st.lists(st.booleans(), min_size=3, max_size=3))
def test_answers_that_are_not_trained_on_leave_the_mask_and_nothing_else(turns, train):
    tokenizer, number, flagged = chat_tokenizer("qwen2.5"), iter(train), []
    for m in turns:
        flagged.append(m | ({"train": next(number)} if m["role"] == "assistant" else {}))
    [whole] = tokenize([turns], tokenizer)
    if not any(m.get("train") for m in flagged):
        with pytest.raises(ConversationError, match="all their answers say train: false"):
            tokenize([flagged], tokenizer)
        return
    [part] = tokenize([flagged], tokenizer)
    assert part.input_ids.tolist() == whole.input_ids.tolist()
    assert not (part.response_mask & ~whole.response_mask).any()
    kept = [m["content"] + "<|im_end|>" for m in flagged if m.get("train")]
    assert tokenizer.decode(part.input_ids[part.response_mask]).replace("\n", "") == "".join(kept).replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in SHAPES
        if name not in ("thinking", "distilled", "harmony", "right-trimmed", "no generation prompt")
    ],
)
@SLOWLY
@given(turns=chats())
def test_prompts_are_beginnings_of_the_whole(name, turns):
    tokenizer = chat_tokenizer("smollm2", template=SHAPES[name][0])
    turns = [
        m | {"content": "x" + m["content"] + "x"} for m in turns
    ]  # no token spans the border of header and answer
    [prompt], [whole] = tokenize_prompts([turns], tokenizer), tokenize([turns], tokenizer, max_tokens=None)
    text, start = tokenizer.decode(whole.input_ids), tokenizer.decode(prompt)
    assert text.startswith(start.rstrip())


@pytest.mark.parametrize(
    "lost, message",
    [
        ("m.role != 'system'", "leaves out the system prompt"),
        ("m.role != 'user'", "leaves out the text of user messages"),
        ("m.role != 'assistant'", "leaves out the text of answers"),
    ],
)
def test_what_a_template_leaves_out_is_named(lost, message):
    template = (
        "{% for m in messages if " + lost + " %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    chat = [{"role": r, "content": f"words of {r}"} for r in ("system", "user", "assistant")]
    data = load_conversations([chat])
    with pytest.raises(ConversationError, match=f"{message}.*{data.ids[0]}"):
        tokenize(data, chat_tokenizer("smollm2", template=template))


def test_a_text_that_occurs_elsewhere_does_not_stand_in_for_one_that_is_left_out():
    """A search for the words would find the second question in the answer before it."""
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' or loop.first %}"
        "{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    chat = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Yes. Really."},
        {"role": "user", "content": "Really."},
        {"role": "assistant", "content": "Yes."},
    ]
    with pytest.raises(ConversationError, match="leaves out the text of user messages"):
        tokenize([chat], chat_tokenizer("smollm2", template=template))


def test_a_thought_that_the_template_does_not_know_is_refused_and_the_way_out_works():
    tokenizer = chat_tokenizer("qwen2.5")
    chat = [
        {"role": "user", "content": "Is 9 a prime?"},
        {"role": "assistant", "content": "No.", "reasoning_content": "Three threes."},
    ]
    with pytest.raises(
        ConversationError,
        match=r"leaves out the thought \(reasoning_content\) of 1 conversations. Write the thought",
    ):
        tokenize([chat], tokenizer)
    written = [chat[0], {"role": "assistant", "content": "<think>\nThree threes.\n</think>\n\nNo."}]
    [item] = tokenize([written], tokenizer)
    assert tokenizer.decode(item.input_ids[item.response_mask]) == written[1]["content"] + "<|im_end|>"


def test_harmony_marks_the_thought_with_its_channel():
    tokenizer = chat_tokenizer("smollm2", template=HARMONY)
    chat = [
        {"role": "user", "content": "Is 9 a prime?"},
        {"role": "assistant", "content": "No.", "reasoning_content": "Three threes."},
    ]
    [rendered] = rendered_chats(load_conversations([chat]), tokenizer)
    assert marked(tokenizer, rendered.text, rendered) == [
        "<|channel|>analysis<|message|>Three "
        "threes.<|end|><|start|>assistant<|channel|>final<|message|>No.<|return|>"
    ]


def test_a_tag_the_prompt_ends_with_is_not_said_by_the_model():
    opened = THINKING.replace(
        r"{{ '<|im_start|>assistant\n' }}{% endif %}", r"{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    tokenizer = chat_tokenizer("smollm2", template=opened)
    assert TemplateProfile.read(tokenizer).header.endswith("<think>\n")
    chat = [
        {"role": "user", "content": "Is 9 a prime?"},
        {"role": "assistant", "content": "<think>\nThree threes.\n</think>\n\nNo."},
    ]
    [rendered] = rendered_chats(load_conversations([chat]), tokenizer)
    assert marked(tokenizer, rendered.text, rendered) == ["Three threes.\n</think>\n\nNo.<|im_end|>"]


def test_empty_tags_that_are_the_owners_own_are_his_answer():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\n\n</think>\n\nYes."}]
    for template, expected in ((None, "<think>\n\n</think>\n\nYes.<|im_end|>"), (THINKING, "Yes.<|im_end|>")):
        tokenizer = chat_tokenizer("smollm2", template=template or chat_template_text("chatml"))
        [item] = tokenize([chat], tokenizer)
        assert tokenizer.decode(item.input_ids[item.response_mask]) == expected


def test_thoughts_that_are_dropped_are_counted_shown_and_warned_about():
    tokenizer = chat_tokenizer("smollm2", template=THINKING)
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "No."},
    ]
    with pytest.warns(UserWarning, match="leaves 1 thoughts out of 1 conversations"):
        data = tokenize([chat], tokenizer)
    assert data[0].thoughts_left_out == 1 and "1 thoughts left out" in repr(data)


@pytest.mark.parametrize(
    "template, said_",
    [
        ("{{ 1/0 }}", "refuses"),
        ("{{ messages[0].nothing.at_all }}", "refuses"),
        ("{{ raise_exception('no chats today') }}", "no chats today"),
        ("{% for m in messages %}{{ m.content", "refuses"),
        ("{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}", "refuses"),
        ("{{ messages | length }}", "leaves out"),
        ("{% for m in messages %}{{ m.content | replace('e', '') }}{% endfor %}", "conversations"),
    ],
)
def test_whatever_a_template_does_the_error_is_ours(template, said_):
    chat = [
        {"role": "user", "content": "Where is the kettle?"},
        {"role": "assistant", "content": "Here, there, everywhere."},
    ]
    with pytest.raises(ConversationError, match=said_):
        tokenize([chat], chat_tokenizer("smollm2", template=template))


def test_named_templates_take_a_chat(tmp_path):
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
    ]
    assert {"chatml", "llama3", "alpaca", "plain", "zephyr"} <= set(template_names())
    for name in template_names():
        tokenizer = chat_tokenizer("smollm2", template=chat_template_text(name))
        [item] = tokenize([chat], tokenizer)
        assert tokenizer.decode(item.input_ids[item.response_mask]).strip().startswith("So.")
    (tmp_path / "mine.jinja").write_text(chat_template_text("chatml"))
    assert chat_template_text(tmp_path / "mine.jinja") == chat_template_text("chatml")
    for wrong in ("chatlm", str(tmp_path), ""):
        with pytest.raises(ConversationError, match="alpaca, chatml, llama3"):
            chat_template_text(wrong)
    (tmp_path / "latin.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(ConversationError, match="cannot be read"):
        chat_template_text(tmp_path / "latin.jinja")
