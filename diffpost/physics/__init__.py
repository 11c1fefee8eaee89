"""Operators of real instruments and skies: grids, lenses, point spread functions, visibilities."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from diffpost.physics.fixed_lens import FixedLens
from diffpost.physics.grid import Grid, SkyFrame

if TYPE_CHECKING:
    from diffpost.physics.closures import Closures
    from diffpost.physics.compression import compress
    from diffpost.physics.critical import caustic_curves, critical_curves, jacobian, magnification
    from diffpost.physics.gridded_visibilities import (
        CellScatter,
        GriddedVisibilities,
        GriddingError,
    )
    from diffpost.physics.lens_family import LensFamily
    from diffpost.physics.lens_light import LensLight
    from diffpost.physics.lens_model import LensModel, read_lens_model
    from diffpost.physics.lensing import Lens, SourceGridWarning
    from diffpost.physics.light_model import LightModel
    from diffpost.physics.nuisances import AntennaGains, LinearisedNuisance, OffsetAndScale
    from diffpost.physics.ray_tracing import LensParameter
    from diffpost.physics.scans import scan_numbers
    from diffpost.physics.self_calibration import SelfCalibration, posterior_step, self_calibrate
    from diffpost.physics.visibilities import NormalOperator, Visibilities, w_phase

__all__ = [
    "AntennaGains",
    "CellScatter",
    "Closures",
    "FixedLens",
    "Grid",
    "GriddedVisibilities",
    "GriddingError",
    "Lens",
    "LensFamily",
    "LensLight",
    "LensModel",
    "LensParameter",
    "LightModel",
    "LinearisedNuisance",
    "NormalOperator",
    "OffsetAndScale",
    "SelfCalibration",
    "SkyFrame",
    "SourceGridWarning",
    "Visibilities",
    "caustic_curves",
    "compress",
    "critical_curves",
    "jacobian",
    "magnification",
    "posterior_step",
    "read_lens_model",
    "scan_numbers",
    "self_calibrate",
    "w_phase",
]

# These need caustics, or finufft, which is imported when one of them is first asked for.
_LATE = {
    "AntennaGains": "nuisances",
    "Closures": "closures",
    "CellScatter": "gridded_visibilities",
    "GriddedVisibilities": "gridded_visibilities",
    "GriddingError": "gridded_visibilities",
    "Lens": "lensing",
    "LensFamily": "lens_family",
    "LensLight": "lens_light",
    "LensModel": "lens_model",
    "LensParameter": "ray_tracing",
    "LightModel": "light_model",
    "LinearisedNuisance": "nuisances",
    "NormalOperator": "visibilities",
    "OffsetAndScale": "nuisances",
    "SelfCalibration": "self_calibration",
    "SourceGridWarning": "lensing",
    "Visibilities": "visibilities",
    "caustic_curves": "critical",
    "compress": "compression",
    "critical_curves": "critical",
    "jacobian": "critical",
    "magnification": "critical",
    "posterior_step": "self_calibration",
    "read_lens_model": "lens_model",
    "scan_numbers": "scans",
    "self_calibrate": "self_calibration",
    "w_phase": "visibilities",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(f"diffpost.physics.{_LATE[name]}"), name)
    raise AttributeError(f"module 'diffpost.physics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
