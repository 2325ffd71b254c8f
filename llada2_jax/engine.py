"""Requests to text: tokenising, batches, streaming, detokenising. One path for all callers.

engine = load("runs/quickstart/model")
print(engine.generate("def fibonacci(n):").text)
"""

from __future__ import annotations

import dataclasses
import logging
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from llada2_jax.checkpoint import ModelBundle
from llada2_jax.data.tokenizer import whole_tokenizer
from llada2_jax.hub import load_model
from llada2_jax.sampler import (
    Generation,
    RequestError,
    SamplerOptions,
    generate_tokens,
    stream_tokens,
    tokens_per_forward,
)

Prompt = str | Sequence[int]

_log = logging.getLogger(__name__)

_DEFAULTS_FILE = "generation_config.json (of our checkpoints: their generation defaults)"
_OPTIONS = tuple(field.name for field in dataclasses.fields(SamplerOptions))


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """How a completion came about; one entry a token of the completion.

    accepted_at: int32, the denoising forward (from 0) that accepted it. confidence: fp32, the
    model's probability of it then.
    """

    accepted_at: np.ndarray
    confidence: np.ndarray


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answered prompt.

    text: the completion without special tokens; None if the model has no tokenizer. tokens: its
    ids, up to and including the EOS. finish_reason: "eos" or "length". The counts are Generation's
    for this row; edits: tokens replaced after they were accepted. seconds, compile_seconds: this
    row's share of its batch's time, so that sums over completions are the time it took.
    """

    text: str | None
    tokens: list[int]
    prompt_tokens: list[int]
    finish_reason: str
    denoise_forwards: int
    commit_forwards: int
    commits: int
    accepted: int
    edits: int
    seconds: float
    compile_seconds: float
    trajectory: Trajectory | None = None

    @property
    def tokens_per_forward(self) -> float:
        """Accepted tokens per denoising forward."""
        return tokens_per_forward(self)

    @property
    def tokens_per_forward_with_commits(self) -> float:
        """Accepted tokens per forward of either kind."""
        return tokens_per_forward(self, commits=True)


def load(path: str | os.PathLike[str], *, max_batch: int = 8, **kwargs: Any) -> Engine:
    """An engine for the model in a directory; other arguments and errors: `hub.load_model`."""
    return Engine(load_model(path, **kwargs), max_batch=max_batch)


class Engine:
    """Answers prompts with one model.

    Args:
      bundle: the model with its parameters. Its `generation` gives the defaults: fields of
        SamplerOptions, and `add_bos`: whether a text prompt starts with special.bos.
      max_batch: rows decoded together. More prompts make more batches, of similar lengths.
    """

    def __init__(self, bundle: ModelBundle, *, max_batch: int = 8):
        if bundle.params is None:
            raise RequestError("the bundle has no parameters: get it from hub.load_model")
        if max_batch < 1:
            raise RequestError(f"max_batch={max_batch}: must be at least 1")
        self.bundle, self.max_batch = bundle, max_batch
        text = bundle.tokenizer_files.get("tokenizer.json")
        self.tokenizer = None if text is None else whole_tokenizer(text)
        self.defaults = default_options(bundle.generation)
        self.add_bos = bool(_default(bundle.generation, "add_bos", bool))
        if self.add_bos and bundle.special.bos is None:
            raise RequestError("generation.add_bos is set, but special.bos is not: set either both")

    def options(self, **changes: Any) -> SamplerOptions:
        """The model's defaults with changes; None leaves a default as it is.

        Raises: RequestError for an unknown name or a value out of range.
        """
        unknown = sorted(set(changes) - set(_OPTIONS))
        if unknown:
            raise RequestError(f"no option {', '.join(unknown)}: choose from {', '.join(_OPTIONS)}")
        given = {name: value for name, value in changes.items() if value is not None}
        return dataclasses.replace(self.defaults, **given)

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt; ids pass as they are.

        Text that spells a special token becomes that token, as in every tool that uses this
        tokenizer. The sampler goes by positions, so that even a mask in a prompt stays a token of
        the prompt. Raises: RequestError for text without a tokenizer.
        """
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise RequestError("the model has no tokenizer.json: pass prompts as lists of ids")
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        bos = self.bundle.special.bos
        return [bos, *ids] if self.add_bos and bos is not None and ids[:1] != [bos] else ids

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Text of ids, without special tokens; None if the model has no tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(list(tokens))

    @overload
    def generate(
        self,
        prompts: str,
        *,
        trajectory: bool = False,
        progress: Callable[[int], Any] | None = None,
        **options: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        trajectory: bool = False,
        progress: Callable[[int], Any] | None = None,
        **options: Any,
    ) -> list[Completion]: ...

    def generate(self, prompts, *, trajectory=False, progress=None, **options):
        """Continues prompts.

        Args:
          prompts: a text (gives one Completion), or a list of texts or of lists of ids (gives a
            list). They may be of any lengths; batching does not change what comes out.
          trajectory: also record when each token was accepted.
          progress: called after each batch with the number of its prompts, as tqdm's `update` is.
          options: fields of SamplerOptions, e.g. max_new_tokens=128, threshold=0.9, seed=1.

        Raises: RequestError that names the option or the prompt.
        """
        if isinstance(prompts, str):
            return self.generate([prompts], trajectory=trajectory, progress=progress, **options)[0]
        chosen = self.options(**options)
        ids = [self.encode(prompt) for prompt in prompts]
        by_length = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        done: dict[int, Completion] = {}
        for start in range(0, len(ids), self.max_batch):
            rows = by_length[start : start + self.max_batch]
            batch = [ids[row] for row in rows]
            generation = self._run(batch, chosen, rows)
            for index, row in enumerate(rows):
                done[row] = self._completion(generation, index, batch[index], trajectory)
            if progress is not None:
                progress(len(rows))
        return [done[row] for row in range(len(ids))]

    def stream(
        self, prompt: Prompt, *, row_id: int = 0, trajectory: bool = False, **options: Any
    ) -> Iterator[str | Completion]:
        """Continues one prompt: yields the text of every finished block, at last the Completion.

        row_id: which of several prompts this is; with the seed it decides what is drawn, so that
        `stream(prompts[i], row_id=i)` gives what `generate(prompts)[i]` does.

        The pieces joined are the Completion's text. A character whose bytes are not complete
        waits for the next block. Where a decoder rewrites text that was sent (none that is
        byte-level does), what follows waits until it continues that text again; if it never does,
        the last piece is all of the text from the first rewritten character on, and a warning is
        logged. Raises as `generate`, at the call.
        """
        chosen, ids = self.options(**options), self.encode(prompt)
        model = self.bundle
        parts = stream_tokens(model.config, model.params, ids, model.special, chosen, row_id)
        return self._stream(parts, ids, trajectory)

    def _stream(self, parts: Iterator[Generation], ids, trajectory) -> Iterator[str | Completion]:
        sent, text, generation = "", "", None
        for generation in parts:
            text = self.decode(generation.tokens[0]) or ""
            ready = text if generation.done.all() else complete_characters(text)
            if ready.startswith(sent) and len(ready) > len(sent):
                yield ready[len(sent) :]
                sent = ready
        assert generation is not None
        if sent != text:
            _log.warning(
                "the tokenizer's decoder rewrote text that had been sent: the stream's last piece "
                "repeats the text from there on; the Completion's text is right"
            )
            yield text[len(os.path.commonprefix([sent, text])) :]
        yield self._completion(generation, 0, ids, trajectory)

    def _run(self, prompts, options: SamplerOptions, rows: list[int]) -> Generation:
        model = self.bundle
        return generate_tokens(model.config, model.params, prompts, model.special, options, rows)

    def _completion(self, g: Generation, row: int, prompt, trajectory: bool) -> Completion:
        tokens, rows = g.tokens[row], len(g.tokens)
        record = Trajectory(
            g.accepted_at[row, : len(tokens)].copy(), g.confidence[row, : len(tokens)].copy()
        )
        return Completion(
            text=self.decode(tokens),
            tokens=tokens,
            prompt_tokens=list(prompt),
            finish_reason="eos" if g.ended_by_eos[row] else "length",
            denoise_forwards=int(g.denoise_forwards[row]),
            commit_forwards=int(g.commit_forwards[row]),
            commits=int(g.commits[row]),
            accepted=int(g.accepted[row]),
            edits=int(g.edits[row].sum()),
            seconds=g.seconds / rows,
            compile_seconds=g.compile_seconds / rows,
            trajectory=record if trajectory else None,
        )


def tokens_per_second(done: Sequence[Completion]) -> float:
    """Tokens of all completions, as many as were asked for, over the time they took together."""
    return sum(len(c.tokens) for c in done) / max(sum(c.seconds for c in done), 1e-9)


def complete_characters(text: str) -> str:
    """The text without the replacement characters at its end: bytes that may still become one."""
    return text.rstrip("\ufffd")


def default_options(generation: Mapping[str, Any]) -> SamplerOptions:
    """A model's own sampler options, from its generation_config.json.

    Read are the fields of SamplerOptions; `block_length`, the released files' name of block_size,
    where that is absent; and `do_sample`: false is greedy, whatever the temperature; true
    without one samples at temperature 1. What else Hugging Face writes there is not the sampler's.
    null stands for the default.
    Raises: RequestError that names the field.
    """
    types = typing.get_type_hints(SamplerOptions)
    names = {"block_length": "block_size", **{name: name for name in types}}
    given = [(ours, _default(generation, name, types[ours])) for name, ours in names.items()]
    options = {name: value for name, value in given if value is not None}
    sample = _default(generation, "do_sample", bool)
    if sample is False:
        options["temperature"] = 0.0
    elif sample and not options.setdefault("temperature", 1.0):
        raise _bad_default("temperature", 0.0, "more than 0 where do_sample is true")
    try:
        return SamplerOptions(**options)
    except RequestError as error:
        raise RequestError(f"{_DEFAULTS_FILE}: {error}") from None


def _default(generation: Mapping[str, Any], name: str, hint: Any) -> Any:
    """A field of the defaults, None where it is absent; an integer is a fine float."""
    value = generation.get(name)
    wanted = {float: (float, int), int: (int,), bool: (bool,)}
    [kind] = {hint} if hint in wanted else set(typing.get_args(hint)) - {type(None)}
    if value is not None and type(value) not in wanted[kind]:
        raise _bad_default(name, value, f"of type {kind.__name__}")
    return value


def _bad_default(name: str, value: Any, rule: str) -> RequestError:
    return RequestError(f"{_DEFAULTS_FILE}: {name} is {value!r}; it must be {rule}")
