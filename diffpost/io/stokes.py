"""Stokes I from the products of two feeds.

With parallel hands p and q (RR and LL, or XX and YY) I = (p + q)/2.  Of weights w_p and w_q, the inverse variances, that of I is
4/(1/w_p + 1/w_q).  Where one hand is missing the other stands for I as far as the source is not polarised in the way that
tells them apart: CASA's "pseudo I".
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["NAMES", "stokes_i"]

Array = NDArray[np.float64]

# FITS' codes of what a product is.
NAMES = {1: "I", 2: "Q", 3: "U", 4: "V", -1: "RR", -2: "LL", -3: "RL", -4: "LR", -5: "XX", -6: "YY", -7: "XY", -8: "YX"}  # fmt: skip
_HANDS = (("RR", "LL"), ("XX", "YY"))


def stokes_i(
    products: list[str],
    vis: NDArray[np.complexfloating],
    weight: Array,
    wanted: str,
    path: str,
) -> tuple[NDArray[np.complex128], Array, tuple[str, ...]]:
    """The visibility that is imaged, of every row, its weight (0 where there is none), and what is worth telling.

    Parameters
    ----------
    products: names along the last axis.
    vis, weight: (..., products); a weight of zero or below, or NaN, flags, as does a value that is NaN.
    wanted: "I", "pseudoI", or the name of a product.

    Raises
    ------
    ValueError: a product that is not there, or that is unknown.
    """
    values: NDArray[np.complex128] = np.asarray(vis, dtype=np.complex128)
    weight = np.asarray(weight, dtype=np.float64)
    there = ", ".join(products)
    if wanted in products:
        k = products.index(wanted)
        return values[..., k], weight[..., k], ()
    if wanted not in ("I", "pseudoI"):
        raise ValueError(f"{path} has no {wanted}; it holds {there}")
    if "I" in products:
        return stokes_i(products, values, weight, "I", path)
    for pair in _HANDS:
        both = [products.index(hand) for hand in pair if hand in products]
        if len(both) == 2:
            return _mean(values[..., both], weight[..., both], pair, wanted)
        if len(both) == 1 and wanted == "pseudoI":
            name = products[both[0]]
            told = f"Stokes I is taken to be {name}, the only parallel hand in the file"
            return values[..., both[0]], weight[..., both[0]], (told,)
    raise ValueError(
        f"{path} has neither Stokes I nor two parallel hands, but {there}; expected I, RR and LL, or XX and YY"
        + (" (pseudoI takes one)" if wanted == "I" else "")
    )


def _mean(
    vis: NDArray[np.complex128], weight: Array, pair: tuple[str, str], wanted: str
) -> tuple[NDArray[np.complex128], Array, tuple[str, ...]]:
    with np.errstate(invalid="ignore"):
        good = (weight > 0) & np.isfinite(vis) & np.isfinite(weight)
    # A NaN without a flag is left to whoever counts those.
    strange = ((weight > 0) & ~np.isfinite(vis)) | np.isnan(weight)
    value = np.where(good, vis, 0.0)
    variance = 1 / np.where(good, weight, 1.0)
    both = good.all(-1)
    out = np.where(both, value.mean(-1), 0.0)
    precision = np.where(both, 4 / variance.sum(-1), 0.0)
    notes: tuple[str, ...] = ()
    single = good.sum(-1) == 1
    if wanted == "pseudoI":
        out = np.where(single, value.sum(-1), out)
        precision = np.where(single, np.where(good, weight, 0.0).sum(-1), precision)
        if single.any():
            notes = (
                f"{int(single.sum())} visibilities have one of {pair[0]} and {pair[1]} only, which stands for Stokes I",
            )
        unusable = ~good.any(-1) & strange.any(-1)
    else:
        if single.any():
            notes = (
                f"{int(single.sum())} visibilities have one of {pair[0]} and {pair[1]} only and are left out (pseudoI keeps them)",
            )
        unusable = ~both & strange.any(-1)
    return np.where(unusable, np.nan, out), np.where(unusable, 1.0, precision), notes
