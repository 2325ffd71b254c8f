"""Rows of 65536 tokens, traced and not run: no schedule grows with the square, and what a kernel
call asks of a TPU is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import aot
from pallas_kernels.block_attention import gpu, tpu
from pallas_kernels.block_attention.counting import count_at_most
from pallas_kernels.block_attention.decode import PagedCache
from pallas_kernels.block_attention.decode.tpu import decode_tpu
from pallas_kernels.block_attention.gpu import schedule
from pallas_kernels.block_attention.tpu.launch import make_strip
from pallas_kernels.block_attention.tpu.schedule import tile_bounds
from pallas_kernels.block_layout import both_halves, key_intervals
from pallas_kernels.shapes import ATTENTION, AttentionShape
from tests.jaxprs import equations_of

POSITIONS = 2 * 65536


def tpu_strip(intervals):
    strip = make_strip(
        jnp.int32(1), 16384, 8, tile_bounds(intervals, tpu.Tiles()), tpu.Tiles(), False
    )
    return strip.order, strip.counts, strip.runs


def gpu_ranges(intervals):
    mini = ATTENTION["mini"]
    q, k = (
        jax.ShapeDtypeStruct((1, POSITIONS, n, mini.head_dim), jnp.bfloat16)
        for n in (mini.heads, mini.kv_heads)
    )
    starts, ends = schedule.runs_of(intervals)
    tile = gpu.default_tiles("mosaic", q, k).key_gradients
    by_query = schedule.key_ranges(starts, ends, *tile)
    return schedule.query_ranges(by_query, POSITIONS // tile[1]), schedule.seen_keys(
        starts, ends, POSITIONS
    )


@pytest.mark.parametrize("build", [tpu_strip, gpu_ranges])
def test_no_array_of_a_schedule_is_tiles_by_tiles(build):
    ids = jax.ShapeDtypeStruct((1, POSITIONS // 2), jnp.int32)
    traced = jax.make_jaxpr(lambda b, s: build(key_intervals(both_halves(b, s))))(ids, ids)
    arrays = (out.aval for e in equations_of(traced.jaxpr) for out in e.outvars)
    largest = max(arrays, key=lambda array: array.size)
    # The bounds of all runs of all queries; the tiles of mini squared are 8 to 48 times as many.
    assert largest.size <= 2 * schedule.RUNS * POSITIONS, largest


def calls_on(kind: str, heads: AttentionShape) -> list:
    """Compiler parameters of the kernel calls of a training step's attention on a TPU."""
    program, arguments = aot.training_attention(aot.attend_by_intervals, heads, POSITIONS // 2)
    device = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.make_jaxpr(program)(*arguments)
    calls = [e for e in equations_of(traced.jaxpr) if e.primitive.name == "pallas_call"]
    return [call.params["compiler_params"] for call in calls]


@pytest.mark.parametrize(
    "kind, vmem", [("TPU v5", 64 << 20), ("TPU v6 lite", 128 << 20), ("TPU7x", 64 << 20)]
)
@pytest.mark.parametrize("model", ["mini", "flash"])
def test_strips_take_the_vmem_that_the_chip_has(kind, vmem, model):
    limits = [x.vmem_limit_bytes for x in calls_on(kind, ATTENTION[model])]
    assert len(limits) == 4, "the first strip and the others, forward and backward"
    assert vmem / 2 < max(limits) <= vmem


def test_heads_of_64_take_the_vmem_of_128():
    half, whole = (AttentionShape(heads=16, kv_heads=4, head_dim=n) for n in (64, 128))
    limits = [[x.vmem_limit_bytes for x in calls_on("TPU v5", shape)] for shape in (half, whole)]
    assert limits[0] == limits[1]


def test_a_decode_schedule_beyond_scalar_memory_is_refused():
    batch, pages, page = 64, 4096, 16

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    q = array(batch, 4, 128, 128)
    own = array(batch, 4, 32, 128)
    pool = array(batch * pages, 4, page, 128)
    lengths, table = array(batch, dtype=jnp.int32), array(batch, pages, dtype=jnp.int32)
    cache = PagedCache(pool, pool, table, lengths)
    mask = array(batch, 32, 32, dtype=bool)
    with pytest.raises(ValueError, match=r"64 rows over a cache of 65536 .* 1048576 bytes"):
        jax.eval_shape(decode_tpu, q, own, own, mask, cache)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 12), min_size=5, max_size=5), min_size=2, max_size=2))
def test_counting_is_a_search_in_sorted_values(rows):
    values = np.sort(np.asarray(rows, np.int32), axis=1)
    expected = [np.searchsorted(row, np.arange(9), side="right") for row in values]
    np.testing.assert_array_equal(count_at_most(jnp.asarray(values), 9), expected)
