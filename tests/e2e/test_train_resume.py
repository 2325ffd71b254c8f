"""A killed training run goes on as if nothing had happened; one that cannot go on says so."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from llada2_jax import cli
from llada2_jax.checkpoint import ModelBundle, save_model
from llada2_jax.config import ConfigError, load_config
from llada2_jax.config_check import validate
from llada2_jax.hub import load_model
from llada2_jax.metrics import read_metrics
from llada2_jax.train import TrainingStopped, train
from llada2_jax.types import SpecialTokens
from tests.helpers import assert_same_params, one_layer, random_params
from tests.tiny_run import VOCAB, write_corpus

# ml_collections loads config files in a way that Python 3.12 deprecates.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)

STEPS = 24
PATIENCE = 900  # seconds, on a machine that has better to do
CLOCKS = {"seconds", "tokens_per_second", "input_wait_fraction"}

# Three objectives in 24 steps of 64 tokens; a checkpoint every 4 steps and where a phase ends.
CONFIG = """\
from llada2_jax.config import default_config, model_dict
from tests.helpers import one_layer


def get_config():
    config = default_config()
    config.workdir = {workdir!r}
    model = model_dict(one_layer(vocab_size={vocab}))
    with config.unlocked():
        config.model = {{k: v for k, v in model.items() if v is not None}}
    config.data.source = {source!r}
    config.data.tokenizer = {tokenizer!r}
    config.data.row_length = 32
    config.data.rows_per_step = 2
    config.schedule.ar_tokens = 6 * 64
    config.schedule.warmup_blocks = (1, 4)
    config.schedule.warmup_tokens = 8 * 64
    config.schedule.stable_tokens = 6 * 64
    config.schedule.decay_blocks = (4,)
    config.schedule.decay_tokens = 4 * 64
    config.embedding_noise.sigma = 0.1
    config.embedding_noise.tokens = 6 * 64
    config.optimizer.expert_bias_rate = 0.01
    config.eval.rows = 4
    config.eval.rate_buckets = 0
    config.checkpoint.every_tokens = 4 * 64
    config.runtime.dtype = "float32"
    config.log_every = 1
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A corpus with files in both splits, its tokenizer, and the config file."""
    folder = tmp_path_factory.mktemp("train")
    write_corpus(folder)
    text = CONFIG.format(
        workdir=str(folder / "undisturbed"),
        vocab=VOCAB,
        source=str(folder / "corpus"),
        tokenizer=str(folder / "tokenizer"),
    )
    (folder / "config.py").write_text(text)
    return folder


def start(folder: Path, workdir: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "llada2_jax.cli", "train", f"--config={folder / 'config.py'}"]
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    command.append(f"--workdir={folder / workdir}")
    with (folder / f"{workdir}.log").open("a") as log:
        return subprocess.Popen(command, cwd=root, env=env, stdout=log, stderr=log)


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in read_metrics(workdir, "train")), default=0)


def saved_steps(workdir: Path) -> list[int]:
    return [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]


def numbers(workdir: Path) -> list[dict]:
    """All metrics but the times, as written: floats in JSON are exact."""
    return [{k: v for k, v in m.items() if k not in CLOCKS} for m in read_metrics(workdir)]


def kill_after(folder: Path, workdir: str, step: int) -> None:
    """Starts the run and kills it with signal 9 when it has logged a step beyond `step`."""
    process, deadline = start(folder, workdir), time.monotonic() + PATIENCE
    try:
        while last_step(folder / workdir) <= step:
            log = folder / f"{workdir}.log"
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"no step {step} yet: {log.read_text()}"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL


def test_a_killed_run_resumes_with_bit_equal_losses(folder):
    assert cli.main(["train", f"--config={folder / 'config.py'}"]) == 0
    undisturbed, killed = folder / "undisturbed", folder / "killed"
    steps = [line["step"] for line in read_metrics(undisturbed, "train")]
    assert steps == list(range(1, STEPS + 1))
    phases = {line["phase"] for line in read_metrics(undisturbed, "train")}
    assert phases == {"ar", "warmup-1", "warmup-4", "stable-32", "decay-4"}

    kill_after(folder, "killed", 8)
    saved, seen = max(saved_steps(killed)), last_step(killed)
    assert 4 <= saved <= seen < STEPS  # written in the background: some steps behind
    # What a kill in the middle of a write leaves behind: half a line, of a step that is run again.
    with (killed / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {seen + 1}, "kind": "train", "lo')

    resumed = start(folder, "killed")
    log = folder / "killed.log"
    assert resumed.wait(timeout=PATIENCE) == 0, log.read_text()
    assert f"after step {saved} of {STEPS}" in log.read_text()
    assert numbers(killed) == numbers(undisturbed)
    ends = [load_model(w / f"checkpoints/{STEPS}").params for w in (undisturbed, killed)]
    assert_same_params(*ends)

    # A run that is complete is left alone, and one with another config is not taken over.
    assert cli.main(["train", f"--config={folder / 'config.py'}", f"--workdir={killed}"]) == 0
    assert numbers(killed) == numbers(undisturbed)

    # Nor does it go on with other documents than it began with.
    document = next((folder / "corpus").iterdir())
    text = document.read_text()
    document.write_text(text.replace("return", "yield"))
    with pytest.raises(ConfigError, match="another corpus than config.data now is"):
        train(validate(load_config(folder / "config.py")))
    document.write_text(text)


def test_another_config_does_not_take_over_a_run(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"seed": 5}))
    argv = ["train", f"--config={folder / 'config.py'}", f"--workdir={tmp_path}"]
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert "another config.seed: 5 there, 0 now" in error and "Traceback" not in error


def test_steps_that_are_not_finite_are_skipped_and_end_the_run(folder, tmp_path, capsys):
    """One NaN in the embedding of a byte that every file holds: no step can be taken."""
    cfg = one_layer(vocab_size=VOCAB)
    params = random_params(cfg, 0, 0.1)
    table = np.asarray(params["embedding"][...])
    params["embedding"][...] = jnp.asarray(np.where(np.arange(VOCAB)[:, None] >= 6, np.nan, table))
    files = {p.name: p.read_text() for p in (folder / "tokenizer").iterdir()}
    special = SpecialTokens(mask=0, eos=1, pad=1, bos=2)
    save_model(tmp_path / "parent", ModelBundle(cfg, params, special, tokenizer_files=files))
    config = load_config(folder / "config.py", workdir=str(tmp_path / "run"))
    with config.unlocked():
        config.model = {}
    config.init.checkpoint = str(tmp_path / "parent")
    config.data.tokenizer = ""  # the parent's own
    config.optimizer.max_consecutive_skips = 3
    with pytest.raises(TrainingStopped, match=r"3 steps in a row were skipped.*\(step 3, phase ar"):
        train(validate(config))
    lines = read_metrics(tmp_path / "run", "train")
    assert [(m["step"], m["skipped"], m["skipped_in_a_row"]) for m in lines] == [
        (1, 1, 1),
        (2, 2, 2),
        (3, 3, 3),
    ]
    assert all(np.isnan(m["loss"]) for m in lines)
    assert not saved_steps(tmp_path / "run")
