"""Draws docs/kernels.png: python docs/kernels_picture.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch, Rectangle

from pallas_kernels.block_attention.tpu.schedule import Tiles, tile_bounds, tile_runs
from pallas_kernels.block_layout import allowed, block_index, both_halves, key_intervals

DOCUMENTS = (420, 1100, 528)
BLOCK = 128  # large, so that it shows
MASKED, WIDE = "#d97706", "#059669"


def main() -> None:
    length = sum(DOCUMENTS)
    segments = np.repeat(np.arange(len(DOCUMENTS)) + 1, DOCUMENTS)[None]
    positions = np.concatenate([np.arange(n) for n in DOCUMENTS])[None]
    layout = both_halves(block_index(positions, BLOCK, "document"), segments)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
    for axes in (left, right):
        mask = np.asarray(allowed(layout, layout)[0])[::4, ::4]
        extent = (0, 2 * length, 2 * length, 0)
        axes.imshow(mask, extent=extent, cmap=ListedColormap(["white", "#c7d2fe"]))
        axes.axhline(length, color="black", lw=0.8)
        axes.axvline(length, color="black", lw=0.8)
        axes.set_xticks([length / 2, 3 * length / 2], ["noisy keys", "clean keys"])
        axes.set_yticks(
            [length / 2, 3 * length / 2],
            ["noisy queries", "clean queries"],
            rotation=90,
            va="center",
        )
        axes.tick_params(length=0)
    left.set_title(f"Mask: documents of {', '.join(map(str, DOCUMENTS))} tokens, block {BLOCK}")
    query = 1300
    intervals = key_intervals(layout)
    left.axhline(query, color="#be123c", lw=0.8)
    for name, (start, end) in (("own", intervals.own), ("earlier", intervals.earlier)):
        start, end = int(start[0, query]), int(end[0, query])
        left.plot([start, end], [query, query], color="#be123c", lw=4, solid_capstyle="butt")
        left.annotate(name, ((start + end) / 2, query - 60), color="#be123c", ha="center")

    tiles = Tiles()
    runs = np.asarray(tile_runs(tile_bounds(intervals, tiles), 2 * length, tiles))[0]
    pairs = 0
    for tile, row in enumerate(runs):
        for first, head, wides, windows in row:
            inside = wides * tiles.wide // tiles.keys
            begin = first + head * tiles.keys
            parts = [(first + i * tiles.keys, tiles.keys, MASKED) for i in range(head)]
            parts += [(begin + i * tiles.wide, tiles.wide, WIDE) for i in range(wides)]
            tail = range(head + inside, windows)
            parts += [(first + i * tiles.keys, tiles.keys, MASKED) for i in tail]
            pairs += sum(size for _, size, _ in parts) * tiles.queries
            for start, size, color in parts:
                corner = start, tile * tiles.queries
                box = Rectangle(corner, size, tiles.queries, fc=color, ec=color, alpha=0.35, lw=0.6)
                right.add_patch(box)
    ratio = pairs / int(intervals.count().sum())
    right.set_title(f"Schedule of the TPU kernel: {ratio:.2f} x the allowed pairs")
    right.legend(
        handles=[
            Patch(color=MASKED, alpha=0.5, label=f"window of {tiles.keys} keys, masked"),
            Patch(color=WIDE, alpha=0.5, label=f"step of {tiles.wide} keys, no mask"),
        ],
        loc="lower left",
        fontsize=8,
    )
    figure.savefig(Path(__file__).with_name("kernels.png"), dpi=90)


if __name__ == "__main__":
    main()
