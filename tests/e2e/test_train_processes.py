"""Training by several processes, for real: over loopback, each with a device of its own."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest

from llada2_jax import cli
from llada2_jax.checkpoint import flatten
from llada2_jax.hub import load_model
from llada2_jax.metrics import read_metrics
from llada2_jax.preemption import RESTART
from llada2_jax.run_folder import read_starts
from tests.processes import finish, start_job
from tests.tiny_run import write_corpus

# ml_collections loads config files in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)

STEPS, HEARTBEAT, PATIENCE = 40, 6, 600
CONFIG = f"""\
import dataclasses
from pathlib import Path

import ml_collections

from llada2_jax.config import model_dict
from tests.helpers import config as tiny
from tests.tiny_run import VOCAB
from tests.torture import life


def get_config():
    folder = Path(__file__).parent
    cfg = life.make_config(folder, Path("not said"))
    config = ml_collections.ConfigDict(dataclasses.asdict(cfg))
    model = model_dict(tiny(vocab_size=VOCAB, num_layers=1))  # one dense layer compiles fast
    config.model = {{k: v for k, v in model.items() if v is not None}}
    config.init.checkpoint = ""
    config.data.tokenizer = str(folder / "tokenizer")
    config.optimizer.expert_bias_rate = 0.0
    config.data.rows_per_step = 4
    config.schedule.decay_tokens = {STEPS} * 4 * life.ROW
    config.eval.rows = 4
    config.checkpoint.every_tokens = 8 * 4 * life.ROW
    config.distributed.heartbeat_seconds = {HEARTBEAT}
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A config file with its data and starting model, and what one process makes of it: `alone`."""
    folder = tmp_path_factory.mktemp("processes")
    write_corpus(folder)
    (folder / "config.py").write_text(CONFIG)
    assert cli.main(arguments(folder, "alone")) == 0
    return folder


def arguments(folder: Path, workdir: str) -> list[str]:
    return ["train", f"--config={folder / 'config.py'}", f"--workdir={folder / workdir}"]


def start(folder: Path, workdir: str, count: int):
    return start_job(count, ["-m", "llada2_jax.cli", *arguments(folder, workdir)])


def wait_for_step(workdir: Path, step: int, processes) -> None:
    deadline = time.monotonic() + PATIENCE
    while all(line["step"] < step for line in read_metrics(workdir, "train")):
        ended = [p.communicate()[0] for p in processes if p.poll() is not None]
        assert not ended and time.monotonic() < deadline, ended
        time.sleep(0.01)


def assert_as_alone(folder: Path, workdir: str) -> None:
    """Every row was seen at its step, as often; sums may have been added in another order."""
    lines, alone = (read_metrics(folder / w, "train") for w in (workdir, "alone"))
    assert [x["step"] for x in lines] == list(range(1, STEPS + 1))
    assert [x["data_checksum"] for x in lines] == [x["data_checksum"] for x in alone]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(
            [x[name] for x in lines], [x[name] for x in alone], rtol=2e-4, err_msg=name
        )
    ends = [
        flatten(load_model(folder / w / f"checkpoints/{STEPS}").params) for w in (workdir, "alone")
    ]
    for name, leaf in ends[0].items():
        np.testing.assert_allclose(leaf, ends[1][name], atol=2e-4, err_msg=name)


def test_two_train_as_one_until_one_is_killed_and_one_process_goes_on(folder):
    processes = start(folder, "killed", 2)
    wait_for_step(folder / "killed", 12, processes)
    processes[1].send_signal(signal.SIGKILL)
    before = time.monotonic()
    (status, said), (killed, _) = finish(processes, PATIENCE)
    assert (status, killed) == (RESTART, -signal.SIGKILL), said
    assert "the job ends: process 1 of 2 died" in said
    assert time.monotonic() - before < HEARTBEAT + 30, "slow, even for a busy machine"
    # Both have written the checkpoint: each its own part of the parameters.
    written = (folder / "killed/checkpoints/8/params").glob("ocdbt.process_*")
    assert sorted(path.name for path in written) == ["ocdbt.process_0", "ocdbt.process_1"]
    assert cli.main(arguments(folder, "killed")) == 0
    starts = read_starts(folder / "killed")
    assert [(x["processes"], x["mesh"]["fsdp"]) for x in starts] == [(2, 2), (1, 1)]
    assert_as_alone(folder, "killed")


@pytest.mark.slow
def test_two_processes_train_as_one_to_the_end(folder):
    for status, said in finish(start(folder, "two", 2), PATIENCE):
        assert status == 0, said
    assert_as_alone(folder, "two")


@pytest.mark.slow
def test_after_a_notice_to_one_both_save_the_same_step_and_four_go_on(folder):
    processes = start(folder, "noticed", 2)
    wait_for_step(folder / "noticed", 4, processes)
    processes[1].terminate()
    for status, said in finish(processes, PATIENCE):
        assert status == RESTART, said
    for status, said in finish(start(folder, "noticed", 4), PATIENCE):
        assert status == 0, said
    starts = read_starts(folder / "noticed")
    assert [x["processes"] for x in starts] == [2, 4] and starts[1]["step"] >= 4
    assert_as_alone(folder, "noticed")


@pytest.mark.slow
def test_a_mistake_of_one_ends_all_with_its_reason(folder):
    """Only process 0 reads the run's config.json."""
    argv = ["-m", "llada2_jax.cli", *arguments(folder, "alone"), "--config.seed=7"]
    for status, said in finish(start_job(2, argv), PATIENCE):
        assert status == 1 and "holds a run with another config.seed" in said, said
