"""What a kernel costs at least on a GPU, by a model: an estimate to compare a measurement with, not one.

    time = max(bytes / bandwidth, flops / rate) + launches * overhead

The limit is the larger of the first two, and "of limit" the share of the modelled time that it is: what is
missing is spent on launches. Bytes are those of tensors that must be read or written once; caches, latency,
too few programs to fill the device and everything else that a model leaves out make a measured time longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

__all__ = ["H100", "Cost", "Device"]


@final
@dataclass(frozen=True)
class Device:
    """Bandwidth in bytes/s, rate in float32 operations/s, overhead of a launch in s."""

    name: str
    bandwidth: float
    rate: float
    overhead: float


H100 = Device("H100 (SXM)", 3.35e12, 67e12, 4e-6)


@final
@dataclass(frozen=True)
class Cost:
    """Bytes moved, float operations and launches of one call."""

    bytes: int
    flops: int
    launches: int = 1

    def limit(self, device: Device = H100) -> float:
        """Seconds that the device needs for the bytes or the operations, whichever is longer."""
        return max(self.bytes / device.bandwidth, self.flops / device.rate)

    def time(self, device: Device = H100) -> float:
        """Seconds of the model."""
        return self.limit(device) + self.launches * device.overhead

    def share(self, device: Device = H100) -> float:
        """The limit as a share of the modelled time."""
        return self.limit(device) / self.time(device)
