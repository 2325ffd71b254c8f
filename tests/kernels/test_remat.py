"""What the kernels keep for the backward pass: no policy has to run one of them twice."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada2_jax import remat
from llada2_jax.model import build, merge_params
from pallas_kernels.block_attention import KEPT, block_attention
from pallas_kernels.block_layout import both_halves
from tests.helpers import TINY
from tests.jaxprs import equations_of

INDEX = np.zeros((1, 64), np.int32)
again_before_012 = pytest.mark.xfail(
    jax.__version_info__ < (0, 12), reason="jax 0.11 runs these kernels' forward pass again"
)


def kernel_calls(function, *arguments) -> int:
    """Kernels in a traced function, forward and backward."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    names = collections.Counter(equation.primitive.name for equation in equations_of(jaxpr))
    return names["pallas_call"] + names["mpmd_map"] + names["core_map"]


@pytest.mark.parametrize(
    "backend, backward",
    [
        pytest.param("tpu", 1, marks=again_before_012),
        ("mosaic", 2),
        pytest.param("triton", 2, marks=again_before_012),
        ("splash", 1),
    ],
)
def test_a_policy_can_keep_what_a_kernel_made(backend, backward):
    layout = both_halves(jnp.asarray(INDEX), jnp.asarray(INDEX + 1))
    q, k = (jax.ShapeDtypeStruct((1, 128, n, 64), jnp.bfloat16) for n in (2, 1))

    def attend(q, k, v):
        return block_attention(q, [(k, v, layout)], layout, backend=backend)

    def calls(policy):
        kept = jax.checkpoint(attend, policy=policy)
        return kernel_calls(
            jax.grad(lambda *qkv: kept(*qkv).astype(jnp.float32).sum(), (0, 1, 2)), q, k, k
        )

    assert calls(jax.checkpoint_policies.nothing_saveable) == 2 + backward
    assert calls(jax.checkpoint_policies.save_only_these_names(KEPT)) == 1 + backward


@pytest.mark.parametrize(
    "policy",
    [pytest.param(p, marks=again_before_012) if p == "dots" else p for p in remat.POLICIES],
)
def test_only_full_recomputation_runs_attention_again(policy):
    cfg = dataclasses.replace(TINY, attention_backend="tpu", remat=policy)
    forward = 2 if policy == "full" else 1
    stacks = 2  # dense layers, MoE layers
    layout = both_halves(jnp.asarray(INDEX), jnp.asarray(INDEX + 1))
    tokens = np.concatenate([INDEX, INDEX], axis=1)

    def loss(params):
        return merge_params(cfg, params)(tokens, tokens, layout).hidden.astype(jnp.float32).sum()

    assert kernel_calls(jax.grad(loss), build(cfg)[1]) == stacks * (forward + 1)
