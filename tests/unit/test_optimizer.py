"""What each precision of parameters and moments keeps of fp32 Adam, and what it loses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from llada2_jax import optimizer
from llada2_jax.config import (
    ConfigError,
    OptimizerConfig,
    StepConfig,
    TrainConfig,
    default_config,
    model_dict,
)
from llada2_jax.config_check import validate
from llada2_jax.model import build
from llada2_jax.train_step import (
    _balanced,
    _imbalance,
    accumulated,
    init_state,
    make_context,
    reset_moments,
)
from tests.helpers import ONE_LAYER, TINY, make_batch

STEPS = 50


def run_config(param_dtype="float32", **fields) -> TrainConfig:
    """A config whose learning rate is 1e-5 from the first step to the last."""
    cfg = default_config()
    cfg.workdir = "unused"
    cfg.schedule.ar_tokens = STEPS * cfg.data.row_length * cfg.data.rows_per_step
    with cfg.unlocked():
        cfg.model = {k: v for k, v in model_dict(TINY).items() if v is not None}
    cfg.runtime.param_dtype = param_dtype
    constant = {"warmup_fraction": 0.0, "decay_fraction": 0.0, "final_fraction": 1.0}
    cfg.optimizer.update({"learning_rate": 1e-5, "weight_decay": 0.0, **constant, **fields})
    return validate(cfg)


def tree(kernel, ndim=2):
    """A parameter tree; with an axis more than `ndim`, stacked over layers."""
    return nnx.State({"kernel": nnx.Param(jnp.asarray(kernel), logical_axes=(None,) * ndim)})


@functools.cache
def step_of(cfg: StepConfig):
    """The jitted step; gradients are given as sums of weight 3."""

    @jax.jit
    def step(params, state, gradient, number, applied):
        norm = optax.tree.norm(optax.tree.cast(gradient, jnp.float32))
        return optimizer.take_step(
            *(cfg, params, jax.tree.map(lambda g: 3 * g, gradient), state),
            weight=jnp.float32(3),
            norm=norm,
            step=number,
            applied=applied,
        )

    return step


def trained(cfg: TrainConfig, params, gradients, start=0, state=None, applied=True):
    """(parameters, optimizer state) after one step for each gradient."""
    step = step_of(cfg.of_step)
    state = optimizer.make_optimizer(cfg.of_step).init(params) if state is None else state
    for number, gradient in enumerate(gradients, start):
        params, state = step(params, state, gradient, np.int32(number), np.bool_(applied))
    return params, state


def adam_of(state) -> optax.ScaleByAdamState:
    def is_adam(x):
        return isinstance(x, optax.ScaleByAdamState)

    return next(x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x))


def test_matrices_decay_and_scales_of_norms_do_not():
    params = nnx.State(
        {
            name: nnx.Param(jnp.ones((2, 3)), logical_axes=(None, None))
            for name in ("kernel", "scale")
        }
    )
    cfg = run_config("float32", learning_rate=0.5, weight_decay=0.1)
    (new, _) = trained(cfg, params, [jax.tree.map(jnp.zeros_like, params)])
    np.testing.assert_allclose(new["kernel"][...], 1 - 0.5 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(new["scale"][...], 1)


def weights(dtype="bfloat16", value=0.02):
    return tree(jnp.full((64, 256), value, dtype))


@pytest.mark.parametrize(("rounding", "kept"), [("nearest", 0.0), ("stochastic", 1.0)])
def test_small_steps_on_bf16_weights(rounding, kept):
    """50 steps of 1e-5: to nearest nothing moves, stochastically the mean moves as in fp32."""
    gradients = [tree(jnp.ones((64, 256)))] * STEPS
    exact, _ = trained(run_config(), weights("float32"), gradients)
    moved = exact["kernel"][0, 0] - 0.02
    np.testing.assert_allclose(moved, -STEPS * 1e-5, rtol=1e-3)
    start = weights()
    cfg = run_config("bfloat16", rounding=rounding)
    after, _ = trained(cfg, start, gradients)
    assert after["kernel"].dtype == jnp.bfloat16
    change = after["kernel"].astype(jnp.float32) - start["kernel"].astype(jnp.float32)
    # A step rounds by up to 1.2e-4; 50 of them over 16384 weights leave the mean 3e-6 uncertain.
    np.testing.assert_allclose(change.mean(), kept * moved, atol=1.2e-5)


def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean():
    x = jnp.float32(1.0) + jnp.float32(2.0**-7) * jnp.linspace(0, 1, 9)[:, None]
    x = jnp.concatenate([x, -x]) * jnp.ones((1, 20000))
    rounded = optimizer.stochastic_bfloat16(x, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(np.abs(rounded))) <= {1.0, 1.0 + 2.0**-7}
    np.testing.assert_allclose(rounded.mean(1), x[:, 0], atol=4 * 2.0**-7 / 2 / np.sqrt(20000))
    special = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0, -0.0, 3.0], jnp.float32)
    for seed in range(3):
        kept = optimizer.stochastic_bfloat16(special, jax.random.key(seed))
        np.testing.assert_array_equal(kept.astype(jnp.float32), special)


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_rounding_is_a_function_of_seed_and_step(moments):
    """A run that stops and goes on has the bits of one that does not; another seed has others."""
    rng = np.random.default_rng(0)
    cfg = run_config("bfloat16", moments=moments)
    gradients = [tree(np.float32(rng.standard_normal((64, 256)))) for _ in range(4)]
    whole = trained(cfg, weights(), gradients)
    first = trained(cfg, weights(), gradients[:2])
    resumed = trained(cfg, first[0], gradients[2:], start=2, state=first[1])
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    other, _ = trained(dataclasses.replace(cfg, seed=1), weights(), gradients)
    assert (np.asarray(other["kernel"]) != np.asarray(whole[0]["kernel"])).any()
    repeated = trained(cfg, first[0], gradients[2:], start=0, state=first[1])
    assert (np.asarray(repeated[0]["kernel"]) != np.asarray(whole[0]["kernel"])).any()


@pytest.mark.parametrize(("moments", "tolerance"), [("bfloat16", 0.02), ("int8", 0.10)])
def test_stored_moments_stay_near_adams(moments, tolerance):
    """Gradients of four sizes, in rows and in neighbours of one block; bias over many weights."""
    rng = np.random.default_rng(1)
    size = np.geomspace(1e-6, 1e-3, 64)[:, None] * np.asarray([1.0, 0.3] * 128)
    gradients = [
        tree(np.float32(size * (1 + rng.standard_normal(size.shape)))) for _ in range(STEPS)
    ]
    cfg = {name: run_config(moments=name, clip_norm=0.0) for name in ("float32", moments)}
    exact, _ = trained(cfg["float32"], weights("float32"), gradients)
    stored, state = trained(cfg[moments], weights("float32"), gradients)
    step = np.asarray(exact["kernel"]) - 0.02
    difference = np.asarray(stored["kernel"]) - np.asarray(exact["kernel"])
    assert np.linalg.norm(difference) < tolerance * np.linalg.norm(step)
    # Signed error along the step: what rounding to nearest would leave behind.
    assert abs((difference * step).sum()) < tolerance / 4 * (step**2).sum()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(adam_of(state)[1:]))
    assert held < {"bfloat16": 4.01, "int8": 2.1}[moments] * size.size


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
def test_a_slow_average_follows_its_target(moments):
    """b2=0.999 moves by a thousandth a step, less than 8 or 16 bits resolve."""
    cfg = run_config(moments=moments, b2=0.999, clip_norm=0.0)
    large, small = tree(jnp.ones((64, 256))), tree(jnp.full((64, 256), 0.9))
    _, state = trained(cfg, weights("float32"), [large] * 5 + [small] * 400)
    exact = sum(0.001 * 0.999**i * (0.81 if i < 400 else 1.0) for i in range(405))
    nu = adam_of(state).nu
    if moments == "int8":
        nu = jax.tree.map(jnp.square, optimizer._dequantized(nu))
    np.testing.assert_allclose(nu["kernel"].astype(jnp.float32).mean(), exact, rtol=0.02)


def test_no_second_moment_is_rounded_to_zero():
    """Else one neighbour's large gradient makes the others' steps lr · m / eps."""
    gradient = np.full((2, 128), 1e-7, np.float32)
    gradient[0, 0], gradient[1] = 1.0, 0.0
    cfg = run_config(moments="int8", clip_norm=0.0)
    after, state = trained(cfg, tree(jnp.zeros((2, 128))), [tree(gradient)] * 3)
    assert (np.asarray(adam_of(state).nu.values["kernel"])[0] > 0).all()
    assert np.abs(np.asarray(after["kernel"])).max() < 4e-5
    assert (np.asarray(after["kernel"])[1] == 0).all()


@pytest.mark.parametrize("moments", ["float32", "int8"])
def test_stacked_layers_are_updated_as_each_alone(moments):
    """With the norm of all; and each layer's rounding has numbers of its own."""
    rng = np.random.default_rng(3)
    layers, gradients = rng.standard_normal((2, 3, 4, 128)).astype(np.float32)
    cfg = run_config(clip_norm=2.0, weight_decay=0.1, moments=moments)
    together, state = trained(cfg, tree(layers), [tree(gradients)] * 2)
    clipped = gradients * np.float32(2.0 / np.linalg.norm(gradients))
    alone = run_config(clip_norm=0.0, weight_decay=0.1, moments=moments)
    for layer, gradient, got in zip(layers, clipped, together["kernel"][...], strict=True):
        wanted, _ = trained(alone, tree(layer), [tree(gradient)] * 2)
        change, wanted = np.asarray(got) - layer, np.asarray(wanted["kernel"][...]) - layer
        # Of a step; the last bit of a weight of 1 is a hundredth of one.
        tolerance = {"float32": 0.02, "int8": 0.1}[moments]
        assert np.linalg.norm(change - wanted) < tolerance * np.linalg.norm(wanted)
    assert adam_of(state).count == 2
    if moments == "float32":  # Adam's step does not tell how long a gradient is; its mean does
        mean = adam_of(state).mu["kernel"][...]
        np.testing.assert_allclose(mean, (1 - cfg.optimizer.b1**2) * clipped, rtol=1e-5)
    same = tree(jnp.broadcast_to(jnp.bfloat16(0.02), (3, 4, 128)))
    rounded, _ = trained(run_config("bfloat16"), same, [tree(jnp.ones((3, 4, 128)))])
    a, b, c = np.asarray(rounded["kernel"][...], np.float32)
    assert (a != b).any() and (b != c).any()


def test_a_step_that_is_not_applied_changes_nothing():
    params, gradient = tree(jnp.ones((3, 4, 128))), tree(jnp.full((3, 4, 128), jnp.nan))
    start = optimizer.make_optimizer(run_config().of_step).init(params)
    after = trained(run_config(), params, [gradient], state=start, applied=False)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves((params, start)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_forgotten_moments_are_zero():
    params = tree(jnp.ones((2, 128), jnp.bfloat16))
    cfg = run_config("bfloat16", moments="int8")
    gradient = jax.tree.map(jnp.ones_like, params)
    state = init_state(cfg.of_step, params)
    _, opt_state = trained(cfg, state.params, [gradient], state=state.opt_state)
    moments = adam_of(opt_state)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(moments))
    forgotten = reset_moments(dataclasses.replace(state, opt_state=opt_state)).opt_state
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(adam_of(forgotten)))


def test_gradients_of_micro_batches_are_summed_in_fp32():
    cfg, model = run_config("bfloat16"), dataclasses.replace(ONE_LAYER, param_dtype="bfloat16")
    params, buffers = nnx.split_state(build(model)[1], nnx.Param, ...)
    batch, context = make_batch(np.zeros((4, 8), int)), make_context(cfg, 1, 15)

    def dtypes(micro_batches):
        def gradients(params, buffers):
            return accumulated("ar", model, params, buffers, batch, context, micro_batches)[0]

        return {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(gradients, params, buffers))}

    assert dtypes(1) == {jnp.dtype("bfloat16")} and dtypes(4) == {jnp.dtype("float32")}


def test_rounding_belongs_to_bf16_parameters():
    with pytest.raises(ConfigError, match=r"optimizer.rounding='nearest' is not read"):
        run_config("float32", rounding="nearest")


def test_experts_are_balanced_by_a_bias_of_mean_zero():
    """Auxiliary-loss-free: up by the rate with less than the mean load, down with more."""
    load = jnp.asarray([[1, 1, 1, 5], [2, 2, 2, 2]], jnp.int32)
    cfg = dataclasses.replace(
        TrainConfig(), optimizer=OptimizerConfig(expert_bias_rate=0.1)
    ).of_step
    before = {"bias": jnp.zeros((2, 4))}
    moved = _balanced(cfg, before, load, jnp.bool_(True))["bias"]
    np.testing.assert_allclose(moved, [[0.05, 0.05, 0.05, -0.15], [0, 0, 0, 0]], atol=1e-7)
    still = _balanced(cfg, before, load, jnp.bool_(False))["bias"]
    np.testing.assert_array_equal(still, 0)
    assert _balanced(TrainConfig().of_step, before, load, jnp.bool_(True)) is before
    np.testing.assert_allclose(_imbalance(load), [2.5, 1.0])
