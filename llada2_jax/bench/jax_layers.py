"""A process that trains a stack of this project's layers, for `bench layers`.

    python -m llada2_jax.bench.jax_layers JOB.json RESULT.json

What the job says is in layers.py; torch_layers.py is the same in PyTorch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh

from llada2_jax.adapters import split_trained
from llada2_jax.checkpoint import fill_params, flatten
from llada2_jax.config import (
    DataConfig,
    OptimizerConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from llada2_jax.costs import Workload, working_bytes
from llada2_jax.model import build, init_params, merge_params
from llada2_jax.optimizer import make_optimizer, take_step
from llada2_jax.sharding import AXES, placements
from llada2_jax.types import ModelConfig, Params
from pallas_kernels.block_layout import block_index, both_halves

SHARE = 0.85
"""Of a device's memory that the computed bytes may fill: PyTorch is to fit too, and what matmuls of
tiles gather is not computed."""

Job = Mapping[str, Any]


def _model(job: Job) -> ModelConfig:
    return ModelConfig(**job["model"])


def train_config(job: Job) -> TrainConfig:
    """The recipe of the optimizer, at a constant learning rate."""
    rows, length = job["rows"], job["length"]
    return TrainConfig(
        seed=job["seed"],
        data=DataConfig(row_length=length, rows_per_step=rows),
        schedule=ScheduleConfig(decay_blocks=(job["block_size"],), decay_tokens=length * rows),
        runtime=RuntimeConfig(remat=job["model"]["remat"]),
        optimizer=OptimizerConfig(**job["optimizer"], warmup_fraction=0.0, final_fraction=1.0),
    )


# ---- how many layers fit -------------------------------------------------------------------------


def size(job: Job) -> dict[str, Any]:
    """The device, and the most layers that fit it; None where it does not say how much memory it
    has, as a CPU."""
    device = jax.local_devices()[0]
    stats = device.memory_stats()
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "layers": largest_stack(job, SHARE * stats["bytes_limit"]) if stats else None,
    }


def largest_stack(job: Job, limit: float) -> int:
    """The most layers, of as many as the model has, that are computed to take `limit` bytes or
    less; 0 if a single one takes more."""
    counts = range(1, _model(job).num_layers + 1)
    return sum(1 for _ in itertools.takewhile(lambda n: needed_bytes(job, n) <= limit, counts))


def needed_bytes(job: Job, layers: int) -> float:
    """Parameters, moments and what a step of full recomputation works with: llada2_jax.costs."""
    cfg, model = train_config(job), dataclasses.replace(_model(job), num_layers=layers)
    sizes: dict[str, int] = dict.fromkeys(AXES, 1)
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    params = build(model)[1]
    moments = jax.eval_shape(make_optimizer(cfg.of_step).init, split_trained(params)[0])
    held = sum(place.bytes_per_device for place in placements((params, moments), mesh))
    work = Workload(cfg, model, sizes, "bdlm", job["block_size"])
    return held + sum(working_bytes(work, placements(params, mesh)).values())


# ---- a step --------------------------------------------------------------------------------------


def make_gradients(job: Job) -> Callable:
    """(params, buffers, x, target) -> ((loss, hidden), (gradient of params, of x)).

    x: [rows, 2·length, D] in the dtype of activations, the noisy and the clean half. target: fp32
    [rows, length, D], which the noisy half's output is to be.
    """
    shape = job["rows"], job["length"]
    position = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    block = block_index(position, job["block_size"], "document")
    layout = both_halves(block, jnp.ones(shape, jnp.int32))
    positions = jnp.concatenate([position, position], axis=1)

    def loss(params, buffers, x, target):
        stack = merge_params(_model(job), nnx.merge_state(params, buffers))
        hidden = stack.layers(x, positions, layout).hidden
        error = hidden[:, : target.shape[1]].astype(jnp.float32) - target
        return jnp.mean(error * error), hidden

    return jax.value_and_grad(loss, argnums=(0, 2), has_aux=True)


def make_step(job: Job) -> Callable:
    """(state, buffers, x, target) -> (state, loss, gradient of x), jitted; the state is donated."""
    cfg, gradients = train_config(job).of_step, make_gradients(job)

    def step(state, buffers, x, target):
        params, opt_state, number = state
        (loss, _), (grads, x_grad) = gradients(params, buffers, x, target)
        params, opt_state = take_step(
            *(cfg, params, grads, opt_state),
            weight=jnp.ones(()),
            norm=optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads)),
            step=number,
            applied=jnp.ones((), bool),
        )
        return (params, opt_state, number + 1), loss, x_grad

    return jax.jit(step, donate_argnums=0)


def _inputs(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """x and target of unit variance, in fp32."""
    rng, size = np.random.default_rng(job["seed"]), job["model"]["hidden_size"]
    shapes = [(job["rows"], n * job["length"], size) for n in (2, 1)]
    x, target = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return x, target


def _losses(job: Job, params: Params, x, target) -> Iterator[jax.Array]:
    """Of one step after the other, on the same rows."""
    step = make_step(job)
    trained, buffers = split_trained(params)
    moments = jax.jit(make_optimizer(train_config(job).of_step).init)(trained)
    state = trained, moments, jnp.zeros((), jnp.int32)
    x, target = jnp.asarray(x, job["model"]["dtype"]), jnp.asarray(target)
    while True:
        state, loss, _ = step(state, buffers, x, target)
        yield loss


def initial_params(job: Job) -> Params:
    """Parameters whose mixtures of experts are copies of the first: the random bits for all of them
    at once would take more memory than a step."""
    model = _model(job)
    first = dataclasses.replace(
        model, num_layers=min(model.num_layers, model.first_k_dense_replace + 1)
    )
    params = init_params(first, job["seed"])
    return jax.tree.map(lambda x, want: jnp.broadcast_to(x, want.shape), params, build(model)[1])


def timed(job: Job) -> dict[str, Any]:
    """Seconds a step, after two that are not timed; the losses of the first and the last step."""
    losses = _losses(job, initial_params(job), *_inputs(job))
    first = float(next(losses))
    jax.block_until_ready(next(losses))
    start = time.perf_counter()
    last = jax.block_until_ready([next(losses) for _ in range(job["steps"])][-1])
    seconds = (time.perf_counter() - start) / job["steps"]
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {"seconds": seconds, "losses": [first, float(last)], "peak_bytes": peak}


# ---- the same numbers as PyTorch -----------------------------------------------------------------


def check(job: Job) -> dict[str, Any]:
    """Writes weights and inputs to the file `given`, and what comes of them to `found`, in fp32."""
    rng, params = np.random.default_rng(job["seed"]), init_params(_model(job), job["seed"])
    # As initialised, norms' scales are all 1 and the router's bias is 0.
    weights: dict[str, Any] = {
        path: np.asarray(leaf, np.float32) + 0.1 * rng.standard_normal(leaf.shape, np.float32)
        for path, leaf in flatten(params).items()
    }
    params = fill_params(params, weights)
    x, target = _inputs(job)
    given = jnp.asarray(x, job["model"]["dtype"]), jnp.asarray(target)
    (_, hidden), (grads, x_grad) = jax.jit(make_gradients(job))(*split_trained(params), *given)
    found: dict[str, Any] = {f"grad {p}": g for p, g in flatten(grads).items() if p != "embedding"}
    found |= {"output": hidden, "grad input": x_grad}
    losses = itertools.islice(_losses(job, params, x, target), job["steps"])
    found["losses"] = jnp.stack(list(losses))
    np.savez(job["given"], x=x, target=target, **weights)
    found = {name: np.asarray(value, np.float32) for name, value in found.items()}
    np.savez(job["found"], **found)
    return {}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    answer = {"size": size, "time": timed, "check": check}[asked["task"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(answer))
