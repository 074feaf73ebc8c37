"""Wheels without an index: what is installed here, packed again for a pip in a machine without a network."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

import tokenward

_OF_AN_INSTALLATION = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}


def pack(directory: Path, *extras: str) -> None:
    """Puts a wheel of tokenward and of all that it needs with `extras` into `directory`."""
    pack_tokenward(directory, version=distribution("tokenward").version)
    for found in _needed("tokenward", frozenset(extras)).values():
        _pack_installed(directory, found)


def pack_tokenward(directory: Path, *, version: str) -> None:
    """A wheel of tokenward as it is in the source tree, under any version."""
    package, found = Path(tokenward.__file__).parent, distribution("tokenward")
    files = {
        f"tokenward/{path.relative_to(package)}": path.read_bytes()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    info = f"tokenward-{version}.dist-info"
    metadata = (found.read_text("METADATA") or "").replace(f"\nVersion: {found.version}\n", f"\nVersion: {version}\n")
    files[f"{info}/METADATA"] = metadata.encode()
    files[f"{info}/entry_points.txt"] = (found.read_text("entry_points.txt") or "").encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    _write(directory / f"tokenward-{version}-py3-none-any.whl", files, info)


def _needed(name: str, extras: frozenset[str]) -> dict[str, Distribution]:
    """What `name` with `extras` requires here, and what that requires, by name."""
    found: dict[str, Distribution] = {}
    left = [(name, extras)]
    while left:
        name, extras = left.pop()
        for text in distribution(name).requires or ():
            needed = Requirement(text)
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in (extras or {""})):
                continue
            if needed.name not in found and needed.name != "tokenward":
                found[needed.name] = distribution(needed.name)
                left.append((needed.name, frozenset(needed.extras)))
    return found


def _pack_installed(directory: Path, found: Distribution) -> None:
    files: dict[str, bytes] = {}
    info = ""
    for path in found.files or ():
        if path.parts[0] == ".." or path.suffix == ".pyc" or path.name in _OF_AN_INSTALLATION:
            continue
        files[str(path)] = Path(str(path.locate())).read_bytes()
        if path.name == "METADATA" and path.parts[0].endswith(".dist-info"):
            info = path.parts[0]
    wheel = files[f"{info}/WHEEL"].decode().splitlines()
    tags = [line.removeprefix("Tag: ").strip().split("-") for line in wheel if line.startswith("Tag: ")]
    named = "-".join(".".join(sorted({tag[part] for tag in tags})) for part in range(3))
    _write(directory / f"{info.removesuffix('.dist-info')}-{named}.whl", files, info)


def _write(wheel: Path, files: Mapping[str, bytes], info: str) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")))
