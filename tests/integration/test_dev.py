"""`tokenward dev`, as a developer meets it: one command, and a process has credentials that another user has not."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import jwt
import pytest
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.agents import TOKENWARD, DevAgent, Process, tokenward
from tokenward.client import Client
from tokenward.core.audit import verify
from tokenward.errors import DeniedError, Reason

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user's process can only be started by root")
NOBODY = 65533


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A short path: sockets have at most 107 bytes of it. Others may pass through to the socket."""
    with tempfile.TemporaryDirectory(prefix="tw-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(scope="module")
def agent(place: Path) -> Iterator[DevAgent]:
    with DevAgent(place / "dev", "--log-level", "debug") as started:
        yield started


@pytest.fixture
def client(agent: DevAgent) -> Iterator[Client]:
    with Client(agent.workload_socket) as opened:
        yield opened


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_first_credential_on_the_command_line(agent: DevAgent) -> None:
    got = tokenward(agent.workload_socket, "get", "demo-api-key", "--field", "api_key")
    assert (got.returncode, got.stdout[:5]) == (0, "demo-"), got.stderr


def test_the_socket_can_come_from_the_environment(agent: DevAgent) -> None:
    got = subprocess.run(
        [TOKENWARD, "get", "demo-api-key", "-o", "raw"],
        env={**os.environ, "TOKENWARD_SOCKET": agent.workload_socket},
        capture_output=True,
        text=True,
        check=True,
    )
    assert got.stdout.startswith("demo-")


def test_whoami_says_who_the_kernel_says(agent: DevAgent) -> None:
    said = json.loads(tokenward(agent.workload_socket, "whoami").stdout)
    assert (said["spiffe_id"], said["workload"]) == ("spiffe://dev.example/demo", "demo")
    assert f"unix:uid:{os.getuid()}" in said["selectors"]
    assert said["credentials"] == {
        "demo-api-key": "kv",
        "demo-jwt": "jwt",
        "demo-vault-token": "vault_token",
        "demo-x509": "x509",
    }


@needs_root
def test_another_user_gets_nothing(agent: DevAgent) -> None:
    refused = tokenward(agent.workload_socket, "get", "demo-api-key", uid=NOBODY)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert Reason.NO_MATCHING_WORKLOAD in refused.stderr
    assert tokenward(agent.workload_socket, "whoami", uid=NOBODY).returncode == 1


@pytest.mark.parametrize("name", ["demo-api", "nothing-like-it", "../demo-api-key", "x" * 5000, ""])
def test_a_name_that_is_not_granted_is_refused_whether_or_not_it_exists(client: Client, name: str) -> None:
    with pytest.raises(DeniedError) as caught:
        client.get(name)
    assert caught.value.reason is Reason.NOT_GRANTED


def test_a_field_that_is_not_there_is_a_usage_error(agent: DevAgent) -> None:
    wrong = tokenward(agent.workload_socket, "get", "demo-vault-token", "--field", "nope")
    assert wrong.returncode == 2
    assert "accessor, token" in wrong.stderr


def test_no_agent_is_unavailable_and_the_text_names_the_socket(place: Path) -> None:
    missing = tokenward(str(place / "none.sock"), "get", "x")
    assert missing.returncode == 3
    assert "none.sock" in missing.stderr


def test_the_jwt_is_for_this_workload_and_audience(client: Client) -> None:
    token = client.get("demo-jwt").values["token"]
    claims = jwt.decode(token, options={"verify_signature": False})
    assert (claims["sub"], claims["aud"]) == ("spiffe://dev.example/demo", ["https://api.example"])


def test_the_certificate_is_for_this_workload(client: Client) -> None:
    values = client.get("demo-x509").values
    leaf = x509.load_pem_x509_certificate(values["certificate_chain"].encode())
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://dev.example/demo"]


def test_the_vault_token_reads_what_its_workload_may_and_nothing_else(client: Client, agent: DevAgent) -> None:
    import hvac
    import requests_unixsocket

    session = requests_unixsocket.Session()  # type: ignore[no-untyped-call]  # it has no types
    url = "http+unix://" + agent.vault_socket.replace("/", "%2F")
    token = client.get("demo-vault-token").values["token"]
    vault = hvac.Client(url=url, session=session, token=token)
    secret = vault.secrets.kv.v2.read_secret_version("api", mount_point="demo", raise_on_deleted_version=True)
    assert secret["data"]["data"]["api_key"] == client.get("demo-api-key").values["api_key"]
    for path in ("sys/policies/acl", "auth/jwt/role", "transit/keys"):
        with pytest.raises(hvac.exceptions.Forbidden):
            vault.list(path)
    session.close()


def test_health_and_reflection_are_those_that_every_grpc_tool_asks_for(agent: DevAgent) -> None:
    with grpc.insecure_channel(f"unix:{agent.workload_socket}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "tokenward.v1.CredentialService", "tokenward.v1.IdentityService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"tokenward.v1.CredentialService", "tokenward.v1.IdentityService", "grpc.health.v1.Health"} <= set(services)


def test_plain_http_gets_a_clear_no(agent: DevAgent) -> None:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(5)
        raw.connect(agent.workload_socket)
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = raw.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 501 ")
    assert b"gRPC" in answer


def test_no_secret_is_anywhere_but_in_memory(client: Client, agent: DevAgent) -> None:
    secrets = [
        value.encode()
        for name in ("demo-api-key", "demo-jwt", "demo-vault-token", "demo-x509")
        for field, value in client.get(name).values.items()
        if field in {"api_key", "token", "accessor", "private_key"}
    ]
    secrets += [line for value in secrets if b"\n" in value for line in value.split(b"\n")[1:-2]]
    assert len(secrets) > 5
    directory = Path(agent.config).parent
    places = {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    places["log"] = agent.log().encode()
    for pid in (agent.pid, *children_of(agent.pid)):
        for name in ("environ", "cmdline"):
            with suppress(PermissionError):  # the agent's environment is closed even to its own user
                places[f"{name} of {pid}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    assert f"cmdline of {agent.pid}" in places
    assert str(directory / "audit.jsonl") in places
    assert "DEBUG" in agent.log()
    found = [where for where, content in places.items() for secret in secrets if secret in content]
    # The accessor of a vault token is no secret: the audit log names it so that an operator can revoke the token.
    accessor = client.get("demo-vault-token").values["accessor"].encode()
    allowed = str(directory / "audit.jsonl")
    assert [where for where in found if not (where == allowed and accessor in places[where])] == []


def test_every_answer_is_in_the_audit_log(client: Client, agent: DevAgent) -> None:
    log = Path(agent.config).parent / "audit.jsonl"
    before = log.read_text().count("\n")
    client.get("demo-api-key")
    with pytest.raises(DeniedError):
        client.get("nope")
    lines = log.read_bytes().splitlines()
    verify(lines)
    got, denied = (json.loads(line)["record"] for line in lines[before:][-2:])
    assert (got["event"], got["credential"], got["version"]) == ("get", "demo-api-key", 1)
    assert (got["peer"]["pid"], got["peer"]["uid"]) == (os.getpid(), os.getuid())
    assert (denied["event"], denied["credential"], denied["outcome"]) == ("get", "nope", "NOT_GRANTED")


def test_a_second_one_in_the_same_place_is_refused(agent: DevAgent) -> None:
    again = tokenward("", "dev", "--dir", str(Path(agent.config).parent))
    assert again.returncode == 1
    assert "another `tokenward dev`" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_end_leaves_no_process_socket_or_file_behind(place: Path, number: signal.Signals) -> None:
    directory = place / "ended"
    with DevAgent(directory) as started:
        children = children_of(started.pid)
        assert children
        assert started.stop(number) == 0
        assert started.log() == ""
    assert not directory.exists()
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def test_the_vault_ends_with_an_agent_that_is_killed(place: Path) -> None:
    with DevAgent(place / "killed") as started:
        children = [os.pidfd_open(child) for child in children_of(started.pid)]
        assert children
        started.stop(signal.SIGKILL)
        for child in children:
            ready, _, _ = select.select([child], [], [], 10)
            assert ready, "the vault outlived its agent"
            os.close(child)
    with DevAgent(place / "killed") as again:
        assert tokenward(again.workload_socket, "get", "demo-api-key").returncode == 0, "it starts over what was left"
    assert list((place / "killed").iterdir()) == []


def test_ready_in_words_says_what_to_try_next(place: Path) -> None:
    with Process("dev", "--dir", str(place / "words")) as started:
        said = [started.line()]
        while "Ctrl-C" not in said[-1]:
            said.append(started.line())
    text = "".join(said)
    assert "First credential: demo-api-key version 1 with the fields api_key" in text
    assert str(place / "words" / "workload.sock") in text
