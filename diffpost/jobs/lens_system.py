"""The lens of a job on its grids, as operators: free or known, in front of the PSF."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from diffpost.jobs.lens_setup import LensDescription, LensScene
from diffpost.operator import Convolve, Diagonal, PixelBin
from diffpost.operators.base import LinearOperator
from diffpost.parameters import OperatorFamily, ParameterPrior
from diffpost.parameters.family import Values
from diffpost.physics.grid import Grid
from diffpost.physics.lens_family import LensFamily
from diffpost.physics.lens_light import LensLight
from diffpost.physics.lensing import Lens
from diffpost.physics.light_model import LightModel
from diffpost.score import ScoreModel

__all__ = [
    "FLUX",
    "KnownLens",
    "LensSystem",
    "SinglePrecision",
    "coarse_grid",
    "lens_system",
    "source_grid",
]

FLUX = "source.flux"
_FEWEST = 6  # pixels on a side of a source


@final
class SinglePrecision(LinearOperator):
    """An operator that is computed in float32 whatever comes, for a Fourier transform takes half the time in it."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator

    def output_shape(self, input_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.operator.output_shape(input_shape)

    def __call__(self, x: Tensor) -> Tensor:
        return self.operator(x.float()).to(x.dtype)

    def adjoint(self, v: Tensor) -> Tensor:
        return self.operator.adjoint(v.float()).to(v.dtype)


@final
class KnownLens(OperatorFamily):
    """A known lens with a source whose brightness is a parameter, the one but for those of the lens' light: flux R L x + b.

    Args:
        operator: R L.
        input_shape, data_shape: of a source and its data.
        light: b.
    """

    def __init__(
        self,
        operator: LinearOperator,
        input_shape: tuple[int, ...],
        data_shape: tuple[int, ...],
        light: LensLight | None = None,
    ) -> None:
        self.operator = operator
        self.light = light
        self.names = (FLUX, *(() if light is None else light.names))
        self.input_shape, self.data_shape = input_shape, data_shape
        self._seen: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def at(self, values: Values) -> LinearOperator:
        flux = values[FLUX].detach()
        if float(flux.max()) != float(flux.min()):
            raise ValueError(
                "KnownLens.at: got several fluxes; expected one, for one operator. Use apply."
            )
        return Diagonal(flux[0].expand(self.data_shape)) @ self.operator

    def background(self, values: Values) -> Tensor | None:
        return None if self.light is None else self.light.data(values)

    def apply(self, values: Values, x: Tensor) -> Tensor:
        return values[FLUX].reshape(-1, *[1] * len(self.data_shape)) * self.operator(x)

    def columns(self, values: Values, images: Tensor) -> Tensor:
        # The same images at every flux: seen once. They come as new views of the same memory, which is kept alive here.
        place = (images.data_ptr(), tuple(images.shape), images.stride(), images.dtype)
        kept = self._seen.get(place)
        if kept is None:
            with torch.no_grad():
                kept = images, self.operator(images)
            self._seen[place] = kept
        return values[FLUX].reshape(1, -1, *[1] * len(self.data_shape)) * kept[1][:, None]


@final
@dataclass(frozen=True)
class LensSystem:
    """A lens between a source grid and the image, and the instrument behind it.

    lens: of caustics' mass; response: the PSF; fixed: (P,) values of its free parameters where they are held, else None.
    light: of the lens itself, with its own way to the same data; prior: of what is free in mass and light.
    """

    lens: Lens
    response: LinearOperator
    fixed: Tensor | None
    light: LensLight | None = None
    prior: ParameterPrior | None = None

    @property
    def known(self) -> bool:
        """Whether the mass is."""
        return self.fixed is not None or not self.lens.parameters

    @property
    def source(self) -> Grid:
        return self.lens.source

    @property
    def family(self) -> OperatorFamily:
        if not self.known:
            return LensFamily(self.lens, SinglePrecision(self.response), light=self.light)
        shapes = (1, *self.lens.source.shape), (1, *self.lens.image.shape)
        seen = SinglePrecision(self.response) @ self.lens.at(self.fixed)
        return KnownLens(seen, *shapes, light=self.light)

    def params(self, names: tuple[str, ...], theta: Tensor) -> Tensor | None:
        """The lens' parameters (..., P) of draws (..., len(names)); None where it has none."""
        if self.known:
            return self.fixed
        return torch.stack([theta[..., names.index(n)] for n in self.lens.parameters], -1)

    def lit(self, names: tuple[str, ...], theta: Tensor) -> Tensor | None:
        """Data (B, 1, ny, nx) of the lens' own light at draws theta (B, P), float64; None where it is not modelled."""
        if self.light is None:
            return None
        with torch.no_grad():
            return self.light.data(dict(zip(names, theta.double().unbind(1), strict=True)))

    def sheared(self, names: tuple[str, ...], theta: Tensor) -> LinearOperator:
        """Lensing alone, without the instrument: entry b of a batch with theta[b] (B, P)."""
        return self.lens.at(self.params(names, theta))


def source_grid(
    description: LensDescription, image: Grid, prior: ScoreModel, centre: tuple[float, float]
) -> Grid:
    """The fine grid of the source.

    Raises
    ------
    ValueError: a size that the prior's network cannot take.
    """
    plan = description.source
    size = int(prior.shape[-1]) if plan.size is None else plan.size
    stride = int(getattr(prior, "stride", 1))
    if size % stride or size < _FEWEST:
        raise ValueError(
            f"source.size: got {size}; expected a multiple of {stride} (the prior's network) of at least {_FEWEST}"
        )
    pixel = image.pixel / 2 if plan.pixel is None else plan.pixel
    return Grid(size, pixel, plan.centre or centre, sky=image.sky)


def lens_system(
    description: LensDescription, scene: LensScene, source: Grid, *, fixed: bool, rays: int | None
) -> LensSystem:
    """The lens on these grids; fixed: every parameter at the median of its prior; rays: per pixel and side.

    Raises
    ------
    ValueError: redshifts that the mass needs are missing.
    """
    image = scene.grid if rays is None else replace(scene.grid, oversample=rays)
    lens = Lens(description.model.mass, image, source)
    held = None
    prior = description.model.prior
    open_ = [n for n in lens.parameters if prior is None or n not in prior.names]
    if any(n.endswith(("z_l", "z_s")) for n in open_):
        raise ValueError(
            "the lens model has no redshifts, which its profiles need; add them to the YAML file, such as "
            "redshifts: {lens: 0.2, source: 1.1}"
        )
    bright = description.model.light
    if fixed and prior is not None:
        middle = prior.constrain(torch.zeros(len(prior), dtype=torch.float64))
        values = dict(zip(prior.names, middle.tolist(), strict=True))
        bright = None if bright is None else bright.held(values)
        if lens.parameters:
            held = torch.tensor([values[n] for n in lens.parameters], dtype=torch.float64)
    return LensSystem(
        lens,
        Convolve(scene.psf.float()),
        held,
        None if bright is None else _light(bright, scene, rays),
        None if fixed else prior,
    )


def _light(model: LightModel, scene: LensScene, rays: int | None) -> LensLight:
    """On the pixels of the image, before they are added up."""
    whole = scene.whole or scene
    grid = whole.grid if rays is None else replace(whole.grid, oversample=rays)
    seen: LinearOperator = Convolve(whole.psf)
    return LensLight(model, grid, seen if scene.bins == 1 else PixelBin(scene.bins) @ seen)


def coarse_grid(fine: Grid, bins: int) -> Grid:
    """The same field in pixels `bins` times as wide."""
    return replace(fine, n=fine.shape[0] // bins, pixel=fine.pixel * bins)
