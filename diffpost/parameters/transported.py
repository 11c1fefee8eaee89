r"""Image and parameters together, the image carried along when the parameters move.

A chain at (theta, x) targets p(theta) p_nu(x) p(y | x, theta), with p_nu the diffusion prior at its lowest noise. When
theta moves, an image that fitted before no longer does; so x moves with it, by the map that carries the posterior of a
Gaussian image at theta to that at theta'. In the coordinates c of the Gaussian's modes, with x = x_rest + F c, mean mu
and precision M = L L^T of c given theta, y and x_rest (:mod:`diffpost.parameters.evidence`),

    c' = mu' + L'^-T L^T (c - mu),       |dc'/dc| = (det M/det M')^1/2,

and x_rest, what the modes do not span, stays. The pair is accepted with probability min(1, e^a),

    a = log p(z')/p(z) + log p(y | x', theta')/p(y | x, theta) + int s . dx + 1/2 log det M/det M',

the line integral of the score from x to x' for log p_nu(x')/p_nu(x), as in :class:`MALA <diffpost.samplers.MALA>`: a
deterministic map in an enlarged space (Green 1995, Biometrika 82, 711, section 3), reversible because the way back is the
inverse map. Between such moves, x moves by MALA at fixed theta.

Exact in the limit of many moves, for any prior whose score is the gradient of log p_nu and any Gaussian of images: that
decides only how far theta can go. If images are that Gaussian, and nu is small, L^T (c - mu) is independent of theta and
a is the collapsed ratio: theta then mixes as if there were no image. The less Gaussian p_nu is, the shorter the moves.
Chains find what lies near their start: begin them at :func:`sample_collapsed <diffpost.parameters.collapsed.sample_collapsed>`.

A network's score at low noise knows what an image looks like nearby, and hardly where on the sky it is or how bright:
along a shift of two pixels, galaxies-32 at nsr 0.03 gives differences of log p_nu that scatter by 19 from image to image,
where the scatter of galaxies about the centre makes that 1.4. Along directions that the data leave to the prior chains then drift by several standard deviations. So use it
with priors in closed form; with a network only where the data decide, at an nsr near the noise per pixel, and compare
with :func:`sample_corrected <diffpost.parameters.corrected.sample_corrected>`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from diffpost._version import __version__
from diffpost.parameters.chains import metropolis
from diffpost.parameters.checkpoint import Checkpoint
from diffpost.parameters.collapsed import check_one_problem, marks, response
from diffpost.parameters.evidence import Evidence, ImageGivenParameters
from diffpost.parameters.result import JointSamples
from diffpost.random import Noise, derived_seed, normal, uniform
from diffpost.sample import progress_bar
from diffpost.samplers.base import State
from diffpost.samplers.chain import TRACES, Gaussian
from diffpost.samplers.langevin import MALA, Line, Walk, evaluate, unpack
from diffpost.samples import Samples
from diffpost.score import ScoreModel

__all__ = ["sample_transported"]

_STREAM = 24_400
_TARGET = 0.3  # acceptance of a random walk in a few dimensions (Roberts & Rosenthal 2001)
_NODES = 17


@final
@dataclass(frozen=True, eq=False)
class _Chain:
    """Where the chains are.

    Attributes:
        z: (B, P).
        walk: of the image.
        given: the Gaussian's posterior at z.
        fit: (B,) log p(y | x, theta).
        log_scale: (B,) of the moves of theta.
        done: moves of theta.
        accepted, nonfinite: (B,) over the moves of theta after the warm-up.
        error: (B,) the largest error of a line integral that could have turned a decision.
    """

    z: Tensor
    walk: Walk
    given: ImageGivenParameters
    fit: Tensor
    log_scale: Tensor
    done: int
    accepted: Tensor
    nonfinite: Tensor
    error: Tensor


def sample_transported(
    evidence: Evidence,
    image_prior: ScoreModel,
    start: JointSamples,
    *,
    sweeps: int = 200,
    warmup: int = 100,
    theta_moves: int = 2,
    image_moves: int = 2,
    thin: int = 1,
    nsr: float | None = None,
    covariance: Tensor | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    every: int = 20,
    progress: bool = True,
) -> JointSamples:
    """Chains of image and parameters whose moves of theta carry the image along.

    Args:
        evidence: of the Gaussian that carries images, without an amplitude; the prior of theta and the likelihood.
        image_prior: of x.
        start: draws of :func:`sample_collapsed <diffpost.parameters.collapsed.sample_collapsed>` with images of
            ``image_prior``; a chain begins at the last one of each of its chains.
        sweeps: that are kept, a draw each.
        warmup: sweeps that adapt step sizes and are dropped.
        theta_moves, image_moves: in a sweep. A move of theta costs an evidence and 4 evaluations of the prior's score,
            one of the image two solves and 4 evaluations.
        thin: every so many of the sweeps kept, the image is.
        nsr: the noise-to-signal ratio nu of p_nu; None is the lowest of the process. Images keep its noise.
        covariance: (P, P) of z, the shape of proposals; None is that of all of ``start``.
        seed: of everything.
        checkpoint: a folder, from which the same call goes on; written every ``every`` sweeps.
        progress: a bar.

    Returns:
        JointSamples: extras: ``scale``, of the moves of theta in units of 2.4/sqrt(P) of ``covariance``, where 1 is what
        a Gaussian prior of images allows, and ``image_acceptance``, ``image_step`` and ``quadrature_error`` of MALA.

    Raises:
        ValueError: an evidence with an amplitude, a start without images or of other parameters, or numbers that are
            not positive.
    """
    for name, value in (("sweeps", sweeps), ("warmup", warmup), ("theta_moves", theta_moves)):
        if value < 1:
            raise ValueError(f"sample_transported({name}={value}): expected at least 1.")
    if image_moves < 1 or thin < 1 or every < 1:
        raise ValueError(
            f"sample_transported(image_moves={image_moves}, thin={thin}, every={every}): expected at least 1 each."
        )
    check_one_problem(evidence.likelihood, "sample_transported")
    if evidence.amplitude is not None:
        raise ValueError(
            f"sample_transported: the evidence has an amplitude, {evidence.amplitude!r}, which the prior of images does "
            "not know. Fix it: Evidence(likelihood, prior, gaussian.scaled(factor))."
        )
    z, x = _start(evidence, start)
    if covariance is None:
        pooled = evidence.prior.unconstrain(start.theta.double()).flatten(0, 1)
        covariance = torch.cov(pooled.T).reshape(z.shape[1], z.shape[1])
    root, failed = torch.linalg.cholesky_ex(covariance.double())
    if int(failed) or covariance.shape != (z.shape[1],) * 2:
        raise ValueError(
            "sample_transported: the covariance of the start is not positive definite; give more draws, or "
            f"covariance=({z.shape[1]}, {z.shape[1]})."
        )
    mala = MALA((warmup + sweeps) * image_moves, start=None, nsr=nsr, burn_in=warmup * image_moves)
    info: dict[str, Any] = {
        "diffpost": __version__,
        "method": "transported",
        "prior": evidence.prior.to_dict(),
        "modes_of_images": len(evidence.gaussian.std),
        "sweeps": sweeps,
        "warmup": warmup,
        "theta_moves": theta_moves,
        "image_moves": image_moves,
        "thin": thin,
        "nsr": nsr,
        "start": z.tolist(),
        "seed": seed,
    }
    run = _Run(evidence, image_prior, mala, root.to(z), warmup * theta_moves, seed)
    theta: list[Tensor] = []
    kept: list[Tensor] = []
    chain = run.begin(z, x)
    folder = None
    if checkpoint is not None:
        begun = [float(x.double().sum()), float(x.double().square().sum())]
        folder = Checkpoint(checkpoint, info, [*marks(evidence), *response(image_prior), *begun])
        saved = folder.load("state")
        if saved is not None:
            theta, kept = list(saved.pop("draws_theta")), list(saved.pop("draws_x"))
            chain = run.restored(saved)
    first = chain.done // theta_moves
    with progress_bar(warmup + sweeps - first, progress) as advance:
        for sweep in range(first, warmup + sweeps):
            for _ in range(theta_moves):
                chain = run.move_theta(chain)
            chain = run.refreshed(chain)
            for _ in range(image_moves):
                chain = run.move_image(chain)
            done = sweep + 1 - warmup
            if done > 0:
                theta.append(evidence.prior.constrain(chain.z).cpu())
                if (done - 1) % thin == 0:
                    kept.append(image_prior.to_physical(chain.walk.x).cpu())
            last = sweep + 1 == warmup + sweeps
            if folder is not None and ((sweep + 1) % every == 0 or last):
                drawn = {"draws_theta": _stacked(theta), "draws_x": _stacked(kept)}
                folder.save("state", run.arrays(chain) | drawn)
            advance()
    stacked = evidence.prior.unwrapped(torch.stack(theta, 1))
    places = torch.arange(0, sweeps, thin)
    number = torch.arange(len(z)).repeat_interleave(len(places))
    draw = places.repeat(len(z))
    extras = {
        "scale": chain.log_scale.exp().cpu(),
        "image_acceptance": chain.walk.extras["acceptance"].cpu(),
        "image_step": chain.walk.extras["step_size"].cpu(),
        "quadrature_error": torch.maximum(chain.error, chain.walk.extras["quadrature_error"]).cpu(),
    }
    return JointSamples(
        names=evidence.prior.names,
        theta=stacked,
        acceptance=(chain.accepted / (sweeps * theta_moves)).cpu(),
        nonfinite=chain.nonfinite.cpu(),
        samples=Samples(
            torch.stack(kept, 1).flatten(0, 1),
            info=info,
            extras={"theta": stacked[number, draw], "chain": number, "draw": draw},
        ),
        extras=extras,
        info=info,
    )


def _stacked(rows: list[Tensor]) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0)


def _start(evidence: Evidence, start: JointSamples) -> tuple[Tensor, Tensor]:
    """z and images of the last draw that has one, of every chain."""
    if start.samples is None or start.names != evidence.prior.names:
        raise ValueError(
            f"sample_transported: the start has {'no images' if start.samples is None else start.names}; expected draws "
            f"of {evidence.prior.names} with images."
        )
    chain = start.samples.extras["chain"]
    last = [int((chain == c).nonzero()[-1, 0]) for c in chain.unique().tolist()]
    theta = start.samples.extras["theta"][last].double()
    device = evidence.likelihood.y.device
    return evidence.prior.unconstrain(theta).to(device), start.samples.x[last].to(device)


@final
class _Run:
    """The moves."""

    def __init__(
        self,
        evidence: Evidence,
        prior: ScoreModel,
        mala: MALA,
        root: Tensor,
        warmup: int,
        seed: int,
    ) -> None:
        self.evidence, self.prior, self.mala = evidence, prior, mala
        p = len(root)
        self.root = 2.4 / math.sqrt(p) * root
        self.warmup, self.seed = warmup, seed
        self.t = mala.times(prior.sde)[0]
        self._image_seed = derived_seed(seed, "image moves")

    def _noise(self, batch: int, step: int) -> Callable[..., Tensor]:
        ids = torch.arange(batch, device=self.prior.device)
        return Noise(self._image_seed, ids).at(step)

    def _reference(self, z: Tensor, power: Tensor | None, u: Tensor) -> Gaussian:
        """The data in the prior's units at theta(z), with the prior's curvature."""
        values = self.evidence.prior.values(self.evidence.prior.constrain(z))
        values = {k: v.to(u) for k, v in values.items()}
        bound = self.evidence.likelihood.at(values).bind(tuple(self.prior.shape))
        pulled = bound.pullback(self.prior.scale, self.prior.offset)
        linear = pulled.operator.linearize(u)
        return Gaussian(pulled, linear, torch.ones(()).to(u) if power is None else power)

    def begin(self, z: Tensor, x: Tensor) -> _Chain:
        u = self.prior.to_model(x.to(self.prior.device))
        u = u.to(torch.promote_types(self.prior.dtype, torch.float32))
        reference = self._reference(z, None, u)
        noise = self._noise(len(z), 0)
        begun = self.mala.begin(self.prior, reference.likelihood, State(u), self.t, noise)
        walk, *_ = unpack(begun)
        zero = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        return _Chain(
            z=z,
            walk=walk,
            given=self.evidence.given(self.evidence.prior.constrain(z)),
            fit=self._fit(z, walk.x),
            log_scale=zero,
            done=0,
            accepted=zero,
            nonfinite=zero.to(torch.int64),
            error=zero,
        )

    def _values(self, z: Tensor) -> dict[str, Tensor]:
        return self.evidence.prior.values(self.evidence.prior.constrain(z))

    def _fit(self, z: Tensor, u: Tensor) -> Tensor:
        x = self.prior.to_physical(u.double())
        return self.evidence.likelihood.log_prob(self._values(z), x).double()

    def move_theta(self, chain: _Chain) -> _Chain:
        """A random walk of theta that carries the image; the walk's point keeps only u and its score."""
        z, walk, step = chain.z, chain.walk, chain.done
        point = walk.point
        if point is None:
            raise ValueError("got a walk without a point; begin at begin.")
        ids = torch.arange(len(z), device=z.device)
        xi = normal(self.seed, ids, step, (z.shape[1],), torch.float64, stream=_STREAM)
        ahead = z + chain.log_scale.exp()[:, None] * (xi @ self.root.T)
        given = self.evidence.given(self.evidence.prior.constrain(ahead))
        u, stretch = self._carried(chain, ahead, given)
        fit = self._fit(ahead, u)
        log_prior = self.evidence.prior.log_prob_z
        rest = log_prior(ahead) - log_prior(z) + fit - chain.fit + stretch
        finite = rest.isfinite() & u.isfinite().flatten(1).all(1)
        wide = finite.reshape(-1, *[1] * (u.ndim - 1))
        line = Line(self.prior, self.t, point, torch.where(wide, u, point.u))
        threshold = uniform(self.seed, ids, step, (1,), torch.float64, stream=_STREAM)[:, 0]
        rest = torch.where(finite, rest, -math.inf)
        integral, error = line.integral(threshold.log() - rest, _NODES - 1)
        ratio = integral + rest
        accepted = metropolis(ratio, threshold)
        probability = ratio.nan_to_num(nan=-math.inf).clamp_max(0).exp()
        # only u and its score are brought up to date here; `refreshed` does the rest
        point = dataclasses.replace(point, u=u, score=line.end).where(accepted, point)
        warming = step < self.warmup
        log_scale = chain.log_scale
        if warming:
            log_scale = log_scale + (step + 1) ** -0.6 * (probability - _TARGET)
        lost = (~(finite & ~ratio.isnan())).to(torch.int64)
        return dataclasses.replace(
            chain,
            z=torch.where(accepted[:, None], ahead, z),
            walk=dataclasses.replace(walk, x=point.u, point=point),
            given=_where(accepted, given, chain.given),
            fit=torch.where(accepted, fit, chain.fit),
            log_scale=log_scale,
            done=step + 1,
            accepted=chain.accepted + (0 if warming else probability),
            nonfinite=chain.nonfinite + (0 if warming else lost),
            error=torch.maximum(chain.error, torch.where(finite, error, 0.0)),
        )

    def _carried(
        self, chain: _Chain, ahead: Tensor, given: ImageGivenParameters
    ) -> tuple[Tensor, Tensor]:
        """The image at the new parameters, in the prior's units, and 1/2 log det M/det M'."""
        evidence, old = self.evidence, chain.given
        x = self.prior.to_physical(chain.walk.x.double())
        c, rest = evidence.gaussian.coordinates(x)
        base = evidence.gaussian.mean + rest

        def mean(z: Tensor, at: ImageGivenParameters) -> Tensor:
            return at.coordinates(
                evidence.whiten(evidence.likelihood.residual(self._values(z), base))
            )

        white = old.root.mT @ (c - mean(chain.z, old))[..., None]
        spread = torch.linalg.solve_triangular(given.root.mT, white, upper=True)[..., 0]
        c = mean(ahead, given) + spread
        shift = (c @ evidence.gaussian.scaled_modes.flatten(1)).reshape(x.shape)
        u = self.prior.to_model(base + shift).to(chain.walk.x)
        return u, 0.5 * (old.log_det - given.log_det)

    def refreshed(self, chain: _Chain) -> _Chain:
        """With everything that the image's moves need at the present theta."""
        walk, point, old = unpack(chain.walk)
        reference = self._reference(chain.z, old.power, point.u)
        point = evaluate(reference, point.u, point.score)
        walk = dataclasses.replace(walk, x=point.u, point=point, reference=reference)
        return dataclasses.replace(chain, walk=walk)

    def move_image(self, chain: _Chain) -> _Chain:
        _, _, reference = unpack(chain.walk)
        noise = self._noise(len(chain.z), chain.walk.done + 1)
        moved = self.mala.move(self.prior, reference.likelihood, chain.walk, self.t, noise)
        walk, *_ = unpack(moved)
        bad = ~walk.x.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            raise FloatingPointError(
                f"sample_transported: the image's move {walk.done} gave no density for chains "
                f"{bad.nonzero()[:, 0].tolist()}; check the data and the noise, or the prior at nsr "
                f"{float(self.prior.sde.nsr(self.t)):.3g}."
            )
        told = {k: v for k, v in walk.extras.items() if k not in TRACES}
        walk = dataclasses.replace(walk, extras=told)
        return dataclasses.replace(chain, walk=walk, fit=self._fit(chain.z, walk.x))

    # checkpoints -------------------------------------------------------------------------------

    def arrays(self, chain: _Chain) -> dict[str, Tensor]:
        walk, point, reference = unpack(chain.walk)
        told = {f"told.{k}": v for k, v in walk.extras.items()}
        return told | {
            "z": chain.z,
            "u": point.u,
            "score": point.score,
            "power": reference.power,
            "log_step": walk.log_step,
            "walked": torch.tensor(walk.done),
            "log_scale": chain.log_scale,
            "done": torch.tensor(chain.done),
            "accepted": chain.accepted,
            "nonfinite": chain.nonfinite,
            "error": chain.error,
        }

    def restored(self, saved: dict[str, Tensor]) -> _Chain:
        device = self.evidence.likelihood.y.device
        saved = {k: v.to(device) for k, v in saved.items()}
        z, u = saved["z"], saved["u"]
        reference = self._reference(z, saved["power"], u)
        told = {k.removeprefix("told."): v for k, v in saved.items() if k.startswith("told.")}
        walk = Walk(
            u,
            extras=told,
            point=evaluate(reference, u, saved["score"]),
            reference=reference,
            log_step=saved["log_step"],
            done=int(saved["walked"]),
        )
        return _Chain(
            z=z,
            walk=walk,
            given=self.evidence.given(self.evidence.prior.constrain(z)),
            fit=self._fit(z, u),
            log_scale=saved["log_scale"],
            done=int(saved["done"]),
            accepted=saved["accepted"],
            nonfinite=saved["nonfinite"],
            error=saved["error"],
        )


def _where(
    accepted: Tensor, new: ImageGivenParameters, old: ImageGivenParameters
) -> ImageGivenParameters:
    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(accepted.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return dataclasses.replace(
        new,
        factor=choose(new.factor, old.factor),
        columns=choose(new.columns, old.columns),
        mean=choose(new.mean, old.mean),
        root=choose(new.root, old.root),
        log_det=choose(new.log_det, old.log_det),
    )
