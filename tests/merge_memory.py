"""Peak memory of merging, and what it reads, by size of the model and number of checkpoints.

    python -m tests.merge_memory --megabytes 256 512 --k 2 4 8

Merges checkpoints of training, from one device and sharded over eight, and what `llada2 convert`
writes. Prints a line of JSON a merge: what the process's peak grew by since a merge of next to
nothing, and how often it read each byte.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llada2_jax import checkpoint, folders
from llada2_jax.checkpoint import ArraySpec, ModelBundle, ParamWriter
from llada2_jax.config import CheckpointConfig
from llada2_jax.merge import merge_checkpoints
from llada2_jax.train_checkpoints import TrainCheckpoints
from llada2_jax.types import SpecialTokens
from tests.helpers import TINY

BUNDLE = ModelBundle(TINY, None, SpecialTokens(mask=15, eos=14, pad=13))
LAYOUTS = ("converted", "trained", "sharded")
DEVICES = 8
DTYPE = np.dtype(np.float32)


def shapes(megabytes: int) -> dict[str, tuple[int, ...]]:
    """As a model has them: half of it experts, a table of tokens by rows and one by columns."""
    units = max(1, megabytes)  # of 2**18 numbers each
    return {
        "experts": (2, DEVICES * -(-units // (2 * DEVICES)), 512, 256),
        "embedding": (DEVICES * -(-units * 256 // DEVICES), 256),
        "head": (256, DEVICES * -(-units * 256 // DEVICES)),
    }


AXES = {  # which axis a mesh of expert and fsdp cuts
    "experts": PartitionSpec(None, "expert", None, "fsdp"),
    "embedding": PartitionSpec("fsdp", "expert"),
    "head": PartitionSpec("fsdp", "expert"),
}


def noise(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers that do not compress, so that bytes read are counted as they are decoded."""
    return np.random.default_rng(0).random(shape, DTYPE)


def write_converted(folder: Path, megabytes: int) -> None:
    """Written slice by slice."""
    specs = {name: ArraySpec(shape, DTYPE) for name, shape in shapes(megabytes).items()}
    writer = ParamWriter(folder / folders.PARAMS, specs)
    for name, spec in specs.items():
        for box in checkpoint.boxes(spec.shape, checkpoint.chunk_shape(spec)):
            size = tuple(axis.stop - axis.start for axis in box)
            writer.write(name, box, noise(size))
    writer.finish()
    checkpoint.write_items(folder, BUNDLE)


def write_trained(run: Path, megabytes: int, *, sharded: bool) -> None:
    """Step 1 of a run, as training saves it. Holds the model in memory."""
    devices = np.asarray(jax.devices()).reshape(2, DEVICES // 2)
    mesh = Mesh(devices if sharded else devices[:1, :1], ("fsdp", "expert"))
    params = {
        name: jax.device_put(noise(shape), NamedSharding(mesh, AXES[name]))
        for name, shape in shapes(megabytes).items()
    }
    run.mkdir()
    checkpoints = TrainCheckpoints(run, CheckpointConfig())
    checkpoints.save(
        1, BUNDLE, nnx.State(params), {"n": jax.numpy.int32(1)}, {"metrics": {}}, wait=True
    )
    checkpoints.close()


def write_all(folder: Path, megabytes: list[int], layouts: list[str]) -> None:
    """A model of each size and layout, at `model_path`."""
    for size in megabytes:
        for layout in layouts:
            if layout == "converted":
                write_converted(model_path(folder, size, layout), size)
            else:
                run = folder / f"{size}-{layout}"
                write_trained(run, size, sharded=layout == "sharded")


def model_path(folder: Path, megabytes: int, layout: str) -> Path:
    run = folder / f"{megabytes}-{layout}"
    return run if layout == "converted" else run / "checkpoints/1"


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def bytes_read() -> int:
    """By this process so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(folder: Path, megabytes: int, layout: str, k: int) -> dict[str, float]:
    model = model_path(folder, megabytes, layout)
    size = sum(np.prod(shape) for shape in shapes(megabytes).values()) * DTYPE.itemsize
    before, read = time.perf_counter(), bytes_read()
    merge_checkpoints([model] * k, folder / "out", overwrite=True)
    return {
        "seconds": round(time.perf_counter() - before, 1),
        "read_times": round((bytes_read() - read) / (k * size), 2),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--megabytes", type=int, nargs="+", default=[256, 512], help="of each model")
    p.add_argument("--k", type=int, nargs="+", default=[2, 4, 8], help="checkpoints a merge")
    p.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    p.add_argument("--chunk", type=int, default=checkpoint.CHUNK_BYTES, help="bytes a chunk")
    p.add_argument("--cache", type=int, default=checkpoint.CACHE_BYTES, help="bytes of cache")
    p.add_argument("--write", type=Path, help="only write the models, into this folder")
    args = p.parse_args()
    checkpoint.CHUNK_BYTES, checkpoint.CACHE_BYTES = args.chunk, args.cache
    if args.write:
        return write_all(args.write, [0, *args.megabytes], args.layouts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = f"--xla_force_host_platform_device_count={DEVICES}"
        command = [sys.executable, "-m", "tests.merge_memory", *sys.argv[1:], "--write", name]
        subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": flags})
        for layout in args.layouts:
            measure(folder, 0, layout, 2)
        start = peak()
        for megabytes in args.megabytes:
            for layout in args.layouts:
                for k in args.k:
                    row = {"megabytes": megabytes, "layout": layout, "k": k}
                    row |= measure(folder, megabytes, layout, k)
                    row["peak_mib"] = round((peak() - start) / 2**20)
                    print(json.dumps(row), flush=True)
                shutil.rmtree(model_path(folder, megabytes, layout))


if __name__ == "__main__":
    main()
