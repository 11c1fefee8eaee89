"""What each compiled kernel may need: what was measured when it was written, and a tenth more.

Numbers are per target (registers, instructions per element, 128-bit loads and stores, narrow loads and
stores), as `diffpost.kernels._compile.inspect` counts them. Registers are rounded up to eight, as the
hardware allots them.
"""

from __future__ import annotations

from diffpost.kernels._compile import Budget, Resources

__all__ = ["BUDGETS", "budget_of"]

_HEADROOM = 1.1


def budget_of(found: Resources) -> Budget:
    """The budget that a measurement becomes."""
    return Budget(
        registers=-(-round(found.registers * _HEADROOM) // 8) * 8,
        instructions=round(found.instructions * _HEADROOM, 1),
        loads=found.loads,
        stores=found.stores,
        narrow_loads=found.narrow_loads,
        narrow_stores=found.narrow_stores,
    )


BUDGETS: dict[str, dict[str, Budget]] = {
    "sde_step, guided": {
        "sm_80": Budget(40, 79.1, 6, 2, 8, 0),
        "sm_90": Budget(48, 80.0, 6, 2, 8, 0),
        "gfx942": Budget(64, 96.1, 6, 2, 0, 0),
    },
    "sde_step": {
        "sm_80": Budget(40, 76.6, 4, 2, 7, 0),
        "sm_90": Budget(40, 77.4, 4, 2, 7, 0),
        "gfx942": Budget(64, 92.5, 4, 2, 0, 0),
    },
    "group_norm_silu forward, one tile, residual and shift": {
        "sm_80": Budget(72, 42.7, 8, 8, 12, 2),
        "sm_90": Budget(72, 43.6, 8, 8, 12, 2),
        "gfx942": Budget(72, 63.7, 8, 8, 0, 2),
    },
    "group_norm_silu backward, one tile, residual and shift": {
        "sm_80": Budget(88, 66.6, 12, 4, 14, 3),
        "sm_90": Budget(88, 68.1, 12, 4, 14, 3),
        "gfx942": Budget(88, 85.0, 12, 4, 0, 3),
    },
    "group_norm_silu forward, one tile": {
        "sm_80": Budget(56, 37.9, 4, 4, 8, 2),
        "sm_90": Budget(56, 38.4, 4, 4, 8, 2),
        "gfx942": Budget(48, 55.3, 4, 4, 0, 2),
    },
    "group_norm_silu backward, one tile": {
        "sm_80": Budget(72, 63.4, 8, 4, 10, 3),
        "sm_90": Budget(72, 64.7, 8, 4, 10, 3),
        "gfx942": Budget(96, 79.1, 8, 4, 0, 3),
    },
    "group_norm_silu forward, tiles, residual and shift": {
        "sm_80": Budget(72, 70.3, 24, 8, 12, 2),
        "sm_90": Budget(72, 71.4, 24, 8, 12, 2),
        "gfx942": Budget(72, 96.5, 24, 8, 0, 2),
    },
    "group_norm_silu backward, tiles, residual and shift": {
        "sm_80": Budget(120, 132.3, 28, 4, 14, 3),
        "sm_90": Budget(120, 134.4, 28, 4, 14, 3),
        "gfx942": Budget(120, 177.9, 28, 4, 0, 3),
    },
    "group_norm_silu forward, tiles": {
        "sm_80": Budget(64, 59.9, 12, 4, 8, 2),
        "sm_90": Budget(64, 60.8, 12, 4, 8, 2),
        "gfx942": Budget(56, 83.3, 12, 4, 0, 2),
    },
    "group_norm_silu backward, tiles": {
        "sm_80": Budget(104, 129.2, 24, 4, 10, 3),
        "sm_90": Budget(112, 131.2, 24, 4, 10, 3),
        "gfx942": Budget(112, 173.0, 24, 4, 0, 3),
    },
    "pixel_norm_silu forward, FiLM": {
        "sm_80": Budget(56, 39.7, 8, 4, 0, 0),
        "sm_90": Budget(56, 40.0, 8, 4, 0, 0),
        "gfx942": Budget(56, 61.7, 8, 4, 0, 0),
    },
    "pixel_norm_silu forward": {
        "sm_80": Budget(56, 38.0, 6, 4, 0, 0),
        "sm_90": Budget(56, 38.3, 6, 4, 0, 0),
        "gfx942": Budget(56, 59.5, 6, 4, 0, 0),
    },
    "pixel_norm_silu backward, FiLM": {
        "sm_80": Budget(88, 66.1, 12, 4, 0, 2),
        "sm_90": Budget(88, 66.8, 12, 4, 0, 2),
        "gfx942": Budget(112, 98.8, 12, 4, 0, 2),
    },
    "pixel_norm_silu backward": {
        "sm_80": Budget(88, 64.4, 10, 4, 0, 2),
        "sm_90": Budget(88, 65.0, 10, 4, 0, 2),
        "gfx942": Budget(104, 96.6, 10, 4, 0, 2),
    },
    "convolved_residual": {
        "sm_80": Budget(72, 41.4, 10, 4, 1, 0),
        "sm_90": Budget(72, 42.8, 10, 4, 1, 0),
        "gfx942": Budget(80, 64.4, 10, 4, 0, 0),
    },
    "ray_shoot forward": {
        "sm_80": Budget(72, 260.2, 2, 1, 28, 0),
        "sm_90": Budget(72, 262.4, 2, 1, 28, 0),
        "gfx942": Budget(96, 312.1, 2, 1, 16, 0),
    },
    "ray_shoot backward, source and parameters, deterministic": {
        "sm_80": Budget(128, 871.8, 0, 0, 31, 7),
        "sm_90": Budget(120, 880.6, 0, 0, 31, 7),
        "gfx942": Budget(128, 1870.6, 2, 0, 13, 7),
    },
    "ray_shoot backward, source and parameters": {
        "sm_80": Budget(120, 859.1, 0, 0, 30, 7),
        "sm_90": Budget(120, 865.2, 0, 0, 30, 7),
        "gfx942": Budget(128, 1678.6, 2, 0, 13, 7),
    },
    "ray_shoot backward, source, deterministic": {
        "sm_80": Budget(64, 394.4, 0, 0, 16, 0),
        "sm_90": Budget(64, 396.0, 0, 0, 16, 0),
        "gfx942": Budget(88, 1216.6, 1, 0, 4, 0),
    },
}
