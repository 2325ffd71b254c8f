"""The processes of one job: how they find each other, and how all learn that one is gone.

jax finds the others by itself on TPU slices, GKE, SLURM and Open MPI; elsewhere the environment
names them (VARIABLES). Left alone, a process whose neighbour died waits for it in a collective for
minutes and then aborts. So each is watched here by jax's own heartbeats, and the end of one, with
its reason, is the end of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed  # detection, liveness and notes have no public names

from llada2_jax.config import DistributedConfig
from llada2_jax.errors import UserError
from llada2_jax.preemption import RESTART
from llada2_jax.retry import describe

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
FAILED = 1  # exit status of a mistake, which starting again does not mend
_NOTE = "llada2_jax/end_of_the_job"
_LOOK_EVERY = 1.0  # seconds
_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds


class DistributedError(UserError, RuntimeError):
    """The environment does not say who belongs to the job; the message names what is wrong."""


@contextlib.contextmanager
def joined(
    cfg: DistributedConfig, mistakes: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Within its context this process is one of its job; without other processes, nothing happens.

    All leave together: at the end, and with a SystemExit, which all of them raise (Preempted). If
    another exception ends one, all print its reason and exit with status 1; if a process dies, the
    others say which and exit with RESTART, within cfg.heartbeat_seconds. Neither returns.

    mistakes: errors of this process alone. Others may be the echo of another one's death, and are
    told from it by waiting.
    If not all come within cfg.start_seconds, those that did exit with RESTART.
    Raises: DistributedError if the environment is half set or cannot be.
    """
    if not _initialize(cfg):
        yield
        return
    watch = _Watch(cfg) if jax.process_count() > 1 else None
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if watch is not None:
            watch.fail(error, known=isinstance(error, mistakes))
        raise
    finally:
        watch.leave() if watch is not None else jax.distributed.shutdown()


def _initialize(cfg: DistributedConfig) -> bool:
    """Whether there is a job to be part of."""
    if not cfg.enabled:
        return False
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if len(found) < len(VARIABLES) and not _in_cluster():
        if found:
            missing = ", ".join(name for name in VARIABLES if name not in found)
            raise DistributedError(
                f"the environment has {', '.join(found)}, but not {missing}: set all of them, or "
                "none for a single process"
            )
        return False
    address, count, index = (found.get(name) for name in VARIABLES)
    count, index = _integer("JAX_NUM_PROCESSES", count), _integer("JAX_PROCESS_ID", index)
    # jaxlib aborts where it cannot go on. It shall not before we have said why.
    jax.config.update("jax_enable_recoverability", True)
    patience = threading.Timer(cfg.start_seconds, _give_up_waiting, [cfg])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            initialization_timeout=cfg.start_seconds + 60,
            heartbeat_timeout_seconds=cfg.heartbeat_seconds,
        )
    except ValueError as error:
        raise DistributedError(f"jax.distributed: {describe(error)}") from error
    finally:
        patience.cancel()
    return True


def _give_up_waiting(cfg: DistributedConfig) -> NoReturn:
    _end(
        RESTART,
        "not all processes came together within config.distributed.start_seconds="
        f"{cfg.start_seconds}: are all running, and can they reach the coordinator?",
    )


def _end(status: int, reason: str) -> NoReturn:
    with contextlib.suppress(OSError):  # nobody listens any more
        print(f"llada2: the job ends: {reason}", file=sys.stderr, flush=True)
    os._exit(status)


def _in_cluster() -> bool:
    """Whether jax knows how to find the other processes here."""
    kinds = clusters.ClusterEnv._cluster_types
    return any(not kind.opt_in_only_method and kind.is_env_present() for kind in kinds)


def _integer(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise DistributedError(f"{name}={text!r} in the environment is not a number")
    return int(text)


class _Watch:
    """Two threads: one asks who is alive, the other waits for the note that ends the job."""

    def __init__(self, cfg: DistributedConfig):
        self._cfg = cfg
        self._client: Any = distributed.global_state.client
        self._leaving = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._looking.start()
        self._listening.start()

    def fail(self, error: BaseException, *, known: bool) -> NoReturn:
        """Ends all processes for this one's error."""
        if not known:
            traceback.print_exception(error)
            time.sleep(self._cfg.heartbeat_seconds + 2 * _LOOK_EVERY)  # if it was another's death
        self._end_all(FAILED, f"{_name(jax.process_index())} on {platform.node()}: {_text(error)}")
        self._listen()
        sys.exit(FAILED)  # not reached: the note ends the process

    def leave(self) -> None:
        """Leaves the job when all have come here, process 0 last: the others hold on to it."""
        try:
            self._client.wait_at_barrier("llada2_jax/arrived", _FOREVER)
        except jax.errors.JaxRuntimeError:  # one died on the way
            self._listening.join()
        self._leaving.set()
        self._client.wait_at_barrier("llada2_jax/leaving", self._cfg.heartbeat_seconds * 1000)
        if jax.process_index() == 0:
            self._looking.join()
        jax.distributed.shutdown()  # ends what the threads wait for; Python cannot end before
        self._looking.join()
        self._listening.join()

    def _look(self) -> None:
        while not self._leaving.wait(_LOOK_EVERY):
            gone = set(range(jax.process_count())) - self._alive()
            if gone and not self._leaving.is_set():
                names = ", ".join(map(_name, sorted(gone)))
                self._end_all(
                    RESTART,
                    f"{names} died: no heartbeat for config.distributed.heartbeat_seconds="
                    f"{self._cfg.heartbeat_seconds}; see its own log. Start all again to go on "
                    "from the last checkpoint",
                )
        while jax.process_index() == 0 and self._alive() != {0}:
            pass

    def _alive(self) -> set[int]:
        """Waits until all processes that are alive ask, too."""
        everyone = range(jax.process_count())
        try:
            return set(self._client.get_live_nodes(everyone))
        except jax.errors.JaxRuntimeError:  # process 0 is gone, of which _listen hears, too
            return set(everyone)

    def _end_all(self, status: int, reason: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one's note was first
            self._client.key_value_set(_NOTE, json.dumps({"status": status, "reason": reason}))

    def _listen(self) -> None:
        try:
            note = json.loads(self._client.blocking_key_value_get(_NOTE, _FOREVER))
        except jax.errors.JaxRuntimeError as error:
            if self._leaving.is_set():
                return
            reason = f"{_name(0)}, the coordinator, is gone: {describe(error)}"
            note = {"status": RESTART, "reason": reason}
        _end(note["status"], note["reason"])


def _name(index: int) -> str:
    return f"process {index} of {jax.process_count()}"


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {describe(error)}"
