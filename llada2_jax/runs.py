"""`llada2 runs compare A B`: how runs differ, and what came of it, as a table and a plot."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llada2_jax.errors import EXIT_STATUS
from llada2_jax.metrics import read_metrics
from llada2_jax.run_folder import flat, read_config, read_starts

EXAMPLES = f"""
examples:
  llada2 runs compare runs/abrupt runs/stepwise
  llada2 runs compare runs/a runs/b runs/c --plot comparison.png

Rows that are the same in all runs are left out of the config and the environment. "Same data up to
step" and "same losses up to step" compare each run with the first one, bit by bit.

{EXIT_STATUS}"""

Table = dict[str, list[Any]]  # row -> a cell a run; None: it has none


def compare(workdirs: Sequence[Path]) -> dict[str, Table]:
    """{section: table} of what the run folders tell. Raises: ConfigError for what is no run."""
    configs = [flat(read_config(workdir)) for workdir in workdirs]
    environments = [_environment(workdir) for workdir in workdirs]
    lines = [read_metrics(workdir) for workdir in workdirs]
    results = [
        _results(own, workdir) | _agreement(lines[0], own)
        for own, workdir in zip(lines, workdirs, strict=True)
    ]
    return {
        "config": _differing(_table(configs)),
        "environment": _differing(_table(environments)),
        "result": _table(results),
    }


def _table(columns: Sequence[Mapping[str, Any]]) -> Table:
    rows = dict.fromkeys(itertools.chain.from_iterable(columns))
    return {row: [column.get(row) for column in columns] for row in rows}


def _differing(table: Table) -> Table:
    return {row: cells for row, cells in table.items() if any(c != cells[0] for c in cells[1:])}


def _environment(workdir: Path) -> dict[str, Any]:
    """Of the newest start."""
    starts = read_starts(workdir)
    unique = ("step", "time", "command")
    return flat({k: v for k, v in starts[-1].items() if k not in unique}) if starts else {}


def _results(lines: Sequence[Mapping[str, Any]], workdir: Path) -> dict[str, Any]:
    train = [line for line in lines if line["kind"] == "train"]
    result: dict[str, Any] = {
        "starts": len(read_starts(workdir)),
        "steps": max((line["step"] for line in train), default=0),
        "tokens": int(max(_values(train, "tokens"), default=0)),
        "training loss, last tenth": _mean(train[-max(1, len(train) // 10) :], "loss"),
        "steps skipped": train[-1].get("skipped") if train else None,
        "rollbacks": sum(line["kind"] == "rollback" for line in lines),
        "tokens/s, median": _median(train, "tokens_per_second"),
        "input wait, median": _median(train, "input_wait_fraction"),
    }
    for kind, scores in _validation(lines).items():
        finite = [value for _, value in scores if math.isfinite(value)]
        result[f"best {kind}"] = min(finite, default=None)
        result[f"last {kind}"] = scores[-1][1]
    return result


def _validation(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """{what was measured: [(tokens, bits per byte, or the loss of what has none: preferences)]};
    only equal kinds compare."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        if line["kind"] in ("train", "rollback"):
            continue
        name = "bits_per_byte" if "bits_per_byte" in line else "loss"
        if _has(line, name) and _has(line, "tokens"):
            what = str(line.get("measured", line["kind"]))  # older runs wrote it as the kind
            label = f"{'bits/byte' if name == 'bits_per_byte' else name}, {what}"
            found.setdefault(label, []).append((line["tokens"], line[name]))
    return found


def _values(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if _has(line, name)]


def _has(line: Mapping[str, Any], name: str) -> bool:
    return isinstance(line.get(name), int | float)


def _mean(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _values(lines, name)
    return statistics.fmean(values) if values else None


def _median(lines: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = _values(lines, name)
    return statistics.median(values) if values else None


def _agreement(first: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> dict:
    return {
        "same data up to step": _same_until(first, own, "data_checksum"),
        "same losses up to step": _same_until(first, own, "loss"),
    }


def _same_until(
    first: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]], name: str
) -> int:
    """The last step up to which both runs logged equal values; not a number is one."""
    a, b = (
        {x["step"]: json.dumps(x[name]) for x in lines if x["kind"] == "train" and name in x}
        for lines in (first, own)
    )
    same = 0
    for step in sorted(a.keys() & b.keys()):
        if a[step] != b[step]:
            break
        same = step
    return same


# ---- showing -------------------------------------------------------------------------------------


def as_text(sections: Mapping[str, Table], names: Sequence[str]) -> str:
    """The tables in Markdown."""
    text = []
    for title, table in sections.items():
        rows = [["", *names], *([row, *map(_shown, cells)] for row, cells in table.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(names) + 1)]
        lines = [
            "| " + " | ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
        text.append(f"{title}\n\n" + ("\n".join(lines) if table else "no difference") + "\n")
    return "\n".join(text)


def _shown(cell: Any) -> str:
    if cell is None:
        return "-"
    return f"{cell:.6g}" if isinstance(cell, float) else str(cell)


def plot(workdirs: Sequence[Path], names: Sequence[str], path: Path) -> None:
    """Training loss, averaged over a fiftieth of the run, and validation against tokens."""
    from matplotlib.figure import Figure  # which pyplot does not hold on to

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, (workdir, name) in enumerate(zip(workdirs, names, strict=True)):
        lines = read_metrics(workdir)
        train = [x for x in lines if x["kind"] == "train" and _has(x, "loss") and _has(x, "tokens")]
        size = max(1, len(train) // 50)
        groups = [train[i : i + size] for i in range(0, len(train), size)]
        tokens = [group[-1]["tokens"] for group in groups]
        left.plot(tokens, [_mean(g, "loss") for g in groups], color=f"C{index}", label=name)
        for (kind, scores), marker in zip(
            _validation(lines).items(), itertools.cycle("osD^v<>*"), strict=False
        ):
            x, y = zip(*scores, strict=True)
            right.plot(x, y, color=f"C{index}", marker=marker, label=f"{name}: {kind}")
    for axes, label in ((left, "training loss, nats/token"), (right, "validation")):
        axes.set_xlabel("clean tokens")
        axes.set_ylabel(label)
        if axes.has_data():
            axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


# ---- the command ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="llada2 runs",
        description="Look at what runs left behind.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser(
        "compare",
        help="what differs between runs, and what came of it",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    c.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's workdir")
    c.add_argument(
        "--plot", type=Path, metavar="FILE", help="where the plot goes (RUN/comparison.png)"
    )
    return p


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    args = parser().parse_args(argv)
    names = _names(args.runs)
    path = args.plot or args.runs[0] / "comparison.png"
    print(as_text(compare(args.runs), names))
    plot(args.runs, names, path)
    print(f"plot: {path}")
    return 0


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, or whole paths where names repeat."""
    short = [run.resolve().name for run in runs]
    return short if len(set(short)) == len(short) else [str(run) for run in runs]
