"""Moment matching: a Gaussian p(x_0 | x_t) with the right mean and the right covariance.

Tweedie's formulas give both moments of p(x_0 | x_t) from the denoiser,

    E[x_0 | x_t] = D,    Cov[x_0 | x_t] = C_t = sigma^2/alpha J,    J = dD/dx,

and the Gaussian with these moments gives (Boys et al. 2023, arXiv:2310.06721, TMPD; Rozet et al.
2024, arXiv:2405.13712, section 4.2, MMPS)

    grad_x log p_t(y | x) = J^T A^T (Sigma + A C_t A^T)^-1 (y - A D),

where the dependence of C_t on x is left out. In terms of denoisers, D_y = D + C_t A^T (...)^-1 (y -
A D): the Kalman update of D. The system is solved to a tolerance rather than for a number of
iterations: MMPS as published stops after one to three, which is not enough once A C_t A^T is
ill-conditioned.
"""

from __future__ import annotations

import functools
from typing import final

import torch
from torch import Tensor

from diffpost.guidance.base import Guidance, tweedie_factor
from diffpost.guidance.covariance import Covariance, CovarianceAt, IsotropicCovariance
from diffpost.likelihood import Likelihood
from diffpost.linalg import Solver, SolveReport, cg, filtered
from diffpost.operators.base import LinearOperator
from diffpost.score import ScoreModel

_STEPS = 2  # to the maximum of the evidence, at most
_FACTOR = 10.0  # by which a model is taken to be off at most
_WEIGHT = 10.0  # data' worth of belief that the model of C_t is right


@final
class MomentMatching(Guidance):
    """p(x_0 | x_t) = N(D, C_t), with C_t from the denoiser's Jacobian or from a model of it.

    Source: Boys et al. (2023, arXiv:2310.06721); Rozet et al. (2024, arXiv:2405.13712), section
        4.2. A
    nonlinear A is linearised at D.

    Exact, for linear A and Gaussian noise, when the prior is Gaussian (and C_t is its covariance).
    For other priors p(x_0 | x_t) is Gaussian only at low noise, and the draws are wrong where its
    modes are several at the noise level at which the data begin to decide between them.

    Costs one denoiser evaluation, and in Jacobian products:
      * ``covariance=None``: one VJP per iteration of the solve and one more; none where the prior
        knows the spectrum of its Jacobian and operator and noise are stationary, as on a Gaussian
        field;
      * ``covariance=...``: one VJP, or none with ``differentiate=False`` at noise above
        ``match_below``.

    Args:
        tol: relative residual at which the solve stops, in units whitened by the noise.
        max_iter: most iterations of a solve; a solve that stops there warns
            (``ConvergenceWarning``).
        covariance: None for the exact C_t, otherwise a model of it (:class:`IsotropicCovariance`,
            :class:`SpectralCovariance`, :class:`LocalCovariance`).
        differentiate: only with a model of C_t. True differentiates D, so that the gradient is that
            of the Gaussian above with C_t held fixed: sigma^2/alpha J^T A^T (...)^-1 r. False writes
            C_t for sigma^2/alpha J^T, D_y = D + C_t A^T (...)^-1 r: no network VJP, about 2.7 times
            cheaper. Both agree where the model is exact. Where it is not, False moves pixels by how
            uncertain they are on average instead of for this image (with a stationary model an
            empty sky is moved as much as a galaxy), so data are followed less closely at the noise levels where structure is
            decided; the end of the trajectory, where C_t vanishes, is the same. True moves a mode by the
            ratio of its true variance to the model's, too far where the model is too small by
            several times, and then samplers diverge; False never overshoots the data.
        match_below: only with differentiate=False. At noise-to-signal ratios (in the prior's units) up to this, the model
            is multiplied, entry by entry, by how much larger the Jacobian is along the direction that the data pull,

                f = u^T (sigma^2/alpha J) u/(u^T C_t u),   u = A^T (Sigma + A C_t A^T)^-1 r,

            for one VJP and a second solve. Where the noise is near that of the data, the pull on a mode is in
            proportion to its variance in C_t, so a model that is off by a factor is as if the data's noise were:
            draws fit the data too loosely or too closely. Ten times the finest standard deviation to which the
            data fix the image covers what matters: ``diffpost.guidance.choose`` takes that. None never does it.
        accuracy: share of the update's energy norm at which the solve may stop before ``tol``; None does not. The
            norm bounds the error of D_y in standard deviations of C_t, in total and not mode by mode, and is
            estimated; see ``diffpost.linalg.cg``. A few per cent of what is uncertain at a noise level are
            forgotten at the next, and cost several times fewer iterations where data are good.
        enlarge: only with differentiate=False. Where the residual says that C_t is too small for this image, it
            is enlarged, entry by entry, by

                f = (|C_t^1/2 A^T v|^2 + w)/(g + w),   v = (Sigma + A C_t A^T)^-1 r,
                g = tr (Sigma + A C_t A^T)^-1 A C_t A^T.

            If r is N(0, Sigma + A C_t A^T), as it is where the model is right, the square has the expectation g and
            at most the variance 2 g; without w this is MacKay's (1992, Neural Comp. 4, 415) step to the maximum of
            the evidence. w = 10 is the weight of the model, nothing happens within two standard
            deviations, at most two steps are made, and no pixel gets more than a flat prior would leave it,
            nsr^2. Images unlike those that the model was measured on would otherwise be followed too little, and
            their draws would not fit the data. An error of the PSF or of the noise looks the same: see
            that a draw's chi2 is 1. Costs a solve for each step that it makes.
        precondition: with the exact C_t, a model of it that preconditions the solve: the same answer in
            fewer VJPs. None is an isotropic one of unit variance.
        solver: of the system. A network's Jacobian is symmetric only as far as it was trained
            well; where conjugate gradients stop on it, ``diffpost.linalg.gmres`` does not need symmetry.

    Raises:
        ValueError: match_below not positive, or with differentiate=True; enlarge without a covariance or with differentiate, or, when it acts, with an operator or noise whose structure
            does not give the trace; tol, max_iter or accuracy not positive, accuracy with another solver than conjugate
            gradients, or differentiate=False without a covariance.
    """

    def __init__(
        self,
        tol: float = 1e-4,
        max_iter: int = 200,
        covariance: Covariance | None = None,
        differentiate: bool = True,
        precondition: Covariance | None = None,
        solver: Solver = cg,
        accuracy: float | None = None,
        enlarge: bool = False,
        match_below: float | None = None,
    ) -> None:
        if accuracy is not None and (not 0 < accuracy < 1 or solver is not cg):
            raise ValueError(
                f"MomentMatching(accuracy={accuracy}, solver={solver}): expected 0 < accuracy < 1 and the "
                "solver diffpost.linalg.cg, which alone knows its energy norm."
            )
        if not tol > 0 or max_iter < 1:
            raise ValueError(
                f"MomentMatching(tol={tol}, max_iter={max_iter}): expected tol > 0, max_iter >= 1."
            )
        if enlarge and (covariance is None or differentiate):
            raise ValueError(
                "MomentMatching(enlarge=True) needs a covariance to enlarge and differentiate=False: what is "
                "differentiated is what it is."
            )
        if covariance is None and not differentiate:
            raise ValueError(
                "MomentMatching(differentiate=False) needs a covariance; the exact one is a derivative. "
                "Pass covariance=IsotropicCovariance(variance) or a SpectralCovariance."
            )
        if match_below is not None and (differentiate or not match_below > 0):
            raise ValueError(
                f"MomentMatching(match_below={match_below}): expected a positive noise-to-signal ratio, and "
                "differentiate=False; a gradient that is differentiated needs no match."
            )
        self.tol = tol
        self.max_iter = max_iter
        self.covariance = covariance
        self.differentiate = differentiate
        self.precondition = IsotropicCovariance(1.0) if precondition is None else precondition
        self.accuracy = accuracy
        self.enlarge = enlarge
        self.match_below = match_below
        self.solver = solver if accuracy is None else functools.partial(cg, energy=accuracy)

    def __repr__(self) -> str:
        return (
            f"MomentMatching(tol={self.tol}, max_iter={self.max_iter}, "
            f"covariance={self.covariance}, differentiate={self.differentiate}, "
            f"match_below={self.match_below}, accuracy={self.accuracy}, enlarge={self.enlarge})"
        )

    def posterior_denoise(
        self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor
    ) -> Tensor:
        if self.covariance is None:
            return self._exact(prior, likelihood, x, t)
        matched = self._late(prior, t)
        if self.differentiate or matched:
            denoised, vjp = prior.denoise_vjp(x, t)
        else:
            denoised = prior.denoise(x, t)
        linear = likelihood.operator.linearize(denoised)
        residual = likelihood.residual(denoised)
        covariance = self.covariance.at(denoised, prior, t)
        report = self._solve(covariance, likelihood, linear, residual)
        if matched:
            pull = linear.adjoint(report.x)
            jacobian = tweedie_factor(prior.sde, x, t) * vjp(pull)
            covariance = covariance.enlarged(_ratio(pull, jacobian, covariance.apply(pull)))
            report = self._solve(covariance, likelihood, linear, residual)
        elif self.enlarge:
            for _ in range(_STEPS):
                factor = self._enlargement(covariance, likelihood, linear, residual, report)
                if not bool((factor > 1).any()):
                    break
                covariance = covariance.enlarged(factor)
                report = self._solve(covariance, likelihood, linear, residual)
        image = linear.adjoint(report.x)
        if self.differentiate:
            return denoised + tweedie_factor(prior.sde, x, t) * vjp(image)
        return denoised + covariance.apply(image)

    def _late(self, prior: ScoreModel, t: Tensor) -> bool:
        """Whether all of a batch is at a noise level at which the model is matched."""
        if self.match_below is None:
            return False
        return bool((prior.sde.sigma(t) <= self.match_below * prior.sde.alpha(t)).all())

    def _solve(
        self, covariance: CovarianceAt, likelihood: Likelihood, linear: LinearOperator, r: Tensor
    ) -> SolveReport:
        return covariance.solve(likelihood, linear, r, self.tol, self.max_iter, self.solver)

    @staticmethod
    def _enlargement(
        covariance: CovarianceAt,
        likelihood: Likelihood,
        linear: LinearOperator,
        r: Tensor,
        report: SolveReport,
    ) -> Tensor:
        """f, (B,) float64; 1 where chance alone may have made it more."""
        expected = covariance.effective_data(likelihood, linear, r)
        if expected is None:
            raise ValueError(
                f"MomentMatching(enlarge=True): the trace is not known for {likelihood.operator!r} with "
                f"{likelihood.noise!r}; it takes a convolution, binned or not, and independent noise."
            )
        image = linear.adjoint(report.x)
        found = (image * covariance.apply(image)).flatten(1).sum(1, dtype=torch.float64)
        factor = (found + _WEIGHT) / (expected + _WEIGHT)
        # The variance of the numerator is at most twice its expectation.
        chance = (2 / (expected + _WEIGHT)).sqrt()
        return torch.where(factor > 1 + 2 * chance, factor, 1.0)

    def _exact(self, prior: ScoreModel, likelihood: Likelihood, x: Tensor, t: Tensor) -> Tensor:
        """With C_t = sigma^2/alpha J; J^T and J are the same matrix, so C_t is applied by VJPs."""
        factor = tweedie_factor(prior.sde, x, t)
        spectrum = prior.jacobian_spectrum(x, t)
        if spectrum is not None:
            denoised = prior.denoise(x, t)
            linear = likelihood.operator.linearize(denoised)
            residual = likelihood.residual(denoised)
            power = factor * spectrum
            report = likelihood.solve_spectral(
                linear, residual, power, self.tol, self.max_iter, self.solver
            )
            return denoised + filtered(linear.adjoint(report.x), power)
        denoised, vjp = prior.denoise_vjp(x, t)
        linear = likelihood.operator.linearize(denoised)
        report = likelihood.solve_operator_with(
            linear,
            lambda v: factor * vjp(v),
            likelihood.residual(denoised),
            tol=self.tol,
            max_iter=self.max_iter,
            s_precond=self.precondition.at(denoised, prior, t).power,
            solver=self.solver,
        )
        return denoised + factor * vjp(linear.adjoint(report.x))


def _ratio(pull: Tensor, jacobian: Tensor, model: Tensor) -> Tensor:
    """u^T J u/(u^T C u), (B,) float64, within what a model may be off by; 1 where there is no pull."""
    true, modelled = ((pull * v).flatten(1).sum(1, dtype=torch.float64) for v in (jacobian, model))
    safe = torch.where(modelled > 0, modelled, 1.0)
    return torch.where(modelled > 0, true / safe, 1.0).clamp(1 / _FACTOR, _FACTOR)
