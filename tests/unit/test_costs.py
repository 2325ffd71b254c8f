"""FLOPs, bytes and time against independent counts of them."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llada2_jax.architectures import ARCHITECTURES
from llada2_jax.checkpoint import flatten
from llada2_jax.config import (
    DPOConfig,
    EvalConfig,
    NoiseConfig,
    ReferenceConfig,
    default_config,
    model_dict,
)
from llada2_jax.config_check import validate
from llada2_jax.costs import (
    BOTH_HALVES,
    Workload,
    allowed_pairs,
    copies,
    forward_flops,
    link_bytes,
    roofline,
    validation_bytes,
    working_bytes,
)
from llada2_jax.hardware import slice_named
from llada2_jax.model import build
from llada2_jax.objectives import OBJECTIVES
from llada2_jax.plan import validation_work
from llada2_jax.sharding import AXES, Placement
from llada2_jax.types import LoRAConfig
from pallas_kernels.block_layout import (
    CLEAN,
    NOISY,
    allowed,
    block_index,
    both_halves,
    half_layout,
)
from tests.helpers import TINY, config


def layout_of(objective: str, length: int, block_size: int):
    positions = np.arange(length)[None]
    block = block_index(positions, block_size, "document")
    segment = jnp.ones_like(block)
    if objective == "bdlm":
        return both_halves(block, segment)
    return half_layout(block, segment, NOISY if objective == "mdlm" else CLEAN)


def test_every_objective_is_known_to_see_one_half_or_both():
    assert {*BOTH_HALVES, "ar", "mdlm"} == OBJECTIVES.keys()


@pytest.mark.parametrize("length", [24, 29])
@pytest.mark.parametrize(("objective", "block"), [("ar", 1), ("bdlm", 1), ("bdlm", 8),
                                                  ("bdlm", 24), ("mdlm", 32)])  # fmt: skip
def test_pairs_are_those_of_the_attention_rule(objective, block, length):
    layout = layout_of(objective, length, block)
    assert allowed_pairs(length, block, objective) == int(allowed(layout, layout).sum())


@pytest.mark.parametrize("objective", ["ar", "mdlm", "bdlm"])
def test_matmuls_are_those_of_the_weights(objective):
    """With every expert chosen, a position meets every matrix once, and the head once a token."""
    model = config(experts_per_token=4, topk_group=2)
    sizes = {name: math.prod(leaf.shape) for name, leaf in flatten(build(model)[1]).items()}
    matrices = {n: s for n, s in sizes.items() if "norm" not in n and "expert_bias" not in n}
    head = sum(size for name, size in matrices.items() if "head" in name)
    inside = sum(size for name, size in matrices.items() if "layers" in name)
    flops = forward_flops(model, objective, 32, 8)
    halves = 2 if objective == "bdlm" else 1
    pairs = flops.pop("attention pairs")
    assert sum(flops.values()) == 2 * (halves * inside + head)
    per_token = allowed_pairs(32, 8, objective) / 32
    assert pairs == model.num_layers * 4 * model.num_heads * model.head_dim * per_token


@pytest.mark.parametrize(("name", "attention", "head"), [("mini", 0.15, 0.14),
                                                         ("flash", 0.095, None)])  # fmt: skip
def test_shares_of_the_released_models(name, attention, head):
    """As counted by hand for rows of 4096 without documents."""
    flops = forward_flops(ARCHITECTURES[name], "bdlm", 4096, 32)
    total = sum(flops.values())
    assert flops["attention pairs"] / total == pytest.approx(attention, abs=0.005)
    assert head is None or flops["head"] / total == pytest.approx(head, abs=0.005)


def workload(
    sizes=None, accumulate=1, remat="full", objective="bdlm", rows=16, model=None, **changes
) -> Workload:
    cfg = default_config()
    cfg.workdir = "unused"
    with cfg.unlocked():
        cfg.model = {k: v for k, v in model_dict(TINY).items() if v is not None}
    cfg.schedule.decay_blocks, cfg.schedule.decay_tokens = (8,), 10**6
    cfg.data.row_length, cfg.data.rows_per_step = 32, rows
    cfg.optimizer.accumulate, cfg.runtime.remat = accumulate, remat
    checked = dataclasses.replace(validate(cfg), **changes)
    model = config(**{"dtype": "bfloat16", "remat": remat} | (model or {}))
    return Workload(checked, model, dict.fromkeys(AXES, 1) | (sizes or {}), objective, 8)


def test_complementary_pairs_and_draws_are_rows_of_the_forward():
    pairs = NoiseConfig(complementary=True)
    draws = {"dpo": DPOConfig(samples=3), "reference": ReferenceConfig(cache="bounds.npz")}
    one = workload()
    for objective, changes, rows in (
        ("bdlm", {"noise": pairs}, 2),
        ("cap", {"noise": pairs}, 2),
        ("cap", {}, 1),
        ("dpo", draws, 3),
        ("dpo", {"noise": pairs, **draws}, 6),
    ):
        several = workload(objective=objective, **changes)
        assert several.positions == rows * one.positions
        assert several.flops_per_token == rows * one.flops_per_token
    assert workload(objective="ar", noise=pairs).positions == workload(objective="ar").positions
    with pytest.raises(ValueError, match="'sft'"):
        allowed_pairs(8, 4, "sft")


def test_a_reference_runs_forward():
    work = workload(objective="dpo")
    forward = sum(work.forward.values())
    assert work.flops["reference"] == forward and work.flops_per_token == 4 * forward
    kept = workload(objective="dpo", remat="none")
    assert kept.executed_flops_per_token == kept.flops_per_token


def test_weights_under_adapters_have_no_gradient():
    adapters = {"lora": LoRAConfig(rank=2)}
    whole, adapted = workload(), workload(model=adapters)
    assert adapted.flops["head"] == whole.flops["head"] * 2 / 3
    assert adapted.flops["attention pairs"] == whole.flops["attention pairs"]
    sizes = {"fsdp": 4, "data": 2}
    frozen = placed("head", (16, 64), ("fsdp",), None, sizes=sizes)
    work = workload(sizes, model=adapters)
    received, learned = link_bytes(work, [frozen], []), link_bytes(work, [frozen])
    assert received["fsdp"] == learned["fsdp"] * 2 / 3 and received["data"] == 0 < learned["data"]
    assert working_bytes(work, [frozen], [])["gradients"] == 0


def placed(name: str, shape: tuple[int, ...], *spec, sizes) -> Placement:
    whole = Placement(name, shape, PartitionSpec(*spec), 4 * math.prod(shape))
    ways = math.prod(sizes.get(axis, 1) for entry in whole.cuts for axis in entry)
    return dataclasses.replace(whole, bytes_per_device=whole.bytes_per_device // ways)


def test_bytes_on_links_of_one_matrix():
    sizes = {"fsdp": 4, "data": 2}
    params = [placed("head", (16, 64), ("fsdp", "context", "expert"), None, sizes=sizes)]
    received = link_bytes(workload(sizes), params)
    # Two gathers and a scatter of bf16, of which a device has a quarter; then half of a ring twice.
    assert received["fsdp"] == 3 * (16 * 64 * 2) * 3 / 4
    assert received["data"] == 2 * (16 * 64 * 2) / 2
    assert received["expert"] == received["model"] == received["context"] == 0
    halved = link_bytes(workload(sizes, accumulate=2), params)
    assert halved["fsdp"] == 2 * received["fsdp"]  # weights move for each micro-batch
    assert link_bytes(workload(sizes, remat="none"), params)["fsdp"] == received["fsdp"] * 2 / 3


def test_bytes_on_links_of_experts():
    """Experts stay where they are: tokens come to them; what else is cut along them is gathered."""
    sizes = {"expert": 4}
    own = placed("moe_layers/mlp/experts/down", (1, 4, 8, 16), None, ("expert",), None,
                 ("fsdp", "context"), sizes=sizes)  # fmt: skip
    work = workload(sizes)
    tokens = 16 * 32 * 2 / 4
    assert work.positions == tokens
    assert link_bytes(work, [own])["expert"] == 5 * 1 * tokens * 16 * 2 * 3
    shared = placed("moe_layers/mlp/shared/down", (1, 8, 16), None, None, ("expert",), sizes=sizes)
    more = link_bytes(work, [own, shared])["expert"] - link_bytes(work, [own])["expert"]
    assert more == 3 * (8 * 16 * 2) * 3 / 4


def test_bytes_on_links_of_experts_that_pairs_are_sent_to():
    """Two choices a token, three of four go elsewhere; there and back, again for the weights, and
    both ways in the backward pass."""
    work = workload({"expert": 4}, model={"expert_exchange": "ragged"})
    pairs = work.positions * 2 * 3 / 4
    assert link_bytes(work, [])["expert"] == 6 * pairs * 16 * 2


def test_stages_compute_for_nothing_at_first_and_last():
    """Three layers in two stages of two, four rows a device: of nine ticks each takes eight."""
    layers = {"num_layers": 4}
    alone, staged = (workload({"fsdp": 2, axis: 2}, model=layers) for axis in ("data", "stage"))
    assert alone.stretch == 1 and staged.rows == 4 and staged.ticks == 9
    asked, done = 3 * 8, 2 * 2 * 9
    assert staged.stretch == done / asked
    parts = staged.forward
    attention = parts["attention projections"] + parts["attention pairs"]
    inside = parts["routed experts"] + parts["shared experts"] + parts["router"] + attention * 3 / 4
    wasted = staged.executed_flops_per_token - alone.executed_flops_per_token
    assert wasted == pytest.approx(4 * inside * (done / asked - 1))  # recomputed, too
    assert staged.flops_per_token == alone.flops_per_token


def test_bytes_on_links_of_stages():
    layers, sizes = {"num_layers": 4}, {"fsdp": 2, "stage": 2}
    work = workload(sizes, model=layers)
    own = placed("moe_layers/x", (3, 8, 16), None, ("fsdp", "stage"), sizes=sizes)
    received, empty = link_bytes(work, [own]), link_bytes(work, [])
    # Half of each of its two layers, once, and in the backward pass twice at each of nine ticks.
    assert received["fsdp"] == (1 + 2 * 9) * 2 * (8 * 16 * 2) / 2
    # Half of it, with a layer of zeros, comes from the other stage; gradients go back.
    stored = own.bytes_per_device * 4 / 3
    assert received["stage"] - empty["stage"] == 2 * stored / 2
    row = 2 * 32 * 16 * 2
    assert empty["stage"] == 2 * (2 * 4 * row + 9 * row)  # the other's rows, and one a tick
    outside = placed("head", (8, 16), ("fsdp", "stage"), sizes=sizes)
    assert link_bytes(work, [outside])["stage"] - empty["stage"] == 3 * (8 * 16 * 2) / 2
    whole = working_bytes(work, [own])
    layers_whole = 2 * (8 * 16 * 2)
    assert whole["pipeline"] == layers_whole + 2 * 4 * row + 9 * row
    assert whole["layer inputs"] == (1 + 2 * 9 / 4) * 4 * row
    assert "pipeline" not in working_bytes(workload({"fsdp": 4}, model=layers), [own])
    one_row = working_bytes(workload({"fsdp": 2, "expert": 2, "data": 4}, model=layers), [])
    part = working_bytes(workload({"stage": 2, "expert": 2}, model=layers), [])
    assert part["a layer at work"] == one_row["a layer at work"]


def test_stages_read_their_weights_for_each_row():
    own = placed("moe_layers/x", (3, 8, 16), None, None, sizes={})
    work, alone = (
        workload({"fsdp": 2, axis: 2}, model={"num_layers": 4}) for axis in ("stage", "data")
    )
    read, once = (roofline(w, [own], 0.0, slice_named("v5p-8")).memory for w in (work, alone))
    assert read == pytest.approx(once * 2 * 9 / 3)  # two of three layers in nine ticks


def test_a_reference_has_stages_too():
    layers = {"num_layers": 4}
    plain, dpo = (workload({"stage": 2}, objective=o, model=layers) for o in ("bdlm", "dpo"))
    plain = dataclasses.replace(plain, cfg=dpo.cfg)
    parts, waste = dpo.forward, dpo.stretch - 1
    attention = parts["attention projections"] + parts["attention pairs"]
    inside = parts["routed experts"] + parts["shared experts"] + parts["router"] + attention * 3 / 4
    more = copies(dpo.cfg, "dpo") * plain.executed_flops_per_token
    reference = sum(parts.values()) + waste * inside
    assert dpo.executed_flops_per_token == pytest.approx(more + reference)


def test_a_model_without_experts_has_no_layers_to_stage():
    dense = workload({"stage": 2}, model={"num_layers": 1})
    assert dense.model.num_moe_layers == 0 and dense.executed_flops_per_token > 0


def test_validation_has_room_for_all_pairs():
    tight = workload({"expert": 4}, model={"expert_buffer": 1.0})
    work = validation_work(tight)
    alike = validation_bytes(work, [])
    assert alike > working_bytes(tight, [])["a layer at work"]
    assert work.positions == tight.positions
    rows = tokens = 4 * tight.positions  # all four devices' tokens, once: it has one expert
    experts = rows * (2 * 16 + 4 * 8) * 2 + tokens * 16 * (2 + 4)
    assert alike == experts + 2 * tight.positions * 16 * 2
    staged = validation_work(workload({"stage": 2}))
    assert validation_bytes(staged, []) > staged.positions * 16 * 2 * (2 + 2)  # its group's rows


def test_validation_is_of_its_own_kind():
    pairs = {"noise": NoiseConfig(complementary=True)}
    assert validation_work(workload(**pairs)).rows == workload().rows
    assert validation_work(workload(objective="cap", **pairs)).objective == "bdlm"
    target = {"eval": EvalConfig(target_block_size=4)}
    work = validation_work(workload(objective="mdlm", **target))
    assert (work.objective, work.block_size, work.positions) == ("bdlm", 4, workload().positions)
    draws = {"dpo": DPOConfig(samples=2), "eval": EvalConfig(samples=5)}
    dpo = workload(objective="dpo", **pairs, **draws)
    assert validation_work(dpo).rows == 5 * 2 * workload().rows


def test_activations_do_not_depend_on_how_rows_are_cut_when_nothing_is():
    assert all(size == 0 for size in link_bytes(workload(), []).values())


def test_roofline():
    chip = slice_named("v5p-32")
    work = workload({"fsdp": 16})
    params = [placed("head", (16, 64), ("fsdp",), None, sizes={"fsdp": 16})]
    roof = roofline(work, params, 1e9, chip)
    assert roof.tokens == 16 * 32
    assert roof.compute == 16 * 32 * work.executed_flops_per_token / (16 * 459e12)
    assert roof.memory == pytest.approx((3 * 16 * 64 * 2 + 2e9) / 2765e9)
    assert roof.links == {"fsdp": link_bytes(work, params)["fsdp"] / 600e9}
    assert roof.best == roof.memory and roof.in_turn == roof.memory + sum(roof.links.values())
    ideal = dataclasses.replace(roof, memory=0.0, links={})
    assert 3 / 4 < ideal.mfu(ideal.best) < 1, "layers run forward twice, the head once"
    kept = workload({"fsdp": 16}, remat="none")
    assert kept.executed_flops_per_token == pytest.approx(kept.flops_per_token)


def test_links_between_machines_of_gpus_are_slower():
    """Experts are within a machine of 8, fsdp is between two."""
    params = [placed("head", (16, 64), ("fsdp",), None, sizes={"fsdp": 2})]
    work = workload({"fsdp": 2, "expert": 8})
    received = link_bytes(work, params)
    links = roofline(work, params, 0.0, slice_named("h100-80gb-16")).links
    assert links == {"expert": received["expert"] / 450e9, "fsdp": received["fsdp"] / 50e9}


def test_several_micro_batches_sum_gradients_in_fp32():
    params = [placed("head", (16, 64), None, None, sizes={})]
    one, several = (working_bytes(workload(accumulate=n), params)["gradients"] for n in (1, 2))
    assert (one, several) == (4 * 1024, 8 * 1024)
