"""Triton kernels, one operation a file, each beside its reference in plain torch.

    sde_step             a step of an integrator with its noise
    group_norm_silu      what stands before the convolutions of score_models' networks

They are imported one by one, as `from diffpost.kernels.sde_step import sde_step`. Without a GPU or
without triton each is its reference.
"""

KERNELS = ("sde_step", "group_norm_silu")
