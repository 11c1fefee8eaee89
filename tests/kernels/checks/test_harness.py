"""What guards the other checks is checked by kernels that do wrong."""

import torch

from diffpost.kernels._runtime import jit, tl


@jit
def _one_too_far(out, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(out + place, place.to(tl.float32), place <= n)


def test_a_write_past_the_end_breaks_a_canary(device, canaries):
    out = torch.empty_like(torch.zeros(5, device=device))
    _one_too_far[(1,)](out, 4, BLOCK=16)
    assert not canaries.broken()
    _one_too_far[(1,)](out, 5, BLOCK=16)
    assert canaries.broken()
    canaries.buffers[0][0].fill_(float("nan"))  # mended, for the fixture's own look


def test_what_was_not_written_is_nan(device, canaries):
    out = torch.empty_like(torch.zeros(5, device=device))
    _one_too_far[(1,)](out, 2, BLOCK=16)
    assert out.isnan().tolist() == [False, False, False, True, True]
