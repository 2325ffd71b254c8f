"""What a run keeps on disk, and how it comes back.

Each `<workdir>/checkpoints/<step>/` is a model checkpoint (see checkpoint.py) that also holds the
items `optimizer` (all of the state but parameters), `train` (JSON: step, phase, metrics, data
position) and `checksums`. Orbax writes it in the background under another name and renames it at
the end, so that it is there whole or not at all. docs/reliability.md says what that withstands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

from llada2_jax import checkpoint, folders
from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.checksums import json_checksum, seal, tree_checksums
from llada2_jax.config import CheckpointConfig
from llada2_jax.retry import StorageError, describe, with_retries
from llada2_jax.types import Params

PARTIAL = ".orbax-checkpoint-tmp"  # in the name of what Orbax has not finished
BEGUN = "checkpoints.begun"  # in the workdir, once there was a checkpoint
DELETED = ".deleted"  # ends the name of what is being removed
JSON_ITEMS = (folders.MODEL, folders.TOKENIZER, folders.TRAIN)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest, of each kind of validation loss the best, the first one
    past each multiple of `every_tokens` (0: none of those), and what a rollback would go back to.

    Losses of different kinds (another block size, another phase) do not compare, so each kind has
    its own best.
    """

    last: int
    best: int
    every_tokens: int = 0
    tokens_per_step: int = 1

    def kept(self, scores: Mapping[int, Mapping[str, Any]], rollback_to: int = 0) -> set[int]:
        """The steps to keep, of {step: validation scores, or {} where none were taken}.

        rollback_to: where a rollback goes back to; 0: nowhere.
        """
        steps = sorted(scores)
        kept = set(steps[-self.last :])
        kept |= set([step for step in steps if step <= rollback_to][-1:])
        kinds: dict[str, list[tuple[float, int]]] = {}
        for step in steps:
            value = scores[step].get("bits_per_byte", scores[step].get("loss"))
            if isinstance(value, float) and math.isfinite(value):
                kinds.setdefault(str(scores[step].get("kind")), []).append((value, step))
        for ranked in kinds.values():
            kept |= {step for _, step in sorted(ranked)[: self.best]}
        if self.every_tokens:
            passed = {step: step * self.tokens_per_step // self.every_tokens for step in steps}
            firsts = {passed[step]: step for step in reversed(steps)}
            kept |= {step for multiple, step in firsts.items() if multiple}
        return kept


class TrainCheckpoints:
    """Saves and restores a run's state under `<workdir>/checkpoints`, on all processes together.

    Arrays may be sharded in any way: each process writes and reads its own shards, and a state
    comes back under another mesh or number of processes than it was saved from.
    """

    def __init__(self, workdir: Path, cfg: CheckpointConfig, *, tokens_per_step: int = 1):
        self.folder = (Path(workdir) / "checkpoints").absolute()
        self._mark = self.folder.with_name(BEGUN)
        self._retention = Retention(
            cfg.keep_last, cfg.keep_best, cfg.keep_every_tokens, tokens_per_step
        )
        self._cfg = cfg
        self._checkpointer = _checkpointer()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        steps = _agreed(self._patiently(self._open, f"opening {self.folder}"))
        self._scores = {step: self._read_scores(step) for step in steps}

    def steps(self) -> list[int]:
        """The steps on disk, in order. Each was committed whole; whether it still is, `restore`
        finds out."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdecimal())

    # ---- saving ----------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        bundle: ModelBundle,
        params: Params,
        optimizer: Any,
        train: dict[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Starts to write step `step`, and returns once the arrays are copied off the devices: the
        caller may donate them. A step that is there already stays.

        params: all parameters of the model. optimizer: any pytree of arrays. train: JSON; its
        metrics["validation"] and its rollback_to (default: this step) decide what is kept. wait:
        return when it is on disk. That is also done, with retries, after a write has failed.
        Raises: StorageError if storage refuses for longer than the config allows.
        """
        self.wait()
        if step in self._scores:
            return
        start = functools.partial(self._start, step, _items(bundle, params, optimizer, train))
        commit = functools.partial(self._commit, step, train)
        if not wait and not self.failed and self._attempt(step, start):
            self._thread = threading.Thread(target=self._attempt, args=[step, commit])
            self._thread.start()
            return

        def write() -> None:
            try:
                start()
                commit()
            except Exception:
                self._discard_partial(step)
                raise

        what = f"writing checkpoint {step} under {self.folder}"
        self._patiently(write, what, passes=lambda error: True)
        self._error = None

    @property
    def failed(self) -> bool:
        """Whether the last write failed on any process, so that all should save again."""
        return not _on_all(self._error is None)

    @property
    def lost(self) -> bool:
        """Whether somebody took away the checkpoints that there were."""
        return not self.newest and self._mark.exists()

    @property
    def newest(self) -> int:
        """The last step that was saved; 0 before the first."""
        self.wait()
        return max(self._scores, default=0)

    def wait(self) -> None:
        """Returns when nothing is being written any more; `failed` says how it went."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Ends what is going on; a write that fails now is reported, not raised."""
        self.wait()
        with contextlib.suppress(Exception):
            self._checkpointer.close()

    def _start(self, step: int, items: ocp.args.Composite) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{self.folder} is gone")
        self._checkpointer.save(self.folder / str(step), args=items)

    def _commit(self, step: int, train: Mapping[str, Any]) -> None:
        self._checkpointer.wait_until_finished()
        self._scores[step] = train["metrics"].get("validation") or {}
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):  # the checkpoint is there; the next one marks it
                self._mark.touch()
            self._delete_old(train.get("rollback_to", step))

    def _attempt(self, step: int, action) -> bool:
        """Whether the action succeeded; an error is kept for the caller's next look at `failed`."""
        try:
            action()
        except Exception as error:
            _log.warning("checkpoint %d was not written: %s", step, describe(error))
            self._error = error
            self._discard_partial(step)
        return self._error is None

    def _delete_old(self, rollback_to: int) -> None:
        for step in set(self._scores) - self._retention.kept(self._scores, rollback_to):
            del self._scores[step]
            try:
                self._remove(step)
            except OSError as error:  # costs space, no more; `_open` tries again
                _log.warning("checkpoint %d was not removed: %s", step, describe(error))

    def _remove(self, step: int) -> None:
        """Takes the step its name, so that none is half-deleted, and then its files: what is left
        of those costs space, no more."""
        aside = self.folder / f"{step}{DELETED}"
        shutil.rmtree(aside, ignore_errors=True)  # of an earlier step of this number
        (self.folder / str(step)).rename(aside)
        try:
            shutil.rmtree(aside)
        except OSError as error:
            _log.warning("%s was not removed: %s", aside, describe(error))

    def _discard_partial(self, step: int) -> None:
        """Frees the space of a failed write, and starts over with a checkpointer without a past."""
        with contextlib.suppress(Exception):
            self._checkpointer.close()
        self._checkpointer = _checkpointer()
        if jax.process_index() == 0 and self.folder.is_dir():
            for path in self.folder.glob(f"{step}{PARTIAL}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _patiently[T](self, action: Callable[[], T], what: str, **options: Any) -> T:
        return with_retries(action, what, seconds=self._cfg.retry_seconds, **options)

    def _open(self) -> list[int]:
        """Makes the folder in the workdir, which must be there, and removes what a killed process
        left half-written in it; returns the steps."""
        if jax.process_index() == 0:
            self.folder.mkdir(exist_ok=True)
            for path in self.folder.iterdir():
                if PARTIAL in path.name or path.name.endswith(DELETED):
                    shutil.rmtree(path, ignore_errors=True)
        return self.steps()

    def _read_scores(self, step: int) -> Mapping[str, Any]:
        path = self.folder / str(step)
        read = functools.partial(checkpoint.read_train_item, path)
        try:
            return self._patiently(read, f"reading {path}")["metrics"]["validation"] or {}
        except CheckpointError as error:
            _log.warning("checkpoint %d counts as not measured: %s", step, describe(error))
        except (KeyError, TypeError):  # it was saved without
            pass
        return {}

    # ---- restoring -------------------------------------------------------------------------------

    def restore_newest(
        self, params: Params, optimizer: Any, *, before: int | None = None
    ) -> tuple[Params, Any, dict[str, Any]] | None:
        """(params, optimizer, train) of the newest undamaged checkpoint, or None without any.

        params, optimizer: pytrees of ShapeDtypeStructs (or arrays, which then stay on the devices
        beside the result) whose structure, shapes and shardings the result has. before: only steps
        below it. A damaged checkpoint is moved to `<workdir>/damaged` with a warning that names it,
        once an older one was restored.
        Raises: CheckpointError if there are checkpoints, but none can be restored: a run is never
        silently begun anew. StorageError where storage fails for longer than the config allows:
        that is no damage, and nothing is passed over.
        """
        self.wait()
        problems: dict[int, str] = {}
        for step in reversed(_agreed(self._patiently(self._listed, f"listing {self.folder}"))):
            if before is not None and step >= before:
                continue
            restored, problem = self._try(step, params, optimizer)
            if problem is None:
                self._set_aside(problems, step)
                return restored
            problems[step] = problem
        if problems:
            reasons = "; ".join(f"{step}: {problem}" for step, problem in problems.items())
            raise CheckpointError(
                f"no checkpoint under {self.folder} can be restored ({reasons}); bring one back, "
                "or choose another workdir to start again"
            )
        return None

    def discard_after(self, step: int) -> None:
        """Removes the checkpoints after `step`, from which on all is taken again."""
        self.wait()
        self._error = None  # what was not written is taken again too
        self._scores = {old: scores for old, scores in self._scores.items() if old <= step}
        if jax.process_index() == 0:
            for later in [s for s in reversed(self.steps()) if s > step]:
                remove = functools.partial(self._remove, later)
                self._patiently(remove, f"removing checkpoint {later} under {self.folder}")

    def _listed(self) -> list[int]:
        """`steps`, of a folder that is there and not an empty place to mount it."""
        steps = self.steps()
        if not self.folder.is_dir() or (self._scores and not steps):
            raise FileNotFoundError(f"{self.folder} is gone")
        return steps

    def _try(self, step: int, params: Params, optimizer: Any) -> tuple[Any, str | None]:
        """(the restored state, None), or (None, what is wrong); the same on all processes."""
        what = f"reading checkpoint {step} under {self.folder}"
        restored, problem = None, None

        def read() -> tuple[Params, Any, dict[str, Any]]:
            try:
                return self._restore(step, params, optimizer)
            except Exception as error:
                if not (self.folder / str(step)).is_dir():
                    raise FileNotFoundError(f"{self.folder / str(step)} is gone") from error
                if isinstance(error, FileNotFoundError):  # waiting does not bring it back
                    raise CheckpointError(describe(error)) from error
                raise

        try:
            restored = self._patiently(read, what)
        except (MemoryError, StorageError):
            raise
        except Exception as error:  # whatever damaged files make of the libraries that read them
            problem = describe(error)
        if not _on_all(problem is None) and problem is None:
            problem = "another process cannot read it"
        return restored, problem

    def _restore(self, step: int, params: Params, optimizer: Any) -> tuple[Params, Any, dict]:
        path = self.folder / str(step)
        wanted = checkpoint.read_checksums(path)
        if not wanted:
            raise CheckpointError("it has no checksums")
        items = {name: checkpoint.read_item(path, name) for name in JSON_ITEMS}
        _compare(wanted, {name: json_checksum(item) for name, item in items.items()})
        pure, leaves = nnx.to_pure_dict(params), _leaves(optimizer)
        trees = {folders.PARAMS: pure, folders.OPTIMIZER: leaves}
        arguments = {
            name: ocp.args.PyTreeRestore(tree, ocp.checkpoint_utils.construct_restore_args(tree))
            for name, tree in trees.items()
        }
        restored = self._checkpointer.restore(path, args=ocp.args.Composite(**arguments))
        arrays = _array_leaves(restored[folders.PARAMS], restored[folders.OPTIMIZER])
        _compare(wanted, _host_checksums(arrays))
        params = jax.tree.map(lambda x: x, params)
        nnx.replace_by_pure_dict(params, restored[folders.PARAMS])
        structure = jax.tree.structure(optimizer)
        optimizer = structure.unflatten([restored[folders.OPTIMIZER][name] for name in leaves])
        return params, optimizer, items[folders.TRAIN]

    def _set_aside(self, problems: Mapping[int, str], used: int) -> None:
        for step, problem in problems.items():
            _log.warning(
                "checkpoint %d is damaged (%s): going on from checkpoint %d", step, problem, used
            )
            self._scores.pop(step, None)
            if jax.process_index() == 0:
                move = functools.partial(self._move_aside, step)
                self._patiently(move, f"moving checkpoint {step} out of {self.folder}")

    def _move_aside(self, step: int) -> None:
        damaged = self.folder.parent / "damaged"
        damaged.mkdir(exist_ok=True)
        name = f"{step}-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        (self.folder / str(step)).rename(damaged / name)


# ---- parts ---------------------------------------------------------------------------------------


def _checkpointer() -> ocp.AsyncCheckpointer:
    # Directories are made before `save` returns, so that a folder that cannot be written is an
    # error there and not a wait of minutes for a directory that never comes.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)


def _items(bundle: ModelBundle, params: Params, optimizer: Any, train: dict) -> ocp.args.Composite:
    pure, leaves = nnx.to_pure_dict(params), _leaves(optimizer)
    items: dict[str, Any] = {
        folders.MODEL: bundle.model_item(),
        folders.TOKENIZER: bundle.tokenizer_item(),
        folders.TRAIN: train,
    }
    sums = _host_checksums(_array_leaves(pure, leaves))
    sums |= {name: json_checksum(item) for name, item in items.items()}
    items[folders.CHECKSUMS] = seal(sums)

    return ocp.args.Composite(
        params=ocp.args.PyTreeSave(pure, save_args=jax.tree.map(_chunked, pure)),
        optimizer=ocp.args.PyTreeSave(leaves, save_args=jax.tree.map(_chunked, leaves)),
        **{name: ocp.args.JsonSave(item) for name, item in items.items()},
    )


def _chunked(leaf: jax.Array) -> ocp.SaveArgs:
    """Chunks of whole slices of the leading axes, so that merging streams, and a process that needs
    some experts reads those.

    Orbax cuts the axes it is given into single slices, and then the largest ones: it is given those
    that have to be cut, while their slices are large enough to be chunks of their own.
    """
    limit, shape = checkpoint.CHUNK_BYTES, leaf.sharding.shard_shape(leaf.shape)
    sizes = [math.prod(shape[axis:]) * leaf.dtype.itemsize for axis in range(leaf.ndim + 1)]
    axes = tuple(a for a in range(leaf.ndim) if sizes[a] > limit and sizes[a + 1] >= limit // 16)
    return ocp.SaveArgs(chunk_byte_size=limit, shard_axes=axes)


def _leaves(tree: Any) -> dict[str, jax.Array]:
    """Leaves by number: the optimizer's own containers are not part of the format."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _array_leaves(params: Any, optimizer: Mapping[str, Any]) -> dict[str, jax.Array]:
    named = {f"{folders.PARAMS}/{p}": leaf for p, leaf in checkpoint.flatten(params).items()}
    return named | {f"{folders.OPTIMIZER}/{name}": leaf for name, leaf in optimizer.items()}


def _host_checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    return {name: int(value) for name, value in jax.device_get(tree_checksums(arrays)).items()}


def _compare(wanted: Mapping[str, int], found: Mapping[str, int]) -> None:
    damaged = [name for name, value in found.items() if wanted.get(name) != value]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise CheckpointError(f"the checksum of {damaged[0]}{more} differs from the saved one")


def _agreed(steps: list[int]) -> list[int]:
    """Process 0's list, on all processes: their views of a file system may differ for a while."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = (steps + [0] * count)[:count]
    return [int(x) for x in multihost_utils.broadcast_one_to_all(np.asarray(padded, np.int32))]


def _on_all(good: bool) -> bool:
    """Whether it is true on all processes."""
    if jax.process_count() == 1:
        return good
    return bool(np.min(multihost_utils.process_allgather(np.int32(good))))
