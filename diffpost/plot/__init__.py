"""Pictures of posterior draws, of parameters, of calibration, and of lenses."""

from diffpost.plot.calibration import coverage, ranks
from diffpost.plot.corner import corner
from diffpost.plot.images import image_grid, summary
from diffpost.plot.lensing import lens

__all__ = ["corner", "coverage", "image_grid", "lens", "ranks", "summary"]
