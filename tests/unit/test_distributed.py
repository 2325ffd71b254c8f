"""All processes of a job end together, whatever ends one of them, and say why."""

import textwrap
import time
from types import SimpleNamespace

import pytest

from llada2_jax import sharding
from llada2_jax.config import DistributedConfig, MeshConfig
from llada2_jax.distributed import VARIABLES, DistributedError, joined
from llada2_jax.preemption import RESTART
from tests.processes import finish, free_port, start_job

HEARTBEAT = 4

# Adds up numbers with the others; FAULT comes over process VICTIM at the fourth step.
JOB = f"""
    import os, signal, sys, time
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from llada2_jax.config import ConfigError, DistributedConfig
    from llada2_jax.distributed import joined

    fault, victim = sys.argv[1], int(sys.argv[2])
    with joined(DistributedConfig(heartbeat_seconds={HEARTBEAT}), (ConfigError,)):
        for step in range(6):
            if step == 3 and jax.process_index() == victim:
                print("at", time.time(), flush=True)
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "mistaken":
                    raise ConfigError("config.x=3 is too much")
                if fault == "defective":
                    raise ZeroDivisionError("division by zero")
            multihost_utils.process_allgather(np.ones(2))
        if fault == "late" and jax.process_index() == victim:
            time.sleep({HEARTBEAT + 2})
        if fault == "leaving":
            sys.exit(75)
    print("done", flush=True)
"""


def run(fault: str, victim: int) -> list[tuple[int, str]]:
    return finish(start_job(2, ["-c", textwrap.dedent(JOB), fault, str(victim)]))


@pytest.mark.slow  # tests/e2e/test_train_processes.py does the same to a training run
def test_when_one_is_killed_the_others_say_which_and_ask_to_be_started_again():
    (status, said), (killed, last) = run("killed", 1)
    seconds = time.time() - float(last.split("at ")[1].split()[0])
    assert (status, killed) == (RESTART, -9)
    assert "the job ends: process 1 of 2 died" in said and "last checkpoint" in said
    assert seconds < HEARTBEAT + 30, "slow, even for a busy machine"


def test_when_one_is_mistaken_all_give_its_reason_and_stay_ended():
    for status, said in run("mistaken", 0):
        assert status == 1
        assert "ConfigError: config.x=3 is too much" in said.split("process 0 of 2 on ")[1], said


@pytest.mark.slow
def test_a_defect_is_not_taken_for_the_death_of_another():
    for status, said in run("defective", 1):
        assert status == 1
        assert "ZeroDivisionError: division by zero" in said.split("process 1 of 2 on ")[1], said


@pytest.mark.parametrize(
    ("fault", "status"), [("late", 0), pytest.param("leaving", RESTART, marks=pytest.mark.slow)]
)
def test_all_leave_together(fault, status):
    for ended, said in run(fault, 0):
        assert ended == status and ("done" in said) == (status == 0), said


def test_one_that_is_left_alone_says_so():
    script = """
        from llada2_jax.config import DistributedConfig
        from llada2_jax.distributed import joined
        with joined(DistributedConfig(start_seconds=1)):
            pass
    """
    ((status, said),) = finish(start_job(1, ["-c", textwrap.dedent(script)], JAX_NUM_PROCESSES="2"))
    assert status == RESTART and "not all processes came" in said and "seconds=1" in said, said


def test_half_an_environment_is_an_error(monkeypatch):
    address, count, index = VARIABLES
    monkeypatch.setenv(address, f"localhost:{free_port()}")
    with pytest.raises(DistributedError, match=f"has {address}, but not {count}, {index}"):
        joined(DistributedConfig()).__enter__()
    monkeypatch.setenv(count, "two")
    monkeypatch.setenv(index, "0")
    with pytest.raises(DistributedError, match="JAX_NUM_PROCESSES='two'.* is not a number"):
        joined(DistributedConfig()).__enter__()
    with joined(DistributedConfig(enabled=False)):
        pass


def test_without_others_nothing_happens(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with joined(DistributedConfig()):
        pass


@pytest.mark.parametrize(
    ("held", "rows"),
    [
        ([slice(4, 6), slice(6, 8)], (4, 5, 6, 7)),
        ([slice(6, 7), slice(2, 3)], (2, 6)),  # as a slice's topology may have it
        ([slice(0, 4), slice(0, 4)], (0, 1, 2, 3)),  # two devices with the same rows
        ([slice(None)], tuple(range(8))),
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(held, rows, monkeypatch):
    indices = {device: (part,) for device, part in enumerate(held)}
    layout = SimpleNamespace(addressable_devices_indices_map=lambda shape: indices)
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: layout)
    assert sharding.local_rows(sharding.make_mesh(MeshConfig()), 8) == rows
