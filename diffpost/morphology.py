r"""Size, concentration, ellipticity and asymmetry of galaxies, batched.

Four numbers that a prior on galaxy images must get right, measured on the pixels alone so that samples
and held-out images are treated alike.  The centre is the flux-weighted centroid, found by iteration in
a window; apertures are circular about it and reach to the largest circle that fits the frame.

    size            r50, the radius that holds half of the flux in that circle, in pixels
    concentration   5 log10(r80 / r20)                        (Conselice 2003, ApJS 147, 1, equation 9)
    ellipticity     |e| of the second moments in a round Gaussian window of width r50
                    ((Q11 - Q22)^2 + 4 Q12^2)^1/2 / (Q11 + Q22)
    asymmetry       sum |I - I_180| / (2 sum |I|) about the centre   (Conselice 2003, equation 8, without
                    the correction for sky noise)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["half_light_radius", "measure", "peak", "total_flux"]


def measure(images: Tensor) -> dict[str, Tensor]:
    """Morphology of each image.

    Parameters
    ----------
    images: (B, H, W) or (B, 1, H, W), background-subtracted.

    Returns
    -------
    size (pixels), concentration, ellipticity, asymmetry: each (B,) float64; NaN where the flux in the
    aperture is not positive.

    Raises
    ------
    ValueError: for another shape.
    """
    images = _planes(images)
    yc, xc, y, x, edge = _apertures(images)
    dy, dx = y[None, :, None] - yc[:, None, None], x[None, None, :] - xc[:, None, None]
    radius = torch.hypot(dy, dx)
    r20, r50, r80 = _radii(images, radius, edge, (0.2, 0.5, 0.8))
    return {
        "size": r50,
        "concentration": 5 * torch.log10(r80 / r20),
        "ellipticity": _ellipticity(images, dy, dx, radius, r50),
        "asymmetry": _asymmetry(images, radius, yc / y[-1], xc / x[-1], edge),
    }


def total_flux(images: Tensor) -> Tensor:
    """Sum of all pixels and channels: (B, ...) to (B,), float64."""
    return images.flatten(1).sum(1, dtype=torch.float64)


def peak(images: Tensor) -> Tensor:
    """The brightest pixel: (B, ...) to (B,), float64."""
    return images.flatten(1).amax(1).double()


def half_light_radius(images: Tensor) -> Tensor:
    """r50 alone, as `measure` has it: (B, H, W) or (B, 1, H, W) to (B,) pixels, float64.

    NaN where the flux in the aperture is not positive.

    Raises
    ------
    ValueError: for another shape.
    """
    images = _planes(images)
    yc, xc, y, x, edge = _apertures(images)
    radius = torch.hypot(y[None, :, None] - yc[:, None, None], x[None, None, :] - xc[:, None, None])
    return _radii(images, radius, edge, (0.5,))[0]


def _planes(images: Tensor) -> Tensor:
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3:
        raise ValueError(f"got images of shape {tuple(images.shape)}; expected (B, H, W)")
    return images.double()


def _apertures(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centroids yc, xc (B,), pixel coordinates y, x about the frame's centre, largest radii (B,)."""
    y, x = (
        torch.arange(n, dtype=torch.float64, device=images.device) - (n - 1) / 2
        for n in images.shape[1:]
    )
    yc, xc = _centroid(images, y, x)
    return yc, xc, y, x, torch.minimum(y[-1] - yc.abs(), x[-1] - xc.abs())


def _centroid(images: Tensor, y: Tensor, x: Tensor, iterations: int = 30) -> tuple[Tensor, Tensor]:
    """Centroid in a Gaussian window of a sixth of the frame that follows it."""
    width = min(len(y), len(x)) / 6
    yc = xc = torch.zeros(len(images), dtype=images.dtype, device=images.device)
    for _ in range(iterations):
        dy, dx = y[None, :, None] - yc[:, None, None], x[None, None, :] - xc[:, None, None]
        weight = images * torch.exp(-(dy**2 + dx**2) / (2 * width**2))
        total = weight.sum((1, 2))
        yc = yc + (weight * dy).sum((1, 2)) / total
        xc = xc + (weight * dx).sum((1, 2)) / total
        yc, xc = yc.clamp(y[0] / 2, y[-1] / 2), xc.clamp(x[0] / 2, x[-1] / 2)
    return yc, xc


def _radii(images: Tensor, radius: Tensor, edge: Tensor, shares: tuple[float, ...]) -> list[Tensor]:
    """Radii that hold the given shares of the flux within `edge`; a pixel counts in part at its rim."""
    grid = torch.linspace(0, 1, 129, dtype=images.dtype, device=images.device)[1:]
    rings = edge[:, None] * grid
    inside = [
        ((rings[:, i, None, None] - radius + 0.5).clamp(0, 1) * images).sum((1, 2))
        for i in range(rings.shape[1])
    ]
    growth = torch.stack(inside, dim=1)
    growth = torch.cummax(growth / growth[:, -1:], dim=1).values
    found = []
    for share in shares:
        right = (growth < share).sum(1).clamp(1, len(grid) - 1)[:, None]
        g0, g1 = growth.gather(1, right - 1), growth.gather(1, right)
        r0, r1 = rings.gather(1, right - 1), rings.gather(1, right)
        part = ((share - g0) / (g1 - g0).clamp_min(1e-12)).clamp(0, 1)
        found.append((r0 + part * (r1 - r0))[:, 0])
    return found


def _ellipticity(images: Tensor, dy: Tensor, dx: Tensor, radius: Tensor, r50: Tensor) -> Tensor:
    weight = images * torch.exp(-(radius**2) / (2 * r50[:, None, None] ** 2))
    q11, q22, q12 = ((weight * q).sum((1, 2)) for q in (dx * dx, dy * dy, dx * dy))
    return torch.sqrt((q11 - q22) ** 2 + 4 * q12**2) / (q11 + q22)


def _asymmetry(images: Tensor, radius: Tensor, yc: Tensor, xc: Tensor, edge: Tensor) -> Tensor:
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = -1  # x' = 2 centre - x, in grid_sample's units
    theta[:, 0, 2], theta[:, 1, 2] = 2 * xc, 2 * yc
    grid = F.affine_grid(theta, [len(images), 1, *images.shape[1:]], align_corners=True)
    turned = F.grid_sample(images[:, None], grid, align_corners=True)[:, 0]
    disc = radius <= edge[:, None, None]
    return ((images - turned).abs() * disc).sum((1, 2)) / (2 * (images.abs() * disc).sum((1, 2)))
