"""Everything that docs/performance.md was made with, one command after the other.

    python examples/performance.py --list         # prints the commands
    python examples/performance.py --only peers   # runs those that have this in them; all of them without it

Draws and comparisons resume where they were stopped, the rest starts again. Long are the references of many calls and the
comparison with other libraries. Those that are not installed are left out. deepinv wants an environment of its own, and
contenders are compared within one environment, so run `--only peers` there, with all of them. What the benchmarks measure
is in runs/optimize.json, under `extra_info`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

_BY_CALLS = "python examples/error_by_calls.py"
_GALAXY_64 = f'{_BY_CALLS} galaxies --size 64 --reference 1000 --only "DPMSolver(eta=1)"'
COMMANDS = (
    f"{_BY_CALLS} field",
    f"{_BY_CALLS} galaxies --reference 128",
    *(
        f"{_BY_CALLS} galaxies --reference 128 --only DPMSolver --calls 16 --seed {k}"
        for k in (2, 3, 4)
    ),
    _GALAXY_64,
    *(f"{_GALAXY_64} --calls 48 --seed {k}" for k in (2, 3, 4)),
    "python -m pytest tests/benchmarks/test_optimize.py --benchmark-only "
    "--benchmark-json=runs/optimize.json",
    "python examples/profile_sample.py galaxies-64",
    "python examples/peers_at_equal_error.py",
    "python examples/growth_of_a_draw.py --only batch size mask visibilities",
    "python examples/growth_of_a_draw.py --only matrix --most 1024",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--only", default="", help="commands that have this in them")
    options = parser.parse_args()
    root = Path(__file__).resolve().parents[1]
    (root / "runs").mkdir(exist_ok=True)
    one_thread = {"OMP_NUM_THREADS": "1"} | os.environ
    for command in (command for command in COMMANDS if options.only in command):
        print(command, flush=True)
        if not options.list:
            _, *rest = shlex.split(command)
            subprocess.run([sys.executable, *rest], check=True, cwd=root, env=one_thread)


if __name__ == "__main__":
    main()
