"""Device functions that kernels share: Philox words, normals and inverse tangents.

Everything is float32 and integers, by polynomials: the library's cosine keeps 32 bytes of stack for
the reduction of large arguments, and differs between the makers of devices. Here a draw on any device
differs from the one on the CPU by the rounding of a few products, and its integers not at all.

The logarithm of u = (w + 1/2)/2^32 is needed with a small *relative* error also where u is next to 1,
since the radius of a normal is its root. There 1 - u = (not w + 1/2)/2^32 is exact while u is not.

Polynomials of log(1 + f), sine, cosine, tan^-1 and tanh^-1: Cephes (Moshier 1989), logf, sinf, atanf, atanhf.
"""

from __future__ import annotations

from diffpost.kernels._runtime import jit, tl

__all__ = ["atan", "atanh", "normal_pair", "philox4x32", "sincos"]


@jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words, as `diffpost.random.philox4x32`."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, tl.full(c0.shape, 0xD2511F53, tl.uint32))
        low0 = c0 * tl.full(c0.shape, 0xD2511F53, tl.uint32)
        high1 = tl.umulhi(c2, tl.full(c2.shape, 0xCD9E8D57, tl.uint32))
        low1 = c2 * tl.full(c2.shape, 0xCD9E8D57, tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@jit
def _log1p_polynomial(f):
    """log(1 + f) for sqrt(1/2) - 1 <= f <= sqrt(2) - 1."""
    z = f * f
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    return f + (p * f * z - 0.5 * z)


@jit
def _log(f, exponent):
    """exponent log 2 + log(1 + f), log 2 in two parts."""
    return 0.693359375 * exponent + (_log1p_polynomial(f) - 2.12194440e-4 * exponent)


@jit
def _radius(w):
    """sqrt(-2 log((w + 1/2)/2^32))."""
    low = w < tl.full(w.shape, 0x80000000, tl.uint32)
    near = tl.where(low, w, w ^ tl.full(w.shape, 0xFFFFFFFF, tl.uint32))
    t = (near.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # distance from 0 or from 1
    u = tl.where(low, t, 1.0 - t)
    bits = u.to(tl.int32, bitcast=True)
    # u = 2^exponent (1 + f): subtracting the bits of sqrt(1/2) first puts 1 + f around 1
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    f = tl.where(low | (exponent < 0), mantissa - 1.0, -t)
    return tl.sqrt_rn(-2.0 * _log(f, exponent.to(tl.float32)))


@jit
def _quarter(x):
    """Sine and cosine for |x| <= pi/4."""
    z = x * x
    s = -1.9515295891e-4 * z + 8.3321608736e-3
    s = (s * z - 1.6666654611e-1) * z * x + x
    c = 2.443315711809948e-5 * z - 1.388731625493765e-3
    c = (c * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    return s, c


@jit
def sincos(x):
    """Sine and cosine of angles of at most some thousand turns, float32."""
    turn = tl.floor(x * 0.6366197723675814 + 0.5)
    s, c = _quarter(
        ((x - turn * 1.5703125) - turn * 4.837512969970703125e-4) - turn * 7.549789948768648e-8
    )
    quadrant = turn.to(tl.int32)
    odd = (quadrant & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return sine, tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@jit
def normal_pair(w, v):
    """Box and Muller's two normals, radius from word w and angle from word v, float32."""
    radius = _radius(w)
    # whole quadrants, and the signed rest of at most an eighth of a turn
    quadrant = (v + tl.full(v.shape, 0x20000000, tl.uint32)) >> 30
    rest = (v - (quadrant << 30)).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2^32
    s, c = _quarter(x)
    odd = (quadrant & 1) != 0
    cosine = tl.where(odd, s, c)
    sine = tl.where(odd, c, s)
    cosine = tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)
    sine = tl.where((quadrant & 2) != 0, -sine, sine)
    return radius * cosine, radius * sine


@jit
def atan(x):
    """tan^-1, float32."""
    size = tl.abs(x)
    far = size > 2.414213562373095
    middle = (size > 0.4142135623730950) & (size <= 2.414213562373095)
    over = tl.where(far, -1.0, tl.where(middle, size - 1.0, size))
    under = tl.where(far, size, tl.where(middle, size + 1.0, 1.0))
    start = tl.where(far, 1.5707963267948966, tl.where(middle, 0.7853981633974483, 0.0))
    t = over / under
    z = t * t
    p = 8.05374449538e-2 * z - 1.38776856032e-1
    p = (p * z + 1.99777106478e-1) * z - 3.33329491539e-1
    y = start + (p * z * t + t)
    return tl.where(x < 0, -y, y)


@jit
def atanh(x):
    """tanh^-1 for |x| < 1, float32."""
    z = x * x
    p = 1.81740078349e-1 * z + 8.24370301058e-2
    p = (p * z + 1.46691431730e-1) * z + 1.99782164500e-1
    p = (p * z + 3.33337300303e-1) * z * x + x
    return tl.where(z < 0.25, p, 0.5 * tl.log((1.0 + x) / (1.0 - x)))
