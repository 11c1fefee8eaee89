"""Checks that compare draws with exact ones, with a mixture's weights, or with each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import gamma
from torch import Tensor

import diffpost as dp
from diffpost import diagnostics as dg

WEIGHTS = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
MEANS = 6.0 * torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]], dtype=torch.float64)


def exact(n: int, seed: int, weights: Tensor = WEIGHTS) -> Tensor:
    """Draws of a mixture of four unit Gaussians in the plane."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.multinomial(weights, n, replacement=True, generator=generator)
    return MEANS[k] + torch.randn(n, 2, generator=generator, dtype=torch.float64)


def faulty(fault: str, n: int, seed: int) -> Tensor:
    x = exact(n, seed)
    if fault == "missing":
        return exact(n, seed, WEIGHTS * torch.tensor([1.0, 1, 0, 1]))
    if fault == "copies":
        return x[: n // 8].repeat_interleave(8, 0)
    if fault == "pooled":  # the weights of the modes are equal
        return exact(n, seed, torch.ones(4))
    return x


def gaussian(fault: str, n: int, seed: int) -> Tensor:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scale, shift = {"wide": (1.2, 0.0), "narrow": (0.8, 0.0), "biased": (1.0, 0.3)}[fault]
    return scale * x + shift


# PQMass -----------------------------------------------------------------------------------------


def test_pqmass_is_uniform_for_equal_distributions(uniform_p) -> None:
    p = [
        dg.pqmass(
            exact(200, 2 * s), exact(300, 2 * s + 1), tessellations=5, permutations=199, seed=s
        ).p_value
        for s in range(120)
    ]
    uniform_p(p)


@pytest.mark.parametrize("fault", ["missing", "copies", "pooled", "wide", "narrow", "biased"])
def test_pqmass_finds_faults(fault: str) -> None:
    """Each rejected at 1% in at least 7 of 12 runs of 400 draws; 0.88 (wide) to 1.00 of 40 runs were."""
    rejected = 0
    for s in range(12):
        if fault in ("wide", "narrow", "biased"):
            x = gaussian(fault, 400, 2 * s)
            y = torch.randn(400, 4, generator=torch.Generator().manual_seed(2 * s + 1)).double()
        else:
            x, y = faulty(fault, 400, 2 * s), exact(400, 2 * s + 1)
        rejected += dg.pqmass(x, y, permutations=199, seed=s).p_value <= 0.01
    assert rejected >= 7


def test_pqmass_has_the_statistic_of_the_published_package() -> None:
    """pqm 0.6.3 on the same distributions; both means over tessellations, equal to their scatter."""
    from pqm import pqm_chi2

    x, y = faulty("missing", 600, 0), exact(500, 1)
    ours = dg.pqmass(x, y, cells=40, tessellations=200, permutations=1).chi2
    state = np.random.get_state()  # noqa: NPY002  pqm draws from the global generator
    np.random.seed(0)  # noqa: NPY002
    theirs = np.array([pqm_chi2(x.numpy(), y.numpy(), num_refs=40) for _ in range(200)])
    np.random.set_state(state)  # noqa: NPY002
    error = np.hypot(float(ours.std()), theirs.std()) / np.sqrt(200)
    assert float(ours.mean()) > 60
    assert abs(float(ours.mean()) - theirs.mean()) < 4 * error


def test_pqmass_counts_as_chi2_contingency_does() -> None:
    x, y = exact(150, 0), exact(250, 1)
    result = dg.pqmass(x, y, cells=10, tessellations=1, permutations=1, seed=4)
    generator = torch.Generator().manual_seed(4)
    torch.rand(1, 400, generator=generator)
    shuffled = torch.randperm(400, generator=generator)
    points, label = torch.cat([x, y])[shuffled], (shuffled < 150)[10:]
    cell = torch.cdist(points[10:], points[:10]).argmin(1)
    table = np.stack([torch.bincount(cell[m], minlength=10) for m in (label, ~label)])
    expected = stats.chi2_contingency(table).statistic
    assert float(result.chi2[0]) == pytest.approx(expected, rel=1e-9)
    assert result.expected == 9 and result.permuted.shape == (1,)


# Sliced Wasserstein -----------------------------------------------------------------------------


def test_one_dimension_is_the_wasserstein_distance() -> None:
    rng = np.random.default_rng(0)
    x, y, u, v = rng.normal(size=70), rng.normal(1, 2, size=41), rng.random(70), rng.random(41)
    found = dg.sliced_wasserstein(torch.tensor(x[:, None]), torch.tensor(y[:, None]), slices=3)
    assert found == pytest.approx(stats.wasserstein_distance(x, y), rel=1e-9)
    found = dg.sliced_wasserstein(
        torch.tensor(x[:, None]),
        torch.tensor(y[:, None]),
        x_weights=torch.tensor(u),
        y_weights=torch.tensor(v),
    )
    assert found == pytest.approx(stats.wasserstein_distance(x, y, u, v), rel=1e-9)


def test_a_shift_of_all_draws() -> None:
    """|u . shift| averaged over directions in d dimensions: |shift| Gamma(d/2)/(sqrt(pi) Gamma((d+1)/2))."""
    x = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    found = dg.sliced_wasserstein(x, x + 0.5, slices=4000)
    expected = 2.0 * gamma(8) / gamma(8.5) / np.sqrt(np.pi)
    assert found == pytest.approx(expected, rel=4 * 0.75 / np.sqrt(4000))
    assert dg.sliced_wasserstein(x, x) == pytest.approx(0, abs=1e-12)


def test_the_floor_is_what_exact_sets_are_apart(uniform_p) -> None:
    floor = dg.sliced_wasserstein_floor(exact, 200, repeats=200, slices=50)
    pairs = [(exact(200, 10_000 + 2 * s), exact(200, 10_001 + 2 * s)) for s in range(60)]
    uniform_p([floor.p_value(dg.sliced_wasserstein(x, y, 50)) for x, y in pairs])
    assert floor.mean > floor.std > 0 and floor.values.shape == (200,)
    # The scatter of the modes' counts hides some faults; 0.90, 0.58 and 1.00 of 40 runs were found.
    for fault, power in (("missing", 0.7), ("copies", 0.3), ("pooled", 0.9)):
        distances = [
            dg.sliced_wasserstein(faulty(fault, 200, s), exact(200, 777 + s), 50) for s in range(40)
        ]
        assert np.mean([floor.p_value(d) <= 0.02 for d in distances]) >= power
    unequal = dg.sliced_wasserstein_floor(exact, 200, 50, repeats=5, slices=50)
    assert unequal.mean > floor.mean


# Mode weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1.0, 0.2])
def test_mode_weights_are_uniform_however_much_the_modes_overlap(distance, uniform_p) -> None:
    means = MEANS * distance
    mixture = dp.GaussianMixtureScore(means, WEIGHTS, 1.0, sde=dp.EDM())
    p = [
        dg.mode_weights(
            exact(60, s) + (distance - 1) * nearest(exact(60, s), s),
            mixture,
            simulations=999,
            seed=s,
        ).p_value
        for s in range(150)
    ]
    uniform_p(p, conservative=True)  # counts are whole numbers


def nearest(x: Tensor, seed: int) -> Tensor:
    """The mean that each draw of ``exact`` belongs to, from the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return MEANS[torch.multinomial(WEIGHTS, len(x), replacement=True, generator=generator)]


@pytest.mark.parametrize("fault", ["missing", "copies", "pooled"])
def test_mode_weights_find_faults(fault: str) -> None:
    """At 1%, in 1.00 of 100 runs; copies of 25 draws, whose counts scatter more, in 0.62."""
    p = np.array(
        [dg.mode_weights(faulty(fault, 200, s), MEANS, WEIGHTS).p_value for s in range(40)]
    )
    assert np.mean(p <= 0.01) >= (0.3 if fault == "copies" else 0.95)


def test_mode_weights_count() -> None:
    mixture = dp.GaussianMixtureScore(MEANS, 3 * WEIGHTS, torch.ones(4), sde=dp.EDM())
    x = MEANS[torch.tensor([0, 0, 1, 3])]
    result = dg.mode_weights(x, mixture)
    assert result.counts.tolist() == [2, 1, 0, 1] and result.assignment.tolist() == [0, 0, 1, 3]
    assert torch.allclose(result.expected, 4 * WEIGHTS)
    assert result.chi2 == pytest.approx(
        float(((result.counts - 4 * WEIGHTS) ** 2 / (4 * WEIGHTS)).sum())
    )
    shaped = dg.mode_weights(x, MEANS, WEIGHTS, var=torch.ones(4, 2))
    assert torch.equal(shaped.counts, result.counts)
    visited = dg.mode_weights(x, mixture, torch.tensor([0.5, 0.5, 0, 0]))
    assert visited.chi2 == np.inf and visited.p_value < 1e-4
    log_weights = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    weighted = dg.mode_weights(x, mixture, log_weights=log_weights)
    assert weighted.counts.tolist() == pytest.approx([2, 0, 0, 0])


# Chains -----------------------------------------------------------------------------------------


def chains(rho: float, shape: tuple[int, ...] = (6,), seed: int = 0) -> Tensor:
    """Four chains of 1000: x_t = rho x_{t-1} + sqrt(1 - rho^2) n, stationary."""
    generator = torch.Generator().manual_seed(seed)
    n = torch.randn(4, 1000, *shape, generator=generator, dtype=torch.float64)
    x = [n[:, 0]]
    for t in range(1, 1000):
        x.append(rho * x[-1] + (1 - rho**2) ** 0.5 * n[:, t])
    return torch.stack(x, 1)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_the_effective_sample_size_of_a_known_chain(rho: float) -> None:
    result = dg.convergence(chains(rho, (1, 2, 3)))
    assert result.rhat.shape == result.ess.shape == result.ess_tail.shape == (1, 2, 3)
    assert float(result.rhat.max()) < (1.06 if rho == 0.9 else 1.02) and result.draws == 4000
    expected = 4000 * (1 - rho) / (1 + rho)
    assert float(result.ess.mean()) == pytest.approx(expected, rel=0.2)


def test_chains_that_disagree_and_copies_are_found() -> None:
    x = chains(0.0)
    stuck = x.clone()
    stuck[0] += 3.0
    assert float(dg.convergence(stuck).rhat.min()) > 1.1
    copies = x[:, :125].repeat_interleave(8, 1)
    assert float(dg.convergence(copies).ess.max()) < 4000 / 4
    frozen = x.clone()
    frozen[..., 0] = 1.0
    result = dg.convergence(frozen)
    assert bool(result.rhat[0].isnan()) and bool(result.rhat[1:].isfinite().all())
    assert dg.convergence(x[..., 0]).rhat.shape == ()


def test_chains_that_all_missed_a_mode_agree() -> None:
    """As the docstring says; the weights of the modes tell."""
    x = torch.stack([faulty("missing", 250, s) for s in range(4)])
    assert float(dg.convergence(x).rhat.max()) < 1.02
    assert dg.mode_weights(x.flatten(0, 1), MEANS, WEIGHTS).p_value < 1e-3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dg.pqmass(torch.zeros(9, 2), torch.zeros(9, 3)), "expected"),
        (lambda: dg.pqmass(torch.zeros(9, 2), torch.zeros(9, 2)), "2 cells or more"),
        (lambda: dg.pqmass(torch.full((99, 2), torch.nan), torch.zeros(99, 2)), "finite"),
        (lambda: dg.sliced_wasserstein(torch.zeros(9, 2), torch.zeros(9, 2), slices=0), "slices"),
        (
            lambda: dg.sliced_wasserstein(
                torch.zeros(9, 2), torch.zeros(9, 2), x_weights=torch.zeros(9)
            ),
            "weights",
        ),
        (lambda: dg.sliced_wasserstein_floor(exact, 9, repeats=1), "repeats"),
        (lambda: dg.mode_weights(torch.zeros(5, 2), MEANS), "expected_weights"),
        (lambda: dg.mode_weights(torch.zeros(5, 3), MEANS, WEIGHTS), "finite"),
        (lambda: dg.convergence(torch.zeros(1, 9)), "2 chains"),
        (lambda: dg.convergence(torch.full((2, 9), torch.inf)), "finite"),
    ],
)
def test_errors_say_what_was_expected(call, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()
