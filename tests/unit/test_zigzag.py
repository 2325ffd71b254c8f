"""Which tokens of a row each device takes under context parallelism, and their attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention.gpu import attend_gpu
from pallas_kernels.block_attention.tpu import attend_tpu
from pallas_kernels.block_layout import (
    CLEAN,
    NOISY,
    PADDING,
    BlockLayout,
    key_intervals,
    zigzag,
    zigzag_imbalance,
)
from pallas_kernels.shapes import packed_layout


def test_every_token_once_and_as_many_of_each_half():
    order = zigzag(((NOISY, 16), (CLEAN, 16)), 4)
    assert order.shape == (4, 8) and sorted(order.ravel()) == list(range(32))
    assert order[0].tolist() == [0, 1, 14, 15, 16, 17, 30, 31]
    with pytest.raises(ValueError, match="12 tokens do not divide into 2 x 4 pieces"):
        zigzag(((NOISY, 12),), 4)


@pytest.mark.parametrize("halves", ["both", "clean"])
def test_without_documents_all_devices_have_equal_pairs(halves):
    rng = np.random.default_rng(0)
    whole = packed_layout(rng, 1, 512, "none", block_size=32, halves=halves)
    np.testing.assert_allclose(zigzag_imbalance(whole, 4), 1.0, atol=1e-9)
    in_order = np.asarray(key_intervals(whole).count())[0].reshape(-1, 4, 128).sum((0, 2))
    assert in_order.max() / in_order.mean() > 1.5  # what it is for
    packed = packed_layout(rng, 2, 512, 128, block_size=32, halves=halves)
    found = zigzag_imbalance(packed, 4)
    assert found.shape == (2,) and (found >= 1).all() and found.max() > 1.01


@pytest.fixture(scope="module")
def whole():
    """A layout, what attention takes, a cotangent; the output of all queries, and its gradients."""
    layout = packed_layout(np.random.default_rng(1), 2, 128, 40, block_size=8, padding=5)
    layout = jax.tree.map(jnp.asarray, layout)
    rng = np.random.default_rng(2)
    heads = {"q": 2, "k": 1, "v": 1, "cotangent": 2}
    *qkv, cotangent = (
        jnp.asarray(rng.normal(size=(2, 256, n, 16)), jnp.float32) for n in heads.values()
    )

    @jax.jit
    def attend(q, k, v):
        def output(q, k, v):
            return block_attention(q, [(k, v, layout)], layout, backend="xla")

        out, pull = jax.vjp(output, q, k, v)
        return out, pull(cotangent)

    return layout, qkv, cotangent, *attend(*qkv)


@pytest.mark.parametrize("backend", ["xla", "reference", "tpu", "triton"])
def test_attention_of_a_part_of_the_queries(whole, backend):
    """The parts make up the whole, forward and backward; padding's NaN goes nowhere."""
    layout, (q, k, v), cotangent, out, gradients = whole
    real = np.asarray(layout.segment != PADDING)
    if backend != "reference":
        k, v = (jnp.where(real[:, :, None, None], x, jnp.nan) for x in (k, v))

    def part(q, k, v, at):
        spans = tuple((half, n // 4) for half, n in layout.spans)
        queries = BlockLayout(layout.block[:, at], layout.segment[:, at], spans)
        if backend == "tpu":
            intervals = key_intervals(layout).at(at)
            return attend_tpu(q[:, at], k, v, intervals, real=jnp.asarray(real), interpret=True)
        if backend == "triton":
            intervals = key_intervals(layout).at(at)
            return attend_gpu(q[:, at], k, v, intervals, implementation="triton", interpret=True)
        return block_attention(q[:, at], [(k, v, layout)], queries, at=at, backend=backend)

    @jax.jit
    def attend(at):
        mine, pull = jax.vjp(lambda *x: part(*x, at), q, k, v)
        return mine, pull(cotangent[:, at])

    total = [0.0, 0.0, 0.0]
    for at in zigzag(layout.spans, 4):
        mine, pulled = attend(at)
        np.testing.assert_allclose(mine, out[:, at], atol=2e-5)
        total = [a + np.asarray(b) for a, b in zip(total, pulled, strict=True)]
    for mine, wanted in zip(total, gradients, strict=True):
        np.testing.assert_allclose(mine, wanted, atol=1e-4)


def test_splash_says_that_it_cannot():
    layout = packed_layout(np.random.default_rng(1), 1, 16, "none", block_size=8)
    q = jnp.zeros((1, 32, 1, 8))
    with pytest.raises(ValueError, match="'splash' takes whole rows"):
        block_attention(q, [(q, q, layout)], layout, at=jnp.arange(32), backend="splash")
