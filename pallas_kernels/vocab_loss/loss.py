"""Head and cross-entropy in chunks of tokens.

Tokens with a loss are taken in chunks, so that logits exist for one chunk at a time, and tokens
without one cost nothing: they are left out of the chunks, and the number of chunks is data.

`vocab_loss` knows each token's weight beforehand, so it computes the gradients beside the loss,
while a chunk's logits are at hand: three matmuls. `token_losses` gives one loss a token, whose
weights only the backward pass knows, and computes the logits again there: four matmuls.

The vocabulary may be sharded over a mesh axis. A device then has its columns' logits only; maxima
and sums go over the axis, three small collectives a chunk, and one of [chunk, D] for the gradient.

Memory beyond inputs and outputs is one chunk's logits and the head in the activations' dtype. The
head's gradient is summed in fp32, V · D · 4 bytes: the floor, unless the vocabulary is sharded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOGITS_BYTES = 256 * 2**20
"""What the fp32 logits of one chunk may take on a device, however many tokens there are."""

_ROW_MULTIPLE = 128  # rows of a chunk fill whole tiles of a matrix unit
_MOST_ROWS = 1024  # the head is read and its gradient updated once a chunk: more rows gain little
_CHUNKS = 8  # so that rounding up to whole chunks adds at most an eighth


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenStats:
    """Of each token; zeros (False) where nothing was computed.

    nll: fp32, −log p(target). correct: bool, the target is the most probable id (of equals, the
    lowest). confidence: fp32, probability of the most probable id. entropy: fp32, in nats, of
    softmax(logits / temperature); None unless asked for.
    """

    nll: Float[Array, "*tokens"]
    correct: Bool[Array, "*tokens"]
    confidence: Float[Array, "*tokens"]
    entropy: Float[Array, "*tokens"] | None = None


def vocab_loss(
    hidden: Float[Array, "*tokens D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, "*tokens"],
    weights: Float[Array, "*tokens"],
    *,
    entropy_weights: Float[Array, "*tokens"] | None = None,
    temperature: float = 1.0,
    vocab_axis: int = 1,
    axis_name: str | None = None,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], TokenStats]:
    """Σ weights · −log p(target) + Σ entropy_weights · [argmax = target] · entropy.

    The second sum is CAP's confidence loss (arXiv 2512.15745, §5.2), with λ and what it is divided
    by inside entropy_weights. A token is computed if either of its weights is not 0.

    Args:
      hidden: final hidden states; their dtype is that of the matmuls, which sum in fp32.
      head: output weights, this device's part of the vocabulary if axis_name is given.
      targets: ids in [0, V); another id where a weight is not 0 makes the loss NaN.
      weights, entropy_weights: fp32 constants: no gradient reaches them.
      temperature: of the entropy's distribution.
      vocab_axis: which axis of head is the vocabulary (0: tied to the embedding).
      axis_name: mesh axis that shards the vocabulary, inside jax.shard_map with check_vma=True.
        hidden, targets and weights are the same along it.
      chunk: tokens a chunk; `chunk_rows` by default.

    Returns: the loss, fp32, differentiable in hidden and head; and the statistics of the tokens
      computed, constants to differentiation.
    Raises: ValueError for shapes that do not fit, a vocab_axis other than 0 and 1, and an axis_name
      that does not shard the head.
    """
    plan = _plan(hidden, head, vocab_axis, axis_name, chunk)
    if entropy_weights is not None:
        plan = dataclasses.replace(plan, temperature=float(temperature))
    named = {"targets": targets, "weights": weights, "entropy_weights": entropy_weights}
    loss, stats = _weighted(plan, *_flat(plan, hidden, head, named))
    return loss, _shaped(lax.stop_gradient(stats), hidden)


def token_losses(
    hidden: Float[Array, "*tokens D"],
    head: Float[Array, "D V"] | Float[Array, "V D"],
    targets: Int[Array, "*tokens"],
    where: Bool[Array, "*tokens"],
    *,
    vocab_axis: int = 1,
    axis_name: str | None = None,
    chunk: int | None = None,
) -> TokenStats:
    """Each token's loss, for objectives that are not a weighted sum of them (DPO, §5.3).

    As `vocab_loss`, with `nll` differentiable in hidden and head and without the entropy.

    Args:
      where: which tokens to compute.
    """
    plan = _plan(hidden, head, vocab_axis, axis_name, chunk)
    flat = _flat(plan, hidden, head, {"targets": targets, "where": where})
    stats = _per_token(plan, *flat)
    stats = dataclasses.replace(stats, confidence=lax.stop_gradient(stats.confidence))
    return _shaped(stats, hidden)


def chunk_rows(tokens: int, vocabulary: int) -> int:
    """Tokens a chunk: an eighth of all, at most 1024 and within LOGITS_BYTES, a multiple of 128 and
    at least that (but no more than there are)."""
    rows = min(tokens // _CHUNKS, _MOST_ROWS, LOGITS_BYTES // (4 * vocabulary))
    rows = max(rows // _ROW_MULTIPLE, 1) * _ROW_MULTIPLE
    return max(min(rows, tokens), 1)


# ---- what the chunks have in common --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """chunk: rows. axes: mesh axes of the vocabulary. head: its einsum subscripts.
    temperature: of the entropy, if that is wanted."""

    chunk: int
    axes: tuple[str, ...]
    head: str
    temperature: float | None = None


def _plan(hidden, head, vocab_axis: int, axis_name: str | None, chunk: int | None) -> _Plan:
    if vocab_axis not in (0, 1):
        raise ValueError(f"vocab_axis={vocab_axis!r}: the head has two axes, choose 0 or 1")
    if head.ndim != 2 or head.shape[1 - vocab_axis] != hidden.shape[-1]:
        raise ValueError(
            f"head {head.shape} with vocab_axis={vocab_axis} does not fit hidden {hidden.shape}: "
            f"its axis {1 - vocab_axis} must have size {hidden.shape[-1]}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be positive")
    if axis_name is not None and axis_name not in _varying(head):
        raise ValueError(
            f"axis_name={axis_name!r} does not shard the head: call inside jax.shard_map "
            f"(check_vma=True) with {axis_name!r} in the in_specs of the head's vocabulary"
        )
    if axis_name is not None and axis_name in _varying(hidden):
        raise ValueError(
            f"hidden differs along axis_name={axis_name!r}, which shards the vocabulary: "
            "gather it over that axis first"
        )
    tokens = hidden.size // hidden.shape[-1]
    return _Plan(
        chunk=chunk or chunk_rows(tokens, head.shape[vocab_axis]),
        axes=() if axis_name is None else (axis_name,),
        head=("vd", "dv")[vocab_axis],
    )


def _varying(x) -> frozenset[str]:
    """Manual mesh axes along which x may differ."""
    return jax.typeof(x).manual_axis_type.varying


def _flat(plan: _Plan, hidden, head, named: dict[str, Array | None]):
    """Tokens on one axis. Everything is made to vary over the same data axes, so that the head's
    gradient is summed over those along which the tokens differ."""
    for name, x in named.items():
        if x is not None and x.shape != hidden.shape[:-1]:
            raise ValueError(
                f"{name} has shape {x.shape}: it must be {hidden.shape[:-1]}, one a hidden state"
            )
    arrays = [hidden.reshape(-1, hidden.shape[-1]), head]
    arrays += [None if x is None else x.reshape(-1) for x in named.values()]
    axes = frozenset[str]().union(*(_varying(x) for x in arrays if x is not None))
    axes -= frozenset(plan.axes)

    def vary(x):
        return lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying")

    return [None if x is None else vary(x) for x in arrays]


def _shaped(stats: TokenStats, hidden) -> TokenStats:
    """One value for each of hidden's leading axes again."""
    return jax.tree.map(lambda x: x.reshape(hidden.shape[:-1]), stats)


def _sweep(plan: _Plan, hidden, head, targets, active, cotangents=None):
    """Statistics of the active tokens and, given the cotangents of their nll and their entropy,
    the gradients of hidden (its dtype) and head (its dtype, summed in fp32), else None.

    The entropy's cotangent counts where the token is correct.
    """
    tokens = hidden.shape[0]
    kernel = head.astype(hidden.dtype)
    slots = jnp.arange(-(-tokens // plan.chunk) * plan.chunk, dtype=jnp.int32)
    active_rows = jnp.flatnonzero(active, size=slots.size, fill_value=tokens).astype(jnp.int32)
    # Past the last active token: rows out of range, read as 0 and not written. Distinct, since
    # scatters may count on that.
    count = active.sum(dtype=jnp.int32)
    active_rows = jnp.where(slots < count, active_rows, tokens + slots)
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(i, carry):
        rows = lax.dynamic_slice_in_dim(active_rows, i * plan.chunk, plan.chunk)
        take = functools.partial(_take, rows)
        x = take(hidden)
        logits = product(f"nd,{plan.head}->nv", x, kernel)
        stats, pullback = _stats_and_pullback(plan, logits, take(targets))
        if cotangents is None:
            return jax.tree.map(functools.partial(_put, rows), carry, (stats, None))
        whole_stats, (dhidden, dhead) = carry
        dlogits = pullback(*(None if c is None else take(c) for c in cotangents))
        dlogits = dlogits.astype(hidden.dtype)
        dx = lax.psum(product(f"nv,{plan.head}->nd", dlogits, kernel), plan.axes)
        dhead = dhead + product(f"nd,nv->{plan.head}", x, dlogits)
        put = functools.partial(_put, rows)
        return jax.tree.map(put, whole_stats, stats), (put(dhidden, dx.astype(x.dtype)), dhead)

    zeros = jnp.zeros_like(targets, jnp.float32)
    stats = TokenStats(
        nll=zeros,
        correct=jnp.zeros_like(targets, bool),
        confidence=zeros,
        entropy=None if plan.temperature is None else zeros,
    )
    grads = None
    if cotangents is not None:
        grads = jnp.zeros_like(hidden), jnp.zeros_like(head, jnp.float32)
    chunks = -(-count // plan.chunk)
    stats, grads = lax.fori_loop(0, chunks, body, (stats, grads))
    return stats, grads and (grads[0], grads[1].astype(head.dtype))


def _take(rows, x):
    return x.at[rows].get(mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True)


def _put(rows, whole, part):
    return whole.at[rows].set(part, mode="drop", indices_are_sorted=True, unique_indices=True)


def _stats_and_pullback(
    plan: _Plan, logits: Float[Array, "rows V"], targets: Int[Array, " rows"]
) -> tuple[TokenStats, Callable]:
    """Statistics of a chunk, and the map from the cotangents of nll and entropy to the logits'."""
    vocabulary = logits.shape[1]
    first = lax.axis_index(plan.axes) * vocabulary
    ids = jnp.arange(vocabulary, dtype=jnp.int32)
    local = targets - first
    here = (local >= 0) & (local < vocabulary)

    highest = lax.pmax(logits.max(-1), plan.axes)
    shifted = logits - highest[:, None]
    powers = jnp.exp(shifted)
    chosen = jnp.take_along_axis(logits, jnp.where(here, local, 0)[:, None], axis=1)[:, 0]
    chosen = jnp.where(here, chosen - highest, 0.0)
    total, chosen, found = lax.psum((powers.sum(-1), chosen, here.astype(jnp.int32)), plan.axes)
    no_id = jnp.iinfo(jnp.int32).max
    best = jnp.where(logits == highest[:, None], ids, no_id).min(-1)
    best = lax.pmin(jnp.where(best < no_id, best + first, no_id), plan.axes)
    stats = TokenStats(
        nll=jnp.where(found > 0, jnp.log(total) - chosen, jnp.nan),
        correct=best == targets,
        confidence=1.0 / total,
    )

    def pullback(cotangent):
        is_target = (ids == local[:, None]).astype(jnp.float32)
        return cotangent[:, None] * (powers / total[:, None] - is_target)

    if plan.temperature is None:
        return stats, lambda nll, entropy: pullback(nll)
    entropy, entropy_pullback = _entropy_and_pullback(plan.axes, plan.temperature, shifted)

    def both(nll_cotangent, entropy_cotangent):
        gated = jnp.where(stats.correct, entropy_cotangent, 0.0)
        return pullback(nll_cotangent) + entropy_pullback(gated)

    return dataclasses.replace(stats, entropy=entropy), both


def _entropy_and_pullback(axes: tuple[str, ...], temperature: float, shifted):
    """Entropy of softmax(shifted / temperature), and the map from its cotangent to the logits'."""
    scaled = shifted / temperature
    powers = jnp.exp(scaled)
    total, mean = lax.psum((powers.sum(-1), (powers * scaled).sum(-1)), axes)
    mean = mean / total

    def pullback(cotangent):
        share = cotangent / (total * temperature)
        return share[:, None] * powers * (mean[:, None] - scaled)

    return jnp.log(total) - mean, pullback


# ---- gradients -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(plan, hidden, head, targets, weights, entropy_weights):
    stats, _ = _sweep(plan, hidden, head, targets, _weighs(weights, entropy_weights))
    return _total(stats, weights, entropy_weights), stats


def _weighted_forward(plan, hidden, head, targets, weights, entropy_weights):
    active = _weighs(weights, entropy_weights)
    stats, grads = _sweep(plan, hidden, head, targets, active, (weights, entropy_weights))
    return (_total(stats, weights, entropy_weights), stats), grads


def _weighted_backward(plan, grads, cotangents):
    grads = [(cotangents[0] * g.astype(jnp.float32)).astype(g.dtype) for g in grads]
    return *grads, None, None, None


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _weighs(weights, entropy_weights):
    return (weights != 0) if entropy_weights is None else (weights != 0) | (entropy_weights != 0)


def _total(stats: TokenStats, weights, entropy_weights):
    loss = (weights * stats.nll).sum()
    if entropy_weights is None:
        return loss
    return loss + jnp.where(stats.correct, entropy_weights * stats.entropy, 0.0).sum()


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _per_token(plan, hidden, head, targets, where):
    return _sweep(plan, hidden, head, targets, where)[0]


def _per_token_forward(plan, hidden, head, targets, where):
    return _per_token(plan, hidden, head, targets, where), (hidden, head, targets, where)


def _per_token_backward(plan, residuals, cotangents):
    hidden, head, targets, where = residuals
    _, grads = _sweep(plan, hidden, head, targets, where, (cotangents.nll, None))
    return *grads, None, None


_per_token.defvjp(_per_token_forward, _per_token_backward)
