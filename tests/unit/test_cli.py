"""The entry point: help, exit status, and that every command named has a main."""

import importlib
from pathlib import Path

import pytest

from llada2_jax import cli
from llada2_jax.errors import EXIT_STATUS
from tests.helpers import exit_status

NOWHERE = "/nowhere/at/all"
TRAIN = f"--config={Path(__file__).parents[2]}/configs/tiny_ar.py"

PROMPT = ["--prompt", "a"]

# command -> a command line that makes no sense, and one that asks for what is not there.
ERRORS = {
    "quickstart": ([TRAIN, "--config.surprise=1"], [f"--config={NOWHERE}.py"]),
    "posttrain": ([TRAIN, "--config.surprise=1"], [f"--config={NOWHERE}.py"]),
    "train": ([TRAIN, "surprise"], [TRAIN, "--config.data.row_length=0"]),
    "data": (["prepare", "a", "b"], ["inspect", NOWHERE]),
    "generate": (["--checkpoint", NOWHERE, "--top-p", "2"], ["--checkpoint", NOWHERE, *PROMPT]),
    "score": (["--text", "a"], ["--checkpoint", NOWHERE, "--text", "a"]),
    "convert": (["a", "b", "--to", "onnx"], [NOWHERE, "b"]),
    "verify": ([], [NOWHERE]),
    "merge": ([NOWHERE], [NOWHERE, "--out", "b"]),
    "plan": (
        [TRAIN, "--slice=v99-1", "surprise"],
        [TRAIN, "--config.data.row_length=0", "--slice=v5e-4"],
    ),
    "runs": (["surprise"], ["compare", NOWHERE, NOWHERE]),
}

# ml_collections loads config files in a way that Python 3.12 deprecates.
load_module = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS) and EXIT_STATUS.strip() in printed


def test_unknown_command_is_named(capsys):
    assert cli.main(["evaporate"]) == 2
    assert "'evaporate'" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name][0])
    try:
        status = module.main(["--help"])
    except SystemExit as stop:  # argparse's way
        status = stop.code
    assert status == 0
    printed = capsys.readouterr().out
    assert f"llada2 {name}" in printed and EXIT_STATUS.strip() in printed


@pytest.mark.parametrize("name", ["quickstart", "posttrain"])
def test_a_default_config_that_is_not_here_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_status(name, "--workdir=x") == 1
    error = f"llada2 {name}: error: configs/{name}.py is not here: run this in a clone of the "
    assert capsys.readouterr().err == error + "repository, or give --config=FILE\n"


def test_the_help_of_train_names_every_stage_and_how_to_choose_a_model(capsys):
    assert exit_status("train", "--help") == 0
    printed = capsys.readouterr().out
    assert "(SFT, CAP, DPO)" in printed and "--config=configs/dpo.py:mini" in printed


@load_module
@pytest.mark.parametrize("expected", [2, 1])
@pytest.mark.parametrize("name", cli.COMMANDS)
def test_mistakes_end_with_one_status_in_every_command(name, expected, capsys):
    assert exit_status(name, *ERRORS[name][expected == 1]) == expected
    error = capsys.readouterr().err
    last = error.rstrip().splitlines()[-1]
    assert last.startswith(f"llada2 {name}") and ": error: " in last and "Traceback" not in error
    assert expected == 2 or "nowhere" in last or "row_length" in last
