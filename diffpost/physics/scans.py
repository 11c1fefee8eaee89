"""Which visibilities were taken together: intervals of time between gaps."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scan_numbers"]

_DAY = 86400.0


def scan_numbers(time: Tensor, gap: float, longest: float | None = None) -> Tensor:
    """Numbers from 0, in the order of time: a new one begins wherever no visibility was taken for longer than ``gap``.

    Args:
        time: MJD in days, of any shape.
        gap: seconds; those between the scans of a source, or less than an integration for one number for each time.
        longest: seconds; longer scans are divided into equal parts. None leaves them whole.

    Returns:
        Integers of the shape of time.

    Raises:
        ValueError: no times, times that are not finite, or a gap or a longest that is not positive.
    """
    time = torch.as_tensor(time).double()
    if time.numel() == 0 or not bool(time.isfinite().all()):
        raise ValueError(
            f"scan_numbers: got times of shape {tuple(time.shape)}, {int((~time.isfinite()).sum())} of them not finite; expected "
            "finite MJD in days, at least one."
        )
    if not gap > 0 or (longest is not None and not longest > 0):
        raise ValueError(
            f"scan_numbers(gap={gap}, longest={longest}): expected positive numbers of seconds."
        )
    flat, order = time.reshape(-1).sort()
    seconds = (flat - flat[0]) * _DAY
    begins = (seconds.diff() > gap).long()
    if longest is not None:
        scan = torch.cat([torch.zeros(1, dtype=torch.int64), begins.cumsum(0)])
        start = torch.cat([torch.ones(1, dtype=torch.int64), begins]).nonzero()[:, 0]
        end = torch.cat([start[1:], torch.tensor([len(flat)])]) - 1
        length = seconds[end] - seconds[start]
        parts = (length / longest).ceil().clamp_min(1)
        share = (seconds - seconds[start[scan]]) / length.clamp_min(1e-9)[scan]
        part = (share * parts[scan]).long().minimum(parts[scan].long() - 1)
        begins = ((scan.diff() != 0) | (part.diff() != 0)).long()
    numbers = torch.empty(len(flat), dtype=torch.int64)
    numbers[order] = torch.cat([torch.zeros(1, dtype=torch.int64), begins.cumsum(0)])
    return numbers.reshape(time.shape)
