"""`attend_gpu`: block-diffusion attention on NVIDIA GPUs, from key intervals."""

from __future__ import annotations

import dataclasses
import functools
import logging
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.block_attention.gpu import mosaic, schedule, triton
from pallas_kernels.block_attention.gpu.schedule import Tiles
from pallas_kernels.block_attention.residuals import named
from pallas_kernels.block_layout import KeyIntervals

Implementation = Literal["mosaic", "triton"]
IMPLEMENTATIONS: dict[str, ModuleType] = {"mosaic": mosaic, "triton": triton}

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is static about a call."""

    kernels: ModuleType
    tiles: Tiles
    interpret: bool


def attend_gpu(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    intervals: KeyIntervals,
    *,
    implementation: Implementation | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "batch queries heads head_dim"]:
    """Softmax attention of every query over the keys of its intervals; differentiable in q, k, v.

    Args:
      q, k, v: of one dtype; heads is a multiple of kv_heads. The scale is head_dim**-0.5; scores,
        softmax and sums are fp32.
      intervals: int32 bounds on the key axis, as `key_intervals` gives them. Any other two runs
        without common keys are right too, and fast when queries of a tile see much the same keys.
      implementation: "mosaic" (Hopper) or "triton"; None takes what the GPU at hand and the shapes
        allow, and logs a warning with the reason when that is not "mosaic".
      tiles: None for `default_tiles`.
      interpret: run the kernels' bodies on the CPU, for tests.

    Returns: the shape and dtype of q. A query without keys gives zeros and has zero gradient. NaN
    or inf in keys that no query of the row sees, and in queries without keys, goes nowhere.

    Raises: ValueError for shapes or dtypes that no kernel takes; NotImplementedError where the
      implementation asked for cannot run them, or the GPU is older than Ampere.
    """
    _check(q, k, v, intervals)
    name = implementation or choose(q, k)
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {name!r}: choose one of {sorted(IMPLEMENTATIONS)}")
    kernels = IMPLEMENTATIONS[name]
    plan = _Plan(kernels, tiles or kernels.default_tiles(q, k), interpret)
    reason = kernels.unsupported(q, k, plan.tiles)
    if name == "mosaic" and _gpus() and not interpret:  # without one, it is lowered for one
        reason = _not_hopper(_compute_capability()) or reason
    if reason:
        raise NotImplementedError(f"implementation {name!r}: {reason}")
    return _padded(q, k, v, intervals, plan)


def default_tiles(implementation: Implementation, q, k) -> Tiles:
    """Tiles used for arrays like q and k (only shapes and dtypes are read)."""
    return IMPLEMENTATIONS[implementation].default_tiles(q, k)


def computed_pairs(intervals: KeyIntervals, keys: int, tiles: Tiles) -> tuple[float, float]:
    """Query-key pairs a head computes, forward and backward, in all rows together.

    Counted from the ranges that the loops execute. The backward pass is two kernels, of three and
    four matrix products a pair: their mean by that weight, so that pairs are proportional to work.
    """
    starts, ends = schedule.runs_of(intervals)
    starts, ends = (_to_multiple(x, 2, tiles.multiples()[0]) for x in (starts, ends))
    keys += -keys % tiles.multiples()[1]

    def pairs(tile, ranges):
        return float(schedule.visited(ranges)) * tile[0] * tile[1]

    forward = pairs(tiles.forward, schedule.key_ranges(starts, ends, *tiles.forward))
    tile = tiles.query_gradient
    over_keys = pairs(tile, schedule.key_ranges(starts, ends, *tile))
    over_queries = pairs(
        tiles.key_gradients, _query_ranges(starts, ends, keys, tiles.key_gradients)
    )
    return forward, (3 * over_keys + 4 * over_queries) / 7


def choose(q, k) -> Implementation:
    """The implementation for the GPU at hand; says why when it is not the fastest.

    Raises: NotImplementedError without a GPU that one of them supports.
    """
    capability = _compute_capability()
    if capability < (8, 0):
        raise NotImplementedError(
            f"compute capability {capability[0]}.{capability[1]}: the GPU kernels need 8.0 (Ampere)"
            " or later; use the 'xla' backend"
        )
    reason = _not_hopper(capability) or mosaic.unsupported(q, k, mosaic.default_tiles(q, k))
    if reason is None:
        return "mosaic"
    _warn_once(f"block attention runs on Triton, not on Mosaic GPU, which is faster: {reason}")
    return "triton"


def _not_hopper(capability: tuple[int, int]) -> str | None:
    if capability[0] == 9:
        return None
    return f"compute capability {capability[0]}.{capability[1]} is not Hopper's 9.0"


def _gpus() -> list:
    return [d for d in jax.local_devices() if d.platform == "gpu"]


def _compute_capability() -> tuple[int, int]:
    devices = _gpus()
    capability = getattr(devices[0], "compute_capability", "") if devices else ""
    if "." not in capability:
        raise NotImplementedError(
            f"default backend {jax.default_backend()!r}: attend_gpu needs an NVIDIA GPU "
            "(name an implementation to lower for one, or pass interpret=True with it)"
        )
    major, minor = capability.split(".")
    return int(major), int(minor)


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _check(q, k, v, intervals) -> None:
    if k.shape != v.shape or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"k is {k.dtype}{k.shape}, v {v.dtype}{v.shape}, q {q.dtype}{q.shape}: "
            "k and v need one shape, all three one dtype"
        )
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q {q.shape} and k {k.shape}: batch and head_dim must agree, and the heads of q be a "
            "multiple of those of k"
        )
    shapes = {bound.shape for bound in (*intervals.own, *intervals.earlier)}
    if shapes != {q.shape[:2]}:
        raise ValueError(f"interval bounds {sorted(shapes)}: expected {q.shape[:2]}, one a query")


def _to_multiple(x, axis, multiple):
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, widths) if widths[axis][1] else x


def _padded(q, k, v, intervals, plan):
    """Pads to whole tiles, and blanks what is not seen.

    Blanking happens here, in one fused pass, because a tile holds seen and unseen keys: a weight
    of zero times NaN would still be NaN.
    """
    queries, keys = plan.tiles.multiples()
    starts, ends = schedule.runs_of(intervals)
    sees = (ends > starts).any(1)
    seen = schedule.seen_keys(starts, ends, k.shape[1])

    def blank(x, where, multiple):
        x = jnp.where(where[:, :, None, None], x, jnp.zeros((), x.dtype))
        return _to_multiple(x, 1, multiple)

    starts, ends = (_to_multiple(x, 2, queries) for x in (starts, ends))
    out = _attend(
        blank(q, sees, queries), blank(k, seen, keys), blank(v, seen, keys), starts, ends, plan
    )
    # The same for the gradient that comes back.
    return jnp.where(sees[:, :, None, None], out[:, : q.shape[1]], jnp.zeros((), q.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, starts, ends, plan):
    return _forward(q, k, v, starts, ends, plan)[0]


def _forward(q, k, v, starts, ends, plan):
    tile = plan.tiles.forward
    ranges = schedule.key_ranges(starts, ends, *tile)
    out, lse = named(
        *plan.kernels.forward(q, k, v, starts, ends, ranges, tile=tile, interpret=plan.interpret)
    )
    return out, (q, k, v, starts, ends, out, lse)


def _backward(plan, residuals, do):
    q, k, v, starts, ends, out, lse = residuals
    delta = jnp.einsum("bqhd,bqhd->bhq", out, do, preferred_element_type=jnp.float32)
    tile = plan.tiles.query_gradient
    ranges = schedule.key_ranges(starts, ends, *tile)
    arrays = q, k, v, do, lse, delta, starts, ends
    dq = plan.kernels.query_gradient(*arrays, ranges, tile=tile, interpret=plan.interpret)
    tile = plan.tiles.key_gradients
    ranges = _query_ranges(starts, ends, k.shape[1], tile)
    dk, dv = plan.kernels.key_gradients(*arrays, ranges, tile=tile, interpret=plan.interpret)
    return dq, dk, dv, None, None


_attend.defvjp(_forward, _backward)


def _query_ranges(starts, ends, keys, tile):
    return schedule.query_ranges(schedule.key_ranges(starts, ends, *tile), keys // tile[1])
