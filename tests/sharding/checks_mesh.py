"""A training step on a mesh is the step on one device."""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from llada2_jax.checkpoint import save_model
from llada2_jax.config import (
    ConfigError,
    DataConfig,
    DPOConfig,
    MeshConfig,
    NoiseConfig,
    OptimizerConfig,
    default_config,
    model_dict,
)
from llada2_jax.config_check import validate
from llada2_jax.diffusion import corrupt
from llada2_jax.hub import load_model
from llada2_jax.metrics import read_metrics
from llada2_jax.model import build
from llada2_jax.reference import make_reference_step
from llada2_jax.sharding import (
    check_cut,
    check_mesh,
    format_placements,
    mesh_sizes,
    place_batch,
    placements,
    shardings,
)
from llada2_jax.train import train
from llada2_jax.train_step import init_state, make_context, make_train_step, reset_moments
from llada2_jax.types import ADAPTED_MODULES, LoRAConfig
from pallas_kernels.block_layout import block_index
from tests.helpers import assert_same_params, config, make_pairs, random_params
from tests.sharding.helpers import (
    CFG,
    LENGTH,
    MASK,
    MODEL,
    ROWS,
    SHALLOW,
    assert_equal,
    gradients,
    mesh_of,
    params,
    rows,
)
from tests.tiny_run import VOCAB, write_corpus

ONE = mesh_of()
MIXED = {"fsdp": 2, "expert": 2, "model": 2}
CASES = [
    ("ar", {"data": 2, "fsdp": 4}, SHALLOW, {}),
    ("ar", MIXED, MODEL, {"lora": LoRAConfig(rank=2, modules=ADAPTED_MODULES)}),
    ("bdlm", MIXED, SHALLOW, {"tie_word_embeddings": True, "remat": "full"}),
]


@pytest.mark.parametrize("objective, sizes, model, changes", CASES)
def test_gradients(objective, sizes, model, changes):
    model = dataclasses.replace(model, **changes)
    mine, single = (gradients(mesh, objective, model=model) for mesh in (mesh_of(**sizes), ONE))
    assert_equal(mine, single)


def test_gradients_of_weighted_complementary_pairs_in_micro_batches():
    cfg = dataclasses.replace(CFG, noise=NoiseConfig(complementary=True))
    weights = np.random.default_rng(1).uniform(0.5, 2.0, (ROWS, LENGTH)).astype(np.float32)
    batch = dataclasses.replace(rows(), loss_weights=weights)
    halved = dataclasses.replace(cfg, optimizer=OptimizerConfig(accumulate=2))
    mesh = mesh_of(data=2, fsdp=2, expert=2)
    mine = gradients(mesh, "cap", cfg=halved, model=SHALLOW, batch=batch)
    assert_equal(mine, gradients(ONE, "cap", cfg=cfg, model=SHALLOW, batch=batch))


def test_gradients_of_preferences_and_bounds_of_their_reference():
    cfg = dataclasses.replace(CFG, dpo=DPOConfig(samples=2, antithetic=True))
    draw = functools.partial(np.random.default_rng(1).integers, 0, MASK)
    pairs = [[(2 * i, draw(5), draw(3), 1), (2 * i + 1, draw(2), draw(6), 0)] for i in range(ROWS)]
    batch, reference = make_pairs(pairs), random_params(SHALLOW, 1, 0.3)

    def on(mesh):
        placed = jax.device_put(reference, shardings(reference, mesh))
        small = dataclasses.replace(SHALLOW, expert_buffer=0.25)  # which the bounds do without
        step, context = make_reference_step(small, mesh=mesh), make_context(cfg, 4, MASK, sigma=0.1)
        bounds = np.asarray(step(placed, place_batch(batch, mesh), context))
        referred = dataclasses.replace(batch, reference=bounds)
        return bounds, gradients(mesh, "dpo", cfg=cfg, model=SHALLOW, batch=referred)

    (bounds, mine), (bounds_1, single) = on(mesh_of(fsdp=2, expert=2)), on(ONE)
    np.testing.assert_allclose(bounds, bounds_1, rtol=1e-5, atol=1e-5)
    assert_equal(mine, single)


def test_noise_is_the_same_bit_for_bit():
    def noised(batch):
        block = block_index(batch.positions, 4, "document")
        return corrupt(batch, block, 4, CFG.noise, mask_id=MASK, seed=3)

    single = jax.jit(noised)(rows())
    spread = jax.jit(noised)(place_batch(rows(), mesh_of(data=2, fsdp=2, expert=2)))
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(single), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    assert len(spread[0].tokens.sharding.device_set) == 8


def test_a_step_compiles_once_and_leaves_the_state_where_it_is():
    mesh = mesh_of(fsdp=2, expert=2, model=2)
    step = make_train_step(CFG.of_step, SHALLOW, "ar", mesh)
    state = init_state(CFG.of_step, jax.tree.map(np.asarray, params(SHALLOW)), mesh)
    before = jax.tree.map(lambda x: x.sharding, state)
    for _ in range(3):
        state, _ = step(state, place_batch(rows(), mesh), make_context(CFG, 1, MASK))
    assert step._cache_size() == 1
    assert jax.tree.map(lambda x: x.sharding, state) == before
    moment = state.opt_state[0].mu["moe_layers"]["mlp"]["experts"]["gate_up"][...]
    assert moment.addressable_shards[0].data.shape == (1, 8, 8, 2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_corpus(folder)
    return folder


def run(folder, workdir, **sizes):
    """Trains 4 steps; {step: loss, gradient's norm, checksum of the rows}."""
    made = default_config()
    model = dataclasses.replace(SHALLOW, vocab_size=VOCAB)
    with made.unlocked():
        made.model = {k: v for k, v in model_dict(model).items() if v is not None}
    made.workdir = str(folder / workdir)
    made.data.source, made.data.tokenizer = str(folder / "corpus"), str(folder / "tokenizer")
    made.data.row_length, made.data.rows_per_step = 32, 8
    made.schedule.ar_tokens, made.eval.rows = 4 * 8 * 32, 8
    made.checkpoint.every_tokens = 2 * 8 * 32
    made.runtime.dtype, made.runtime.expert_buffer = "float32", 0.0
    made.log_every = 1
    for axis, size in sizes.items():
        made.mesh[axis] = size
    train(validate(made))
    names = ("loss", "grad_norm", "data_checksum")
    found = {m["step"]: [m[n] for n in names] for m in read_metrics(folder / workdir, "train")}
    return found, [m["bits_per_byte"] for m in read_metrics(folder / workdir, "validation")]


def test_a_run_goes_on_under_another_mesh(folder, capfd):
    whole = run(folder, "whole", fsdp=2, expert=2, model=2)
    assert "moe_layers/mlp/experts/gate_up" in capfd.readouterr().out
    shutil.copytree(folder / "whole", folder / "other")
    shutil.rmtree(folder / "other" / "checkpoints" / "4")
    other = run(folder, "other", data=2, fsdp=-1, expert=1)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)
    assert list(other[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize("form", ["hf", "ours"])
def test_models_are_read_into_the_cut(form, shared_goldens, tmp_path):
    path = shared_goldens / "llada2_tiny"
    load = functools.partial(load_model, mask_id=383)
    if form == "ours":
        whole, path = load(path), tmp_path / "model"
        save_model(path, whole)
    mesh = mesh_of(fsdp=2, expert=2, model=2)
    placed = load(path, mesh=mesh, param_dtype="bfloat16")
    assert jax.tree.map(lambda x: x.sharding, placed.params) == shardings(placed.params, mesh)
    rounded = load(path, param_dtype="bfloat16")
    assert_same_params(placed.params, rounded.params)
    kernel = placed.params["moe_layers"]["mlp"]["experts"]["down"][...]
    shape = np.asarray(kernel.shape) // (1, 2, 2, 2)
    assert kernel.addressable_shards[0].data.shape == tuple(shape)


def test_sizes():
    assert mesh_sizes(MeshConfig(), 8)["fsdp"] == 8
    assert mesh_sizes(MeshConfig(fsdp=2, model=-1), 8)["model"] == 4
    with pytest.raises(ConfigError, match=r"\(data=3, fsdp=-1\) does not make up 8 devices"):
        mesh_sizes(MeshConfig(data=3), 8)


@pytest.mark.parametrize(
    "sizes, problem",
    [
        ({"model": 4}, r"mesh\.model=4 does not divide the model's num_kv_heads=2"),
        ({"expert": 3}, r"mesh\.expert=3 does not divide the model's num_experts=16"),
        ({"data": 8}, r"micro-batches of 4 rows, which do not divide among the 8 groups"),
    ],
)
def test_what_does_not_divide(sizes, problem):
    cfg = dataclasses.replace(CFG, data=DataConfig(row_length=LENGTH, rows_per_step=4))
    with pytest.raises(ConfigError, match=problem):
        check_mesh(cfg, MODEL, mesh_of(**sizes))


def test_nothing_large_is_left_whole():
    """A hidden size of 4098 = 2 x 2049 is not cut by a mesh of fsdp 8, but in half by its first
    axis if that is 2."""
    abstract = build(config(vocab_size=4096, hidden_size=4098))[1]
    whole = mesh_of(fsdp=8)
    with pytest.raises(ConfigError, match=r"embedding \(4096, 4098\) would be whole on every dev"):
        check_cut(placements(abstract, whole), whole)
    for mesh in (mesh_of(data=8), mesh_of(fsdp=2, expert=4)):
        check_cut(placements(abstract, mesh), mesh)
    (found,) = (p for p in placements(abstract, mesh) if p.name == "embedding")
    assert found.bytes_per_device == 4096 * 4098 * 4 // 2
    assert "4096×4098" in format_placements([found]) and "fsdp" in format_placements([found])


def test_moments_on_the_host_change_nothing():
    mesh, context = mesh_of(fsdp=2), make_context(CFG, 1, MASK)
    dense, states = dataclasses.replace(MODEL, num_layers=1), {}
    for offload in (False, True):
        cfg = dataclasses.replace(CFG, optimizer=OptimizerConfig(offload=offload))
        state = init_state(cfg.of_step, jax.tree.map(np.asarray, params(dense)), mesh)
        step = make_train_step(cfg.of_step, dense, "ar", mesh)
        for _ in range(2):
            state, _ = step(state, place_batch(rows(), mesh), context)
        states[offload] = state
    moments = states[True].opt_state[0].nu
    assert {x.sharding.memory_kind for x in jax.tree.leaves(moments)} == {"pinned_host"}
    assert {x.sharding.memory_kind for x in jax.tree.leaves(states[True].params)} == {"device"}
    for a, b in zip(*map(jax.tree.leaves, states.values()), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    emptied = reset_moments(states[True]).opt_state[0].nu
    assert jax.tree.map(lambda x: x.sharding, emptied) == jax.tree.map(
        lambda x: x.sharding, moments
    )
    assert not any(x.any() for x in jax.tree.leaves(jax.device_get(emptied)))
