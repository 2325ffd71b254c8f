"""Experts on several devices: exact while there is room, counted where there is none."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llada2_jax.config import SpikeConfig
from llada2_jax.model.exchange import exchange, expert_routes
from llada2_jax.sharding import place_batch, shardings
from llada2_jax.train_step import (
    init_state,
    make_context,
    make_eval_step,
    make_grad_norms_by_rate,
    make_train_step,
)
from tests.sharding.helpers import (
    CFG,
    MASK,
    SHALLOW,
    assert_equal,
    gradients,
    mesh_of,
    params,
    rows,
)

DEVICES, EXPERTS, ROOM = 8, 16, 24


@functools.cache
def one_sided():
    """Parameters whose routers choose experts 0 to 3 for every token."""
    changed = jax.tree.map(lambda x: x, params(SHALLOW))
    bias = changed["moe_layers"]["mlp"]["router"]["expert_bias"]
    bias[...] = jnp.zeros_like(bias[...]).at[:, :4].set(4.0)
    return changed


def model(**changes):
    return dataclasses.replace(SHALLOW, **changes)


@pytest.mark.parametrize(
    "way, sizes, chunks", [("gather", {"expert": 8}, 2), ("ragged", {"fsdp": 2, "expert": 4}, 1)]
)
def test_the_worst_case_has_room_for_everything(way, sizes, chunks):
    strict = model(expert_exchange=way, expert_buffer=0.0, expert_chunks=chunks)
    mine = gradients(mesh_of(**sizes), "ar", model=strict, given=one_sided())
    single = gradients(mesh_of(), "ar", model=SHALLOW, given=one_sided())
    assert single[1].tokens.max() == rows().tokens.size
    assert_equal(mine, single)


@pytest.mark.parametrize("way, policy", [("gather", "stop"), ("ragged", "ignore")])
def test_an_overflow_is_counted_and_its_step_not_applied_unless_ignored(way, policy):
    mesh, batch = mesh_of(expert=4), rows()
    cfg = dataclasses.replace(CFG, spikes=SpikeConfig(expert_overflow=policy))
    small = model(expert_exchange=way, expert_buffer=1.0, experts_backend="ragged_dot")
    state = init_state(cfg.of_step, jax.tree.map(np.asarray, one_sided()), mesh)
    before = np.asarray(state.params["head"][...])
    step = make_train_step(cfg.of_step, small, "ar", mesh)
    state, metrics = step(state, place_batch(batch, mesh), make_context(cfg, 1, MASK))
    pairs = batch.tokens.size * small.experts_per_token
    # All want the device of the first four experts, which has room for a fourth of them.
    assert float(metrics["expert_overflow"]) == 3 * pairs / 4
    assert metrics["spike_expert_overflow"] and int(state.skipped) == (policy == "stop")
    changed = (np.asarray(state.params["head"][...]) != before).any()
    assert changed == (policy == "ignore")
    assert np.isfinite(metrics["loss"]) and metrics["expert_load_max_over_mean"].shape == (1,)


def test_what_has_no_step_to_refuse_leaves_nothing_out_or_says_so():
    small = model(expert_buffer=1.0)

    def scored(mesh):
        placed = jax.device_put(one_sided(), shardings(one_sided(), mesh))
        context = make_context(CFG, 1, MASK)
        output = make_eval_step(small, "ar", mesh)(placed, place_batch(rows(), mesh), context)
        assert output.expert_load.overflow.sum() == 0
        state = init_state(CFG.of_step, jax.tree.map(np.asarray, one_sided()), mesh)
        norms = make_grad_norms_by_rate(small, "ar", 1, mesh)
        (norm,) = norms(state, place_batch(rows(), mesh), context)
        return np.asarray(output.nll), float(norm)

    (nll, norm), (nll_1, norm_1) = scored(mesh_of(expert=4)), scored(mesh_of())
    np.testing.assert_allclose(nll, nll_1, rtol=1e-5, atol=1e-5)
    assert np.isnan(norm) and norm_1 > 0


@pytest.mark.parametrize("room", [ROOM, 1000])
def test_exchange(room):
    """Every row arrives once, on its expert's device, and comes back to where it was."""
    mesh, count = mesh_of(expert=DEVICES), EXPERTS // DEVICES
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.integers(0, EXPERTS, (DEVICES, 20)) % rng.integers(1, 17, (DEVICES, 1)))
    counts = np.stack([np.bincount(row, minlength=EXPERTS) for row in chosen]).astype(np.int32)
    values = np.arange(chosen.size, dtype=np.float32).reshape(DEVICES, -1, 1) + 1

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"))
    def there_and_back(counts, values):
        routes = expert_routes(counts[0], room, "expert")
        out = exchange(values[0], routes.there, routes.back, room, "expert")
        back = exchange(out, routes.back, routes.there, values.shape[1], "expert")
        return out[None], back[None], routes.experts[None], routes.overflow[None]

    out, back, experts, overflow = map(np.asarray, there_and_back(counts, values))
    arrived = {}
    for device in range(DEVICES):
        for value, expert in zip(out[device, :, 0], experts[device], strict=True):
            assert (value > 0) == (expert < count)
            if value:
                arrived[int(value)] = device * count + expert
    wanted = dict(zip(values.astype(int).ravel(), chosen.ravel(), strict=True))
    assert arrived.items() <= wanted.items()
    assert len(arrived) == chosen.size - overflow.sum()
    assert (overflow.sum() > 0) == (room == ROOM)
    present = np.isin(values.astype(int), list(arrived))
    np.testing.assert_array_equal(back, np.where(present, values, 0))
