"""The wheel and the sdist: they install into a fresh environment, and the command runs from any folder.

The environment borrows the locked packages of this one. With ENGRAM_DIST_LOCK=1 it installs the lock itself,
which takes minutes and needs the package index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from configs.reference import PATH
from configs.shipped import FOLDER

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path | None = None, status: int = 0) -> str:
    """Stdout and stderr of a command that must end with ``status``. It does not see this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)
    said = done.stdout + done.stderr
    assert done.returncode == status, f"{' '.join(map(str, command))}\n{said[-4000:]}"
    return said


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def binaries(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment: the locked packages first, then the wheel without
    dependencies."""
    folder = tmp_path_factory.mktemp("fresh")
    if os.environ.get("ENGRAM_DIST_LOCK"):
        (archive,) = dist.glob("*.tar.gz")
        run("tar", "xzf", archive, "--strip-components=1", cwd=folder)
        run("make", "setup", f"PYTHON={sys.executable}", cwd=folder)
    else:
        run(sys.executable, "-m", "venv", "--without-pip", folder / ".venv")
        _lend_packages(folder / ".venv")
    python, (wheel,) = folder / ".venv" / "bin" / "python", dist.glob("*.whl")
    options = ("-q", "--no-deps", "--no-index", "--force-reinstall")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    return python.parent


def _lend_packages(venv: Path) -> None:
    """Show this environment's packages to another one, except Engram itself."""
    (site,) = (venv / "lib").glob("python*/site-packages")
    lent = venv / "lent"
    lent.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "engram" not in entry.name:
            (lent / entry.name).symlink_to(entry)
    (site / "lent.pth").write_text(f"{lent}\n")


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A user's folder with files of the same names as Engram's packages."""
    for name in ("cluster.py", "actors.py", "learner.py", "configs/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise RuntimeError('this is the user's own module')\n")
    (tmp_path / "my_tasks.py").write_text("def build(options): return options\n")
    return tmp_path


def test_the_command_runs_from_any_folder(binaries: Path, crowded: Path) -> None:
    engram = binaries / "engram"
    assert "engram train quickstart" in run(engram, "--help", cwd=crowded)
    assert "name: quickstart\n" in run(engram, "train", "quickstart", "--print-config", cwd=crowded)
    assert "engram probe quickstart --study write" in run(engram, "probe", "--help", cwd=crowded)
    study = ("--study", "write", "--print-config")
    assert "name: quickstart\n" in run(engram, "probe", "quickstart", *study, cwd=crowded)
    mistake = run(engram, "train", "quickstart", "model.name=./none", cwd=crowded, status=2)
    assert mistake.startswith("error: model './none' is no folder here") and mistake.count("\n") == 1
    rows = ("--rows", "tmem,truncation", "--benchmarks", "recall", "--print-config")
    assert "name: quickstart\n" in run(engram, "evaluate", "quickstart", *rows, cwd=crowded)


def test_a_module_of_the_users_folder_is_found_behind_all_others(binaries: Path, crowded: Path) -> None:
    code = """
import cluster.cli, configs.shipped, sys
from configs.user_code import load_extension
build = lambda: load_extension("environment.custom", "my_tasks:build")
cluster.cli.main = lambda: print(build()(3), configs.shipped.FOLDER)
sys.path = [path for path in sys.path if path]  # as in the script, which stands in another folder
cluster.cli.console_script()
"""
    said = run(binaries / "python", "-P", "-c", code, cwd=crowded)
    assert said.startswith("3 ") and str(binaries.parent) in said


def test_the_files_of_the_wheel_are_those_of_the_checkout(binaries: Path, dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    data = {path for kind in ("*.yaml", "*.md") for path in FOLDER.rglob(kind)}
    assert PATH in data and len(data) > 35
    assert {str(path.relative_to(ROOT)) for path in data} <= names
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert packages == {"actors", "cluster", "configs", "learner"}
    code = "import cluster, learner; print(cluster.__file__, learner.__file__)"
    places = run(binaries / "python", "-P", "-c", code).split()
    assert all(place.startswith(str(binaries.parent)) for place in places)


def test_the_sdist_holds_what_a_developer_needs(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert names >= {"Makefile", "pyproject.toml", "infra/locks/cpu.lock", "tests/conftest.py", "README.md"}
    assert not any(name.startswith(("runs", "dist", ".venv")) for name in names)
