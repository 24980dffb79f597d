"""Rules that no linter knows: sizes, places, what the contract may import."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("actors", "cluster", "configs", "learner")
MAX_LINES = 400
MAX_COLUMNS = 110
MAX_README_BYTES = 10_000
FOREIGN_PLACES = re.compile(r"(?<![\w.])/(?:home|root|work|opt|Users|mnt)/\w|file:///")


def product_files() -> list[Path]:
    return [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def test_no_file_outgrows_its_job() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in product_files()
    }
    assert len(lengths) > 20
    assert {file: lines for file, lines in lengths.items() if lines > MAX_LINES} == {}


def test_no_line_of_code_is_over_the_columns() -> None:
    """The linter does not count a trailing pragma; a reader does."""
    files = [*product_files(), *(ROOT / "tests").rglob("*.py")]
    wide = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > MAX_COLUMNS
    ]
    assert len(files) > 400
    assert wide == []


def test_the_readmes_are_short_and_narrow() -> None:
    """The root README stays short. A line of prose fits the columns; tables and code may be wider."""
    readmes = [
        ROOT / "README.md",
        *(file for room in (*ROOMS, "infra") for file in (ROOT / room).rglob("README.md")),
    ]
    assert len(readmes) == 6
    assert readmes[0].stat().st_size <= MAX_README_BYTES
    for readme in readmes:
        prose = re.sub(r"^```.*?^```", "", readme.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        lines = [line for line in prose.splitlines() if not line.startswith("|")]
        assert [line for line in lines if len(line) > MAX_COLUMNS] == [], readme


def test_tests_have_no_packages_that_shadow_the_rooms() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert [
        folder.name for folder in (ROOT / "tests").rglob("*") if folder.is_dir() and folder.name in ROOMS
    ] == []


def test_every_room_is_a_regular_package() -> None:
    folders = {file.parent for file in product_files()}
    assert [
        str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()
    ] == []


def test_no_file_names_a_place_on_one_machine() -> None:
    texts = [
        *product_files(),
        *(ROOT / "configs").glob("*.yaml"),
        *(ROOT / "infra").rglob("*.*"),
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
    ]
    found = {
        str(file.relative_to(ROOT)): match[0]
        for file in texts
        if (match := FOREIGN_PLACES.search(file.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_the_values_import_the_standard_library_and_numpy_only() -> None:
    tree = ast.parse((ROOT / "actors" / "types.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) == {"numpy"}


def test_the_locks_pin_every_line_with_a_hash_and_leave_out_what_breaks() -> None:
    for variant, excluded in (("cpu", "exclude.txt"), ("gpu", "exclude-gpu.txt")):
        text = (ROOT / "infra" / "locks" / f"{variant}.lock").read_text(encoding="utf-8")
        pins = re.findall(
            r"^([a-z0-9][\w.-]*)(?:\[[\w,-]+\])?==\S+(?: ;[^\\\n]*)?( \\\n    --hash=sha256:)?",
            text,
            re.MULTILINE,
        )
        assert len(pins) > 100
        assert [name for name, hashed in pins if not hashed] == []
        left_out = (ROOT / "infra" / "locks" / excluded).read_text(encoding="utf-8").split()
        assert {name for name, _ in pins} & set(left_out) == set()
