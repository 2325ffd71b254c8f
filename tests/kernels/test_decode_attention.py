"""Decode attention: every backend against the attention rule over the whole, uncached sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels import selection as mechanism
from pallas_kernels.aot import decoding_attention
from pallas_kernels.block_attention import attend_reference
from pallas_kernels.block_attention.decode import (
    DECODE_BACKENDS,
    ContiguousCache,
    PagedCache,
    decode_attention,
    decode_backend,
    gpu,
    selection,
    tpu,
    xla,
)
from pallas_kernels.block_layout import CLEAN, NOISY, concatenate, half_layout
from pallas_kernels.shapes import ATTENTION

ROWS, HEADS, KV_HEADS, HEAD_DIM = 3, 4, 2, 16
BLOCK, PAGE, CAPACITY = 8, 40, 280  # several chunks of each backend, the last one not whole
BACKEND = {"tpu": "tpu", "gpu": "gpu"}.get(jax.default_backend())

backends = pytest.mark.parametrize("backend", [b for b in DECODE_BACKENDS if b != "auto"])
kinds = pytest.mark.parametrize("kind", ["contiguous", "paged"])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(xla, "_CHUNK", 128)
    monkeypatch.setattr(tpu, "_CHUNK", 128)
    monkeypatch.setattr(gpu, "_PROGRAMS", 24)  # two splits


@functools.partial(jax.jit, static_argnames=("backend", "interpret"))
def _decode(q, k, v, own, cache, backend, interpret):
    return decode_attention(q, k, v, own, cache, backend=backend, interpret=interpret)


def decode(q, k, v, own, cache, backend):
    return _decode(q, k, v, own, cache, backend, backend != BACKEND)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def tokens_under_way(seed, present, halves=(NOISY,), dtype=jnp.float32):
    """q, k, v and layout of one block a half; `present` [rows][halves] says which are padding.
    The clean block stands before the noisy one."""
    layouts = []
    for i, half in enumerate(halves):
        segment = np.repeat(np.array(present, np.int32)[:, i : i + 1], BLOCK, axis=1)
        block = np.full((ROWS, BLOCK), i, np.int32)
        layouts.append(half_layout(jnp.asarray(block), jnp.asarray(segment), half))
    length = BLOCK * len(halves)
    q = normal(seed, ROWS, length, HEADS, HEAD_DIM, dtype=dtype)
    k = normal(seed + 1, ROWS, length, KV_HEADS, HEAD_DIM, dtype=dtype)
    v = normal(seed + 2, ROWS, length, KV_HEADS, HEAD_DIM, dtype=dtype)
    return q, k, v, concatenate(layouts)


def contiguous(seed, lengths, dtype=jnp.float32):
    """A cache with NaN beyond the lengths."""
    beyond = np.arange(CAPACITY) >= np.array(lengths)[:, None]

    def values(seed):
        x = normal(seed, ROWS, KV_HEADS, CAPACITY, HEAD_DIM, dtype=dtype)
        return jnp.where(beyond[:, None, :, None], jnp.asarray(np.nan, dtype), x)

    return ContiguousCache(values(seed), values(seed + 1), jnp.asarray(lengths, jnp.int32))


def paged(cache: ContiguousCache, seed: int) -> PagedCache:
    """The same cache in shuffled pages; table entries that no position needs are nonsense."""
    count = CAPACITY // PAGE
    place = np.random.default_rng(seed).permutation(ROWS * count).astype(np.int32)

    def pages(x):
        x = np.asarray(x).reshape(ROWS, KV_HEADS, count, PAGE, HEAD_DIM).swapaxes(1, 2)
        pool = np.empty((ROWS * count, *x.shape[2:]), x.dtype)
        pool[place] = x.reshape(-1, *x.shape[2:])
        return jnp.asarray(pool)

    table = place.reshape(ROWS, count)
    unused = np.arange(count) * PAGE >= np.asarray(cache.lengths)[:, None]
    table = np.where(unused, np.int32(2**30), table)
    return PagedCache(pages(cache.k), pages(cache.v), jnp.asarray(table), cache.lengths)


@jax.jit
def uncached(q, k, v, own, cache: ContiguousCache):
    """The oracle of training over [the committed tokens ; the tokens under way]."""
    inside = jnp.arange(CAPACITY) < cache.lengths[:, None]
    committed = half_layout(jnp.full(inside.shape, -1), inside.astype(jnp.int32), CLEAN)
    keys, values = (
        jnp.concatenate([jnp.where(inside[..., None, None], cached.swapaxes(1, 2), 0.0), x], axis=1)
        for cached, x in ((cache.k, k), (cache.v, v))
    )
    return attend_reference(q, keys, values, own, concatenate([committed, own]))


lengths_of_rows = st.lists(
    st.sampled_from([0, 1, 39, 40, 127, 128, 129, 200, CAPACITY]) | st.integers(0, CAPACITY),
    min_size=ROWS,
    max_size=ROWS,
)
presence = st.lists(
    st.tuples(st.booleans(), st.just(True)) | st.just((False, False)), min_size=ROWS, max_size=ROWS
)


@backends
@kinds
@settings(max_examples=12, deadline=None, derandomize=True)
@given(lengths=lengths_of_rows, present=presence, seed=st.integers(0, 2**16))
def test_commit_and_denoise_match_the_uncached_oracle(backend, kind, lengths, present, seed):
    q, k, v, own = tokens_under_way(seed, present, (CLEAN, NOISY))
    cache = contiguous(seed + 3, lengths)
    expected = uncached(q, k, v, own, cache)
    stored = cache if kind == "contiguous" else paged(cache, seed)
    # Garbage at padding positions, too.
    padding = (own.segment == 0)[..., None, None]
    k, v = (jnp.where(padding, jnp.nan, x) for x in (k, v))
    got = decode(q, k, v, own, stored, backend)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert not np.asarray(got)[np.asarray(own.segment) == 0].any()


@backends
def test_one_noisy_block_in_bfloat16(backend):
    present = [(1,), (1,), (0,)]
    q, k, v, own = tokens_under_way(0, present, dtype=jnp.bfloat16)
    cache = contiguous(5, [130, 0, 77], jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    exact = ContiguousCache(cache.k.astype(jnp.float32), cache.v.astype(jnp.float32), cache.lengths)
    expected = uncached(*wide, own, exact)
    got = decode(q, k, v, own, cache, backend)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=0.03)


@backends
def test_a_repeated_call_gives_the_same_bits(backend):
    under_way = tokens_under_way(1, [(1, 1)] * ROWS, (CLEAN, NOISY))
    arguments = *under_way, contiguous(4, [250, 3, 140])
    first, second = (np.asarray(decode(*arguments, backend)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [1, 128, 129], [CAPACITY, 0, 5]])
@pytest.mark.parametrize("part, parts", [(128, 1), (PAGE, 3)])
def test_the_tpu_schedule_follows_the_lengths(lengths, part, parts):
    cache = contiguous(0, lengths)
    if parts > 1:
        cache = paged(cache, 0)
    width = part * parts
    plan = tpu._schedule(cache, part, parts)
    needed = [max(-(-length // width), 1) for length in lengths]
    assert int(plan.steps) == sum(needed)
    steps = [(row, chunk) for row, count in enumerate(needed) for chunk in range(count)]
    count = int(plan.steps)
    assert list(zip(plan.row[:count].tolist(), plan.chunk[:count].tolist(), strict=True)) == steps
    assert plan.left[:count].tolist() == [lengths[r] - c * width for r, c in steps]


@pytest.mark.parametrize("rows", [16, 32, 192, 384, 768, 8192])
def test_a_copy_of_a_part_of_a_cache_is_whole_tiles(monkeypatch, rows):
    """Also for groups or blocks that are no power of two."""
    monkeypatch.undo()  # the chunks that ship
    pool = jnp.zeros((1, KV_HEADS, 4096, HEAD_DIM))
    part, parts = tpu._chunk_shape(ContiguousCache(pool, pool, jnp.zeros(1, jnp.int32)), rows)
    assert part % 128 == 0 and parts == 1
    assert part == 128 or part * rows <= tpu._SCORES


def test_what_does_not_fit_is_named():
    q, k, v, own = tokens_under_way(0, [(1,)] * ROWS)
    cache = contiguous(0, [1, 2, 3])
    with pytest.raises(ValueError, match="'cuda'.*'tpu'"):
        decode_attention(q, k, v, own, cache, backend="cuda")
    with pytest.raises(ValueError, match="4 heads over 3 kv_heads"):
        wrong = jnp.concatenate([k, k[:, :, :1]], axis=2)
        decode_attention(q, wrong, wrong, own, cache)
    swapped = ContiguousCache(cache.k.swapaxes(1, 2), cache.v.swapaxes(1, 2), cache.lengths)
    with pytest.raises(ValueError, match="kv_heads=2 .*head-major"):
        decode_attention(q, k, v, own, swapped)
    odd = [x[..., :12] for x in (q, k, v)]
    narrow = ContiguousCache(cache.k[..., :12], cache.v[..., :12], cache.lengths)
    with pytest.raises(ValueError, match="head_dim=12"):
        decode_attention(*odd, own, narrow, backend="gpu", interpret=True)


def test_the_oracle_takes_toy_sizes_only():
    q, k, v, own = tokens_under_way(0, [(1,)] * ROWS)
    long = jnp.zeros((ROWS, KV_HEADS, 4096, HEAD_DIM))
    cache = ContiguousCache(long, long, jnp.zeros(ROWS, jnp.int32))
    with pytest.raises(ValueError, match="cache of 4096, at most 2048"):
        decode_attention(q, k, v, own, cache, backend="reference")


def test_a_model_that_trains_on_a_backend_without_decoding_decodes_by_auto():
    for name in ("auto", "splash", "mosaic", "triton"):
        assert decode_backend(name) == "auto"
    assert decode_backend("reference") == "reference"


def test_auto_is_xla_on_a_cpu():
    under_way = tokens_under_way(1, [(1, 1)] * ROWS, (CLEAN, NOISY))
    arguments = *under_way, contiguous(4, [250, 3, 140])
    if jax.default_backend() == "cpu":
        auto, xla_ = (decode(*arguments, backend) for backend in ("auto", "xla"))
        np.testing.assert_array_equal(auto, xla_)


@pytest.fixture
def on_tpu(monkeypatch):
    """The kernel of a TPU is the candidate on the device at hand; nothing is chosen yet."""
    monkeypatch.setitem(selection.PREFERENCES, jax.default_backend(), ("tpu",))
    monkeypatch.setattr(mechanism, "_chosen", {})


@pytest.mark.parametrize(
    "kind, fault, chosen",
    [
        ("contiguous", None, "tpu"),
        ("contiguous", "raises", "xla"),
        ("contiguous", "nan", "xla"),
        ("contiguous", "capacity", "xla"),
        ("paged", None, "tpu"),
        ("paged", "wrong", "xla"),
    ],
)
def test_auto_takes_a_kernel_that_proves_itself(on_tpu, caplog, kind, fault, chosen):
    q, k, v, own = tokens_under_way(1, [(1,)] * ROWS)
    cache = contiguous(4, [250, 3, 140])
    cache = cache if kind == "contiguous" else paged(cache, 0)

    def attend(q, k, v, own, cache, backend):
        out = decode_attention(q, k, v, own, cache, backend="xla")
        if backend == "reference" or fault is None:
            return out
        if fault == "raises" or fault == "capacity" and cache.capacity == CAPACITY:
            raise NotImplementedError("no such chip")
        if fault == "capacity":
            return out
        return out.at[0, 0].set(jnp.nan if fault == "nan" else 1.0)

    assert selection.select(attend, q, k, v, own, cache) == chosen
    assert ("'tpu' is not used" in caplog.text) == (chosen == "xla")


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.parametrize("model", ["mini", "flash"])
@kinds
def test_lowers_for_hopper(kind, model):
    program, arguments = decoding_attention(
        ATTENTION[model], 4096, paged=kind == "paged", backend="gpu"
    )
    hopper = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=hopper)):
        traced = jax.jit(program).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton(") == 1 and "decode_attention" in text
