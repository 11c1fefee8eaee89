"""Files that the package ships: real HST images for the demo and the tests, each with its licence.

Larger data are fetched by name, see `diffpost.io.datasets`.
"""

from importlib.resources import as_file, files
from pathlib import Path

__all__ = ["shipped"]


def shipped(name: str) -> Path:
    """Path of a file or folder inside this package, such as "hst_petrofit/f105w_psf.fits.gz".

    Raises
    ------
    ValueError: nothing of that name is shipped; the message lists what is.
    """
    root = files(__name__)
    with as_file(root) as folder:  # the package is installed unpacked, so the path outlives this
        path = folder / name
        here = sorted(
            p.relative_to(folder).as_posix()
            for p in folder.rglob("*")
            if p.is_file() and p.suffix not in (".py", ".pyc")
        )
        inside = path.resolve().is_relative_to(folder.resolve())
    if not name or not inside or not path.exists():
        raise ValueError(f"got {name!r}; the package ships {', '.join(here)}")
    return path
