"""Peak memory of merging, by size of the model and number of checkpoints.

    python -m tests.merge_memory --megabytes 256 512 --k 2 4 8

Prints a line of JSON a merge: what the process's peak grew by since a merge of next to nothing.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from llada2_jax import checkpoint, folders
from llada2_jax.checkpoint import ArraySpec, ModelBundle, ParamWriter
from llada2_jax.merge import merge_checkpoints
from llada2_jax.types import SpecialTokens
from tests.helpers import TINY

BUNDLE = ModelBundle(TINY, None, SpecialTokens(mask=15, eos=14, pad=13))


def write_model(folder: Path, megabytes: int) -> None:
    """A checkpoint of three bf16 arrays, as chunked as a real one, written slice by slice."""
    rows = max(1, (megabytes << 20) // (3 * 2 * 1024))
    specs = {name: ArraySpec((rows, 1024), np.dtype("bfloat16")) for name in "abc"}
    writer = ParamWriter(folder / folders.PARAMS, specs)
    for name, spec in specs.items():
        for box in checkpoint.boxes(spec.shape, checkpoint.chunk_shape(spec)):
            size = tuple(axis.stop - axis.start for axis in box)
            writer.write(name, box, np.ones(size, spec.dtype))
    writer.finish()
    checkpoint.write_items(folder, BUNDLE)


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--megabytes", type=int, nargs="+", default=[256, 512], help="of each model")
    p.add_argument("--k", type=int, nargs="+", default=[2, 4, 8], help="checkpoints a merge")
    p.add_argument("--chunk", type=int, default=checkpoint.CHUNK_BYTES, help="bytes a chunk")
    p.add_argument("--cache", type=int, default=checkpoint.CACHE_BYTES, help="bytes of cache")
    args = p.parse_args()
    checkpoint.CHUNK_BYTES, checkpoint.CACHE_BYTES = args.chunk, args.cache
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "small", 0)
        merge_checkpoints([folder / "small"] * 2, folder / "warm")
        start = peak()
        for megabytes in args.megabytes:
            write_model(folder / "model", megabytes)
            for k in args.k:
                before = time.perf_counter()
                merge_checkpoints([folder / "model"] * k, folder / "out", overwrite=True)
                seconds = time.perf_counter() - before
                grown = (peak() - start) / 2**20
                row = {"megabytes": megabytes, "k": k, "peak_mib": round(grown)}
                print(json.dumps(row | {"seconds": round(seconds, 1)}), flush=True)
            shutil.rmtree(folder / "model")


if __name__ == "__main__":
    main()
