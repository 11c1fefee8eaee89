"""The measure of examples/m87_ring.py on rings that are known."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.mark.parametrize(("diameter", "angle"), [(42.0, 170.0), (36.0, 300.0)])
def test_a_known_ring_is_measured(example, diameter: float, angle: float) -> None:
    """4 uas pixels, 10 uas thick, off the middle: the diameter to half a pixel, the angle to 5 degrees."""
    n, pixel = 32, 4.0
    y, x = (np.mgrid[:n, :n] - (n - 1) / 2) * pixel
    x, y = x - 6.0, y + 3.0
    radius, place = np.hypot(x, y), np.arctan2(-x, y)  # x to the west
    image = np.exp(-0.5 * ((radius - diameter / 2) / 4.2) ** 2)
    image *= 1 + 0.5 * np.cos(place - np.radians(angle))
    found, position, scatter = example("m87_ring").ring(image, pixel)
    assert found == pytest.approx(diameter, abs=2.0)
    assert abs((position - angle + 180) % 360 - 180) < 5
    assert scatter < 0.08
    # The control: a ring a fifth wider is told apart.
    assert abs(found - 1.2 * diameter) > 5
