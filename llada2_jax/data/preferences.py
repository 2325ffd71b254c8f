"""Preference pairs: two answers to one prompt, the first preferred."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llada2_jax.data.chat import ChatTokens, read_messages
from llada2_jax.data.examples import BadRow, Example


@dataclasses.dataclass(frozen=True)
class PreferencePairs:
    """Pairs to examples, through a chat template. Accepted, with an optional "system" and "tools":

    - prompt, chosen, rejected: each a text or a list of messages;
    - chosen, rejected: lists of messages with a shared beginning, which is the prompt.

    Supervised is what the assistant says after the prompt.
    """

    chat: ChatTokens

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

    def _messages(self, row: dict[str, Any]):
        chosen = _as_messages(row.get("chosen"), "chosen", "assistant")
        rejected = _as_messages(row.get("rejected"), "rejected", "assistant")
        if row.get("prompt") is not None:
            prompt = _as_messages(row["prompt"], "prompt", "user")
        elif isinstance(row.get("chosen"), str):
            raise BadRow("wrong_type", "there is no prompt")
        else:
            prompt = []
        # Lists of messages may repeat the prompt.
        if prompt and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        if not prompt:
            shared = _shared_prompt(chosen, rejected)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        if not prompt:
            raise BadRow("wrong_type", "chosen and rejected do not begin with the same prompt")
        return prompt, chosen, rejected


def _as_messages(value: Any, field: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return read_messages(value, field)


def _shared_prompt(chosen: list, rejected: list) -> int:
    """Messages that both begin with, up to the first answer that differs; where one continues the
    other, or both are equal, the last message is the answer."""
    shortest = min(len(chosen), len(rejected))
    same = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    return min(same, shortest - 1)
