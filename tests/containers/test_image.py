"""The image of the Dockerfile: small, nobody's but the agent's, and without what was only needed to build it."""

from __future__ import annotations

import json

import pytest

from tests.containers.engine import Engine

_MAX_BYTES = 200_000_000


@pytest.fixture(scope="module")
def about(engine: Engine) -> dict[str, object]:
    return engine.inspect(engine.image)


def test_it_is_small_enough(about: dict[str, object]) -> None:
    assert isinstance(about["Size"], int)
    assert about["Size"] < _MAX_BYTES


def test_it_runs_as_nobody_in_particular_and_asks_itself_how_it_is(engine: Engine) -> None:
    config = engine.inspect(engine.image)["Config"]
    assert config["User"] == "65532:65532"
    assert (config["Entrypoint"], config["Cmd"]) == (["tokenward"], ["run"])
    labels = {key.rpartition(".")[2] for key in config["Labels"] if key.startswith("org.opencontainers.image.")}
    assert {"title", "description", "licenses", "version", "revision"} <= labels
    history = json.dumps(engine.inspect(engine.image))
    assert '"health", "--live"' in history


def test_what_only_the_build_needed_is_not_in_it(engine: Engine) -> None:
    program = (
        "import importlib.util, json, os, shutil, tokenward.assembly, tokenward.validation.postgresql, psycopg\n"
        "found = [p for p in ('cc', 'gcc', 'ld', 'make', 'pip', 'pip3', 'curl') if shutil.which(p)]\n"
        "found += [m for m in ('pip', 'hatchling', 'pytest') if importlib.util.find_spec(m)]\n"
        "print(json.dumps(found + [p for p in ('/build', '/wheels') if os.path.exists(p)]))"
    )
    assert json.loads(engine.once("python3", "-c", program)) == []


def test_the_agents_directories_are_its_own_and_its_code_is_not(engine: Engine) -> None:
    program = (
        "import os, tokenward\n"
        "for p in ('/run/tokenward', '/var/lib/tokenward', '/var/log/tokenward', tokenward.__file__):\n"
        "    s = os.stat(p); print(p if p[0:4] != '/opt' else 'code', s.st_uid, oct(s.st_mode & 0o777))"
    )
    assert engine.once("python3", "-c", program).splitlines() == [
        "/run/tokenward 65532 0o755",
        "/var/lib/tokenward 65532 0o700",
        "/var/log/tokenward 65532 0o700",
        "code 0 0o644",
    ]
