"""Chips and the cloud's slices of them: what a name like v5p-32 stands for.

`slice_named` understands Google Cloud's names (v5litepod-16, v5p-32, v6e-64, tpu7x-16; the number
counts chips or TensorCores, as the cloud has it), v5e-16 for v5litepod-16, and GPUs as
h100-80gb-8, for 8 of them. Figures are the vendors', per chip; each chip names its source.
"""

from __future__ import annotations

import dataclasses
import math

from llada2_jax.errors import UsageError
from pallas_kernels.peaks import PEAK

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """kind: "tpu" or "gpu". hbm_bytes: of a chip, as sold. usable_bytes: of one JAX device, what a
    program may use. flops: peak dense bf16 FLOP/s. hbm_bandwidth: bytes/s. link_bandwidth: bytes/s
    that a chip receives over all its links to others. source: where the figures are from.
    topologies: the slices that exist, chips along each axis of the torus; (): any number of whole
    machines, or a part of one. cores: of what the number in a slice's name counts, a chip.
    devices: JAX devices a chip. chips_per_host: of one machine. network_bandwidth: bytes/s that a
    GPU receives from other machines."""

    name: str
    kind: str
    hbm_bytes: float
    usable_bytes: float
    flops: float
    hbm_bandwidth: float
    link_bandwidth: float
    source: str
    topologies: tuple[tuple[int, ...], ...] = ()
    cores: int = 1
    devices: int = 1
    chips_per_host: int = 8
    network_bandwidth: float = 0.0


@dataclasses.dataclass(frozen=True)
class Slice:
    """chips: their number. topology: of a TPU, chips along each axis of the torus."""

    name: str
    chip: Chip
    chips: int
    topology: tuple[int, ...] = ()

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.chip.devices

    @property
    def libtpu_name(self) -> str:
        """How libtpu calls the topology, e.g. v5p:2x2x4. Raises: ValueError for GPUs."""
        if self.chip.kind != "tpu":
            raise ValueError(f"{self.name} is no TPU slice: libtpu does not compile for it")
        return f"{self.chip.name}:{'x'.join(map(str, self.topology))}"


_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = (
    *((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
    *((8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
)


def _tpu(name: str, **figures) -> Chip:
    page = f"https://cloud.google.com/tpu/docs/{name}"
    return Chip(name=name, kind="tpu", source=page, **figures)


def _gpu(name: str, hbm: float, page: str, **figures) -> Chip:
    # 90% is what launch/train.sh gives to a program (docs/launching.md).
    page = f"https://www.nvidia.com/en-us/data-center/{page}"
    return Chip(
        name=name, kind="gpu", hbm_bytes=hbm, usable_bytes=0.9 * hbm, source=page, **figures
    )


# usable_bytes of TPUs is what libtpu 0.0.50.1 says when a program needs more. The docs print the
# bandwidth of links in both directions; received is half.
_ALL = (
    _tpu(
        "v5e",
        hbm_bytes=16 * GIB,
        usable_bytes=15.75 * GIB,
        flops=PEAK["TPU v5 lite"],
        hbm_bandwidth=819e9,
        link_bandwidth=200e9,
        topologies=_SQUARES,
    ),
    _tpu(
        "v6e",
        hbm_bytes=32 * GIB,
        usable_bytes=31.24 * GIB,
        flops=PEAK["TPU v6 lite"],
        hbm_bandwidth=1638e9,
        link_bandwidth=400e9,
        topologies=_SQUARES,
    ),
    _tpu(
        "v5p",
        hbm_bytes=95 * GIB,
        usable_bytes=95.73 * GIB,
        flops=PEAK["TPU v5"],
        hbm_bandwidth=2765e9,
        link_bandwidth=600e9,
        topologies=_CUBES,
        cores=2,
        chips_per_host=4,
    ),
    _tpu(
        "tpu7x",
        hbm_bytes=192 * GIB,
        usable_bytes=94.74 * GIB,
        flops=2 * PEAK["TPU7x"],
        hbm_bandwidth=7380e9,
        link_bandwidth=600e9,
        topologies=((1, 1, 1), *_CUBES),
        cores=2,
        devices=2,
        chips_per_host=4,
    ),
    _gpu(
        "a100-80gb",
        80e9,
        "a100/",
        flops=PEAK["NVIDIA A100"],
        hbm_bandwidth=2039e9,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
    ),
    _gpu(
        "h100-80gb",
        80e9,
        "h100/",
        flops=PEAK["NVIDIA H100"],
        hbm_bandwidth=3350e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    _gpu(
        "h200-141gb",
        141e9,
        "h200/",
        flops=PEAK["NVIDIA H200"],
        hbm_bandwidth=4800e9,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
    ),
    _gpu(
        "b200-180gb",
        180e9,
        "dgx-b200/",
        flops=PEAK["NVIDIA B200"],
        hbm_bandwidth=8000e9,
        link_bandwidth=900e9,
        network_bandwidth=50e9,
    ),
)

CHIPS = {chip.name: chip for chip in _ALL}
_PREFIXES = {"v5litepod": "v5e", **{name: name for name in CHIPS}}


def slices_of(chip: Chip) -> tuple[Slice, ...]:
    """The slices that exist, smallest first; of GPUs, up to 64 machines."""
    if chip.kind == "tpu":
        return tuple(
            Slice(f"{_cloud_prefix(chip)}-{math.prod(t) * chip.cores}", chip, math.prod(t), t)
            for t in chip.topologies
        )
    counts = [1, 2, 4, *(chip.chips_per_host * 2**i for i in range(7))]
    return tuple(Slice(f"{chip.name}-{n}", chip, n) for n in counts)


def _cloud_prefix(chip: Chip) -> str:
    return next(prefix for prefix, name in _PREFIXES.items() if name == chip.name)


def slice_named(name: str) -> Slice:
    """The slice that the cloud calls `name`.

    Raises: UsageError, which lists what there is, for a chip or a size that does not exist.
    """
    prefix, _, number = name.lower().rpartition("-")
    if prefix not in _PREFIXES:
        raise UsageError(
            f"slice {name!r}: no chip {prefix or name!r} is known; there are "
            f"{', '.join(f'{p}-N' for p in _PREFIXES)}"
        )
    chip = CHIPS[_PREFIXES[prefix]]
    if chip.kind == "gpu" and number.isdecimal():
        count, host = int(number), chip.chips_per_host
        if count in (1, 2, 4) or (count > 0 and count % host == 0):
            return Slice(f"{chip.name}-{count}", chip, count)
    found = [s for s in slices_of(chip) if s.name.rpartition("-")[2] == number]
    if not found:
        raise UsageError(f"slice {name!r} does not exist{_what_exists(chip, prefix, number)}")
    return found[0]


def _what_exists(chip: Chip, prefix: str, number: str) -> str:
    if chip.kind == "gpu":
        host = chip.chips_per_host
        return f": {prefix}-N stands for N GPUs, 1, 2, 4 or a multiple of {host} (whole machines)"
    counts = "TensorCores, 2 a chip" if chip.cores > 1 else "chips"
    names = ", ".join(
        f"{prefix}-{s.chips * chip.cores} ({'x'.join(map(str, s.topology))})"
        for s in slices_of(chip)
    )
    chips = {str(s.chips): s for s in slices_of(chip)}
    hint = ""
    if chip.cores > 1 and number in chips:
        hint = f"; {number} chips are {prefix}-{chips[number].chips * chip.cores}"
    return f": the number counts {counts}{hint}. There are {names}"
