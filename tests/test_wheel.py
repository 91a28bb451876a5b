"""The wheel that users install: exactly the two packages with their data, and a command that runs."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    # --no-isolation: the build backend is a development dependency already.
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (path,) = out.glob("flarefield-*.whl")
    return path


def package_files() -> set[str]:
    tracked = subprocess.run(
        ["git", "ls-files", "inn", "pipeline"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return set(tracked)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: what is tracked is unknown")
def test_wheel_holds_exactly_the_two_packages_and_their_data(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    packaged = {name for name in names if not name.partition("/")[0].endswith(".dist-info")}
    assert {name.partition("/")[0] for name in packaged} == {"inn", "pipeline"}
    assert packaged == package_files()


def test_command_runs_from_the_wheel(wheel, tmp_path):
    # A new environment that sees this one's dependencies but not its editable install.
    place = tmp_path / "environment"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)],
        check=True,
    )
    site = next((place / "lib").glob("python*/site-packages"))
    dependencies = [p for p in sys.path if p.endswith("site-packages")]
    # Directories on PYTHONPATH are searched without their .pth files, so the editable install stays unseen.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *dependencies])}
    shown = subprocess.run(
        [place / "bin" / "flarefield", "--help"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    )
    for command in ("ingest", "invert", "demo", "train", "import-weights"):
        assert command in shown.stdout
    where = subprocess.run(
        [python, "-c", "import inn, pipeline; print(inn.__file__, pipeline.__file__)"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=True,
    ).stdout.split()
    assert all(str(site) in path for path in where)
