"""Calibration against an exact posterior, with faults that must be found.

The prior is a Gaussian field, whose moment-matched posterior is exact, so the verdict must pass, and it
must fail where the data or the draws are made wrong.  Seeds are fixed; the chance that exact draws fail
at this level is 2e-4 in each of four tests.
"""

from __future__ import annotations

import gc
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import diffpost as dp
from diffpost.calibrate import Calibration, _tests, calibrate, design, perform
from diffpost.guidance import Guidance
from diffpost.jobs import simulations
from diffpost.jobs.calibration_page import html_page, verdict
from diffpost.jobs.instruments import gaussian_psf, read_operator
from diffpost.oracles import gaussian_field
from diffpost.resume import RunFolder

SIZE, NOISE, LEVEL = 8, 0.2, 2e-4
FINE = dp.DPMSolver(48, eta=1.0)
COARSE = dp.DPMSolver(24, eta=1.0)
QUICK = {"sampler": dp.DPMSolver(6, eta=1.0), "truth_sampler": dp.DPMSolver(6, eta=1.0)}
OPERATOR = dp.Convolve(gaussian_psf(0.7), boundary="periodic")


@pytest.fixture(scope="module")
def prior() -> dp.GaussianScore:
    return gaussian_field(size=SIZE).prior


def run(prior, **settings) -> Calibration:
    given = {
        "simulations": 100,
        "samples": 16,
        "sampler": COARSE,
        "truth_sampler": FINE,
        "batch_size": 400,
        "level": LEVEL,
        "progress": False,
    }
    noise = settings.pop("noise", dp.GaussianNoise(std=NOISE))
    return calibrate(prior, OPERATOR, noise, **{**given, **settings})


def rejected(result: Calibration) -> set[str]:
    return {test.name for test in result.tests if test.rejected}


class Deaf(Guidance):
    """The prior handed back as the posterior."""

    def posterior_denoise(self, prior, likelihood, x, t):
        return prior.denoise(x, t)


@pytest.fixture(scope="module")
def exact(prior) -> Calibration:
    return run(prior, controls=True)


def test_an_exact_posterior_passes_and_every_control_is_found(exact: Calibration) -> None:
    assert exact.calibrated, exact.tests
    assert [t.name for t in exact.tests] == [
        "coverage",
        "total flux",
        "peak",
        "half-light radius",
        "misfit",
    ]
    assert set(exact.controls) == set(simulations.CONTROLS)
    for name, tests in exact.controls.items():
        assert any(test.rejected for test in tests), name
    # What the draws look like, not only whether they pass.
    ratio, error = exact.error_over_spread
    assert abs(ratio - 1) < 4 * error + 0.01
    for mean, rms in exact.offsets().values():
        assert abs(mean) < 4 / math.sqrt(100)
        assert 0.75 < rms < 1.45
    truths, draws = exact.reduced_chi2
    assert truths == pytest.approx(draws, abs=0.05)


def test_the_prior_handed_back_is_found_by_what_depends_on_the_data(prior) -> None:
    result = run(prior, guidance=Deaf())
    assert {"coverage", "misfit"} <= rejected(result)
    assert "total flux" not in rejected(result)  # of which it says, rightly, that it is blind


@pytest.mark.parametrize("factor", [1.4, 0.7])
def test_a_wrong_noise_level_is_found(prior, factor: float) -> None:
    result = run(prior, real_noise=dp.GaussianNoise(std=factor * NOISE))
    assert "misfit" in rejected(result)
    assert (result.error_over_spread[0] > 1) == (factor > 1)


def test_truths_that_are_not_of_the_prior_are_found(prior, tmp_path: Path) -> None:
    truths = 3 * prior.sample(100, seed=5) + 1
    np.save(tmp_path / "truths.npy", truths.numpy())
    result = run(prior, truths=tmp_path / "truths.npy")
    assert rejected(result)
    # Each truth was used once.
    flux = truths.flatten(1).sum(1).double()
    assert torch.allclose(result.record["truth"][:, 0].sort().values, flux.sort().values, rtol=1e-5)
    # And truths of the prior pass, whoever drew them.
    assert run(prior, truths=prior.sample(100, seed=6), simulations=100).calibrated


def equal(one: Calibration, two: Calibration) -> None:
    assert set(one.record) == set(two.record)
    for name, values in one.record.items():
        assert torch.equal(values, two.record[name]), name


@pytest.mark.parametrize("stop", [0, 2])
def test_a_resumed_run_gives_identical_numbers(
    prior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    settings = {"simulations": 16, "samples": 8, "batch_size": 32, "controls": True, **QUICK}
    whole = run(prior, **settings)
    save, saved = RunFolder.save, []

    def interrupt(self, *args) -> None:
        if len(saved) == stop:
            raise KeyboardInterrupt
        saved.append(1)
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(prior, checkpoint=tmp_path / "run", **settings)
    assert len(list((tmp_path / "run").glob("rows-*.npz"))) == stop
    # What a kill leaves behind while it writes is not taken for a result.
    (tmp_path / "run" / ".rows-00000008-00000011.npz.partial").write_bytes(b"half")
    equal(run(prior, checkpoint=tmp_path / "run", **settings), whole)
    # Finished: nothing is computed again; fewer of the same run are part of it.
    again = run(prior, checkpoint=tmp_path / "run", **settings)
    equal(again, whole)
    assert again.timings["simulations"] == 0
    fewer = run(prior, checkpoint=tmp_path / "run", **{**settings, "simulations": 12})
    assert torch.equal(fewer.record["ranks"], whole.record["ranks"][:12])


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"samples": 16},
        {"controls": True},
        {"sampler": dp.DPMSolver(20)},
        {"truth_sampler": dp.DPMSolver(20)},
        {"guidance": dp.Convolved()},
        {"noise": dp.GaussianNoise(std=0.3)},
        {"real_noise": dp.GaussianNoise(std=0.3)},
        {"statistics": {}},
    ],
    ids=lambda d: next(iter(d)),
)
def test_a_checkpoint_of_another_run_is_refused(prior, tmp_path: Path, other) -> None:
    settings = {"simulations": 8, "samples": 8, "checkpoint": tmp_path, **QUICK}
    run(prior, **settings)
    files = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="another run"):
        run(prior, **{**settings, **other})
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_the_batch_split_changes_nothing(prior) -> None:
    """64: all simulations at once; 8: one by one; 3: each in three parts."""
    settings = {"simulations": 8, "samples": 8, "controls": True, **QUICK}
    one, *others = (run(prior, batch_size=size, **settings) for size in (64, 8, 3))
    for other in others:
        for name, values in one.record.items():
            if name.endswith(("ranks", "fraction")):
                assert torch.equal(values, other.record[name]), name
            else:
                assert torch.allclose(values, other.record[name], rtol=1e-3, atol=1e-4), name


def test_memory_does_not_grow_with_the_simulations(
    prior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate, blocks, held = simulations.Experiment.simulate, [], []

    def watched(self, ids, *args):
        blocks.append(ids)
        if len(blocks) in (3, 8):
            gc.collect()
            held.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
        return simulate(self, ids, *args)

    with monkeypatch.context() as patch:
        patch.setattr(simulations.Experiment, "simulate", watched)
        result = run(
            prior,
            simulations=32,
            samples=8,
            batch_size=32,
            controls=True,
            checkpoint=tmp_path,
            **QUICK,
        )
    assert len(blocks) == 8
    kept = sum(values[0].numel() for values in result.record.values())
    growth = (held[1] - held[0]) / (4 * 5)
    # One image of one simulation would be as many numbers again.
    assert growth <= 2 * kept + 8 < SIZE**2 + 2 * kept
    assert kept < 50
    assert max(p.stat().st_size for p in tmp_path.glob("rows-*.npz")) < 20_000


def test_weighted_draws_count_by_their_weights(prior) -> None:
    experiment = design(prior, OPERATOR, dp.GaussianNoise(std=NOISE), simulations=8, samples=8)
    weights = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    index = experiment._equal(weights.log(), 3)
    assert torch.bincount(index, minlength=8).tolist() == weights.tolist()


def test_holm_adjusts_as_published() -> None:
    found = _tests({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}, 0.05, 4)
    adjusted = {test.name: test.adjusted for test in found}
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert [test.name for test in found if test.rejected] == ["a", "d"]


def test_what_is_written_reproduces_the_verdict(exact: Calibration, tmp_path: Path) -> None:
    exact.save(tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"verdict.json", "report.html", "coverage.png", "ranks.png", "simulations.npz"}
    record = json.loads((tmp_path / "out" / "verdict.json").read_text())
    assert record["calibrated"] is True
    assert record["level"] == LEVEL
    assert record["controls"]["prior"]["rejected"] is True
    kept = np.load(tmp_path / "out" / "simulations.npz")
    again = dp.diagnostics.coverage_from_fractions(torch.from_numpy(kept["fraction"]), 16)
    assert record["tests"][0]["p_value"] == pytest.approx(again.p_value)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("src='data:image/png;base64,") == 2
    assert "http" not in page
    for words in ("Nothing wrong was found", "4 of 4", "A wrong prior", "blind"):
        assert words in page
    with pytest.raises(FileExistsError, match="overwrite"):
        exact.save(tmp_path / "out")
    exact.save(tmp_path / "out", overwrite=True)


def test_a_failed_verdict_says_so(exact: Calibration) -> None:
    wrong = replace(exact, tests=exact.controls["wider"], controls={})
    record = verdict(wrong)
    assert record["calibrated"] is False
    pictures = {"coverage.png": b"", "ranks.png": b""}
    page = html_page(record, pictures)
    assert "Not calibrated" in page
    assert "--controls" in page
    # What spoiling does to draws that are wrong already shows no power.
    page = html_page(verdict(replace(wrong, controls=exact.controls)), pictures)
    assert "this says little" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"simulations": 7}, "at least 8"),
        ({"samples": 4}, "at least 8"),
        ({"level": 1.0}, "level"),
        ({"batch_size": 0}, "batch_size"),
        ({"truths": torch.zeros(100, 1, 4, 4)}, "shape"),
        ({"truths": torch.zeros(20, 1, SIZE, SIZE)}, "20 truths for 100"),
        ({"truths": "no-such-folder"}, "nothing at"),
    ],
)
def test_settings_that_cannot_be_used(prior, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(prior, **settings)


def test_a_step_of_the_design_computes_nothing(prior) -> None:
    experiment = design(prior, OPERATOR, dp.GaussianNoise(std=NOISE), simulations=8, samples=8)
    assert experiment.names == ("total flux", "peak", "half-light radius", "misfit")
    coarse = replace(experiment, sampler=dp.DPMSolver(3), truth_sampler=dp.DPMSolver(3))
    assert perform(coarse, 8, progress=False).simulations == 8


# Words of the command line ----------------------------------------------------------------------


def test_operators_are_read_in_order() -> None:
    shape = (1, 16, 16)
    x = torch.rand(2, *shape)
    found = read_operator(["psf:1.5", "bin:2"], shape)
    expected = dp.PixelBin(2) @ dp.Convolve(gaussian_psf(1.5))
    assert torch.allclose(found.operator(x), expected(x))
    assert found.hidden is None
    assert len(found.words) == 2
    assert torch.allclose(read_operator(["psf:1.5,bin:2"], shape).operator(x), expected(x))
    assert torch.equal(read_operator(["identity"], shape).operator(x), x)


def test_a_gaussian_psf_has_its_width() -> None:
    psf = gaussian_psf(1.5).double()
    r = torch.arange(psf.shape[0]) - psf.shape[0] // 2
    assert float(psf.sum()) == pytest.approx(1)
    assert float((psf.sum(0) * r**2).sum()) == pytest.approx(1.5**2, rel=2e-3)


def test_a_mask_takes_data_away() -> None:
    one = read_operator(["bin:2,mask:0.25:3"], (1, 64, 64))
    assert one.hidden is not None
    assert one.hidden.shape == (32, 32)
    assert float(one.hidden.double().mean()) == pytest.approx(0.25, abs=0.05)
    noise = one.noise(0.1)
    assert torch.equal(noise.variance.isinf(), one.hidden)
    same = read_operator(["mask:0.25"], (1, 32, 32), seed=3)
    assert same.hidden is not None
    assert torch.equal(same.hidden, one.hidden)
    other = read_operator(["mask:0.25"], (1, 32, 32), seed=4)
    assert not torch.equal(other.hidden, one.hidden)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["elephant"],
        ["psf"],
        ["psf:a"],
        ["psf:-1"],
        ["psf:nan"],
        ["bin:3"],
        ["bin:2.5"],
        ["mask"],
        ["mask:1.5"],
        ["mask:0.5", "bin:2"],
        [""],
    ],
)
def test_words_that_cannot_be_read(words: list[str]) -> None:
    with pytest.raises(ValueError, match=r"operator|mask|psf"):
        read_operator(words, (1, 16, 16))


@pytest.fixture(scope="module")
def bimodal() -> dp.GaussianMixtureScore:
    """Two kinds of 2 x 2 images, between which the sum over the pixels does not decide."""
    kind = torch.tensor([[[4.0, -4.0], [0.0, 0.0]]], dtype=torch.float64)
    return dp.GaussianMixtureScore(
        torch.stack([kind, -kind]), torch.tensor([0.8, 0.2]), 1.0, dp.EDM(1e-3, 100.0)
    )


@pytest.mark.parametrize("sampler", [dp.TwistedSMC(48, 40), dp.DPMSolver(40, eta=1.0)], ids=repr)
def test_particles_are_calibrated_where_a_convolved_likelihood_is_not(bimodal, sampler) -> None:
    """One datum that hints at the kind of image: weighted draws pass, one cloud a simulation."""
    tilted = dp.Matrix(torch.tensor([[1.0, 0.6, 0.3, 0.1]], dtype=torch.float64))
    statistics = {"contrast": lambda x: (x[..., 0, 0] - x[..., 0, 1])[:, 0]}
    result = calibrate(
        bimodal, tilted, dp.GaussianNoise(std=0.5), simulations=150, samples=48, sampler=sampler,
        guidance=dp.Convolved(), truth_sampler=dp.DPMSolver(100, eta=1.0), statistics=statistics, batch_size=7200,
        level=LEVEL, progress=False,
    )  # fmt: skip
    assert result.calibrated == isinstance(sampler, dp.TwistedSMC), result.tests


def test_masked_data_do_not_reach_what_is_judged(prior) -> None:
    """What a mask hides leaves no trace in the data, nor in the reference points made of them."""
    std = torch.full((1, SIZE, SIZE), NOISE)
    std[..., ::2] = torch.inf
    experiment = design(
        prior, OPERATOR, dp.GaussianNoise(std=std), simulations=8, samples=8, sampler=COARSE, seed=3
    )
    truths = experiment.draw_truths(range(8))
    y = experiment._data(truths, range(8))
    assert bool(y[..., ::2].isnan().all()) and not bool(y[..., 1::2].isnan().any())
    references = experiment._references(experiment.posterior(y).likelihood, range(8))
    assert bool(references.isfinite().all())


def test_a_mask_is_calibrated(prior) -> None:
    std = torch.full((1, SIZE, SIZE), NOISE)
    std[..., ::2] = torch.inf
    assert run(prior, noise=dp.GaussianNoise(std=std), simulations=60).calibrated
