"""Preference pairs: two answers to one prompt, the first preferred."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llada2_jax.data.chat import ChatTokens, read_messages
from llada2_jax.data.examples import BadRow, Example, short

Messages = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class PreferencePairs:
    """Pairs to examples, through a chat template. Accepted, with an optional "system" and "tools":

    - prompt, chosen, rejected: each a text, a message or a list of messages; chosen and rejected
      are answers, or whole conversations that hold the prompt too;
    - chosen, rejected: whole conversations.

    The prompt is what both conversations begin with; supervised is what the assistant says after.
    """

    chat: ChatTokens
    prompt_field: str = "prompt"

    def __call__(self, row: dict[str, Any]) -> Example:
        """Both texts, one after the other; Example.chosen is the first one's length.

        Raises: BadRow.
        """
        prompt, chosen, rejected = self._messages(row)
        if chosen == rejected:
            raise BadRow("same_answers", "chosen and rejected are equal")
        prompt = self.chat.with_system(prompt, row.get("system"))
        first, second = (
            self.chat.tokenize([*prompt, *answer], row.get("tools"), first=len(prompt))
            for answer in (chosen, rejected)
        )
        if np.array_equal(first.tokens, second.tokens):
            raise BadRow("same_answers", "chosen and rejected are the same tokens")
        return Example(
            np.concatenate([first.tokens, second.tokens]),
            np.concatenate([first.weights, second.weights]),
            len(first.tokens),
        )

    def _messages(self, row: dict[str, Any]) -> tuple[Messages, Messages, Messages]:
        """The prompt and what follows it in either conversation."""
        given = row.get(self.prompt_field)
        prompt = [] if given is None else _as_messages(given, self.prompt_field, "user")
        sides = [_answered(row, field) for field in ("chosen", "rejected")]
        system, (prompt, *sides) = _split_system([prompt, *sides])
        chosen, rejected = (system + _completed(side, prompt) for side in sides)
        shared = _shared_beginning(chosen, rejected)
        head = chosen[:shared]
        if not head and not prompt:
            raise BadRow(
                "wrong_type",
                f"there is no {self.prompt_field}, nor a message that chosen and rejected both "
                "begin with",
            )
        if not _holds(head, prompt):
            raise BadRow(
                "wrong_type",
                f"{self.prompt_field}={short(given)} is not in what chosen and rejected both "
                "begin with",
            )
        return head, chosen[shared:], rejected[shared:]


def _as_messages(value: Any, field: str, role: str) -> Messages:
    if isinstance(value, str):
        value = {"role": role, "content": value}
    return read_messages([value] if isinstance(value, dict) else value, field)


def _answered(row: dict[str, Any], field: str) -> Messages:
    messages = _as_messages(row.get(field), field, "assistant")
    if not any(m["role"] == "assistant" for m in messages):
        raise BadRow("no_assistant_turn", f"{field} holds no assistant message")
    return messages


def _split_system(conversations: list[Messages]) -> tuple[Messages, list[Messages]]:
    """The system message that opens some of them, and all of them without it."""
    opening = [c[0] for c in conversations if c and c[0]["role"] == "system"]
    if len({m["content"].strip() for m in opening}) > 1:
        raise BadRow("two_systems", "prompt, chosen and rejected begin with different ones")
    return opening[:1], [c[1:] if c and c[0]["role"] == "system" else c for c in conversations]


def _completed(side: Messages, prompt: Messages) -> Messages:
    """A conversation as it is, an answer after the prompt."""
    conversation = side[0]["role"] in ("system", "user") or _holds(side, prompt)
    return side if conversation else prompt + side


def _said(message: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two messages the same, whatever else their tables say of them."""
    return message["role"], message["content"].strip(), message.get("tool_calls")


def _shared_beginning(chosen: Messages, rejected: Messages) -> int:
    """Messages that both begin with, up to the first answer that differs; where one continues the
    other, or both are equal, the last message is the answer."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shortest = min(len(chosen), len(rejected))
    same = next((i for i, (a, b) in pairs if _said(a) != _said(b)), shortest)
    return min(same, shortest - 1)


def _holds(conversation: Messages, part: Messages) -> bool:
    whole, wanted = list(map(_said, conversation)), list(map(_said, part))
    places = range(len(whole) - len(wanted) + 1)
    return any(whole[i : i + len(wanted)] == wanted for i in places)
