"""Rays from the image back to the source, through any lens model of caustics.

The lens equation beta = theta - alpha(theta) is caustics'; here are only its parameters in one vector,
batches of them, and what to do where alpha has no value. A model's free ("dynamic") parameters are
counted in caustics' order. A redshift that was left open and that the deflections do not depend on
(an Einstein radius in arcsec needs none) is not a parameter.

At the middle of a singular lens alpha has no value, and near it derivatives grow without bound,
although these rays are of no weight. A ray very near a lens' (x0, y0) is therefore taken at a small
distance from it, and moves along with it.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from diffpost.physics.transforms import hidden

try:
    from caskade import Module, forward
    from caustics import ThickLens, ThinLens
except ImportError as error:
    raise ImportError(
        "lenses need caustics, which is not installed: pip install 'diffpost[lens]'"
    ) from error

__all__ = ["LensParameter", "RayTracer", "beside", "valid_range"]

_REDSHIFTS = ("z_l", "z_s")


@final
@dataclass(frozen=True)
class LensParameter:
    """A free parameter of a lens model, as caustics describes it.

    Args:
        name: "q", or "shear.gamma_1" where the model has parts; "a_m[0]" of several values.
        unit: in words.
        lower, upper: the valid range; infinite where there is none.
        cyclic: values outside the range are the same as those inside.
        value: that caustics holds for it, None if none.
    """

    name: str
    unit: str
    lower: float = -math.inf
    upper: float = math.inf
    cyclic: bool = False
    value: float | None = None

    def valid(self, value: Tensor) -> Tensor:
        """Whether values are in the range. As caustics has it, a range with two ends has both of them, and
        one with a single end has it not.
        """
        if self.cyclic or (math.isinf(self.lower) and math.isinf(self.upper)):
            return value.isfinite()
        if math.isinf(self.lower):
            return value < self.upper
        if math.isinf(self.upper):
            return (value > self.lower) & value.isfinite()
        return (value >= self.lower) & (value <= self.upper)

    @property
    def range(self) -> str:
        """In words."""
        if self.cyclic:
            return f"finite, repeating after {self.upper - self.lower:g}"
        if math.isinf(self.lower) and math.isinf(self.upper):
            return "finite"
        if math.isinf(self.lower):
            return f"below {self.upper:g}"
        if math.isinf(self.upper):
            return f"above {self.lower:g}"
        return f"from {self.lower:g} to {self.upper:g}"


class _Channels(Module):
    """Several lens models as one graph of parameters."""

    def __init__(self, masses: Sequence[Any]) -> None:
        super().__init__(name="channels")
        # one by one: in a tuple caskade wants different names
        for i, mass in enumerate(masses):
            setattr(self, f"mass_{i}", mass)

    @property
    def masses(self) -> list[Any]:
        return [child for name, child in self.children.items() if name.startswith("mass_")]

    @forward
    def raytrace(self, x: Tensor, y: Tensor, near: float) -> Tensor:
        """(K, 2, n), arcsec on the source plane."""
        out = []
        for mass in self.masses:
            u, v = x, y
            for part in _centred(mass):
                u, v = beside(u, v, part.x0.value, part.y0.value, near)
            out.append(torch.stack(mass.raytrace(u, v)))
        return torch.stack(out)


def _centred(mass: Any) -> Iterator[Any]:
    for node in mass.topological_ordering():
        if isinstance(node, Module) and {"x0", "y0"} <= set(node.children):
            yield node


def beside(x: Tensor, y: Tensor, x0: Tensor, y0: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """Rays that hit a centre, at a small distance from it, moving with the ray and with the centre."""
    hit = (x - x0) ** 2 + (y - y0) ** 2 < near**2
    step = near / math.sqrt(2)
    return (
        torch.where(hit, x0 + step + (x - x.detach()), x),
        torch.where(hit, y0 + step + (y - y.detach()), y),
    )


@final
class RayTracer:
    """The lens equation of one or several models as a function of one vector of parameters.

    Args:
        masses: lens models of caustics, K of them. They are copied.
        near: distance from a centre below which a ray is taken at that distance, arcsec.

    Attributes:
        parameters: the P free ones, in the order of the vector.

    Raises:
        ValueError: not a lens model of caustics, or one that cannot trace a ray.
    """

    def __init__(self, masses: Sequence[Any], near: float) -> None:
        for mass in masses:
            if not isinstance(mass, ThinLens | ThickLens):
                raise ValueError(
                    f"Lens: got the mass {mass!r}, of type {type(mass).__name__}; expected a lens model of "
                    "caustics (SIE, EPL, SinglePlane, ...), or a list with one for each channel."
                )
        self.count = len(masses)
        self.near = near
        # a copy of its own: later changes of the user's model must not reach a matrix that was built
        self._base = _Channels(copy.deepcopy(list(masses)))
        # the device is named, as caskade would otherwise ask the value of what depends on a free parameter
        self._base.to(dtype=torch.float64, device=torch.device("cpu"))
        for param in self._base.dynamic_params:
            param.group = 0
        self._check_known()
        self._models: dict[tuple[torch.dtype, torch.device], _Channels] = {}
        self._together = True
        self.parameters = self._name()
        self._probe()

    # parameters --------------------------------------------------------------------------------

    def _owners(self, params: Sequence[Any]) -> dict[Any, Any]:
        # a parameter may also belong to models of the user that are not traced
        inside = [n for n in self._base.topological_ordering() if isinstance(n, Module)]
        return {
            param: next(module for module in inside if param in module.children.values())
            for param in params
        }

    def _check_known(self) -> None:
        """Raises where a value that the model holds is out of range, of which caustics only warns."""
        for param, owner in self._owners(self._base.static_params).items():
            lower, upper = valid_range(param)
            told = LensParameter(f"{owner.name}.{param.name}", "", lower, upper, bool(param.cyclic))
            bad = ~told.valid(param.value)
            if bool(bad.any()):
                raise ValueError(
                    f"Lens: got {told.name} = {float(param.value[bad][0]):g}; expected a value {told.range}."
                )

    def _name(self) -> tuple[LensParameter, ...]:
        owners = self._owners(self._base.dynamic_params)
        plain = len(set(owners.values())) == 1 and self.count == 1
        plain = plain and next(iter(owners.values())) is self._base.masses[0]
        labels = _labels(list(dict.fromkeys(owners.values())))
        found = []
        for param, owner in owners.items():
            name = param.name if plain else f"{labels[owner]}.{param.name}"
            lower, upper = valid_range(param)
            value = None if param.value is None else param.value.flatten().tolist()
            size = math.prod(param.shape)
            for i, index in enumerate(_indices(param.shape)):
                found.append(
                    LensParameter(
                        name + index,
                        param.units or "",
                        lower,
                        upper,
                        bool(param.cyclic),
                        value[i] if value is not None and len(value) == size else None,
                    )
                )
        return tuple(found)

    def _probe(self) -> None:
        """Drops redshifts that do not matter, and finds out whether entries can be traced together."""
        open_redshifts = [
            param
            for param in self._base.dynamic_params
            if param.name in _REDSHIFTS and param.value is None
        ]
        for param in open_redshifts:
            if self._matters(param):
                continue
            param.to_static(torch.ones((), dtype=torch.float64))
            self.parameters = self._name()
        if self.parameters:
            try:
                self._probe_ray(self._guess()[None])
            except RuntimeError as error:
                # planes are sorted by their redshift, which a batch of lenses cannot do as one
                if "vmap" not in str(error):
                    raise
                self._together = False

    def _matters(self, param: Any) -> bool:
        before = 0
        for other in self._base.dynamic_params:
            if other is param:
                break
            before += math.prod(other.shape)
        guess = self._guess()
        guess[before] = math.nan
        self._together = False
        try:
            return not bool(self._probe_ray(guess[None]).isfinite().all())
        except Exception:  # a model may refuse such a redshift in its own way: then it needs one
            return True
        finally:
            self._together = True

    def _probe_ray(self, params: Tensor) -> Tensor:
        x = torch.tensor([0.37, -0.83], dtype=torch.float64)
        return self._trace(x, x.flip(0), params)

    def _guess(self) -> Tensor:
        """Some valid vector (P,), for a look at the structure only."""
        values = []
        for p in self.parameters:
            if p.value is not None:
                values.append(p.value)
            elif p.name.endswith("z_l"):
                values.append(0.5)
            elif p.name.endswith("z_s"):
                values.append(2.0)
            elif math.isfinite(p.lower) and math.isfinite(p.upper):
                values.append(0.4 * p.lower + 0.6 * p.upper)
            else:
                values.append(p.lower + 1.0 if math.isfinite(p.lower) else 0.1)
        return torch.tensor(values, dtype=torch.float64)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.parameters)

    def vector(self, params: Tensor | Mapping[str, Any] | Sequence[float]) -> Tensor:
        """A vector (P,) or (B, P) of what a user gave, in the order of ``names``.

        Raises:
            ValueError: a name that the model has not, or that is missing; another number of values.
        """
        if isinstance(params, Mapping):
            params = self._from_names(params)
        if not isinstance(params, Tensor):
            params = torch.as_tensor(params, dtype=torch.float64)
        if not params.is_floating_point():
            params = params.double()
        count = len(self.parameters)
        if params.ndim not in (1, 2) or params.shape[-1] != count:
            raise ValueError(
                f"Lens: got parameters of shape {tuple(params.shape)}; expected ({count},) or (B, {count}): "
                f"{', '.join(self.names) or 'this lens has none'}."
            )
        # lenses are not traced in half precision
        return params if params.dtype in (torch.float32, torch.float64) else params.float()

    def _from_names(self, params: Mapping[str, Any]) -> Tensor:
        unknown = [name for name in params if name not in self.names]
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), self.names, n=1, cutoff=0.0)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"Lens: got an unknown parameter {unknown[0]!r}.{hint} The free parameters are "
                f"{', '.join(self.names) or 'none'}."
            )
        missing = [name for name in self.names if name not in params]
        if missing:
            raise ValueError(
                f"Lens: got no value for {', '.join(missing)}; expected all of {', '.join(self.names)}."
            )
        values = [torch.as_tensor(params[name]) for name in self.names]
        dtypes = [v.dtype for v in values if v.dtype.is_floating_point and v.ndim]
        dtype = max(dtypes, key=lambda d: d.itemsize) if dtypes else torch.float64
        return torch.stack(torch.broadcast_tensors(*(v.to(dtype) for v in values)), -1)

    def valid(self, params: Tensor) -> Tensor:
        """Which vectors are in the valid ranges: (..., P) to (...), bool."""
        good = torch.ones(params.shape[:-1], dtype=torch.bool, device=params.device)
        for i, parameter in enumerate(self.parameters):
            good = good & parameter.valid(params[..., i])
        return good

    def check(self, params: Tensor) -> None:
        """Raises unless all are in the valid ranges. Inside ``torch.func.vmap`` nothing can be
        seen, nor checked.
        """
        if hidden(params) or bool(self.valid(params).all()):
            return
        for i, parameter in enumerate(self.parameters):
            values = params.detach()[..., i].reshape(-1)
            bad = ~parameter.valid(values)
            if bool(bad.any()):
                row = int(bad.nonzero()[0, 0])
                where = f" (entry {row} of the batch)" if params.ndim > 1 else ""
                raise ValueError(
                    f"Lens: got {parameter.name} = {float(values[row]):g}{where}; expected a value "
                    f"{parameter.range}."
                )

    # rays --------------------------------------------------------------------------------------

    def trace(self, x: Tensor, y: Tensor, params: Tensor) -> Tensor:
        """Where rays come from, in the dtype of the parameters.

        Args:
            x, y: (n,) on the image, arcsec.
            params: (E, P).

        Returns:
            (E, K, 2, n): x and y on the source plane, arcsec.

        Raises:
            ValueError: a place without a deflection.
        """
        beta = self._trace(x.to(params), y.to(params), params)
        self._check_finite(beta, x, y, params)
        return beta

    def _trace(self, x: Tensor, y: Tensor, params: Tensor) -> Tensor:
        model = self._model(params.dtype, params.device)
        if not self.parameters:
            beta: Tensor = model.raytrace(x, y, self.near)
            return beta.expand(len(params), *beta.shape)

        def one(p: Tensor) -> Tensor:
            traced: Tensor = model.raytrace(x, y, self.near, params=p)
            return traced

        if self._together:
            return torch.func.vmap(one)(params)
        return torch.stack([one(p) for p in params])

    def _check_finite(self, beta: Tensor, x: Tensor, y: Tensor, params: Tensor) -> None:
        if hidden(beta) or bool(beta.isfinite().all()):
            return
        entry, channel, _, ray = (int(i) for i in (~beta.isfinite()).nonzero()[0])
        at = ", ".join(
            f"{name} = {float(value):g}"
            for name, value in zip(self.names, params.detach()[entry], strict=True)
        )
        raise ValueError(
            f"Lens: the deflection at x = {float(x[ray]):g}, y = {float(y[ray]):g} arcsec is not finite for "
            f"{type(self._base.masses[channel]).__name__} {self._base.masses[channel].name}"
            f"{' at ' + at if at else ''}. Give the lens a core, or keep its parameters away from there."
        )

    def _model(self, dtype: torch.dtype, device: torch.device) -> _Channels:
        if dtype == torch.float64 and device.type == "cpu":
            return self._base
        key = (dtype, device)
        if key not in self._models:
            self._models[key] = copy.deepcopy(self._base)
            self._models[key].to(dtype=dtype, device=device)
        return self._models[key]


def valid_range(param: Any) -> tuple[float, float]:
    lower, upper = param.valid
    return (
        -math.inf if lower is None else float(lower),
        math.inf if upper is None else float(upper),
    )


def _labels(owners: Sequence[Any]) -> dict[Any, str]:
    """Names of modules, numbered where several have the same."""
    names = [owner.name for owner in owners]
    labels = {}
    for i, owner in enumerate(owners):
        same = names.count(names[i]) > 1
        labels[owner] = f"{names[i]}_{names[: i + 1].count(names[i])}" if same else names[i]
    return labels


def _indices(shape: Sequence[int]) -> list[str]:
    if not shape:
        return [""]
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, len(shape))
    return [f"[{','.join(map(str, place))}]" for place in places.tolist()]
