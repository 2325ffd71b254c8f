"""Metrics to the terminal (a progress bar), to JSONL and to TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricLogger:
    """Writes `<workdir>/metrics.jsonl` and `<workdir>/tensorboard/`, and owns the progress bar.

    JSONL has one object a line: step, tokens, phase, seconds since the start of this process, and
    the metrics by name. On resuming, lines past the restored step are cut off, so that the file
    tells of the surviving steps only.
    """

    def __init__(
        self, workdir: Path, *, total_steps: int, first_step: int, tokens_per_step: int, label: str
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        self.path = workdir / "metrics.jsonl"
        _cut_back(self.path, first_step)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)
        self._tokens_per_step = tokens_per_step
        self._start = time.perf_counter()
        self._bar = tqdm(
            total=total_steps * tokens_per_step,
            initial=first_step * tokens_per_step,
            desc=label,
            unit="tok",
            unit_scale=True,
            mininterval=1.0,
            dynamic_ncols=True,
        )

    def write(self, step: int, kind: str, phase: str, values: dict[str, Any]) -> None:
        """Records scalars (or short lists) under `kind`, e.g. "train" or "validation"."""
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            "kind": kind,
            "phase": phase,
            "seconds": round(time.perf_counter() - self._start, 3),
            **values,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def advance(self, steps: int, phase: str, **shown: float) -> None:
        """Moves the bar on and shows the phase and a few figures beside tokens/s and time left."""
        self._bar.set_description_str(phase, refresh=False)
        self._bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
        self._bar.update(steps * self._tokens_per_step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._bar.write(text)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def read_metrics(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, of one kind or all. A torn last line is dropped."""
    lines = []
    path = Path(workdir) / "metrics.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if kind in (None, line["kind"]):
            lines.append(line)
    return lines


def _cut_back(path: Path, first_step: int) -> None:
    """Drops lines of steps that the restored checkpoint does not know of."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path.parent) if line["step"] <= first_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    temporary.replace(path)
