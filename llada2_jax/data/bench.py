"""How fast rows come, measured the way a run reads them."""

from __future__ import annotations

import time

from llada2_jax.data.loader import batches
from llada2_jax.data.mixing import Rows


def measure(rows: Rows, *, row_length: int, rows_per_step: int, seconds: float) -> dict[str, float]:
    """Reads batches for about `seconds` and returns tokens, wall and CPU seconds, and tokens per
    second of each: by CPU seconds is per core, whatever the number of threads."""
    source = batches(rows, rows_per_step=rows_per_step, first_step=0)
    next(source)  # opens files, plans the first epoch
    wall, cpu, steps = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds and (steps + 2) * rows_per_step <= len(rows):
        next(source)
        steps += 1
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = steps * rows_per_step * row_length
    return {
        "tokens": tokens,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "tokens_per_second": tokens / wall,
        "tokens_per_second_per_core": tokens / cpu,
    }
