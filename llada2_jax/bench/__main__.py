"""`python -m llada2_jax.bench {overhead,layers}`."""

from __future__ import annotations

import sys

from llada2_jax.errors import UsageError, exit_status

COMMAND = "python -m llada2_jax.bench"


def main(argv: list[str]) -> int | None:
    # Imported here: `layers` runs where the data's packages are not installed.
    name, *rest = argv or [""]
    if name == "overhead":
        from llada2_jax.bench import overhead

        return overhead.main(rest)
    if name == "layers":
        from llada2_jax.bench import layers

        return layers.main(rest)
    raise UsageError(f"{name!r}: choose overhead or layers; either explains itself with --help")


if __name__ == "__main__":
    sys.exit(exit_status(COMMAND, lambda: main(sys.argv[1:])))
