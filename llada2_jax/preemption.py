"""Preemption: a machine that is about to be taken away says so first.

A single process learns of it by SIGTERM. Where jax.distributed runs, its coordination service
listens instead (to SIGTERM, and on Cloud TPU to the maintenance notice) and names a step that all
processes can reach, so that they save the same one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from typing import NoReturn

import jax
from jax.experimental import multihost_utils

RESTART = 75  # EX_TEMPFAIL of sysexits.h: "try again later"; launchers restart on it
KILLED = 128 + signal.SIGTERM  # what a shell reports for a process that SIGTERM ended


class Preempted(SystemExit):
    """The run saved what it had and makes room; left alone, the process exits with RESTART."""

    def __init__(self, message: str):
        super().__init__(RESTART)
        self.message = message


class PreemptionNotice(contextlib.AbstractContextManager):
    """Within its context, the first SIGTERM asks the run to save and end, the second ends it.

    In a job of several processes the coordination service holds the signal until all know, and does
    not tell whether it was sent to this one: from then on two more SIGTERMs end a process.

    seconds: from the notice until the process is ended (exit status RESTART) even if the
    checkpoint is not finished; those before it are whole. Outside the main thread, where Python
    allows no signal handlers, only jax.distributed's notices are heard.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._noticed = threading.Event()
        self._timer: threading.Timer | None = None
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> PreemptionNotice:
        if not jax.distributed.is_initialized():
            self._listen()
        return self

    def __exit__(self, *exc_info) -> None:
        self._cleanup.close()
        if self._timer is not None:
            self._timer.cancel()

    def reached(self, step: int) -> bool:
        """Whether to save now and end; all processes must ask before every step."""
        if not jax.distributed.is_initialized():
            return self._noticed.is_set()
        if not multihost_utils.reached_preemption_sync_point(step):
            return False
        self._start_timer()
        self._listen()
        return True

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        # Python runs handlers between bytecodes of the main thread, which may be compiling for
        # minutes. The wake-up descriptor is written at once, and a thread of ours reads it.
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        previous = signal.signal(signal.SIGTERM, lambda *_: None)
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._read, args=[reader], name="preemption", daemon=True)
        thread.start()
        self._cleanup.callback(thread.join)  # so that no signal read late starts the timer
        self._cleanup.callback(writer.close)  # in reverse order: this one ends the thread
        self._cleanup.callback(signal.set_wakeup_fd, previous_fd)
        self._cleanup.callback(signal.signal, signal.SIGTERM, previous)

    def _read(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for _ in range(numbers.count(signal.SIGTERM)):
                    if self._noticed.is_set():
                        _exit(KILLED, "a second SIGTERM: exiting at once")
                    self._noticed.set()
                    self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is not None:
            return
        message = f"no checkpoint within {self._seconds:g} s of the notice; the last one is whole"
        self._timer = threading.Timer(self._seconds, _exit, [RESTART, message])
        self._timer.daemon = True
        self._timer.start()


def _exit(status: int, message: str) -> NoReturn:
    """Ends the process whatever its main thread is doing."""
    with contextlib.suppress(OSError):  # nobody listens any more
        print(f"preempted: {message}", file=sys.stderr, flush=True)
    os._exit(status)
