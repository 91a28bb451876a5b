"""The house keeps its walls: `inn` <- `pipeline` <- cli, and nothing goes back."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INN_MAY_IMPORT = {"inn", "torch", "numpy", "safetensors"}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "pipeline",
    "inn",
    "deploy",
    "tests",
    "notebooks",
    "LICENSE",
    "Makefile",
    ".gitignore",
    ".ci",
}


def imported_modules(path: Path) -> set[str]:
    """Full names of the modules that a source file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            # `from pipeline import cli` imports pipeline.cli.
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "inn").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_inn_imports_only_what_a_network_needs(path):
    packages = {name.partition(".")[0] for name in imported_modules(path)}
    assert packages <= INN_MAY_IMPORT | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "pipeline").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_nothing_imports_the_command_line(path):
    names = imported_modules(path)
    assert not any(name == "pipeline.cli" or name.startswith("pipeline.cli.") for name in names)
    packages = {name.partition(".")[0] for name in names}
    assert not packages & {"tests", "notebooks", "deploy"}


def test_top_level_holds_what_the_design_names_and_no_more():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is unknown")
    import subprocess

    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name.partition("/")[0] for name in tracked} <= TOP_LEVEL


def test_deploy_holds_data_only():
    assert not list((ROOT / "deploy").rglob("*.py"))
