"""Memory: temporaries of attention, forward and backward, as the TPU compiler allocates them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax

from pallas_kernels.aot import attend_by_intervals, compile_for, tpu_device, training_attention
from pallas_kernels.block_attention.splash import attend_splash
from pallas_kernels.block_attention.xla import attend_xla
from pallas_kernels.shapes import ATTENTION
from pallas_kernels.tables import Record

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "tpu": attend_by_intervals,
    "splash": attend_splash,
    "xla": lambda q, k, v, layout: attend_xla(q, [(k, v, layout)], layout),
}


def measure(chip: str, model: str, lengths: Sequence[int], backends: Sequence[str]) -> list[Record]:
    """One record a backend and length: MiB, and how they grew since the length before.

    growth: the exponent p in bytes ~ L**p between this length and the one before; 1 is linear. What
    the compiler keeps in VMEM does not count: short rows may need nothing else.
    """
    device, records = tpu_device(chip), []
    for backend in backends:
        before: tuple[int, int] | None = None
        for length in sorted(lengths):
            function, arguments = training_attention(BACKENDS[backend], ATTENTION[model], length)
            size = compile_for(device, function, *arguments).temporaries
            record: Record = {"backend": backend, "L": length, "MiB": size / 2**20}
            if before and before[1] and size:
                record["growth"] = _exponent(before, (length, size))
            records.append(record)
            before = length, size
    return records


def _exponent(before: tuple[int, int], now: tuple[int, int]) -> float:
    return math.log(now[1] / before[1]) / math.log(now[0] / before[0])
