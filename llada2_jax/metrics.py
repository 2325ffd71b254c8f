"""Metrics to the terminal (a progress bar), to JSONL, TensorBoard and Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from llada2_jax import progress
from llada2_jax.config import ConfigError
from llada2_jax.files import replace_text
from llada2_jax.retry import describe, with_retries

_log = logging.getLogger(__name__)

# pyright cannot see into generated modules.
Event: Any = event_pb2.Event  # pyright: ignore[reportAttributeAccessIssue]
SessionLog: Any = event_pb2.SessionLog  # pyright: ignore[reportAttributeAccessIssue]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Lists as `name/0`, `name/1`, ...: boards take numbers only."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, list):
            flat |= {f"{name}/{i}": part for i, part in enumerate(value)}
        else:
            flat[name] = value
    return flat


class MetricLogger:
    """Writes `<workdir>/metrics.jsonl`, `<workdir>/tensorboard/` and, on request, to Weights &
    Biases, and owns the progress bar.

    JSONL has one object a line: step, tokens, kind (what the line is), phase, seconds since the
    start of this process, and the metrics by name. It is the record: on resuming, lines past the
    restored step are cut off, so that it tells of the surviving steps only, and a line that cannot
    be written stops the run. The others are views of it, and may miss points while storage fails.

    workdir: must be there. retry_seconds: how long writing is tried again. write: False on all
    processes but one.
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
        path = workdir / "metrics.jsonl"
        self._lines = _Lines(path, retry_seconds, exists=first_step > 0) if write else None
        self._views: list[_Board | _Wandb] = [_Board(workdir / "tensorboard")] if write else []
        if write and wandb_project:
            self._views.append(_Wandb(wandb_project, workdir, config or {}))
        self._tokens_per_step = tokens_per_step
        self._start = time.perf_counter()
        self.cut_back(first_step)
        self._bar = progress.bar(
            what=label,
            total=total_steps * tokens_per_step,
            initial=first_step * tokens_per_step,
            unit="tok",
            mininterval=1.0,
            disable=not write,  # a log file has it too: training is what one looks for there
        )

    def write(self, step: int, kind: str, phase: str, values: dict[str, Any]) -> None:
        """Records scalars (or short lists) under `kind`, e.g. "train" or "validation".

        Raises: StorageError if metrics.jsonl cannot be written; ValueError for a metric that has
          the name of one of the line's own fields.
        """
        line = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            "kind": kind,
            "phase": phase,
            "seconds": round(time.perf_counter() - self._start, 3),
        }
        taken = sorted(line.keys() & values.keys())
        if taken:
            raise ValueError(f"metrics {taken} would hide the line's own fields of that name")
        line |= values
        if self._lines is not None:
            self._lines.append(json.dumps(line) + "\n")
        scalars = {f"{kind}/{k}": v for k, v in _flat(values).items() if isinstance(v, int | float)}
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
        """Never raises: an error on the way here is what the caller wants to hear of."""
        with contextlib.suppress(OSError):
            self._bar.close()
        for closing in (*self._views, *([self._lines] if self._lines else [])):
            with contextlib.suppress(OSError):  # on some file systems of a write that failed
                closing.close()


def read_metrics(workdir: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, of one kind or all. Torn lines are left out."""
    path = Path(workdir) / "metrics.jsonl"
    lines = _whole_lines(path) if path.exists() else []
    return [line for line in lines if kind in (None, line["kind"])]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and "kind" in line:
            lines.append(line)
    return lines


class _Appended:
    """A file that takes records whole: what was half written, when the disk was full, is
    overwritten by the next attempt."""

    def __init__(self, path: Path, flags: int = 0):
        self._file = os.open(path, os.O_RDWR | flags)
        self.size = os.fstat(self._file).st_size

    def append(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], self.size + done)
        self.size += done

    def is_at(self, path: Path) -> bool:
        there, ours = os.stat(path), os.fstat(self._file)
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class _Lines:
    """metrics.jsonl: each line is written again until it is there.

    exists: the file is the record of earlier steps; that it is missing is an error, and no reason
    to begin another.
    """

    def __init__(self, path: Path, retry_seconds: float, *, exists: bool):
        self._path, self._seconds, self._exists = path, retry_seconds, exists
        self._file: _Appended | None = None

    def cut_back(self, step: int) -> None:
        def rewrite() -> _Appended:
            if self._exists and not self._path.exists():
                raise FileNotFoundError(
                    f"{self._path} is gone: put it back, or an empty file to do without its lines"
                )
            found = _whole_lines(self._path) if self._path.exists() else []
            kept = [line for line in found if line["step"] <= step]
            replace_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
            return _Appended(self._path)

        self.close()
        self._file = self._retry(rewrite)
        self._exists = True

    def append(self, text: str) -> None:
        self._retry(lambda: self._open().append(text.encode()))

    def sync(self) -> None:
        self._retry(lambda: self._open().sync())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _open(self) -> _Appended:
        """A file that was unlinked, or whose folder vanished, would take lines and keep none."""
        if self._file is None or not self._file.is_at(self._path):
            raise FileNotFoundError(f"{self._path} is another file now: is another run writing it?")
        return self._file

    def _retry[T](self, action: Callable[[], T]) -> T:
        return with_retries(action, f"writing {self._path}", seconds=self._seconds)


class _Board:
    """TensorBoard's event files, written by the calling thread: a SummaryWriter whose own thread
    dies of a full disk blocks its caller for good."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: _Appended | None = None
        self._warned = False

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._write(*(Event(step=step, summary=scalar(k, v)) for k, v in scalars.items()))

    def cut_back(self, step: int) -> None:
        """What follows hides events of the same steps that were written before."""
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _write(self, *events: Any) -> None:
        try:
            file = self._open()
            file.append(b"".join(map(_record, events)))
        except OSError as error:
            if not self._warned:
                _log.warning("TensorBoard's curves will have gaps: %s", describe(error))
            self._warned = True

    def _open(self) -> _Appended:
        if self._file is None:
            self._folder.mkdir(exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
            self._file = _Appended(self._folder / name, os.O_CREAT | os.O_TRUNC)
        if not self._file.size:
            self._file.append(_record(Event(file_version="brain.Event:2")))
        return self._file


def _record(event: Any) -> bytes:
    """An event as TFRecord frames it: length, its checksum, data, its checksum."""
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checks = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checks[0] + data + checks[1]


class _Wandb:
    """Weights & Biases: one run a workdir, which is resumed with it."""

    def __init__(self, project: str, workdir: Path, config: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports] - optional
        except ModuleNotFoundError:
            raise ConfigError(
                f"config.wandb_project={project!r} needs the package wandb: "
                "pip install 'llada2-jax[wandb]'"
            ) from None
        place = str(workdir.absolute())
        self._warned = False
        self._run: Any = self._try(
            lambda: wandb.init(
                project=project,
                name=workdir.name,
                id=hashlib.sha256(place.encode()).hexdigest()[:16],
                resume="allow",
                dir=place,
                config=config,
            )
        )
        self._use("define_metric", "*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._use("log", {"step": step, **scalars})

    def cut_back(self, step: int) -> None:
        """Its history cannot be cut: points of repeated steps stay, and later ones cover them."""

    def close(self) -> None:
        self._use("finish")

    def _use(self, method: str, *args: Any, **options: Any) -> None:
        if self._run is not None:
            self._try(lambda: getattr(self._run, method)(*args, **options))

    def _try(self, action: Callable[[], Any]) -> Any:
        """Training does not depend on a service far away, whatever its client raises."""
        try:
            return action()
        except Exception as error:
            if not self._warned:
                _log.warning("Weights & Biases will have gaps: %s", describe(error))
            self._warned = True
        return None
