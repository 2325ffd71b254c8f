"""Time: every contender on the accelerator at hand, forward and forward + backward."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from pallas_kernels.bench.contenders import CONTENDERS, Calls, Case
from pallas_kernels.block_layout import key_intervals
from pallas_kernels.peaks import peak_flops
from pallas_kernels.shapes import ATTENTION
from pallas_kernels.tables import Record

MATMULS = {"forward": 2, "both": 7}
"""Matrix products a pair needs, 2 * head_dim FLOPs each; the backward pass alone needs 5."""


Contenders = dict[str, Callable[[Case], Calls]]


def contenders_here(only: Sequence[str]) -> Contenders:
    """The contenders on the accelerator at hand, or those of them that are named.

    Raises: ValueError for a name that is not among them.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves torch some memory
    here = CONTENDERS[jax.default_backend()]
    if unknown := [name for name in only if name not in here]:
        raise ValueError(f"no contender {unknown[0]!r} here: choose from {list(here)}")
    return {name: build for name, build in here.items() if not only or name in only}


def measure(args: argparse.Namespace, contenders: Contenders) -> tuple[list[Record], str, str]:
    """Records, title and caption. A contender that fails has the reason in its record."""
    platform, kind = jax.default_backend(), jax.local_devices()[0].device_kind
    on_cpu = platform == "cpu"
    model = args.model or ("tiny" if on_cpu else "mini")
    length = args.length or (256 if on_cpu else 4096)
    peak = peak_flops(kind)
    records = []
    for documents in args.documents:
        case = Case(ATTENTION[model], args.rows, length, args.block, documents)
        records += _compare(case, contenders, args.repeats, peak)
    title = f"{kind}: {model}, {args.rows} rows of 2 x {length}, block {args.block}, bf16"
    caption = (
        "x: time over that of the first, empty where that one failed. "
        "TFLOP/s: on allowed pairs, 5 matmuls backward. "
        "differs by: largest difference of an output from the first's."
    )
    if on_cpu:
        caption += " No accelerator here: this says nothing about the kernels."
    elif peak is None:
        caption += f" Peak of {kind!r} unknown."
    return records, title, caption


def _compare(case: Case, contenders: Contenders, repeats: int, peak: float | None) -> list[Record]:
    """Built one after the other, so that the memory of one is free for the next."""
    pairs = key_intervals(case.layout).pairs()
    flops = {
        part: 2 * matmuls * pairs * case.shape.heads * case.shape.head_dim
        for part, matmuls in MATMULS.items()
    }
    first: dict[str, Any] = {}  # stays empty where the first contender fails: nothing to compare
    records = []
    for name, build in contenders.items():
        record: dict[str, Any] = {"documents": case.documents, "contender": name}
        try:
            calls = build(case)
            measured: dict[str, Any] = {}
            for part, label in (("forward", "fwd"), ("both", "fwd+bwd")):
                seconds = _median_seconds(getattr(calls, part), calls.wait, repeats)
                measured[part] = seconds
                record[f"{label} ms"] = round(seconds * 1e3, 3)
                record[f"{label} TFLOP/s"] = round(flops[part] / seconds / 1e12, 2)
                if peak:
                    record[f"{label} % of peak"] = round(100 * flops[part] / seconds / peak, 1)
            measured["output"] = calls.read(calls.forward())
            first = measured if not records else first
            if first:
                record["fwd x"] = round(measured["forward"] / first["forward"], 3)
                record["fwd+bwd x"] = round(measured["both"] / first["both"], 3)
                difference = np.abs(measured["output"] - first["output"]).max()
                record["differs by"] = round(float(difference), 4)
        except Exception as error:  # one contender's, whatever it is; the table goes on
            record["error"] = f"{type(error).__name__}: {error}"[:200]
        records.append(record)
    return records


def _median_seconds(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> float:
    """Median over repeats of the time of one call, after two calls to compile and to warm up."""
    wait(call())
    wait(call())
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(call())
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
