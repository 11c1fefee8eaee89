"""Checks of kernels as they run: on a GPU, or in triton's interpreter in a process of its own.

`test_interpreter.py` starts that process with TRITON_INTERPRET=1. Without it and without a GPU these
skip.
"""

import pytest
import torch

from diffpost.kernels._runtime import INTERPRETED, triton

collect_ignore_glob = ["test_*.py"] if triton is None else []

BAND = 64  # elements on either side


@pytest.fixture(scope="session")
def device():
    if torch.cuda.is_available() and not INTERPRETED:
        return torch.device("cuda")
    if INTERPRETED:
        return torch.device("cpu")
    pytest.skip("no GPU; test_interpreter.py runs these in triton's interpreter")


class Canaries:
    """Tensors between bands of a known value, whose own elements start as NaN where they are results."""

    def __init__(self):
        self.buffers = []

    def empty(self, shape, dtype, device, fill=None):
        """A contiguous tensor of this shape between two bands."""
        numel = torch.Size(shape).numel()
        floating = dtype.is_floating_point
        sentinel = float("nan") if floating else torch.iinfo(dtype).max
        buffer = torch.full((numel + 2 * BAND,), sentinel, dtype=dtype, device=device)
        self.buffers.append((buffer, numel, sentinel))
        inner = buffer[BAND : BAND + numel]
        if fill is not None:
            inner.fill_(fill)
        return inner.view(shape)

    def place(self, tensor):
        """The same values with bands around them; what reads outside reads NaN."""
        inner = self.empty(tensor.shape, tensor.dtype, tensor.device)
        return inner.copy_(tensor)

    def broken(self):
        """Whether something wrote into a band."""
        for buffer, numel, sentinel in self.buffers:
            bands = torch.cat([buffer[:BAND], buffer[BAND + numel :]])
            same = bands.isnan() if bands.is_floating_point() else bands == sentinel
            if not bool(same.all()):
                return True
        return False


@pytest.fixture
def canaries(monkeypatch):
    """Every result that a test's operations allocate lies between bands, which are looked at in the end."""
    found = Canaries()

    def empty_like(like, *, dtype=None, device=None, memory_format=None):
        return found.empty(like.shape, dtype or like.dtype, device or like.device)

    def new_empty(like, *shape, dtype=None, device=None):
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        return found.empty(shape, dtype or like.dtype, device or like.device)

    def new_zeros(like, *shape, dtype=None, device=None):
        if len(shape) == 1 and not isinstance(shape[0], int):
            shape = tuple(shape[0])
        return found.empty(shape, dtype or like.dtype, device or like.device, 0)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    yield found
    assert found.buffers, "nothing was allocated between canaries"
    assert not found.broken(), "something wrote outside of its result"


@pytest.fixture
def draw(device):
    """Normal tensors of a fixed seed, the same on every device."""
    generator = torch.Generator().manual_seed(20)

    def drawn(*shape, dtype=torch.float64, scale=1.0, offset=0.0):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (scale * values + offset).to(dtype).to(device)

    return drawn
