"""The command line of what runs a config: --config=FILE and --config.FIELD=VALUE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from llada2_jax.config import ConfigError
from llada2_jax.errors import UsageError
from llada2_jax.retry import describe


def parse_flags(
    command: str,
    argv: list[str],
    *,
    config: str | None = None,
    switches: Mapping[str, tuple[bool, str]] | None = None,
    **texts: str,
) -> flags.FlagValues:
    """The flags of a command that runs a config: --config (by default the file `config`) with its
    overrides, --workdir, which goes into the config, --print_config, `texts`: {name: help}, and
    `switches`, which take no value: {name: (default, help)}.

    Raises: UsageError; ConfigError for a config file that is not there.
    """
    named = any(argument.lstrip("-").partition("=")[0] == "config" for argument in argv)
    if config is not None and not named and not Path(config).is_file():
        raise ConfigError(
            f"{config} is not here: run this in a clone of the repository, or give --config=FILE"
        )
    values = flags.FlagValues()
    arguments = [command, *argv]  # not sys.argv, which is another caller's
    flags.DEFINE_boolean("print_config", False, "print the config and stop", flag_values=values)
    for name, (default, about) in (switches or {}).items():
        flags.DEFINE_boolean(name, default, about, flag_values=values)
    for name, about in {"workdir": "overrides config.workdir", **texts}.items():
        flags.DEFINE_string(name, "", about, flag_values=values)
    try:
        config_flags.DEFINE_config_file("config", config, flag_values=values, sys_argv=arguments)
        _, *rest = values(arguments)
        if values.config is not None:
            values.config.keys()  # a file that could not be read fails at the first use
    except flags.Error as error:
        raise UsageError(str(error)) from error
    except OSError as error:  # of a config file; its message has many lines
        raise ConfigError(f"--config: {describe(error)}") from error
    except AttributeError as error:  # how ml_collections says that a field does not exist
        reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error
        raise UsageError(f"the config has no field {reason}") from error
    if rest:
        raise UsageError(f"{rest[0]!r} is no option: write --config=FILE, --config.FIELD=VALUE")
    if values.config is None:
        raise UsageError("--config is missing: name a file of configs/")
    if values.workdir:
        values.config.workdir = values.workdir
    return values
