"""`llada2 plan` through its command, and what libtpu says of a small model."""

import dataclasses
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from llada2_jax import cli, plan
from llada2_jax.architectures import ARCHITECTURES
from llada2_jax.config import ConfigError, default_config
from llada2_jax.config_check import validate
from llada2_jax.device_memory import Memory, compiled_bytes
from llada2_jax.hardware import CHIPS, GIB, slice_named, slices_of
from llada2_jax.model import build
from llada2_jax.sharding import AXES, RULES, format_placements, placements
from pallas_kernels.aot import LIBTPU, tpu_device

# ml_collections reads config files with it.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)

ROOT = Path(__file__).parents[2]
COMPILER = Path(os.environ.get("TPU_LIBRARY_PATH", LIBTPU))
needs_libtpu = pytest.mark.skipif(
    not COMPILER.is_file(), reason=f"no TPU compiler: `make {LIBTPU}` fetches it"
)
GOLDEN = json.loads((ROOT / "tests/goldens/plan.json").read_text())

SMALL = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_layers": 2,
    "first_k_dense_replace": 0,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 128,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "experts_per_token": 4,
    "n_group": 4,
    "topk_group": 2,
}


def small_run(rows=4, **mesh):
    config = default_config()
    config.workdir = "unused"
    with config.unlocked():
        config.model = SMALL
    config.data.row_length, config.data.rows_per_step = 256, rows
    config.schedule.warmup_blocks, config.schedule.warmup_tokens = (32,), 10**6
    config.schedule.stable_tokens = 10**7
    config.runtime.remat = "full"
    config.mesh.update(mesh)
    return validate(config)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *argv])
    return status, *capsys.readouterr()


def recipe(capsys, row, *flags: str) -> tuple[int, dict]:
    """Status and record of a row of the golden table."""
    config = f"--config={ROOT}/configs/cpt_{row['model']}.py"
    status, out, _ = run(capsys, config, f"--slice={row['slice']}", "--json", *row["flags"], *flags)
    return status, json.loads(out)


def named(row) -> str:
    return f"{row['model']} {row['slice']}"


@pytest.mark.parametrize("row", GOLDEN, ids=named)
def test_state_of_the_released_models_is_cut_as_it_was(capsys, row):
    """Bytes of a device and the mesh, of every slice in docs/plan.md."""
    status, record = recipe(capsys, row, "--nocompile")
    assert record["memory_from"] == "computed" and status in (0, 3)
    assert record["mesh"] == row["mesh"]
    found = {name: record["bytes"][name] for name in ("parameters", "moments")}
    assert found == {name: row["bytes"][name] for name in found}
    assert record["model_flops_per_token"]["all"] == pytest.approx(row["flops_per_token"])


LORA, OFFLOAD = "--config.lora.rank=16", "--config.optimizer.offload=true"


@pytest.mark.parametrize(
    ("stage", "flags", "kinds", "gib", "fits"),
    [
        ("sft", [], {"parameters", "moments"}, 160, False),
        ("sft", [LORA], {"parameters", "moments"}, 31, True),
        (
            "dpo",
            ["--config.optimizer.offload=true"],
            {"parameters", "moments", "reference"},
            61,
            False,
        ),
        ("dpo", [LORA], {"parameters", "moments"}, 31, True),
    ],
)
def test_post_training_of_mini_on_one_gpu(capsys, stage, flags, kinds, gib, fits):
    """Adapters fit, all parameters do not; a reference of its own takes its parameters' room."""
    argv = [f"--config={ROOT}/configs/{stage}.py:mini", "--slice=h100-80gb-1", "--nocompile"]
    status, out, _ = run(capsys, *argv, "--json", *flags)
    record = json.loads(out)
    held = {kind: record["bytes"][kind] for kind in record["bytes"].keys() & kinds}
    assert held.keys() == kinds and ("reference" in record["bytes"]) == ("reference" in kinds)
    assert sum(held.values()) / GIB == pytest.approx(gib, abs=10) and record["fits"] == fits
    assert status == (0 if fits else 3)


def test_adapters_on_a_module_that_the_model_lacks(capsys):
    argv = [f"--config={ROOT}/configs/sft.py:mini", "--slice=h100-80gb-1", "--nocompile", LORA]
    status, _, error = run(capsys, *argv, '--config.lora.modules=("attenton",)')
    assert status == 1 and "no module 'attenton'; choose from attention" in error


def test_a_table_for_people(capsys):
    config = f"--config={ROOT}/configs/cpt_mini.py"
    status, out, _ = run(capsys, config, "--slice=h100-80gb-16", "--nocompile")
    out = " ".join(out.split())  # lines are as long as the terminal is wide
    assert status == 0 and "computed, not compiled" in out and "fits" in out
    assert "layer inputs" in out and "MFU" in out and "Assumed: " in out
    assert "--config.mesh.expert=" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--slice=v5p-12"], "There are v5p-8"),
        ([], "--slice is missing"),
        (["--slice=v5p-32", "--phase=warm"], r"phases are warmup-1, warmup-4"),
        (["--slice=v5p-32", "--config.mesh.expert=7"], "does not make up 16 devices"),
        (["--slice=v5p-32", "--config.init.architecture=large"], "choose one of"),
        (["--slice=v5p-32", "--config.init.architecture="], "is not there to tell"),
    ],
)
def test_mistakes_are_named(capsys, argv, message):
    config = f"--config={ROOT}/configs/cpt_mini.py"
    status, out, error = run(capsys, config, "--nocompile", *argv)
    assert status in (1, 2) and not out
    assert re.search(message, error)


def test_a_missing_compiler_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    config = f"--config={ROOT}/configs/cpt_mini.py"
    status, _, error = run(capsys, config, "--slice=v5litepod-16")
    assert status == 1 and "make .cache/libtpu/libtpu/libtpu.so" in error


def test_the_phase_with_both_halves_takes_most():
    cfg = small_run()
    assert plan.planned_phase(cfg).name == "warmup-32"
    assert plan.planned_phase(cfg, "stable-256").objective == "mdlm"


def test_rows_are_cut_into_micro_batches_of_one_a_group():
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": 2}
    cfg = small_run(rows=8)
    model = plan.planned_model(cfg)
    assert plan.on_mesh(cfg, model, sizes).optimizer.accumulate == 4
    chosen = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, accumulate=2))
    assert plan.on_mesh(chosen, model, sizes).optimizer.accumulate == 2
    with pytest.raises(ConfigError, match="rows_per_step"):
        plan.on_mesh(cfg, model, sizes | {"fsdp": 16})


def test_meshes_make_up_the_devices():
    cfg = small_run(rows=16)
    found = list(plan.meshes(cfg, plan.planned_model(cfg), 8))
    assert all(math.prod(sizes.values()) == 8 for sizes in found)
    assert {sizes["expert"] for sizes in found} == {1, 2, 4, 8}
    assert {sizes["model"] for sizes in found} == {1, 2}, "there are two key heads"
    assert {sizes["context"] for sizes in found} == {1}, "rows are short"
    assert {sizes["stage"] for sizes in found} == {1, 2}, "there are two layers of experts"


def test_the_search_tries_the_mesh_that_needs_least_memory():
    found = [SimpleNamespace(memory=SimpleNamespace(needed=n)) for n in (5, 4, 3, 1, 2)]
    assert [p.memory.needed for p in plan._candidates(found)] == [5, 4, 1]
    assert plan._candidates(found[:2]) == found[:2]


def test_a_mesh_of_the_table_that_rows_do_not_divide_among_gives_way(monkeypatch):
    cfg, slice_ = small_run(rows=4), slice_named("v6e-8")
    monkeypatch.setitem(plan.MESHES, (cfg.init.architecture, slice_.name), {"fsdp": 8})
    found = plan.plan_run(cfg, slice_, compiled=False)
    assert math.prod(found.work.sizes[axis] for axis in RULES["batch"]) <= 4
    many = plan.plan_run(small_run(rows=8), slice_, compiled=False)
    assert many.work.sizes["fsdp"] == 8


@pytest.mark.parametrize(("model", "slice_name"), [("mini", "v6e-8"), ("flash", "v5p-128")])
def test_parameters_of_the_released_models_are_cut_as_they_were(model, slice_name):
    sizes = dict.fromkeys(AXES, 1) | plan.MESHES[model, slice_name]
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    found = placements(build(ARCHITECTURES[model])[1], mesh)
    golden = ROOT / f"tests/goldens/sharding/{model}-{slice_name}.txt"
    assert format_placements(found) == golden.read_text().rstrip("\n")


def test_search_goes_up_until_something_fits():
    """On a chip whose memory is so small that the small model needs several."""
    chip = dataclasses.replace(CHIPS["v6e"], usable_bytes=24 * 2**20)
    slices = [dataclasses.replace(s, chip=chip) for s in slices_of(CHIPS["v6e"])]
    found = list(plan.search(small_run(rows=64), slices, compiled=False))
    assert [p.memory.fits for p in found] == [False] * (len(found) - 1) + [True]
    chips = [p.slice.chips for p in found]
    assert chips == sorted(chips) and 1 < chips[-1] < 64
    # The next smaller slice cannot: not with any mesh.
    smaller = next(s for s in reversed(slices) if s.chips < chips[-1])
    best = plan.plan_run(small_run(rows=64), smaller, compiled=False)
    assert not best.memory.fits


def test_a_search_that_finds_nothing_says_why(capsys):
    argv = ["--search", "--slice=v5litepod-16", "--nocompile", "--config.data.rows_per_step=7"]
    status, out, error = run(capsys, f"--config={ROOT}/configs/cpt_mini.py", *argv)
    assert status == 1 and not out
    assert "none of" in error and "rows_per_step=7 does not divide" in error


@needs_libtpu
def test_a_step_compiles_for_a_slice():
    """The compiler's arguments are the state; what it adds is of the computed order."""
    found = plan.plan_run(small_run(fsdp=2, expert=2), slice_named("v5litepod-4"))
    computed = plan.plan_run(
        small_run(fsdp=2, expert=2), slice_named("v5litepod-4"), compiled=False
    )
    assert found.memory.compiled and found.memory.fits
    assert found.memory.state == computed.memory.state
    assert 0 < found.memory.temporaries < 10 * computed.memory.temporaries
    # Validation holds the moments, too, while it runs.
    held = sum(found.memory.state.values())
    assert 0 < found.memory.validation - held < 2 * (computed.memory.validation - held)


def test_what_validation_needs_must_fit_too():
    enough = Memory({"parameters": 2.0}, 3.0, {}, limit=6.0, validation=6.0)
    assert enough.fits
    assert not dataclasses.replace(enough, validation=6.5).fits
    assert not dataclasses.replace(enough, temporaries=4.5).fits
    compiled = enough.compiled_to(needed=5.0, held=2.0, seconds=1.0, validation=7.0)
    assert compiled.record()["bytes"]["validation_peak"] == 7.0 and not compiled.fits


@needs_libtpu
def test_what_does_not_fit_says_how_much_it_needs():
    """32 GiB into 32 GiB, on a chip of 16."""
    sharding = jax.sharding.SingleDeviceSharding(tpu_device("v5e"))
    x = jax.ShapeDtypeStruct((2**16, 2**17), jnp.float32, sharding=sharding)
    needed = compiled_bytes(jax.jit(lambda x: x * 2).lower(x))
    assert 64 * GIB <= needed < 65 * GIB


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("row", [row for row in GOLDEN if "compiled" in row], ids=named)
def test_a_recipe_takes_no_more_memory_than_it_did(capsys, row):
    """The true step of the released models, by libtpu; `docs/plan_table.py` renews the figures."""
    status, record = recipe(capsys, row)
    assert status == 0 and record["memory_from"] == "libtpu"
    for name in ("peak", "validation_peak"):
        assert record["bytes"][name] < 1.02 * row["compiled"][name]
