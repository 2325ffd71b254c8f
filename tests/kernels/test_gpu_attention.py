"""The GPU kernels without a GPU: their bodies interpreted on the CPU, and lowered for Hopper."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.bench.pairs import TARGETS
from pallas_kernels.block_attention.gpu import (
    Tiles,
    attend_gpu,
    attention,
    choose,
    computed_pairs,
    default_tiles,
    mosaic,
    schedule,
)
from pallas_kernels.block_layout import (
    KeyIntervals,
    allowed,
    block_index,
    both_halves,
    key_intervals,
)
from pallas_kernels.shapes import ATTENTION, packed_layout
from tests.kernels.contract import (
    CASES,
    EVERY,
    AttentionContract,
    Case,
    any_row,
    assert_close,
    draw_inputs,
    oracle,
    output_and_gradients,
)

IMPLEMENTATIONS = ("mosaic", "triton")
# Small enough that a short row has whole tiles, masked ones, and several of each.
SMALL = Tiles(forward=(8, 16), query_gradient=(4, 8), key_gradients=(8, 16))


class TestTriton(AttentionContract):
    # Half of them by default: the schedule and the rule are Mosaic's and, but for tiles, the TPU's.
    cases = CASES if EVERY else CASES[::2]

    @staticmethod
    def attend(q, k, v, layout):
        return attend_gpu(q, k, v, key_intervals(layout), implementation="triton", interpret=True)


@output_and_gradients
def small_tiles(q, k, v, layout):
    intervals = key_intervals(layout)
    return attend_gpu(q, k, v, intervals, implementation="triton", tiles=SMALL, interpret=True)


@pytest.mark.parametrize("heads", [6, pytest.param(3, marks=pytest.mark.slow)])
def test_triton_takes_groups_that_are_no_power_of_two(heads):
    layout = packed_layout(np.random.default_rng(0), 1, 48, "straddling", block_size=4)
    rng = np.random.default_rng(1)
    inputs = [
        jnp.asarray(rng.standard_normal((1, 96, n, 16)), "float32") for n in (heads, 1, 1, heads)
    ]
    assert_close(small_tiles(*inputs, layout), oracle(*inputs, layout), 1e-5)


@pytest.fixture
def register_operands(monkeypatch):
    """jax 0.12 interprets wgmma only with both operands in shared memory; here the left one may be
    an array, which is how Mosaic spells registers."""
    try:
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        needed = ("wgmma", "_get_shared_memory", "_remove_noop_transforms", "HostAllocationKey")
        missing = [name for name in needed if not hasattr(gpu_callbacks, name)]
    except ImportError as error:
        missing = [str(error)]
    if missing:
        pytest.fail(
            f"jax {jax.__version__}: its GPU interpreter has no {missing} (internals, as of "
            "0.12.0): adapt this fixture, or drop it if the interpreter now takes registers"
        )
    in_shared_memory = gpu_callbacks.wgmma

    def wgmma(*, a_allocation_key_as_array, **call):
        a = np.asarray(a_allocation_key_as_array)
        if a.ndim == 1:
            return in_shared_memory(a_allocation_key_as_array=a, **call)
        memory, thread = gpu_callbacks._get_shared_memory(), call["thread"]
        info = gpu_callbacks.memory.GPULoggingInfo(call["mesh_location"], thread, None)

        def access(name):
            key = gpu_callbacks.HostAllocationKey.from_array(
                call[f"{name}_allocation_key_as_array"]
            )
            moves = gpu_callbacks._remove_noop_transforms(call[f"{name}_transforms"])
            return key, memory.access(key, jax.tree.map(int, moves))

        def read(name):
            return memory.get_buffer_content(*access(name), thread, logging_info=info)[0]

        result = read("acc") + np.matmul(a, read("b"), dtype=np.float32)
        memory.store_buffer_content(*access("acc"), result, thread, logging_info=info)
        return call["token"]

    monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma)


# As an error, a warning from one warpgroup would leave the others waiting at a barrier.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("register_operands")
class TestMosaic(AttentionContract):
    """The whole contract, warpgroups, barriers and copies included, at few shapes: the interpreter
    takes a second for each program of the grid."""

    cases = (
        # Three query tiles and two key tiles; the gradients of k and v cut a group in two parts.
        Case("four", "both", "bfloat16", 8, "straddling", "document", 9),
        Case("wide", "clean", "float16", 1, "many_tiny", "document", 0),
        Case("pair", "noisy", "bfloat16", "row", "none", "row", 9),
    )
    shape, dtype, length, examples = "pair", "bfloat16", 40, 2

    @pytest.fixture(autouse=True)
    def _several_parts(self, monkeypatch):
        monkeypatch.setattr(mosaic, "PROGRAMS", 8)

    @staticmethod
    def attend(q, k, v, layout):
        return attend_gpu(q, k, v, key_intervals(layout), implementation="mosaic", interpret=True)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shape", ["mini", "flash"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_lowers_for_hopper(implementation, shape):
    heads, length = ATTENTION[shape], 4096
    layout = packed_layout(np.random.default_rng(0), 1, length, 1024, block_size=32)
    q, kv = (
        jax.ShapeDtypeStruct((1, 2 * length, n, heads.head_dim), jnp.bfloat16)
        for n in (heads.heads, heads.kv_heads)
    )

    def total(q, k, v, intervals):
        out = attend_gpu(q, k, v, intervals, implementation=implementation)
        return out.astype(jnp.float32).sum()

    hopper = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=hopper)):
        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
        traced = gradients.trace(q, kv, kv, key_intervals(layout))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    target = {"mosaic": "mosaic_gpu_v2", "triton": "__gpu$xla.gpu.triton"}[implementation]
    assert text.count(f"custom_call @{target}(") == 3
    for kernel in ("forward", "query_gradient", "key_gradients"):
        assert f"block_attention_{kernel}" in text


LENGTH = 48
rows = st.tuples(any_row(LENGTH), st.integers(1, LENGTH), st.sampled_from(["document", "row"]))
tile_sizes = st.sampled_from([(8, 16), (16, 8)])


def layout_of(row):
    (segments, positions), size, anchor = row
    return both_halves(block_index(positions, size, anchor), segments)


def tiles_of(table) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(run, tile) of every step of the loops over whole tiles and over masked ones."""
    table = np.asarray(table)
    return tuple(
        [tuple(map(int, schedule.walk(ranges, step))) for step in range(schedule.steps(ranges))]
        for ranges in (schedule.whole_tiles(table), schedule.masked_tiles(table))
    )


def assert_loops_visit_every_pair(intervals, tile):
    """Every pair is in a tile that is visited, and no tile without a mask holds anything else."""
    starts, ends = schedule.runs_of(intervals)
    key = np.arange(2 * LENGTH)
    inside = np.asarray((key >= starts[..., None]) & (key < ends[..., None]))[0]
    in_tiles = inside.reshape(schedule.RUNS, -1, tile[0], 2 * LENGTH // tile[1], tile[1])
    used, full = in_tiles.any((2, 4)), in_tiles.all((2, 4))
    by_query = schedule.key_ranges(starts, ends, *tile)
    by_key = schedule.query_ranges(by_query, 2 * LENGTH // tile[1])
    for ranges, some, every in (
        (by_query, used, full),
        (by_key, used.swapaxes(1, 2), full.swapaxes(1, 2)),
    ):
        for number, table in enumerate(ranges[0]):
            whole, masked = tiles_of(table)
            assert len({*whole, *masked}) == len(whole) + len(masked)
            for run, other in np.argwhere(some[:, number]):
                assert (run, other) in whole + masked
            assert all(every[run, number, other] for run, other in whole)


@settings(max_examples=20, deadline=None)
@given(rows, tile_sizes)
def test_loops_visit_what_the_rule_allows(row, tile):
    layout = layout_of(row)
    intervals = key_intervals(layout)
    starts, ends = schedule.runs_of(intervals)
    key = jnp.arange(2 * LENGTH)
    inside = (key >= starts[..., None]) & (key < ends[..., None])
    assert np.array_equal(inside.sum(1), allowed(layout, layout))
    assert_loops_visit_every_pair(intervals, tile)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), tile_sizes)
def test_loops_visit_what_any_intervals_hold(seed, pieces, tile):
    """Neighbours share their runs or have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    bounds = np.sort(rng.integers(0, 2 * LENGTH + 1, (1, pieces, 4)), axis=-1)
    bounds = jnp.asarray(np.repeat(bounds, -(-2 * LENGTH // pieces), axis=1)[:, : 2 * LENGTH])
    start, end, own_start, own_end = jnp.moveaxis(bounds.astype(jnp.int32), -1, 0)
    assert_loops_visit_every_pair(KeyIntervals((own_start, own_end), (start, end)), tile)


@settings(max_examples=20, deadline=None)
@given(rows)
def test_keys_seen_are_those_of_the_rule(row):
    layout = layout_of(row)
    starts, ends = schedule.runs_of(key_intervals(layout))
    seen = schedule.seen_keys(starts, ends, 2 * LENGTH)
    assert np.array_equal(seen, allowed(layout, layout).any(1))


@pytest.mark.parametrize("documents, most", TARGETS.items())
def test_work_is_in_proportion_to_what_is_allowed(documents, most):
    """With flash's heads, for which Triton's tiles are others; test_bench.py has mini's."""
    heads = ATTENTION["flash"]
    q, k = (
        jax.ShapeDtypeStruct((8, 8192, n, heads.head_dim), jnp.bfloat16)
        for n in (heads.heads, heads.kv_heads)
    )
    layout = packed_layout(np.random.default_rng(0), 8, 4096, documents, block_size=32)
    intervals = key_intervals(layout)
    ideal = intervals.pairs()
    for pairs in computed_pairs(intervals, 8192, default_tiles("triton", q, k)):
        assert 1.0 <= pairs / ideal <= most


def test_pairs_are_counted_from_the_tiles_that_are_visited():
    layout = packed_layout(np.random.default_rng(0), 1, 32, "none", block_size=32)
    # One block: each half sees itself, in 4 x 2 tiles of the forward pass and as many backward.
    tiles = Tiles(forward=(8, 16), query_gradient=(8, 16), key_gradients=(8, 16))
    assert computed_pairs(key_intervals(layout), 64, tiles) == (2 * 32 * 32, 2 * 32 * 32)


def on(monkeypatch, capability):
    monkeypatch.setattr(attention, "_compute_capability", lambda: capability)
    attention._warn_once.cache_clear()


def shapes(heads, kv_heads, head_dim, dtype):
    return [jax.ShapeDtypeStruct((1, 64, n, head_dim), dtype) for n in (heads, kv_heads)]


def test_hopper_gets_mosaic(monkeypatch, caplog):
    on(monkeypatch, (9, 0))
    assert choose(*shapes(16, 4, 128, jnp.bfloat16)) == "mosaic"
    assert not caplog.records


@pytest.mark.parametrize(
    "capability, arrays, reason",
    [
        ((8, 0), (16, 4, 128, jnp.bfloat16), "compute capability 8.0"),
        ((10, 0), (16, 4, 128, jnp.bfloat16), "compute capability 10.0"),
        ((9, 0), (16, 4, 128, jnp.float32), "float32"),
        ((9, 0), (16, 4, 32, jnp.bfloat16), "head_dim 32"),
        ((9, 0), (4, 4, 128, jnp.bfloat16), "1 query heads"),
    ],
)
def test_falling_back_to_triton_is_said_once_with_its_reason(
    monkeypatch, caplog, capability, arrays, reason
):
    on(monkeypatch, capability)
    for _ in range(2):
        assert choose(*shapes(*arrays)) == "triton"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and reason in record.message


def test_what_cannot_run_is_an_error_that_names_it(monkeypatch):
    q, k, v, _ = (x[:, :8] for x in draw_inputs(layout_of((ROW, 4, "row")), "tiny", "float32"))
    intervals = jax.tree.map(lambda x: x[:, :8], key_intervals(layout_of((ROW, 4, "row"))))
    with pytest.raises(ValueError, match="'cuda'"):
        attend_gpu(q, k, v, intervals, implementation="cuda")
    with pytest.raises(NotImplementedError, match="float32"):
        attend_gpu(q, k, v, intervals, implementation="mosaic")
    with pytest.raises(NotImplementedError, match="head_dim 12"):
        attend_gpu(q[..., :12], k[..., :12], v[..., :12], intervals, implementation="triton")
    with pytest.raises(NotImplementedError, match="powers of two"):
        tiles = Tiles((8, 16), (8, 24), (8, 16))
        attend_gpu(q, k, v, intervals, implementation="triton", tiles=tiles)
    with pytest.raises(NotImplementedError, match="are fixed"):
        wide = [jnp.zeros((1, 8, n, 64), jnp.bfloat16) for n in (2, 1, 1)]
        attend_gpu(*wide, intervals, implementation="mosaic", tiles=SMALL)
    with pytest.raises(ValueError, match="one dtype"):
        attend_gpu(q, k.astype(jnp.bfloat16), v, intervals)
    with pytest.raises(ValueError, match="multiple"):
        attend_gpu(q[:, :, :3], k, v, intervals)
    with pytest.raises(ValueError, match="interval bounds"):
        attend_gpu(q[:, :4], k, v, intervals)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        attend_gpu(q, k, v, intervals)
    on(monkeypatch, (7, 5))
    with pytest.raises(NotImplementedError, match="7.5"):
        attend_gpu(q, k, v, intervals)


ROW = (np.ones((1, LENGTH), np.int32), np.arange(LENGTH, dtype=np.int32)[None])
