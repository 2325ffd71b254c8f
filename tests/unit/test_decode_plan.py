"""`llada2 plan --decode` through its command, and what libtpu says of a small model."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import jax
import pytest

from llada2_jax import cli, decode_plan, sampler
from llada2_jax.architectures import ARCHITECTURES
from llada2_jax.decode_plan import Pass, Requests, plan_decoding
from llada2_jax.hardware import GIB, slice_named
from llada2_jax.sampler import SamplerOptions
from llada2_jax.types import SpecialTokens
from tests.helpers import TINY
from tests.unit.test_plan import needs_libtpu

# ml_collections reads config files with it.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)

CONFIG = Path(__file__).parents[2] / "configs/cpt_mini.py"
MINI = ARCHITECTURES["mini"]
REQUESTS = Requests(rows=8, prompt=4096, new=1024)


def run(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(["plan", f"--config={CONFIG}", *argv])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("model", "slice_", "status"),
    [("mini", "h100-80gb-8", 0), ("mini", "v6e-1", 3), ("flash", "h200-141gb-8", 3)],
)
def test_a_batch_on_each_device(capsys, model, slice_, status):
    """The released models' parameters in bf16, and room for 160 blocks of 32, which is 192."""
    flags = (f"--slice={slice_}", "--decode=8,4096,1024", "--nocompile", "--json")
    found, out, _ = run(capsys, f"--config.init.architecture={model}", *flags)
    record = json.loads(out)
    assert found == status and record["fits"] == (status == 0)
    cfg = ARCHITECTURES[model]
    assert record["bytes"]["parameters"] / 2e9 == pytest.approx(
        {"mini": 16.3, "flash": 102.9}[model], rel=0.01
    )
    token = 2 * 2 * cfg.num_layers * cfg.num_kv_heads * cfg.head_dim
    assert record["bytes"]["keys and values"] == 8 * 192 * 32 * token
    assert record["devices"] == slice_named(slice_).devices
    assert [*record["tokens_per_second"]] == ["1", "2", "4", "8"]


def test_a_table_for_people(capsys):
    status, out, _ = run(capsys, "--slice=h100-80gb-1", "--decode=1,0,512,4", "--nocompile")
    out = " ".join(out.split())
    assert status == 0 and "computed, not compiled" in out and "fits" in out
    assert "0 tokens, 512 to generate in blocks of 4" in out and "Assumed: " in out


@pytest.mark.parametrize("text", ["8", "8,x,1", "0,1,1", "8,-1,1", "8,1,0", "1,1,1,0", "1,1,1,1,1"])
def test_a_batch_that_is_none_is_refused(capsys, text):
    status, out, error = run(capsys, "--slice=v5p-8", f"--decode={text}")
    assert status == 2 and not out and f"--decode={text}: write ROWS,PROMPT,NEW" in error


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--slice=v5p-8", "--decode=1,16384,1"], 1, "max_position_embeddings=16384"),
        (["--slice=v5p-8", "--decode=1,1,1", "--search"], 2, "leave it out with --decode"),
        (["--decode=1,1,1"], 2, "--slice is missing"),
    ],
)
def test_mistakes_are_named(capsys, flags, status, message):
    found, out, error = run(capsys, *flags)
    assert found == status and not out and message in error


def test_a_pass_is_limited_by_memory_or_by_matmuls():
    """Of one position a few experts are read; of a prefill all, and its matmuls take longer."""
    slice_ = slice_named("h100-80gb-1")
    one = plan_decoding(MINI, Requests(1, 0, 32, block_size=1), slice_, compiled=False)
    many = plan_decoding(MINI, REQUESTS, slice_, compiled=False)
    rest = one.memory.state["parameters"] - 28.5 * GIB  # without experts, as read below
    table = MINI.vocab_size * MINI.hidden_size * 2
    keys = 16 * 2 * 2 * MINI.num_layers * MINI.num_kv_heads * MINI.head_dim
    assert one.forward.traffic == pytest.approx(28.5 * GIB * 8 / 256 + rest - table + keys)
    assert many.forward.seconds(slice_) == many.forward.traffic / slice_.chip.hbm_bandwidth
    assert many.prefill.seconds(slice_) == many.prefill.flops / slice_.chip.flops
    # Mini has 1.43B active parameters, as its authors count; a lookup multiplies nothing.
    pairs = 2 * MINI.num_layers * 16 * 128  # multiply-adds a key
    active = many.forward.flops / (2 * 8 * 32) - pairs * (4096 + 512)
    assert active == pytest.approx(1.43e9 - table / 2, rel=0.01)
    without_head = many.prefill.flops / (2 * 8 * 4096) - pairs * 2048
    assert without_head == pytest.approx(active - table / 2)
    assert one.prefill == Pass(0.0, 0.0)


def test_forwards_of_a_row():
    """The last block is not committed; blocks are counted from the row's beginning."""
    assert Requests(1, 4096, 32).forwards(8) == 4
    assert Requests(1, 4096, 1024).forwards(4) == 256 + 31
    assert Requests(1, 100, 32).forwards(8) == 4 + 1
    assert Requests(1, 31, 2).forwards(8) == 2 + 1  # a forward a block at least


def test_speed_grows_with_tokens_a_forward_and_with_devices():
    one, eight = (
        plan_decoding(MINI, REQUESTS, slice_named(f"h100-80gb-{n}"), compiled=False) for n in (1, 8)
    )
    assert eight.speeds == {n: pytest.approx(8 * speed) for n, speed in one.speeds.items()}
    prefill, forward = one.prefill.seconds(one.slice), one.forward.seconds(one.slice)
    assert one.speeds[4] == pytest.approx(8 * 1024 / (prefill + (256 + 31) * forward))
    assert list(one.speeds.values()) == sorted(one.speeds.values())
    small = dataclasses.replace(REQUESTS, block_size=2)
    assert [*plan_decoding(MINI, small, one.slice, compiled=False).speeds] == [1, 2]


def test_the_shapes_are_those_of_a_generation():
    options = SamplerOptions(max_new_tokens=4, block_size=2)
    special, prompts = SpecialTokens(mask=0, eos=0, pad=0), [[2, 3, 4]] * 2
    plan, *real = sampler._start(TINY, prompts, special, options, range(2))
    abstract_plan, *abstract = sampler.abstract_generation(TINY, 2, 3, options)
    assert abstract_plan == plan and abstract[-1].tokens.shape == (2, 8)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(real)
    ]


@needs_libtpu
def test_the_program_compiles_for_a_slice(monkeypatch):
    lower = mock.Mock(wraps=decode_plan.lower_generation)
    monkeypatch.setattr(decode_plan, "lower_generation", lower)
    cfg = dataclasses.replace(TINY, head_dim=128, hidden_size=256, vocab_size=512)
    found, computed = (
        plan_decoding(cfg, Requests(4, 200, 64), slice_named("v5litepod-4"), compiled=c)
        for c in (True, False)
    )
    model = lower.call_args.args[0]  # "auto" is not what it is on this machine
    assert (model.attention_backend, model.experts_backend) == ("tpu", "ragged_dot")
    assert found.memory.compiled and found.memory.fits and found.memory.seconds > 0
    assert found.memory.state == computed.memory.state
    assert 0 < found.memory.temporaries < 30 * computed.memory.temporaries
