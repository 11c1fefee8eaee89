"""How draws of chains are held against a known distribution."""

import math

import torch

from diffpost.diagnostics import convergence

F64 = torch.float64


def deviations(draws, mean, std, cdf):
    """How far draws (chains, draws, P) are from exact marginals, in units of their Monte Carlo error: (3, P).

    The error of the mean is std/sqrt(ESS), that of the standard deviation std/sqrt(2 ESS) for a normal marginal and
    with the ESS of squares, and the largest difference of distribution functions goes as 1/sqrt(ESS), with the upper
    0.1% point 1.95/sqrt(ESS) (Kolmogorov), here divided by 1.95/4,
    with the smaller ESS of the value and its square.

    Args:
        draws: (chains, draws, P).
        mean, std: (P,) exact.
        cdf: of each parameter, a function of a sorted vector.
    """
    ess = convergence(draws).ess
    off = draws - mean
    spread = convergence(off.square())
    flat = draws.flatten(0, 1).sort(0).values
    n = len(flat)
    rank = (torch.arange(n, dtype=F64) + 0.5) / n
    first = (flat.mean(0) - mean).abs() / std * ess.sqrt()
    variance = off.square().flatten(0, 1)
    error = variance.std(0) / spread.ess.sqrt()
    second = (variance.mean(0) - std.square()).abs() / error
    gaps = [(f(flat[:, i]) - rank).abs().max() for i, f in enumerate(cdf)]
    independent = torch.minimum(ess, spread.ess).clamp_max(n)
    third = torch.stack(gaps) * independent.sqrt() * 4 / 1.95
    return torch.stack([first, second, third])


def accepts(draws, mean, std, cdf):
    """Whether mean, standard deviation and distribution function of every parameter agree within 4 errors (a false
    alarm in 10,000 for each of them).
    """
    return float(deviations(draws, mean, std, cdf).max()) < 4


def normal_cdf(mean, std):
    return lambda x: 0.5 * (1 + torch.erf((x - mean) / (std * math.sqrt(2))))
