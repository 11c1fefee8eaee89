r"""The light of a lens written down in words: caustics' profile, each parameter known, tied or with a prior.

    light:
      bulge:
        profile: Sersic
        centre: main                             # of a part of the mass, or of the light above
        q: {uniform: [0.4, 1]}
        phi: main.phi                            # tied to a parameter of another part
        n: {normal: [4, 1], within: [0.5, 8]}
        Re: {lognormal: [1, 0.5]}                # arcsec
        flux: {lognormal: [500, 1]}              # of the whole profile, in the image's unit
      point:
        profile: Gaussian
        centre: main
        sigma: 0.05
        flux: {lognormal: [20, 1]}

Sersic is caustics' profile I = Ie exp(-k ((r/Re)^(1/n) - 1)), with r^2 = x^2 + y^2/q^2 along and across the long axis and
caustics' k(n). Instead of Ie, flux per square arcsec, it may have

    flux = 2 pi n q Re^2 Ie e^k k^(-2n) Gamma(2n)

(Graham & Driver 2005, arXiv:astro-ph/0503176, equation 4). Gaussian is the same profile at n = 1/2,
exp(-r^2/(2 sigma^2)), hence Re = sigma (2 k(1/2))^(1/2). A component without q and phi is round, one without a centre at (0, 0).

A flux enters the image linearly and could be marginalised, were it normal. It is a sampled parameter instead: it is
positive, sources are drawn by diffusion given the light of their own theta, and one more dimension of the chains costs one more
number of a gradient that is computed anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from diffpost.parameters.prior import ParameterPrior, nearest
from diffpost.physics.valid_ranges import check_prior, check_value

try:
    import caustics
    from caskade import Param
except ImportError as error:
    raise ImportError(
        "lenses need caustics, which is not installed: pip install 'diffpost[lens]'"
    ) from error

__all__ = ["LightModel", "LightPart", "read_light"]

_OPTIONS = ("angle_system", "s")  # of caustics' Sersic, not parameters
_CENTRE = ("x0", "y0")
_ROUND = {
    "q_phi": {"q": 1.0, "phi": 0.0},
    "e1_e2": {"e1": 0.0, "e2": 0.0},
    "c1_c2": {"c1": 0.0, "c2": 0.0},
}
_RESERVED = ("source", "mass")
_SPREAD = 2.0  # standard deviations of a centre's prior, within which pixels are cut finer

Wanted = float | str
"""The value of a parameter, or the name of the free one that it follows."""


@final
@dataclass(frozen=True)
class LightPart:
    """One component.

    name: of the part; module: caustics' Sersic with every parameter open; values: of these, by their own names.
    core: x, y and radius (arcsec) of the circle in which the prior expects its middle.
    """

    name: str
    module: Any
    values: Mapping[str, Wanted]
    core: tuple[float, float, float] = (0.0, 0.0, 0.0)


@final
@dataclass(frozen=True)
class LightModel:
    """Components whose brightness adds up, for :class:`diffpost.physics.LensLight`.

    parts: the components; names: of the free parameters that they follow, those of the mass among them.
    """

    parts: tuple[LightPart, ...]

    @property
    def names(self) -> tuple[str, ...]:
        found = [v for part in self.parts for v in part.values.values() if isinstance(v, str)]
        return tuple(dict.fromkeys(found))

    def held(self, values: Mapping[str, float]) -> LightModel:
        """The same light with parameters held at these values.

        Raises
        ------
        KeyError: a free parameter without a value.
        """
        parts = [
            replace(
                p, values={k: values[v] if isinstance(v, str) else v for k, v in p.values.items()}
            )
            for p in self.parts
        ]
        return LightModel(tuple(parts))

    def check(self, prior: ParameterPrior | None) -> LightModel:
        """The same with the places of its middle by the prior.

        Raises
        ------
        ValueError: a prior that reaches out of the valid range of a parameter that follows it.
        """
        parts = []
        for part in self.parts:
            for key, value in part.values.items():
                if isinstance(value, str) and prior is not None:
                    check_prior(f"{part.name}.{key}", getattr(part.module, key), prior[value])
            middle, spread = zip(*(_place(part.values[c], prior) for c in _CENTRE), strict=True)
            parts.append(replace(part, core=(middle[0], middle[1], math.hypot(*spread))))
        return LightModel(tuple(parts))


def read_light(
    spec: Any, known: Mapping[str, Wanted], priors: dict[str, Any], masses: Mapping[str, Any]
) -> LightModel:
    """The light of a mapping, as YAML gives it (see the module); `LightModel.check` is to follow.

    known: parameters of the mass by name, each a number or the name of the free one that it is; priors: what is free is
    added to it; masses: the parts of the mass by name.

    Raises
    ------
    ValueError: an unknown profile, parameter, option or tie (with the nearest valid name), a parameter without a value, a
        number out of the valid range, a name that a part of the mass has.
    """
    if not isinstance(spec, Mapping) or not spec:
        raise ValueError(
            f"light: got {spec!r}; expected one mapping a component, such as bulge: {{profile: Sersic, ...}}."
        )
    known = dict(known)
    parts: list[LightPart] = []
    for name, content in spec.items():
        name = str(name)
        if name in masses or name in _RESERVED:
            what = "a part of the mass" if name in masses else "something else"
            raise ValueError(
                f"light: {name!r} is the name of {what} too; give the component one of its own, such as {name}_light."
            )
        part = _part(name, content, known, priors)
        known |= {f"{name}.{key}": value for key, value in part.values.items()}
        parts.append(part)
    return LightModel(tuple(parts))


def _sersic(name: str, options: Mapping[str, Any], amplitude: str) -> Any:
    """caustics' profile; by its flux unless the amplitude is Ie."""
    part = caustics.Sersic(name=name, **options)
    return _by_flux(part) if amplitude == "flux" else part


def _gaussian(name: str, options: Mapping[str, Any], amplitude: str) -> Any:
    """caustics' Sersic profile with n = 1/2."""
    part = caustics.Sersic(name=name, **options)
    part.n.to_static(torch.tensor(0.5, dtype=torch.float64))
    part.sigma = Param("sigma", shape=(), units="arcsec", valid=(0, None))
    part.Re = _half_light
    part.Re.link(part.sigma)
    return _by_flux(part)


def _by_flux(part: Any) -> Any:
    """The profile with its flux for a parameter in place of Ie."""
    part.flux = Param("flux", shape=(), units="flux", valid=(0, None))
    part.Ie = _brightness
    for key in ("flux", "q", "n", "Re"):
        part.Ie.link(getattr(part, key))
    return part


_PROFILES: dict[str, Callable[[str, Mapping[str, Any], str], Any]] = {
    "Sersic": _sersic,
    "Gaussian": _gaussian,
}


def _brightness(p: Any) -> Tensor:
    """Ie of a flux."""
    n, q, radius = p["n"].value, p["q"].value, p["Re"].value
    k = caustics.func.k_sersic(n)
    shape = torch.exp(k - 2 * n * torch.log(k) + torch.lgamma(2 * n))
    flux: Tensor = p["flux"].value
    return flux / (2 * math.pi * n * q * radius**2 * shape)


def _half_light(p: Any) -> Tensor:
    """Re of a sigma."""
    sigma: Tensor = p["sigma"].value
    return sigma * (2 * caustics.func.k_sersic(torch.full_like(sigma, 0.5))).sqrt()


def _part(
    name: str, content: Any, known: Mapping[str, Wanted], priors: dict[str, Any]
) -> LightPart:
    """One component; what is free in it is added to `priors`."""
    if not isinstance(content, Mapping) or "profile" not in content:
        raise ValueError(
            f"light: {name}: got {content!r}; expected `profile`, one of {', '.join(_PROFILES)}, and its parameters."
        )
    content = dict(content)
    profile = str(content.pop("profile"))
    if profile not in _PROFILES:
        raise ValueError(
            f"light: {name}: no profile {profile!r} of light{nearest(profile, _PROFILES)}"
        )
    options = {key: content.pop(key) for key in _OPTIONS if key in content}
    if "s" in options:
        options["s"] = _softening(name, options["s"])
    amplitude = "Ie" if profile == "Sersic" and "Ie" in content else "flux"
    if "Ie" in content and "flux" in content:
        raise ValueError(f"light: {name}: got Ie and flux; expected one of them.")
    try:
        module = _PROFILES[profile](name, options, amplitude)
    except (TypeError, ValueError) as error:
        raise ValueError(f"light: {name}: Sersic of caustics says: {error}") from error
    free = [param.name for param in module.dynamic_params]
    partner = content.pop("centre", None)
    if partner is not None:
        centred = [key.removesuffix(".x0") for key in known if key.endswith(".x0")]
        if partner not in centred:
            raise ValueError(
                f"light: {name}: got centre: {partner!r}; expected a part of the mass or of the light above it"
                f"{nearest(str(partner), centred)}"
            )
        for axis in _CENTRE:
            if axis in content:
                raise ValueError(f"light: {name}: got centre and {axis}; expected one of them.")
            content[axis] = f"{partner}.{axis}"
    round_ = dict(_ROUND[options.get("angle_system", "q_phi")])
    if not set(round_) & set(content):
        content |= round_
    for key in content:
        if key not in free:
            raise ValueError(
                f"light: {name}: {profile} has no parameter {key!r}{nearest(str(key), free)}"
            )
    values: dict[str, Wanted] = {}
    for key in free:
        given = content.get(key, 0.0 if key in _CENTRE else None)
        if given is None:
            raise ValueError(
                f"light: {name}: {profile} also takes {key}; give it a number, a prior such as {{uniform: [0, 1]}}, or "
                "the parameter of another part such as main.x0."
            )
        values[key] = _value(f"{name}.{key}", given, known, priors, getattr(module, key))
    return LightPart(name, module, values)


def _value(
    name: str, given: Any, known: Mapping[str, Wanted], priors: dict[str, Any], param: Any
) -> Wanted:
    if isinstance(given, Mapping):
        priors[name] = given
        return name
    if isinstance(given, str) and given in known:
        found = known[given]
        if not isinstance(found, str):
            check_value(name, param, found)
        return found
    try:
        if isinstance(given, bool):
            raise TypeError
        number = float(given)
    except (TypeError, ValueError):
        near = nearest(given, known) if isinstance(given, str) else "."
        raise ValueError(
            f"{name}: got {given!r}; expected a number, a prior such as {{uniform: [0, 1]}}, or the parameter of another "
            f"part{near}"
        ) from None
    if not math.isfinite(number):
        raise ValueError(f"{name}: got {given!r}; expected a finite number.")
    check_value(name, param, number)
    return number


def _softening(name: str, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not 0 <= found < math.inf:
        raise ValueError(f"light: {name}.s: got {value!r}; expected arcsec, 0 or more.")
    return found


def _place(value: Wanted, prior: ParameterPrior | None) -> tuple[float, float]:
    """Where the prior expects a coordinate, and how far from there."""
    if not isinstance(value, str) or prior is None:
        return (0.0, 0.0) if isinstance(value, str) else (value, 0.0)
    z = torch.tensor([-_SPREAD, 0.0, _SPREAD], dtype=torch.float64)
    low, middle, high = prior[value].constrain(z).tolist()
    return middle, max(high - middle, middle - low)
