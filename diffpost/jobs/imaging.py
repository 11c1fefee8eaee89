r"""What `diffpost image` does before it draws: visibilities, grid, checks, dirty image and beam.

With natural weights w = 1/sigma^2 the dirty image is

    D(l, m) = sum_k w_k Re[V_k exp(2 pi i (u_k l + v_k m))] / sum_k w_k      [Jy/beam],

whose noise is (sum_k w_k)^(-1/2) in every pixel, and the beam is the same sum with V = 1.  They are for looking at: what is
fitted are the visibilities, so there is no gridding and no deconvolution of a beam.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from astropy.io import fits
from numpy.typing import NDArray
from torch import Tensor

from diffpost.io.uv import VisibilityData, read_visibilities
from diffpost.io.uv_averaging import averaged, recalibrated
from diffpost.jobs.primary_beam import beam_width, primary_beam_on
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import LinearOperator
from diffpost.physics.grid import Grid

__all__ = ["ImagingProblem", "dirty_beam", "dirty_image", "prepare_imaging"]

Array = NDArray[np.float64]

_ARCSEC = math.pi / 180 / 3600
_W_PHASE = 0.1  # radians of phase by w from which it is told
UNIT = "Jy/pixel"


@final
@dataclass(frozen=True)
class ImagingProblem:
    """Visibilities and the grid that they are imaged on.

    data: as fitted; grid: x = -east, y = north, arcsec from the phase centre.
    operator: to (m, 2) visibilities, with the primary beam where there is one; bare: without it.
    primary_beam: (size, size) response of the antennas, or None.
    report: what was inferred, as JSON values; notes: the same in words.
    scale: Jy per pixel that the prior calls 1; None: to be inferred.
    """

    data: VisibilityData
    grid: Grid
    operator: LinearOperator
    bare: LinearOperator
    primary_beam: Array | None
    notes: tuple[str, ...]
    report: dict[str, Any]
    scale: float | None = None

    @property
    def y(self) -> Tensor:
        """(m, 2) real and imaginary parts, Jy, float64."""
        return torch.view_as_real(torch.from_numpy(self.data.vis.copy()))

    @property
    def weight(self) -> Tensor:
        """(m, 1) inverse variance of each part, Jy^-2, float64."""
        return torch.from_numpy(self.data.weight.copy())[:, None]

    def likelihood(self, dtype: torch.dtype = torch.float32) -> Likelihood:
        """Of all visibilities, as they are."""
        noise = GaussianNoise(weight=self.weight.expand(-1, 2).to(dtype))
        return Likelihood(self.y.to(dtype), self.operator, noise)

    @property
    def header(self) -> fits.Header:
        """World coordinates of the image: SIN about the phase centre; offsets only where that is not known."""
        return header_of(self.grid, self.data)


def header_of(grid: Grid, data: VisibilityData) -> fits.Header:
    """SIN coordinates of a grid whose x = y = 0 is the phase centre (Calabretta & Greisen 2002, section 5.1.5)."""
    out = fits.Header()
    if data.ra is not None and data.dec is not None:
        column, row = grid.to_pixel(0.0, 0.0)
        out["WCSAXES"] = 2
        for axis, (kind, value, at, step) in enumerate(
            (
                ("RA---SIN", data.ra, column, -grid.pixel),
                ("DEC--SIN", data.dec, row, grid.pixel),
            ),
            start=1,
        ):
            out[f"CTYPE{axis}"], out[f"CUNIT{axis}"] = kind, "deg"
            out[f"CRVAL{axis}"], out[f"CRPIX{axis}"] = value, at + 1
            out[f"CDELT{axis}"] = step / 3600
        out["RADESYS"], out["EQUINOX"] = "ICRS", 2000.0
    out["PIXARCS"] = (grid.pixel, "arcsec, side of a pixel")
    if data.target:
        out["OBJECT"] = data.target
    if data.frequency is not None:
        out["RESTFRQ"] = (float(np.average(data.frequency, weights=data.weight)), "Hz, mean")
    return out


def prepare_imaging(
    vis: str | os.PathLike[str] | VisibilityData,
    *,
    cell: float,
    size: int,
    center: tuple[float, float] = (0.0, 0.0),
    form: str | None = None,
    stokes: str = "pseudoI",
    field: str | int | None = None,
    spw: tuple[int, ...] | None = None,
    uv_unit: str | None = None,
    frequency: float | None = None,
    conjugate: bool = False,
    average: tuple[float, int] | None = None,
    recalibrate: str | None = None,
    systematic: float = 0.0,
    primary_beam: float | str | os.PathLike[str] | None = None,
    scale: float | None = None,
) -> ImagingProblem:
    """Read visibilities and lay the grid.

    Parameters
    ----------
    vis: file, or visibilities that were read.
    cell: side of a pixel, arcsec; size: pixels on a side.
    center: (east, north) of the image's middle from the phase centre, arcsec.
    form, stokes, field, spw, uv_unit, frequency, conjugate: as for `diffpost.io.uv.read_visibilities`.
    average: (seconds, channels) to average over; None for not.
    recalibrate: "common" divides the weights by one factor measured from neighbours in time, "baseline" by one a baseline.
    systematic: error of each visibility as a share of its amplitude, from calibration, added to its noise as if independent.
    primary_beam: full width at half power, arcsec, or a FITS map (`diffpost.jobs.primary_beam`); 0 for none; None for the
        file's, if it tells one.
    scale: Jy per pixel that the prior calls 1.

    Raises
    ------
    FileNotFoundError, ValueError: what cannot be read or used: see there; a grid that the visibilities do not reach or do not
        need; values out of range.
    """
    if not (math.isfinite(cell) and cell > 0):
        raise ValueError(f"got a cell of {cell} arcsec; expected a positive size of a pixel")
    if isinstance(size, bool) or size < 8:
        raise ValueError(f"got a size of {size} pixels; expected at least 8")
    if recalibrate not in (None, "common", "baseline"):
        raise ValueError(f"got recalibrate={recalibrate!r}; expected common or baseline")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"got a scale of {scale}; expected a positive flux per pixel")
    if isinstance(vis, VisibilityData):
        data = vis.conjugated() if conjugate else vis
    else:
        data = read_visibilities(
            vis, form, stokes=stokes, field=field, spw=spw, uv_unit=uv_unit, frequency=frequency, conjugate=conjugate,
        )  # fmt: skip
    if not (math.isfinite(systematic) and systematic >= 0):
        raise ValueError(
            f"got a systematic error of {systematic}; expected a share of the amplitude, 0 or more"
        )
    east, north = center
    grid = Grid(size, cell, centre=(-float(east), float(north)))
    field_of_view = size * cell
    if 1 / (data.longest * _ARCSEC) > field_of_view:
        raise ValueError(
            f"the longest baseline, {data.longest:.4g} wavelengths, resolves {1 / (data.longest * _ARCSEC):.3g} arcsec, more than the "
            f"whole image of {field_of_view:.3g}: u and v are in metres (give the unit and the frequency), or the image is too small"
        )
    report: dict[str, Any] = {"visibilities": dict(data.counts)}
    radius = math.hypot(*center) + field_of_view / math.sqrt(2)
    if recalibrate is not None:
        data, found = recalibrated(data, per_baseline=recalibrate == "baseline")
        report["weights"] = {
            "factor": found.factor,
            "error": found.error,
            "pairs": found.pairs,
            "baselines": [list(row) for row in found.baselines],
        }
    if average is not None:
        data, smearing = averaged(data, seconds=average[0], channels=average[1], radius=radius)
        report["averaging"] = {"before": smearing.before, "after": smearing.after, "largest_loss": smearing.largest}  # fmt: skip
    if systematic > 0:
        variance = 1 / data.weight + (systematic * np.abs(data.vis)) ** 2
        data = replace(data, weight=1 / variance).told(
            f"a systematic error of {systematic:.2%} of each amplitude was added to its noise"
        )
    given = data.primary_beam if primary_beam is None else primary_beam
    width = None if given is None else beam_width(given)
    beam, told = None, ""
    if given is not None and width != 0:
        beam, told = primary_beam_on(grid, given)
        report["primary_beam"] = str(given) if width is None else width
    else:
        report["primary_beam"] = None
    operator, bare = operators(data, grid, beam)
    notes = list(data.notes)
    notes.append(
        f"image: {size} x {size} pixels of {cell:g} arcsec; the longest baseline resolves "
        f"{1 / (data.longest * _ARCSEC):.3g} arcsec; noise of the dirty image {data.noise:.3g} Jy/beam"
    )
    if told:
        notes.append(told)
    if data.w is not None:
        from diffpost.physics.visibilities import w_phase

        phase = w_phase(torch.from_numpy(data.w.copy()), grid)
        report["w_phase"] = phase
        if phase > _W_PHASE:
            notes.append(
                f"warning: w is ignored, which turns phases by up to {phase:.2g} rad at the corners of the image; a smaller image, or "
                "one nearer to the phase centre, suffers less"
            )
    return ImagingProblem(data, grid, operator, bare, beam, tuple(notes), report, scale)


def operators(
    data: VisibilityData, grid: Grid, beam: Array | None
) -> tuple[LinearOperator, LinearOperator]:
    """The operator with the primary beam and the one without.

    Raises
    ------
    ValueError: finufft is not installed, or the cell is too large for the longest baseline.
    """
    try:
        from diffpost.physics.visibilities import Visibilities
    except ImportError as error:
        raise ValueError(f"imaging needs finufft ({error}): pip install 'diffpost[vis]'") from error
    u, v = torch.from_numpy(data.u.copy()), torch.from_numpy(data.v.copy())
    bare = Visibilities(u, v, grid)
    if beam is None:
        return bare, bare
    return Visibilities(u, v, grid, primary_beam=torch.from_numpy(beam)), bare


def dirty_image(problem: ImagingProblem, y: Tensor | None = None) -> Array:
    """(size, size) naturally weighted image of (m, 2) visibilities, by default the data; Jy/beam."""
    values = problem.y if y is None else y.double()
    with torch.no_grad():
        image = problem.bare.adjoint((problem.weight * values)[None])[0, 0]
    found: Array = (image.double() / problem.weight.sum()).cpu().numpy()
    return found


def dirty_beam(problem: ImagingProblem) -> tuple[Array, Grid]:
    """The beam about its centre, 1 there, on an odd number of pixels, and their grid."""
    size = problem.grid.shape[0]
    grid = Grid(size + 1 - size % 2, problem.grid.pixel)
    _, bare = operators(problem.data, grid, None)
    shifted = replace(problem, grid=grid, bare=bare)
    ones = torch.zeros(len(problem.data), 2, dtype=torch.float64)
    ones[:, 0] = 1.0
    return dirty_image(shifted, ones), grid


Announce = Callable[[str], None]
