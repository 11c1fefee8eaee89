"""Image and parameters together, against the evidence integral on a grid of both parameters.

Every draw is held against mean, standard deviation and distribution function of the exact marginals (targets.accepts,
4 Monte Carlo errors), and the same test must reject the posterior of another noise and that of a known image.
"""

import dataclasses
import math

import pytest
import torch

import diffpost.parameters.blocked as blocked_module
import diffpost.parameters.collapsed as collapsed_module
import diffpost.parameters.transported as transported_module
from diffpost.diagnostics import convergence, sbc
from diffpost.noise import GaussianNoise
from diffpost.parameters import (
    HMC,
    Evidence,
    GaussianImage,
    JointSamples,
    ParametricLikelihood,
    Stretch,
    evidence_shift,
    find_modes,
    run_chains,
    sample_blocked,
    sample_collapsed,
    sample_corrected,
    sample_transported,
    starting_points,
)
from diffpost.random import normal
from diffpost.samplers import DPMSolver
from diffpost.score import GaussianMixtureScore
from diffpost.sde import EDM

from .targets import F64, accepts, deviations
from .toy import toy

SAMPLER = DPMSolver(20, eta=1.0)


@pytest.fixture(scope="module")
def problem():
    return toy(size=6, noise=0.2)


@pytest.fixture(scope="module")
def exact(problem):
    return problem.grid()


@pytest.fixture(scope="module")
def evidence(problem):
    return Evidence(problem.likelihood, problem.prior, problem.gaussian)


@pytest.fixture(scope="module")
def collapsed(problem, evidence):
    return sample_collapsed(
        evidence,
        HMC(80, 60, leapfrogs=3),
        chains=12,
        images=8,
        image_prior=problem.score,
        sampler=SAMPLER,
        seed=1,
    )


def whitened(problem, x, theta):
    """Images (n, *shape) by their exact posterior given theta (n, P), which makes them standard normal: (n, d)."""
    a = problem.likelihood.family.at(problem.prior.values(theta))
    eye = torch.eye(x[0].numel(), dtype=F64).reshape(-1, *x.shape[1:])
    prior, mean = torch.linalg.inv(problem.cov), problem.score.mean.flatten()
    white = []
    for b in range(len(theta)):
        matrix = a.select(torch.tensor([b]))(eye).flatten(1).T
        precision = prior + matrix.T @ matrix / problem.noise**2
        y = problem.likelihood.y.flatten() - matrix @ mean
        centre = mean + torch.linalg.solve(precision, matrix.T @ y) / problem.noise**2
        white.append(torch.linalg.cholesky(precision).T @ (x[b].double().flatten() - centre))
    return torch.stack(white)


def image_deviations(problem, x, theta):
    """Of independent images: how far their spread and their mean are off, in standard deviations."""
    white = whitened(problem, x, theta)
    spread = white.square().mean() - 1
    shift = white.mean(0).square().mean() * len(white) - 1
    return float(spread) / math.sqrt(2 / white.numel()), float(shift) / math.sqrt(
        2 / white.shape[1]
    )


def test_collapsed_chains_reproduce_the_exact_posterior(problem, exact, collapsed):
    assert accepts(collapsed.theta, *exact), deviations(collapsed.theta, *exact)
    assert float(collapsed.ess.min()) > 250
    assert bool((collapsed.nonfinite == 0).all())


def test_the_test_rejects_another_noise_and_a_known_image(problem, collapsed):
    assert not accepts(collapsed.theta, *problem.grid(noise=0.7 * problem.noise))
    assert not accepts(collapsed.theta, *problem.grid(image=problem.score.mean))


def test_collapsed_chains_with_the_wrong_noise_are_rejected(problem, exact):
    wrong = ParametricLikelihood(
        problem.likelihood.y[0], problem.likelihood.family, GaussianNoise(std=0.7 * problem.noise)
    )
    draws = sample_collapsed(
        Evidence(wrong, problem.prior, problem.gaussian),
        HMC(80, 60, leapfrogs=3),
        chains=12,
        images=0,
    )
    assert draws.samples is None
    assert not accepts(draws.theta, *exact)


def test_images_of_collapsed_draws_follow_their_parameters(problem, evidence, collapsed):
    """By the diffusion posterior, of few levels, and exactly."""
    told = collapsed.samples.extras
    torch.testing.assert_close(collapsed.theta[told["chain"], told["draw"]], told["theta"])
    # without guidance's error; of 20 levels the variance is up to 5% off
    spread, shift = image_deviations(problem, collapsed.samples.x, told["theta"])
    assert abs(shift) < 4.5 and abs(spread) < 4.5 + 0.05 * math.sqrt(96 * 36 / 2)
    exactly = sample_collapsed(evidence, HMC(80, 60, leapfrogs=3), chains=12, images=8, seed=1)
    torch.testing.assert_close(exactly.theta, collapsed.theta, rtol=0, atol=0)
    off = image_deviations(problem, exactly.samples.x, exactly.samples.extras["theta"])
    assert max(map(abs, off)) < 4.5
    moved = image_deviations(problem, exactly.samples.x.roll(1, 0), exactly.samples.extras["theta"])
    assert max(map(abs, moved)) > 4.5  # of other parameters


def test_the_ensemble_does_as_well(evidence, exact):
    draws = sample_collapsed(evidence, Stretch(100, 60), chains=48, images=0, restarts=4)
    assert accepts(draws.theta, *exact), deviations(draws.theta, *exact)


def test_transported_chains_reproduce_the_exact_posterior(problem, exact, evidence, collapsed):
    draws = sample_transported(
        evidence, problem.score, collapsed, sweeps=80, warmup=30, thin=8, seed=2
    )
    assert accepts(draws.theta, *exact), deviations(draws.theta, *exact)
    # a Gaussian prior of images lets theta go as far as if there were no image
    assert 0.6 < float(draws.extras["scale"].mean()) < 1.8
    assert 0.2 < float(draws.acceptance.mean()) < 0.4
    # along a chain images are correlated: every coordinate within 5 of its own errors
    white = whitened(problem, draws.samples.x, draws.samples.extras["theta"])
    white = white.reshape(len(draws.theta), -1, white.shape[1])
    for values, expected, std in ((white, 0.0, 1.0), (white.square(), 1.0, math.sqrt(2))):
        error = std / convergence(values).ess.sqrt()
        assert float(((values.mean((0, 1)) - expected).abs() / error).max()) < 5


def test_turns_reproduce_the_exact_posterior(problem, exact):
    draws = sample_blocked(
        problem.likelihood,
        problem.prior,
        problem.score,
        problem.prior.sample(32, seed=3),
        sweeps=30,
        warmup=8,
        thin=10,
        sampler=SAMPLER,
        seed=4,
    )
    assert accepts(draws.theta, *exact), deviations(draws.theta, *exact)
    assert 0.7 < float(draws.acceptance.mean()) < 0.95
    assert draws.samples.x.shape == (32 * 3, 1, 6, 6)


def test_turns_of_two_problems_in_one_batch_are_each_its_own(problem, exact):
    other = toy(size=6, noise=0.2, seed=5, theta=(1.6, -0.9))
    y = torch.stack([problem.likelihood.y[0], other.likelihood.y[0]]).repeat_interleave(20, 0)
    likelihood = ParametricLikelihood(y, problem.likelihood.family, problem.likelihood.noise)
    draws = sample_blocked(
        likelihood,
        problem.prior,
        problem.score,
        problem.prior.sample(40, seed=3),
        sweeps=30,
        warmup=8,
        thin=15,
        group=20,
        sampler=SAMPLER,
        seed=4,
    )
    first, second = draws.of_chains(0, 20), draws.of_chains(20, 20)
    assert accepts(first.theta, *exact), deviations(first.theta, *exact)
    assert accepts(second.theta, *other.grid())
    assert not accepts(second.theta, *exact)
    assert torch.equal(second.samples.extras["theta"], draws.samples.extras["theta"][40:])
    assert torch.equal(second.samples.x, draws.samples.x[40:])
    assert second.samples.extras["chain"].tolist() == [i // 2 for i in range(40)]
    with pytest.raises(ValueError, match="chains 0 to 39"):
        draws.of_chains(30, 20)
    with pytest.raises(ValueError, match="row for each chain"):
        sample_blocked(likelihood, problem.prior, problem.score, torch.zeros(20, 2), group=20)


@pytest.mark.slow
def test_collapsed_and_transported_chains_on_16_by_16_pixels():
    problem = toy(size=16, noise=0.2)
    exact = problem.grid(cells=24)
    evidence = Evidence(problem.likelihood, problem.prior, problem.gaussian)
    start = sample_collapsed(
        evidence,
        HMC(60, 40, leapfrogs=3),
        chains=8,
        images=1,
        restarts=4,
        image_prior=problem.score,
        sampler=SAMPLER,
    )
    assert accepts(start.theta, *exact), deviations(start.theta, *exact)
    draws = sample_transported(evidence, problem.score, start, sweeps=80, warmup=30, image_moves=1)
    assert accepts(draws.theta, *exact), deviations(draws.theta, *exact)


def heavy(problem):
    """Images of two widths: a prior with heavy tails, its mixture, and the Gaussian of its moments."""
    mean = problem.score.mean
    variance = problem.cov.diagonal().reshape(mean.shape)
    factors, weights = torch.tensor([0.15, 2.5], dtype=F64), torch.tensor([0.6, 0.4], dtype=F64)
    prior = GaussianMixtureScore(
        torch.stack([mean, mean]),
        weights,
        torch.stack([f * variance for f in factors]),
        sde=EDM(0.002, 80.0),
    )
    covs = [f * torch.diag(variance.flatten()) for f in factors]
    total = sum(w * c for w, c in zip(weights, covs, strict=True))
    gaussian = GaussianImage.from_covariance(mean, total)
    return prior, (weights.tolist(), [mean.flatten()] * 2, covs), gaussian


def test_transport_corrects_a_prior_that_is_not_gaussian():
    """The collapsed chains of the Gaussian are wrong, the shift says so, and transported chains are right."""
    problem = toy(size=5, noise=0.25, seed=3)
    prior, mixture, gaussian = heavy(problem)
    exact = problem.grid(images=mixture)
    evidence = Evidence(problem.likelihood, problem.prior, gaussian)
    start = sample_collapsed(
        evidence,
        HMC(100, 60, leapfrogs=3),
        chains=16,
        images=4,
        image_prior=prior,
        sampler=SAMPLER,
        seed=5,
    )
    assert not accepts(start.theta, *exact)
    draws = sample_transported(
        evidence, prior, start, sweeps=100, warmup=40, thin=50, seed=6, image_moves=1
    )
    assert accepts(draws.theta, *exact), deviations(draws.theta, *exact)


def test_a_gaussian_that_is_wrong_only_shortens_the_moves(problem, exact, collapsed):
    """Half of the modes, too narrow, about another mean."""
    right = problem.gaussian.truncated(modes=18)
    wrong = Evidence(
        problem.likelihood,
        problem.prior,
        GaussianImage(right.mean + 0.1, right.modes, 0.7 * right.std),
    )
    draws = sample_transported(
        wrong, problem.score, collapsed, sweeps=60, warmup=30, thin=50, seed=7, image_moves=1
    )
    assert accepts(draws.theta, *exact), deviations(draws.theta, *exact)


def test_the_shift_is_zero_for_the_right_gaussian_and_tells_a_wrong_one(problem, exact, collapsed):
    right = evidence_shift(collapsed, problem.likelihood, problem.prior)
    assert bool((right.shift.abs() < 4 * right.error).all()), str(right)
    gaussian = problem.gaussian
    beside = GaussianImage(gaussian.mean.roll(1, -1), gaussian.modes, gaussian.std)
    draws = sample_collapsed(
        Evidence(problem.likelihood, problem.prior, beside),
        HMC(80, 60, leapfrogs=3),
        chains=12,
        images=24,
        image_prior=problem.score,
        sampler=SAMPLER,
        seed=8,
    )
    found = evidence_shift(draws, problem.likelihood, problem.prior)
    assert "width" in str(found) and "sigma" in str(found)
    off = (exact[0] - draws.mean) / draws.std
    # to first order: it points to where the exact mean is, within its error and a half of its size
    worst = int(off.abs().argmax())
    assert float(off[worst].abs()) > 0.3
    assert abs(float(found.shift[worst] - off[worst])) < 3 * float(found.error[worst]) + 0.5 * abs(
        float(off[worst])
    )
    with pytest.raises(ValueError, match="at least 8 images"):
        evidence_shift(dataclasses.replace(draws, samples=None), problem.likelihood, problem.prior)


def test_rounds_of_images_correct_a_wrong_gaussian(problem, exact):
    """About a mean one pixel aside, of modes too narrow: the first chains are wrong, the last are right."""
    gaussian = problem.gaussian
    wrong = GaussianImage(gaussian.mean.roll(1, -1), gaussian.modes, 0.8 * gaussian.std)
    evidence = Evidence(problem.likelihood, problem.prior, wrong)
    kernel = HMC(40, 40, leapfrogs=2)
    more = {"chains": 12, "images": 12, "sampler": SAMPLER, "restarts": 4, "seed": 14}
    first = sample_corrected(evidence, problem.score, kernel, rounds=0, **more)
    assert not accepts(first.theta, *exact)
    draws = sample_corrected(evidence, problem.score, kernel, rounds=2, **more)
    shift, error = (torch.tensor(draws.info[k], dtype=F64) for k in ("shift", "error"))
    assert float((shift[0] / error[0]).abs().max()) > 4
    # the correction's own error is that of some hundred images
    mean, std, _ = exact
    allowed = (error[-1].square() + 1 / draws.ess).sqrt()
    assert bool(((draws.mean - mean).abs() / std < 4 * allowed).all()), (draws.mean, allowed)
    assert bool(((draws.std / std).log().abs() < 0.25).all())
    before, after = ((d.mean - mean).abs().max() / std.max() for d in (first, draws))
    assert float(after) < 0.5 * float(before)
    left = evidence_shift(draws, problem.likelihood, problem.prior)
    assert bool((left.shift.abs() < 4 * left.error).all()), str(left)


def test_collapsed_ranks_of_many_problems_are_uniform():
    """Simulation-based calibration of 120 problems in one batch, two chains each."""
    sims, chains = 120, 2
    base = toy(size=4, noise=0.2)
    truths = base.prior.sample(sims, seed=9)
    ids = torch.arange(sims)
    x = base.score.sample(sims, seed=10)
    noise = base.noise * normal(11, ids, 0, base.likelihood.data_shape, F64)
    y = base.likelihood.family.at(base.prior.values(truths))(x) + noise

    def ranks(sims, std):
        rows = y[:sims].repeat_interleave(chains, 0)
        likelihood = ParametricLikelihood(rows, base.likelihood.family, GaussianNoise(std=std))
        evidence = Evidence(likelihood, base.prior, base.gaussian)
        start = base.prior.unconstrain(base.prior.sample(len(rows), seed=12))
        modes = find_modes(evidence, start, group=chains, adam=20, bfgs=15)
        kernel = HMC(48, 32, leapfrogs=3, group=chains, covariance=modes.covariance)
        run = run_chains(evidence, kernel, modes.z.flatten(0, 1), seed=13)
        assert bool((run.nonfinite == 0).all())
        theta = base.prior.constrain(run.z)[:, ::3].reshape(sims, -1, 2)
        return sbc(theta, truths[:sims])

    good = ranks(sims, base.noise)
    assert float(good.joint_p_value) > 0.005, good.p_value
    assert float(ranks(60, 0.5 * base.noise).joint_p_value) < 1e-3


def test_chains_begin_at_every_good_mode():
    """All of them near the mode, and apart from each other."""
    problem = toy(size=6, noise=0.05)
    evidence = Evidence(problem.likelihood, problem.prior, problem.gaussian)
    found = starting_points(evidence, 6, restarts=6)
    assert found.z.shape == (6, 2) and found.modes >= 1
    with torch.no_grad():
        value = evidence(found.z)
    assert float(value.max() - value.min()) < 20
    assert float(torch.cdist(found.z, found.z)[~torch.eye(6, dtype=torch.bool)].min()) > 0


class Stopped(Exception):
    pass


def stopping(monkeypatch, owner, name, after):
    """Lets a method raise at its ``after``-th call."""
    inner, calls = getattr(owner, name), [0]

    def method(*args, **kwargs):
        calls[0] += 1
        if calls[0] == after:
            raise Stopped
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)


@pytest.fixture(scope="module")
def small():
    problem = toy(size=4, noise=0.2)
    evidence = Evidence(problem.likelihood, problem.prior, problem.gaussian)
    start = sample_collapsed(evidence, HMC(12, 10), chains=3, images=4, restarts=3)
    return problem, evidence, start


def run_of(method, small, **more):
    problem, evidence, start = small
    fast = DPMSolver(4, eta=1.0)
    if method == "collapsed":
        return sample_collapsed(
            evidence,
            HMC(12, 10),
            chains=3,
            images=4,
            restarts=3,
            image_prior=problem.score,
            sampler=fast,
            batch_size=4,
            **more,
        )
    if method == "corrected":
        return sample_corrected(
            evidence,
            problem.score,
            HMC(12, 10),
            rounds=1,
            chains=3,
            images=4,
            restarts=3,
            sampler=fast,
            **more,
        )
    if method == "transported":
        return sample_transported(
            evidence, problem.score, start, sweeps=8, warmup=5, thin=3, **more
        )
    return sample_blocked(
        problem.likelihood,
        problem.prior,
        problem.score,
        start.theta[:, -1],
        sweeps=7,
        warmup=3,
        moves=2,
        thin=3,
        sampler=fast,
        **more,
    )


@pytest.mark.parametrize(
    ("method", "stop", "after"),
    [
        ("collapsed", (HMC, "move"), 15),
        ("collapsed", (collapsed_module, "sample"), 1),
        ("corrected", (HMC, "move"), 30),
        ("transported", (transported_module._Run, "move_theta"), 17),
        ("blocked", (blocked_module, "drawn_images"), 8),
    ],
)
def test_an_interrupted_run_goes_on_with_the_same_draws(
    tmp_path, monkeypatch, small, method, stop, after
):
    whole = run_of(method, small)
    more = {"every": 2} if method == "transported" else {}
    with monkeypatch.context() as patch:
        stopping(patch, *stop, after)
        with pytest.raises(Stopped):
            run_of(method, small, checkpoint=tmp_path, **more)
    again = run_of(method, small, checkpoint=tmp_path, **more)
    torch.testing.assert_close(again.theta, whole.theta, rtol=0, atol=0)
    torch.testing.assert_close(again.samples.x, whole.samples.x, rtol=0, atol=0)
    torch.testing.assert_close(again.acceptance, whole.acceptance, rtol=0, atol=0)
    finished = run_of(method, small, checkpoint=tmp_path, **more)
    torch.testing.assert_close(finished.theta, whole.theta, rtol=0, atol=0)
    with pytest.raises(ValueError, match="another run: seed differ"):
        run_of(method, small, checkpoint=tmp_path, seed=99, **more)


def test_draws_are_saved_and_read_again(tmp_path, small):
    joint = run_of("transported", small)
    joint.save(tmp_path / "joint.zarr")
    again = JointSamples.load(tmp_path / "joint.zarr")
    assert again.names == joint.names and again.info == joint.info
    for name in ("theta", "acceptance", "nonfinite"):
        torch.testing.assert_close(getattr(again, name), getattr(joint, name), rtol=0, atol=0)
    assert again.log_prob is None
    assert set(again.extras) == set(joint.extras)
    torch.testing.assert_close(again.samples.x, joint.samples.x)
    torch.testing.assert_close(again.samples.extras["theta"], joint.samples.extras["theta"])
    from diffpost.samples import Samples

    torch.testing.assert_close(Samples.load(tmp_path / "joint.zarr" / "samples").x, joint.samples.x)
    with pytest.raises(FileExistsError):
        joint.save(tmp_path / "joint.zarr")
    joint.samples.save(tmp_path / "x.zarr")
    with pytest.raises(ValueError, match="diffpost-joint-1"):
        JointSamples.load(tmp_path / "x.zarr")
    bare = dataclasses.replace(small[2], samples=None)
    bare.save(tmp_path / "joint.zarr", overwrite=True)
    again = JointSamples.load(tmp_path / "joint.zarr")
    assert again.samples is None
    torch.testing.assert_close(again.log_prob, bare.log_prob)
    bare.write_table(tmp_path / "theta.csv")
    lines = (tmp_path / "theta.csv").read_text().splitlines()
    assert lines[0] == "name,mean,std,q16,q50,q84,rhat,ess"
    assert [line.split(",")[0] for line in lines[1:]] == ["width", "shift"]
    assert float(lines[1].split(",")[1]) == pytest.approx(float(bare.mean[0]))


def test_bad_input_is_refused(small):
    problem, evidence, start = small
    with pytest.raises(ValueError, match="0 to 12, the draws"):
        sample_collapsed(evidence, HMC(12, 10), images=13)
    with pytest.raises(ValueError, match=r"expected \(3, 2\)"):
        sample_collapsed(evidence, HMC(12, 10), chains=3, start=start.theta[:2, 0])
    with pytest.raises(ValueError, match="chains 0, 1, 2 start where"):
        sample_collapsed(evidence, HMC(12, 10), chains=3, start=torch.full((3, 2), 9.0, dtype=F64))
    with pytest.raises(ValueError, match="expected 2 to 12 images"):
        sample_corrected(evidence, problem.score, HMC(12, 10), images=1)
    with pytest.raises(ValueError, match="no images"):
        sample_transported(evidence, problem.score, dataclasses.replace(start, samples=None))
    with pytest.raises(ValueError, match="at least 1"):
        sample_transported(evidence, problem.score, start, sweeps=0)
    with pytest.raises(ValueError, match="not positive definite"):
        sample_transported(evidence, problem.score, start, covariance=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"\(chains, 2\)"):
        sample_blocked(problem.likelihood, problem.prior, problem.score, torch.zeros(3))
    with pytest.raises(ValueError, match="moves=0"):
        sample_blocked(problem.likelihood, problem.prior, problem.score, torch.zeros(3, 2), moves=0)
    rows = ParametricLikelihood(
        problem.likelihood.y, problem.likelihood.family, problem.likelihood.noise
    )
    with pytest.raises(ValueError, match="problems of their own"):
        sample_collapsed(Evidence(rows, problem.prior, problem.gaussian))
    with pytest.raises(ValueError, match="one a chain"):
        dataclasses.replace(start, acceptance=torch.zeros(5))
    bare = dataclasses.replace(start.samples, extras={})
    with pytest.raises(ValueError, match="do not tell their"):
        dataclasses.replace(start, samples=bare)
