"""Chats: text as Hugging Face renders it, the loss on just what the assistant says; and pairs."""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from llada2_jax.data.chat import (
    LLADA2_TEMPLATE,
    ChatTemplate,
    TemplateError,
    read_messages,
    template_of,
)
from llada2_jax.data.encoders import EncodeOptions, make_encoder
from llada2_jax.data.examples import BadRow
from tests.data_helpers import SPECIAL, files

TOKENIZER = Tokenizer.from_str(files()["tokenizer.json"])
LLADA2 = ChatTemplate(LLADA2_TEMPLATE)
HEAD = "<role>SYSTEM</role>detailed thinking off<|role_end|>"

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def said(role, content, **more):
    return {"role": role, "content": content, **more}


TWO_TURNS = [
    said("user", "q1"),
    said("assistant", "a1"),
    said("user", "q2"),
    said("assistant", "a2"),
]


def encoder(tokenizer_files=None, **options):
    options = {"content": "chat", "template": "llada2"} | options
    return make_encoder(EncodeOptions(**options), tokenizer_files or files(), SPECIAL)


def learned(example) -> list[tuple[str, float]]:
    """Runs of tokens with a weight, as text."""
    runs = []
    for token, weight in zip(example.tokens.tolist(), example.weights.tolist(), strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1][0].append(token)
        else:
            runs.append(([token], weight))
    return [(decode(t), w) for t, w in runs if w]


def decode(tokens) -> str:
    return TOKENIZER.decode([int(t) for t in tokens], skip_special_tokens=False)


# ---------------------------------------------------------------------------------- templates


def test_the_built_in_template_is_llada2s():
    assert LLADA2.render([said("user", "hi")], add_generation_prompt=True) == (
        HEAD + "<role>HUMAN</role>hi<|role_end|><role>ASSISTANT</role>"
    )
    assert LLADA2.render([said("system", "be kind"), *TWO_TURNS]) == (
        "<role>SYSTEM</role>be kind\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>q1<|role_end|><role>ASSISTANT</role>a1<|role_end|>"
        "<role>HUMAN</role>q2<|role_end|><role>ASSISTANT</role>a2<|role_end|>"
    )


def test_a_prompt_at_inference_begins_the_text_of_training():
    for i in (1, 3):
        prompt = LLADA2.render(TWO_TURNS[:i], add_generation_prompt=True)
        assert LLADA2.render(TWO_TURNS).startswith(prompt)


@pytest.mark.parametrize("source", [LLADA2_TEMPLATE, CHATML])
def test_turns_by_markers_and_by_prefixes_agree(source):
    unmarked = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", source)
    template = ChatTemplate(unmarked)
    assert not template.has_markers
    rendered = template.render_turns(TWO_TURNS)
    assert rendered.text == ChatTemplate(source).render_turns(TWO_TURNS).text
    assert rendered == ChatTemplate(source).render_turns(TWO_TURNS)
    end = "<|role_end|>" if source == LLADA2_TEMPLATE else "<|im_end|>\n"
    assert [rendered.text[a:b] for a, b in rendered.turns] == ["a1" + end, "a2" + end]


def test_a_template_that_rewrites_the_past_needs_markers():
    # Thinking is dropped from all turns but the last, as reasoning models' templates do.
    source = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    thoughtful = [*TWO_TURNS[:1], said("assistant", "<think>hm</think>a1"), *TWO_TURNS[2:]]
    with pytest.raises(BadRow, match=r"up to message 1 changes with what follows.*generation %"):
        ChatTemplate(source).render_turns(thoughtful)
    one = ChatTemplate(source).render_turns(thoughtful[:2])
    assert one.text[slice(*one.turns[0])] == "<think>hm</think>a1"


def test_markers_have_to_be_as_many_as_answers():
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(BadRow, match="2 assistant messages, but 4 passages marked"):
        ChatTemplate(source).render_turns(TWO_TURNS)


def test_jinja_as_hugging_face_has_it():
    render = lambda source, **v: ChatTemplate(source, {"bos_token": "<s>"}).render(TWO_TURNS, **v)  # noqa: E731
    assert render("{{ bos_token }}{{ messages | length }}") == "<s>4"
    # Blocks take their line breaks along; loop controls; JSON without HTML escapes.
    assert render("{% for m in messages %}\n  {% break %}\n{% endfor %}x") == "x"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{% if enable_thinking %}on{% endif %}", enable_thinking=True) == "on"
    assert render("{{ tools[0].name }}", tools=[{"name": "f"}]) == "f"
    assert render("{% if tools is none and documents is none %}none{% endif %}") == "none"
    with pytest.raises(BadRow, match="TemplateError: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(TemplateError, match="chat template, line 2"):
        ChatTemplate("a\n{% for %}")


def test_dates_are_fixed_or_refused():
    source = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(source, today="2026-01-31").render([]) == "31 Jan 2026"
    with pytest.raises(BadRow, match="the template writes the date: say which"):
        ChatTemplate(source).render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content.strip() }}",
    ],
)
def test_foreign_templates_stay_in_their_sandbox(source):
    with pytest.raises(BadRow) as refused:
        ChatTemplate(source).render(TWO_TURNS)
    assert refused.value.kind == "template"


def test_what_a_sandbox_hides_is_empty():
    for source in (
        "{{ messages[0].content.format.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ):
        assert ChatTemplate(source).render(TWO_TURNS) == ""


def test_where_a_tokenizer_keeps_its_template():
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}",
    }
    assert template_of({"tokenizer_config.json": json.dumps(config)}).render([]) == "<s>"
    own = {"tokenizer_config.json": json.dumps(config), "chat_template.jinja": "{{ eos_token }}"}
    assert template_of(own).render([]) == "</s>"
    config["chat_template"] = [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t"},
    ]
    several = {"tokenizer_config.json": json.dumps(config)}
    assert template_of(several).source == "d" and template_of(several, tools=True).source == "t"
    for found in ({}, {"tokenizer_config.json": "{"}, {"tokenizer_config.json": "[]"}):
        with pytest.raises(TemplateError):
            template_of(found)


# ----------------------------------------------------------------------------------- messages


def test_messages_in_the_usual_forms():
    assert read_messages([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]) == [
        said("user", "q"),
        said("assistant", "a"),
    ]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages([said("user", parts)]) == [said("user", "ab")]
    # Tables fill absent fields with nulls; arguments may be a JSON text.
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    [message] = read_messages(
        [{"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    )
    assert message["content"] == "" and "name" not in message
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}


@pytest.mark.parametrize(
    ("messages", "kind"),
    [
        (None, "wrong_type"),
        ("hi", "wrong_type"),
        ([], "empty"),
        (["hi"], "wrong_type"),
        ([{"content": "hi"}], "wrong_type"),
        ([said(3, "hi")], "wrong_type"),
        ([said("user", 3)], "wrong_type"),
        ([said("user", [{"type": "image"}])], "wrong_type"),
        ([{"from": "martian", "value": "hi"}], "wrong_type"),
        ([said("user", "")], "empty"),
        ([said("user", "q"), said("assistant", "")], "empty"),
        ([said("user", "q"), said("assistant", "a", tool_calls="f")], "wrong_type"),
        ([said("user", "q")], "no_assistant_turn"),
        ([said("user", "q"), said("assistant", "a", weight=0)], "no_assistant_turn"),
        ([said("user", "q"), said("assistant", "a", weight=-1)], "wrong_type"),
        ([said("user", "q"), said("assistant", "a", weight="1")], "wrong_type"),
        ([said("user", "q"), said("assistant", "a", weight=float("inf"))], "wrong_type"),
        ([said("user", "q"), said("assistant", "a", weight=1e300)], "wrong_type"),
        ([said("user", "q"), said("assistant", "a", weight=10**400)], "wrong_type"),
        ([said("user", "q"), said("assistant", "a", weight=1e-60)], "no_assistant_turn"),
        ([said("user", "<|mask|>"), said("assistant", "a")], "mask_token"),
        ([said("user", "q"), said("assistant", "<|role_end|>")], "special_token"),
        ([said("user", "q\ud800"), said("assistant", "a")], "not_utf8"),
        ([said("wizard", "q"), said("assistant", "a")], "template"),
    ],
)
def test_bad_conversations_by_kind(messages, kind):
    with pytest.raises(BadRow) as bad:
        encoder()({"messages": messages})
    assert bad.value.kind == kind


def test_tools_and_systems_of_the_wrong_type_are_bad_rows():
    for more in ({"tools": "{"}, {"tools": [3]}, {"tools": 3}, {"system": 3}):
        with pytest.raises(BadRow) as bad:
            encoder()({"messages": TWO_TURNS, **more})
        assert bad.value.kind == "wrong_type"
    with pytest.raises(BadRow) as bad:
        encoder()({"messages": TWO_TURNS, "tools": [{"description": "<|endoftext|>"}]})
    assert bad.value.kind == "special_token"


# ------------------------------------------------------------------------------------- tokens


def test_every_answer_is_learned_and_nothing_else():
    example = encoder()({"messages": TWO_TURNS})
    assert decode(example.tokens) == LLADA2.render(TWO_TURNS) + "<|endoftext|>"
    assert learned(example) == [("a1<|role_end|>", 1.0), ("a2<|role_end|><|endoftext|>", 1.0)]
    assert example.tokens.dtype == np.int32 and example.chosen == 0


def test_the_last_answer_alone():
    example = encoder(loss_turns="last")({"conversations": TWO_TURNS})
    assert learned(example) == [("a2<|role_end|><|endoftext|>", 1.0)]
    ends_with_a_question = [*TWO_TURNS, said("user", "q3")]
    example = encoder(loss_turns="last")({"messages": ends_with_a_question})
    assert learned(example) == [("a2<|role_end|>", 1.0)]


def test_weights_of_messages():
    weighted = [
        TWO_TURNS[0],
        TWO_TURNS[1] | {"weight": 0.5},
        TWO_TURNS[2],
        TWO_TURNS[3] | {"weight": 2},
    ]
    assert learned(encoder()({"messages": weighted})) == [
        ("a1<|role_end|>", 0.5),
        ("a2<|role_end|><|endoftext|>", 2.0),
    ]
    off = [TWO_TURNS[0], TWO_TURNS[1] | {"train": False}, *TWO_TURNS[2:]]
    assert learned(encoder()({"messages": off})) == [("a2<|role_end|><|endoftext|>", 1.0)]


def test_tools_are_shown_and_calls_learned_but_not_their_results():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = [
        said("user", "1+1?"),
        said("assistant", "", tool_calls=[call]),
        said("tool", "2"),
        said("assistant", "two"),
    ]
    tools = [{"name": "add"}]
    example = encoder()({"messages": conversation, "tools": json.dumps(tools)})
    text = decode(example.tokens)
    assert '<tools>\n{"name": "add"}\n</tools>' in text
    assert "<role>OBSERVATION</role><tool_response>\n2\n</tool_response><|role_end|>" in text
    assert [t for t, _ in learned(example)] == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|role_end|>',
        "two<|role_end|><|endoftext|>",
    ]


def test_system_prompts_by_row_option_or_message():
    texts = [
        decode(encoder(system="option")({"messages": m, **row}).tokens)
        for m, row in (
            (TWO_TURNS, {}),
            (TWO_TURNS, {"system": "row"}),
            ([said("system", "message"), *TWO_TURNS], {}),
            ([said("system", "message"), *TWO_TURNS], {"system": "message"}),
        )
    ]
    for text, system in zip(texts, ("option", "row", "message", "message"), strict=True):
        assert text.startswith(f"<role>SYSTEM</role>{system}\ndetailed")
        assert text.count(system) == 1
    with pytest.raises(BadRow, match="system='row', and messages begin with 'message'") as bad:
        encoder()({"messages": [said("system", "message"), *TWO_TURNS], "system": "row"})
    assert bad.value.kind == "two_systems"


def test_calls_of_sharegpt_are_learned_as_the_template_writes_calls():
    call = {"name": "add", "arguments": {"a": 1}}
    written = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    for value, calls in (
        (json.dumps(call, indent=1), 1),
        (json.dumps(call | {"arguments": '{"a": 1}'}), 1),
        (json.dumps([call, call]), 2),
    ):
        turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
        example = encoder()({"conversations": [*turns, {"from": "observation", "value": "2"}]})
        assert learned(example) == [(written * calls + "<|role_end|>", 1.0)]


def test_a_template_that_writes_no_calls_is_refused_for_them():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    conversation = [said("user", "q"), said("assistant", "a", tool_calls=[call])]
    with pytest.raises(BadRow, match="does not write the call of 'add'") as bad:
        encoder(template=CHATML)({"messages": conversation})
    assert bad.value.kind == "template"


@pytest.mark.parametrize("value", ["add(1)", '"add"', "[]", "[3]", '{"arguments": {}}', "3", None])
def test_calls_of_sharegpt_that_are_none_are_bad_rows(value):
    turns = [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]
    with pytest.raises(BadRow, match="is no JSON of a call with a name") as bad:
        encoder()({"conversations": turns})
    assert bad.value.kind == "wrong_type"


def test_tokens_do_not_reach_across_the_bounds_of_a_turn():
    """A template without special tokens at the bound: joint tokenization would merge across it."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    plain = files() | {"chat_template.jinja": source}
    conversation = [said("user", "alp"), said("assistant", "ha beta")]
    assert len(TOKENIZER.encode("alpha").ids) < len(TOKENIZER.encode("alp").ids) + len(
        TOKENIZER.encode("ha").ids
    )
    example = encoder(plain, template="tokenizer")({"messages": conversation})
    assert learned(example) == [("ha beta<|endoftext|>", 1.0)]
    assert (
        example.tokens[: len(TOKENIZER.encode("alp").ids)].tolist() == TOKENIZER.encode("alp").ids
    )


def test_a_template_that_says_nothing_is_refused():
    for source in ("", "{{ messages[0].content }}"):
        with pytest.raises(BadRow, match="nothing for the assistant"):
            encoder(template=source or "{# nothing #}")({"messages": TWO_TURNS})


def test_prompts_that_fill_a_row():
    example = encoder()({"messages": TWO_TURNS[:2]})
    row = {"messages": TWO_TURNS[:2]}
    assert encoder(row_length=example.first_supervised + 1)(row).tokens.tolist()
    with pytest.raises(BadRow) as bad:
        encoder(row_length=example.first_supervised)(row)
    assert bad.value.kind == "prompt_fills_row"


def test_the_prompts_of_a_pair_fill_a_row_together():
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    pair = encoder(content="preference")(row)
    prompt = pair.first_supervised
    kept = encoder(content="preference", row_length=2 * prompt + 2)(row)
    np.testing.assert_array_equal(kept.tokens, pair.tokens)
    with pytest.raises(BadRow, match=f"{prompt} and {prompt} tokens") as bad:
        encoder(content="preference", row_length=2 * prompt + 1)(row)
    assert bad.value.kind == "prompt_fills_row"


def test_options_are_checked():
    with pytest.raises(ValueError, match="content='images': choose one of"):
        EncodeOptions(content="images")
    with pytest.raises(ValueError, match="loss_turns='first': choose one of"):
        EncodeOptions(loss_turns="first")
    with pytest.raises(TemplateError, match="no chat template: use the built-in one"):
        encoder(template="tokenizer")


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("text", {"system": "be kind"}),
        ("tokens", {"bos": False}),
        ("chat", {"field": "messages"}),
        ("chat", {"prompt_field": "question"}),
        ("preference", {"field": "chosen"}),
    ],
)
def test_an_option_that_nothing_reads_is_refused(content, options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: of rows with content='{content}'"):
        EncodeOptions(content, **options)


# ---------------------------------------------------------------------------------- preferences

Q, GOOD, BAD = said("user", "q"), said("assistant", "good"), said("assistant", "bad")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [Q], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [Q], "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"prompt": None, "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"prompt": " q\n", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"prompt": "q", "chosen": [{**Q, "score": 1.0}, GOOD], "rejected": [Q, BAD]},
        {"prompt": "q", "chosen": [Q, GOOD], "rejected": [BAD]},
        {"prompt": [Q], "chosen": GOOD, "rejected": BAD},
        {"prompt": {"from": "human", "value": "q"}, "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
    ],
)  # fmt: skip
def test_pairs_in_the_usual_forms(row):
    example = encoder(content="preference")(row)
    first, second = example.tokens[: example.chosen], example.tokens[example.chosen :]
    assert decode(first) == LLADA2.render([Q, GOOD]) + "<|endoftext|>"
    assert decode(second) == LLADA2.render([Q, BAD]) + "<|endoftext|>"
    assert learned(example) == [
        ("good<|role_end|><|endoftext|>", 1.0),
        ("bad<|role_end|><|endoftext|>", 1.0),
    ]


S = said("system", "be kind")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": [S, Q, GOOD], "rejected": [S, Q, BAD]},
        {"prompt": [S, Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"prompt": [S, Q], "chosen": [S, Q, GOOD], "rejected": [S, Q, BAD]},
        {"prompt": [S, Q], "chosen": "good", "rejected": "bad"},
        {"prompt": [S], "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"system": "be kind", "prompt": "q", "chosen": [Q, GOOD], "rejected": [Q, BAD]},
        {"system": "be kind", "prompt": "q", "chosen": [S, Q, GOOD], "rejected": [S, Q, BAD]},
        {"chosen": [S, Q, GOOD], "rejected": [S, Q, BAD]},
    ],
)
def test_pairs_with_a_system_turn(row):
    example = encoder(content="preference")(row)
    first, second = example.tokens[: example.chosen], example.tokens[example.chosen :]
    assert decode(first) == LLADA2.render([S, Q, GOOD]) + "<|endoftext|>"
    assert decode(second) == LLADA2.render([S, Q, BAD]) + "<|endoftext|>"


HELLO, MORE = said("assistant", "hello"), said("user", "more")


@pytest.mark.parametrize(
    ("prompt", "head"),
    [
        ("q", [Q, HELLO, MORE]),  # the first turn of several
        ("more", [Q, HELLO, MORE]),  # the last
        ([Q, HELLO, MORE], [Q, HELLO, MORE]),
        ("q", [HELLO, Q]),  # the assistant opens
        ("q", [said("system", "a"), said("system", "b"), Q]),
    ],
)
def test_a_prompt_of_several_turns_comes_once_and_is_not_learned(prompt, head):
    row = {"prompt": prompt, "chosen": [*head, GOOD], "rejected": [*head, BAD]}
    example = encoder(content="preference")(row)
    assert decode(example.tokens[: example.chosen]) == LLADA2.render([*head, GOOD]) + (
        "<|endoftext|>"
    )
    assert [t.split("<")[0] for t, _ in learned(example)] == ["good", "bad"]


def test_the_field_of_the_prompt_may_have_another_name():
    encode = encoder(content="preference", prompt_field="conversations")
    row = {"conversations": [{"from": "human", "value": "q"}], "chosen": GOOD, "rejected": BAD}
    same = encoder(content="preference")({"prompt": "q", "chosen": "good", "rejected": "bad"})
    np.testing.assert_array_equal(encode(row).tokens, same.tokens)


def test_answers_of_the_prompt_are_not_learned():
    history = [Q, said("assistant", "shared"), said("user", "and?")]
    example = encoder(content="preference")(
        {"chosen": [*history, GOOD], "rejected": [*history, BAD], "system": "s"}
    )
    assert [t.split("<")[0] for t, _ in learned(example)] == ["good", "bad"]
    assert decode(example.tokens).count("<role>SYSTEM</role>s\n") == 2
    # One continues the other: the last message of the shorter is its answer.
    longer = [*history, GOOD, said("user", "more"), BAD]
    example = encoder(content="preference")({"chosen": longer, "rejected": [*history, GOOD]})
    assert [t.split("<")[0] for t, _ in learned(example)] == ["good", "bad", "good"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "same_answers"),
        ({"chosen": [Q, GOOD], "rejected": [Q, GOOD]}, "same_answers"),
        ({"chosen": "a", "rejected": "b"}, "wrong_type"),
        ({"prompt": "q", "chosen": "a"}, "wrong_type"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "wrong_type"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "empty"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "wrong_type"),
        ({"prompt": "q", "chosen": [said("user", "x")], "rejected": "b"}, "no_assistant_turn"),
        ({"prompt": "<|mask|>", "chosen": "a", "rejected": "b"}, "mask_token"),
        ({"prompt": "other", "chosen": [Q, GOOD], "rejected": [Q, BAD]}, "wrong_type"),
        ({"prompt": "other", "chosen": [Q, GOOD], "rejected": "bad"}, "wrong_type"),
        ({"prompt": [HELLO, Q], "chosen": [Q, GOOD], "rejected": [Q, BAD]}, "wrong_type"),
        ({"prompt": [S, Q], "chosen": [said("system", "x"), Q, GOOD], "rejected": [Q, BAD]},
         "two_systems"),
        ({"prompt": "q", "chosen": [S, Q, GOOD], "rejected": [S, Q, BAD], "system": "x"},
         "two_systems"),
    ],
)  # fmt: skip
def test_bad_pairs_by_kind(row, kind):
    with pytest.raises(BadRow) as bad:
        encoder(content="preference")(row)
    assert bad.value.kind == kind
