"""The joint prior of an operator's parameters: independent, by name, in a small declarative form.

    theta_E: {uniform: [0.5, 2.0]}
    q:       {normal: [0.8, 0.1], within: [0.2, 1.0]}
    core:    {lognormal: [0.05, 0.5]}           # median, standard deviation of the logarithm
    angle:   {circular: 180}                    # its period; or [period, where the first one begins]
    z_lens:  0.155                              # a number: known

Chains move in the unconstrained coordinates z of :mod:`diffpost.parameters.priors`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from diffpost.parameters.priors import Circular, LogNormal, Normal, Prior, Uniform
from diffpost.random import normal, uniform

__all__ = ["ParameterPrior", "nearest"]

_KINDS = {"uniform": Uniform, "normal": Normal, "lognormal": LogNormal, "circular": Circular}
_ARGUMENTS = {
    "uniform": "[low, high]",
    "normal": "[mean, std]",
    "lognormal": "[median, sigma of the logarithm]",
    "circular": "a period, or [period, low]",
}
_STREAM = 24_000  # away from those of image samplers


@final
class ParameterPrior:
    """Independent priors of named parameters; those that are numbers are known and stay.

    Args:
        parameters: a prior, or a number, by name. The order is that of the columns of theta.

    Attributes:
        names: of the P free parameters, in order.
        priors: theirs.
        fixed: the known ones, by name.

    Raises:
        ValueError: no free parameter, a name that is not text, or a value that is not finite.
    """

    def __init__(self, parameters: Mapping[str, Prior | float]) -> None:
        for name, value in parameters.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"ParameterPrior: got the name {name!r}; expected text.")
            known = isinstance(value, int | float) and not isinstance(value, bool)
            if not isinstance(value, Prior) and not (known and math.isfinite(value)):
                raise ValueError(
                    f"ParameterPrior: {name} is {value!r}; expected a prior such as Uniform(0, 1), or a finite number."
                )
        free = {name: p for name, p in parameters.items() if isinstance(p, Prior)}
        if not free:
            raise ValueError(
                "ParameterPrior: no parameter has a prior; with all of them known, sample the image alone."
            )
        self.names = tuple(free)
        self.priors = tuple(free.values())
        self.fixed = {k: float(v) for k, v in parameters.items() if not isinstance(v, Prior)}
        self._order = tuple(parameters)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}: {value}" for name, value in self._items())
        return f"ParameterPrior({{{inside}}})"

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Prior:
        """The prior of a free parameter.

        Raises:
            KeyError: no such parameter, with the nearest name.
        """
        if name not in self.names:
            raise KeyError(f"no free parameter {name!r}{nearest(name, self.names)}")
        return self.priors[self.names.index(name)]

    def _items(self) -> list[tuple[str, Prior | float]]:
        free = dict(zip(self.names, self.priors, strict=True))
        return [(name, free[name] if name in free else self.fixed[name]) for name in self._order]

    # plain values ------------------------------------------------------------------------------

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> ParameterPrior:
        """Reads the declarative form, as YAML gives it.

        Raises:
            ValueError: an unknown kind of prior, with the nearest one, or arguments that do not fit it.
        """
        if not isinstance(content, Mapping) or not content:
            raise ValueError(
                f"ParameterPrior: got {content!r}; expected priors by name, such as theta_E: {{uniform: [0.5, 2]}}."
            )
        return ParameterPrior({name: _read(name, value) for name, value in content.items()})

    def to_dict(self) -> dict[str, Any]:
        """The declarative form, plain numbers and lists."""
        return {
            name: value.to_dict() if isinstance(value, Prior) else value
            for name, value in self._items()
        }

    def check_names(self, wanted: Iterable[str], of: str = "the operator") -> None:
        """Raises a ValueError unless these are just the parameters here, free or known.

        Args:
            wanted: the names that an operator takes.
            of: who takes them, for the message.
        """
        wanted = tuple(wanted)
        unknown = [name for name in self._order if name not in wanted]
        if unknown:
            raise ValueError(
                f"ParameterPrior: {of} has no parameter {unknown[0]!r}{nearest(unknown[0], wanted)}"
            )
        missing = [name for name in wanted if name not in self._order]
        if missing:
            raise ValueError(
                f"ParameterPrior: {of} also takes {', '.join(missing)}; give each a prior, or a number if it is known."
            )

    # densities ---------------------------------------------------------------------------------

    def values(self, theta: Tensor) -> dict[str, Tensor]:
        """Every parameter by name, known ones too, each (B,), of theta (B, P)."""
        self._check(theta)
        found = dict(zip(self.names, theta.unbind(1), strict=True))
        full = theta.new_full
        return {
            name: found[name] if name in found else full((len(theta),), self.fixed[name])
            for name in self._order
        }

    def log_prob(self, theta: Tensor) -> Tensor:
        """log p(theta), (B, P) to (B,); -inf outside the support."""
        return self._sum(theta, [p.log_prob for p in self.priors])

    def log_prob_z(self, z: Tensor) -> Tensor:
        """log p(z) = log p(theta(z)) + log_jacobian(z), (B, P) to (B,)."""
        return self._sum(z, [p.log_prob_z for p in self.priors])

    def log_jacobian(self, z: Tensor) -> Tensor:
        """log |d theta/dz|, (B, P) to (B,)."""
        return self._sum(z, [p.log_jacobian for p in self.priors])

    def constrain(self, z: Tensor) -> Tensor:
        """theta of unconstrained coordinates z, (..., P) to (..., P)."""
        return self._each(z, [p.constrain for p in self.priors])

    def unconstrain(self, theta: Tensor) -> Tensor:
        """z of theta, (..., P) to (..., P); infinite or NaN on bounds or outside."""
        return self._each(theta, [p.unconstrain for p in self.priors])

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n draws of the prior, (n, P) float64; draw i depends on (seed, i) alone."""
        ids = torch.arange(n)
        shape = (len(self),)
        z = normal(seed, ids, 0, shape, torch.float64, stream=_STREAM)
        turns = uniform(seed, ids, 0, shape, torch.float64, stream=_STREAM)
        columns = [
            z[:, i] if p.z_period is None else p.z_period * turns[:, i]
            for i, p in enumerate(self.priors)
        ]
        return self.constrain(torch.stack(columns, 1))

    def unwrapped(self, theta: Tensor) -> Tensor:
        """theta (..., P) with every angle within half a period of the circular mean of all draws given."""
        columns = list(theta.unbind(-1))
        for i, p in enumerate(self.priors):
            if p.period is None:
                continue
            turn = 2 * math.pi / p.period
            angle = turn * columns[i]
            mean = torch.atan2(angle.sin().mean(), angle.cos().mean())
            off = torch.remainder(angle - mean + math.pi, 2 * math.pi) - math.pi
            columns[i] = (mean + off) / turn
        return torch.stack(columns, -1)

    def _check(self, values: Tensor) -> None:
        if values.ndim == 0 or values.shape[-1] != len(self):
            raise ValueError(
                f"ParameterPrior: got shape {tuple(values.shape)}; expected (..., {len(self)}), a column for each of "
                f"{', '.join(self.names)}."
            )

    def _each(self, values: Tensor, maps: list[Any]) -> Tensor:
        self._check(values)
        return torch.stack([f(v) for f, v in zip(maps, values.unbind(-1), strict=True)], -1)

    def _sum(self, values: Tensor, maps: list[Any]) -> Tensor:
        return self._each(values, maps).sum(-1)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown name: the nearest one, or all of them."""
    names = tuple(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (
        f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(names) or 'none'}."
    )


def _read(name: str, value: Any) -> Prior | float:
    if not isinstance(value, Mapping):
        return _number(value, name)
    content = dict(value)
    within = content.pop("within", None)
    if len(content) != 1:
        raise ValueError(
            f"{name}: got {dict(value)!r}; expected one kind of prior, such as {{uniform: [0, 1]}}, perhaps with "
            "within: [low, high], or a number."
        )
    ((kind, given),) = content.items()
    if kind not in _KINDS:
        raise ValueError(f"{name}: no prior is called {kind!r}{nearest(str(kind), _KINDS)}")
    arguments = list(given) if isinstance(given, list | tuple) else [given]
    if len(arguments) != 2 and not (kind == "circular" and len(arguments) == 1):
        raise ValueError(f"{name}: got {kind}: {given!r}; expected {_ARGUMENTS[kind]}.")
    numbers = [_number(a, name) for a in arguments]
    if within is None:
        bounds = []
    elif kind not in ("normal", "lognormal"):
        raise ValueError(f"{name}: within belongs to normal and lognormal, not to {kind}.")
    elif not isinstance(within, list | tuple) or len(within) != 2:
        raise ValueError(f"{name}: got within: {within!r}; expected [low, high].")
    else:
        bounds = [_number(b, name) for b in within]
    try:
        return _KINDS[kind](*numbers, *bounds)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _number(value: Any, name: str) -> float:
    """A float; also of text such as 1e-3, which YAML takes for text."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: got {value!r}; expected a number.") from None
