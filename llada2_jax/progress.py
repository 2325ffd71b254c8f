"""Progress bars: how each of ours is made."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_SCALED = ("B", "tok")  # shown as 1.2M
DELAY = 0.5  # seconds; what is done sooner shows no bar


def bar(
    items: Iterable | None = None,
    what: str = "",
    *,
    total: int | None = None,
    unit: str = "it",
    **more: Any,
) -> tqdm:
    """A bar on stderr with count, rate and time left; nothing where stderr is not a terminal.

    items: what it counts by yielding them; without them, `update` counts up to `total`.
    """
    options: dict[str, Any] = {"disable": None, "dynamic_ncols": True, "delay": DELAY}
    options |= {"total": total, "unit": unit, "unit_scale": unit in _SCALED} | more
    return tqdm(items, what, **options)


def shown() -> bool:
    """Whether bars are: what a library draws by itself goes by the same rule."""
    return sys.stderr.isatty()
