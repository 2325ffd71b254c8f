"""`python -m pallas_kernels.bench {pairs,memory,time}`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pallas_kernels.aot import TOPOLOGIES
from pallas_kernels.shapes import ATTENTION
from pallas_kernels.tables import print_records


def _documents(text: str) -> str | int:
    return text if text == "none" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description="Block-diffusion attention of a training row (both halves, 2 x L positions), "
        "every backend beside what else one could call.",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--json", action="store_true", help="records instead of a table")
        return added

    pairs = command(
        "pairs",
        "Computed query-key pairs over allowed ones, forward / backward, from the schedules that "
        "the kernels execute at their default tiles. Runs anywhere, always gives the same numbers.",
    )
    pairs.add_argument("--lengths", nargs="+", type=int, default=[4096], metavar="L",
                       help="clean tokens of a row (default: 4096)")  # fmt: skip
    pairs.add_argument("--blocks", nargs="+", type=int, default=[4, 32, 64], metavar="B",
                       help="tokens of a block (default: 4 32 64)")  # fmt: skip
    pairs.add_argument("--documents", nargs="+", type=_documents, default=["none", 2048, 1024, 512],
                       metavar="MEAN", help="mean lengths of documents, or none")  # fmt: skip
    pairs.add_argument("--anchor", default="document", choices=["document", "row"],
                       help="what blocks are cut on (default: document)")  # fmt: skip
    pairs.add_argument("--rows", type=int, default=16, help="drawn for each case (default: 16)")

    memory = command(
        "memory",
        "Bytes of temporaries of forward and backward, from the TPU compiler; nothing in a kernel "
        "may grow with L squared. Needs libtpu (`make aot` fetches it), no TPU.",
    )
    memory.add_argument("--chip", default="v5e", choices=TOPOLOGIES)
    memory.add_argument("--model", default="mini", choices=ATTENTION, help="heads of")
    memory.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192, 16384], metavar="L")
    memory.add_argument("--backends", nargs="+", default=["tpu", "splash", "xla"],
                        choices=["tpu", "splash", "xla"])  # fmt: skip

    time = command(
        "time",
        "Time and FLOP/s on allowed pairs, against the chip's bf16 peak and side by side: our "
        "kernels, tokamax, jax's splash, cuDNN with a dense bias, PyTorch's FlexAttention, "
        "whichever run here. Medians after warm-up, in one process. Without an accelerator: the "
        "XLA path and the oracle, at a toy shape.",
    )
    time.add_argument("--model", choices=ATTENTION, help="heads of (default: mini; CPU: tiny)")
    time.add_argument("--length", type=int, metavar="L", help="default: 4096; CPU: 256")
    time.add_argument("--rows", type=int, default=4, help="default: 4")
    time.add_argument("--block", type=int, default=32, metavar="B", help="default: 32")
    time.add_argument("--documents", nargs="+", type=_documents, default=["none", 1024],
                      metavar="MEAN", help="mean lengths of documents, or none")  # fmt: skip
    time.add_argument("--repeats", type=int, default=20, help="default: 20")
    time.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these contenders")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one benchmark and prints it."""
    parser = _parser()
    args = parser.parse_args(argv)
    # Imported here: --help needs no kernels, and `time` chooses how memory is allocated.
    if args.command == "pairs":
        from pallas_kernels.bench import pairs

        records = pairs.measure(
            args.lengths, args.blocks, args.documents, anchor=args.anchor, rows=args.rows
        )
        title = "Computed pairs / allowed pairs, forward / backward"
        caption = "To reach at L=4096, block 32: " + ", ".join(
            f"{limit:.2f} at {kind}" for kind, limit in pairs.TARGETS.items()
        )
    elif args.command == "memory":
        from pallas_kernels.bench import memory

        records = memory.measure(args.chip, args.model, args.lengths, args.backends)
        title = f"Temporaries, forward + backward, one row, {args.model} on {args.chip}"
        caption = "growth: exponent of L since the length before"
    else:
        from pallas_kernels.bench import timing

        try:
            contenders = timing.contenders_here(args.only)
        except ValueError as error:
            parser.error(f"--only: {error}")
        records, title, caption = timing.measure(args, contenders)
    print_records(records, as_json=args.json, title=title, caption=caption)


if __name__ == "__main__":
    sys.exit(main())
