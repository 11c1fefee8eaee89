r"""Real data by name: where it lives, its checksum, its licence, and whom to credit.

    path = fetch("hst-image")

looks, in this order, in the folder that the environment variable DIFFPOST_DATA names, in the user's
cache (DIFFPOST_CACHE, else XDG_CACHE_HOME/diffpost, else ~/.cache/diffpost), and at the public
address; a download happens once, to a temporary file that takes its place only when its SHA-256 is
right.  Every copy is checked against the same sum, so that a result names its data by name alone.

Some entries are archives that were assembled from many upstream files: they have no address, and the
error for a missing one says where its parts are.  The addresses of the others are pinned to a commit.
The registry is frozen; `fetch` also takes a `Dataset` of one's own.
"""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import final

from diffpost.data import shipped

__all__ = [
    "ChecksumMismatch",
    "Dataset",
    "DatasetUnavailable",
    "cache_folder",
    "fetch",
    "names",
    "registry",
]

_TIMEOUT = 30.0  # seconds without an answer
_BLOCK = 1 << 20


class DatasetUnavailable(OSError):
    """The data is neither here nor to be had."""


class ChecksumMismatch(ValueError):
    """A file is not the one that the registry describes."""


@final
@dataclass(frozen=True)
class Source:
    """What the files of one origin share: licence, credit line, and how to make what has no address."""

    licence: str
    credit: str
    assembly: str = ""


@final
@dataclass(frozen=True)
class Dataset:
    """One file of real data.

    path: relative to DIFFPOST_DATA and to the cache.
    sha256: of the file, in hexadecimal digits.
    size: bytes.
    address: public URL of exactly these bytes, or None where the file was assembled.
    assembly: how the file was made, where there is no address.
    """

    name: str
    path: str
    sha256: str
    size: int
    licence: str
    credit: str
    address: str | None = None
    assembly: str = ""


_HST = "based on observations made with the NASA/ESA Hubble Space Telescope"
_NONE = "no licence file upstream; the observations are public"

_SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        "efigi": Source(
            _NONE,
            "EFIGI (Baillard et al. 2011, A&A 532, A74; de Lapparent et al. 2011); images from SDSS",
            "tar of GalaxyTool/galaxies/PGC*.jpg (4,504 distinct files) of "
            "https://github.com/de-husk/automatic-galaxy-classification-tool at commit 2bd013a453",
        ),
        "gz2": Source(
            _NONE,
            "Galaxy Zoo 2 (Willett et al. 2013, MNRAS 435, 2835); images from SDSS DR7",
            "tar of data/galaxies/{train,validation}/{spirals,non_spirals}/*.jpg of "
            "https://github.com/isi-mube/Cosmic-Compendium at commit 05482aa25f",
        ),
        "ceers": Source(
            _NONE,
            "CEERS (ERS-1345; Bagley et al. 2023, ApJL 946, L12), JWST, NASA/ESA/CSA/STScI",
            "npz of the stamps sample_2/<band>/*.fits and small_sample/<band>/*.fits of "
            "https://github.com/itzliquauhtli/finding_disk_galaxies_research at commit c664a68968: "
            "flux (130, 7, 100, 100), id, sample, bands",
        ),
        "cosmos-btk": Source(
            "MIT (BlendingToolKit)",
            f"COSMOS (Leauthaud et al. 2007; Mandelbaum et al. 2012, 2014), {_HST}; BlendingToolKit",
        ),
        "cosmos-paltas": Source(
            "MIT (paltas, paltax)",
            f"COSMOS (Leauthaud et al. 2007; Mandelbaum et al. 2012, 2014), {_HST}; paltas",
        ),
        "scarlet": Source(
            "MIT (scarlet)",
            f"Hyper Suprime-Cam SSP and COSMOS F814W, {_HST}; scarlet (Melchior et al. 2018)",
        ),
        "candels": Source(
            _NONE,
            f"CANDELS (Grogin et al. 2011; Koekemoer et al. 2011), {_HST}",
            "single files of the CANDELS GOODS-S stamps in "
            "https://github.com/ryanhausen/galaxy-classification; no address of them is known",
        ),
        "psfmc": Source("MIT (psfMC)", f"SDSS J0005-0006, {_HST}; psfMC (M. Mechtley)"),
        "grizli": Source(
            "MIT (grizli-psf-library)", "grizli PSF library (G. Brammer), CEERS mosaics"
        ),
        "dolphin": Source("BSD-3-Clause (dolphin)", "dolphin (Shajib et al. 2025), empirical PSFs"),
        "tinytim": Source(
            _NONE, "Tiny Tim (Krist, Hook & Stoehr 2011), made by R. Hausen, galaxy-classification"
        ),
        "uvis": Source(
            "MIT (paltas)",
            "STScI empirical WFC3/UVIS PSFs (Anderson 2016), through paltas",
            "(56, 27, 27) PSFs at the detector's sampling, made from psf-uvis-f814w",
        ),
        "galsim": Source(
            "BSD-style, two clauses (GalSim)",
            f"GalSim (Rowe et al. 2015), COSMOS (Leauthaud 2007), {_HST}",
        ),
        "noise": Source(
            _NONE,
            f"blank sky of COWLS (JWST, NASA/ESA/CSA/STScI), COSMOS and SLACS ({_HST})",
            "64 x 64 blank patches, median subtracted, cut from the cowls-, cosmos- and slacs- data",
        ),
        "slacs": Source(
            _NONE,
            f"SLACS (Bolton et al. 2008, ApJ 682, 964), {_HST}; prepared by PyAutoLens' authors",
            "from dataset/slacs of https://github.com/jonathanfrawley/autolens_workspace_copy at "
            "commit 1d18901547; no address of the exact bytes is known",
        ),
        "cowls": Source(
            _NONE,
            "COWLS (Nightingale et al. 2025; Mahler et al. 2025), COSMOS-Web, JWST",
            "npz of the FITS files of one lens and band in data/cowls and data/other_cowls of "
            "https://github.com/gravlensingcuhk/PyAutoLens-Project at commit 422398b2f5",
        ),
        "visilens": Source(
            "MIT (visilens)", "SPT0346-52, ALMA (Hezaveh et al. 2013; Spilker et al. 2015, 2016)"
        ),
        "eht": Source(
            "ODC-PDDL",
            "Event Horizon Telescope Collaboration, 2023-D01-01 (M87 2017, ApJL 875 and 957)",
        ),
    }
)


@cache
def registry() -> Mapping[str, Dataset]:
    """Every known dataset by name, read-only."""
    found: dict[str, Dataset] = {}
    with shipped("datasets.csv").open(newline="") as table:
        for row in csv.DictReader(table):
            source = _SOURCES[row["source"]]
            found[row["name"]] = Dataset(
                name=row["name"],
                path=row["path"],
                sha256=row["sha256"],
                size=int(row["bytes"]),
                licence=source.licence,
                credit=source.credit,
                address=row["address"] or None,
                assembly="" if row["address"] else source.assembly,
            )
    return MappingProxyType(found)


def names() -> tuple[str, ...]:
    """Names that `fetch` knows."""
    return tuple(registry())


def cache_folder() -> Path:
    """Where downloads are kept: DIFFPOST_CACHE, else XDG_CACHE_HOME/diffpost, else ~/.cache/diffpost."""
    if own := os.environ.get("DIFFPOST_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "diffpost"


def fetch(dataset: str | Dataset) -> Path:
    """Path of a dataset on this machine; downloads it at most once.

    Parameters
    ----------
    dataset: a name out of `names()`, or a `Dataset`.

    Raises
    ------
    ValueError: an unknown name.
    ChecksumMismatch: the copy in DIFFPOST_DATA, or what the address delivered, has another SHA-256;
        nothing is kept of such a download.
    DatasetUnavailable: no copy here, and no address or no network.
    """
    if isinstance(dataset, str):
        if dataset not in registry():
            raise ValueError(f"got the dataset {dataset!r}; expected one of {', '.join(names())}")
        dataset = registry()[dataset]
    if local := os.environ.get("DIFFPOST_DATA"):
        path = Path(local) / dataset.path
        if path.is_file():
            _check(dataset, _sha256(path), str(path))
            return path
    path = cache_folder() / dataset.path
    if path.is_file() and _sha256(path) == dataset.sha256:
        return path
    _download(dataset, path)
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check(dataset: Dataset, found: str, where: str) -> None:
    if found != dataset.sha256:
        raise ChecksumMismatch(
            f"{where} is not the dataset {dataset.name!r}: its SHA-256 is {found}, expected "
            f"{dataset.sha256}; remove or replace it"
        )


def _download(dataset: Dataset, path: Path) -> None:
    hint = f"or put the file at $DIFFPOST_DATA/{dataset.path} and set DIFFPOST_DATA"
    if dataset.address is None:
        raise DatasetUnavailable(
            f"the dataset {dataset.name!r} is not here and has no single public address "
            f"({dataset.assembly}); assemble it, {hint}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".download-")
    part = Path(temporary)
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as out:
            try:
                with urllib.request.urlopen(dataset.address, timeout=_TIMEOUT) as stream:
                    while block := stream.read(_BLOCK):
                        digest.update(block)
                        out.write(block)
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                raise DatasetUnavailable(
                    f"cannot download the dataset {dataset.name!r} ({dataset.size} bytes) from "
                    f"{dataset.address}: {error}; check the network, {hint}"
                ) from error
            out.flush()
            os.fsync(out.fileno())
        _check(dataset, digest.hexdigest(), dataset.address)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
