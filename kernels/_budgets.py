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
        "gfx942": Budget(48, 105.6, 3, 1, 0, 0),
    },
    "sde_step": {
        "sm_80": Budget(40, 76.6, 4, 2, 7, 0),
        "sm_90": Budget(40, 77.4, 4, 2, 7, 0),
        "gfx942": Budget(48, 102.9, 2, 1, 0, 0),
    },
    "group_norm_silu forward, one tile, residual and shift": {
        "sm_80": Budget(72, 42.7, 8, 8, 12, 2),
        "sm_90": Budget(72, 43.6, 8, 8, 12, 2),
        "gfx942": Budget(40, 83.5, 4, 4, 0, 2),
    },
    "group_norm_silu backward, one tile, residual and shift": {
        "sm_80": Budget(88, 66.6, 12, 4, 14, 3),
        "sm_90": Budget(88, 68.1, 12, 4, 14, 3),
        "gfx942": Budget(48, 109.9, 6, 2, 0, 3),
    },
    "group_norm_silu forward, one tile": {
        "sm_80": Budget(56, 37.9, 4, 4, 8, 2),
        "sm_90": Budget(56, 38.4, 4, 4, 8, 2),
        "gfx942": Budget(32, 74.2, 2, 2, 0, 2),
    },
    "group_norm_silu backward, one tile": {
        "sm_80": Budget(72, 63.4, 8, 4, 10, 3),
        "sm_90": Budget(72, 64.7, 8, 4, 10, 3),
        "gfx942": Budget(48, 102.4, 4, 2, 0, 3),
    },
    "group_norm_silu forward, tiles, residual and shift": {
        "sm_80": Budget(72, 70.3, 24, 8, 12, 2),
        "sm_90": Budget(72, 71.4, 24, 8, 12, 2),
        "gfx942": Budget(48, 130.4, 12, 4, 0, 2),
    },
    "group_norm_silu backward, tiles, residual and shift": {
        "sm_80": Budget(120, 132.3, 28, 4, 14, 3),
        "sm_90": Budget(120, 134.4, 28, 4, 14, 3),
        "gfx942": Budget(72, 212.6, 14, 2, 0, 3),
    },
    "group_norm_silu forward, tiles": {
        "sm_80": Budget(64, 59.9, 12, 4, 8, 2),
        "sm_90": Budget(64, 60.8, 12, 4, 8, 2),
        "gfx942": Budget(40, 116.5, 6, 2, 0, 2),
    },
    "group_norm_silu backward, tiles": {
        "sm_80": Budget(104, 129.2, 24, 4, 10, 3),
        "sm_90": Budget(112, 131.2, 24, 4, 10, 3),
        "gfx942": Budget(64, 207.2, 12, 2, 0, 3),
    },
    "pixel_norm_silu forward, FiLM": {
        "sm_80": Budget(56, 39.7, 8, 4, 0, 0),
        "sm_90": Budget(56, 40.0, 8, 4, 0, 0),
        "gfx942": Budget(40, 69.6, 6, 2, 0, 0),
    },
    "pixel_norm_silu forward": {
        "sm_80": Budget(56, 38.0, 6, 4, 0, 0),
        "sm_90": Budget(56, 38.3, 6, 4, 0, 0),
        "gfx942": Budget(40, 63.9, 4, 2, 0, 0),
    },
    "pixel_norm_silu backward, FiLM": {
        "sm_80": Budget(88, 66.1, 12, 4, 0, 2),
        "sm_90": Budget(88, 66.8, 12, 4, 0, 2),
        "gfx942": Budget(72, 117.4, 8, 2, 0, 2),
    },
    "pixel_norm_silu backward": {
        "sm_80": Budget(88, 64.4, 10, 4, 0, 2),
        "sm_90": Budget(88, 65.0, 10, 4, 0, 2),
        "gfx942": Budget(64, 111.2, 6, 2, 0, 2),
    },
    "convolved_residual": {
        "sm_80": Budget(72, 41.4, 10, 4, 1, 0),
        "sm_90": Budget(72, 42.8, 10, 4, 1, 0),
        "gfx942": Budget(56, 77.8, 5, 2, 0, 0),
    },
}
