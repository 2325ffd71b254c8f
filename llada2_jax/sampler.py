"""Block-diffusion decoding (arXiv 2512.15745 §5.4): the whole generation is one program.

A row decodes block by block. Every forward runs the row's current block as the noisy half against
the cached clean blocks before it; an acceptance rule fixes some of the masked positions; when none
is left, the finished block is run once more and its keys and values are committed to the cache
(those of denoising steps saw masks, and are stale). Rows of a batch have prompts of their own
lengths and work on their own blocks; finished rows idle.

`generate_tokens` decodes whole batches, `stream_tokens` the same with a stop after every block.
Both call one compiled function, `_advance`: a `lax.while_loop` with a bound that is data. It is
compiled once per *shape bucket*: (model, rows, block size, prompt bucket, total bucket, greedy or
sampled, cache, fuse_commit), where buckets are numbers of blocks from 1, 2, 3, 4, 6, 8, 12, 16 …
Prompts, lengths, thresholds, step counts, temperatures and seeds are data. `compile_count` counts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llada2_jax.decoding_rules import (
    THRESHOLD,
    Editing,
    StopOnEos,
    Threshold,
    even_schedule,
    filter_logits,
)
from llada2_jax.errors import UserError
from llada2_jax.model import Transformer, merge_params
from llada2_jax.model.attention import KVCache
from llada2_jax.types import ModelConfig, Params, SpecialTokens
from pallas_kernels.block_attention.decode import ContiguousCache
from pallas_kernels.block_layout import CLEAN, NOISY, BlockLayout, concatenate, half_layout


class RequestError(UserError, ValueError):
    """A request that cannot be served as it is; the message names the value and the way out."""


# ------------------------------------------------------------------------------- the options


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How to decode. The defaults are the paper's evaluation settings (§5.4).

    max_new_tokens: at most so many per row. The last block is denoised as a whole, then cut.
    block_size: positions denoised together; the one that the model was trained at.
    threshold: confidence, in [0, 1], above which a position is accepted at once.
    steps: a block is done after at most so many forwards (None: block_size).
    temperature: 0 takes the argmax. top_k: 0 is off. top_p: 1 is off. min_p: 0 is off.
    seed: of the draws; in [0, 2**32).
    edit_threshold: replace a generated token of the current block when the model gives another one
      a probability above this (LLaDA2.1; for models trained with noise.edit_rate). None: never.
    edit_budget: forwards that a block may take for edits after its last mask.
    stop_on_eos: end a row with its first EOS. early_stop: inside the block, see `StopOnEos`.
    fuse_commit: commit block b in the first denoising forward of block b + 1, two blocks wide,
      instead of in a forward of its own. On 2 CPU cores nothing is won, and batches (whose blocks
      end at different times, so that many forwards are wide) are a little slower, as is compiling
      (docs/log.md, 2026-11-21); worth it where a forward costs the same at twice the width.
    cache: False recomputes the whole prefix in every forward, as the released generate does
      (up to the next eighth of the capacity): the reference for tests and for measurements.

    Raises: RequestError that names the field.
    """

    max_new_tokens: int = 256
    block_size: int = 32
    threshold: float = THRESHOLD
    steps: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    edit_threshold: float | None = None
    edit_budget: int = 16
    stop_on_eos: bool = True
    early_stop: bool = False
    fuse_commit: bool = False
    cache: bool = True

    def __post_init__(self):
        steps = self.block_size if self.steps is None else self.steps
        edit = 0.0 if self.edit_threshold is None else self.edit_threshold
        for name, value, good, rule in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("block_size", self.block_size, self.block_size >= 1, "at least 1"),
            ("threshold", self.threshold, 0 <= self.threshold <= 1, "in [0, 1]"),
            ("steps", steps, steps >= 1, "at least 1, or None for block_size"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]; 1 is off"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]; 0 is off"),
            ("seed", self.seed, 0 <= self.seed < 2**32, "in [0, 2**32)"),
            ("edit_threshold", edit, 0 <= edit <= 1, "in [0, 1], or None to edit nothing"),
            ("edit_budget", self.edit_budget, self.edit_budget >= 0, "0 or more"),
        ):
            if not good:
                raise RequestError(f"{name}={value}: must be {rule}")
        if self.edit_threshold is None and self.edit_budget != SamplerOptions.edit_budget:
            raise RequestError(
                f"edit_budget={self.edit_budget}: nothing is edited without an edit_threshold"
            )

    def acceptance(self) -> Threshold:
        """The acceptance rule that these options describe."""
        schedule = even_schedule(self.block_size, self.steps or self.block_size)
        return Threshold(_f32(self.threshold), jnp.asarray(schedule))

    def editing(self) -> Editing:
        """The rule for edits that these options describe."""
        if self.edit_threshold is None:
            return Editing(_f32(np.inf), jnp.asarray(np.int32(0)))
        return Editing(_f32(self.edit_threshold), jnp.asarray(np.int32(self.edit_budget)))

    def stop_rule(self, special: SpecialTokens) -> StopOnEos:
        """The stop rule that these options describe."""
        eos = special.eos if self.stop_on_eos else -1
        return StopOnEos(jnp.asarray(np.int32(eos)), jnp.asarray(np.bool_(self.early_stop)))


def _f32(value: float) -> Array:
    return jnp.asarray(np.float32(value))


class Counted(Protocol):
    """What counts accepted tokens and forwards: of one row, or an array with one entry a row."""

    @property
    def accepted(self) -> Any: ...
    @property
    def denoise_forwards(self) -> Any: ...
    @property
    def commit_forwards(self) -> Any: ...


def tokens_per_forward(*parts: Counted, commits: bool = False) -> float:
    """Accepted tokens per denoising forward, over all rows of all parts; 0 without a forward.

    commits: whether forwards that did nothing but commit a block count too.
    """
    accepted = sum(np.sum(part.accepted) for part in parts)
    forwards = sum(np.sum(part.denoise_forwards) for part in parts)
    forwards += commits * sum(np.sum(part.commit_forwards) for part in parts)
    return float(accepted / max(forwards, 1))


@dataclasses.dataclass
class Generation:
    """What came out, on the host. Lists and arrays have one entry a row.

    tokens: generated ids, up to and including the first EOS (unless stop_on_eos is off); a
      streamed generation that is under way has those of the finished blocks.
    accepted_at: int32 [B, max_new_tokens], the row's denoising forward, counted from 0, in which
      the position was accepted; -1: it was not. confidence: fp32, likewise, 0 where it was not;
      of an edited position, that of the token it has now. edits: int32 [B, max_new_tokens], how
      often its token was replaced.
    denoise_forwards: forwards of the row's block until it is left as it is. commits: blocks
      committed to the cache. commit_forwards: forwards spent on nothing else (0 when commits are
      fused; without a cache nothing is committed). accepted: positions accepted, those after a cut
      included.
    ended_by_eos: whether the row's output ends with an EOS that stopped it. done: row is finished.
    compile_seconds: building the program; 0 if it was there. seconds: everything after that.
    """

    tokens: list[list[int]]
    accepted_at: np.ndarray
    confidence: np.ndarray
    edits: np.ndarray
    denoise_forwards: np.ndarray
    commit_forwards: np.ndarray
    commits: np.ndarray
    accepted: np.ndarray
    ended_by_eos: np.ndarray
    done: np.ndarray
    compile_seconds: float
    seconds: float

    @property
    def tokens_per_forward(self) -> float:
        """Accepted tokens per denoising forward."""
        return tokens_per_forward(self)

    @property
    def tokens_per_forward_with_commits(self) -> float:
        """Accepted tokens per forward of either kind."""
        return tokens_per_forward(self, commits=True)


# --------------------------------------------------------------------- state of a generation


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the program is specialised on, besides the shapes."""

    block_size: int
    prefill_width: int
    sampled: bool
    fuse_commit: bool
    cache: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Request:
    """What stays the same during a generation. Row fields are int32 [B], the others scalars."""

    prompt_length: Int[Array, " B"]
    first_block: Int[Array, " B"]
    last_block: Int[Array, " B"]
    row_id: Int[Array, " B"]
    acceptance: Threshold
    editing: Editing
    stop: StopOnEos
    mask: Int[Array, ""]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    seed: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What the loop carries. S: capacity, a multiple of the block size.

    tokens: ids, the mask's wherever `known` is False. known: prompt or accepted; the loop never
    asks an id whether it is a mask, so a prompt may contain one. accepted_at, confidence, edits:
    see Generation. cache: keys and values of committed tokens (and of nothing else that anyone
    sees). block: the block that the row denoises. committed: blocks in the cache; it lags behind
    `block` by one while a finished block waits. step: denoising steps of the current block;
    settling: those of them that found no mask.
    """

    tokens: Int[Array, "B S"]
    known: Bool[Array, "B S"]
    accepted_at: Int[Array, "B S"]
    confidence: Float[Array, "B S"]
    edits: Int[Array, "B S"]
    cache: KVCache | None
    block: Int[Array, " B"]
    committed: Int[Array, " B"]
    step: Int[Array, " B"]
    settling: Int[Array, " B"]
    denoise_forwards: Int[Array, " B"]
    commit_forwards: Int[Array, " B"]
    commits: Int[Array, " B"]
    done: Bool[Array, " B"]


# ------------------------------------------------------------------------------ public entry


def generate_tokens(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    special: SpecialTokens,
    options: SamplerOptions | None = None,
    row_ids: Sequence[int] | None = None,
) -> Generation:
    """Continues every prompt, all rows in one batch, without a host sync on the way.

    Args:
      prompts: ids, of any lengths; an empty one starts with a block of masks.
      row_ids: what a row's draws depend on, together with the seed, the position and the step,
        and nothing else: a row gives the same text whatever it is batched with. Default 0, 1, …

    Raises: RequestError for no prompts, an id beyond the vocabulary, or a prompt that does not
      leave room for max_new_tokens in the model's max_position_embeddings.
    """
    session = _Session(cfg, params, prompts, special, options or SamplerOptions(), row_ids)
    session.advance(_UNBOUNDED)
    return session.snapshot()


def stream_tokens(
    cfg: ModelConfig,
    params: Params,
    prompt: Sequence[int],
    special: SpecialTokens,
    options: SamplerOptions | None = None,
    row_id: int = 0,
) -> Iterator[Generation]:
    """Continues one prompt and yields what there is after every finished block.

    The last one is `done` and equals what `generate_tokens` returns. Raises the same.
    """
    session = _Session(cfg, params, [prompt], special, options or SamplerOptions(), [row_id])
    # A generator function would raise at the first next(); errors belong to the call.
    return _stream(session)


def _stream(session: _Session) -> Iterator[Generation]:
    blocks = 0
    while True:
        blocks += 1
        session.advance(blocks)
        generation = session.snapshot()
        yield generation
        if generation.done.all():
            return


def abstract_generation(
    cfg: ModelConfig, rows: int, prompt_tokens: int, options: SamplerOptions
) -> tuple[_Plan, _Request, Carry]:
    """What the generation program takes besides the parameters, as shapes: for `rows` prompts of
    `prompt_tokens`. Raises: RequestError, as `generate_tokens`."""
    special, prompts = SpecialTokens(mask=0, eos=0, pad=0), [[0] * prompt_tokens] * rows
    _check(cfg, prompts, special, options, None)
    plans: list[_Plan] = []

    def start() -> tuple[_Request, Carry]:
        plan, request, carry = _start(cfg, prompts, special, options, range(rows))
        plans.append(plan)
        return request, carry

    request, carry = jax.eval_shape(start)
    return plans[0], request, carry


def lower_generation(
    cfg: ModelConfig,
    params: Params,
    rows: int,
    prompt_tokens: int,
    options: SamplerOptions,
    device: Any,
) -> jax.stages.Lowered:
    """The generation program for a device, which may be one that is only described.

    params: abstract. Raises: as `abstract_generation`.
    """
    plan, *arguments = abstract_generation(cfg, rows, prompt_tokens, options)
    there = jax.sharding.SingleDeviceSharding(device)
    limit = jax.ShapeDtypeStruct((), np.int32)
    placed = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there),
        (params, *arguments, limit),
    )
    return _advance.lower(cfg, plan, *placed)


def compile_count() -> int:
    """How often this process has built the generation program: once per shape bucket."""
    return _builds


_UNBOUNDED = 2**31 - 1
_builds = 0


class _Session:
    """A generation under way: the device's state and the host's clock."""

    def __init__(self, cfg, params, prompts, special, options, row_ids):
        _check(cfg, prompts, special, options, row_ids)
        self.cfg, self.params, self.special, self.options = cfg, params, special, options
        self.prompt_lengths = [len(p) for p in prompts]
        row_ids = range(len(prompts)) if row_ids is None else row_ids
        self.plan, self.request, self.carry = _start(cfg, prompts, special, options, row_ids)
        self.compile_seconds = self.seconds = 0.0
        before, began = _builds, time.perf_counter()
        self.advance(0)  # builds the program if need be; with no block allowed it runs nothing
        jax.block_until_ready(self.carry.block)
        if _builds > before:
            self.compile_seconds = time.perf_counter() - began
        self.seconds = 0.0

    def advance(self, blocks: int) -> None:
        """Runs until each row has finished `blocks` blocks, counted from its first, or ended."""
        began = time.perf_counter()
        limit = np.int32(blocks)
        self.carry = _advance(self.cfg, self.plan, self.params, self.request, self.carry, limit)
        self.seconds += time.perf_counter() - began

    def snapshot(self) -> Generation:
        """Waits for the device and brings the results to the host."""
        began = time.perf_counter()
        c = dataclasses.replace(self.carry, cache=None)
        # Copies, because the next call takes the carry's buffers over.
        c = jax.tree.map(np.array, c)
        self.seconds += time.perf_counter() - began
        width, rows = self.options.max_new_tokens, range(len(self.prompt_lengths))
        outputs = [self._output(c, row) for row in rows]
        spans = [slice(n, n + width) for n in self.prompt_lengths]
        # Capacity is in whole blocks, so that every row has `width` positions after its prompt.
        accepted = (c.accepted_at >= 0).sum(-1)
        return Generation(
            tokens=[ids for ids, _ in outputs],
            accepted_at=np.stack([c.accepted_at[r, spans[r]] for r in rows]),
            confidence=np.stack([c.confidence[r, spans[r]] for r in rows]),
            edits=np.stack([c.edits[r, spans[r]] for r in rows]),
            denoise_forwards=c.denoise_forwards,
            commit_forwards=c.commit_forwards,
            commits=c.commits,
            accepted=accepted,
            ended_by_eos=np.array([ended for _, ended in outputs]),
            done=c.done,
            compile_seconds=self.compile_seconds,
            seconds=self.seconds,
        )

    def _output(self, c: Carry, row: int) -> tuple[list[int], bool]:
        start = self.prompt_lengths[row]
        end = start + self.options.max_new_tokens
        if not c.done[row]:
            end = min(end, int(c.block[row]) * self.options.block_size)
        known = c.known[row, start:end]
        # An early stop may leave masks after the EOS.
        end = start + (len(known) if known.all() else int(known.argmin()))
        ids = c.tokens[row, start:end].tolist()
        if self.options.stop_on_eos and self.special.eos in ids:
            return ids[: ids.index(self.special.eos) + 1], True
        return ids, False


# ------------------------------------------------------------------------- before the device


def _check(cfg, prompts, special, options, row_ids) -> None:
    if not len(prompts):
        raise RequestError("no prompts: pass at least one (it may be empty)")
    if row_ids is not None and len(row_ids) != len(prompts):
        raise RequestError(f"{len(row_ids)} row_ids for {len(prompts)} prompts: one each")
    for name in ("mask", "eos"):
        if not 0 <= getattr(special, name) < cfg.vocab_size:
            raise RequestError(
                f"special.{name}={getattr(special, name)} is outside the vocabulary of "
                f"{cfg.vocab_size}: is this the model's own tokenizer?"
            )
    for row, prompt in enumerate(prompts):
        wrong = [t for t in prompt if not 0 <= t < cfg.vocab_size]
        if wrong:
            raise RequestError(
                f"prompt {row} has the id {wrong[0]}, outside the vocabulary of {cfg.vocab_size}: "
                "is this the model's own tokenizer?"
            )
        total = len(prompt) + options.max_new_tokens
        if total > cfg.max_position_embeddings:
            raise RequestError(
                f"prompt {row}: {len(prompt)} tokens + max_new_tokens={options.max_new_tokens} = "
                f"{total} exceed max_position_embeddings={cfg.max_position_embeddings}: shorten "
                "the prompt or lower max_new_tokens"
            )


def bucket(count: int) -> int:
    """The smallest of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, … that holds `count` blocks."""
    size = 1
    while size < count:
        if size >= 2 and size * 3 // 2 >= count:
            return size * 3 // 2
        size *= 2
    return size if count else 0


def _start(cfg, prompts, special, options, row_ids) -> tuple[_Plan, _Request, Carry]:
    """Pads the prompts to their bucket and lays out the initial state."""
    size, rows = options.block_size, len(prompts)
    lengths = np.array([len(p) for p in prompts], np.int32)
    first = lengths // size
    last = -(-(lengths + np.int32(options.max_new_tokens)) // np.int32(size)) - 1
    capacity = bucket(int(last.max()) + 1) * size
    prefill_width = min(bucket(int(first.max())) * size, capacity) if options.cache else 0
    known = np.arange(capacity) < lengths[:, None]
    tokens = np.full((rows, capacity), special.mask, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    plan = _Plan(size, prefill_width, options.temperature > 0, options.fuse_commit, options.cache)
    request = _Request(
        prompt_length=jnp.asarray(lengths),
        first_block=jnp.asarray(first),
        last_block=jnp.asarray(last),
        row_id=jnp.asarray(np.array(row_ids, np.int32)),
        acceptance=options.acceptance(),
        editing=options.editing(),
        stop=options.stop_rule(special),
        mask=jnp.asarray(np.int32(special.mask)),
        temperature=_f32(options.temperature),
        top_k=jnp.asarray(np.int32(min(options.top_k or cfg.vocab_size, cfg.vocab_size))),
        top_p=_f32(options.top_p),
        min_p=_f32(options.min_p),
        seed=jnp.asarray(np.uint32(options.seed)),
    )
    zeros = np.zeros(rows, np.int32)
    carry = Carry(
        tokens=jnp.asarray(tokens),
        known=jnp.asarray(known),
        accepted_at=jnp.asarray(np.full((rows, capacity), -1, np.int32)),
        confidence=jnp.asarray(np.zeros((rows, capacity), np.float32)),
        edits=jnp.asarray(np.zeros((rows, capacity), np.int32)),
        cache=_empty_cache(cfg, rows, capacity) if options.cache else None,
        block=jnp.array(first),
        committed=jnp.array(zeros),
        step=jnp.array(zeros),
        settling=jnp.array(zeros),
        denoise_forwards=jnp.array(zeros),
        commit_forwards=jnp.array(zeros),
        commits=jnp.array(zeros),
        done=jnp.asarray(np.zeros(rows, bool)),
    )
    return plan, request, carry


def _empty_cache(cfg: ModelConfig, rows: int, capacity: int) -> KVCache:
    shape = (cfg.num_layers, rows, cfg.num_kv_heads, capacity, cfg.head_dim)
    return KVCache(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))


# ------------------------------------------------------------------------------- the program


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(4,))
def _advance(
    cfg: ModelConfig,
    plan: _Plan,
    params: Params,
    request: _Request,
    carry: Carry,
    limit: Int[Array, ""],
) -> Carry:
    """Prefill, if it has not happened, then the loop: until every row has ended or has finished
    `limit` blocks."""
    global _builds
    _builds += 1  # Python runs this line when the function is traced, that is, once a program
    model = merge_params(cfg, params)
    if plan.prefill_width:
        waiting = _active(request, carry, limit) & (carry.committed < request.first_block)
        prefill = partial(_prefill, model, plan, request)
        carry = jax.lax.cond(waiting.any(), prefill, lambda c: c, carry)
    return jax.lax.while_loop(
        lambda c: _active(request, c, limit).any(),
        lambda c: _iterate(model, plan, request, c, limit),
        carry,
    )


def _active(request: _Request, carry: Carry, limit: Int[Array, ""]) -> Bool[Array, " B"]:
    return ~carry.done & (carry.block - request.first_block < limit)


def _prefill(model: Transformer, plan: _Plan, request: _Request, carry: Carry) -> Carry:
    """Runs the prompts' full blocks as the clean half and commits them."""
    rows, width = carry.tokens.shape[0], plan.prefill_width
    positions = _positions(rows, width)
    inside = positions < (request.first_block * plan.block_size)[:, None]
    layout = half_layout(positions // plan.block_size, inside.astype(jnp.int32), CLEAN)
    kv = model(carry.tokens[:, :width], positions, layout, return_kv=True).kv
    cache = jax.tree.map(lambda old, new: old.at[:, :, :, :width].set(new), carry.cache, kv)
    return dataclasses.replace(carry, cache=cache, committed=request.first_block)


def _iterate(
    model: Transformer, plan: _Plan, request: _Request, carry: Carry, limit: Int[Array, ""]
) -> Carry:
    """One forward; rows that saw their masked block accept some of it."""
    active = _active(request, carry, limit)
    if not plan.cache:
        hidden = _recompute(model, plan, carry, active)
        return _denoise(model.logits(hidden), plan, request, carry, active)
    waiting = active & (carry.committed < carry.block)
    if not plan.fuse_commit:
        hidden, carry = _one_block(model, plan, carry, active)
        carry = _count_commits(carry, waiting, fused=False)
        return _denoise(model.logits(hidden), plan, request, carry, active & ~waiting)
    one, two = (partial(f, model, plan) for f in (_one_block, _two_blocks))
    hidden, carry = jax.lax.cond(waiting.any(), two, one, carry, active)
    carry = _count_commits(carry, waiting, fused=True)
    return _denoise(model.logits(hidden), plan, request, carry, active)


def _one_block(
    model: Transformer, plan: _Plan, carry: Carry, active: Bool[Array, " B"]
) -> tuple[Float[Array, "B block D"], Carry]:
    """Runs the first uncommitted block of each row.

    That block is either the one to denoise or a finished one to commit; both see the blocks
    before them and themselves, so that rows of both kinds share the forward. Keys and values are
    always written: those of a block that has masks lie beyond `committed`, where nobody looks.
    """
    out = model(
        _cut(carry.tokens, carry.committed, plan.block_size),
        _block_positions(plan, carry.committed),
        _block_layout(plan, carry.committed, active, NOISY),
        cache=_committed(plan, carry),
        return_kv=True,
    )
    assert out.kv is not None
    return out.hidden, _write(plan, carry, out.kv)


def _two_blocks(
    model: Transformer, plan: _Plan, carry: Carry, active: Bool[Array, " B"]
) -> tuple[Float[Array, "B block D"], Carry]:
    """Commits the finished block of each row that has one, and runs the next block beside it.

    The finished block is the clean half, its successor the noisy one: the attention rule lets the
    second see the first. A row without a block to commit has padding in its place.
    """
    size, waiting = plan.block_size, active & (carry.committed < carry.block)
    # A row with nothing to commit runs and writes its next block here, as padding: unseen.
    blocks = [(carry.committed, waiting, CLEAN), (carry.block, active, NOISY)]
    out = model(
        jnp.concatenate([_cut(carry.tokens, b, size) for b, _, _ in blocks], axis=1),
        jnp.concatenate([_block_positions(plan, b) for b, _, _ in blocks], axis=1),
        concatenate([_block_layout(plan, *block) for block in blocks]),
        cache=_committed(plan, carry),
        return_kv=True,
    )
    clean = jax.tree.map(lambda x: x[:, :, :, :size], out.kv)
    return out.hidden[:, size:], _write(plan, carry, clean)


def _recompute(
    model: Transformer, plan: _Plan, carry: Carry, active: Bool[Array, " B"]
) -> Float[Array, "B block D"]:
    """The current block's hidden states from the whole prefix, without a cache.

    The rule for a row that is clean up to its current block is the same with that block in either
    half, so one clean half does. The width is the next eighth of the capacity.
    """
    rows, capacity = carry.tokens.shape
    size, blocks = plan.block_size, capacity // plan.block_size
    widths = sorted({-(-blocks * part // 8) * size for part in range(1, 9)})

    def run(width: int) -> Float[Array, "B block D"]:
        positions = _positions(rows, width)
        seen = (positions // size <= carry.block[:, None]) & active[:, None]
        layout = half_layout(positions // size, seen.astype(jnp.int32), CLEAN)
        hidden = model(carry.tokens[:, :width], positions, layout).hidden
        return _cut(hidden, carry.block, size)

    needed = jnp.max(jnp.where(active, carry.block + 1, 0)) * size
    choice = jnp.searchsorted(jnp.asarray(np.array(widths, np.int32)), needed)
    return jax.lax.switch(choice, [partial(run, width) for width in widths])


def _denoise(
    logits: Float[Array, "B block V"],
    plan: _Plan,
    request: _Request,
    carry: Carry,
    active: Bool[Array, " B"],
) -> Carry:
    """Chooses tokens for the current block of the active rows, accepts some of them and edits some
    of those accepted before."""
    size = plan.block_size
    tokens, known, accepted_at, kept, edits = (
        _cut(x, carry.block, size)
        for x in (carry.tokens, carry.known, carry.accepted_at, carry.confidence, carry.edits)
    )
    positions = _block_positions(plan, carry.block)
    generated = positions >= request.prompt_length[:, None]
    choice = _choose(logits, positions, plan, request, carry.step)
    editable = known & generated & active[:, None]
    edited = request.editing.replace(tokens, editable, choice.best, choice.probability)
    accepted = request.acceptance.accept(choice.confidence, ~known, carry.step) & active[:, None]
    tokens = jnp.where(accepted, choice.tokens, jnp.where(edited, choice.best, tokens))
    kept = jnp.where(accepted, choice.confidence, jnp.where(edited, choice.probability, kept))
    settling = carry.settling + (known.all(-1) & active).astype(jnp.int32)
    known = known | accepted
    finished = known.all(-1) & active & request.editing.settled(edited, settling)
    stopped = request.stop.stop(tokens, known, generated, finished) & active
    counted = active.astype(jnp.int32)

    def paste(x, part):
        return _paste(x, part, carry.block)

    return dataclasses.replace(
        carry,
        tokens=paste(carry.tokens, tokens),
        known=paste(carry.known, known),
        accepted_at=paste(
            carry.accepted_at, jnp.where(accepted, carry.denoise_forwards[:, None], accepted_at)
        ),
        confidence=paste(carry.confidence, kept),
        edits=paste(carry.edits, edits + edited.astype(jnp.int32)),
        block=carry.block + finished.astype(jnp.int32),
        step=jnp.where(finished, 0, carry.step + counted),
        settling=jnp.where(finished, 0, settling),
        denoise_forwards=carry.denoise_forwards + counted,
        done=carry.done | stopped | (finished & (carry.block == request.last_block)),
    )


# --------------------------------------------------------------------------- choosing tokens


@dataclasses.dataclass(frozen=True)
class _Choice:
    """tokens: what each position would accept; confidence: the model's probability of it. best:
    the most probable token; probability: its own. The first two are these, unless one samples."""

    tokens: Int[Array, "B block"]
    confidence: Float[Array, "B block"]
    best: Int[Array, "B block"]
    probability: Float[Array, "B block"]


def _choose(
    logits: Float[Array, "B block V"],
    positions: Int[Array, "B block"],
    plan: _Plan,
    request: _Request,
    step: Int[Array, " B"],
) -> _Choice:
    """A token for every position.

    Probabilities are those of the unfiltered distribution at temperature 1 (the mask excluded)
    also when sampling, so that thresholds mean the same at every temperature: after top_k = 1
    everything would be certain.
    """
    is_mask = jnp.arange(logits.shape[-1], dtype=jnp.int32) == request.mask
    logits = jnp.where(is_mask, -jnp.inf, logits)
    total = jax.nn.logsumexp(logits, axis=-1)

    def probability(tokens):
        picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
        return jnp.exp(picked - total)

    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chance = probability(best)
    if not plan.sampled:
        return _Choice(best, chance, best, chance)
    filtered = filter_logits(
        logits / request.temperature, request.top_k, request.top_p, request.min_p
    )
    tokens = _draw(filtered, positions, request, step)
    return _Choice(tokens, probability(tokens), best, chance)


def _draw(
    logits: Float[Array, "B block V"],
    positions: Int[Array, "B block"],
    request: _Request,
    step: Int[Array, " B"],
) -> Int[Array, "B block"]:
    """Gumbel-max with noise from (seed, row id, position, step) and nothing else."""
    root = jax.random.key(request.seed)

    def draw(logits, row_id, position, step):
        key = root
        for part in (row_id, position, step):
            key = jax.random.fold_in(key, part)
        return jnp.argmax(logits + jax.random.gumbel(key, logits.shape)).astype(jnp.int32)

    per_position = jax.vmap(draw, in_axes=(0, None, 0, None))
    return jax.vmap(per_position)(logits, request.row_id, positions, step)


# ------------------------------------------------------------------------------ blocks of rows


def _cut(x: Array, block: Int[Array, " B"], size: int) -> Array:
    """The given block of each row: [B, S, ...] -> [B, size, ...]."""
    return jax.vmap(lambda row, b: jax.lax.dynamic_slice_in_dim(row, b * size, size))(x, block)


def _paste(x: Array, part: Array, block: Int[Array, " B"]) -> Array:
    """Puts a block back into each row; the inverse of `_cut`.

    Rows beyond their end are clamped by both in the same way: what was cut is put back."""
    size = part.shape[1]

    def put(row, new, b):
        return jax.lax.dynamic_update_slice_in_dim(row, new, b * size, axis=0)

    return jax.vmap(put)(x, part, block)


def _write(plan: _Plan, carry: Carry, kv: KVCache) -> Carry:
    """Puts keys and values [N, B, K, block, h] where each row's first uncommitted block stands."""
    start = carry.committed * plan.block_size

    def put(cache, new, at):
        return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), at, axis=2)

    write = jax.vmap(put, in_axes=(1, 1, 0), out_axes=1)
    cache = jax.tree.map(lambda old, new: write(old, new, start), carry.cache, kv)
    return dataclasses.replace(carry, cache=cache)


def _count_commits(carry: Carry, committed: Bool[Array, " B"], *, fused: bool) -> Carry:
    count = committed.astype(jnp.int32)
    return dataclasses.replace(
        carry,
        committed=carry.committed + count,
        commits=carry.commits + count,
        commit_forwards=carry.commit_forwards + (0 if fused else count),
    )


def _positions(rows: int, width: int) -> Int[Array, "B width"]:
    return jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (rows, width))


def _block_positions(plan: _Plan, block: Int[Array, " B"]) -> Int[Array, "B block"]:
    return block[:, None] * plan.block_size + jnp.arange(plan.block_size, dtype=jnp.int32)


def _block_layout(
    plan: _Plan, block: Int[Array, " B"], present: Bool[Array, " B"], half: int
) -> BlockLayout:
    """One block a row; padding where the row is not `present`."""
    shape = (block.shape[0], plan.block_size)
    segment = jnp.broadcast_to(present.astype(jnp.int32)[:, None], shape)
    return half_layout(jnp.broadcast_to(block[:, None], shape), segment, half)


def _committed(plan: _Plan, carry: Carry) -> ContiguousCache:
    """What the blocks under way attend to: everything before the first uncommitted block."""
    assert carry.cache is not None
    return carry.cache.until(carry.committed * plan.block_size)
