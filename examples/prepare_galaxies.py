"""Prepare real galaxies for training: undo the display stretch, clean, quieten the sky, normalise.

    python examples/prepare_galaxies.py --out FOLDER [--data REGISTRY_FOLDER] [--sheets FOLDER]

The files come from --data, else through `diffpost.io.datasets.fetch` (DIFFPOST_DATA, the cache).
Three samples of real galaxies become float16 arrays (N, H, W) whose unit is the galaxy's own peak.

Stretch.  EFIGI: STIFF-like gamma; assumed I = (v/255)^2.2 in each channel (STIFF's default; the black
and white levels and the colour gamma that EFIGI used are not recorded).  Galaxy Zoo 2: Lupton et al.
(2004) asinh, v/255 = asinh(Q I)/Q of the channels' mean; assumed I = sinh(Q f)/Q.  Q is not recorded
either, but the frames are cut at 8.48 Petrosian r90 of the galaxy, so that r90 must measure 50 pixels:
median r90 of 200 galaxies is 70.6, 62.7, 53.9, 43.1, 32.4 px for Q = 0, 4, 6, 8, 10, hence Q = 6.75.
CEERS is linear.  So undone, the median concentration 5 log10(r80/r20) is 3.0 (EFIGI), 3.2 (Galaxy Zoo
2) and 3.6 (CEERS).  Gray is the mean of the linearised channels.  Display stretches clip: cores at 255 and
sky below 0 are lost, and 8 bits and JPEG limit what the faint end holds.

Cleaning.  A frame is dropped for the first of these that holds (thresholds are constants below):
    missing     zero-filled pixels, or a constant block a tenth of the width wide
    crack       dark line a pixel wide across the galaxy (field edges; Galaxy Zoo 2 only, where the
                PSF is sampled well enough to tell one from a dust lane)
    bad sky     glowing sky in any channel (Galaxy Zoo 2 only, whose sky is black by design)
    saturated   connected block at the display's white level
    not found   no detection within the central part of the frame
    faint       peak below a number of sky sigmas
    off-centre  a compact source away from the centre, brighter than 0.6 of the galaxy's peak
    trail       straight ridge of half the width or more that reaches the border and misses the
                galaxy's centre, or is seen in one colour only
Small neighbours stay.

Sky.  Level: 25th percentile of the medians of 24 border segments (galaxies that reach the border in
places do not bias it).  Noise: adaptive local Wiener filter, see `quieten`.

Unit.  Each frame is divided by the maximum, in its central third, of itself smoothed by a Gaussian of
sigma = 2% of its width: smoothed peak = 1.

Split.  One galaxy in ten is held out, by a hash of its identifier: frames of a galaxy stay together.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from diffpost.io.datasets import fetch

Array = NDArray[np.float32]

EFIGI_GAMMA = 2.2
GZ2_Q = 6.75
GZ2_CROP, GZ2_SIZE = 256, 192
CEERS_BANDS = ("f150w", "f200w", "f277w")

PEAK_SIGMA = 0.02  # of the frame's width: smoothing that defines the peak
MISSING_SHARE = 0.001  # of the frame zero-filled
MISSING_BLOCK = 0.1  # of the width: side of a constant block
SATURATED_SHARE = 0.0015  # of the frame in one block at the white level
WHITE = 250  # 8-bit level that counts as white, in all channels
MIN_SNR = 35.0  # smoothed peak over the rms of the sky pixels
CENTRE = 0.15  # the galaxy is sought within this share of the width about the centre
RIVAL = 0.6  # an off-centre compact source may have this share of the galaxy's peak
RIVAL_RADIUS = 0.12  # of the width: closer sources count as part of the galaxy
TRAIL_LENGTH, TRAIL_WIDTH, TRAIL_SIGMA = 0.5, 0.1, 4.0  # of the width; ratio of the axes; over sky
STARLET_SCALES, WIENER_SIZE, WIENER_NOISE, GRAIN = 4, 5, 2.0, 0.25  # see `quieten`
CRACK_DEPTH, CRACK_LENGTH = 12, 0.1  # 8-bit levels; of the width
BAD_SKY = 20  # 8-bit sky level of Galaxy Zoo 2 frames, whose sky is black by design
HELDOUT = 10  # one galaxy in ten
SHEET = 120  # frames on a contact sheet


@dataclass(frozen=True)
class Frame:
    """One linear frame: (H, W) gray, (H, W, C) linear channels and the 8-bit original, if any.

    slope: (dI/dv)^2 of the display stretch over its value in the sky, (H, W), smoothed over 1.5 px:
        how the variance of noise that is uniform on the display grows with brightness.
    """

    survey: str
    galaxy: str
    name: str
    gray: Array
    channels: Array
    raw: NDArray[np.uint8] | None = None
    slope: Array | None = None


def efigi(path: Path) -> Iterator[Frame]:
    for name, raw in _jpegs(path):
        linear = (raw.astype(np.float32) / 255) ** EFIGI_GAMMA
        gray = linear.mean(-1)
        level = max(sky(gray)[0], 1e-4)
        slope = np.maximum(ndimage.gaussian_filter(gray, 1.5) / level, 1)
        slope **= 2 - 2 / EFIGI_GAMMA
        yield Frame("efigi", name, name, gray, linear, raw, slope)


def gz2(path: Path) -> Iterator[Frame]:
    for name, raw in _jpegs(path):
        edge = (raw.shape[0] - GZ2_CROP) // 2
        raw = raw[edge : edge + GZ2_CROP, edge : edge + GZ2_CROP]
        shown = raw.astype(np.float32) / 255
        mean = shown.mean(-1)
        gray = np.sinh(GZ2_Q * mean) / GZ2_Q
        channels = shown * (gray / np.maximum(mean, 1 / 765))[..., None]
        gray, channels = area_average(gray), area_average(channels)
        slope = 1 + (GZ2_Q * ndimage.gaussian_filter(gray, 1.5)) ** 2
        yield Frame("gz2", name, name, gray, channels, raw, slope)


def ceers(path: Path) -> Iterator[Frame]:
    with np.load(path, allow_pickle=False) as file:
        flux, ids, bands = file["flux"], file["id"], [str(b) for b in file["bands"]]
    for stamp, number in zip(flux, ids, strict=True):
        for band in CEERS_BANDS:
            gray = np.ascontiguousarray(stamp[bands.index(band)], dtype=np.float32)
            yield Frame("ceers", str(number), f"{number}_{band}", gray, gray[..., None])


def _jpegs(path: Path) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    with tarfile.open(path) as tar:
        members = sorted((m for m in tar if m.name.endswith(".jpg")), key=lambda m: m.name)
        for member in members:
            stream = tar.extractfile(member)
            if stream is not None:
                image = Image.open(io.BytesIO(stream.read())).convert("RGB")
                yield Path(member.name).stem, np.asarray(image)


def area_average(image: Array) -> Array:
    """(256, 256, …) to (192, 192, …): exact area average, 4 input pixels to 3 output pixels."""
    weights = np.zeros((GZ2_SIZE, GZ2_CROP), dtype=np.float32)
    ratio = GZ2_CROP / GZ2_SIZE
    for i in range(GZ2_SIZE):
        for j in range(int(i * ratio), min(int(np.ceil((i + 1) * ratio)), GZ2_CROP)):
            weights[i, j] = (min(j + 1, (i + 1) * ratio) - max(j, i * ratio)) / ratio
    rows = np.tensordot(weights, image, axes=(1, 0))
    return np.moveaxis(np.tensordot(weights, np.moveaxis(rows, 1, 0), axes=(1, 0)), 0, 1)


def sky(image: Array) -> tuple[float, float]:
    """Level and rms of the sky from 24 segments of the border, each 6% of the width deep.

    The rms is the 25th percentile of the segments' robust scatters, as stars only raise it.
    """
    n = image.shape[0]
    deep = max(4, round(0.06 * n))
    sides = (image[:deep], image[-deep:], image[:, :deep].T, image[:, -deep:].T)
    parts = [p.ravel() for side in sides for p in np.array_split(side, 6, axis=1)]
    level = float(np.percentile([np.median(p) for p in parts], 25))
    scatter = [1.4826 * np.median(np.abs(p - np.median(p))) for p in parts]
    return level, float(np.percentile(scatter, 25))


def sky_scatter(image: Array) -> float:
    """Rms of the sky from the border segments: see `sky`."""
    return sky(image)[1]


def quieten(image: Array, slope: Array | None) -> Array:
    """Adaptive local Wiener filter of a sky-subtracted image, scale by scale.

    The noise of resampled JPEGs is correlated, so a single 5 x 5 window averages little of it away.
    The image is split into starlet scales j = 0 … 3 and a smooth rest (Starck & Murtagh 2002, B3
    spline, a trous); each scale w is multiplied by max(0, 1 - k s^2 / v), with v the mean of w^2 over
    5 2^j pixels (the local Wiener gain of Lee 1980, as in scipy.signal.wiener), s^2 the variance of
    that scale in the border's sky and k = 2, since v scatters about s^2 where there is only sky.
    On the galaxy s^2 is multiplied by 1 + (slope - 1)/4: the grain of display-stretched frames grows
    with brightness, though less than noise uniform on the display would (median over 180 EFIGI frames:
    8% of the flux at 0.1 of the peak, 5% at 0.3).  Structure well above the noise has v >> s^2 and is
    left as it is.
    """
    growth = 1.0 if slope is None else 1 + GRAIN * (slope - 1)
    rest, clean = image.astype(np.float64), np.zeros(image.shape)
    for scale in range(STARLET_SCALES):
        kernel = np.zeros(4 * 2**scale + 1)
        kernel[:: 2**scale] = (1 / 16, 1 / 4, 3 / 8, 1 / 4, 1 / 16)
        smooth = ndimage.convolve1d(rest, kernel, axis=0, mode="reflect")
        smooth = ndimage.convolve1d(smooth, kernel, axis=1, mode="reflect")
        detail = rest - smooth
        power = ndimage.uniform_filter(detail**2, WIENER_SIZE * 2**scale, mode="reflect")
        noise = WIENER_NOISE * growth * sky_scatter(detail.astype(np.float32)) ** 2
        clean += detail * np.maximum(0, 1 - noise / np.maximum(power, 1e-30))
        rest = smooth
    return (clean + rest).astype(np.float32)


def smoothed_peak(image: Array) -> float:
    """Maximum, in the central third, of the image smoothed by sigma = 2% of its width."""
    n = image.shape[0]
    smooth = ndimage.gaussian_filter(image, PEAK_SIGMA * n)
    return float(smooth[n // 3 : n - n // 3, n // 3 : n - n // 3].max())


def verdict(frame: Frame, gray: Array, sigma: float) -> str:
    """'kept', or the reason for which the frame is dropped; `gray` is sky-subtracted."""
    n = gray.shape[0]
    if _missing(frame):
        return "missing"
    if frame.raw is not None and _largest(frame.raw.min(-1) >= WHITE) > SATURATED_SHARE * (
        frame.raw.shape[0] ** 2
    ):
        return "saturated"
    if frame.survey == "gz2" and frame.raw is not None:
        if _crack(frame.raw):
            return "crack"
        if _glows(frame.raw):
            return "bad sky"
    smooth = ndimage.gaussian_filter(gray, PEAK_SIGMA * n)
    fine = ndimage.gaussian_filter(gray, 1.0)
    labels, _ = ndimage.label(fine > 3 * sigma)
    half = round(CENTRE * n)
    middle = (slice(n // 2 - half, n // 2 + half),) * 2
    if not labels[middle].any():
        return "not found"
    row, column = np.unravel_index(np.argmax(smooth[middle]), smooth[middle].shape)
    centre = (row + n // 2 - half, column + n // 2 - half)
    peak = float(smooth[centre])
    if not labels[centre]:
        return "not found"
    if peak < MIN_SNR * sigma:
        return "faint"
    if _rival(smooth, centre, n) > RIVAL * peak:
        return "off-centre"
    if _trail(frame, gray, sigma, centre):
        return "trail"
    return "kept"


def _largest(mask: NDArray[np.bool_]) -> int:
    """Pixels of the largest connected block."""
    labels, count = ndimage.label(mask)
    return int(np.bincount(labels.ravel())[1:].max()) if count else 0


def _missing(frame: Frame) -> bool:
    if frame.raw is None:
        return bool((frame.gray == 0).mean() > MISSING_SHARE or not np.isfinite(frame.gray).all())
    size = (round(MISSING_BLOCK * frame.raw.shape[0]) | 1,) * 2 + (1,)
    same = ndimage.maximum_filter(frame.raw, size) == ndimage.minimum_filter(frame.raw, size)
    return bool((same.all(-1) & (frame.raw.max(-1) < WHITE)).any())


def _crack(raw: NDArray[np.uint8]) -> bool:
    """A connected dark line that a 3 x 3 closing fills."""
    shown = raw.astype(np.float32).mean(-1)
    dark = ndimage.grey_closing(shown, (3, 3)) - shown > CRACK_DEPTH
    labels, _ = ndimage.label(dark, np.ones((3, 3)))
    boxes = ndimage.find_objects(labels)
    sizes = [np.hypot(*(s.stop - s.start for s in box)) for box in boxes if box is not None]
    return max(sizes, default=0.0) > CRACK_LENGTH * raw.shape[0]


def _glows(raw: NDArray[np.uint8]) -> bool:
    return any(sky(raw[..., k].astype(np.float32))[0] > BAD_SKY for k in range(raw.shape[-1]))


def _rival(smooth: Array, centre: tuple[int, int], n: int) -> float:
    """Height above its surroundings of the brightest compact source away from the centre."""
    ring = ndimage.median_filter(smooth[::2, ::2], size=max(5, round(0.08 * n)) | 1)
    excess = smooth - np.kron(ring, np.ones((2, 2), np.float32))[:n, :n]
    y, x = np.ogrid[:n, :n]
    away = np.hypot(y - centre[0], x - centre[1]) > RIVAL_RADIUS * n
    top = (smooth == ndimage.maximum_filter(smooth, 5)) & away
    border = excess * away  # a bright source cut by the border has no maximum inside
    border[2:-2, 2:-2] = 0
    return max(float(excess[top].max()) if top.any() else 0.0, float(border.max()))


def _trail(frame: Frame, gray: Array, sigma: float, centre: tuple[int, int]) -> bool:
    """An elongated ridge that misses the galaxy's centre, or one in the colours of one channel only."""
    n = gray.shape[0]
    step = 2 if n > 128 else 1
    small = gray[: n // step * step, : n // step * step]
    small = small.reshape(n // step, step, n // step, step).mean((1, 3))
    ridge = small - ndimage.median_filter(small, round(0.12 * n / step) | 1)
    ridge = ndimage.gaussian_filter(ridge, 0.7) > TRAIL_SIGMA * sigma / step
    y, x = np.ogrid[: ridge.shape[0], : ridge.shape[1]]
    labels, _ = ndimage.label(ridge, np.ones((3, 3)))
    near = np.hypot(y - centre[0] / step, x - centre[1] / step) < 0.5 * RIVAL_RADIUS * n / step
    labels[np.isin(labels, labels[near])] = 0
    if _elongated(labels):
        return True
    if frame.raw is None:
        return False
    for k in range(frame.channels.shape[-1]):
        channel = frame.channels[..., k]
        level, rms = sky(channel)
        others = np.delete(frame.channels, k, axis=-1).max(-1)
        base, other = sky(others)
        single = (channel - level > 8 * rms) & (others - base < 3 * other)
        if _elongated(ndimage.label(single, np.ones((3, 3)))[0]):
            return True
    return False


def _elongated(labels: NDArray[np.int32]) -> bool:
    n = labels.shape[0]
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        height, width = (s.stop - s.start for s in box)
        if np.hypot(height, width) < TRAIL_LENGTH * n:
            continue
        y, x = np.nonzero(labels[box] == number)
        values = np.linalg.eigvalsh(np.cov(np.stack([y, x])))
        edges = (box[0].start == 0, box[0].stop == n, box[1].start == 0, box[1].stop == n)
        if sum(edges) >= 1 and np.sqrt(max(values[0], 0) / values[1]) < TRAIL_WIDTH:
            return True
    return False


def held_out(survey: str, galaxy: str) -> bool:
    digest = hashlib.sha256(f"{survey}:{galaxy}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELDOUT == 0


def prepare(frames: Iterator[Frame], out: Path, sheets: Path | None) -> dict[str, object]:
    """Clean, filter, normalise, split and write one survey; returns its part of the summary."""
    kept: dict[bool, list[tuple[str, NDArray[np.float16]]]] = {True: [], False: []}
    counts: Counter[str] = Counter()
    examples: dict[str, list[Array]] = defaultdict(list)
    chosen = np.random.default_rng(1)
    noise: list[tuple[float, float]] = []
    survey = ""
    for frame in frames:
        survey = frame.survey
        level, sigma = sky(frame.gray)
        gray = frame.gray - level
        reason = verdict(frame, gray, sigma)
        counts[reason] += 1
        show = gray / max(smoothed_peak(gray), 1e-6)
        if reason == "kept":
            clean = quieten(gray, frame.slope)
            peak = smoothed_peak(clean)
            clean /= peak
            noise.append((sigma / peak, sky(clean)[1]))
            pair = (frame.name, clean.astype(np.float16))
            kept[held_out(survey, frame.galaxy)].append(pair)
            show = np.hstack([show, clean])
        if sheets is not None:
            _keep_some(examples[reason], show, counts[reason], chosen)
    total = sum(counts.values())
    part: dict[str, object] = {"frames": total, "kept_share": round(counts["kept"] / total, 4)}
    part["counts"] = dict(sorted(counts.items()))
    before, after = np.percentile(np.array(noise), [16, 50, 84], axis=0).T
    part["sky_rms_before_p16_p50_p84"] = [float(f"{v:.3g}") for v in before]
    part["sky_rms_after_p16_p50_p84"] = [float(f"{v:.3g}") for v in after]
    for held, name in ((False, "train"), (True, "heldout")):
        names, images = zip(*kept[held], strict=True)
        order = np.random.default_rng(0).permutation(len(names))  # neighbours in the file differ
        new = out / f".{survey}_{name}.npy"
        np.save(new, np.stack(images)[order])
        new.replace(out / f"{survey}_{name}.npy")  # a training run may have the old file mapped
        lines = "\n".join(names[i] for i in order)
        (out / f"{survey}_{name}_ids.txt").write_text(lines + "\n")
        part[name] = len(names)
    if sheets is not None:
        sheets.mkdir(parents=True, exist_ok=True)
        for reason, shown in examples.items():
            contact_sheet(shown, sheets / f"{survey}_{reason.replace(' ', '_')}.png")
    return part


def _keep_some(some: list[Array], image: Array, seen: int, chosen: np.random.Generator) -> None:
    """Reservoir sampling: each of the images seen so far is among the SHEET with equal chance."""
    if len(some) < SHEET:
        some.append(image)
    elif (place := int(chosen.integers(seen))) < SHEET:
        some[place] = image


def contact_sheet(images: list[Array], path: Path, columns: int = 15) -> None:
    """Frames with an asinh stretch whose softening is 0.005 of the peak; kept ones before and after."""
    wide = images[0].shape[1] // images[0].shape[0]
    columns //= wide
    rows = -(-len(images) // columns)
    sheet = Image.new("L", (columns * wide * 96, rows * 96))
    for place, image in enumerate(images):
        shown = np.arcsinh(image / 0.005) / np.arcsinh(1 / 0.005)
        tile = Image.fromarray(np.uint8(255 * np.clip(shown * 0.9 + 0.1, 0, 1)))
        tile = tile.resize((96 * wide - 2, 94))
        sheet.paste(tile, (place % columns * 96 * wide, place // columns * 96))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="folder that holds galaxies_efigi/ …")
    parser.add_argument("--out", type=Path, required=True, help="folder for the arrays")
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets of kept and dropped")
    parser.add_argument("--only", choices=("efigi", "gz2", "ceers"), help="one survey")
    options = parser.parse_args()
    if options.data is not None:
        os.environ["DIFFPOST_DATA"] = str(options.data)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    for survey, read in {"efigi": efigi, "gz2": gz2, "ceers": ceers}.items():
        if options.only in (None, survey):
            summary[survey] = prepare(read(fetch(survey)), options.out, options.sheets)
            print(survey, json.dumps(summary[survey]))
    summary["rules"] = {
        name.lower(): value
        for name, value in globals().items()
        if name.isupper() and isinstance(value, (int, float, tuple))
    }
    summary["assumptions"] = __doc__
    path.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
