"""The code of docs/lensing.md, as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("caustics", reason="pip install caustics")

PAGE = Path(__file__).parents[2] / "docs" / "lensing.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec("\n".join(blocks), names)
    assert names["lens"].parameters == (
        "main.q",
        "main.phi",
        "main.Rein",
        "shear.gamma_1",
        "shear.gamma_2",
    )
    # one lens of the second part is that of the first
    shown = names["operator"](names["galaxy"][None])
    again = names["one_for_each"](names["galaxy"].expand(3, -1, -1, -1))
    torch.testing.assert_close(shown, again[:1], rtol=1e-5, atol=1e-5)
    assert names["likelihood"].rows == 3 and names["gradient"].shape == (3, 5)
    assert (tmp_path / "lens.png").stat().st_size > 10_000
