"""PSFs: pedestal, normalisation, centring, resampling, trimming."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.io import fits
from scipy.special import erf

from diffpost.jobs.psf import centroid, oversampling_of, prepare_psf


def gaussian(shape: tuple[int, int], centre: tuple[float, float], sigma: float) -> np.ndarray:
    """A unit Gaussian integrated over pixels."""

    def axis(n: int, c: float) -> np.ndarray:
        edges = np.arange(n + 1) - 0.5
        return np.diff(0.5 * (1 + erf((edges - c) / sigma / 2**0.5)))

    return np.outer(axis(shape[0], centre[0]), axis(shape[1], centre[1]))


@pytest.mark.parametrize("oversample", [1, 2, 3])
@pytest.mark.parametrize("shape", [(24, 24), (25, 24), (31, 31)])
def test_an_even_sized_off_centre_psf_comes_out_centred(
    shape: tuple[int, int], oversample: int
) -> None:
    psf = prepare_psf(3.7 * gaussian(shape, (11.63, 12.21), 1.2), oversample=oversample)
    h, w = psf.kernel.shape
    assert h % 2 == 1
    assert w % 2 == 1
    assert psf.kernel.sum() == pytest.approx(1, abs=1e-12)
    truth = gaussian((h, w), (h // 2, w // 2), 1.2 * oversample)
    assert np.abs(psf.kernel - truth).max() < 2e-3 * truth.max()
    # Negative control: the same without the centring is off by what this test must see.
    left = prepare_psf(gaussian(shape, (11.63, 12.21), 1.2), oversample=oversample, recentre=False)
    h, w = left.kernel.shape
    truth = gaussian((h, w), (h // 2, w // 2), 1.2 * oversample)
    assert np.abs(left.kernel - truth).max() > 0.05 * truth.max()


def test_summing_the_fine_pixels_gives_the_native_psf_back() -> None:
    native = gaussian((21, 21), (10, 10), 1.3)
    psf = prepare_psf(native, oversample=3)
    h = psf.kernel.shape[0]
    # Fine pixel h // 2 is the middle one of the native pixel that the source is in.
    start = (h // 2 - 1) % 3
    inner = psf.kernel[start:, start:]
    m = len(inner) // 3 * 3
    binned = inner[:m, :m].reshape(m // 3, 3, m // 3, 3).sum((1, 3))
    middle = (h // 2 - 1 - start) // 3
    part = binned[middle - 6 : middle + 7, middle - 6 : middle + 7]
    assert np.abs(part - native[4:17, 4:17]).max() < 1e-4 * native.max()


@pytest.mark.parametrize("oversample", [1, 2, 3])
def test_an_oversampled_psf_is_brought_to_the_grid(oversample: int) -> None:
    psf = prepare_psf(
        gaussian((81, 81), (40.3, 39.8), 3.3), oversample=oversample, psf_oversample=3.0
    )
    h, w = psf.kernel.shape
    truth = gaussian((h, w), (h // 2, w // 2), 1.1 * oversample)
    assert np.abs(psf.kernel - truth).max() < 1e-6 * truth.max()


def test_the_pedestal_of_a_star_is_subtracted_and_told() -> None:
    rng = np.random.default_rng(2)
    star = 2500 * gaussian((50, 50), (24.1, 23.6), 1.1) + 0.05 + 0.01 * rng.normal(size=(50, 50))
    psf = prepare_psf(star)
    assert psf.report["pedestal"] == pytest.approx(0.05, abs=3e-3)
    assert psf.report["centroid"] == pytest.approx([24.1, 23.6], abs=2e-3)
    text = " ".join(psf.notes)
    for word in ("pedestal", "normalised", "centroid"):
        assert word in text
    # Without a pedestal none is found, and a PSF that its maker normalised is left alone.
    none = prepare_psf(star - 0.05)
    assert none.report["pedestal"] == 0
    wings = gaussian((15, 15), (7, 7), 4.0)
    assert prepare_psf(wings / wings.sum()).report["pedestal"] == 0
    assert prepare_psf(star, background=0.02).report["pedestal"] == 0.02


def test_a_psf_that_is_ready_is_not_touched() -> None:
    ready = gaussian((21, 21), (10, 10), 1.4)
    ready /= ready.sum()
    psf = prepare_psf(ready)
    assert psf.notes == ()
    assert np.allclose(psf.kernel, ready, atol=1e-15)


def test_the_centroid_of_a_noisy_star() -> None:
    rng = np.random.default_rng(3)
    errors = []
    for _ in range(20):
        at = 12 + rng.uniform(-0.5, 0.5, 2)
        star = gaussian((25, 25), tuple(at), 1.2) + 1e-4 * rng.normal(size=(25, 25))
        errors.append(centroid(star) - at)
    # A windowed centroid's error is about 2 sigma_noise sqrt(pi) / flux * sigma: some 1e-3 here.
    assert np.abs(errors).max() < 0.01


@pytest.mark.parametrize("oversample", [1, 2])
def test_a_psf_larger_than_the_model_is_trimmed_or_refused(oversample: int) -> None:
    wide = gaussian((101, 101), (50, 50), 7.0)
    whole = prepare_psf(wide, oversample=oversample)
    assert whole.kernel.shape[0] >= 101 * oversample - oversample
    psf = whole.trimmed((32 * oversample, 40 * oversample))
    assert psf.kernel.shape == (32 * oversample - 1, 40 * oversample - 1)
    assert psf.kernel.sum() == pytest.approx(1, abs=1e-12)
    # 15.5 and 19.5 pixels are 2.214 and 2.786 standard deviations.
    if oversample == 1:
        assert psf.report["lost"] == pytest.approx(1 - 0.9732 * 0.9947, abs=2e-4)
    assert psf.notes[-1].startswith("PSF: larger than the model can hold")
    assert whole.trimmed((999, 999)) is whole
    with pytest.raises(ValueError, match=r"larger than the model can hold .* would be cut off"):
        whole.trimmed((20 * oversample, 20 * oversample))


def test_the_noise_of_a_wide_stamp_does_not_widen_the_psf() -> None:
    rng = np.random.default_rng(5)
    narrow = gaussian((121, 121), (60, 60), 1.5)
    # Summed with their sign, 14641 pixels of noise are 1% of the flux; their moduli are 1.
    psf = prepare_psf(narrow + 1e-4 * rng.normal(size=narrow.shape))
    assert abs(psf.radius(0.9) - prepare_psf(narrow).radius(0.9)) <= 1
    moduli = np.abs(psf.native)
    assert moduli[55:66, 55:66].sum() < 0.6 * moduli.sum()  # negative control
    # The core's width is measured on the core, whatever the stamp.
    assert psf.report["fwhm"] == pytest.approx(
        prepare_psf(narrow[45:76, 45:76]).report["fwhm"], rel=0.02
    )


def test_psfs_without_flux_are_refused() -> None:
    with pytest.raises(ValueError, match="zero everywhere"):
        prepare_psf(np.zeros((9, 9)))
    with pytest.raises(ValueError, match="NaN everywhere"):
        prepare_psf(np.full((9, 9), np.nan))
    with pytest.raises(ValueError, match="positive flux"):
        prepare_psf(-gaussian((9, 9), (4, 4), 1.0))
    with pytest.raises(ValueError, match=r"\(h, w\)"):
        prepare_psf(np.ones((2, 9, 9)))
    holes = gaussian((21, 21), (10, 10), 1.4)
    holes[3, 4] = np.nan
    assert any("NaN" in note for note in prepare_psf(holes).notes)


def test_the_sampling_is_read_from_the_headers() -> None:
    def header(pixel: float) -> fits.Header:
        out = fits.Header()
        out["CTYPE1"], out["CTYPE2"] = "RA---TAN", "DEC--TAN"
        out["CDELT1"], out["CDELT2"] = -pixel / 3600, pixel / 3600
        return out

    assert oversampling_of(fits.Header(), header(0.06)) == (1.0, None)
    assert oversampling_of(header(0.06), header(0.06))[0] == 1
    ratio, told = oversampling_of(header(0.015), header(0.06))
    assert ratio == 4
    assert told is not None
    webb = fits.Header()
    webb["PIXELSCL"] = 0.03
    assert oversampling_of(webb, header(0.06))[0] == 2
    with pytest.raises(ValueError, match="coarser"):
        oversampling_of(header(0.12), header(0.06))
