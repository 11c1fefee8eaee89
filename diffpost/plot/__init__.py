"""Pictures of posterior draws and of their calibration."""

from diffpost.plot.calibration import coverage, ranks
from diffpost.plot.images import image_grid, summary

__all__ = ["coverage", "image_grid", "ranks", "summary"]
