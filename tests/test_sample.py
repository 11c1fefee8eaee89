"""The sampling loop: batches, checkpoints, counts, guard; and the draws that it returns."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffpost.diagnostics import chi2
from diffpost.guidance import DPS, IsotropicCovariance, MomentMatching, PiGDM
from diffpost.instrument import NonFiniteError
from diffpost.likelihood import Likelihood
from diffpost.noise import GaussianNoise
from diffpost.operator import Identity, Matrix
from diffpost.posterior import Posterior
from diffpost.sample import sample
from diffpost.samplers import DPMSolver, Heun
from diffpost.samples import Samples
from diffpost.score import GaussianMixtureScore, GaussianScore
from diffpost.sde import EDM

SHAPE = (1, 4, 5)
SAMPLER = DPMSolver(6, eta=1.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(rows=None, guidance=None, y_seed=1):
    prior = GaussianMixtureScore(
        torch.randn(2, *SHAPE, generator=generator()), torch.tensor([0.4, 0.6]), 0.5, EDM()
    )
    shape = SHAPE if rows is None else (rows, *SHAPE)
    y = torch.randn(shape, generator=generator(y_seed))
    return Posterior(prior, Likelihood(y, Identity(), GaussianNoise(std=0.3)), guidance or PiGDM())


@pytest.mark.parametrize("rows", [None, 7])
def test_batch_split_never_changes_a_draw(rows):
    posterior = problem(rows)
    whole = sample(posterior, 7, SAMPLER, seed=4, progress=False)
    assert whole.x.shape == (7, *SHAPE)
    for size in (1, 3, 7):
        split = sample(posterior, 7, SAMPLER, seed=4, batch_size=size, progress=False)
        torch.testing.assert_close(split.x, whole.x, rtol=1e-5, atol=1e-5)


def test_rows_of_the_data_condition_their_draws():
    """Entry b of batched data gives the draw that it gives alone, and n must be the number of
    rows.
    """
    posterior = problem(rows=4)
    draws = sample(posterior, 4, SAMPLER, seed=4, batch_size=2, progress=False)
    y = posterior.likelihood.y.clone()
    y[0] += 5
    other = Posterior(
        posterior.prior, Likelihood(y, Identity(), GaussianNoise(std=0.3)), posterior.guidance
    )
    changed = sample(other, 4, SAMPLER, seed=4, batch_size=2, progress=False)
    torch.testing.assert_close(draws.x[1:], changed.x[1:])
    assert (draws.x[0] - changed.x[0]).abs().mean() > 1
    with pytest.raises(ValueError, match="4 rows"):
        sample(posterior, 5, SAMPLER, progress=False)


def test_counts():
    """Calls per draw do not depend on the batches; VJPs are counted apart."""
    for guidance, vjps in (
        (PiGDM(), 6),
        (MomentMatching(covariance=IsotropicCovariance(0.5), differentiate=False), 0),
        (MomentMatching(covariance=IsotropicCovariance(0.5)), 6),
    ):
        draws = sample(problem(guidance=guidance), 4, SAMPLER, batch_size=3, progress=False)
        assert (draws.calls, draws.vjps) == (6, vjps)
    exact = sample(problem(guidance=MomentMatching()), 2, SAMPLER, progress=False)
    assert exact.calls == 6 and exact.vjps > 6
    assert sample(problem(), 2, Heun(4), progress=False).calls == 7


def test_physical_units():
    prior = GaussianScore(torch.zeros(SHAPE), var=1.0, sde=EDM()).with_affine(4.0, 100.0)
    draws = sample(prior, 400, DPMSolver(16), progress=False)
    assert abs(float(draws.mean.mean()) - 100) < 0.5
    assert abs(float(draws.std.mean()) - 4) < 0.3


class Interrupt(Exception):
    pass


class Interrupting(GaussianScore):
    """Raises at a given evaluation, as a killed process would stop."""

    left = math.inf

    def denoise(self, x, t):
        self.left -= 1
        if self.left < 0:
            raise Interrupt
        return super().denoise(x, t)


def test_checkpoint_resumes(tmp_path):
    folder = tmp_path / "run"
    model = Interrupting(torch.zeros(SHAPE), var=0.5, sde=EDM())
    want = sample(model, 7, SAMPLER, seed=9, batch_size=2, progress=False)
    model.left = 3 + 2 * 6 + 2  # three for the fingerprint, two batches, and part of a third
    with pytest.raises(Interrupt):
        sample(model, 7, SAMPLER, seed=9, batch_size=2, progress=False, checkpoint=folder)
    model.left = math.inf
    assert len(list(folder.glob("rows-*.npz"))) == 2
    assert not list(folder.glob(".*"))
    got = sample(model, 7, SAMPLER, seed=9, batch_size=2, progress=False, checkpoint=folder)
    assert torch.equal(got.x, want.x)
    assert (got.calls, got.vjps) == (want.calls, want.vjps)
    model.left = 3  # the fingerprint only: nothing is left to compute
    again = sample(model, 7, SAMPLER, seed=9, batch_size=2, progress=False, checkpoint=folder)
    assert torch.equal(again.x, want.x)


def test_checkpoint_refuses_another_run(tmp_path):
    posterior = problem()
    sample(posterior, 3, SAMPLER, seed=1, progress=False, checkpoint=tmp_path)
    for args, kwargs, word in (
        ((posterior, 3, SAMPLER), {"seed": 2}, "seed"),
        ((posterior, 4, SAMPLER), {"seed": 1}, "n"),
        ((posterior, 3, DPMSolver(7, eta=1.0)), {"seed": 1}, "sampler_arguments"),
        ((posterior, 3, Heun(6)), {"seed": 1}, "sampler"),
        ((problem(y_seed=2), 3, SAMPLER), {"seed": 1}, "data"),
        ((problem(guidance=PiGDM(variance=0.5)), 3, SAMPLER), {"seed": 1}, "response"),
    ):
        with pytest.raises(ValueError, match=f"another run.*{word}"):
            sample(*args, progress=False, checkpoint=tmp_path, **kwargs)


def test_checkpoint_refuses_a_noise_that_differs_in_the_third_digit(tmp_path):
    prior = GaussianScore(torch.zeros(6), var=1.0, sde=EDM())

    def posterior(std, gain=1.0):
        return Posterior(
            prior, Likelihood(torch.ones(6), gain * Identity(), GaussianNoise(std=std))
        )

    sample(posterior(0.2), 2, SAMPLER, progress=False, checkpoint=tmp_path)
    sample(posterior(0.2), 2, SAMPLER, progress=False, checkpoint=tmp_path)  # control: the same run
    for other in (posterior(0.2002), posterior(0.2, gain=1.001)):
        with pytest.raises(ValueError, match=r"another run.*the noise"):
            sample(other, 2, SAMPLER, progress=False, checkpoint=tmp_path)


def test_checkpoint_refuses_what_it_cannot_read(tmp_path):
    posterior = problem()
    sample(posterior, 3, SAMPLER, progress=False, checkpoint=tmp_path)
    (batch,) = tmp_path.glob("rows-*.npz")
    batch.write_bytes(batch.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        sample(posterior, 3, SAMPLER, progress=False, checkpoint=tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="does not describe"):
        sample(posterior, 3, SAMPLER, progress=False, checkpoint=tmp_path)


def test_guard_names_the_guidance():
    """A guidance that diverges is named, and not the prior."""
    prior = GaussianScore(torch.zeros(6), var=1.0, sde=EDM())
    like = Likelihood(torch.zeros(6), Matrix(1e15 * torch.eye(6)), GaussianNoise(std=1e-8))
    posterior = Posterior(prior, like, DPS(normalise=False))
    with pytest.raises(NonFiniteError, match=r"step \d+ of 12, sigma = .*guidance.*DPS"):
        sample(posterior, 2, Heun(12), progress=False)


def test_bad_arguments():
    for kwargs in ({"n": 0}, {"n": 2, "batch_size": 0}):
        with pytest.raises(ValueError, match="positive"):
            sample(problem(), sampler=SAMPLER, progress=False, **kwargs)


def test_no_progress_bar_off_a_terminal(capsys):
    sample(problem(), 2, SAMPLER, progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == ""


def test_progress_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    sample(problem(), 2, SAMPLER, progress=True)
    assert "sampling" in capsys.readouterr().err
    sample(problem(), 2, SAMPLER, progress=False)
    assert capsys.readouterr().err == ""


def weighted():
    x = torch.randn(50, *SHAPE, generator=generator(), dtype=torch.float64)
    log_weights = torch.randn(50, generator=generator(1), dtype=torch.float64)
    return Samples(
        x, calls=3, vjps=1.5, log_weights=log_weights, info={"seed": 5, "sde": {"a": 1.0}}
    )


def test_statistics():
    draws = Samples(weighted().x)
    x = draws.x.numpy()
    np.testing.assert_allclose(draws.mean, x.mean(0))
    np.testing.assert_allclose(draws.std, x.std(0, ddof=1))
    np.testing.assert_allclose(
        draws.quantile([0.16, 0.5, 0.84]), np.quantile(x, [0.16, 0.5, 0.84], axis=0)
    )
    assert draws.quantile(0.5).shape == SHAPE
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        draws.quantile(1.5)


def test_resampled_draws_appear_as_often_as_their_weights_say():
    weights = torch.tensor([0.05, 0.0, 0.5, 0.125, 0.325], dtype=torch.float64)
    draws = Samples(
        x=torch.arange(5.0)[:, None],
        log_weights=weights.log(),
        extras={"name": torch.arange(5)},
    )
    assert draws.effective_size == pytest.approx(1 / float(weights.square().sum()))
    even = draws.resampled(1000, seed=1)
    assert even.log_weights is None
    assert torch.equal(even.x[:, 0].long(), even.extras["name"])
    counts = torch.bincount(even.x[:, 0].long(), minlength=5)
    assert (counts - 1000 * weights).abs().max() < 1  # systematic: floor or ceil
    assert torch.equal(even.x, draws.resampled(1000, seed=1).x)
    assert not torch.equal(even.x, draws.resampled(1000, seed=2).x)
    assert len(draws.resampled()) == 5
    plain = Samples(x=torch.arange(5.0)[:, None])
    assert plain.resampled() is plain
    with pytest.raises(ValueError, match="equal weights"):
        plain.resampled(3)


def test_weighted_statistics():
    """Equal weights give the unweighted numbers; integer weights those of repeated draws."""
    draws = weighted()
    w = torch.softmax(draws.log_weights, 0)
    torch.testing.assert_close(draws.mean, torch.einsum("n,n...->...", w, draws.x))
    equal = Samples(draws.x, log_weights=torch.full((50,), 3.0))
    torch.testing.assert_close(equal.std, Samples(draws.x).std)
    counts = torch.arange(50) % 3
    repeated = draws.x.repeat_interleave(counts, 0)
    heavy = Samples(draws.x, log_weights=counts.double().log())
    torch.testing.assert_close(heavy.mean, repeated.mean(0))
    nearest = np.quantile(repeated.numpy(), [0.25, 0.5], axis=0, method="inverted_cdf")
    np.testing.assert_allclose(heavy.quantile([0.25, 0.5]), nearest)


def test_save_and_load(tmp_path):
    draws = weighted()
    path = tmp_path / "draws.zarr"
    draws.save(path)
    back = Samples.load(path)
    assert torch.equal(back.x, draws.x) and torch.equal(back.log_weights, draws.log_weights)
    assert (back.calls, back.vjps, dict(back.info)) == (3, 1.5, dict(draws.info))
    with pytest.raises(FileExistsError):
        draws.save(path)
    Samples(draws.x[:3]).save(path, overwrite=True)
    assert len(Samples.load(path)) == 3 and Samples.load(path).log_weights is None
    assert [p.name for p in tmp_path.iterdir()] == ["draws.zarr"]
    with pytest.raises(FileNotFoundError):
        Samples.load(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other"):
        Samples.load(tmp_path / "other")


def test_what_sample_says_of_itself_is_stored(tmp_path):
    draws = sample(problem(), 2, Heun(4), seed=3, progress=False)
    draws.save(tmp_path / "a.zarr")
    info = Samples.load(tmp_path / "a.zarr").info
    assert (
        info["seed"] == 3 and info["sampler"] == "Heun" and info["sampler_arguments"]["steps"] == 4
    )


def test_xarray():
    data = weighted().to_xarray()
    assert data.x.dims == ("draw", "channel", "y", "x") and data.x.shape == (50, *SHAPE)
    assert data.log_weights.shape == (50,) and data.attrs["seed"] == 5


def test_fits(tmp_path):
    from astropy.io import fits

    header = fits.Header({"BUNIT": "nJy", "CRVAL1": 3.5, "CTYPE1": "RA---TAN"})
    path = tmp_path / "cube.fits"
    weighted().to_fits(path, header)
    with fits.open(path) as hdus:
        assert hdus[0].data.shape == (50, 4, 5)
        assert hdus[0].header["BUNIT"] == "nJy" and hdus[0].header["CRVAL1"] == 3.5
        assert hdus[0].header["NDRAWS"] == 50 and hdus["LOGW"].data.shape == (50,)
        np.testing.assert_array_equal(hdus[0].data, weighted().x[:, 0].numpy())
    with pytest.raises(FileExistsError):
        weighted().to_fits(path)


def test_bad_samples():
    with pytest.raises(ValueError, match="n > 0"):
        Samples(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="log_weights"):
        Samples(torch.zeros(4, 3), log_weights=torch.zeros(3))


def test_chi2():
    """The truth's chi^2 is about the number of data; a shift of one sigma in every pixel adds their
    number.
    """
    truth = torch.randn(200, 3, 4, generator=generator(), dtype=torch.float64)
    y = truth + 0.5 * torch.randn(200, 3, 4, generator=generator(1), dtype=torch.float64)
    like = Likelihood(y, Identity(), GaussianNoise(std=0.5))
    result = chi2(Samples(truth), like)
    assert result.expected == 12 and result.values.shape == (200,)
    error = math.sqrt(2 * 12 / 200)
    assert abs(float(result.values.mean()) - 12) < 4 * error
    assert abs(float(chi2(Samples(truth + 0.5), like).values.mean()) - 24) < 4 * math.sqrt(72 / 200)
    assert abs(float(chi2(Samples(truth + 0.5), like).reduced.mean()) - 1) > 0.5


@dataclass(frozen=True)
class Pairs(DPMSolver):
    """A sampler that makes draws two by two and tells something of each."""

    @property
    def group(self):
        return 2

    def step(self, model, state, t, s, noise):
        state = super().step(model, state, t, s, noise)
        size = state.x.flatten(1).norm(dim=1)
        pair = size.reshape(-1, 2).sum(1).repeat_interleave(2)
        return replace(state, extras={"size": size, "pair": pair})


def test_groups_and_extras(tmp_path):
    """Groups are never split, whatever the batches and interruptions, and what a sampler tells of a draw
    stays with it in memory, in checkpoints and on disk.
    """
    posterior, sampler = problem(rows=6), Pairs(6, eta=1.0)
    whole = sample(posterior, 6, sampler, seed=4, progress=False)
    norms = whole.x.flatten(1).norm(dim=1)
    torch.testing.assert_close(whole.extras["size"], norms)
    torch.testing.assert_close(whole.extras["pair"][::2], norms[::2] + norms[1::2])
    for size in (1, 3, 5):
        folder = tmp_path / str(size)
        split = sample(posterior, 6, sampler, 4, batch_size=size, progress=False, checkpoint=folder)
        assert len(list(folder.glob("rows-*"))) == (2 if size == 5 else 3)
        next(iter(folder.glob("rows-*"))).unlink()
        again = sample(posterior, 6, sampler, 4, batch_size=4, progress=False, checkpoint=folder)
        for name, values in whole.extras.items():
            torch.testing.assert_close(split.extras[name], values, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(again.extras[name], values, rtol=1e-5, atol=1e-5)
    whole.save(tmp_path / "draws.zarr")
    assert torch.equal(Samples.load(tmp_path / "draws.zarr").extras["pair"], whole.extras["pair"])
    with pytest.raises(ValueError, match="multiple"):
        sample(problem(), 5, sampler, progress=False)
    with pytest.raises(ValueError, match="'size'"):
        Samples(whole.x, extras={"size": norms[:2]})


def test_repeated_rows():
    likelihood = problem(rows=3).likelihood.repeat(2)
    assert likelihood.rows == 6
    assert torch.equal(likelihood.y[::2], likelihood.y[1::2])
    with pytest.raises(ValueError, match="repeat"):
        problem().likelihood.repeat(2)


def _wide_problem():
    """A white Gaussian, and data that say next to nothing: prior, posterior of a posterior, posterior."""
    prior = GaussianScore(torch.zeros(1, 16, 16), var=1.0, sde=EDM())
    likelihood = Likelihood(torch.zeros(1, 16, 16), Identity(), GaussianNoise(std=30.0))
    posterior = Posterior(prior, likelihood)
    return prior, posterior, Posterior(posterior, likelihood)


def _correlation(a, b):
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])


def test_draws_of_one_seed_share_nothing_with_a_truth_of_that_seed(monkeypatch):
    """Prior, posterior, its posterior and exact draws at one seed: every correlation within 4.5 of its standard
    deviations (4e-5 of false alarms in six). The control, a posterior that uses its prior's noise, is at .99.
    """
    models = _wide_problem()
    draws = [sample(m, 40, SAMPLER, seed=3, progress=False).x for m in models]
    draws.append(models[0].sample(40, seed=3))
    bound = 4.5 / math.sqrt(draws[0].numel())
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert abs(_correlation(a, b)) < bound
    again = sample(models[1], 40, SAMPLER, seed=3, progress=False).x
    assert torch.equal(again, draws[1])

    monkeypatch.setattr(Posterior, "noise_seed", lambda _, seed: seed)
    shared = sample(models[1], 40, SAMPLER, seed=3, progress=False).x
    assert _correlation(shared, draws[0]) > 0.99


def test_posteriors_of_different_data_share_their_noise():
    """Differences between data are then seen without Monte Carlo noise."""
    _, posterior, _ = _wide_problem()
    other = Posterior(
        posterior.prior,
        Likelihood(torch.ones(1, 16, 16), Identity(), GaussianNoise(std=30.0)),
    )
    a, b = (sample(m, 10, SAMPLER, seed=3, progress=False).x for m in (posterior, other))
    assert _correlation(a, b) > 0.99
