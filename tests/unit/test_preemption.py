"""The notice of preemption arrives whatever the main thread does, on all processes at one step."""

import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from llada2_jax.preemption import KILLED, RESTART, PreemptionNotice

ROOT = Path(__file__).parents[2]


def start(script: str, *arguments: str) -> subprocess.Popen:
    """A process that prints "ready" when it listens."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_ready(process: subprocess.Popen) -> None:
    line = process.stdout.readline()
    assert line == "ready\n", process.stderr.read()


# The main thread sleeps in C, where no Python handler can run: as in a long compilation.
BLOCKED = """
    import ctypes, sys
    from llada2_jax.preemption import PreemptionNotice
    with PreemptionNotice(float(sys.argv[1])) as notice:
        print("ready", flush=True)
        sleep = ctypes.CDLL(None).sleep
        for _ in range(60):
            sleep(1)
"""


def finished(process: subprocess.Popen) -> tuple[int, str]:
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def test_a_second_signal_ends_a_process_that_is_busy():
    process = start(BLOCKED, "100")
    wait_ready(process)
    process.terminate()
    time.sleep(0.5)
    assert process.poll() is None
    process.terminate()
    status, errors = finished(process)
    assert status == KILLED == 143 and "a second SIGTERM" in errors


def test_the_deadline_ends_a_process_that_is_busy():
    process = start(BLOCKED, "0.3")
    wait_ready(process)
    process.terminate()
    status, errors = finished(process)
    assert status == RESTART == 75 and "no checkpoint within 0.3 s" in errors


def test_all_processes_stop_at_the_same_step():
    """jax.distributed spreads the notice that one of them got."""
    script = """
        import sys, time, jax
        jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
        from llada2_jax.preemption import PreemptionNotice
        with PreemptionNotice(100) as notice:
            print("ready", flush=True)
            for step in range(3000):
                if notice.reached(step):
                    break
                time.sleep(0.02)
            print(step, flush=True)
            time.sleep(60)  # as slow storage would take
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start(script, port, str(index)) for index in range(2)]
    for process in processes:
        wait_ready(process)
    processes[1].terminate()
    steps = [int(process.stdout.readline()) for process in processes]
    processes[1].terminate()  # may be the first that this process gets to know of
    time.sleep(0.5)
    assert processes[1].poll() is None
    processes[1].terminate()
    assert finished(processes[1])[0] == KILLED
    processes[0].kill()
    finished(processes[0])
    assert steps[0] == steps[1] < 2999


def test_what_was_there_before_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionNotice(100) as notice:
        assert signal.getsignal(signal.SIGTERM) != before and not notice.reached(0)
        signal.raise_signal(signal.SIGTERM)
        end = time.monotonic() + 60
        while not notice.reached(1):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGTERM) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_nothing_listens_any_more_at_the_end():
    class Slow(PreemptionNotice):
        def _read(self, reader):
            super()._read(reader)
            time.sleep(0.3)

    with Slow(100):
        assert "preemption" in [thread.name for thread in threading.enumerate()]
    assert "preemption" not in [thread.name for thread in threading.enumerate()]


def test_outside_the_main_thread_it_is_deaf_but_works():
    results = []

    def use():
        with PreemptionNotice(100) as notice:
            results.append(notice.reached(0))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert results == [False]


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGWINCH])
def test_other_signals_are_no_notice(number):
    previous = signal.signal(number, lambda *_: None)
    try:
        with PreemptionNotice(100) as notice:
            signal.raise_signal(number)
            time.sleep(0.1)
            assert not notice.reached(0)
    finally:
        signal.signal(number, previous)
