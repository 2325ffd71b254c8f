"""Dispatch of pairs to experts, and the router's z-loss, on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.ad_checkpoint import saved_residuals  # only the printing one is public

from llada2_jax import remat
from llada2_jax.config import TrainConfig
from llada2_jax.model import experts as experts_module
from llada2_jax.model import merge_params
from llada2_jax.model.experts import _BLOCK, plan_dispatch
from llada2_jax.objectives import OBJECTIVES
from llada2_jax.train_step import accumulated, make_context
from tests.helpers import ONE_LAYER, make_batch, random_params


def mlp_of(cfg, seed=0):
    """The layer's experts, shared ones and router."""
    graphdef, stacked = nnx.split(merge_params(cfg, random_params(cfg, seed)).moe_layers.mlp)
    return nnx.merge(graphdef, jax.tree.map(lambda x: np.asarray(x)[0], stacked))


plan_of = jax.jit(plan_dispatch, static_argnums=(2, 3, 4))


@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 8]),
    st.sampled_from([(0, 8), (2, 3)]),
    st.sampled_from([16, 48]),
)
@settings(max_examples=60, deadline=None)
def test_dispatch(seed, alignment, experts_here, room):
    """Pairs of the experts here have a slot in their expert's stretch, in order, or are counted."""
    first, count = experts_here
    experts = np.random.default_rng(seed).integers(0, 8, (12, 4))
    plan = jax.tree.map(
        np.asarray, plan_of(experts.astype(np.int32), first, count, alignment, room)
    )
    flat, slots = experts.ravel(), plan.pair_of_slot.size
    here = np.flatnonzero((flat >= first) & (flat < first + count))
    kept = [pair for pair in here if plan.slot_of_pair[pair] < slots]
    assert plan.overflow == len(here) - len(kept)
    assert len(here) > room or plan.overflow == 0
    elsewhere = np.setdiff1d(np.arange(flat.size), here)
    assert (plan.slot_of_pair[elsewhere] >= slots).all()
    np.testing.assert_array_equal(plan.pair_of_slot[plan.slot_of_pair[kept]], kept)
    assert (plan.pair_of_slot < flat.size).sum() == len(kept)
    assert plan.sizes.sum() <= slots and (plan.overflow or not (plan.sizes % alignment).any())
    ends = np.cumsum(plan.sizes)
    for expert, start, end in zip(
        range(first, first + count), ends - plan.sizes, ends, strict=True
    ):
        mine = plan.pair_of_slot[start:end]
        mine = mine[mine < flat.size]
        wanted = np.flatnonzero(flat == expert)
        np.testing.assert_array_equal(mine, wanted[: len(mine)])


def test_tokens_may_come_in_parts():
    """12 tokens, in as many parts as divide them: the output and gradients of all at once."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((12, ONE_LAYER.hidden_size)), jnp.float32)
    experts = jnp.asarray(rng.integers(0, ONE_LAYER.num_experts, (12, ONE_LAYER.experts_per_token)))
    weights = jnp.asarray(rng.random(experts.shape), jnp.float32)

    def all_of(parts):
        graphdef, params = nnx.split(
            mlp_of(dataclasses.replace(ONE_LAYER, expert_chunks=parts)).experts
        )

        @jax.jit
        def pulled(params, x, weights):
            def output(params, x, weights):
                out, overflow = nnx.merge(graphdef, params)(x, experts, weights)
                assert overflow.shape == ()
                return out

            out, pull = jax.vjp(output, params, x, weights)
            return out, *pull(x)

        return pulled(params, x, weights)

    for a, b in zip(*map(jax.tree.leaves, (all_of(8), all_of(1))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "up, down, rank, chosen",
    [
        ("tokamax", "tokamax", 0, "tokamax"),
        ("tokamax", "tiles", 0, "tiles"),
        ("tokamax", "tokamax", 2, "tiles"),
        ("ragged_dot", "ragged_dot", 2, "ragged_dot"),
    ],
)
def test_auto_is_one_backend_for_all_products(monkeypatch, up, down, rank, chosen):
    """up, down: what is best for each projection alone. rank: of adapters."""
    d, f = ONE_LAYER.hidden_size, ONE_LAYER.moe_intermediate_size
    best = {(d, 2 * f): up, (f, d): down}
    monkeypatch.setattr(
        experts_module, "chosen_backend", lambda asked, shape, dtype: best[shape[1:]]
    )
    low_rank = object() if rank else None
    kernels = [(np.zeros((4, *shape)), low_rank) for shape in best]
    assert mlp_of(ONE_LAYER).experts._backend(kernels, "bfloat16") == chosen


def test_dots_keeps_the_slots_and_not_what_they_were_counted_by():
    cfg = dataclasses.replace(ONE_LAYER, experts_backend="ragged_dot")
    graphdef, params = nnx.split(mlp_of(cfg).experts)
    rows, k = 300, ONE_LAYER.experts_per_token
    experts, weights = jnp.zeros((rows, k), jnp.int32), jnp.ones((rows, k))

    def mixed(params, x, weights):
        def output(x, weights):
            return nnx.merge(graphdef, params)(x, experts, weights)[0]

        return remat.POLICIES["dots"](output)(x, weights)

    x = jnp.ones((rows, ONE_LAYER.hidden_size))
    kept = [aval for aval, _ in saved_residuals(mixed, params, x, weights)]
    assert (rows * k,) in [aval.shape for aval in kept if aval.dtype == jnp.int32]
    assert not any(aval.ndim == 3 and aval.shape[1] == _BLOCK for aval in kept)


def test_router_z_loss_adds_its_gradient():
    """As automatic differentiation of Σ logsumexp² has it, however the batch is cut."""
    batch = make_batch(np.random.default_rng(0).integers(0, 15, (4, 8)))
    context = make_context(TrainConfig(), 4, 15)
    trained, buffers = nnx.split_state(random_params(ONE_LAYER, 0, 0.3), nnx.Param, ...)

    @jax.jit
    def gradients(params, weight):
        return accumulated("ar", ONE_LAYER, params, buffers, batch, context, 2, weight)[0]

    @jax.jit
    def expected(params):
        def z(params):
            model = merge_params(ONE_LAYER, nnx.merge_state(params, buffers))
            output = OBJECTIVES["ar"](model, batch, context)
            return output.expert_load.z.sum() / output.loss.weight

        return jax.grad(z)(params)

    difference = jax.tree.map(np.subtract, gradients(trained, 0.5), gradients(trained, 0.0))
    for a, b in zip(jax.tree.leaves(difference), jax.tree.leaves(expected(trained)), strict=True):
        np.testing.assert_allclose(a, 0.5 * b, rtol=1e-3, atol=1e-3 * max(1.0, np.abs(b).max()))
    assert np.abs(difference["moe_layers"]["mlp"]["router"]["kernel"][...]).max() > 0.01


def test_z_is_what_it_says():
    mlp, x = mlp_of(ONE_LAYER, 1), np.random.default_rng(0).normal(size=(3, 16))
    graphdef, params = nnx.split(mlp)
    load = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)[1])(params, np.float32(x[None]))
    kernel = np.asarray(mlp.router.kernel[...], np.float64)
    wanted = np.log(np.exp(x @ kernel).sum(-1)) ** 2
    np.testing.assert_allclose(load.z, wanted.sum(), rtol=1e-5)
    assert load.tokens.sum() == 3 * ONE_LAYER.experts_per_token and load.overflow == 0
