"""The kernels through the real TPU compiler, on a machine without a TPU.

libtpu compiles for a described chip as it does for one that is there: a kernel that does not lower,
does not fit VMEM or scalar memory, or needs more HBM than the chip has, fails here in seconds.
`make aot` fetches libtpu into .cache and runs this as a command.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from pallas_kernels.block_attention.decode import ContiguousCache, PagedCache, decode_attention
from pallas_kernels.block_attention.splash import attend_splash
from pallas_kernels.block_attention.tpu import attend_tpu
from pallas_kernels.block_layout import NOISY, BlockLayout, both_halves, half_layout, key_intervals
from pallas_kernels.shapes import ATTENTION, AttentionShape
from pallas_kernels.tables import print_records

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:1x1x1"}
"""The smallest slice of each chip that libtpu describes."""

LIBTPU = Path(".cache/libtpu/libtpu/libtpu.so")
"""Where `make` puts it, from the root of the repository; TPU_LIBRARY_PATH names another place."""

_ENVIRONMENT = {
    "TPU_LIBRARY_PATH": str(LIBTPU.absolute()),
    "TPU_SKIP_MDS_QUERY": "1",  # no cloud metadata server to ask which TPU this is
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it locks the TPU that is not there
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """seconds: to lower and compile. temporaries: bytes of HBM beside arguments and results."""

    seconds: float
    temporaries: int


def tpu_device(chip: str):
    """A described device of a chip in TOPOLOGIES.

    Raises: FileNotFoundError where libtpu is not; ValueError for an unknown chip.
    """
    if chip not in TOPOLOGIES:
        raise ValueError(f"chip {chip!r}: choose one of {tuple(TOPOLOGIES)}")
    return topology_devices(TOPOLOGIES[chip])[0]


def topology_devices(topology: str) -> list:
    """The described devices of a TPU topology, e.g. "v5p:2x2x4".

    Raises: FileNotFoundError where libtpu is not.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    path = Path(os.environ["TPU_LIBRARY_PATH"])
    if not path.is_file():
        raise FileNotFoundError(
            f"no TPU compiler at {path}: run `make {LIBTPU}`, or set TPU_LIBRARY_PATH to the "
            "libtpu.so of `pip install libtpu`"
        )
    return topologies.get_topology_desc(topology, platform="tpu").devices


def describing(device):
    """Context in which the kernels take what they need to know of a chip from this device."""
    described = AbstractDevice(device.device_kind, device.num_cores, device.platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=described))


def compile_for(device, function: Callable, *arguments: Any) -> Compiled:
    """Compiles `function` for one device. arguments: pytrees of arrays or ShapeDtypeStructs."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    start = time.perf_counter()
    with describing(device):
        analysis = jax.jit(function).lower(*arguments).compile().memory_analysis()
    seconds = time.perf_counter() - start
    if analysis is None:
        raise RuntimeError(f"{device.device_kind}: the compiler says nothing about memory")
    return Compiled(seconds, analysis.temp_size_in_bytes)


def training_attention(attend: Callable[..., jax.Array], shape: AttentionShape, length: int):
    """(function, its arguments) of forward and backward over one row of both halves.

    attend: called with (q, k, v, layout).
    """

    def run(q, k, v, cotangent, block, segment):
        layout = both_halves(block, segment)
        output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout), q, k, v)
        return output, *pull(cotangent)

    q = _array(1, 2 * length, shape.heads, shape.head_dim)
    k = _array(1, 2 * length, shape.kv_heads, shape.head_dim)
    index = _array(1, length, dtype=jnp.int32)
    return run, (q, k, k, q, index, index)


def decoding_attention(
    shape: AttentionShape, capacity: int, *, paged: bool, batch: int = 8, backend: str = "tpu"
):
    """(function, its arguments) of a denoising forward of one block of 32 over a cache."""
    queries, page = 32, 128

    def run(q, k, v, block, segment, *cache):
        own = half_layout(block, segment, NOISY)
        kind = PagedCache if paged else ContiguousCache
        return decode_attention(q, k, v, own, kind(*cache), backend=backend)

    q = _array(batch, queries, shape.heads, shape.head_dim)
    k = _array(batch, queries, shape.kv_heads, shape.head_dim)
    index, lengths = _array(batch, queries, dtype=jnp.int32), _array(batch, dtype=jnp.int32)
    if paged:
        pool = _array(batch * capacity // page, shape.kv_heads, page, shape.head_dim)
        table = _array(batch, capacity // page, dtype=jnp.int32)
        cache = pool, pool, table, lengths
    else:
        pool = _array(batch, shape.kv_heads, capacity, shape.head_dim)
        cache = pool, pool, lengths
    return run, (q, k, k, index, index, *cache)


def attend_by_intervals(q, k, v, layout: BlockLayout):
    """The TPU kernel, called as the others are."""
    return attend_tpu(q, k, v, key_intervals(layout))


def _array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _programs(models: list[str], lengths: list[int]) -> Iterator[tuple[str, str, int, Callable]]:
    """(kernel, model, length, () -> (function, arguments)) of everything that `make aot` builds."""
    for model in models:
        shape = ATTENTION[model]
        for length in lengths:
            for name, attend in (("tpu", attend_by_intervals), ("splash", attend_splash)):
                program = functools.partial(training_attention, attend, shape, length)
                yield f"{name}, forward + backward", model, length, program
            for paged in (False, True):
                name = f"decode, {'paged' if paged else 'contiguous'}"
                program = functools.partial(decoding_attention, shape, length, paged=paged)
                yield name, model, length, program


def main(argv: list[str] | None = None) -> int:
    """Compiles everything for every chip; returns the number of failures."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.aot",
        description="Compile the kernels for TPU chips with libtpu, on any Linux machine.",
    )
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--models", nargs="+", default=["mini", "flash"], choices=ATTENTION)
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192], metavar="L",
                        help="tokens of a row, and positions of a decode cache")  # fmt: skip
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="records instead of a table")
    args = parser.parse_args(argv)
    programs = [p for p in _programs(args.models, args.lengths) if args.only in p[0]]
    if not programs:
        names = dict.fromkeys(kernel for kernel, *_ in _programs(args.models, args.lengths))
        parser.error(f"--only {args.only!r} is in the name of no kernel: {', '.join(names)}")
    records = []
    for kernel, model, length, program in programs:
        for chip in args.chips:
            record: dict[str, Any] = {"kernel": kernel, "model": model, "length": length}
            record["chip"] = chip
            try:
                function, arguments = program()
                compiled = compile_for(tpu_device(chip), function, *arguments)
                record["seconds"] = round(compiled.seconds, 1)
                record["temporary MiB"] = round(compiled.temporaries / 2**20, 1)
            except FileNotFoundError:
                raise
            except Exception as error:  # the compiler's, for this chip; the others are tried
                record["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            records.append(record)
            print(json.dumps(record), file=sys.stderr)
    print_records(records, as_json=args.json, title="Compiled by libtpu")
    return sum("error" in record for record in records)


if __name__ == "__main__":
    sys.exit(main())
