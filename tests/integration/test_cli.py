"""The command line on its own: exit codes, and texts that say what to do."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agents import TOKENWARD, DevAgent, Process, tokenward

GOOD = """
trust_domain = "acme.example"
[environment]
name = "test"
vault_paths = ["secret"]
[vault]
addresses = ["https://vault.acme.example:8200"]
[vault.signing]
key_file = "/etc/tokenward/signing.pem"
[workloads.app]
selectors = ["systemd:unit:app.service"]
exchange = { method = "signed_jwt" }
[workloads.app.credentials.key]
kind = "kv"
path = "secret/app"
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOKENWARD, *arguments], capture_output=True, text=True, timeout=30, check=False)


def checked(directory: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = directory / "tokenward.toml"
    file.write_text(text)
    return run("check", "--config", str(file))


def test_a_good_configuration_is_summed_up(tmp_path: Path) -> None:
    said = checked(tmp_path, GOOD)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.endswith("1 workloads, 1 credentials, 0 warnings\n")


def test_every_mistake_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    bad = GOOD.replace('kind = "kv"', 'knd = "kv"').replace("[vault.signing]", "[vault.sining]")
    said = checked(tmp_path, bad + 'pth = "elsewhere/x"\n')
    assert (said.returncode, said.stdout) == (1, "")
    places = [line.split(": ")[0].rpartition(":")[2] for line in said.stderr.splitlines()]
    assert len(places) >= 3
    assert places == sorted(places, key=int)
    assert "signing" in said.stderr
    assert "kind" in said.stderr


@pytest.mark.parametrize("command", ["check", "run", "vault-setup"])
def test_no_configuration_is_an_error_before_anything_starts(tmp_path: Path, command: str) -> None:
    missing = tmp_path / "nothing.toml"
    said = run(command, "--config", str(missing))
    assert (said.returncode, said.stdout) == (1, "")
    assert str(missing) in said.stderr


def test_warnings_are_shown_and_are_no_failure(tmp_path: Path) -> None:
    said = checked(tmp_path, GOOD.replace("systemd:unit:app.service", "unix:path:/usr/bin/python3"))
    assert said.returncode == 0
    assert said.stdout.startswith("warning: ")
    assert "python" in said.stdout


def test_setting_up_needs_a_token_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "tokenward.toml"
    file.write_text(GOOD.replace('key_file = "/etc/tokenward/signing.pem"', ""))
    said = run("vault-setup", "--config", str(file), "--apply")
    assert said.returncode == 2
    assert "--token-file" in said.stderr


def test_an_agent_whose_signing_key_is_missing_does_not_start(tmp_path: Path) -> None:
    file = tmp_path / "tokenward.toml"
    audit = f'[audit]\nfile = "{tmp_path}/audit.jsonl"\n[listen]\nworkload_socket = "{tmp_path}/s"\n'
    file.write_text(GOOD.replace("/etc/tokenward/signing.pem", f"{tmp_path}/signing.pem") + audit)
    said = run("run", "--config", str(file))
    assert said.returncode == 1
    assert "signing.pem" in said.stderr
    assert "Traceback" not in said.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("arguments", [["get"], ["nonsense"], ["get", "x", "--nope"], ["get", "x", "-o", "xml"]])
def test_usage_errors_exit_with_two(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2


@pytest.fixture(scope="module")
def agent() -> Iterator[DevAgent]:
    with tempfile.TemporaryDirectory(prefix="tw-") as directory, DevAgent(Path(directory) / "dev") as started:
        yield started


def test_watch_prints_a_line_for_each_credential_and_no_value(agent: DevAgent) -> None:
    key = tokenward(agent.workload_socket, "get", "demo-api-key", "--field", "api_key").stdout.strip()
    with Process("--socket", agent.workload_socket, "watch", "demo-api-key", "demo-jwt") as watching:
        lines = [watching.line(), watching.line()]
    assert {json.loads(line)["name"] for line in lines} == {"demo-api-key", "demo-jwt"}
    assert all("values" not in json.loads(line) and key not in line for line in lines)


def test_json_output_has_values_versions_and_times(agent: DevAgent) -> None:
    shown = json.loads(tokenward(agent.workload_socket, "get", "demo-jwt", "-o", "json").stdout)
    assert (shown["name"], shown["kind"], shown["version"], list(shown["values"])) == ("demo-jwt", "jwt", 1, ["token"])
    assert shown["expires_at"] > shown["refresh_at"] > shown["issued_at"]


def test_raw_output_of_several_fields_asks_which(agent: DevAgent) -> None:
    said = tokenward(agent.workload_socket, "get", "demo-x509", "-o", "raw")
    assert said.returncode == 2
    assert "private_key" in said.stderr
