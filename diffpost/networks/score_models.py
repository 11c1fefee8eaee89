r"""Networks of the package score_models, as backbones and as score models.

score_models (https://github.com/AlexandreAdam/score_models) calls a network as net(t, x), with t as the
process has it, and reads the score off it as

    score(x, t) = net(t, x) / sigma(t),

so the network predicts -z in x_t = alpha x_0 + sigma z, and Tweedie's formula gives the denoiser

    D(x, t) = (x + sigma net(t, x)) / alpha.

`SigmaHeadScore` is that head, for checkpoints that score_models trained; `ScoreModelsNet` turns the call
around, so that the same architectures serve `NetworkScore` and the trainer as backbones.  The package is
needed only where such a network is built: `pip install score-models`.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from importlib import metadata
from types import ModuleType
from typing import Any, Self, final

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from diffpost.networks.base import NetworkModel
from diffpost.sde import SDE, TSVE, VE, VP, as_time, expand

__all__ = ["ScoreModelsNet", "SigmaHeadScore", "network_options"]

_ACTIVATE = "activate_embedding"  # an option of ours: see ScoreModelsNet.build


def _architectures() -> ModuleType:
    """score_models' architectures, or an ImportError that says what to install."""
    try:
        from score_models import architectures
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "score_models":
            raise
        raise ImportError(
            "networks of the kinds 'ncsnpp', 'ddpm' and 'mlp' are those of the package score_models: "
            "pip install score-models==0.5.11"
        ) from error
    version = metadata.version("score-models")
    if not version.startswith("0.5."):
        raise ImportError(
            f"found score_models {version}, whose networks differ under the same names; "
            "pip install score-models==0.5.11"
        )
    return architectures


@final
class ScoreModelsNet(nn.Module):
    """A network of score_models called as net(x, label): x (B, *shape), label (B,).

    An MLP, which takes vectors, sees each image flattened.

    Parameters
    ----------
    net: module called as net(label, x).
    config: what `build` makes it from; None reads it off a network of score_models.

    Attributes
    ----------
    net: the wrapped network.
    config: JSON values, or None for a network that is not score_models'.
    stride: what the sides of an image must be divisible by.
    """

    def __init__(self, net: nn.Module, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.net = net
        self.config = _config_of(net) if config is None else dict(config)
        levels = len(self.config.get("ch_mult", (1,))) if self.config else 1
        self.stride = 2 ** (levels - 1)
        self.flat = (self.config or {}).get("kind") == "mlp"
        if (self.config or {}).get(_ACTIVATE, False):
            modules: Any = net.all_modules
            modules[1].register_forward_hook(_Activate(net.act))
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                # The attention before it leaves its output permuted, which forward-mode
                # differentiation of a group norm does not take.
                module.register_forward_pre_hook(_contiguous)

    @classmethod
    def build(cls, config: Mapping[str, Any]) -> ScoreModelsNet:
        """Build "ncsnpp", "ddpm" or "mlp" with random weights; other keys are score_models' own options.

        The option `activate_embedding` (ddpm) applies the activation between the two dense layers of the
        time embedding, as DDPM of score_models' development branch does and that of 0.5.11 does not.

        Raises
        ------
        ValueError: for an unknown kind or option, or a network with conditions or for energies.
        ImportError: without score_models 0.5.
        """
        options = dict(config)
        kind = options.pop("kind", None)
        constructor = _constructor(kind)
        unknown = sorted(set(options) - set(network_options(kind)))
        if unknown:
            raise ValueError(
                f"got the option {', '.join(unknown)} for a network of kind {kind!r}; known are "
                f"{', '.join(network_options(kind))}"
            )
        options.pop(_ACTIVATE, None)
        _check_unconditional(options)
        try:
            net = constructor(**options)
        except (TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"score_models refuses {kind!r} with {options}: {error}") from error
        return cls(net, copy.deepcopy(dict(config)))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        if self.flat and x.ndim > 2:
            return self.net(label, x.flatten(1)).view_as(x)
        return self.net(label, x)


class _Activate(nn.Module):
    """A forward hook that applies an activation; a class, so that copies of the network keep it."""

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.activation(output)


def _contiguous(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A hook that copies a permuted input, under forward-mode differentiation only: it changes the rounding."""
    if forward_ad.unpack_dual(inputs[0]).tangent is None:
        return None
    return (inputs[0].contiguous(), *inputs[1:])


def _constructor(kind: Any) -> Any:
    architectures = _architectures()
    match kind:
        case "ncsnpp":
            return architectures.NCSNpp
        case "ddpm":
            return architectures.DDPM
        case "mlp":
            return architectures.MLP
        case _:
            raise ValueError(
                f"got a network of kind {kind!r}; score_models has 'ncsnpp', 'ddpm' and 'mlp'"
            )


def network_options(kind: str) -> list[str]:
    """Names of the options that `ScoreModelsNet.build` takes for a kind.

    Raises
    ------
    ValueError, ImportError: as `ScoreModelsNet.build`.
    """
    parameters = inspect.signature(_constructor(kind)).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return [*names, _ACTIVATE] if kind == "ddpm" else names


def _check_unconditional(options: Mapping[str, Any]) -> None:
    for key in ("condition", "conditioning", "conditions"):
        names = options.get(key) or ()
        if any(str(name).lower() != "none" for name in names):
            raise ValueError(
                f"got {key} = {names}; networks that take conditions besides the image are not supported"
            )
    if options.get("nn_is_energy", False):
        raise ValueError("got nn_is_energy; networks that predict an energy are not supported")


def _config_of(net: nn.Module) -> dict[str, Any] | None:
    """The configuration of a network that score_models built, None for any other."""
    if type(net).__module__.split(".")[0] != "score_models":
        return None
    kind = {"NCSNpp": "ncsnpp", "DDPM": "ddpm", "MLP": "mlp"}.get(type(net).__name__)
    if kind is None:
        return None
    known = network_options(kind)
    options = {k: v for k, v in getattr(net, "hyperparameters", {}).items() if k in known}
    if kind == "mlp":  # which does not record these
        options["bottleneck"] = getattr(net, "bottleneck", 0) or None
        options["attention"] = bool(getattr(net, "attention", False))
    _check_unconditional(options)
    return {"kind": kind, **{k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}}


@final
class SigmaHeadScore(NetworkModel):
    """A network of score_models as a `ScoreModel`: score = net(t, x)/sigma(t).

    Parameters
    ----------
    net: module called as net(t, x), with t (B,) and x (B, *shape), or a `ScoreModelsNet` around one.
    sde: the process that the network was trained with.
    shape: shape of one image, (C, H, W), or of one vector, (d,).
    scale, offset: physical = scale * network + offset.
    card: what is known about the training.

    `denoise` uses the exact sigma(t).  `score` divides, like score_models, by sigma in the dtype of the
    network.  For VP that is sqrt(1 - exp(-I)), whose difference loses digits at small t: 1e-5 of sigma
    at t = 0.01 and percents at 1e-5, in float32.

    Raises
    ------
    ValueError: for a shape that the stride of the network does not divide.
    """

    net: ScoreModelsNet

    def __init__(
        self,
        net: nn.Module,
        sde: SDE,
        shape: tuple[int, ...],
        *,
        scale: float | Tensor = 1.0,
        offset: float | Tensor = 0.0,
        card: dict[str, Any] | None = None,
    ) -> None:
        wrapped = net if isinstance(net, ScoreModelsNet) else ScoreModelsNet(net)
        self.net = wrapped.eval().requires_grad_(False)
        self.stride = wrapped.stride
        self.sde = sde
        self.shape = self._checked(tuple(int(side) for side in shape))
        self.scale = scale
        self.offset = offset
        self.card: dict[str, Any] = {} if card is None else dict(card)

    def _checked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        config = self.net.config or {}
        sides = shape[1:]
        if not shape or min(shape) < 1 or any(side % self.stride for side in sides):
            raise ValueError(
                f"got the shape {shape}; expected (C, H, W) with H and W divisible by {self.stride}"
            )
        if self.net.flat and math.prod(shape) != config["dimensions"]:
            raise ValueError(f"got the shape {shape}; the MLP takes {config['dimensions']} numbers")
        channels = config.get("channels", shape[0])
        if not self.net.flat and shape[0] != channels:
            raise ValueError(f"got the shape {shape}; the network takes {channels} channels")
        return shape

    def with_shape(self, shape: tuple[int, ...]) -> Self:
        """The same prior for images of another size, which the stride of the network must divide.

        Normalisation and attention run over the whole frame: far from the size of the training the
        score need not be a good one.

        Raises
        ------
        ValueError: for sides that the stride does not divide, or other numbers of channels or axes.
        """
        shape = tuple(int(side) for side in shape)
        if len(shape) != len(self.shape):
            raise ValueError(f"got the shape {shape} for a prior of images of shape {self.shape}")
        other = copy.copy(self)
        other.shape = self._checked(shape)
        return other

    def _predict(self, x: Tensor, t: Tensor) -> Tensor:
        """net(t, x), an estimate of -z, in the dtype of x."""
        label = t.expand(x.shape[0]).to(device=self.device, dtype=self.dtype)
        return self.net(x.to(self.dtype), label).to(x.dtype)

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        """(x + sigma net(t, x))/alpha, (B, *shape), in the dtype of x."""
        t = as_time(t, x)
        sigma, alpha = expand(self.sde.sigma(t), x), expand(self.sde.alpha(t), x)
        return (x + sigma * self._predict(x, t)) / alpha

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """net(t, x)/sigma(t), (B, *shape), in the dtype of x."""
        t = as_time(t, x)
        sigma = _sigma_of_score_models(self.sde, t.to(self.dtype))
        return self._predict(x, t) / expand(sigma, x)


def _sigma_of_score_models(sde: SDE, t: Tensor) -> Tensor:
    """sigma(t) by the formulas of score_models 0.5.11, whose rounding in float32 shows in its scores."""
    match sde:
        case VE():
            return sde.sigma_min * (sde.sigma_max / sde.sigma_min) ** (t / sde.T)
        case VP():
            integral = 0.5 * (sde.beta_max - sde.beta_min) * t**2 + sde.beta_min * t
            return (1.0 - torch.exp(-integral)).sqrt()
        case TSVE(ramp="relu"):
            low, high = math.log(sde.sigma_min), math.log(sde.sigma_max)
            ramp = -sde.beta * torch.relu(t / sde.T - sde.t_star)
            return torch.exp(ramp + (high - low) * t / sde.T + low)
        case _:
            return sde.sigma(t)
