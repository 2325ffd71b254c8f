"""Peak dense bf16 FLOP/s, as the vendors say: what measured and predicted shares divide by."""

from __future__ import annotations

PEAK = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,  # a chip is two devices
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}
"""Of a jax device whose kind begins so; of several that fit, the first."""


def peak_flops(kind: str) -> float | None:
    """Of a device of this kind; None where it is not known."""
    return next((peak for name, peak in PEAK.items() if kind.startswith(name)), None)
