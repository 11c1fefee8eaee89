"""Coverage and ranks: known curves, uniform p-values under the null, and faults that must be found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from scipy import stats

from diffpost import diagnostics as dg


@pytest.fixture(scope="module")
def p_values(problem) -> Callable[[str, int], dict[str, list[float]]]:
    return cache(partial(_p_values, problem))


def _p_values(make, fault: str, repeats: int) -> dict[str, list[float]]:
    """Of every check, for independent repeats of 300 simulations x 64 draws in 4 dimensions."""
    found: dict[str, list[float]] = {}
    for seed in range(repeats):
        p = make(fault, seed=1000 + seed)
        tarp = dg.coverage(p.samples, p.truths, data=p.data, seed=seed, bootstrap=1)
        back = dg.coverage(p.samples, p.truths, p.data @ p.operator, seed=seed, bootstrap=1)
        with pytest.warns(UserWarning, match="prior"):
            blind = dg.coverage(p.samples, p.truths, seed=seed, bootstrap=1)
        hpd = dg.hpd_coverage(p.log_prob(p.samples), p.log_prob(p.truths), seed, bootstrap=1)
        total = dg.sbc(p.samples.sum(2), p.truths.sum(1), seed)
        size = dg.sbc(p.samples.norm(dim=2), p.truths.norm(dim=1), seed)
        for name, value in (
            ("data", tarp.p_value),
            ("back-projection", back.p_value),
            ("random", blind.p_value),
            ("hpd", hpd.p_value),
            ("total", total.p_value[0]),
            ("total chi2", total.chi2_p_value[0]),
            ("size", size.p_value[0]),
            ("size chi2", size.chi2_p_value[0]),
        ):
            found.setdefault(name, []).append(float(value))
    return found


CHECKS = ("data", "back-projection", "random", "hpd", "total", "total chi2", "size", "size chi2")


@pytest.mark.parametrize("check", CHECKS)
def test_p_values_of_exact_posteriors_are_uniform(check: str, p_values, uniform_p) -> None:
    uniform_p(p_values("", 60)[check])


@pytest.mark.parametrize(
    ("fault", "check", "power"),
    [
        # Rejected at p <= 0.01 in at least this share of runs. Measured over 100 runs: 1.00 where
        # 0.9 is asked, otherwise as told.
        ("prior", "data", 0.9),
        ("prior", "back-projection", 0.9),
        ("prior", "hpd", 0.9),
        ("wide", "data", 0.75),  # 0.99
        ("wide", "back-projection", 0.9),
        ("wide", "hpd", 0.9),
        ("wide", "size", 0.75),  # 0.98
        ("narrow", "data", 0.9),
        ("narrow", "back-projection", 0.9),
        ("narrow", "random", 0.75),  # 0.97
        ("narrow", "hpd", 0.9),
        ("narrow", "size", 0.9),
        ("narrow", "size chi2", 0.75),  # 0.99
        ("biased", "total", 0.9),
        ("biased", "total chi2", 0.9),
        *(("copies", check, 0.9) for check in CHECKS),
    ],
)
def test_faults_are_found(fault: str, check: str, power: float, p_values) -> None:
    assert np.mean(np.array(p_values(fault, 12)[check]) <= 0.01) >= power


@pytest.mark.parametrize("check", ["random", "total", "size"])
def test_what_cannot_see_the_prior_handed_back(check: str, p_values) -> None:
    """As the docstrings say; "data", "back-projection" and "hpd" above do."""
    assert np.mean(np.array(p_values("prior", 12)[check]) > 0.01) > 0.5


def test_the_prior_with_its_own_density_passes_for_highest_density(problem, uniform_p) -> None:
    """As the docstring says; with the exact density "hpd" above finds it."""
    p = []
    for seed in range(40):
        x = problem("prior", seed=seed)
        log_prob = -x.samples.square().sum(2), -x.truths.square().sum(1)
        p.append(dg.hpd_coverage(*log_prob, seed, bootstrap=1).p_value)
    uniform_p(p)


@pytest.mark.parametrize(
    ("check", "passed"), [("random", 0.5), ("data", 0.25), ("back-projection", 0.5), ("hpd", 0.5)]
)
def test_a_bias_of_a_third_of_sigma_is_hardly_seen_by_regions(
    check: str, passed: float, p_values
) -> None:
    """Found in 0.33 ("data"), 0.13 ("hpd") and 0.07 ("back-projection") of 30 runs; "total" above finds it in all."""
    assert np.mean(np.array(p_values("biased", 12)[check]) > 0.01) > passed


@pytest.mark.parametrize("missing", [False, True])
def test_a_missing_mode(missing: bool) -> None:
    """x is +-2 by halves, plus 0.3 z, and the data tell its size and, to odds of about 3, its sign. Draws that leave out the
    less likely mode are found by balls about a reference from the data, by ranks, and by highest density, in every run.
    """
    rejected = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(50 + seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: B023

        sims, draws = 300, 64
        sign = normal(sims, 1).sign()
        x = 2 * sign + 0.3 * normal(sims, 1)
        hint = sign + 1.8 * normal(sims, 1)  # of the sign alone
        odds = torch.sigmoid(2 * hint / 1.8**2)  # p(+ | hint)
        likely = (odds > 0.5).double()
        chosen = (
            likely if missing else (torch.rand(sims, draws, generator=generator) < odds).double()
        )
        samples = ((2 * chosen - 1).expand(sims, draws) * 2 + 0.3 * normal(sims, draws))[..., None]

        def log_prob(v: torch.Tensor, odds: torch.Tensor) -> torch.Tensor:
            up, down = (-0.5 * ((v - m) / 0.3) ** 2 for m in (2.0, -2.0))
            return torch.logaddexp(odds.log() + up, (1 - odds).log() + down)

        tarp = dg.coverage(samples, x, data=hint, seed=seed, bootstrap=1)
        hpd = dg.hpd_coverage(
            log_prob(samples[..., 0], odds), log_prob(x, odds)[:, 0], seed, bootstrap=1
        )
        rank = dg.sbc(samples, x, seed)
        rejected.append([tarp.p_value <= 0.01, hpd.p_value <= 0.01, bool(rank.p_value[0] <= 0.01)])
    share = np.mean(np.array(rejected, dtype=float), 0)
    assert (share == 1).all() if missing else (share <= 0.3).all(), share


# Known curves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1.0, 1.2, 0.8])
def test_a_distant_reference_gives_the_curve_of_a_normal(width: float) -> None:
    """The truth's place is Phi(z/k) for a posterior k times too wide: ECP = Phi(k Phi^-1(alpha))."""
    sims, draws = 4000, 1000
    generator = torch.Generator().manual_seed(3)
    truth = torch.randn(sims, 1, generator=generator, dtype=torch.float64)
    samples = width * torch.randn(sims, draws, 1, generator=generator, dtype=torch.float64)
    result = dg.coverage(samples, truth, torch.full_like(truth, -1e3))
    expected = stats.norm.cdf(width * stats.norm.ppf(result.alpha.numpy()))
    # Exceeded with probability 2 exp(-2 n e^2) = 2e-4 (Dvoretzky, Kiefer, Wolfowitz and Massart),
    # and the finite number of draws moves a place by about 1/draws.
    bound = np.sqrt(np.log(2 / 2e-4) / 2 / sims) + 2 / draws
    assert np.abs(result.ecp.numpy() - expected).max() < bound
    assert (result.p_value > 2e-4) == (width == 1.0)
    assert result.inside == (result.p_value > 0.05)


@pytest.mark.parametrize("width", [1.2, 0.8])
def test_highest_density_gives_the_curve_of_chi2(width: float) -> None:
    sims, draws, d = 4000, 400, 3
    generator = torch.Generator().manual_seed(4)
    truth = torch.randn(sims, d, generator=generator, dtype=torch.float64)
    samples = width * torch.randn(sims, draws, d, generator=generator, dtype=torch.float64)
    result = dg.hpd_coverage(-samples.square().sum(2), -truth.square().sum(1))
    quantile = stats.chi2.ppf(result.alpha.numpy(), d)
    expected = stats.chi2.cdf(width**2 * quantile, d)
    bound = np.sqrt(np.log(2 / 2e-4) / 2 / sims) + 2 / draws
    assert np.abs(result.ecp.numpy() - expected).max() < bound


def test_fractions_by_counting(problem) -> None:
    p = problem(sims=20, draws=16, seed=5)
    reference = p.data @ p.operator
    f = dg.tarp_fraction(p.samples, p.truths, reference)
    for i in range(20):
        r = np.linalg.norm(p.samples[i].numpy() - reference[i].numpy(), axis=1)
        own = np.linalg.norm(p.truths[i].numpy() - reference[i].numpy())
        inside = int((r < own).sum())
        assert inside / 17 <= float(f[i]) <= (inside + 1) / 17


def test_balls_about_the_mean_are_highest_density_regions(problem) -> None:
    p = problem(sims=30, d=1)
    balls = dg.tarp_fraction(p.samples, p.truths, p.mean, seed=2)
    assert torch.equal(balls, dg.hpd_fraction(p.log_prob(p.samples), p.log_prob(p.truths), 2))


# Edges ------------------------------------------------------------------------------------------


def test_ties_are_broken_at_random(uniform_p) -> None:
    """Draws equal to the truth, as of masked images: fractions and ranks are uniform all the same."""
    image = torch.rand(1000, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    samples = image[:, None].expand(1000, 5, 1, 3, 3)
    uniform_p(dg.tarp_fraction(samples, image, torch.zeros_like(image)).tolist())
    counts = torch.bincount(dg.ranks(torch.zeros(6000, 5), torch.zeros(6000)), minlength=6)
    assert stats.chisquare(counts.numpy()).pvalue > 2e-4
    # Half of the draws tie: the rank is uniform on 5...8 for 5 below and 3 ties.
    s = torch.tensor([0.0, 0, 0, 0, 0, 1, 1, 1, 2, 2]).expand(4000, 10)
    counts = torch.bincount(dg.ranks(s, torch.ones(4000)), minlength=11)
    assert counts[:5].sum() == 0 and counts[9:].sum() == 0
    assert stats.chisquare(counts[5:9].numpy()).pvalue > 2e-4


def test_fractions_and_ranks_do_not_depend_on_batches(problem) -> None:
    p = problem(sims=10, draws=8)
    whole = dg.tarp_fraction(p.samples, p.truths, p.data, seed=3)
    parts = [
        dg.tarp_fraction(p.samples[i], p.truths[i], p.data[i], seed=3, ids=i)
        for i in torch.arange(10).split(3)
    ]
    assert torch.equal(whole, torch.cat(parts))
    tied = p.samples.round()
    ranks = dg.ranks(tied, p.truths.round(), seed=3)
    again = [dg.ranks(tied[i], p.truths[i].round(), 3, ids=i) for i in torch.arange(10).split(4)]
    assert torch.equal(ranks, torch.cat(again))
    assert dg.coverage_from_fractions(whole, 8).p_value == pytest.approx(
        dg.coverage(p.samples, p.truths, p.data, seed=3).p_value
    )


def test_alpha_covers_its_range_whatever_the_values() -> None:
    result = dg.coverage_from_fractions(torch.full((40,), 0.5), 10)
    assert result.alpha[0] == 0 and result.alpha[-1] == 1 and len(result.alpha) == 101
    assert result.ecp[0] == 0 and result.ecp[49] == 0 and result.ecp[50] == 1 and result.sims == 40
    assert result.p_value < 1e-6 and not result.inside
    few = dg.coverage_from_fractions(torch.rand(40), 10, alphas=[0.1, 0.5, 0.9])
    assert few.ecp.shape == (3,) and few.band.shape == few.null_band.shape == (2, 3)


def test_the_bootstrap_band_has_the_width_of_the_binomial() -> None:
    f = torch.linspace(0, 1, 400, dtype=torch.float64)
    result = dg.coverage_from_fractions(f, 64, bootstrap=4000, alphas=[0.2, 0.5])
    width = (result.band[1] - result.band[0]).numpy()
    expected = 2 * 1.96 * np.sqrt(np.array([0.2, 0.5]) * [0.8, 0.5] / 400)
    assert width == pytest.approx(expected, rel=0.1)


def test_importance_weights_make_draws_of_the_prior_a_posterior(problem, uniform_p) -> None:
    p = problem(d=2, sims=400, draws=2000, seed=8)
    z = torch.randn(p.samples.shape, generator=torch.Generator().manual_seed(1)).double()
    residual = p.data[:, None] - z @ p.operator.T
    weights = torch.softmax(-residual.square().sum(2) / (2 * 0.25), 1)
    result = dg.coverage(z, p.truths, p.mean, weights=weights)
    uniform_p(result.fractions.tolist())
    assert result.p_value > 2e-4 and 50 < result.draws < 2000
    assert dg.coverage(z, p.truths, p.mean).p_value < 1e-6
    equal = dg.coverage(p.samples, p.truths, p.mean, weights=torch.ones(400, 2000))
    assert torch.allclose(
        equal.fractions, dg.coverage(p.samples, p.truths, p.mean).fractions, atol=1e-12
    )
    log_prob = p.log_prob(z), p.log_prob(p.truths)
    assert dg.hpd_coverage(*log_prob, weights=weights).p_value > 2e-4


def test_references_know_the_data_and_not_the_truth(problem) -> None:
    p = problem(sims=200)
    r = dg.references_from_data(p.data, p.truths)
    changed = p.truths.clone()
    changed[120:] += 5.0
    again = dg.references_from_data(p.data, changed)
    # Of earlier truths only: those up to 128 were learned from the first 64.
    assert torch.equal(r[:128], again[:128])
    error, spread = (r - p.truths)[32:].norm(dim=1), p.truths[32:].norm(dim=1)
    assert float(error.mean()) < 0.8 * float(spread.mean())
    images = dg.references_from_data(torch.randn(40, 7), torch.randn(40, 1, 5, 5))
    assert images.shape == (40, 1, 5, 5) and images.dtype == torch.float32
    masked = p.data.clone()
    masked[:, 0] = torch.nan
    assert bool(dg.references_from_data(masked, p.truths).isfinite().all())


def test_ranks_and_their_bands(problem) -> None:
    p = problem(sims=200, draws=31)
    result = dg.sbc(p.samples, p.truths)
    assert result.ranks.shape == (200, 4) and result.p_value.shape == (4,) and result.draws == 31
    assert result.ecdf.shape == (31, 4) and result.band.shape == (2, 31)
    below = (p.samples < p.truths[:, None]).sum(1)
    assert torch.equal(result.ranks, below)
    share = (below < 7).double().mean(0)
    assert torch.allclose(result.ecdf[6], share) and float(result.grid[6]) == 7 / 32
    assert torch.equal(result.inside, result.p_value > 0.05)
    assert result.joint_p_value == min(1.0, 4 * float(result.p_value.min()))
    one = dg.sbc_from_ranks(below[:, 0], 31)
    assert float(one.p_value[0]) == float(result.p_value[0])


@pytest.mark.parametrize("draws", [1, 3, 500])
def test_ranks_of_few_and_many_draws(draws: int, uniform_p) -> None:
    generator = torch.Generator().manual_seed(draws)
    values = torch.randint(0, draws + 1, (200, 80), generator=generator)
    result = dg.sbc_from_ranks(values, draws)
    # Coarse ranks give coarse p-values, never too small ones.
    uniform_p(result.ecdf_p_value.tolist(), conservative=draws < 10)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dg.coverage(torch.zeros(3, 4, 2), torch.zeros(3, 3)), "expected"),
        (lambda: dg.coverage(torch.zeros(3, 0, 2), torch.zeros(3, 2)), "expected"),
        (
            lambda: dg.coverage(
                *[torch.zeros(3, 4, 2), torch.zeros(3, 2)] + [torch.zeros(3, 2)] * 2
            ),
            "references and data",
        ),
        (lambda: dg.tarp_fraction(torch.zeros(3, 4, 2), torch.zeros(3, 2), torch.zeros(3)), "same"),
        (
            lambda: dg.tarp_fraction(
                torch.full((3, 4, 2), torch.nan), torch.zeros(3, 2), torch.zeros(3, 2)
            ),
            "finite",
        ),
        (
            lambda: dg.coverage(
                torch.zeros(3, 4, 2),
                torch.zeros(3, 2),
                torch.zeros(3, 2),
                weights=-torch.ones(3, 4),
            ),
            "weights",
        ),
        (lambda: dg.coverage_from_fractions(torch.tensor([1.5]), 4), r"\[0, 1\]"),
        (lambda: dg.coverage_from_fractions(torch.rand(5), 4, alphas=[0.5, 0.2]), "ascending"),
        (lambda: dg.coverage_from_fractions(torch.rand(5), 4, level=1.0), "level"),
        (lambda: dg.hpd_coverage(torch.zeros(3, 4), torch.zeros(4)), "expected"),
        (lambda: dg.hpd_coverage(torch.full((3, 4), torch.nan), torch.zeros(3)), "finite"),
        (lambda: dg.sbc(torch.zeros(3, 4, 2), torch.zeros(3)), "expected"),
        (lambda: dg.sbc(torch.full((3, 4), torch.nan), torch.zeros(3)), "NaN"),
        (lambda: dg.sbc_from_ranks(torch.tensor([5]), 4), "0 to draws"),
        (lambda: dg.sbc_from_ranks(torch.tensor([0.5]), 4), "whole numbers"),
        (lambda: dg.references_from_data(torch.zeros(3, 4), torch.zeros(4, 2)), "expected"),
    ],
)
def test_errors_say_what_was_expected(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
