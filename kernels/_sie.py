r"""Deflections of a singular isothermal ellipsoid in a shear, and the gradient by its parameters.

With (X, Y) from the lens' centre along its axes, m = 1 - q^2, f = sqrt(m), psi = sqrt(q^2 X^2 + Y^2) and
k = Rein sqrt(q) (Keeton 2001, arXiv:astro-ph/0102341, equations 34 and 35; as caustics and lenstronomy),

    alpha = k (A, B),      A = atan(f X/psi)/f,      B = atanh(f Y/psi)/f.

With R^2 = X^2 + Y^2 the derivatives are

    dA/dX = Y^2/(R^2 psi),    dB/dY = X^2/(R^2 psi),    dA/dY = dB/dX = -X Y/(R^2 psi),
    dA/dq = -2 q A_m - q X^3/(psi R^2),                 A_m = (X psi/R^2 - A)/(2 m),
    dB/dq = -2 q B_m - X^2 Y/(q psi R^2),               B_m = (Y psi/(q^2 R^2) - B)/(2 m),

and for a nearly round lens, where A_m and B_m lose their digits, they are summed as series in f X/psi and f Y/psi.
A ray within `near` of the centre is taken at that distance from it, and moves along with it.

Parameters: x0, y0, q, phi, Rein, gamma_1, gamma_2; the shear has its centre at (0, 0).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffpost.kernels._math import atan, atanh, sincos
from diffpost.kernels._runtime import jit, tl

__all__ = ["PARAMETERS", "deflect", "deflect_gradient", "trace", "trace_gradient"]

PARAMETERS = ("x0", "y0", "q", "phi", "Rein", "gamma_1", "gamma_2")
_SERIES = 0.1  # of (f X/psi)^2, below which the series is better


def deflect(x: Tensor, y: Tensor, params: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Places on the source plane, (B, n) each, of rays x, y (n,) for parameters (B, 7), in plain torch."""
    x0, y0, q, phi, radius, g1, g2 = params.T[..., None]
    q = torch.where(q == 1, q - 1e-6, q)
    dx, dy, _ = _offsets(x, y, x0, y0, near)
    s, c = phi.sin(), phi.cos()
    along, across = c * dx + s * dy, c * dy - s * dx
    f = (1 - q * q).sqrt()
    psi = (q * q * along * along + across * across).sqrt()
    strength = radius * q.sqrt() / f
    a, b = strength * (f * along / psi).atan(), strength * (f * across / psi).atanh()
    u, v = x0 + dx, y0 + dy
    return u - (c * a - s * b) - (g1 * u + g2 * v), v - (s * a + c * b) - (g2 * u - g1 * v)


def deflect_gradient(
    x: Tensor, y: Tensor, params: Tensor, near: Tensor, gx: Tensor, gy: Tensor
) -> Tensor:
    """sum over rays of gx d(beta_x) + gy d(beta_y) by the parameters, (B, 7), in plain torch."""
    x0, y0, q, phi, radius, g1, g2 = params.T[..., None]
    q = torch.where(q == 1, q - 1e-6, q)
    dx, dy, hit = _offsets(x, y, x0, y0, near)
    s, c = phi.sin(), phi.cos()
    along, across = c * dx + s * dy, c * dy - s * dx
    m, square = 1 - q * q, along * along + across * across
    f, psi = m.sqrt(), (q * q * along * along + across * across).sqrt()
    a, b = (f * along / psi).atan() / f, (f * across / psi).atanh() / f
    strength = radius * q.sqrt()
    ha, hb = -(c * gx + s * gy), -(c * gy - s * gx)
    a_m = _by_m(along / psi, m, (along * psi / square - a) / (2 * m), -1)
    b_m = _by_m(across / psi, m, (across * psi / (q * q * square) - b) / (2 * m), 1)
    a_q = -2 * q * a_m - q * along**3 / (psi * square)
    b_q = -2 * q * b_m - along**2 * across / (q * psi * square)
    turn = strength * (ha * across - hb * along) / (square * psi)
    la, lb = turn * across, -turn * along
    u, v = x0 + dx, y0 + dy
    per_strength = ha * a + hb * b
    ax, ay = strength * (c * a - s * b), strength * (s * a + c * b)
    zero = torch.zeros_like(la)
    rows = [
        torch.where(hit, gx - (gx * g1 + gy * g2), zero - (c * la - s * lb)),
        torch.where(hit, gy - (gx * g2 - gy * g1), zero - (s * la + c * lb)),
        radius / (2 * q.sqrt()) * per_strength + strength * (ha * a_q + hb * b_q),
        gx * ay - gy * ax + la * across - lb * along,
        q.sqrt() * per_strength,
        gy * v - gx * u,
        -gx * v - gy * u,
    ]
    # at the centre (hit), a deflection is constant: only the ray moves
    return torch.stack([row.sum(-1) for row in rows], -1)


def _offsets(
    x: Tensor, y: Tensor, x0: Tensor, y0: Tensor, near: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dy = x - x0, y - y0
    hit = dx * dx + dy * dy < near * near
    step = near / math.sqrt(2)
    return torch.where(hit, step, dx), torch.where(hit, step, dy), hit


def _by_m(u: Tensor, m: Tensor, direct: Tensor, sign: int) -> Tensor:
    """d/dm of atan(f u)/f (sign -1) or atanh(f u)/f (sign 1)."""
    z = sign * m * u * u
    total = torch.zeros_like(z)
    for k in range(9, 0, -1):
        total = total * z + k / (2 * k + 1)
    return torch.where(z.abs() < _SERIES, sign * u**3 * total, direct)


@jit
def _by_m_kernel(u, m, direct, SIGN: tl.constexpr):
    z = SIGN * m * u * u
    total = 9.0 / 19.0 + 0.0 * z
    total = total * z + 8.0 / 17.0
    total = total * z + 7.0 / 15.0
    total = total * z + 6.0 / 13.0
    total = total * z + 5.0 / 11.0
    total = total * z + 4.0 / 9.0
    total = total * z + 3.0 / 7.0
    total = total * z + 2.0 / 5.0
    total = total * z + 1.0 / 3.0
    return tl.where(tl.abs(z) < 0.1, SIGN * u * u * u * total, direct)


@jit
def _lens(params):
    """The parameters, with the sine and the cosine of phi, and q kept from 1."""
    x0, y0, q = tl.load(params), tl.load(params + 1), tl.load(params + 2)
    s, c = sincos(tl.load(params + 3))
    radius, g1, g2 = tl.load(params + 4), tl.load(params + 5), tl.load(params + 6)
    return x0, y0, tl.where(q == 1.0, q - 1e-6, q), s, c, radius, g1, g2


@jit
def _axes(x, y, x0, y0, s, c, near):
    """Offsets from the centre, whether it was hit, and the offsets along the axes of the lens."""
    dx, dy = x - x0, y - y0
    hit = dx * dx + dy * dy < near * near
    step = near * 0.7071067811865476
    dx, dy = tl.where(hit, step, dx), tl.where(hit, step, dy)
    return dx, dy, hit, c * dx + s * dy, c * dy - s * dx


@jit
def trace(x, y, params, near):
    """Places on the source plane of rays x, y through the lens at the pointer params."""
    x0, y0, q, s, c, radius, g1, g2 = _lens(params)
    dx, dy, _, along, across = _axes(x, y, x0, y0, s, c, near)
    f = tl.sqrt(1.0 - q * q)
    psi = tl.sqrt(q * q * along * along + across * across)
    strength = radius * tl.sqrt(q) / f
    a, b = strength * atan(f * along / psi), strength * atanh(f * across / psi)
    u, v = x0 + dx, y0 + dy
    return u - (c * a - s * b) - (g1 * u + g2 * v), v - (s * a + c * b) - (g2 * u - g1 * v)


@jit
def trace_gradient(x, y, params, near, gx, gy):
    """What each ray adds to the gradients of the seven parameters."""
    x0, y0, q, s, c, radius, g1, g2 = _lens(params)
    dx, dy, hit, along, across = _axes(x, y, x0, y0, s, c, near)
    m, square = 1.0 - q * q, along * along + across * across
    f, psi = tl.sqrt(m), tl.sqrt(q * q * along * along + across * across)
    a, b = atan(f * along / psi) / f, atanh(f * across / psi) / f
    root = tl.sqrt(q)
    strength = radius * root
    ha, hb = -(c * gx + s * gy), -(c * gy - s * gx)
    a_m = _by_m_kernel(along / psi, m, (along * psi / square - a) / (2.0 * m), -1)
    b_m = _by_m_kernel(across / psi, m, (across * psi / (q * q * square) - b) / (2.0 * m), 1)
    a_q = -2.0 * q * a_m - q * along * along * along / (psi * square)
    b_q = -2.0 * q * b_m - along * along * across / (q * psi * square)
    turn = strength * (ha * across - hb * along) / (square * psi)
    la, lb = turn * across, -turn * along
    u, v = x0 + dx, y0 + dy
    per_strength = ha * a + hb * b
    ax, ay = strength * (c * a - s * b), strength * (s * a + c * b)
    return (
        tl.where(hit, gx - (gx * g1 + gy * g2), s * lb - c * la),
        tl.where(hit, gy - (gx * g2 - gy * g1), -(s * la + c * lb)),
        radius / (2.0 * root) * per_strength + strength * (ha * a_q + hb * b_q),
        gx * ay - gy * ax + la * across - lb * along,
        root * per_strength,
        gy * v - gx * u,
        -gx * v - gy * u,
    )
