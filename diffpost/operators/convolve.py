"""Convolution with a point-spread function.

    (A x)[i] = sum_j psf[c + i - j] x[j],     c = (h // 2, w // 2),

so a point source at j becomes the PSF centred at j. With a periodic boundary the FFT diagonalises A.
With a zero boundary (nothing outside the image) the image is padded to N >= H + max(c, h - 1 - c)
pixels, which is enough that what wraps around falls outside the H rows kept; offsets beyond H - 1
never reach the image, so a PSF may be larger than it. The adjoint is the same with the conjugate
transfer function.
"""

from __future__ import annotations

from typing import final

import torch
from scipy.fft import next_fast_len
from torch import Tensor

from diffpost.operators.base import (
    LinearOperator,
    Memo,
    Parameter,
    PowerSpectrum,
    Shape,
    as_real,
    numel,
)

__all__ = ["Convolve"]


@final
class Convolve(LinearOperator):
    """Convolution of the last two axes with a PSF; images keep their size.

    Args:
        psf: (h, w), the same for every channel; (C, h, w), one a channel; or (K, 1, h, w), K PSFs
            of an image of one channel, (1, H, W) to (K, H, W). Its centre is the pixel
            (h // 2, w // 2). It is not normalised here.
        boundary: "zero" (nothing outside the image) or "periodic".

    Raises:
        ValueError: another number of axes, an empty, complex or non-finite PSF, another boundary.
    """

    def __init__(self, psf: Tensor, boundary: str = "zero") -> None:
        tensor = as_real(psf, "Convolve(psf)")
        if tensor.ndim not in (2, 3, 4) or (tensor.ndim == 4 and tensor.shape[1] != 1):
            raise ValueError(
                f"Convolve: got a PSF of shape {tuple(tensor.shape)}; expected (h, w), (C, h, w) for one PSF a "
                "channel, or (K, 1, h, w) for K PSFs of an image of one channel."
            )
        if tensor.numel() == 0:
            raise ValueError(f"Convolve: got an empty PSF, {tuple(tensor.shape)}.")
        if boundary not in ("zero", "periodic"):
            raise ValueError(f"Convolve: got boundary={boundary!r}; expected 'zero' or 'periodic'.")
        self.boundary = boundary
        self.psf = tensor
        self._fans_out = tensor.ndim == 4 and tensor.shape[0] > 1
        self._kernel = tensor[:, 0] if tensor.ndim == 4 else tensor
        self._psf = Parameter(self._kernel)
        self._memo = Memo(8)

    def __repr__(self) -> str:
        return f"Convolve(psf {tuple(self.psf.shape)}, boundary={self.boundary!r})"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Convolve:
        return Convolve(self.psf.to(device=device, dtype=dtype), self.boundary)

    def output_shape(self, input_shape: Shape) -> Shape:
        shape = tuple(input_shape)
        if len(shape) < 2:
            raise ValueError(f"{self!r}: got images of shape {shape}; expected (..., H, W).")
        if self.psf.ndim > 2 and len(shape) != 3:
            raise ValueError(f"{self!r}: got images of shape {shape}; expected (C, H, W).")
        if self.psf.ndim == 4 and shape[0] != 1:
            raise ValueError(
                f"{self!r}: got images of shape {shape}; expected one channel, (1, H, W)."
            )
        if self.psf.ndim == 3 and self.psf.shape[0] not in (1, shape[0]):
            raise ValueError(
                f"{self!r}: got images of shape {shape}; expected {self.psf.shape[0]} channels, one a PSF."
            )
        if self.boundary == "periodic" and any(
            k > n for k, n in zip(self.psf.shape[-2:], shape[-2:], strict=True)
        ):
            raise ValueError(
                f"{self!r}: the PSF is larger than the image, {shape}, and would wrap onto itself; crop it "
                "or use boundary='zero'."
            )
        return (self.psf.shape[0], *shape[1:]) if self.psf.ndim == 4 else shape

    def __call__(self, x: Tensor) -> Tensor:
        self.output_shape(tuple(x.shape[1:]))
        return self._filter(x, adjoint=False)

    def adjoint(self, v: Tensor) -> Tensor:
        shape = tuple(v.shape[1:])
        if self.psf.ndim == 4:
            if len(shape) != 3 or shape[0] != self.psf.shape[0]:
                raise ValueError(
                    f"{self!r}: adjoint got {shape}; expected ({self.psf.shape[0]}, H, W)."
                )
            shape = (1, *shape[1:])
        self.output_shape(shape)
        return self._filter(v, adjoint=True)

    def _filter(self, x: Tensor, adjoint: bool) -> Tensor:
        height, width = x.shape[-2:]
        grid = self._grid((height, width))
        transfer = self._transfer(grid, (height, width), x.dtype, x.device)
        if adjoint:
            transfer = transfer.conj()
        product = torch.fft.rfft2(x, s=grid) * transfer
        if adjoint and self._fans_out:
            product = product.sum(-3, keepdim=True)
        return torch.fft.irfft2(product, s=grid)[..., :height, :width]

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size of the transform."""
        if self.boundary == "periodic":
            return size
        padded = [
            next_fast_len(n + min(max(k // 2, k - 1 - k // 2), n - 1), real=True)
            for k, n in zip(self.psf.shape[-2:], size, strict=True)
        ]
        return padded[0], padded[1]

    def _transfer(
        self, grid: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """rfft2 of the PSF with its centre at the origin of the grid."""

        def make() -> Tensor:
            # in double: the transform of a PSF is done once, and its error would stay in every
            # product
            kernel = self._kernel.to(device, torch.float64)
            placed = torch.fft.rfft2(_wrap(kernel, grid, size))
            return placed.to(torch.complex128 if dtype == torch.float64 else torch.complex64)

        return self._memo((grid, size, dtype, device), make)

    def spectrum(self, input_shape: Shape) -> Tensor | None:
        self.output_shape(input_shape)
        if self.boundary != "periodic" or self._fans_out:
            return None
        return self._full_spectrum((input_shape[-2], input_shape[-1]))

    def _full_spectrum(self, size: tuple[int, int]) -> Tensor:
        def make() -> Tensor:
            return torch.fft.fft2(_wrap(self._kernel.double(), size, size))

        return self._memo(("full", size), make)

    def near_spectrum(
        self, input_shape: Shape, power: PowerSpectrum, grid: tuple[int, int]
    ) -> Tensor | None:
        # several PSFs of one image couple the channels of the data: only the blocks on the diagonal
        # are kept
        before = power(grid)
        if before is None:
            return None
        return self._full_spectrum(grid).abs().square() * before.to(self.psf.device)

    def near_transfer(self, input_shape: Shape, grid: tuple[int, int]) -> Tensor | None:
        return self._full_spectrum(grid) if numel(input_shape[:-2]) == 1 else None

    def margin(self, input_shape: Shape, inner: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        if self.boundary == "periodic":
            return inner
        reach = [min(k, n) - 1 for k, n in zip(self.psf.shape[-2:], input_shape[-2:], strict=True)]
        return inner[0] + reach[0], inner[1] + reach[1]


def _wrap(kernel: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The kernel on a periodic grid, centre at the origin, without offsets that no two pixels have."""
    for axis in (-2, -1):
        n, reach = grid[axis], size[axis] - 1
        length = kernel.shape[axis]
        offsets = torch.arange(length, device=kernel.device) - length // 2
        near = offsets.abs() <= reach
        kernel, offsets = kernel.index_select(axis, near.nonzero()[:, 0]), offsets[near]
        placed = kernel.new_zeros(
            [n if i == kernel.ndim + axis else m for i, m in enumerate(kernel.shape)]
        )
        kernel = placed.index_add(axis, offsets % n, kernel)
    return kernel
