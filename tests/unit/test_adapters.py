"""Low-rank adapters: what they add, what is trained, and the model that comes of merging them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada2_jax.adapters import add_adapters, merged_slice, modules_of, without_adapters
from llada2_jax.checkpoint import ModelBundle, flatten
from llada2_jax.config import ConfigError, TrainConfig
from llada2_jax.model import merge_params
from llada2_jax.train_step import init_state, make_context, make_eval_step, make_train_step
from llada2_jax.types import ADAPTED_MODULES, LoRAConfig, SpecialTokens
from tests.helpers import ONE_LAYER, TINY, assert_same_params, config, make_batch, random_params

LORA = LoRAConfig(rank=2, alpha=3.0, modules=ADAPTED_MODULES)


def bundle_of(cfg=TINY) -> ModelBundle:
    provenance = {"checksums": {"parameters": 0}}
    params = random_params(cfg, 0, 0.2)
    return ModelBundle(cfg, params, SpecialTokens(15, 1, 1), provenance=provenance)


def adapted(lora=LORA, cfg=TINY) -> ModelBundle:
    return add_adapters(bundle_of(cfg), lora, path="somewhere", seed=1)


def random_factors(bundle: ModelBundle) -> ModelBundle:
    """As after training: the second factors are not 0 any more."""
    rng = np.random.default_rng(2)
    params = jax.tree.map(lambda x: x, bundle.params)
    for path, leaf in flatten(params).items():
        if "_adapter" in path:
            node = params
            *parents, name = path.split("/")
            for parent in parents:
                node = node[parent]
            node[name][...] = jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
    return dataclasses.replace(bundle, params=params)


def hidden_of(bundle: ModelBundle):
    batch = make_batch(np.arange(16).reshape(2, 8) % 15)
    ctx = make_context(TrainConfig(), 4, 15)
    return make_eval_step(bundle.config, "bdlm")(bundle.params, batch, ctx).nll


def test_fresh_adapters_add_nothing():
    np.testing.assert_array_equal(hidden_of(adapted()), hidden_of(bundle_of()))


def test_the_merged_model_equals_the_adapted_one():
    """Whichever backend multiplies by the experts' factors."""
    bundle = random_factors(adapted())
    merged = without_adapters(bundle)
    assert merged.config == TINY and not merged.base
    want = hidden_of(merged)
    assert np.abs(want - hidden_of(bundle_of())).max() > 0.1
    for backend in ("tiles", "ragged_dot"):
        cfg = dataclasses.replace(bundle.config, experts_backend=backend)
        got = hidden_of(dataclasses.replace(bundle, config=cfg))
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("module", ADAPTED_MODULES)
def test_each_module_has_its_adapters(module):
    leaves = flatten(adapted(dataclasses.replace(LORA, modules=(module,))).params)
    names = {path.rsplit("_adapter/")[0] for path in leaves if "_adapter/" in path}
    want = {
        "attention": {
            f"{s}/attention/{m}" for s in ("dense_layers", "moe_layers") for m in ("qkv", "out")
        },
        "dense": {"dense_layers/mlp/gate_up", "dense_layers/mlp/down"},
        "experts": {"moe_layers/mlp/experts/gate_up", "moe_layers/mlp/experts/down"},
        "shared": {"moe_layers/mlp/shared/gate_up", "moe_layers/mlp/shared/down"},
    }
    assert names == want[module]
    base = flatten(random_params(TINY, 0))
    for name in names:  # every weight has a factor for its inputs and one for its outputs
        a, b = (leaves[f"{name}_adapter/{factor}"].size for factor in "ab")
        groups = base[name].shape[0] * (base[name].shape[1] if module == "experts" else 1)
        assert a * b == base[name].size * groups * LORA.rank**2


def test_a_missing_module_is_named_with_those_that_exist():
    assert modules_of(TINY) == ADAPTED_MODULES
    plain = config(first_k_dense_replace=0, num_shared_experts=0)
    for name in ("dense", "shared", "mlp"):
        with pytest.raises(
            ConfigError, match=f"no module '{name}'; choose from attention, experts"
        ):
            adapted(dataclasses.replace(LORA, modules=("attention", name)), plain)


def test_only_adapters_are_trained():
    """The base stays as it is, bit for bit, and the optimizer knows nothing of it."""
    lora = dataclasses.replace(LORA, modules=modules_of(ONE_LAYER))
    bundle = adapted(lora, dataclasses.replace(ONE_LAYER, param_dtype="bfloat16"))
    cfg = TrainConfig(lora=lora)
    state = init_state(cfg.of_step, bundle.params)
    factors = sum(x.size for p, x in flatten(bundle.params).items() if "_adapter/" in p)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert moments == 2 * factors
    assert sum(x.size for x in jax.tree.leaves(state.saved_params)) == factors
    before = jax.tree.map(jnp.copy, (state.params, state.buffers))
    batch = make_batch(np.arange(16).reshape(2, 8) % 15)
    step = make_train_step(cfg.of_step, bundle.config, "ar")
    for _ in range(2):
        state, metrics = step(state, batch, make_context(cfg, 4, 15))
    assert float(metrics["grad_norm"]) > 0
    assert_same_params(state.buffers, before[1])
    moved = [
        bool((a != b).any())
        for a, b in zip(*map(jax.tree.leaves, (state.params, before[0])), strict=True)
    ]
    assert all(moved)


def test_slices_of_a_merged_weight_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 4, 6, 2, 5)).astype(np.float32)
    a, b = rng.standard_normal((3, 4, 6, 2)), rng.standard_normal((3, 4, 2, 2, 5))
    factors = {"w_adapter/a": a.astype(np.float32), "w_adapter/b": b.astype(np.float32)}
    whole = weight + 0.5 * np.einsum("leir,lerco->leico", a, b)
    cuts = [[slice(None), slice(1, 3)]] * weight.ndim
    for index in itertools.product(*cuts):
        got = merged_slice("w", weight[index], index, factors, 0.5)
        np.testing.assert_allclose(got, whole[index], rtol=1e-5, atol=1e-5)
    assert merged_slice("v", weight, (slice(None),) * 5, factors, 0.5) is weight


def test_a_model_without_adapters_stays_itself():
    bundle = bundle_of()
    assert without_adapters(bundle) is bundle
    assert merge_params(TINY, bundle.params).moe_layers.attention.qkv_adapter is None
