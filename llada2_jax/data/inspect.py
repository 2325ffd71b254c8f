"""Rows as packed, for people: documents by colour, what is supervised, where blocks begin."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterator

import numpy as np
from tokenizers import Tokenizer

Row = dict[str, np.ndarray]

# Backgrounds that black text is readable on, as 256-colour codes and as CSS.
_COLOURS = (
    (153, "#afd7ff"),
    (223, "#ffd7af"),
    (157, "#afffaf"),
    (218, "#ffafd7"),
    (229, "#ffffaf"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive tokens of a row that look alike. block: whether a block begins here. segment: 0
    is padding. preference: 1 chosen, -1 rejected, 0 neither."""

    text: str
    segment: int
    supervised: bool
    block: bool
    preference: int = 0


def runs(row: Row, tokenizer: Tokenizer, block_size: int) -> Iterator[Run]:
    """A row in runs, cut where the segment, the loss mask or the block changes."""
    segment, mask = row["segment_ids"], row["loss_mask"]
    begins = (row["positions"] % block_size == 0) & (segment > 0)
    preference = row.get("preference", np.zeros_like(segment))
    changes = (np.diff(segment, prepend=-1) != 0) | (np.diff(mask, prepend=~mask[:1]) != 0)
    starts = np.flatnonzero(changes | begins)
    for start, stop in zip(starts, np.append(starts[1:], len(segment)), strict=True):
        text = tokenizer.decode(row["tokens"][start:stop].tolist(), skip_special_tokens=False)
        yield Run(
            text,
            int(segment[start]),
            bool(mask[start]),
            bool(begins[start]),
            int(preference[start]),
        )


def describe(row: Row) -> str:
    """One line: documents of a row, how full it is, how much is supervised."""
    segment, mask = row["segment_ids"], row["loss_mask"]
    used = segment > 0
    ids = list(dict.fromkeys(row["document_ids"][used].tolist()))
    shown = ", ".join(map(str, ids[:6])) + (", …" if len(ids) > 6 else "")
    return (
        f"{segment.max()} segments of {len(ids)} documents ({shown}), "
        f"{used.mean():.1%} full, {mask.mean():.1%} supervised, "
        f"epochs {row['visits'][used].min()}-{row['visits'][used].max()}"
    )


def as_text(pieces: Iterator[Run]) -> str:
    """Without colours: ⟦n…⟧ is segment n, «…» supervised, │ begins a block, ░ is padding."""
    out, segment, supervised = [], 0, False
    for run in pieces:
        if supervised and (not run.supervised or run.segment != segment):
            out.append("»")
            supervised = False
        if run.segment != segment:
            out.append("⟧" if segment else "")
            out.append(f"\n⟦{run.segment}{_SIGN[run.preference]} " if run.segment else "\n")
            segment = run.segment
        out.append("│" if run.block else "")
        if run.supervised and not supervised:
            out.append("«")
            supervised = True
        out.append(_visible(run.text) if run.segment else "░")
    return "".join([*out, "»" if supervised else "", "⟧" if segment else ""])


_SIGN = {1: "+", -1: "-", 0: ""}


def as_ansi(pieces: Iterator[Run]) -> str:
    """For terminals: a background for each segment, bold where supervised, grey where not."""
    out = []
    for run in pieces:
        if not run.segment:
            out.append("\x1b[0;90m░\x1b[0m")
            continue
        background, _ = _COLOURS[run.segment % len(_COLOURS)]
        weight = "1;38;5;16" if run.supervised else "38;5;243"
        bar = f"\x1b[0;38;5;196;48;5;{background}m│" if run.block else ""
        # A line's background would run on to its end.
        text = _visible(run.text).replace("\n", f"\x1b[0m\n\x1b[{weight};48;5;{background}m")
        out.append(f"{bar}\x1b[0;{weight};48;5;{background}m{text}\x1b[0m")
    return "".join(out)


def _visible(text: str) -> str:
    """Control characters of a text must not reach the terminal, or turn its direction."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def as_html(rows: list[tuple[str, list[Run]]]) -> str:
    """A page of rows, each with its title."""
    return "\n".join([_PAGE_HEAD, *(_html_row(title, pieces) for title, pieces in rows), ""])


def _html_row(title: str, pieces: list[Run]) -> str:
    out = [f"<h2>{html.escape(title)}</h2><pre>"]
    for run in pieces:
        if not run.segment:
            out.append('<span class="pad">░</span>')
            continue
        _, colour = _COLOURS[run.segment % len(_COLOURS)]
        kind = ("loss " if run.supervised else "") + ("block" if run.block else "")
        out.append(
            f'<span class="{kind}" title="segment {run.segment}{_SIGN[run.preference]}" '
            f'style="background:{colour}">{html.escape(_visible(run.text))}</span>'
        )
    return "".join([*out, "</pre>"])


_PAGE_HEAD = """\
<!doctype html><meta charset="utf-8"><title>Packed rows</title>
<style>
body { font-family: sans-serif; margin: 2em; } h2 { font-size: 1em; }
pre { white-space: pre-wrap; line-height: 1.6; color: #777; }
.loss { color: #000; font-weight: bold; } .pad { color: #bbb; }
.block { border-left: 2px solid #d00; }
</style>
<p>A background for each document; bold black is supervised; a red bar begins a block; ░ is padding.
</p>"""
