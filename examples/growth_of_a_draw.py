"""How time and memory of a posterior draw grow with the batch, the size of the image and the number of data.

    python examples/growth_of_a_draw.py [--only batch size mask matrix visibilities]

Draws of `galaxies-64` under its own guidance, by `DPMSolver(8, eta=1)`. Every point is a process of its own: the time is
the processor's, after a short call, and the memory the peak of the resident set over what it was before the first draw, so
that it holds what sampling takes and not the libraries and the weights. Printed over the first point of each series, with
the exponent of the growth from point to point.

batch: 64 x 64 pixels under a PSF. size: a batch of one under the same PSF (the network is convolutional, and was trained up to 128
pixels). The rest is of 64 x 64 pixels, in batches of 4: m pixels seen, a dense m x 4,096 matrix of normals, m visibilities
(all with noise of 3% of the data's rms).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import time

import torch

import diffpost as dp
from diffpost.jobs.instruments import gaussian_psf
from diffpost.physics import Grid

STEPS = 8
SERIES = {
    "batch": (1, 4, 16, 64),
    "size": (32, 64, 128, 256),
    "mask": (64, 256, 1024, 4096),
    "matrix": (64, 256, 1024, 4096, 16384),
    "visibilities": (64, 256, 1024, 4096, 16384),
}
CELL = 0.05  # arcsec


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def likelihood(kind: str, m: int, truth: torch.Tensor) -> dp.Likelihood:
    """m data of an image (1, 1, h, w)."""
    size = truth.shape[-1]
    if kind == "matrix":
        operator = dp.Matrix(normals(m, size * size) / size, input_shape=(1, size, size))
    elif kind == "visibilities":
        from diffpost.physics.visibilities import ARCSEC, Visibilities

        limit = 0.49 / (CELL * ARCSEC)
        uv = (0.3 * limit * normals(2, m).double()).clamp(-limit, limit)
        operator = Visibilities(*uv, Grid(size, CELL))
    elif kind == "mask":
        operator = dp.Identity()
    else:
        operator = dp.Convolve(gaussian_psf(1.5))
    clean = operator(truth)[0]
    std = 0.03 * float(clean.square().mean().sqrt())
    y = clean + std * normals(*clean.shape, seed=1).to(clean)
    if kind == "mask":
        order = torch.rand(size * size, generator=torch.Generator().manual_seed(0)).argsort()
        seen = (order < m).reshape(1, size, size)
        return dp.Likelihood(y, operator, dp.GaussianNoise(std=torch.where(seen, std, math.inf)))
    return dp.Likelihood(y, operator, dp.GaussianNoise(std=std))


def megabytes() -> float:
    """Peak of the resident set."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def point(kind: str, value: int) -> dict[str, float]:
    """Processor time of a draw and the memory of a batch, with the calls and VJPs of a draw."""
    torch.set_num_threads(1)
    size = value if kind == "size" else 64
    batch = {"batch": value, "size": 1}.get(kind, 4)
    prior = dp.optimize(dp.load_prior("galaxies-64")).with_shape((1, size, size))
    axis = torch.arange(size) - size / 2
    truth = torch.exp(-((axis[:, None] ** 2 + axis**2).sqrt()) / (size / 10))[None, None]
    posterior = dp.Posterior(prior, likelihood(kind, value, truth))

    def draw(n: int, steps: int) -> dp.Samples:
        sampler = dp.DPMSolver(steps, eta=1.0)
        return dp.sample(posterior, n, sampler, seed=0, batch_size=n, progress=False)

    before = megabytes()
    draw(1, 2)  # sets things up
    start = time.process_time()
    made = draw(batch, STEPS)
    spent = (time.process_time() - start) / batch
    return {"time": spent, "memory": megabytes() - before, "vjps": made.vjps, "calls": made.calls}


def exponents(values: list[int], measured: list[float]) -> list[float]:
    """d log measured / d log value from each point to the next."""
    points = zip(values, measured, strict=True)
    logs = [(math.log(v), math.log(max(m, 1e-12))) for v, m in points]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(logs)]


def series(kind: str, most: int) -> list[str]:
    """Lines of a table, of points up to ``most``."""
    values = [value for value in SERIES[kind] if value <= most]
    found = []
    for value in values:
        script = [sys.executable, __file__, "--point", kind, str(value)]
        done = subprocess.run(script, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    lines = [f"| {kind} | " + " | ".join(map(str, values)) + " |", "|---|" + "---|" * len(values)]
    for name in ("time", "memory"):
        measured = [point[name] for point in found]
        steps = ["", *(f" (^{e:.2f})" for e in exponents(values, measured))]
        shown = [f"{m / measured[0]:.3g}{e}" for m, e in zip(measured, steps, strict=True)]
        label = "time of a draw" if name == "time" else "peak memory"
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    lines.append("| VJPs a draw | " + " | ".join(f"{p['vjps']:.0f}" for p in found) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=SERIES, default=list(SERIES))
    parser.add_argument("--most", type=int, default=2**20, help="leave out larger points")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        kind, value = options.point
        print(json.dumps(point(kind, int(value))))
        return
    for kind in options.only:
        print("\n".join(series(kind, options.most)) + "\n", flush=True)


if __name__ == "__main__":
    main()
