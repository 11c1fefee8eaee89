"""Image sources: every container gives the same frames, and refuses what cannot be trained on."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from astropy.io import fits
from PIL import Image

from diffpost.io.images import (
    AffineMap,
    AsinhInverse,
    GammaInverse,
    open_images,
    pixel_map_from_dict,
)

FRAMES = np.random.default_rng(0).normal(size=(5, 6, 8)).astype(np.float32)


def _npy(folder: Path) -> Path:
    np.save(folder / "a.npy", FRAMES)
    return folder / "a.npy"


def _npz(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=FRAMES, labels=np.arange(5))
    return folder / "a.npz"


def _npz_compressed(folder: Path) -> Path:
    np.savez_compressed(folder / "c.npz", images=FRAMES, labels=np.arange(5))
    return folder / "c.npz"


def _hdf5(folder: Path) -> Path:
    with h5py.File(folder / "a.h5", "w") as file:
        file["group/images"] = FRAMES
        file["labels"] = np.arange(5)
    return folder / "a.h5"


def _zarr_array(folder: Path) -> Path:
    zarr.save_array(str(folder / "a.zarr"), FRAMES)
    return folder / "a.zarr"


def _zarr_group(folder: Path) -> Path:
    group = zarr.open_group(str(folder / "g.zarr"), mode="w")
    group.create_array("images", data=FRAMES)
    group.create_array("labels", data=np.arange(5))
    return folder / "g.zarr"


def _fits_folder(folder: Path) -> Path:
    for i, frame in enumerate(FRAMES):
        suffix = ".fits.gz" if i % 2 else ".fits"
        empty = fits.PrimaryHDU()
        fits.HDUList([empty, fits.ImageHDU(frame)]).writeto(folder / f"{i}{suffix}")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.mark.parametrize(
    "write", [_npy, _npz, _npz_compressed, _hdf5, _zarr_array, _zarr_group, _fits_folder]
)
def test_every_container_gives_the_same_frames(write, tmp_path):
    source = open_images(write(tmp_path))
    assert len(source) == 5
    assert source.shape == (1, 6, 8)
    for i in (3, 0, -1):
        assert source[i].dtype == np.float32
        np.testing.assert_array_equal(source[i], FRAMES[i][None])
    assert len(list(source)) == 5
    with pytest.raises(IndexError, match="frame 5 of 5"):
        source[5]


@pytest.mark.parametrize("write", [_npy, _npz])
def test_numpy_files_are_mapped_not_loaded(write, tmp_path):
    assert isinstance(open_images(write(tmp_path))._array, np.memmap)


def test_fortran_order_in_an_npz(tmp_path):
    np.savez(tmp_path / "f.npz", np.asfortranarray(FRAMES))
    np.testing.assert_array_equal(open_images(tmp_path / "f.npz")[2], FRAMES[2][None])


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_pictures_keep_their_channels_and_their_values(suffix, tmp_path):
    rgb = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(tmp_path / f"a{suffix}")
    source = open_images(tmp_path)
    assert source.shape == (3, 7, 9)
    np.testing.assert_array_equal(source[0], np.moveaxis(rgb, -1, 0))


def test_sixteen_bit_and_jpeg(tmp_path):
    deep = np.arange(63, dtype=np.uint16).reshape(7, 9) * 1000
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(open_images(tmp_path / "deep.png")[0][0], deep)
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(tmp_path / "a.JPG", "JPEG")
    np.testing.assert_allclose(open_images(tmp_path / "a.JPG")[0], 90, atol=1)


def test_tiff_of_floats_and_of_16_bit_colour(tmp_path):
    tifffile.imwrite(tmp_path / "float.tif", FRAMES[0])
    np.testing.assert_array_equal(open_images(tmp_path / "float.tif")[0][0], FRAMES[0])
    deep = np.random.default_rng(2).integers(0, 65536, (7, 9, 3), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tiff", deep, photometric="rgb")
    np.testing.assert_array_equal(open_images(tmp_path / "deep.tiff")[0], np.moveaxis(deep, -1, 0))


def test_several_paths_follow_one_another(tmp_path):
    np.save(tmp_path / "a.npy", FRAMES)
    np.save(tmp_path / "b.npy", 2 * FRAMES[:2])
    source = open_images([tmp_path / "a.npy", tmp_path / "b.npy"], AffineMap(2.0, 1.0))
    assert len(source) == 7
    np.testing.assert_allclose(source[4], (FRAMES[4][None] - 1) / 2, rtol=1e-6)
    np.testing.assert_allclose(source[6], (2 * FRAMES[1][None] - 1) / 2, rtol=1e-6)
    np.save(tmp_path / "c.npy", FRAMES[:, :5])
    with pytest.raises(ValueError, match=r"c\.npy.*\(1, 5, 8\)"):
        open_images([tmp_path / "a.npy", tmp_path / "c.npy"])


def test_pixel_maps_undo_their_display():
    x = np.linspace(-0.2, 3, 50).astype(np.float32)
    shown = 255 * np.arcsinh(x / 0.05) / np.arcsinh(1 / 0.05) + 3
    np.testing.assert_allclose(AsinhInverse(0.05, 255, 3)(shown), x, atol=1e-5)
    shown = np.sign(x) * 255 * np.abs(x) ** (1 / 2.2)
    np.testing.assert_allclose(GammaInverse(2.2)(shown), x, atol=1e-5)
    np.testing.assert_allclose(AffineMap(4.0, 1.0)(4 * x + 1), x, atol=1e-6)
    # negative control: the wrong gamma does not give x back
    assert np.abs(GammaInverse(2.0)(shown) - x).max() > 0.1


@pytest.mark.parametrize("made", [AffineMap(2.0, 1.0), AsinhInverse(0.1, 255.0), GammaInverse()])
def test_pixel_maps_survive_the_card(made):
    assert pixel_map_from_dict(made.to_dict()) == made


def test_bad_pixel_maps_are_refused():
    with pytest.raises(ValueError, match="LogMap"):
        pixel_map_from_dict({"kind": "LogMap"})
    with pytest.raises(ValueError, match="AffineMap"):
        pixel_map_from_dict({"kind": "AffineMap", "factor": 2})
    with pytest.raises(ValueError, match="scale = 0"):
        AffineMap(scale=0)
    for wrong in (lambda: AsinhInverse(0.0), lambda: GammaInverse(-1.0)):
        with pytest.raises(ValueError, match="positive"):
            wrong()


def test_empty_folder_missing_path_and_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match="nothing at"):
        open_images(tmp_path / "absent.npy")
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"'\.csv'"):
        open_images(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="no paths"):
        open_images([])


def test_mixed_shapes_name_the_file(tmp_path):
    fits.writeto(tmp_path / "a.fits", FRAMES[0])
    fits.writeto(tmp_path / "b.fits", FRAMES[0][:5])
    source = open_images(tmp_path)
    with pytest.raises(ValueError, match=r"b\.fits has shape \(1, 5, 8\)"):
        source[1]


def test_nan_names_the_file(tmp_path):
    bad = FRAMES.copy()
    bad[3, 2, 2] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    source = open_images(tmp_path / "bad.npy")
    assert np.isfinite(source[2]).all()
    with pytest.raises(ValueError, match=r"bad\.npy, frame 3 holds 1 values"):
        source[3]
    fits.writeto(tmp_path / "bad.fits", bad[3])
    with pytest.raises(ValueError, match=r"bad\.fits holds 1 values"):
        open_images(tmp_path / "bad.fits")[0]


def test_wrong_arrays_are_refused(tmp_path):
    for name, array, message in [
        ("flat", np.zeros((5, 6)), r"expected \(N, H, W\)"),
        ("none", np.zeros((0, 6, 6)), "no frames"),
        ("last", np.zeros((5, 32, 32, 3)), "channels first"),
        ("text", np.full((2, 3, 3), "a"), "real numbers"),
    ]:
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=message):
            open_images(tmp_path / f"{name}.npy")
    np.savez(tmp_path / "two.npz", a=FRAMES, b=FRAMES)
    with pytest.raises(ValueError, match="key="):
        open_images(tmp_path / "two.npz")
    with pytest.raises(ValueError, match="no array 'c'"):
        open_images(tmp_path / "two.npz", key="c")
    assert len(open_images(tmp_path / "two.npz", key="b")) == 5


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.h5", "a.fits", "a.png", "a.tif"])
def test_truncated_files_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"not much of a file")
    with pytest.raises(ValueError, match=name):
        open_images(tmp_path / name)
