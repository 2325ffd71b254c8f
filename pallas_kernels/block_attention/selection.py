"""Which backend "auto" is: the fastest one that proves itself on the device at hand."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_layout import BlockLayout, block_index, both_halves

logger = logging.getLogger(__name__)

PREFERENCES = {"tpu": ("tpu", "splash"), "gpu": ("gpu",)}
"""Kernels to try on a platform, best first. After them, and elsewhere: "xla", which needs none."""

TOLERANCE = 0.03
"""Of an output or gradient, in units of the largest one expected: bfloat16's rounding passes, a
missing tile does not."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, BlockLayout], jax.Array]


def select(attend: Callable[..., jax.Array], q, k) -> str:
    """The backend for arrays like q and k (only shapes and dtypes are read) on the default device.

    Each candidate is compiled, run and compared with the oracle, once per process, kind of device
    and shape of heads; also while something else is being traced.

    Args:
      attend: called with (q, k, v, layout, backend=candidate).
    """
    group = q.shape[2] // k.shape[2]
    return _select(attend, jax.local_devices()[0], group, q.shape[3], jnp.dtype(q.dtype))


@functools.cache
def _select(attend, device, group: int, head_dim: int, dtype) -> str:
    where = f"{device.device_kind} ({group} query heads a key head, head size {head_dim}, {dtype})"
    for backend in PREFERENCES.get(device.platform, ()):
        candidate = functools.partial(attend, backend=backend)
        # A thread of its own, because a function may be under trace in this one.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            fault = thread.submit(self_check, candidate, device, group, head_dim, dtype).result()
        if fault is None:
            logger.info("attention backend: %r on %s, proven against the oracle", backend, where)
            return backend
        logger.warning("attention backend %r is not used on %s: %s", backend, where, fault)
    logger.info("attention backend: 'xla' on %s", where)
    return "xla"


def self_check(attend: Attend, device, group: int, head_dim: int, dtype) -> str | None:
    """What is wrong with `attend` on the device, forward or backward, or None.

    Two rows of 320 tokens in both halves: documents that straddle tiles and blocks, and padding.
    """
    layout, inputs = sample(group, head_dim, dtype)

    def output_and_gradients(attend):
        def run(layout, cotangent, *inputs):
            output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout), *inputs)
            return output, *pull(cotangent)

        return jax.jit(run)(*jax.device_put((layout, *inputs), device))

    try:
        actual = jax.block_until_ready(output_and_gradients(attend))
    except Exception as error:  # whatever a compiler or a driver throws at a kernel
        return f"{type(error).__name__}: {error}"
    with jax.default_matmul_precision("highest"):
        expected = output_and_gradients(lambda q, k, v, at: attend_reference(q, k, v, at, at))
    for name, x, y in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        error = np.abs(x - y).max() / max(1.0, np.abs(y).max())
        if not error <= TOLERANCE:  # so that NaN fails
            return f"{name} is off by {error:.2g} of its largest value, {TOLERANCE} allowed"
    return None


def sample(group: int, head_dim: int, dtype):
    """What the check runs on: (layout, (cotangent, q, k, v)), with two key heads."""
    ends = np.array([[1, 130, 301, 320], [256, 300, 310, 320]])
    index = np.arange(320)
    document = (index[None, :, None] >= ends[:, None, :]).sum(-1)
    starts = np.pad(ends, ((0, 0), (1, 0)))
    positions = index - np.take_along_axis(starts, document, axis=1)
    segments = np.where(document < 3, document + 1, 0).astype(np.int32)
    layout = both_halves(block_index(positions.astype(np.int32), 32, "document"), segments)
    rng = np.random.default_rng(0)
    heads = (2 * group, 2 * group, 2, 2)
    return layout, tuple(jnp.asarray(rng.normal(size=(2, 640, n, head_dim)), dtype) for n in heads)
