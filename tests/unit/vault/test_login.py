"""Token files, and what a login says when it fails. The methods themselves are tried on a real OpenBao."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fakes import vault as fake
from tests.fakes.vault import FakeVault, serving
from tests.making import instant
from tokenward.config import AppRoleLogin, JwtLogin, TokenLogin
from tokenward.errors import Reason, VaultDeniedError, VaultUnavailableError
from tokenward.vault.client import VaultClient
from tokenward.vault.login import AgentSession, read_token


def test_a_token_file_is_read_without_its_white_space(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(" a.b.c \n")
    assert read_token(str(tmp_path / "token")).reveal() == "a.b.c"


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"a\nb", b"\xff\xfe", b"x" * 65_537])
def test_a_file_that_does_not_hold_one_token_is_refused_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    with pytest.raises(VaultUnavailableError, match="does not hold one token") as caught:
        read_token(str(tmp_path / "token"))
    assert caught.value.reason is Reason.LOGIN_FAILED
    assert "words" not in str(caught.value)


def test_what_is_no_file_does_not_hold_up_the_agent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(VaultUnavailableError, match="not a regular file"):
            read_token(str(path))
    with pytest.raises(VaultUnavailableError, match="No such file"):
        read_token(str(tmp_path / "missing"))


async def test_a_rotated_token_file_is_read_anew_at_the_next_login(tmp_path: Path) -> None:
    """The kubelet swaps the symlink `..data`; a descriptor that was kept would see the old token for ever."""
    for number in (1, 2):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}" / "token").write_text(f"jwt.{number}.x")
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "token").symlink_to("..data/token")
    with serving(FakeVault(roles={"agent": ()}), socket_path=str(tmp_path / "vault.sock")) as vault:
        client = VaultClient(addresses=[vault.address], timeout_s=5.0)
        session = AgentSession(client=client, login=JwtLogin(role="agent", token_file=str(tmp_path / "token")))
        await session.token(instant(0))
        (tmp_path / "..new").symlink_to("v2")
        (tmp_path / "..new").rename(tmp_path / "..data")
        session.forget()
        await session.token(instant(0))
        await client.close()
        assert [seen.body.count(b"jwt.2.x") for seen in vault.asked_for("auth/jwt/login")] == [0, 1]


async def refused(tmp_path: Path, login: JwtLogin | TokenLogin | AppRoleLogin, *lies: fake.Lie) -> VaultDeniedError:
    (tmp_path / "token").write_text("s3cret")
    with serving(FakeVault(), socket_path=str(tmp_path / "vault.sock")) as vault:
        vault.lies.extend(lies)
        client = VaultClient(addresses=[vault.address], timeout_s=5.0)
        with pytest.raises(VaultDeniedError) as caught:
            await AgentSession(client=client, login=login).token(instant(0))
        await client.close()
    assert caught.value.reason is Reason.LOGIN_FAILED
    assert "s3cret" not in str(caught.value)
    return caught.value


async def test_a_refused_login_names_its_path_and_what_to_do(tmp_path: Path) -> None:
    login = JwtLogin(role="agent", token_file=str(tmp_path / "token"))
    error = await refused(tmp_path, login, fake.refuses(400, "error validating token: invalid audience (aud) claim: x"))
    assert "auth/jwt/login" in error.public
    assert "bound_audiences" in error.public


async def test_a_mount_that_is_not_there_is_not_called_an_expired_token(tmp_path: Path) -> None:
    login = JwtLogin(role="agent", token_file=str(tmp_path / "token"), mount="elsewhere")
    error = await refused(tmp_path, login, fake.refuses(403, fake.NO_TOKEN))
    assert "auth/elsewhere/login" in error.public
    assert "check the mount's name" in error.public


async def test_a_jwt_login_without_file_and_key_says_so(tmp_path: Path) -> None:
    assert "neither a token_file nor a key" in (await refused(tmp_path, JwtLogin(role="agent"))).public


async def test_a_development_token_that_is_unknown_names_its_file(tmp_path: Path) -> None:
    path = str(tmp_path / "token")
    assert path in (await refused(tmp_path, TokenLogin(token_file=path))).public


async def test_a_development_token_is_not_revoked_at_the_end(tmp_path: Path) -> None:
    with serving(FakeVault(), socket_path=str(tmp_path / "vault.sock")) as vault:
        (tmp_path / "token").write_text(vault.new_token(()))
        client = VaultClient(addresses=[vault.address], timeout_s=5.0)
        session = AgentSession(client=client, login=TokenLogin(token_file=str(tmp_path / "token")))
        await session.token(instant(0))
        await session.revoke()
        await client.close()
        assert vault.tokens


@pytest.mark.parametrize(
    "creation_path",
    [
        "auth/approle/role/agent/role-id",
        "secret/data/a",
        "auth/other/role/agent/secret-id",
        "auth/approle/role/a/b/secret-id",
    ],
)
async def test_a_wrapping_token_for_something_else_is_never_unwrapped(tmp_path: Path, creation_path: str) -> None:
    login = AppRoleLogin(role_id="id", wrapped_secret_id_file=str(tmp_path / "token"))
    looked_up = fake.says(200, {"data": {"creation_path": creation_path}})
    unwrapped = fake.says(200, {"data": {"secret_id": "s3cret"}})
    error = await refused(tmp_path, login, looked_up, unwrapped)
    assert "something else than a secret id" in error.public
