"""The options of the commands, each told once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, final

import typer

__all__ = ["BATCH", "DRAWS", "PRIOR", "Inference", "hdu_of", "plain"]

PRIOR = "galaxies-64"
DRAWS = 16
SMALL_PRIOR = "galaxies-32"
SIMULATIONS = 300
CALIBRATION_DRAWS = 64
CALIBRATION_BATCH = 64
TRUTH_STEPS = 256
RECOMMENDED = "recommended"
CHAINS = 4
CHAIN_DRAWS = 200
RESTARTS = 6
BATCH = 4  # draws at once: more are not faster on a CPU, and a batch is what an interruption loses


@final
@dataclass(frozen=True)
class Inference:
    """What both commands are told about the draws and their folder, by the names of the options."""

    prior: str
    samples: int
    seed: int
    steps: int | None
    batch_size: int
    resume: bool
    overwrite: bool


def hdu_of(text: str | None) -> int | str | None:
    """The HDU by its number or its name."""
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def plain(value: Any) -> Any:
    """An option as a JSON value."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _option(*names: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


# Every command -----------------------------------------------------------------------------------

Out = Annotated[Path | None, _option("--out", "-o", help="Folder of the results.")]
Prior = Annotated[str, _option(help="Name of a shipped prior, or a folder.", panel="Inference")]
Draws = Annotated[
    int, _option("--samples", "-n", min=1, help="Posterior draws.", panel="Inference")
]
Seed = Annotated[
    int, _option(min=0, help="Seed: the same seed gives the same draws.", panel="Inference")
]
Steps = Annotated[
    int | None,
    _option(min=2, help="Noise levels of the sampler; default: the library's.", panel="Inference"),
]
Batch = Annotated[
    int,
    _option(
        "--batch-size",
        min=1,
        help="Draws computed together; changes no draw.",
        panel="Inference",
    ),
]
Resume = Annotated[bool, _option("--resume", help="Go on with an interrupted run in --out.")]
Overwrite = Annotated[
    bool, _option("--overwrite", help="Replace results in --out, once the new ones are complete.")
]

# deconvolve: image and target -------------------------------------------------------------------

Image = Annotated[Path, typer.Argument(help="FITS image, linear in flux.", show_default=False)]
RequiredOut = Annotated[
    Path, _option("--out", "-o", help="Folder of the results.", show_default=False)
]
Cutout = Annotated[
    str | None,
    _option(
        metavar="X,Y,SIZE",
        help="Centre (pixels from 0; DS9 counts from 1) and width in pixels.",
        panel="Target",
    ),
]
Center = Annotated[
    tuple[str, str] | None,
    _option(metavar="RA DEC", help="Centre in degrees, or 00:14:20.0 -30:23:16.", panel="Target"),
]
Size = Annotated[int | None, _option(help="Width of the cutout in pixels.", panel="Target")]
Oversample = Annotated[
    int, _option(min=1, help="Model pixels per image pixel, along a side.", panel="Target")
]
Hdu = Annotated[str | None, _option(help="HDU of the image, number or name.", panel="Target")]
Plane = Annotated[int | None, _option(help="Image of a cube, from 0.", panel="Target")]
Background = Annotated[
    str, _option(help="What to subtract as sky: smooth, constant or none.", panel="Target")
]
KeepNeighbours = Annotated[
    bool,
    _option("--keep-neighbours", help="Model the neighbours, do not mask them.", panel="Target"),
]
Scale = Annotated[
    float | None,
    _option(
        help="Flux per model pixel that the prior calls 1; default: inferred by the rule in the prior's "
        "card (flux_scale), or the prior's own units where it states none.",
        panel="Target",
    ),
]

# deconvolve: PSF --------------------------------------------------------------------------------

PsfImage = Annotated[
    Path, _option(help="FITS image of a star or a PSF.", show_default=False, panel="PSF")
]
PsfPlane = Annotated[int | None, _option(help="Image of a PSF cube, from 0.", panel="PSF")]
PsfOversample = Annotated[
    float | None,
    _option(help="PSF pixels per image pixel; default: from the headers.", panel="PSF"),
]
PsfBackground = Annotated[
    float | None,
    _option(
        help="Sky in the PSF image; default: median of its border if significant.", panel="PSF"
    ),
]
KeepPsfCenter = Annotated[
    bool,
    _option("--keep-psf-center", help="Do not move the PSF's centroid to its centre.", panel="PSF"),
]
PsfError = Annotated[
    float,
    _option(
        help="Error of the PSF as a fraction of the local flux, added to the noise; 0.01 to 0.03 "
        "suits a star in an undersampled image.",
        panel="PSF",
    ),
]

# deconvolve: noise ------------------------------------------------------------------------------

Noise = Annotated[
    Path | None,
    _option(help="FITS map of the standard deviation; inf and NaN mask pixels.", panel="Noise"),
]
Weight = Annotated[
    Path | None,
    _option(
        help="FITS map of the inverse variance; zeros, inf and NaN mask pixels.", panel="Noise"
    ),
]
NoiseStd = Annotated[
    float | None,
    _option(
        help="Standard deviation of every pixel. Neither: from the header or the sky.",
        panel="Noise",
    ),
]
NoiseModel = Annotated[
    Path | None,
    _option(
        help="Folder of a model of `diffpost train-noise`, instead of Gaussian noise: no pixel may be masked.",
        panel="Noise",
    ),
]
SkyStd = Annotated[
    float | None,
    _option(
        help="Standard deviation of the blank sky to which --noise-model is scaled; default: the model's own, or the "
        "image's for a model trained with --per-field.",
        panel="Noise",
    ),
]
Moves = Annotated[
    int | None,
    _option(
        min=0,
        help="With --noise-model: moves of the chains that end a draw, four evaluations each; 0: none; default: 64.",
        panel="Inference",
    ),
]
Exptime = Annotated[
    float | None,
    _option(
        help="Exposure time (s) for the Poisson noise of images in electrons/s.", panel="Noise"
    ),
]

# calibrate --------------------------------------------------------------------------------------

Operators = Annotated[
    list[str] | None,
    _option(
        "--operator",
        metavar="WORDS",
        help="What the instrument does, in order: identity, psf:SIGMA (Gaussian, pixels), bin:K (sums), and "
        "last mask:SHARE (of the data, lost at random), with commas between, or repeated.",
        panel="Instrument",
    ),
]
CalibrationPsf = Annotated[
    Path | None,
    _option(
        "--psf",
        help="FITS image of a star or a PSF at the prior's sampling, before --operator.",
        panel="Instrument",
    ),
]
ModelNoise = Annotated[
    float,
    _option(
        "--noise-std",
        help="Standard deviation of the noise of a datum, in units of the prior's scale: what its card calls "
        "1 (for the shipped ones, about a galaxy's peak).",
        show_default=False,
        panel="Instrument",
    ),
]
ModelSize = Annotated[
    int | None,
    _option(min=1, help="Width of the images; default: the prior's own.", panel="Simulations"),
]
Simulations = Annotated[int, _option(help="Truths, each with its own data.", panel="Simulations")]
Truths = Annotated[
    Path | None,
    _option(
        help="Folder or array file (.npy, .npz, HDF5, zarr) of true images of the prior's size, in its "
        "physical units; default: drawn from the prior.",
        show_default=False,
        panel="Simulations",
    ),
]
TruthSteps = Annotated[
    int,
    _option(min=2, help="Noise levels of the integrator that draws truths.", panel="Simulations"),
]
Method = Annotated[
    str,
    _option(
        help="recommended (as deconvolve does), moment-matching (with the network's derivative), pigdm, dps "
        "or convolved.",
        panel="Inference",
    ),
]
Controls = Annotated[
    bool,
    _option(
        "--controls",
        help="Also judge draws that are wrong on purpose: what would have been found?",
        panel="Verdict",
    ),
]
Level = Annotated[
    float,
    _option(help="Chance that exact draws are rejected, by all tests together.", panel="Verdict"),
]
Device = Annotated[str, _option(help="cpu or cuda.", panel="Inference")]

# lens -------------------------------------------------------------------------------------------

LensModelFile = Annotated[
    Path,
    _option(
        "--model",
        help="YAML file of the lens: mass, light, priors, mask and source grid.",
        show_default=False,
        panel="Lens",
    ),
]
LensMask = Annotated[
    Path | None,
    _option(
        "--mask",
        help="FITS map of the image's or the cutout's shape; nonzero pixels are not used.",
        panel="Lens",
    ),
]
Chains = Annotated[int, _option(min=2, help="Chains of the lens parameters.", panel="Lens")]
ChainDraws = Annotated[
    int, _option("--draws", min=4, help="Draws of each chain, after its warm-up.", panel="Lens")
]
Warmup = Annotated[
    int | None,
    _option(
        min=1, help="Moves of the warm-up; default: half of --draws, 20 or more.", panel="Lens"
    ),
]
Restarts = Annotated[int, _option(min=1, help="Restarts of the search for modes.", panel="Lens")]
Turns = Annotated[
    int,
    _option(
        min=0,
        help="Turns of source and lens after that, for parameters under the prior itself, by as many chains as --samples.",
        panel="Lens",
    ),
]
Fixed = Annotated[
    bool,
    _option(
        "--fixed",
        help="Hold every lens parameter at the median of its prior: the source alone.",
        panel="Lens",
    ),
]

# image ------------------------------------------------------------------------------------------

Visibilities = Annotated[
    Path,
    typer.Argument(
        help="UVFITS file, measurement set, or table of u, v, re, im, weight.", show_default=False
    ),
]
Cell = Annotated[
    float, _option(help="Side of a pixel, arcsec.", show_default=False, panel="Target")
]
ImageSize = Annotated[
    int,
    _option(
        "--size",
        help="Pixels on a side: a multiple of the prior's stride, at most twice its own.",
        show_default=False,
        panel="Target",
    ),
]
PhaseOffset = Annotated[
    str | None,
    _option(
        "--center",
        metavar="DX,DY",
        help="Middle of the image, arcsec to the east and north of the phase centre.",
        panel="Target",
    ),
]
PrimaryBeam = Annotated[
    str | None,
    _option(
        help="The antennas' beam: full width at half power, arcsec, or a FITS map; 0: none; default: the file's.",
        panel="Target",
    ),
]
ImageScale = Annotated[
    float | None,
    _option(
        "--scale",
        help="Jy per pixel that the prior calls 1; default: inferred by the rule in its card.",
        panel="Target",
    ),
]
VisFormat = Annotated[
    str | None,
    _option("--format", help="uvfits, ms, table or visilens; default: told apart.", panel="Data"),
]
VisField = Annotated[
    str | None, _option("--field", help="Target, name or number from 0.", panel="Data")
]
Spw = Annotated[
    str | None, _option("--spw", help="Spectral windows (IFs) from 0, such as 0,2.", panel="Data")
]
Stokes = Annotated[
    str,
    _option(
        help="I (both parallel hands), pseudoI (one may stand for both), RR, LL, XX or YY.",
        panel="Data",
    ),
]
UvUnit = Annotated[
    str | None, _option(help="Of a table: wavelength or m (with --frequency).", panel="Data")
]
Frequency = Annotated[float | None, _option(help="Hz, of a table without it.", panel="Data")]
Conjugate = Annotated[
    bool,
    _option(
        "--conjugate",
        help="The file has the other sign than its format: the image is upside down and mirrored.",
        panel="Data",
    ),
]
Average = Annotated[
    str | None,
    _option(
        metavar="SECONDS[,CHANNELS]",
        help="Average over so long and so many channels; the smearing is bounded and told.",
        panel="Data",
    ),
]
Recalibrate = Annotated[
    str | None,
    _option(
        help="Weights by the scatter of neighbouring times: common (one factor) or baseline (one each).",
        panel="Noise",
    ),
]
Systematic = Annotated[
    float,
    _option(
        help="Error of calibration as a share of each amplitude, added to the noise; 0.01 to 0.03 suits self-calibrated VLBI.",
        panel="Noise",
    ),
]
