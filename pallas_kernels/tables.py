"""Records as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]


def print_records(
    records: Sequence[Record], *, as_json: bool, title: str, caption: str = ""
) -> None:
    """Prints records of one kind; a column for every key that occurs, empty where it is absent."""
    if as_json:
        print(json.dumps(list(records), indent=1))
        return
    columns = list(dict.fromkeys(key for record in records for key in record))
    table = Table(title=title, caption=caption or None, caption_justify="left")
    for column in columns:
        numeric = all(isinstance(r.get(column, 0), int | float) for r in records)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for record in records:
        table.add_row(*(_cell(record.get(column)) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "/".join(map(_cell, value))
    return f"{value:.2f}" if isinstance(value, float) else str(value)
