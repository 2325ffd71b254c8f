"""The entry point: help, unknown commands, and that every command named has a main."""

import importlib

import pytest

from llada2_jax import cli


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


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
    assert f"llada2 {name}" in capsys.readouterr().out
