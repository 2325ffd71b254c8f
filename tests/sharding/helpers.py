"""What the checks on 8 devices share: a model whose axes every mesh divides, and rows."""

import dataclasses
import functools

import jax
import numpy as np

from llada2_jax.adapters import split_trained
from llada2_jax.config import DataConfig, MeshConfig, TrainConfig
from llada2_jax.sharding import make_mesh, place_batch, shardings
from llada2_jax.train_step import accumulated, make_context, meshed
from tests.helpers import config, make_batch, random_params

MODEL = config(
    vocab_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    num_experts=16,
    experts_per_token=4,
    n_group=4,
    topk_group=2,
    expert_buffer=0.0,  # so few tokens are anything but balanced
)
SHALLOW = dataclasses.replace(MODEL, num_layers=1, first_k_dense_replace=0)
"""One layer of experts, for what does not depend on how many there are: quicker to compile."""

ROWS, LENGTH, MASK = 8, 16, 31
CFG = TrainConfig(data=DataConfig(row_length=LENGTH, rows_per_step=ROWS))


def mesh_of(**sizes: int):
    """A mesh of these sizes; fsdp is 1 unless it is given."""
    sizes = {"fsdp": 1} | sizes
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


@functools.cache
def rows(count: int = ROWS, length: int = LENGTH):
    """Packed rows: documents that cut blocks, padding, and tokens that are not supervised."""
    rng = np.random.default_rng(0)
    ends = np.sort(rng.integers(1, length, (count, 2)), axis=1)
    segments = 1 + (np.arange(length) >= ends[..., None]).sum(1)
    segments[:, -2:] = 0
    return make_batch(
        rng.integers(0, MASK, (count, length)),
        segments,
        document_ids=segments + 10 * np.arange(count)[:, None],
        loss_mask=rng.random((count, length)) < 0.9,
    )


@functools.cache
def params(model=MODEL):
    return random_params(model, 0, 0.3)


def gradients(mesh, objective="bdlm", *, cfg=CFG, model=MODEL, batch=None, given=None):
    """(loss, expert load, gradients) of a batch, as NumPy. given: parameters."""
    batch = rows() if batch is None else batch
    given = params(model) if given is None else given
    trained, buffers = split_trained(jax.device_put(given, shardings(given, mesh)))
    run = _program(mesh, objective, model, cfg.optimizer.accumulate)
    context = make_context(cfg, LENGTH if objective == "mdlm" else 4, MASK, sigma=0.1)
    *results, grads = run(trained, buffers, place_batch(batch, mesh), context)
    for grad, placed in zip(
        jax.tree.leaves(grads), jax.tree.leaves(shardings(trained, mesh)), strict=True
    ):
        assert grad.sharding.is_equivalent_to(placed, grad.ndim)
    return jax.tree.map(np.asarray, (*results, grads))


@functools.cache
def _program(mesh, objective, model, micro_batches):
    @jax.jit
    @meshed(mesh)
    def run(*inputs):
        grads, output = accumulated(objective, model, *inputs, micro_batches)
        return output.loss.mean(), output.expert_load, grads

    return run


# jax 0.11.2 sums an adapter's gradient in an order that is 1.1e-5 off.
TOLERANCE = 1e-5 if jax.__version_info__ >= (0, 12) else 2e-5


def assert_equal(mine, single) -> None:
    """Loss and every gradient within 1e-5 of their size; the same tokens to the same experts, and
    none left out."""
    (loss, load, grads), (loss_1, load_1, grads_1) = mine, single
    np.testing.assert_allclose(loss, loss_1, rtol=1e-5)
    np.testing.assert_array_equal(load.tokens, load_1.tokens)
    np.testing.assert_allclose(load.z, load_1.z, rtol=1e-5)
    assert load.overflow.sum() == load_1.overflow.sum() == 0
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(grads_1), strict=True
    ):
        assert np.abs(b).max() > 0, path
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst < TOLERANCE, (jax.tree_util.keystr(path), worst)
