r"""Image collections for training, read one frame at a time.

A prior is trained on more images than memory should hold, in whatever form a survey delivers them:
a folder of FITS, PNG, JPEG or TIFF files, an array on disk (`.npy`, `.npz`), HDF5 or zarr.
`open_images` gives each the same face: `len(source)` frames, `source[i]` a float32 array (C, H, W),
read when asked for, by random access.  `.npy` is mapped into memory, HDF5 and zarr are read lazily;
members of an `.npz` stored without compression are mapped too, compressed ones are unpacked once.

File values are rarely the units to train in.  A pixel map takes them there and travels in the
prior's card, so that a user knows what a unit of the prior means:

    AffineMap(scale, offset)                x = (v - offset) / scale
    AsinhInverse(softening, white, offset)  v = white asinh(x / softening) / asinh(1 / softening)
                                                + offset
    GammaInverse(gamma, white, offset)      v = white x^(1/gamma) + offset   (negative x mirrored)

The two inverses undo display stretches (Lupton et al. 2004, PASP 116, 133; Bertin's STIFF) as well
as 8 bits allow: what the display clipped is lost.
"""

from __future__ import annotations

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "AffineMap",
    "AsinhInverse",
    "GammaInverse",
    "ImageSource",
    "PixelMap",
    "open_images",
    "pixel_map_from_dict",
]

Image = NDArray[np.float32]

_FITS = frozenset({".fits", ".fit", ".fts", ".fits.gz", ".fit.gz", ".fits.fz"})
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff"})
_HDF5 = frozenset({".h5", ".hdf5", ".hdf"})


class PixelMap(ABC):
    """Map from file values to the units in which a network is trained, elementwise."""

    @abstractmethod
    def __call__(self, values: Image) -> Image:
        """Values of any shape in network units, float32."""

    def to_dict(self) -> dict[str, Any]:
        """The map as plain JSON values, for the prior's card; see `pixel_map_from_dict`."""
        return {"kind": type(self).__name__} | asdict(self)  # type: ignore[call-overload]


@final
@dataclass(frozen=True)
class AffineMap(PixelMap):
    """x = (v - offset) / scale.

    Raises
    ------
    ValueError: when the scale is zero or either number is not finite.
    """

    scale: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        if self.scale == 0 or not math.isfinite(self.scale) or not math.isfinite(self.offset):
            raise ValueError(
                f"got scale = {self.scale}, offset = {self.offset}; expected finite numbers and a "
                "scale other than zero"
            )

    def __call__(self, values: Image) -> Image:
        return ((values - np.float32(self.offset)) / np.float32(self.scale)).astype(np.float32)


@final
@dataclass(frozen=True)
class AsinhInverse(PixelMap):
    """Undo v = white asinh(x / softening) / asinh(1 / softening) + offset.

    x = 1 is shown as `white` + `offset`; the display is linear below x = softening.  Lupton's
    asinh(Q x) / Q is the case softening = 1 / Q, white = asinh(Q) / Q up to the unit of x.

    Raises
    ------
    ValueError: when softening or white is not a positive finite number.
    """

    softening: float
    white: float = 1.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        _positive(softening=self.softening, white=self.white)

    def __call__(self, values: Image) -> Image:
        shown = (values.astype(np.float64) - self.offset) / self.white
        return (self.softening * np.sinh(shown * math.asinh(1 / self.softening))).astype(np.float32)


@final
@dataclass(frozen=True)
class GammaInverse(PixelMap):
    """Undo v = white x^(1/gamma) + offset; values below the offset are mirrored, not clipped.

    Raises
    ------
    ValueError: when gamma or white is not a positive finite number.
    """

    gamma: float = 2.2
    white: float = 255.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        _positive(gamma=self.gamma, white=self.white)

    def __call__(self, values: Image) -> Image:
        shown = (values.astype(np.float64) - self.offset) / self.white
        return (np.sign(shown) * np.abs(shown) ** self.gamma).astype(np.float32)


def _positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"got {name} = {value}; expected a positive finite number")


def pixel_map_from_dict(values: dict[str, Any]) -> PixelMap:
    """The map that `to_dict` wrote.

    Raises
    ------
    ValueError: for an unknown kind, or parameters that the kind does not have.
    """
    kinds: dict[str, type[PixelMap]] = {
        "AffineMap": AffineMap,
        "AsinhInverse": AsinhInverse,
        "GammaInverse": GammaInverse,
    }
    rest = dict(values)
    kind = rest.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"got a pixel map of kind {kind!r}; expected one of {sorted(kinds)}")
    try:
        return kinds[kind](**rest)
    except TypeError as error:
        raise ValueError(f"cannot make {kind} from {rest}: {error}") from error


class ImageSource(ABC, Sequence[Image]):
    """Frames by number.  Subclasses read one frame; this class maps and checks it.

    pixel_map: the map applied to each frame, None for file values as they are.
    shape: (C, H, W) of every frame.
    """

    pixel_map: PixelMap | None
    shape: tuple[int, int, int]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Where frame `index` comes from, for messages."""

    @abstractmethod
    def _read(self, index: int) -> NDArray[Any]:
        """Frame `index` as (C, H, W) in file values."""

    def __getitem__(self, index: int) -> Image:  # type: ignore[override]
        """Frame `index` as float32 (C, H, W).

        Raises
        ------
        IndexError: beyond the ends.
        ValueError: when the frame holds a value that is not finite, or has another shape than the
            first; the message names the file.
        """
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"got frame {index} of {count}")
        index %= count
        frame = np.asarray(self._read(index), dtype=np.float32)
        if frame.shape != self.shape:
            raise ValueError(
                f"{self.name(index)} has shape {frame.shape}, but the first frame has "
                f"{self.shape}; bring all frames to one shape, or open the groups apart"
            )
        if self.pixel_map is not None:
            frame = self.pixel_map(frame)
        if not np.isfinite(frame).all():
            bad = int((~np.isfinite(frame)).sum())
            raise ValueError(
                f"{self.name(index)} holds {bad} values that are not finite; training needs "
                "complete frames: drop this one or fill the pixels"
            )
        return np.ascontiguousarray(frame)

    def __iter__(self) -> Iterator[Image]:
        return (self[i] for i in range(len(self)))


@final
class _Array(ImageSource):
    """Frames along the first axis of an array-like that reads what is indexed (npy, h5, zarr)."""

    def __init__(self, array: Any, label: str, pixel_map: PixelMap | None) -> None:
        self._array, self._label, self.pixel_map = array, label, pixel_map
        if array.ndim not in (3, 4):
            raise ValueError(
                f"{label} has shape {tuple(array.shape)}; expected (N, H, W) or (N, C, H, W)"
            )
        if array.shape[0] == 0:
            raise ValueError(f"{label} holds no frames: its shape is {tuple(array.shape)}")
        if not np.issubdtype(array.dtype, np.number) or np.issubdtype(
            array.dtype, np.complexfloating
        ):
            raise ValueError(f"{label} holds {array.dtype}; expected real numbers")
        tail = tuple(int(n) for n in array.shape[1:])
        if len(tail) == 3 and tail[0] > 4 and tail[2] <= 4:
            raise ValueError(
                f"{label} has shape {tuple(array.shape)}, which looks like (N, H, W, C); "
                "expected the channels first: (N, C, H, W)"
            )
        self.shape = (1, *tail) if len(tail) == 2 else tail  # type: ignore[assignment]

    def __len__(self) -> int:
        return int(self._array.shape[0])

    def name(self, index: int) -> str:
        return f"{self._label}, frame {index}"

    def _read(self, index: int) -> NDArray[Any]:
        return np.asarray(self._array[index]).reshape(self.shape)


@final
class _Folder(ImageSource):
    """One frame per file."""

    def __init__(self, files: list[Path], pixel_map: PixelMap | None) -> None:
        self._files, self.pixel_map = files, pixel_map
        self.shape = _read_file(files[0]).shape

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return str(self._files[index])

    def _read(self, index: int) -> NDArray[Any]:
        return _read_file(self._files[index])


@final
class _Joined(ImageSource):
    """Several sources one after the other."""

    def __init__(self, parts: list[ImageSource]) -> None:
        self._parts, self.pixel_map = parts, parts[0].pixel_map
        self.shape = parts[0].shape
        for part in parts[1:]:
            if part.shape != self.shape:
                raise ValueError(
                    f"{part.name(0)} has shape {part.shape}, but {parts[0].name(0)} has "
                    f"{self.shape}; open them as separate sources"
                )
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[ImageSource, int]:
        which = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[which], index - (int(self._ends[which - 1]) if which else 0)

    def name(self, index: int) -> str:
        part, inner = self._find(index)
        return part.name(inner)

    def _read(self, index: int) -> NDArray[Any]:
        part, inner = self._find(index)
        return part._read(inner)


def _suffix(path: Path) -> str:
    name = path.name.lower()
    return next((s for s in _FITS if name.endswith(s)), path.suffix.lower())


def _read_file(path: Path) -> NDArray[Any]:
    """The image in a FITS, PNG, JPEG or TIFF file as (C, H, W)."""
    try:
        values = _fits(path) if _suffix(path) in _FITS else _picture(path)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3:
        raise ValueError(f"{path} has shape {values.shape}; expected (H, W) or (C, H, W)")
    return values


def _fits(path: Path) -> NDArray[Any]:
    from astropy.io import fits

    with fits.open(path, memmap=False) as units:
        for unit in units:
            if getattr(unit, "is_image", False) and unit.header.get("NAXIS", 0) >= 2:
                return np.asarray(unit.data, dtype=np.float32)
    raise ValueError(f"{path} holds no image extension")


def _picture(path: Path) -> NDArray[Any]:
    if _suffix(path) in (".tif", ".tiff"):
        import tifffile  # reads floats and 16-bit colour, which Pillow does not

        try:
            values = tifffile.imread(path)
        except tifffile.TiffFileError as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
    else:
        from PIL import Image as pillow

        with pillow.open(path) as image:
            if image.mode in ("P", "1", "LA", "RGBA", "CMYK", "PA"):
                kind = "L" if image.mode in ("1", "LA") else "RGB"
                values = np.asarray(image.convert(kind))
            else:
                values = np.asarray(image)
    if values.ndim == 3 and values.shape[-1] <= 4 < values.shape[0]:
        values = np.moveaxis(values, -1, 0)
    return values


def open_images(
    path: str | Path | Sequence[str | Path],
    pixel_map: PixelMap | None = None,
    key: str | None = None,
) -> ImageSource:
    """Images on disk as a source of frames by number; nothing is loaded but what is asked for.

    Parameters
    ----------
    path: a folder of FITS/PNG/JPEG/TIFF files (in the order of their names), a `.npy`, `.npz`, HDF5
        or zarr array of shape (N, H, W) or (N, C, H, W), or several of these, one after the other.
    pixel_map: map from file values to network units; see the module's text.
    key: which array, where a file holds several; not needed when only one has 3 or 4 axes.

    Raises
    ------
    ValueError: for nothing at the path, an empty folder, an unknown suffix, an array of the wrong
        rank, several arrays and no key, or sources of different shapes.
    """
    if not isinstance(path, (str, Path)):
        parts = [open_images(p, pixel_map, key) for p in path]
        if not parts:
            raise ValueError("got no paths; give at least one")
        return parts[0] if len(parts) == 1 else _Joined(parts)
    path = Path(path)
    if not path.exists():
        raise ValueError(f"nothing at {path}; give a folder of images or an array file")
    suffix = _suffix(path)
    if path.is_dir() and _is_zarr(path):
        return _zarr(path, pixel_map, key)
    if path.is_dir():
        return _folder(path, pixel_map)
    if suffix == ".npy":
        return _Array(_mapped(path), str(path), pixel_map)
    if suffix == ".npz":
        return _npz(path, pixel_map, key)
    if suffix in _HDF5:
        return _hdf5(path, pixel_map, key)
    if suffix in _FITS | _PICTURES:
        return _Folder([path], pixel_map)
    raise ValueError(
        f"{path} has suffix {suffix!r}; expected a folder, .npy, .npz, .h5, .hdf5, .zarr, or "
        f"one of {', '.join(sorted(_FITS | _PICTURES))}"
    )


def _folder(path: Path, pixel_map: PixelMap | None) -> ImageSource:
    files = sorted(
        p
        for p in path.iterdir()
        if p.is_file() and not p.name.startswith(".") and _suffix(p) in _FITS | _PICTURES
    )
    if not files:
        raise ValueError(
            f"{path} holds no images; expected files ending in "
            f"{', '.join(sorted(_FITS | _PICTURES))}"
        )
    return _Folder(files, pixel_map)


def _mapped(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array: {error}") from error


def _choose(shapes: dict[str, tuple[int, ...]], key: str | None, label: str) -> str:
    """The array to read: `key`, or the only one that can hold frames."""
    if key is not None:
        if key not in shapes:
            raise ValueError(f"{label} has no array {key!r}; it holds {sorted(shapes)}")
        return key
    able = [name for name, shape in shapes.items() if len(shape) in (3, 4)]
    if len(able) != 1:
        raise ValueError(
            f"{label} holds {len(able)} arrays that could be images, of {shapes}; name one by key="
        )
    return able[0]


def _npz(path: Path, pixel_map: PixelMap | None, key: str | None) -> ImageSource:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
            shapes, starts = {}, {}
            for name, info in members.items():
                with archive.open(info) as stream:
                    version = np.lib.format.read_magic(stream)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, fortran, dtype = read(stream)
                    shapes[name], starts[name] = shape, (stream.tell(), fortran, dtype)
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as an .npz archive: {error}") from error
    name = _choose(shapes, key, str(path))
    info, (header, fortran, dtype) = members[name], starts[name]
    if info.compress_type == zipfile.ZIP_STORED and not dtype.hasobject:
        with path.open("rb") as raw:  # the local header says where the member's bytes begin
            raw.seek(info.header_offset + 26)
            lengths = np.frombuffer(raw.read(4), dtype="<u2")
        offset = info.header_offset + 30 + int(lengths.sum()) + header
        order: Any = "F" if fortran else "C"
        array: Any = np.memmap(path, dtype, "r", offset, shapes[name], order)
    else:
        with np.load(path, allow_pickle=False) as file:
            array = file[name]
    return _Array(array, f"{path}[{name}]", pixel_map)


def _hdf5(path: Path, pixel_map: PixelMap | None, key: str | None) -> ImageSource:
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as HDF5: {error}") from error
    shapes: dict[str, tuple[int, ...]] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            shapes[name] = tuple(item.shape)

    file.visititems(visit)
    name = _choose(shapes, key, str(path))
    return _Array(file[name], f"{path}[{name}]", pixel_map)


def _is_zarr(path: Path) -> bool:
    return any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup"))


def _zarr(path: Path, pixel_map: PixelMap | None, key: str | None) -> ImageSource:
    import zarr

    node = zarr.open(str(path), mode="r")
    if isinstance(node, zarr.Array):
        return _Array(node, str(path), pixel_map)
    shapes = {name: tuple(array.shape) for name, array in node.arrays()}
    name = _choose(shapes, key, str(path))
    return _Array(node[name], f"{path}[{name}]", pixel_map)
