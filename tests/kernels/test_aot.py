"""The kernels through the TPU compiler; `make aot` compiles more shapes for more chips."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.shapes import ATTENTION, AttentionShape

COMPILER = Path(os.environ.get("TPU_LIBRARY_PATH", aot.LIBTPU))
needs_libtpu = pytest.mark.skipif(
    not COMPILER.is_file(), reason=f"no TPU compiler: `make {aot.LIBTPU}` fetches it"
)


@needs_libtpu
@pytest.mark.parametrize("chip", ["v5e", pytest.param("tpu7x", marks=pytest.mark.slow)])
def test_training_attention_compiles_in_linear_memory(chip):
    program, arguments = aot.training_attention(aot.attend_by_intervals, ATTENTION["mini"], 4096)
    compiled = aot.compile_for(aot.tpu_device(chip), program, *arguments)
    operands = sum(x.size * x.dtype.itemsize for x in arguments)
    assert 0 < compiled.temporaries < 2 * operands, "scores of a head alone are 128 MiB in bf16"


TWELVE = AttentionShape(heads=48, kv_heads=4, head_dim=128)  # heads a group: no power of two


@needs_libtpu
@pytest.mark.parametrize(
    "chip, shape, paged",
    [
        ("v5e", ATTENTION["mini"], True),
        ("v5e", TWELVE, False),
        ("tpu7x", ATTENTION["mini"], False),
    ],
    ids=["v5e-paged", "v5e-twelve", "tpu7x-contiguous"],
)
def test_decode_attention_compiles(chip, shape, paged):
    program, arguments = aot.decoding_attention(shape, 4096, paged=paged)
    compiled = aot.compile_for(aot.tpu_device(chip), program, *arguments)
    assert compiled.temporaries < 16 * 2**20, "the cache is read in place"


@needs_libtpu
def test_what_does_not_fit_is_an_error_of_the_compiler():
    too_large = jax.ShapeDtypeStruct((1 << 18, 1 << 18), jnp.float32)
    with pytest.raises(Exception, match=r"(?i)hbm|memory"):
        aot.compile_for(aot.tpu_device("v5e"), lambda x: x @ x, too_large)


def test_missing_compiler_and_unknown_chip_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'v9'"):
        aot.tpu_device("v9")
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))
    with pytest.raises(FileNotFoundError, match="make"):
        aot.tpu_device("v5e")


def test_a_failure_is_in_the_table_and_in_the_exit_status(monkeypatch, capsys):
    def refuse(device, function, *arguments):
        raise RuntimeError("out of vmem\nand much more")

    monkeypatch.setattr(aot, "tpu_device", lambda chip: None)
    monkeypatch.setattr(aot, "compile_for", refuse)
    command = "--chips v5e --models tiny --lengths 256 --only decode --json"
    assert aot.main(command.split()) == 2
    assert '"RuntimeError: out of vmem"' in capsys.readouterr().out


def test_a_kernel_that_there_is_not_is_no_success(capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--only", "decoding"])
    assert "'decoding' is in the name of no kernel: tpu, forward" in capsys.readouterr().err
