"""Triton kernels, one operation a file, each beside its reference in plain torch.

    sde_step             a step of an integrator with its noise
    group_norm_silu      what stands before the convolutions of score_models' networks
    pixel_norm_silu      and of diffpost's own U-Net
    convolved_residual   the whitening of a convolved likelihood in Fourier space
    ray_shoot            images through a lens of changing parameters, and the adjoint

They are imported one by one, as `from diffpost.kernels.sde_step import sde_step`. Without a GPU or
without triton each is its reference. See docs/kernels.md.
"""

KERNELS = ("sde_step", "group_norm_silu", "pixel_norm_silu", "convolved_residual", "ray_shoot")
