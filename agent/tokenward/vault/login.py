"""`AgentSession`: the agent's own vault token, by the login method of `[vault.login]`.

Owns how each method logs in; `keeper` owns when. Invariants: token files are read anew at every login, because a
kubelet replaces them; a wrapped secret id is looked at before it is unwrapped, unwrapped once and never kept; a token
that the operator gave us is not ours to revoke.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from typing import Annotated, assert_never

import msgspec

from tokenward.config import AppRoleLogin, CertLogin, JwtLogin, KubernetesLogin, Login, TokenLogin
from tokenward.core.model import Instant, VaultToken
from tokenward.core.secret import Secret
from tokenward.errors import NotFoundError, Reason, TokenwardError, VaultDeniedError, VaultUnavailableError
from tokenward.vault.client import Refusal, Seconds, VaultClient, VaultRequest, refusal_of
from tokenward.vault.keeper import NoData, TokenKeeper
from tokenward.vault.signer import Signer

_MAX_TOKEN_BYTES = 64 * 1024
_TOKEN = re.compile(rb"[!-~]+")


class AgentSession(TokenKeeper):
    """Logs in when a token is first needed and keeps it alive. `cert` needs the client to hold the certificate.

    `signer`, `subject` and `audience` are for the `jwt` method without a token file: the agent then vouches for itself.
    """

    def __init__(
        self,
        *,
        client: VaultClient,
        login: Login,
        signer: Signer | None = None,
        subject: str = "",
        audience: str = "",
    ) -> None:
        source = AgentLogin(client=client, login=login, signer=signer, subject=subject, audience=audience)
        super().__init__(client=client, source=source)
        self._is_ours = not isinstance(login, TokenLogin)

    async def revoke(self) -> None:
        """Ends the agent's token and all that hangs on it, unless the operator gave it to us."""
        if self._is_ours:
            await super().revoke()
        else:
            self.forget()


class AgentLogin:
    """The `TokenSource` of the agent: one login each time.

    `obtain` raises VaultDeniedError with LOGIN_FAILED when the vault says no, VaultUnavailableError when it does not
    answer or when a token file cannot be read for now.
    """

    def __init__(
        self, *, client: VaultClient, login: Login, signer: Signer | None, subject: str, audience: str
    ) -> None:
        self._client = client
        self._login = login
        self._signer = signer
        self._subject = subject
        self._audience = audience

    async def obtain(self, now: Instant) -> VaultToken:
        """A token of the agent's own."""
        login = self._login
        match login:
            case JwtLogin() | KubernetesLogin():
                return await self._log_in(login.mount, {"role": login.role, "jwt": self._jwt(login, now)}, now)
            case CertLogin():
                return await self._log_in(login.mount, {"name": login.role}, now)
            case AppRoleLogin():
                secret_id = await self._unwrapped(login)
                proof = {"role_id": login.role_id, "secret_id": secret_id}
                return await self._log_in(login.mount, proof, now, repeatable=False)
            case TokenLogin():
                return await self._given(login, now)
            case _:
                assert_never(login)

    def _jwt(self, login: JwtLogin | KubernetesLogin, now: Instant) -> Secret:
        if login.token_file:
            return read_token(login.token_file)
        if self._signer is None:
            raise VaultDeniedError(Reason.LOGIN_FAILED, "vault.login has neither a token_file nor a key to sign with")
        return self._signer.sign(subject=self._subject, audience=self._audience, claims={}, now=now)

    async def _log_in(
        self, mount: str, proof: Mapping[str, object], now: Instant, *, repeatable: bool = True
    ) -> VaultToken:
        path = f"auth/{mount}/login"
        request = VaultRequest("POST", path, proof, repeatable=repeatable)
        try:
            reply = await self._client.call(request, into=NoData)
        except (VaultDeniedError, NotFoundError) as error:
            raise refused_login(error, who="the agent", path=path) from error
        return reply.require_auth().held_from(now)

    async def _unwrapped(self, login: AppRoleLogin) -> Secret:
        """The secret id, fetched with the wrapping token that an operator left in the file."""
        wrapping = read_token(login.wrapped_secret_id_file)
        where = f"vault.login: {login.wrapped_secret_id_file}"
        try:
            lookup = VaultRequest("POST", "sys/wrapping/lookup", {"token": wrapping})
            looked_up = (await self._client.call(lookup, into=_Wrapping)).require_data()
            expected = rf"(?:[^/]+/)*auth/{re.escape(login.mount)}/role/[^/]+/secret-id"
            if not re.fullmatch(expected, looked_up.creation_path):
                text = f"{where} wraps something else than a secret id of auth/{login.mount}: treat it as an attack"
                raise VaultDeniedError(Reason.LOGIN_FAILED, text)
            # The token as X-Vault-Token: in the body it is refused without a client token.
            unwrap = VaultRequest("POST", "sys/wrapping/unwrap", {}, repeatable=False)
            return (await self._client.call(unwrap, into=_SecretId, auth=wrapping)).require_data().secret_id
        except (VaultDeniedError, NotFoundError) as error:
            if error.reason is Reason.LOGIN_FAILED:
                raise
            raise VaultDeniedError(Reason.LOGIN_FAILED, f"{where}: {Refusal.WRAPPED}") from error

    async def _given(self, login: TokenLogin, now: Instant) -> VaultToken:
        given = read_token(login.token_file)
        try:
            reply = await self._client.call(VaultRequest("GET", "auth/token/lookup-self"), into=_Lookup, auth=given)
        except (VaultDeniedError, NotFoundError) as error:
            text = f"vault.login: the token in {login.token_file} was refused: {refusal_of(error) or 'replace it'}"
            raise VaultDeniedError(Reason.LOGIN_FAILED, text) from error
        found = reply.require_data()
        ends = now.mono + found.ttl if found.ttl else None
        return VaultToken(token=given, accessor=found.accessor, expires_mono=ends, renewable=found.renewable)


class _Wrapping(msgspec.Struct):
    creation_path: str


class _SecretId(msgspec.Struct):
    secret_id: Secret


class _Lookup(msgspec.Struct):
    ttl: Seconds
    accessor: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    renewable: bool = False


def refused_login(error: TokenwardError, *, who: str, path: str) -> VaultDeniedError:
    """The error for a login at `path` that the vault answered with `error`."""
    refusal = refusal_of(error)
    if refusal is None or refusal in {Refusal.BAD_TOKEN, Refusal.POLICY}:  # an unknown mount answers 403, too
        why = "check the mount's name, the role and what it binds, and the vault's audit log"
    else:
        why = refusal
    return VaultDeniedError(Reason.LOGIN_FAILED, f"the vault did not let {who} log in at {path}: {why}")


def read_token(path: str) -> Secret:
    """The token in the file, which is read anew each time. Raises VaultUnavailableError when there is none for now."""
    try:
        # Not blocking: a FIFO in the file's place would hold up the agent for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise VaultUnavailableError(Reason.LOGIN_FAILED, f"{path} is not a regular file")
            content = os.read(fd, _MAX_TOKEN_BYTES + 1).strip()
        finally:
            os.close(fd)
    except OSError as error:
        text = f"the token file {path} cannot be read: {error.strerror}"
        raise VaultUnavailableError(Reason.LOGIN_FAILED, text) from error
    if len(content) > _MAX_TOKEN_BYTES or not _TOKEN.fullmatch(content):
        raise VaultUnavailableError(Reason.LOGIN_FAILED, f"the token file {path} does not hold one token")
    return Secret(content.decode())
