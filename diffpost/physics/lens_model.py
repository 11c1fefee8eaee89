"""A lens model written down in words: profiles of caustics, each parameter known or with a prior.

    redshifts: {lens: 0.155, source: 0.517}      # only what profiles with physical masses need
    mass:
      main:
        profile: EPL
        angle_system: e1_e2                      # caustics' options go beside the parameters
        x0: {normal: [0, 0.05]}
        y0: {normal: [0, 0.05]}
        e1: {normal: [0, 0.2], within: [-0.5, 0.5]}
        e2: {normal: [0, 0.2], within: [-0.5, 0.5]}
        Rein: {uniform: [1, 2]}
        t: 1                                     # a number: known
      shear:
        profile: ExternalShear
        gamma_1: {normal: [0, 0.05]}
        gamma_2: {normal: [0, 0.05]}

Free parameters are called part.parameter: main.Rein. `light` beside `mass` is that of the lens itself
(:mod:`diffpost.physics.light_model`). Priors are those of
:class:`diffpost.parameters.ParameterPrior`. A centre that is not mentioned is (0, 0), that of another part
if it says `centre: main`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from diffpost.parameters.prior import ParameterPrior, nearest
from diffpost.physics.light_model import LightModel, Wanted, read_light
from diffpost.physics.valid_ranges import check_prior, check_value

try:
    import caustics
except ImportError as error:
    raise ImportError(
        "lenses need caustics, which is not installed: pip install 'diffpost[lens]'"
    ) from error

__all__ = ["LensModel", "read_lens_model"]

_OPTIONS = ("angle_system", "parametrization", "m", "s", "n_iter")  # not parameters
_CENTRE = ("x0", "y0")
_REDSHIFTS = {"z_l": "lens", "z_s": "source"}


@final
@dataclass(frozen=True)
class LensModel:
    """A lens model and the prior of what is free in it.

    mass: a `SinglePlane` of caustics, for :class:`diffpost.physics.Lens`.
    prior: of the free parameters, those of the light last; None where all are known.
    spec: the mapping that it was made from.
    light: of the lens itself, or None.
    """

    mass: Any
    prior: ParameterPrior | None
    spec: Mapping[str, Any]
    light: LightModel | None = None


def read_lens_model(spec: Mapping[str, Any]) -> LensModel:
    """The lens model of a mapping, as YAML gives it (see the module).

    Raises
    ------
    ValueError: an unknown profile, parameter, option or kind of prior, with the nearest valid name; a
        parameter without a value; a redshift that a profile needs; a prior outside of the valid range.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("mass"), Mapping):
        raise ValueError(
            f"lens model: got {spec!r}; expected a mapping with `mass`, in it one mapping a profile."
        )
    known = ("mass", "redshifts", "light")
    if unknown := [key for key in spec if key not in known]:
        raise ValueError(f"lens model: no setting {unknown[0]!r}{nearest(str(unknown[0]), known)}")
    redshifts = _redshifts(spec.get("redshifts"))
    cosmology = caustics.FlatLambdaCDM(name="cosmology")
    parts: dict[str, Any] = {}
    priors: dict[str, Any] = {}
    for name, content in spec["mass"].items():
        parts[name] = _part(str(name), content, parts, cosmology, priors)
    mass = caustics.SinglePlane(
        cosmology=cosmology, lenses=list(parts.values()), name="mass", **redshifts
    )
    order = [
        f"{part}.{param.name}"
        for param in mass.dynamic_params
        for part, module in parts.items()
        if module.children.get(param.name) is param
    ]
    ordered = {name: priors[name] for name in order if name in priors}
    light = None
    if spec.get("light") is not None:
        bright: dict[str, Any] = {}
        light = read_light(spec["light"], _values(parts, ordered), bright, parts)
        ordered |= bright
    prior = ParameterPrior.from_dict(ordered) if ordered else None
    if prior is not None:
        _check_ranges(prior, parts)
    return LensModel(mass, prior, spec, None if light is None else light.check(prior))


def profiles() -> dict[str, Any]:
    """The thin lens profiles of caustics, by name."""
    found = {name: getattr(caustics, name) for name in dir(caustics) if name[:1].isupper()}
    return {
        name: kind
        for name, kind in found.items()
        if inspect.isclass(kind)
        and issubclass(kind, caustics.ThinLens)
        and not inspect.isabstract(kind)
        and kind not in (caustics.ThinLens, caustics.SinglePlane, caustics.BatchedPlane)
    }


def _redshifts(given: Any) -> dict[str, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"redshifts: got {given!r}; expected a mapping such as {{lens: 0.2, source: 1.1}}."
        )
    names = {word: symbol for symbol, word in _REDSHIFTS.items()}
    if unknown := [key for key in given if key not in names]:
        raise ValueError(f"redshifts: nothing is called {unknown[0]!r}{nearest(unknown[0], names)}")
    found = {names[word]: float(value) for word, value in given.items()}
    low, high = found.get("z_l", 0.0), found.get("z_s", float("inf"))
    if not 0 <= low < high:
        raise ValueError(
            f"redshifts: got lens {low} and source {high}; expected 0 <= lens < source."
        )
    return found


def _part(
    name: str,
    content: Any,
    others: Mapping[str, Any],
    cosmology: Any,
    priors: dict[str, Any],
) -> Any:
    """One profile; what is free in it is added to `priors`."""
    available = profiles()
    if not isinstance(content, Mapping) or "profile" not in content:
        raise ValueError(
            f"{name}: got {content!r}; expected `profile`, one of {', '.join(available)}, and its parameters."
        )
    content = dict(content)
    profile = str(content.pop("profile"))
    if profile not in available:
        raise ValueError(
            f"{name}: caustics has no profile {profile!r}{nearest(profile, available)}"
        )
    options = {key: content.pop(key) for key in _OPTIONS if key in content}
    try:
        part = available[profile](cosmology=cosmology, name=name, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {profile} of caustics says: {error}") from error
    partner = content.pop("centre", None)
    free = [
        child
        for child in part.children
        if child not in _REDSHIFTS and getattr(part, child) in part.dynamic_params
    ]
    if partner is not None:
        if partner not in others:
            raise ValueError(
                f"{name}: got centre: {partner!r}; expected one of the parts above it{nearest(str(partner), others)}"
            )
        for axis in _CENTRE:
            setattr(part, axis, getattr(others[partner], axis))
            free.remove(axis)
    for key in content:
        if key not in free:
            raise ValueError(f"{name}: {profile} has no parameter {key!r}{nearest(str(key), free)}")
    for key in free:
        value = content.get(key, 0.0 if key in _CENTRE else None)
        if value is None:
            raise ValueError(
                f"{name}: {profile} also takes {key}; give it a number or a prior such as {{uniform: [0, 1]}}."
            )
        if isinstance(value, Mapping):
            priors[f"{name}.{key}"] = value
        else:
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{name}.{key}: got {value!r}; expected a number or a prior such as {{uniform: [0, 1]}}."
                ) from None
            check_value(f"{name}.{key}", getattr(part, key), number)
            getattr(part, key).to_static(torch.tensor(number, dtype=torch.float64))
    return part


def _values(parts: Mapping[str, Any], free: Mapping[str, Any]) -> dict[str, Wanted]:
    """What light may be tied to: the mass' parameters by name, numbers or the names of the free ones that they are."""
    owner = {
        id(getattr(part, key)): f"{n}.{key}" for n, part in parts.items() for key in part.children
    }
    owner |= {
        id(getattr(parts[n], key)): f"{n}.{key}" for n, key in (x.split(".", 1) for x in free)
    }
    found: dict[str, Wanted] = {}
    for name, part in parts.items():
        for key, param in part.children.items():
            if owner.get(id(param)) in free:
                found[f"{name}.{key}"] = owner[id(param)]
            elif param in part.static_params and param.value.numel() == 1:
                found[f"{name}.{key}"] = float(param.value)
    return found


def _check_ranges(prior: ParameterPrior, parts: Mapping[str, Any]) -> None:
    """A prior that reaches out of a valid range would have its chains end in an error."""
    for name, one in zip(prior.names, prior.priors, strict=True):
        part, key = name.split(".", 1)
        if part in parts:
            check_prior(name, getattr(parts[part], key), one)
