"""The benchmarks as commands, at toy size."""

import json

import numpy as np
import pytest

from pallas_kernels import aot
from pallas_kernels.bench import contenders, memory, pairs, timing
from pallas_kernels.bench.__main__ import main
from pallas_kernels.block_layout import allowed
from pallas_kernels.shapes import ATTENTION


def records(capsys, command: str) -> list[dict]:
    main([*command.split(), "--json"])
    return json.loads(capsys.readouterr().out)


def test_pairs_reach_the_targets():
    """What the issue of the kernels asks for, at the tiles that ship, for mini's heads."""
    measured = pairs.measure([4096], [32], list(pairs.TARGETS), anchor="document", rows=8)
    for record in measured:
        for backend in ("tpu", "mosaic", "triton"):
            least, most = min(record[backend]), max(record[backend])
            assert 1 <= least <= most <= pairs.TARGETS[record["documents"]], record


def test_pairs_of_dense_backends_are_known_exactly(capsys):
    (record,) = records(capsys, "pairs --lengths 512 --blocks 64 --documents none --rows 2")
    n, size = 512, 64
    ideal = n * size + (n * n - n * size) / 2 + (n * n + n * size) / 2
    assert record["dense bias"] == pytest.approx([4 * n * n / ideal] * 2, abs=1e-3)
    assert record["xla"] == pytest.approx([3 * n * n / ideal] * 2, abs=1e-3)
    assert all(min(record[name]) >= 1 for name in pairs.SCHEDULES)


def test_a_table_for_people(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = "pairs --lengths 512 --blocks 64 --documents none 64 --rows 2"
    main(command.split())
    printed = capsys.readouterr().out
    assert "documents" in printed and "jax splash" in printed and "To reach" in printed


def test_memory_reports_growth_where_there_is_something_to_grow(monkeypatch):
    def compile_for(device, function, q, *_):
        size = q.shape[1] ** 2 if q.shape[1] > 1024 else 0  # all in VMEM
        return aot.Compiled(seconds=1.0, temporaries=size)

    monkeypatch.setattr(memory, "tpu_device", lambda chip: None)
    monkeypatch.setattr(memory, "compile_for", compile_for)
    records = memory.measure("v5e", "tiny", [4096, 512, 1024], ["tpu", "xla"])
    assert [r["L"] for r in records] == [512, 1024, 4096] * 2
    assert [r.get("growth") for r in records] == [None, None, pytest.approx(2)] * 2


def test_time_compares_and_survives_a_contender_that_fails(capsys, monkeypatch):
    def broken(case):
        raise NotImplementedError("no such chip")

    monkeypatch.setitem(contenders.CONTENDERS["cpu"], "broken", broken)
    command = "time --length 32 --rows 1 --block 4 --documents 16 --repeats 2"
    xla, reference, failed = records(capsys, command)
    assert xla["fwd x"] == xla["fwd+bwd x"] == 1.0
    assert reference["fwd+bwd ms"] == pytest.approx(
        reference["fwd+bwd x"] * xla["fwd+bwd ms"], rel=0.05, abs=0.01
    )
    assert 0 <= reference["differs by"] < 0.05
    assert failed["error"] == "NotImplementedError: no such chip"


def test_without_the_first_contender_there_is_nothing_to_compare_with(capsys, monkeypatch):
    def broken(case):
        raise NotImplementedError("no such chip")

    monkeypatch.setitem(contenders.CONTENDERS["cpu"], "xla", broken)
    command = "time --length 32 --rows 1 --block 4 --documents none --repeats 1"
    failed, reference = records(capsys, command)
    assert "error" in failed and reference["fwd ms"] > 0
    assert not {"fwd x", "fwd+bwd x", "differs by"} & {*failed, *reference}


def test_a_wrong_contender_shows(capsys, monkeypatch):
    wrong = contenders._backend("xla")

    def double(case):
        calls = wrong(case)
        return contenders.Calls(lambda: 2 * calls.forward(), calls.both)

    monkeypatch.setitem(contenders.CONTENDERS["cpu"], "wrong", double)
    command = "time --length 32 --rows 1 --block 4 --documents none --repeats 1 --only xla wrong"
    assert records(capsys, command)[1]["differs by"] > 0.1


def test_a_contender_that_there_is_not_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["time", "--only", "xla", "nope"])
    assert "--only: no contender 'nope' here: choose from ['xla'" in capsys.readouterr().err


def test_flops_are_those_of_allowed_pairs(monkeypatch):
    monkeypatch.setattr(timing, "_median_seconds", lambda *_: 1e-12)
    case = contenders.Case(ATTENTION["tiny"], 1, 32, 4, "none")
    build = contenders.CONTENDERS["cpu"]["xla"]
    (record,) = timing._compare(case, {"xla": build}, repeats=1, peak=None)
    mask = np.asarray(allowed(case.layout, case.layout))
    matmul = 2 * int(mask.sum()) * ATTENTION["tiny"].heads * ATTENTION["tiny"].head_dim
    assert record["fwd TFLOP/s"] == 2 * matmul
    assert record["fwd+bwd TFLOP/s"] == 7 * matmul


@pytest.mark.parametrize("command", ["", "pairs", "memory", "time"])
def test_help_needs_nothing(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    assert "pallas_kernels.bench" in capsys.readouterr().out
