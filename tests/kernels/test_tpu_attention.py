"""The TPU kernels in interpret mode: the contract, strips, and what the schedule promises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.bench.pairs import TARGETS
from pallas_kernels.block_attention.tpu import Tiles, attend_tpu, computed_pairs
from pallas_kernels.block_attention.tpu.launch import make_strip
from pallas_kernels.block_attention.tpu.memory import BACKWARD, FORWARD, SCALAR_MEMORY
from pallas_kernels.block_attention.tpu.schedule import (
    ALIGNMENT,
    tile_bounds,
    tile_runs,
    tiles_to_visit,
    visit_windows,
)
from pallas_kernels.block_layout import KeyIntervals, both_halves, key_intervals
from pallas_kernels.shapes import packed_layout
from tests.kernels.contract import (
    AttentionContract,
    assert_close,
    draw_inputs,
    oracle,
    output_and_gradients,
)

WIDE_AT_TOY_SIZE = Tiles(wide=256)  # of 512 keys without a mask a short row has none


def attend(q, k, v, layout, tiles=WIDE_AT_TOY_SIZE):
    return attend_tpu(q, k, v, key_intervals(layout), tiles=tiles, interpret=True)


class TestTpu(AttentionContract):
    attend = staticmethod(attend)


def rows(documents, *, length, block_size=32, seed=0, count=2, **kwargs):
    rng = np.random.default_rng(seed)
    return packed_layout(rng, count, length, documents, block_size=block_size, **kwargs)


IN_STRIPS = Tiles(wide=128)  # of tiny heads, two on top of each other
IN_STRIPS = dataclasses.replace(
    IN_STRIPS,  # room for 128 keys in the backward kernel
    vmem_bytes=BACKWARD.working_bytes(256, 16, "float32", IN_STRIPS)
    + 128 * BACKWARD.bytes_per_key(16, "float32"),
)
attend_in_strips = output_and_gradients(functools.partial(attend, tiles=IN_STRIPS))


@pytest.mark.parametrize("documents", ["none", "straddling", "many_tiny"])
def test_strips_of_keys_add_up_to_the_row(documents):
    layout = rows(documents, length=300, padding=11)
    inputs = draw_inputs(layout, "tiny", "float32")
    strips = [p.strip_length(600, 256, 16, "float32", IN_STRIPS) for p in (FORWARD, BACKWARD)]
    assert strips == [384, 128]
    assert_close(attend_in_strips(*inputs, layout), oracle(*inputs, layout), 1e-5)


def test_default_tiles_and_wide_steps():
    layout = rows("none", length=1400, count=1)
    inputs = draw_inputs(layout, "tiny", "float32")
    runs = tile_runs(tile_bounds(key_intervals(layout), Tiles()), 2816, Tiles())
    assert (runs[..., 2] > 1).any(), "no tile takes two wide steps: a longer row is needed"
    default = functools.partial(attend, tiles=Tiles())
    assert_close(output_and_gradients(default)(*inputs, layout), oracle(*inputs, layout), 1e-5)


def visited(runs, tile, tiles, keys):
    """Times each key is computed by a tile, by run (row 2: unmasked)."""

    def visit(start, size, run, state):
        counts, ok = state
        row = 2 if run is None else run
        here = (jnp.arange(keys) >= start) & (jnp.arange(keys) < start + size)
        ok &= (start % ALIGNMENT == 0) & (start >= 0) & (start + size <= keys)
        return counts.at[row].add(here.astype(jnp.int32)), ok

    state = jnp.zeros((3, keys), jnp.int32), jnp.asarray(True)
    return visit_windows(runs.reshape(1, -1), tile, tiles, visit, state)


@functools.partial(jax.jit, static_argnums=(1, 2))
def visited_by_all(bounds, keys, tiles):
    runs = tile_runs(bounds, keys, tiles)
    tile_indices = jnp.arange(bounds.shape[1])
    per_row = jax.vmap(lambda r: jax.vmap(lambda t: visited(r, t, tiles, keys))(tile_indices))
    return runs, *per_row(runs)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    documents=st.sampled_from(["none", "aligned", "straddling", "many_tiny", 90]),
    size=st.integers(1, 520),
    anchor=st.sampled_from(["document", "row"]),
    halves=st.sampled_from(["both", "clean", "noisy"]),
    seed=st.integers(0, 99),
    padding=st.integers(0, 519),
)
@example("none", 32, "document", "both", 0, 0)  # has steps without a mask after masked windows
def test_schedule_covers_what_is_seen_and_little_else(
    documents, size, anchor, halves, seed, padding
):
    tiles = Tiles(wide=256)
    layout = rows(
        documents,
        length=520,  # long enough for steps without a mask in both halves
        block_size=size,
        seed=seed,
        count=1,
        anchor=anchor,
        halves=halves,
        padding=padding,
    )
    intervals = key_intervals(layout)
    keys = 128 * -(-layout.block.shape[1] // 128)
    bounds = tile_bounds(intervals, tiles)
    runs, counts, fine = visited_by_all(bounds, keys, tiles)
    assert fine.all(), "a window is misaligned or leaves the keys"
    start, end = np.moveaxis(np.asarray(bounds), 3, 0)  # [batch, tiles, runs, queries]
    key = np.arange(keys)
    inside = (key >= start[..., None]) & (key < end[..., None])
    masked, wide = np.asarray(counts)[:, :, :2], np.asarray(counts)[:, :, 2]
    needed = inside.any(3)  # by some query of the tile
    assert (masked <= 1).all() and (wide <= 1).all()
    assert (masked + wide[:, :, None] >= needed).all(), "a key that is seen is not visited"
    seen_by_all = inside.all(3).any(2)
    assert (seen_by_all >= wide).all(), "a step without a mask holds a hidden key"
    unneeded = np.asarray(runs[..., 3]) * tiles.keys - (
        np.where(needed.any(-1), keys - needed[..., ::-1].argmax(-1), 0) - needed.argmax(-1)
    )
    assert (unneeded < tiles.keys + ALIGNMENT).all(), "windows outside the hull"
    expected = int(runs[..., 3].sum()) * tiles.keys * tiles.queries
    assert computed_pairs(intervals, layout.block.shape[1], tiles) == (expected, expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=2, max_size=2))
def test_visits_are_the_tiles_with_work(work):
    runs = np.zeros((len(work), 7, 2, 4), np.int32)
    runs[:, :, 1, 3] = work
    order, counts = tiles_to_visit(jnp.asarray(runs))
    for row, tiles_in_order, count in zip(work, order, counts, strict=True):
        assert count == max(1, sum(row))
        if any(row):
            assert tiles_in_order[: int(count)].tolist() == np.flatnonzero(row).tolist()
        assert (np.asarray(tiles_in_order)[int(count) :] == tiles_in_order[int(count) - 1]).all()


@pytest.mark.parametrize(("documents", "most"), TARGETS.items())
def test_computed_pairs_stay_near_the_ideal(documents, most):
    """Of blocks anchored to the row; test_bench.py has those anchored to documents."""
    layout = rows(documents, length=4096, count=8, anchor="row")
    intervals = key_intervals(layout)
    ideal = intervals.pairs()
    for pairs in computed_pairs(intervals, 8192):
        assert 1 <= pairs / ideal <= most


def schedule_bytes(length):
    """Scalar memory of the schedule of one row, as the kernel holds it."""
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def build(block, segment):
        bounds = tile_bounds(key_intervals(both_halves(block, segment)), Tiles())
        strip = make_strip(jnp.int32(1), 16384, 8, bounds, Tiles(), False)
        return strip.order, strip.counts, strip.runs

    return sum(4 * x.size for x in jax.eval_shape(build, ids, ids))


def test_schedule_grows_with_the_row_and_fits_scalar_memory():
    assert schedule_bytes(65536) <= 2 * schedule_bytes(32768)
    assert schedule_bytes(65536) < SCALAR_MEMORY // 8


def test_too_many_rows_for_scalar_memory_are_refused():
    q = jax.ShapeDtypeStruct((300, 131072, 1, 128), jnp.bfloat16)
    start = jax.ShapeDtypeStruct((300, 131072), jnp.int32)
    intervals = KeyIntervals((start, start), (start, start))
    with pytest.raises(ValueError, match="scalar memory"):
        jax.eval_shape(attend_tpu, q, q, q, intervals)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 64}, "queries=64"),
        ({"keys": 96}, "keys=96"),
        ({"wide": 200}, "wide=200"),
    ],
)
def test_bad_tiles_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Tiles(**change)


def test_bad_inputs_are_named():
    layout = rows("none", length=64)
    q, k, v, _ = draw_inputs(layout, "tiny", "float32")
    with pytest.raises(ValueError, match="k like v"):
        attend(q, k, v[:, :-1], layout)
    with pytest.raises(ValueError, match="3 query heads"):
        attend(q[:, :, :3], k, v, layout)
    with pytest.raises(ValueError, match="bfloat16 or all float32"):
        attend(q, k, v.astype(jnp.bfloat16), layout)
    with pytest.raises(ValueError, match="intervals"):
        attend(q, k, v, rows("none", length=60))
    with pytest.raises(ValueError, match="1000 bytes of VMEM do not hold 128 keys of 2048 bytes"):
        attend(q, k, v, layout, Tiles(vmem_bytes=1000))


def test_under_shard_map():
    """As the model calls it: a mesh, the batch cut over it."""
    layout = rows("straddling", length=300)
    inputs = draw_inputs(layout, "tiny", "float32")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.sharding.PartitionSpec("data")
    attend_cut = jax.shard_map(attend, mesh=mesh, in_specs=cut, out_specs=cut)
    cut_run = output_and_gradients(attend_cut)
    assert_close(cut_run(*inputs, layout), oracle(*inputs, layout), 1e-5)
