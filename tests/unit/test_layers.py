"""The house: imports go down only, and the core touches nothing of the world."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "agent" / "tokenward"
OF_THE_WORLD = {"asyncio", "socket", "os", "time", "random", "logging", "grpc", "threading", "subprocess", "urllib3"}

# Each room may use those below it, and its own.
LADDER = (
    {"errors", "core"},
    {"clock", "v1", "logs", "hardening", "health"},
    {"config", "auditlog", "attest", "client"},
    {"vault", "revoker", "handover", "statefile", "presence"},
    {"watchers", "validation"},
    {"issuers"},
    {"fetcher"},
    {"broker"},
    {"operations"},
    {"serve", "refresher"},
    {"assembly"},
    {"succession"},
    {"daemon"},
    {"dev", "admincli"},
    {"cli"},
)
RUNG = {room: number for number, rooms in enumerate(LADDER) for room in rooms}
# Neighbours on one rung do not know each other, except where one is made of the other's values.
NEIGHBOURS = {("core", "errors")}


def modules() -> list[Path]:
    return [path for path in PACKAGE.rglob("*.py") if "v1" not in path.parts and path.name != "__main__.py"]


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.update({node.module, *(f"{node.module}.{alias.name}" for alias in node.names)})
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    used = {name.split(".")[1] for name in imports(path) if name.startswith("tokenward.")} & RUNG.keys()
    wrong = {
        other
        for other in used - {room}
        if RUNG[other] > RUNG[room] or (RUNG[other] == RUNG[room] and (room, other) not in NEIGHBOURS)
    }
    assert not wrong, f"{room} must not import {wrong}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "core").glob("*.py")), ids=lambda path: path.name)
def test_the_core_touches_nothing_of_the_world(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & OF_THE_WORLD


def test_every_room_is_on_the_ladder() -> None:
    assert {room_of(path) for path in modules()} - {"__init__"} == RUNG.keys() - {"v1"}


def test_http_is_spoken_to_the_vault_in_one_place_and_to_those_who_validate_in_another() -> None:
    users = {
        str(path.relative_to(PACKAGE))
        for path in modules()
        if {name.split(".")[0] for name in imports(path)} & {"urllib3", "requests", "hvac", "httpx"}
    }
    assert users == {"vault/transport.py", "vault/connections.py", "validation/http.py"}
