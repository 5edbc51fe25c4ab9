"""The peak that MFU is measured against, and where it comes from.

MFU = FLOPs of the model (forward and backward, no recomputation) per second / peak of all processes' devices. A figure
without its peak says nothing, so both are always shown together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

_PUBLISHED = (("B200", 2250.0), ("H200", 989.0), ("H100", 989.0), ("A100", 312.0))
"""Dense bf16 peak by a word in the device's name, in 10^12 FLOP/s: the makers' data sheets, SXM variants."""
_CPU_SIZE, _GPU_SIZE = 768, 8192
_MEASURE_SECONDS = 0.25


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one process's device, and where the figure comes from."""

    flops: float
    source: str


def device_peak(device: torch.device, dtype: torch.dtype, configured_teraflops: float | None = None) -> Peak:
    """The configured peak, else a known GPU's published one, else a measured matrix product in `dtype`.

    The measurement takes about a third of a second; where processes share cores, call it on all of them at once.
    """
    if configured_teraflops is not None:
        return Peak(configured_teraflops * 1e12, "logging.peak_teraflops")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for word, teraflops in _PUBLISHED:
            if word in name:
                return Peak(teraflops * 1e12, f"published dense bf16 peak of {word}")
    size = _GPU_SIZE if device.type == "cuda" else _CPU_SIZE
    return Peak(_measure(size, device, dtype), f"measured: product of {size} x {size} matrices in {str(dtype)[6:]}")


def _measure(size: int, device: torch.device, dtype: torch.dtype) -> float:
    # Not random: a measurement must leave the generators alone.
    left = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
    product = torch.empty_like(left)
    best = float("inf")
    until = time.perf_counter() + _MEASURE_SECONDS
    while time.perf_counter() < until or best == float("inf"):
        started = time.perf_counter()
        torch.mm(left, left, out=product)
        product[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
