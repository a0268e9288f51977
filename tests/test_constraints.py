"""The locks in constraints/ have every package that is installed, with its hashes."""

from __future__ import annotations

import functools
import json
import re
import runpy
import sys
from importlib import metadata
from pathlib import Path

import pytest
import setuptools
from conftest import REPOSITORY
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

INSTALLED = {
    "cpu": ("build", "cpu", "dev"),
    "cpu, torch with CUDA": ("build", "cpu", "dev", "cuda"),
    "gpu": ("build", "gpu", "dev"),
}
"""Locks that are installed together, by what they are for."""


@functools.cache
def lines(name: str) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a lock, and of those it includes, with its hashes."""
    text = (REPOSITORY / "constraints" / f"{name}.txt").read_text(encoding="utf-8")
    found = []
    for line in text.replace("\\\n", "").splitlines():
        if line.startswith("-r "):
            found += lines(Path(line[3:]).stem)
        elif not line.startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=", line.strip())
            found.append((Requirement(requirement), hashes))
    return found


def locked(names: tuple[str, ...], environment: dict[str, str]) -> dict[str, Version]:
    """The versions that these locks install in an environment; a package has one."""
    versions: dict[str, Version] = {}
    for name in names:
        for requirement, _ in lines(name):
            if requirement.marker is None or requirement.marker.evaluate(environment):
                assert requirement.name not in versions, f"{requirement.name} has two versions"
                (pin,) = requirement.specifier
                assert pin.operator == "=="
                versions[requirement.name] = Version(pin.version)
    return versions


def declared(monkeypatch: pytest.MonkeyPatch, *extras: str) -> list[Requirement]:
    """What setup.py and pyproject.toml require with these extras."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    made = runpy.run_path(str(REPOSITORY / "setup.py"))
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    build = re.search(r"^requires = (.*)$", pyproject, flags=re.MULTILINE)
    assert build
    texts = [*json.loads(build[1]), *made["RUNTIME"]]
    texts += [text for extra in extras for text in made["EXTRAS"][extra]]
    return [Requirement(text) for text in texts]


def missing(
    requirements: list[Requirement], versions: dict[str, Version], environment: dict[str, str]
) -> list[str]:
    """The requirements of an environment that the versions do not meet."""
    return [
        f"{requirement} (locked: {version})"
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate(environment)
        if (version := versions.get(canonicalize_name(requirement.name))) is None
        or version not in requirement.specifier
    ]


@pytest.mark.parametrize("name", ["build", "base", "cuda", "torch-cpu", "cpu", "gpu", "dev"])
def test_every_line_has_hashes(name: str) -> None:
    entries = lines(name)
    assert entries
    for requirement, hashes in entries:
        assert hashes, requirement
        for digest in hashes:
            assert re.fullmatch("sha256:[0-9a-f]{64}", digest), requirement


def test_torch_has_one_version() -> None:
    """Its CPU build is installed first, and the other requirements take it as theirs."""
    ((cpu_build, _),) = lines("torch-cpu")
    (version,) = (line.specifier for line, _ in lines("base") if line.name == "torch")
    assert str(cpu_build.specifier) == f"{version}+cpu"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
@pytest.mark.parametrize("system", ["Linux", "Darwin"])
@pytest.mark.parametrize("names", INSTALLED.values(), ids=INSTALLED)
def test_locks_meet_what_is_declared(
    names: tuple[str, ...], system: str, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_system": system,
        "sys_platform": system.lower(),
        "extra": "",
    }
    device = "gpu" if "gpu" in names else "cpu"
    requirements = declared(monkeypatch, device, "test", "dev")
    versions = locked(names, environment)
    assert not missing(requirements, versions, environment)
    other = {"cpu": "faiss-gpu", "gpu": "faiss-cpu"}[device]
    assert other not in versions, "faiss's two builds overwrite each other's files"


@pytest.mark.skipif(
    Path(sys.prefix) != REPOSITORY / ".venv", reason="these are not the packages of make setup"
)
def test_what_is_installed_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them, and what they require in turn."""
    try:
        metadata.version("faiss-gpu")
        device = "gpu"
    except metadata.PackageNotFoundError:
        device = "cpu"
    environment = {**default_environment(), "extra": ""}
    versions = locked(INSTALLED[device], environment)
    cuda = locked(("cuda",), environment)
    waiting = declared(monkeypatch, device, "test", "dev")
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        # A CPU build of torch (2.13.0+cpu) requires none of CUDA's libraries.
        assert not missing([requirement], {**cuda, **versions}, environment)
        found = Version(metadata.version(name)).public
        assert found == str({**cuda, **versions}[name]), name
        for text in metadata.requires(name) or []:
            of_it = Requirement(text)
            if of_it.marker is None or any(
                of_it.marker.evaluate({**environment, "extra": extra})
                for extra in ("", *requirement.extras)
            ):
                of_it.marker = None
                waiting.append(of_it)
