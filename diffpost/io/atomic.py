"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["replace_files"]


def replace_files(contents: dict[Path, bytes]) -> None:
    """Write files through temporary ones beside them; none is replaced before all are written.

    Raises:
        OSError: a folder cannot be written, or the disk is full; the files that were there stay.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, content in contents.items():
            with temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            os.replace(temporary[path], path)
    except BaseException:
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise
