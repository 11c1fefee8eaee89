"""Pictures of posterior draws, of their calibration, and of lenses."""

from diffpost.plot.calibration import coverage, ranks
from diffpost.plot.images import image_grid, summary
from diffpost.plot.lensing import lens

__all__ = ["coverage", "image_grid", "lens", "ranks", "summary"]
