"""Conversations as text and tokens, with the loss on what the assistant says.

A template is Jinja with the semantics of Hugging Face's `apply_chat_template`, run in a sandbox: it
comes with a checkpoint, and a checkpoint may come from anyone. What the assistant says is found by
`{% generation %}` markers, or, where a template has none, by rendering the prefixes of the
conversation: each has to be a prefix of the whole, else the template is refused.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from jinja2 import nodes
from tokenizers import Tokenizer

from llada2_jax.data.examples import BadRow, Example, short
from llada2_jax.data.tokenizer import encode_text
from llada2_jax.errors import UserError

# LLaDA2's form (roles in tags, a turn ends with <|role_end|>, thinking off), written as a template
# so that there is one way to render.
LLADA2_TEMPLATE = """\
{%- set first = messages[0] if messages and messages[0].role == 'system' else none %}
{{- '<role>SYSTEM</role>' }}
{%- if first %}{{ first.content + '\\n' }}{% endif %}
{%- if tools %}
{{- '# Tools\\n\\nFunctions you may call, as JSON inside <tools></tools>:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}
{{- '\\n</tools>\\n\\nCall one by a JSON object with its name and arguments inside ' }}
{{- '<tool_call></tool_call>.\\n' }}
{%- endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for message in (messages[1:] if first else messages) %}
{%- if message.role == 'user' %}
{{- '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'system' %}
{{- '<role>SYSTEM</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'tool' %}
{{- '<role>OBSERVATION</role><tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|role_end|>' }}
{%- elif message.role == 'assistant' %}
{{- '<role>ASSISTANT</role>' }}
{%- generation %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}
{%- set function = call.function or call %}
{{- '<tool_call>\\n' + {'name': function.name, 'arguments': function.arguments or {}} | tojson }}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|role_end|>' }}
{%- endgeneration %}
{%- else %}
{{- raise_exception('no role ' ~ message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}
"""


class TemplateError(UserError, ValueError):
    """A template that is no Jinja, or that a tokenizer's files do not hold."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """text of a conversation, and the [start, end) of each assistant turn in it, in order."""

    text: str
    turns: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """source: Jinja. special: what templates call bos_token, eos_token and so on. today: the date
    for templates that write one (ISO); empty: they are refused, so that no output depends on when
    it was made."""

    source: str
    special: Mapping[str, str] = dataclasses.field(default_factory=dict)
    today: str = ""

    def __post_init__(self):
        try:
            _ = self._compiled
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        return _environment().from_string(self.source)

    @functools.cached_property
    def has_markers(self) -> bool:
        """Whether the template itself says what the assistant generates."""
        return bool(re.search(r"\{%-?\s*generation\s*-?%\}", self.source))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text; what `apply_chat_template(tokenize=False)` gives.

        variables: whatever else the template reads, e.g. enable_thinking.
        Raises: BadRow("template") if the template refuses the messages.
        """
        return self._render(messages, tools, add_generation_prompt, variables, mark="")

    def render_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> Rendered:
        """The conversation as text, and where each assistant message stands in it.

        Raises: BadRow("template") if the template refuses the messages or its turns cannot be told.
        """
        count = sum(m["role"] == "assistant" for m in messages)
        if not self.has_markers:
            return self._turns_by_prefix(messages, tools, variables)
        mark = _unused_mark(self.source, messages, tools, variables)
        pieces = self._render(messages, tools, False, variables, mark=mark).split(mark)
        ends = list(itertools.accumulate(map(len, pieces)))
        turns = tuple(zip(ends[0::2], ends[1::2], strict=False))
        if len(turns) != count:
            raise BadRow(
                "template",
                f"{count} assistant messages, but {len(turns)} passages marked as generation",
            )
        return Rendered("".join(pieces), turns)

    def _turns_by_prefix(self, messages, tools, variables) -> Rendered:
        whole = self.render(messages, tools=tools, **variables)
        turns = []
        for i in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
            before = self._render(messages[:i], tools, True, variables, mark="")
            after = self.render(messages[: i + 1], tools=tools, **variables)
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRow(
                    "template",
                    f"what the template writes up to message {i} changes with what follows, so "
                    "the assistant's turns cannot be told; mark them with {% generation %}",
                )
            turns.append((len(before), len(after)))
        return Rendered(whole, tuple(turns))

    def _render(self, messages, tools, add_generation_prompt, variables, *, mark: str) -> str:
        try:
            return self._compiled.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=self._strftime,
                _mark=mark,
                **{**self.special, **variables},
            )
        except Exception as error:  # foreign code on foreign data may raise anything
            raise BadRow("template", f"{type(error).__name__}: {error}"[:300]) from error

    def _strftime(self, form: str) -> str:
        if not self.today:
            raise TemplateError("the template writes the date: say which one is meant (today)")
        return datetime.date.fromisoformat(self.today).strftime(form)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what it encloses is put between marks."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = nodes.ContextReference()
        call = self.call_method("_enclose", [mark], lineno=line)
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _enclose(self, context, caller) -> str:
        mark = context.get("_mark", "")
        return f"{mark}{caller()}{mark}"


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes for HTML that Jinja's own filter makes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _unused_mark(*values: Any) -> str:
    """A private-use character that none of the values holds."""
    text = _strings(values)
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)


def _strings(value: Any) -> str:
    """All texts inside a value, a line each."""
    texts, values = [], [value]
    for value in values:  # grows by what is found inside: no recursion, rows may nest deep
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, Mapping):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            values += value
    return "\n".join(texts)


def _parse(text: str) -> Any:
    """The value of a JSON text. Raises: ValueError, also for one that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def template_of(tokenizer_files: Mapping[str, str], *, tools: bool = False) -> ChatTemplate:
    """The chat template among a tokenizer's files: chat_template.jinja, else tokenizer_config.json
    (one text, or several by name, of which "tool_use" serves tools, if there is one).

    Raises: TemplateError.
    """
    try:
        config = _parse(tokenizer_files.get("tokenizer_config.json", "{}"))
    except ValueError as error:
        raise TemplateError(f"tokenizer_config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TemplateError("tokenizer_config.json is not a JSON object")
    source: Any = tokenizer_files.get("chat_template.jinja", config.get("chat_template"))
    if isinstance(source, list):
        named = {e.get("name"): e.get("template") for e in source if isinstance(e, dict)}
        source = (named.get("tool_use") if tools else None) or named.get("default")
    if not isinstance(source, str):
        raise TemplateError(
            "the tokenizer has no chat template: use the built-in one (--template llada2), or give "
            "a file of your own"
        )
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    return ChatTemplate(source, special)


# ------------------------------------------------------------------------------------ messages

_LARGEST_WEIGHT = float(np.finfo(np.float32).max)
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


def read_messages(value: Any, field: str = "messages") -> list[dict[str, Any]]:
    """Messages in OpenAI's form ({role, content, tool_calls}) from that one or ShareGPT's
    ({from, value}). Content given as parts of type "text" becomes one text; arguments of tool calls
    given as JSON texts become objects, and so do ShareGPT's turns from "function_call".

    Raises: BadRow("wrong_type") or BadRow("empty").
    """
    if not isinstance(value, list | tuple):
        raise BadRow("wrong_type", f"{field}={short(value)} is no list of messages")
    if not value:
        raise BadRow("empty", f"{field} is an empty list")
    return [_message(m, f"{field}[{i}]") for i, m in enumerate(value)]


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow("wrong_type", f"{where}={short(value)} is no message")
    # Tables fill absent fields with nulls.
    message = {k: v for k, v in value.items() if v is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str):
        raise BadRow("wrong_type", f"{where}.role={short(message.get('role'))} is no text")
    message["content"] = _content(message.get("content"), f"{where}.content")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    silent = not message["content"] and not message.get("tool_calls")
    if silent and message["role"] in ("user", "assistant"):
        raise BadRow("empty", f"{where}: a {message['role']} message without text")
    return message


def _from_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    speaker, value = message.pop("from"), message.pop("value", None)
    if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
        raise BadRow("wrong_type", f"{where}.from={short(speaker)} is not a known speaker")
    said = {"role": _SHAREGPT_ROLES[speaker], "content": value}
    if speaker == "function_call":
        said = {"role": "assistant", "tool_calls": _function_calls(value, f"{where}.value")}
    return {**said, **message}


def _function_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI's calls from ShareGPT's: {name, arguments} as a JSON text, or a list of such."""
    try:
        calls = _parse(value) if isinstance(value, str) else value
    except ValueError:
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise BadRow("wrong_type", f"{where}={short(value)} is no JSON of a call with a name")
    return [{"type": "function", "function": call} for call in calls]


def _content(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [
            p.get("text", "") for p in value if isinstance(p, dict) and p.get("type") == "text"
        ]
        if len(parts) == len(value) and all(isinstance(p, str) for p in parts):
            return "".join(parts)
    if not isinstance(value, str):
        raise BadRow("wrong_type", f"{where}={short(value)} is no text")
    return value


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadRow("wrong_type", f"{where}={short(value)} is no list of calls")
    return [
        {**call, "function": _with_arguments(call["function"])}
        if isinstance(call.get("function"), dict)
        else _with_arguments(call)
        for call in value
    ]


def _with_arguments(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return function
    try:
        return {**function, "arguments": _parse(arguments)}
    except ValueError:
        return function


def _refuse_unwritten_calls(messages: Sequence[Mapping[str, Any]], rendered: Rendered) -> None:
    """Many templates write no calls: their turns would be learned without them."""
    spoken = [m for m in messages if m["role"] == "assistant"]
    for message, (start, end) in zip(spoken, rendered.turns, strict=True):
        for call in message.get("tool_calls", ()):
            function = call.get("function")
            name = (function if isinstance(function, dict) else call).get("name")
            if str(name) not in rendered.text[start:end]:
                raise BadRow("template", f"the template does not write the call of {short(name)}")


def message_weight(message: Mapping[str, Any], where: str) -> float:
    """The loss weight of a message, as fp32 has it: its "weight" (a number from 0), or 1 / 0 for
    "train".

    Raises: BadRow("wrong_type").
    """
    weight = message.get("weight", message.get("train", 1))
    if not isinstance(weight, bool | int | float) or not 0 <= weight <= _LARGEST_WEIGHT:
        raise BadRow("wrong_type", f"{where}: weight {short(weight)} is no fp32 number from 0")
    return float(np.float32(weight))


# ------------------------------------------------------------------------------------- tokens


@dataclasses.dataclass(frozen=True)
class ChatTokens:
    """Conversations to examples.

    tool_template: for conversations with tools. tokenizer: reads special tokens by name. eos: ends
    the text where the template does not.
    loss_turns: "all" assistant messages or the "last". system: what is said first where a
    conversation has no system message of its own; empty: nothing.
    """

    template: ChatTemplate
    tool_template: ChatTemplate
    tokenizer: Tokenizer
    eos: int
    mask_token: str
    loss_turns: str = "all"
    system: str = ""

    def __call__(self, row: dict[str, Any]) -> Example:
        """An example from {messages | conversations, tools, system}. Raises: BadRow."""
        field = "conversations" if row.get("messages") is None else "messages"
        messages = read_messages(row.get(field), field)
        return self.tokenize(self.with_system(messages, row.get("system")), row.get("tools"))

    def with_system(self, messages: list[dict[str, Any]], system: Any = None):
        """The messages, opened by the row's system prompt, else the configured one, if they have
        none. Raises: BadRow("wrong_type"), or BadRow("two_systems") where row and messages differ.
        """
        if not isinstance(system or "", str):
            raise BadRow("wrong_type", f"system={short(system)} is no text")
        if messages[0]["role"] != "system":
            system = system or self.system
            return [{"role": "system", "content": system}, *messages] if system else messages
        if system and system.strip() != messages[0]["content"].strip():
            raise BadRow(
                "two_systems",
                f"system={short(system)}, and messages begin with {short(messages[0]['content'])}",
            )
        return messages

    def tokenize(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, *, first: int = 0
    ) -> Example:
        """Tokens of a conversation; assistant messages from number `first` on are supervised.

        Text on the two sides of a turn's bounds is tokenized apart, as it is when a prompt is
        encoded and an answer generated, so each token is wholly the assistant's or not at all.
        """
        tools = self._tools(tools)
        self._refuse_special(messages, tools)
        weights = self._weights(messages, first)
        if not any(weights):
            raise BadRow("no_assistant_turn", "no assistant message to learn from")
        template = self.tool_template if tools else self.template
        rendered = template.render_turns(messages, tools=tools)
        _refuse_unwritten_calls(messages, rendered)
        pieces: list[tuple[str, float]] = []
        at = 0
        for (start, end), weight in zip(rendered.turns, weights, strict=True):
            pieces += [(rendered.text[at:start], 0.0), (rendered.text[start:end], weight)]
            at = end
        pieces.append((rendered.text[at:], 0.0))
        encoded = [(encode_text(self.tokenizer, text), weight) for text, weight in pieces if text]
        tokens = np.asarray([i for ids, _ in encoded for i in ids], np.int32)
        loss = np.repeat(
            np.asarray([w for _, w in encoded], np.float32), [len(ids) for ids, _ in encoded]
        )
        if not loss.any():
            raise BadRow("template", "the template writes nothing for the assistant's messages")
        if tokens[-1] != self.eos:
            closing = weights[-1] if messages[-1]["role"] == "assistant" else 0.0
            tokens = np.append(tokens, np.int32(self.eos))
            loss = np.append(loss, np.float32(closing))
        return Example(tokens, loss)

    def _weights(self, messages, first: int) -> list[float]:
        """Weight of each assistant message in order."""
        spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        weights = {i: message_weight(messages[i], f"messages[{i}]") for i in spoken}
        kept = set(spoken[-1:] if self.loss_turns == "last" else spoken)
        return [weights[i] if i in kept and i >= first else 0.0 for i in spoken]

    @staticmethod
    def _tools(tools: Any) -> list[dict[str, Any]] | None:
        if isinstance(tools, str) and tools:
            try:
                tools = _parse(tools)
            except ValueError:
                raise BadRow("wrong_type", f"tools={short(tools)} is not JSON") from None
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(t, dict) for t in tools):
            raise BadRow("wrong_type", f"tools={short(tools)} is no list of functions")
        return tools

    def _refuse_special(self, messages, tools) -> None:
        """A special token in what someone said would be taken for the template's own."""
        found = self._special.search(_strings([list(messages), tools]))
        if found:
            kind = "mask_token" if found[0] == self.mask_token else "special_token"
            raise BadRow(kind, f"a message holds {found[0]!r}")

    @functools.cached_property
    def _special(self) -> re.Pattern[str]:
        names = {t.content for t in self.tokenizer.get_added_tokens_decoder().values() if t.special}
        # An empty alternation would match everything.
        return re.compile("|".join(re.escape(n) for n in sorted(names)) or r"(?!)")
