"""Where things stand: a room imports what is on lower floors, no file imports itself by way of
others, and the list of rooms in docs/design.md is that of the tree."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import REPOSITORY

FLOORS = (
    "kernels",
    "errors",
    "atomic bounds named_code own_files provenance text",
    "csv_file json_file terminal",
    "verified_json progress",
    "parallel",
    "structure losses",
    "config_json",
    "config",
    "recipes",
    "model",
    "data.homeware",
    "data.shardset",
    "data.picture",
    "data.build",
    "data.read",
    "data.remote",
    "data.location",
    "data.staging",
    "retrieval",
    "run",
    "train.signals",
    "train.checkpoints",
    "train",
    "results",
    "gallery",
    "serve",
    "cluster",
    "bench parity reproduce",
    "doctor",
    "api",
    "cli",
    "launchers",
)
"""From the bottom up, without `namr_dist.`; a room may import those above it in this list, and its
own files."""
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def _files() -> dict[str, Path]:
    """Module → file, kernels/ and launchers/ by the names under which they are installed."""
    files = {}
    for folder, prefix in (
        ("namr_dist", ""),
        ("kernels", "namr_dist."),
        ("launchers", "namr_dist."),
    ):
        for path in (REPOSITORY / folder).rglob("*.py"):
            module = prefix + ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            files[module.removesuffix(".__init__")] = path
    return files


FILES = _files()


def _imports(module: str) -> set[str]:
    """The package's modules that a file imports, at its top or within a function."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = (
                package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            )
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in FILES else source
                for alias in node.names
            }
    return (names & FILES.keys()) - {module}


def _room(module: str) -> str:
    """The room of the longest name that a module's name begins with."""
    name = module.removeprefix("namr_dist.")
    return max(
        (room for room in ROOMS if name == room or name.startswith(f"{room}.")),
        key=len,
        default=name,
    )


IMPORTS = {module: _imports(module) for module in FILES}
# What the package offers, it imports once that is asked for.
assert IMPORTS.pop("namr_dist") == {"namr_dist.api"}


def test_nothing_imports_upwards() -> None:
    upwards = {
        f"{module} → {other}"
        for module, others in IMPORTS.items()
        for other in others - {"namr_dist"}
        if _room(other) != _room(module) and ROOMS[_room(other)] >= ROOMS[_room(module)]
    }
    assert not upwards


def test_names_of_test_files_are_unique() -> None:
    """Ranks in processes of their own import a test's functions by the name of its file alone."""
    names = [path.name for path in (REPOSITORY / "tests").rglob("*.py")]
    assert not {name for name in names if names.count(name) > 1}


def test_every_file_has_a_room() -> None:
    code = {module for module, path in FILES.items() if _has_code(path)} - {"namr_dist"}
    assert not {module for module in code if _room(module) not in ROOMS}


def test_the_design_page_knows_every_room_and_no_file_that_is_gone() -> None:
    page = (REPOSITORY / "docs" / "design.md").read_text()
    table = page[: page.index("## What is added")]
    named = set(re.findall(r"`([\w/.]+?)/?`", table))
    rooms = {room.removeprefix("train.").replace(".", "/") for room in ROOMS}
    assert not {room for room in rooms if not {room, f"{room}.py"} & named}
    files = {path.name for path in FILES.values()} | {Path(__file__).name}
    assert not {name for name in named if name.endswith(".py") and Path(name).name not in files}


def test_whatever_is_printed_is_made_harmless() -> None:
    """Names and errors of others reach a terminal by text.py and terminal.py alone; JSON has
    escapes of its own."""
    rooms = {module for module in FILES if not module.startswith("namr_dist.kernels")}
    raw = {
        f"{module}: {ast.unparse(node)}"
        for module in rooms
        for node in ast.walk(ast.parse(FILES[module].read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and not _is_json(node)
    }
    assert (
        raw
        == {
            "namr_dist.cli.shards: print(staged.folder)",  # for a shell's $(…), which takes it as it is
            "namr_dist.train.watchdog: print(cursor + printable(text, keep='\\n'), file=sys.stderr, flush=True)",
            "namr_dist.launchers.hostfile: print('\\n'.join(_lines(parser.parse_args())))",  # for a shell
        }
    )
    consoles = {
        module
        for module in rooms
        if re.search(r"from rich\.console import .*\bConsole\b", FILES[module].read_text())
    }
    assert not consoles


def _is_json(node: ast.Call) -> bool:
    return ast.unparse(node.args[0]).startswith("json.dumps(")


def _has_code(path: Path) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


def test_no_import_comes_back() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_the_checks_see_what_they_should() -> None:
    assert "namr_dist.kernels.dispatch" in IMPORTS["namr_dist.kernels.triplet"]  # relative
    assert "namr_dist.train.signals" in IMPORTS["namr_dist.cli.main"]  # within a function
    assert (
        _room("namr_dist.data.build.formats.sop") == "data.build"
        and _room("namr_dist.train.state") == "train"
    )
