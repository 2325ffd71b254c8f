"""`llada2 <command>`: the one entry point."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from llada2_jax.errors import EXIT_STATUS, exit_status
from llada2_jax.files import raise_open_files_limit

# command -> (module with a main(argv), what it does); imported only when called, so that
# `llada2 --help` answers at once.
COMMANDS = {
    "quickstart": ("llada2_jax.quickstart", "the whole conversion on this machine, with a report"),
    "train": ("llada2_jax.train", "train from a config: AR, block diffusion, WSD conversion"),
    "plan": ("llada2_jax.plan", "memory, mesh and speed of a run on a TPU slice, without one"),
    "posttrain": ("llada2_jax.posttrain", "SFT, CAP and DPO on checkable tasks, with a report"),
    "data": ("llada2_jax.data_cli", "prepare sources for training, inspect rows, measure loading"),
    "generate": ("llada2_jax.generate", "complete prompts with the threshold sampler"),
    "score": ("llada2_jax.score", "bits per byte of texts, with its standard error"),
    "convert": ("llada2_jax.convert", "Hugging Face safetensors <-> Orbax, streaming"),
    "verify": ("llada2_jax.verify", "prove a port against golden numbers of the released model"),
    "merge": ("llada2_jax.merge", "average the best checkpoints of a run"),
    "runs": ("llada2_jax.runs", "compare runs: a table and a plot"),
}


def usage() -> str:
    """The text of `llada2 --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(
        ["usage: llada2 <command> [options]", "", "commands:", *lines, ""]
        + ["llada2 <command> --help says what a command takes; llada2 --version says its own.", ""]
        + [EXIT_STATUS.rstrip()]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the process's exit status, see `errors.EXIT_STATUS`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        from llada2_jax import __version__

        print(__version__)
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        print(f"llada2: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    raise_open_files_limit()  # of shards, checkpoints and workers' pipes there may be many
    # What was compiled once is read from disk the next time; jax reads this when it is imported.
    cache = Path.home() / ".cache" / "llada2_jax" / "xla"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    return exit_status(
        f"llada2 {name}", lambda: importlib.import_module(COMMANDS[name][0]).main(rest)
    )


if __name__ == "__main__":
    sys.exit(main())
