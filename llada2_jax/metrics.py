"""Metrics to the terminal (a progress bar), to JSONL, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar
from tqdm import tqdm

from llada2_jax.config import ConfigError
from llada2_jax.retry import describe, with_retries

_log = logging.getLogger(__name__)

# pyright cannot see into generated modules.
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class MetricLogger:
    """Writes `<workdir>/metrics.jsonl`, `<workdir>/tensorboard/` and, on request, to Weights &
    Biases, and owns the progress bar.

    JSONL has one object a line: step, tokens, phase, seconds since the start of this process, and
    the metrics by name. It is the record: on resuming, lines past the restored step are cut off,
    so that it tells of the surviving steps only, and a line that cannot be written stops the run.
    The others are views of it, and may miss points while storage fails.

    retry_seconds: how long writing is tried again. write: False on all processes but one.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        total_steps: int,
        first_step: int,
        tokens_per_step: int,
        label: str,
        retry_seconds: float = 60.0,
        wandb_project: str = "",
        config: dict[str, Any] | None = None,
        write: bool = True,
    ):
        workdir.mkdir(parents=True, exist_ok=True)
        self._lines = _Lines(workdir / "metrics.jsonl", retry_seconds) if write else None
        self._views: list[_Board | _Wandb] = [_Board(workdir / "tensorboard")] if write else []
        if write and wandb_project:
            self._views.append(_Wandb(wandb_project, workdir, config or {}))
        self._tokens_per_step = tokens_per_step
        self._start = time.perf_counter()
        self.cut_back(first_step)
        self._bar = tqdm(
            total=total_steps * tokens_per_step,
            initial=first_step * tokens_per_step,
            desc=label,
            unit="tok",
            unit_scale=True,
            mininterval=1.0,
            dynamic_ncols=True,
            disable=not write,
        )

    def write(self, step: int, kind: str, phase: str, values: dict[str, Any]) -> None:
        """Records scalars (or short lists) under `kind`, e.g. "train" or "validation".

        Raises: StorageError if metrics.jsonl cannot be written.
        """
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            "kind": kind,
            "phase": phase,
            "seconds": round(time.perf_counter() - self._start, 3),
            **values,
        }
        if self._lines is not None:
            self._lines.append(json.dumps(line) + "\n")
        scalars = {f"{kind}/{k}": v for k, v in values.items() if isinstance(v, int | float)}
        for view in self._views:
            view.add(step, scalars)

    def sync(self) -> None:
        """Returns when all lines are on disk: a checkpoint must not be older than its metrics."""
        if self._lines is not None:
            self._lines.sync()

    def cut_back(self, step: int) -> None:
        """Forgets what was recorded after `step`, which the surviving history does not have."""
        if self._lines is not None:
            self._lines.cut_back(step)
        for view in self._views:
            view.cut_back(step)

    def advance(self, steps: int, phase: str, **shown: float) -> None:
        """Moves the bar on and shows the phase and a few figures beside tokens/s and time left."""
        with contextlib.suppress(OSError):  # of a terminal that is a file on a full disk
            self._bar.set_description_str(phase, refresh=False)
            self._bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)
            self._bar.update(steps * self._tokens_per_step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            with contextlib.suppress(OSError):
                self._bar.write(text)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._bar.close()
        for view in self._views:
            view.close()
        if self._lines is not None:
            self._lines.close()


def read_metrics(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, of one kind or all. Torn lines are left out."""
    path, lines = Path(workdir) / "metrics.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and {"step", "kind"} <= line.keys():
            lines.append(line)
    return [line for line in lines if kind in (None, line["kind"])]


class _Lines:
    """An append-only file whose lines are whole: a line that was half written, on a disk that is
    full or on one that comes back, is written again in the same place."""

    def __init__(self, path: Path, retry_seconds: float):
        self._path, self._seconds = path, retry_seconds
        self._file, self._size = -1, 0

    def cut_back(self, step: int) -> None:
        kept = [line for line in read_metrics(self._path.parent) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = self._path.with_suffix(".tmp")

        def rewrite() -> None:
            self.close()
            temporary.write_text(text)
            temporary.replace(self._path)
            self._file = os.open(self._path, os.O_RDWR)

        self._retry(rewrite)
        self._size = os.fstat(self._file).st_size

    def append(self, text: str) -> None:
        data = text.encode()

        def write() -> None:
            self._check_place()
            done = 0
            while done < len(data):
                done += os.pwrite(self._file, data[done:], self._size + done)

        self._retry(write)
        self._size += len(data)

    def sync(self) -> None:
        self._retry(lambda: os.fsync(self._file))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def _check_place(self) -> None:
        """A file that was unlinked, or whose folder vanished, takes lines and keeps none."""
        there, ours = os.stat(self._path), os.fstat(self._file)
        if (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino):
            raise FileNotFoundError(f"{self._path} is another file now: is another run writing it?")

    def _retry(self, action) -> None:
        with_retries(action, f"writing {self._path}", seconds=self._seconds)


class _Board:
    """TensorBoard's event files, written by the calling thread: a writer of tensorboardX's whose
    thread dies of a full disk blocks its caller for good."""

    FLUSH_SECONDS = 10.0

    def __init__(self, folder: Path):
        self._folder = folder
        self._writer: EventsWriter | None = None
        self._flushed, self._warned = 0.0, False

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.time()
        events = [Event(step=step, wall_time=now, summary=scalar(k, v)) for k, v in scalars.items()]
        self._write(events, flush=now - self._flushed > self.FLUSH_SECONDS)

    def cut_back(self, step: int) -> None:
        """What follows hides events of the same steps that were written before."""
        start = SessionLog(status=SessionLog.START)
        self._write([Event(step=step + 1, wall_time=time.time(), session_log=start)], flush=True)

    def close(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None

    def _write(self, events: list[Any], *, flush: bool) -> None:
        try:
            if self._writer is None:
                self._folder.mkdir(exist_ok=True)
                name = str(self._folder / "events")
                self._writer = EventsWriter(name, filename_suffix=f".{os.getpid()}")
            for event in events:
                self._writer.write_event(event)
            if flush:
                self._writer.flush()
                self._flushed = time.time()
        except OSError as error:
            self.close()
            if not self._warned:
                _log.warning("TensorBoard's curves will have gaps: %s", describe(error))
            self._warned = True


class _Wandb:
    """Weights & Biases: one run a workdir, which is resumed with it."""

    def __init__(self, project: str, workdir: Path, config: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports] - optional
        except ModuleNotFoundError:
            raise ConfigError(
                f"config.wandb_project={project!r} needs the package wandb: pip install wandb"
            ) from None
        place = str(workdir.absolute())
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            id=hashlib.sha256(place.encode()).hexdigest()[:16],
            resume="allow",
            dir=place,
            config=config,
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def cut_back(self, step: int) -> None:
        """Its history cannot be cut: points of repeated steps stay, and later ones cover them."""

    def close(self) -> None:
        self._run.finish()
