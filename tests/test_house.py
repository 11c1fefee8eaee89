"""The rules of the house that no linter knows: import direction, no assert, short files, README's blocks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffpost

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "diffpost").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# Each may import from those before it, and modules of the same rank from each other only where told below.
ORDER = {
    "sde": 0,
    "random": 0,
    "linalg": 0,
    "line_integral": 0,
    "operator": 1,
    "operators": 1,
    "score": 1,
    "noise": 1,
    "noise_flow": 1,
    "scale_mixture": 1,
    "tiling": 1,
    "learned_noise": 1,
    "gaussian": 1,
    "structured": 2,
    "likelihood": 2,
    "guidance": 3,
    "posterior": 4,
    "samplers": 5,
    "sample": 6,
}
OUTSIDE = {"parameters", "physics", "networks", "io", "plot", "cli"}


def imported(source: str, package: str) -> list[str]:
    """Modules that a source imports when it runs, at whatever depth; not those for type checkers only."""
    found: list[str] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from diffpost import x` names modules; `from diffpost.a import b` names what is inside.
            found.extend(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def violations(source: str, module: str, package: str) -> list[str]:
    """Imports of a core module that go the wrong way."""
    own = module.split(".")[1]
    rank = ORDER[own]
    wrong = []
    for name in imported(source, package):
        parts = name.split(".")
        if parts[0] != "diffpost" or len(parts) < 2 or parts[1] == own:
            continue
        target = parts[1]
        if target in OUTSIDE or ORDER.get(target, -1) > rank:
            wrong.append(f"{module} imports {name}")
    return wrong


def core_files() -> list[Path]:
    return [
        path
        for path in SOURCES
        if path.is_relative_to(ROOT / "diffpost")
        and path.relative_to(ROOT / "diffpost").with_suffix("").parts[0] in ORDER
    ]


def module_of(path: Path) -> tuple[str, str]:
    """Dotted names of a file's module and of its package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        return ".".join(parts[:-1]), ".".join(parts[:-1])
    return ".".join(parts), ".".join(parts[:-1])


def reachable(start: str) -> set[str]:
    """First-level modules of diffpost that importing a core module brings in, through any helper module."""
    seen: set[str] = set()
    queue = [start]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        base = ROOT / "diffpost" / name
        files = (
            [base.with_suffix(".py")] if base.with_suffix(".py").exists() else base.rglob("*.py")
        )
        for path in files:
            for target in imported(path.read_text(), module_of(path)[1]):
                parts = target.split(".")
                if parts[0] == "diffpost" and len(parts) > 1:
                    queue.append(parts[1])
    return seen - {start}


def test_core_imports_go_one_way() -> None:
    files = core_files()
    assert len(files) >= 2
    wrong = [line for path in files for line in violations(path.read_text(), *module_of(path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from diffpost.likelihood import Likelihood", "diffpost.sde"),
        ("import diffpost.networks.unet", "diffpost.score"),
        ("def f():\n    from diffpost import plot", "diffpost.sample"),
        ("from ..posterior import Posterior", "diffpost.guidance.dps"),
    ],
)
def test_a_wrong_import_is_found(source: str, module: str) -> None:
    assert violations(source, module, module.rpartition(".")[0])


def test_type_checking_imports_do_not_count() -> None:
    source = "if TYPE_CHECKING:\n    from diffpost.plot import summary\nfrom diffpost.sde import VE"
    assert not violations(source, "diffpost.score", "diffpost")


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("sample",)])
def test_no_helper_module_brings_in_what_the_core_must_not(name: str) -> None:
    """A module beside the core may serve it, but not smuggle in what stands later in the order."""
    found = reachable(name)
    later = {n for n in found if n in OUTSIDE or ORDER.get(n, -1) > ORDER[name]}
    assert not later, f"{name} reaches {', '.join(sorted(later))}"


def test_no_assert_in_the_library() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert)
    ]
    assert not found, "python -O drops these: " + ", ".join(found)


def test_files_are_short() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}
    long = {str(path): n for path, n in lengths.items() if n >= 500}
    assert not long, f"split these at a seam: {long}"


def test_readme_begins_with_exactly_two_sh_blocks() -> None:
    fences = re.findall(r"^```(.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    languages = fences[::2]
    assert len(fences) % 2 == 0
    assert languages[:2] == ["sh", "sh"]
    assert "sh" not in languages[2:]


def test_importing_diffpost_is_light() -> None:
    heavy = ("matplotlib", "astropy", "caustics", "typer", "rich", "zarr", "xarray", "score_models")
    code = f"import sys, diffpost, diffpost.physics; print(*[m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def test_public_names_resolve() -> None:
    assert len(set(diffpost.__all__)) == len(diffpost.__all__)
    for name in diffpost.__all__:
        assert getattr(diffpost, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = diffpost.no_such_name
    assert set(diffpost.__all__) <= set(dir(diffpost))


def test_every_package_is_shipped() -> None:
    """A wheel holds what pyproject.toml lists, and nothing tells of a folder that was forgotten."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "diffpost").rglob("__init__.py")
    }
    assert found | {"diffpost.kernels"} == set(listed)
