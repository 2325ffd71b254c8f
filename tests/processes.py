"""Jobs of several processes on this machine, which find each other as the environment says."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_job(count: int, arguments: Sequence[str], **env: str) -> list[subprocess.Popen]:
    """`python ARGUMENTS` in `count` processes of one CPU device each; see `finish`."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "PYTHONPATH": str(ROOT),
        **env,
    }
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=env | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list[subprocess.Popen], seconds: float = 300) -> list[tuple[int, str]]:
    """(exit status, output) of each; kills what is left when it takes too long."""
    try:
        outputs = [p.communicate(timeout=seconds)[0] for p in processes]
        return [(p.returncode, out) for p, out in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()
