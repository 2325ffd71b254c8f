"""What commands that read texts have in common: options that name a model, and texts from files,
JSONL or stdin."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from llada2_jax.errors import UserError
from llada2_jax.types import DTYPES


class InputError(UserError, ValueError):
    """An input that cannot be used; the message names the place and says what to change."""


def positive(text: str) -> int:
    """A number of at least 1, as an argparse type."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A number of at least 0, as an argparse type."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
    return value


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, and what may override it; `model_arguments` reads them."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint or Hugging Face folder"
    )
    group.add_argument("--dtype", choices=DTYPES, help="of activations (the checkpoint's)")
    for name in ("mask", "eos"):
        about = f"the {name} token's id, for Hugging Face folders whose files do not say"
        group.add_argument(f"--{name}-id", type=int, metavar="ID", help=about)


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `hub.load_model` that the options stand for."""
    overrides = {} if args.dtype is None else {"dtype": args.dtype}
    return {"mask_id": args.mask_id, "eos_id": args.eos_id, **overrides}


@dataclasses.dataclass(frozen=True)
class Item:
    """A text, what to call it, and the other fields of its line."""

    name: str
    text: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_file(path: str) -> str:
    """The text of a UTF-8 file, line ends as they are: bytes count.

    Raises: InputError with the place if it is not UTF-8; OSError.
    """
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}: convert the file") from None


def read_lines_or_stdin(lines_file: str | None, field: str) -> list[Item]:
    """The lines of a JSONL file ("-": of stdin); without a file, stdin is one text.

    Raises: InputError as `parse_lines` and `read_file`; OSError.
    """
    if lines_file is not None and lines_file != "-":
        return parse_lines(read_file(lines_file), lines_file, field)
    if sys.stdin.isatty():
        print("Reading from the terminal; end it with Ctrl-D.", file=sys.stderr)
    text = sys.stdin.read()
    return [Item("stdin", text)] if lines_file is None else parse_lines(text, "stdin", field)


def parse_lines(text: str, name: str, field: str) -> list[Item]:
    """Items of a JSONL text, the text itself under `field`; empty lines are skipped.

    Raises: InputError that names every bad line (the first ten).
    """
    items, wrong = [], []
    # Not splitlines(), which also breaks at characters that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(_parse(line, f"{name}:{number}", field))
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        more = [] if len(wrong) <= 10 else [f"… and {len(wrong) - 10} more"]
        raise InputError("\n  ".join(["lines that cannot be read:", *wrong[:10], *more]))
    if not items:
        raise InputError(f'{name}: no {field}s: it needs a line such as {{"{field}": "..."}}')
    return items


def _parse(line: str, where: str, field: str) -> Item:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise InputError(f'{where}: a {kind} instead of an object {{"{field}": "..."}}')
    if field not in value:
        raise InputError(f'{where}: no "{field}" among the fields {sorted(value)}')
    text = value.pop(field)
    if not isinstance(text, str):
        raise InputError(f'{where}: "{field}" is a {type(text).__name__}, not a text')
    return Item(where, text, value)
