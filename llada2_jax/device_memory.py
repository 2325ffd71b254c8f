"""Bytes of a device: as the TPU's compiler counts them, or as a sum of what must be there."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
from rich.table import Table

from llada2_jax.hardware import GIB


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. state: what is there before and after, by kind. temporaries: while the
    program runs. parts: what these are for, computed. validation: the peak while the run validates,
    state included; 0 where nobody asked. compiled: whether temporaries and validation are the
    compiler's, or computed. seconds: to lower and compile."""

    state: dict[str, float]
    temporaries: float
    parts: dict[str, float]
    limit: float
    validation: float = 0.0
    compiled: bool = False
    seconds: float = 0.0

    @property
    def peak(self) -> float:
        return sum(self.state.values()) + self.temporaries

    @property
    def needed(self) -> float:
        """The higher of the two peaks."""
        return max(self.peak, self.validation)

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit

    @property
    def activations(self) -> float:
        """Of the parts, computed: what the forward leaves to the backward pass, and a layer at
        work with its gathered weights."""
        return sum(size for kind, size in self.parts.items() if kind not in ("gradients", "head"))

    def compiled_to(
        self, needed: float, held: float, seconds: float, validation: float = 0.0
    ) -> Memory:
        """With temporaries of a program that needs `needed` bytes, `held` of them the state's."""
        return dataclasses.replace(
            self,
            temporaries=needed - held,
            validation=validation,
            compiled=True,
            seconds=seconds,
        )

    def record(self) -> dict[str, Any]:
        """What --json prints of it: bytes, and seconds to compile."""
        return {
            "fits": self.fits,
            "memory_from": "libtpu" if self.compiled else "computed",
            "compile_seconds": round(self.seconds, 1),
            "bytes": {
                **self.state,
                "temporaries": self.temporaries,
                "peak": self.peak,
                **({"validation_peak": self.validation} if self.validation else {}),
            },
            "bytes_limit": self.limit,
            "computed_temporaries": self.parts,
            **({"computed_activations": self.activations} if "gradients" in self.parts else {}),
        }

    def table(self) -> Table:
        """For people."""
        source = "libtpu" if self.compiled else "computed, not compiled"
        table = Table(title=f"Memory of a device ({source})", title_justify="left")
        table.add_column("kind")
        table.add_column("GiB", justify="right")
        for kind, size in self.state.items():
            table.add_row(kind, gib(size))
        table.add_row("temporaries", gib(self.temporaries))
        if "gradients" in self.parts:
            table.add_row("  activations (computed)", gib(self.activations), style="dim")
        for kind, size in self.parts.items():
            table.add_row(f"  {kind} (computed)", gib(size), style="dim")
        for name, peak in (("peak", self.peak), ("peak of validation", self.validation)):
            if peak:
                verdict = "fits" if peak <= self.limit else "DOES NOT FIT"
                table.add_row(f"{name}, of {gib(self.limit)}: {verdict}", gib(peak), style="bold")
        return table


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def compiled_bytes(lowered: jax.stages.Lowered) -> float:
    """Bytes that a program takes on a device while it runs, its arguments and results included;
    also where the device has fewer. Raises: what else the compiler raises."""
    try:
        analysis = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        needed = _needed(str(error))
        if needed is None:
            raise
        return needed
    if analysis is None:
        raise RuntimeError("the compiler says nothing about memory")
    # What is allocated at once. Arguments and temporaries of the same analysis do not add up to it:
    # what a loop updates in place is counted in both.
    return analysis.total_allocation_bytes + analysis.generated_code_size_in_bytes


def _needed(message: str) -> float | None:
    """Bytes that a program needs, of the compiler's complaint that there are fewer."""
    found = re.search(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)", message)
    if found is None:
        return None
    return float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found[2]]
