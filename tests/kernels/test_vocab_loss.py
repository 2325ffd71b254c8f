"""The chunked loss against automatic differentiation of the dense one."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels.vocab_loss import chunk_rows, token_losses, vocab_loss

TOKENS, HIDDEN, VOCAB = 40, 12, 48


def dense(hidden, head, targets, weights, entropy_weights, temperature):
    """What vocab_loss says it computes, and the statistics, from all logits at once."""
    logits = hidden @ head
    logp = jax.nn.log_softmax(logits)
    cooled = jax.nn.log_softmax(logits / temperature)
    nll = -jnp.take_along_axis(logp, targets[:, None], 1)[:, 0]
    entropy = -(jnp.exp(cooled) * cooled).sum(-1)
    correct = logits.argmax(-1).astype(targets.dtype) == targets
    loss = (weights * nll).sum() + jnp.where(correct, entropy_weights * entropy, 0.0).sum()
    return loss, (nll, correct, jnp.exp(logp.max(-1)), entropy)


def example(seed, density=0.6, entropy_density=0.6, scale=1.0, tokens=TOKENS):
    """Random inputs; half of the targets are the argmax, and weights are 0 outside `density`.

    Hidden states and head are of so few bits that fp32 logits are exact, and who wins is too.
    """
    rng = np.random.default_rng(seed)
    hidden, head = (
        np.round(rng.normal(size=shape) * 32).astype(np.float32) / 32
        for shape in [(tokens, HIDDEN), (HIDDEN, VOCAB)]
    )
    hidden = hidden * np.float32(scale)
    best = (hidden @ head).argmax(-1)
    targets = np.where(rng.random(tokens) < 0.5, best, rng.integers(0, VOCAB, tokens))
    weights, entropy_weights = (
        np.where(rng.random(tokens) < d, rng.exponential(size=tokens), 0.0).astype(np.float32)
        for d in (density, entropy_density)
    )
    arrays = hidden, head, targets.astype(np.int32), weights, entropy_weights
    return tuple(map(jnp.asarray, arrays))


def assert_close(mine, oracle, size=1.0):
    """Within 1e-5 of the oracle's largest magnitude, or of `size`: that of a weight times an input,
    which p − 1 multiplies in fp32 however close p is to 1."""
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(oracle), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), size))


@functools.partial(jax.jit, static_argnames=("temperature", "chunk", "tied", "entropy"))
def fused(
    hidden, head, targets, weights, entropy_weights, *, temperature, chunk, tied, entropy=True
):
    def loss(hidden, head):
        return vocab_loss(
            hidden,
            head.T if tied else head,
            targets,
            weights,
            entropy_weights=entropy_weights if entropy else None,
            temperature=temperature,
            vocab_axis=0 if tied else 1,
            chunk=chunk,
        )

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, head)


_dense_gradient = jax.jit(jax.value_and_grad(dense, argnums=(0, 1), has_aux=True))


def oracle(*inputs):
    """Automatic differentiation of the dense loss in fp64."""
    with jax.enable_x64(True):
        wide = (
            x.astype(np.float64) if x.dtype == np.float32 else x for x in map(np.asarray, inputs)
        )
        return jax.tree.map(np.asarray, _dense_gradient(*wide))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    density=st.sampled_from([0.0, 0.02, 0.6, 1.0]),
    entropy_density=st.sampled_from([0.0, 0.3, 1.0]),
    scale=st.sampled_from([0.125, 1.0, 32.0]),
    compiled=st.sampled_from(
        [
            {"temperature": 1.0, "chunk": 16, "tied": False, "entropy": False},
            {"temperature": 0.5, "chunk": 7, "tied": True},
            {"temperature": 2.0, "chunk": 1, "tied": False},
            {"temperature": 1.0, "chunk": 3 * TOKENS, "tied": True, "entropy": False},
        ]
    ),
)
def test_matches_autodiff_of_the_dense_loss(seed, density, entropy_density, scale, compiled):
    with_entropy = compiled.get("entropy", True)
    inputs = example(seed, density, entropy_density if with_entropy else 0.0, scale)
    (loss, stats), grads = fused(*inputs, **compiled)
    (want, per_token), want_grads = oracle(*inputs, np.float64(compiled["temperature"]))
    nll, correct, confidence, entropy = per_token
    assert_close((loss, grads), (want, want_grads), size=max(scale, 1.0))
    active = np.asarray((inputs[3] != 0) | (inputs[4] != 0))
    assert_close(stats.nll, np.where(active, nll, 0.0))
    assert_close(stats.confidence, np.where(active, confidence, 0.0))
    assert np.array_equal(stats.correct, correct & active)
    if with_entropy:
        assert_close(stats.entropy, np.where(active, entropy, 0.0))


def test_no_weight_no_loss_and_no_gradient():
    (loss, stats), grads = fused(*example(0, 0.0, 0.0), temperature=2.0, chunk=1, tied=False)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves((loss, stats, grads)))


@pytest.mark.parametrize("chunk", [16, None])
def test_token_losses_take_any_cotangent(chunk):
    """−log σ of a difference of two sequences' sums, as DPO has it."""
    hidden, head, targets, weights, _ = example(3)
    where = weights != 0

    def preference(nll):
        sums = (weights * nll).reshape(2, -1).sum(1)
        return -jax.nn.log_sigmoid(0.1 * (sums[1] - sums[0]))

    def mine(hidden, head):
        return preference(token_losses(hidden, head, targets, where, chunk=chunk).nll)

    def oracle(hidden, head):
        return preference(dense(hidden, head, targets, weights, weights, 1.0)[1][0])

    grad = functools.partial(jax.value_and_grad, argnums=(0, 1))
    assert_close(jax.jit(grad(mine))(hidden, head), jax.jit(grad(oracle))(hidden, head))
    stats = token_losses(hidden, head, targets, where)
    assert stats.entropy is None and not np.asarray(stats.nll)[~np.asarray(where)].any()


def test_leading_axes_stay():
    hidden, head, targets, weights, _ = example(4)
    rows = [x.reshape(4, -1, *x.shape[1:]) for x in (hidden, targets, weights)]
    loss, stats = vocab_loss(rows[0], head, rows[1], rows[2])
    flat_loss, flat = vocab_loss(hidden, head, targets, weights)
    assert loss == flat_loss
    assert np.array_equal(stats.nll, flat.nll.reshape(4, -1))
    per_token = token_losses(rows[0], head, rows[1], rows[2] != 0)
    assert np.array_equal(per_token.nll, stats.nll)


def test_what_tokens_without_weight_hold_does_not_matter():
    hidden, head, targets, weights, _ = example(5)
    garbage = jnp.where((weights == 0)[:, None], jnp.nan, hidden)
    grad = jax.jit(jax.value_and_grad(lambda *x: vocab_loss(*x, chunk=16)[0], argnums=(0, 1)))
    for a, b in zip(
        jax.tree.leaves(grad(garbage, head, targets, weights)),
        jax.tree.leaves(grad(hidden, head, targets, weights)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_a_target_outside_the_vocabulary_is_not_a_number():
    hidden, head, targets, _, _ = example(6)
    for wrong in (-1, VOCAB):
        loss, _ = vocab_loss(hidden, head, targets.at[7].set(wrong), jnp.ones(TOKENS))
        assert np.isnan(loss)


def test_equal_logits_are_won_by_the_lowest_id():
    stats = vocab_loss(jnp.zeros((2, 4)), jnp.ones((4, 8)), jnp.array([0, 3]), jnp.ones(2))[1]
    assert stats.correct.tolist() == [True, False]
    np.testing.assert_allclose(stats.confidence, 1 / 8, rtol=1e-6)


def test_bf16_inputs_are_summed_in_fp32():
    """Over many chunks, within what rounding the matmuls' inputs costs; gradients in the dtype of
    what they belong to."""
    hidden, head, targets, weights, entropy_weights = example(7, tokens=16 * TOKENS)
    rounded = hidden.astype(jnp.bfloat16)
    (loss, _), grads = fused(
        rounded, head, targets, weights, entropy_weights, temperature=1.0, chunk=1, tied=False
    )
    exact = rounded.astype(jnp.float32), head.astype(jnp.bfloat16).astype(jnp.float32)
    (want, _), want_grads = oracle(*exact, targets, weights, entropy_weights, np.float64(1))
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for a, b in zip(grads, want_grads, strict=True):
        a = np.asarray(a, np.float32)
        assert np.linalg.norm(a - b) < 4e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("chunk, tokens", [(32, 512), (None, 8192)])
def test_memory_does_not_grow_with_tokens(chunk, tokens):
    """Temporaries of loss and gradients: a chunk's, and a few bytes of bookkeeping a token."""

    def temporaries(tokens):
        def loss(hidden, head, targets, weights):
            return vocab_loss(hidden, head, targets, weights, chunk=chunk)[0]

        compiled = (
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
            .lower(*example(0, tokens=tokens)[:4])
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporaries(tokens), temporaries(4 * tokens)
    assert many - few < 32 * 3 * tokens < 4 * VOCAB * 3 * tokens / 4


def test_a_frozen_head_costs_no_gradient():
    def flops(argnums):
        def loss(hidden, head, targets, weights):
            return vocab_loss(hidden, head, targets, weights, chunk=TOKENS)[0]

        compiled = jax.jit(jax.grad(loss, argnums)).lower(*example(0)[:4]).compile()
        return compiled.cost_analysis()["flops"]

    product = 2 * TOKENS * HIDDEN * VOCAB
    assert flops((0, 1)) - flops(0) > 0.9 * product


def test_chunks_fit_their_budget():
    assert chunk_rows(8192, 157184) == chunk_rows(1 << 20, 157184) == 384
    assert chunk_rows(2048, 157184) == 256
    assert chunk_rows(1024, 1 << 20) == 128
    assert chunk_rows(4096, 2048) == 512
    assert chunk_rows(1 << 20, 2048) == 1024
    assert chunk_rows(40, 2048) == 40


def test_what_does_not_fit_is_named():
    hidden, head, targets, weights, _ = example(0)
    with pytest.raises(ValueError, match="vocab_axis=2"):
        vocab_loss(hidden, head, targets, weights, vocab_axis=2)
    with pytest.raises(ValueError, match=r"head \(12, 48\) with vocab_axis=0"):
        vocab_loss(hidden, head, targets, weights, vocab_axis=0)
    with pytest.raises(ValueError, match=r"weights has shape \(39,\)"):
        vocab_loss(hidden, head, targets, weights[1:])
    with pytest.raises(ValueError, match="chunk=0"):
        vocab_loss(hidden, head, targets, weights, chunk=0)
    with pytest.raises(ValueError, match="axis_name='model' does not shard the head"):
        vocab_loss(hidden, head, targets, weights, axis_name="model")


# ---- several devices -----------------------------------------------------------------------------


def run_on_mesh(data, model, *, inside):
    """Both losses with tokens over `data` and the vocabulary over `model`, against one device.

    inside: differentiate inside shard_map instead of through it.
    """
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((data, model), ("data", "model"), axis_types=kinds)
    hidden, head, *tokens = example(8)
    tokens[1] = tokens[1].at[: TOKENS // 2].set(0)  # devices differ in how many chunks they need

    def losses(hidden, head, targets, weights, entropy_weights, axis_name=None):
        options = {"axis_name": axis_name, "chunk": 4}
        loss, stats = vocab_loss(
            hidden, head, targets, weights, entropy_weights=entropy_weights, **options
        )
        each = token_losses(hidden, head, targets, weights != 0, **options)
        return loss + (each.nll**2).sum(), (stats, each)

    spread = functools.partial(losses, axis_name="model")

    def local(hidden, head, *tokens):
        if not inside:
            loss, stats = spread(hidden, head, *tokens)
            return lax.psum(loss, "data"), stats
        (loss, stats), grads = gradient(spread)(hidden, head, *tokens)
        return (lax.psum(loss, "data"), stats), grads

    def gradient(f):
        return jax.value_and_grad(f, argnums=(0, 1), has_aux=True)

    rows, columns = P("data"), P(None, "model")
    out = (P(), rows)
    spread_out = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, columns, rows, rows, rows),
        out_specs=(out, (rows, columns)) if inside else out,
    )
    mine = jax.jit(spread_out if inside else gradient(spread_out))(hidden, head, *tokens)
    assert_close(mine, jax.jit(gradient(losses))(hidden, head, *tokens))


def test_sharded_vocabulary_matches_one_device():
    """In a process of its own, which has 8 devices."""
    code = (
        "from tests.kernels.test_vocab_loss import run_on_mesh\n"
        "run_on_mesh(2, 4, inside=False); run_on_mesh(2, 4, inside=True)"
    )
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
