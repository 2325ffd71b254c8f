"""The launchers print what they would run, run it with stand-ins for the cloud's tools, and restart
what should be."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llada2_jax.preemption import KILLED, RESTART

LAUNCH = Path(__file__).parents[2] / "launch"
CONFIG = ("--", "--config=configs/tiny_wsd.py", '--config.data.sources=("a b",)')
TRAIN = "--config=configs/tiny_wsd.py '--config.data.sources=(\"a b\",)'"
TPU = ("tpu_vm.sh", "--name=n", "--type=v5litepod-16", "--zone", "us-west4-a")
GKE = ("gke.sh", "--name=n", "--cluster=c", "--zone=z", "--image=i")


def launch(script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    return subprocess.run(
        [LAUNCH / script, *arguments], env=clean | env, capture_output=True, text=True
    )


def dry_run(script: str, *arguments: str, **env: str) -> list[list[str]]:
    """The commands that are printed, as a shell would read them."""
    result = launch(script, *arguments, "--dry-run", *CONFIG, **env)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


def test_the_scripts_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run(
        [shellcheck, "-x", *sorted(LAUNCH.glob("*.sh"))], cwd=LAUNCH.parent, capture_output=True
    )
    assert result.returncode == 0, result.stdout.decode()


@pytest.mark.parametrize("script", ["train.sh", "tpu_vm.sh", "gke.sh", "slurm.sh"])
def test_help_and_what_is_wrong(script):
    shown = launch(script, "--help")
    assert shown.returncode == 0 and shown.stdout.startswith(f"usage: launch/{script}")
    for arguments, error in [
        (["--nonsense"], "there is no option --nonsense"),
        (["nonsense"], "'nonsense' is not an option"),
        (["--dry-run", "--name"], "--name needs a value" if script != "train.sh" else "no option"),
    ]:
        result = launch(script, *arguments, *CONFIG)
        assert result.returncode == 2 and error in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["train.sh"], "say what to train"),
        (["tpu_vm.sh", "--name=n", *CONFIG], "--type is missing"),
        ([*TPU[:2], "--type=v9-4", "--zone=z", *CONFIG], "v9-4 is not one of"),
        ([*TPU, "--restarts=many", *CONFIG], "--restarts=many is not a number"),
        ([*GKE, "--type=v6e-8", "--name=N_1", *CONFIG], "--name=N_1: lower-case"),
        (["slurm.sh", "--nodes=2", "--gpus=all", *CONFIG], "--gpus=all is not a number"),
    ],
)
def test_a_mistake_is_named(arguments, error):
    result = launch(*arguments)
    assert result.returncode == 2 and error in result.stderr and not result.stdout


def test_train_is_the_command_itself():
    assert dry_run("train.sh") == [["llada2", "train", *CONFIG[1:]]]
    ((env, flags, memory, *command),) = dry_run("train.sh", "--gpu", XLA_FLAGS="--mine=1")
    assert env == "env" and command == ["llada2", "train", *CONFIG[1:]]
    assert flags.startswith("XLA_FLAGS=--xla_gpu") and flags.endswith(" --mine=1")
    assert memory == "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9"


def test_jaxlib_knows_the_flags():
    ((_, flags, *_),) = dry_run("train.sh", "--gpu", XLA_FLAGS="")
    name, _, value = flags.partition("=")
    known = subprocess.run(
        [sys.executable, "-c", "import jax; jax.devices()"],
        env=os.environ | {name: value, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert known.returncode == 0, known.stderr.decode()


def test_a_tpu_slice():
    create, archive, copy, install, train, delete = dry_run(
        *TPU, "--spot", "--delete", "--project=p", "--setup=mount /data", TMPDIR="/tmp"
    )
    where = ["--zone=us-west4-a", "--project=p"]
    assert create == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "n", *where, "--node-id=n"),
        *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"),
    ]
    assert archive == ["git", "archive", "--output=/tmp/llada2-n.tar.gz", "HEAD"]
    assert copy[3:] == [
        *("tpu-vm", "scp", "/tmp/llada2-n.tar.gz", "n:llada2.tar.gz", *where, "--worker=all"),
    ]
    assert install[4:-1] == train[4:-1] == ["ssh", "n", *where, "--worker=all"]
    assert install[-1].startswith("--command=mount /data && ") and ".[tpu]" in install[-1]
    assert f" launch/train.sh -- {TRAIN} >> ~/llada2.log 2>&1 & " in train[-1]
    assert delete[4:] == ["delete", "n", *where, "--force", "--quiet"]
    plain = dry_run(*TPU)
    assert "--spot" not in plain[0] and len(plain) == 5


def test_gke():
    ((*command, last),) = dry_run(*GKE, "--type=v6e-64", "--slices=2", "--restarts=3")
    assert command == [
        *("xpk", "workload", "create", "--workload=n", "--cluster=c", "--device-type=v6e-64"),
        *("--zone=z", "--num-slices=2", "--docker-image=i", "--max-restarts=3"),
        f"--restart-on-exit-codes={RESTART},134,137,{KILLED}",
        "--termination-grace-period-seconds=60",
    ]
    assert last == f"--command=launch/train.sh -- {TRAIN}"
    ((*command, last),) = dry_run(*GKE, "--type=h100-mega-80gb-8", "--slices=2")
    assert "--num-nodes=2" in command and last == f"--command=launch/train.sh --gpu -- {TRAIN}"


def test_slurm():
    arguments = ["--nodes=2", "--gpus=4", "--time=10:00:00"]
    submit, step = dry_run("slurm.sh", *arguments)
    script = str(LAUNCH / "slurm.sh")
    assert submit == [
        *("sbatch", "--job-name=llada2", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4"),
        *("--exclusive", "--requeue", "--signal=TERM@120", "--open-mode=append"),
        *("--output=%x-%j.log", f"--export=ALL,LLADA2_ROOT={LAUNCH.parent}", "--time=10:00:00"),
        *(script, *arguments, *CONFIG),
    ]
    assert step == [
        *("srun", "--kill-on-bad-exit=1", "--label", "launch/train.sh", "--gpu", *CONFIG),
    ]


def stand_in(folder: Path, name: str, script: str) -> None:
    """A command that notes its arguments and does what `script` says."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> {folder}/calls\n{script}\n')
    path.chmod(0o755)


def with_stand_ins(folder: Path, **env: str) -> dict[str, str]:
    return {"PATH": f"{folder}:{os.environ['PATH']}", "TMPDIR": str(folder), **env}


@pytest.mark.parametrize(("status", "requeued"), [(0, 0), (1, 0), (RESTART, 1), (134, 1)])
def test_slurm_queues_again_what_asks_for_it(tmp_path, status, requeued):
    stand_in(tmp_path, "srun", f"exit {status}")
    stand_in(tmp_path, "scontrol", "")
    result = launch(
        *("slurm.sh", "--nodes=1", *CONFIG), **with_stand_ins(tmp_path, SLURM_JOB_ID="7")
    )
    calls = (tmp_path / "calls").read_text()
    assert calls.count("scontrol requeue 7") == requeued, result.stderr
    assert result.returncode == (0 if requeued else status)


# The slice's states are the lines of `states`; runs end as those of `ends` say.
GCLOUD = """\
next() { head -1 "$1"; sed -i 1d "$1"; }
case "$*" in
  *describe*) next {folder}/states ;;
  *launch/train.sh*) exit "$(next {folder}/ends)" ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "ends", "status", "created", "deleted"),
    [
        (["", "WAITING_FOR_RESOURCES", "ACTIVE"], [0], 0, 1, 0),
        (["ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE"], [RESTART, 0], 0, 0, 0),
        # Preempted while it runs: the connection breaks, the slice goes, a new one is queued.
        (["ACTIVE", "ACTIVE", "SUSPENDED", "PROVISIONING", "ACTIVE"], [255, 0], 0, 1, 1),
        (["SUSPENDING", "SUSPENDING", "SUSPENDED", "ACTIVE"], [0], 0, 1, 1),
        (["ACTIVE", "ACTIVE"], [1], 1, 0, 0),
        (["ACTIVE", "ACTIVE"] * 3, [RESTART] * 3, RESTART, 0, 0),
        (["", "FAILED"], [], 2, 1, 0),
    ],
)
def test_a_tpu_slice_comes_back(tmp_path, states, ends, status, created, deleted):
    (tmp_path / "states").write_text("".join(f"{x}\n" for x in states))
    (tmp_path / "ends").write_text("".join(f"{x}\n" for x in ends))
    stand_in(tmp_path, "gcloud", GCLOUD.replace("{folder}", str(tmp_path)))
    for tool in ("git", "sleep"):
        stand_in(tmp_path, tool, "")
    result = launch(*TPU, "--restarts=2", *CONFIG, **with_stand_ins(tmp_path))
    calls = (tmp_path / "calls").read_text()
    assert result.returncode == status, result.stderr
    assert calls.count("launch/train.sh") == len(ends)
    assert (calls.count(" create n"), calls.count(" delete n")) == (created, deleted)
    assert not (tmp_path / "states").read_text() and not (tmp_path / "ends").read_text()


def test_on_a_host_the_status_is_the_runs_and_a_second_start_waits(tmp_path):
    """What `ssh --command` gets, in a home of its own."""
    command = dry_run(*TPU)[-1][-1].removeprefix("--command=")
    (tmp_path / "llada2/launch").mkdir(parents=True)
    stand_in(tmp_path / "llada2/launch", "train.sh", "sleep 1; echo it runs; exit 75")
    runs = [
        subprocess.Popen(
            ["bash", "-c", command],
            env=os.environ | {"HOME": str(tmp_path)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [RESTART, RESTART]
    assert sorted("it still runs here" in output for output in outputs) == [False, True]
    assert (tmp_path / "llada2.log").read_text().count("it runs") == 2
    assert all("it runs" in output for output in outputs)


def test_a_tpu_slice_that_cannot_be_installed_is_not_trained_on(tmp_path):
    (tmp_path / "states").write_text("ACTIVE\nACTIVE\n")
    failing = GCLOUD.replace("{folder}", str(tmp_path)) + 'case "$*" in *scp*) exit 3 ;; esac\n'
    stand_in(tmp_path, "gcloud", failing)
    result = launch(*TPU, *CONFIG, **with_stand_ins(tmp_path))
    assert result.returncode == 3 and "launch/train.sh" not in (tmp_path / "calls").read_text()
