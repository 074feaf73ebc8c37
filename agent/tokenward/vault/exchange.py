"""`Exchange`: proves a workload to the vault, and calls it with exactly that workload's rights.

Owns the three ways of proof (design section 7) and the tokens that stand for workloads. Leaves to `issuers` what is
asked, and to `login` how the agent itself logs in. Invariants: no call for a workload goes out with the agent's rights;
where the call makes no lease and the vault can, no token exists at all (inline authentication); a token made by `login`
is the caller's alone, so that revoking it ends what was made with it and nothing else.

A JWT says of a workload what its configuration says: its SPIFFE ID and its own selectors. That they hold for a process
was proved when the process asked; a refresh in the background has no process to ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar, assert_never

from tokenward.core.identity import Selector
from tokenward.core.model import (
    AnyExchange,
    Exchanged,
    Instant,
    PlatformJwt,
    SignedJwt,
    TokenRole,
    VaultToken,
    Workload,
)
from tokenward.core.secret import Secret
from tokenward.errors import NotFoundError, Reason, VaultDeniedError
from tokenward.vault.client import InlineAuth, Refusal, Reply, VaultClient, VaultRequest, refusal_of
from tokenward.vault.keeper import NoData, TokenKeeper, renew_token, revoke_token
from tokenward.vault.login import AgentSession, read_token, refused_login
from tokenward.vault.reply import LOGIN_REFUSALS
from tokenward.vault.signer import Signer

T = TypeVar("T")


class Exchange:
    """Calls the vault as a workload, or as the agent.

    `signer` and `audience` are for workloads proved by `signed_jwt`, `session` for `token_role` and for `agent_call`.
    `inline` says that the vault has inline authentication (OpenBao has, HashiCorp Vault has not).
    """

    def __init__(
        self, *, client: VaultClient, session: AgentSession | None, signer: Signer | None, audience: str, inline: bool
    ) -> None:
        self._client = client
        self._session = session
        self._signer = signer
        self._audience = audience
        self._inline = inline
        self._kept: dict[str, tuple[Workload, TokenKeeper]] = {}

    async def call(
        self, workload: Workload, request: VaultRequest, *, into: type[T], now: Instant
    ) -> tuple[Reply[T], Exchanged]:
        """Performs `request`, which makes no lease, with exactly the rights of `workload`.

        Raises what `VaultClient.call` raises; VaultDeniedError with LOGIN_FAILED when the workload could not be proved.
        """
        proof = workload.exchange
        if self._inline and not isinstance(proof, TokenRole):
            auth = InlineAuth(_login_path(proof), {"role": proof.role, "jwt": self._jwt(workload, proof, now)})
            try:
                reply = await self._client.call(request, into=into, auth=auth)
            except VaultDeniedError as error:
                if refusal_of(error) in _LOGIN_REFUSALS:
                    raise refused_login(error, who=workload.name, path=auth.path) from error
                raise
            return reply, _exchanged(workload, reply.request_id, accessor="")
        reply, token = await self._keeper(workload).call(request, into=into, now=now)
        return reply, _exchanged(workload, reply.request_id, accessor=token.accessor)

    async def login(self, workload: Workload, *, now: Instant) -> tuple[VaultToken, Exchanged]:
        """A fresh token of `workload` for one lease. It is the caller's to revoke.

        Raises VaultDeniedError with LOGIN_FAILED, VaultUnavailableError, VaultBadReplyError.
        """
        proof = workload.exchange
        path = _login_path(proof)
        try:
            if isinstance(proof, TokenRole):
                reply, token = await self._child(path, workload, now)
            else:
                body = {"role": proof.role, "jwt": self._jwt(workload, proof, now)}
                reply = await self._client.call(VaultRequest("POST", path, body), into=NoData)
                token = reply.require_auth().held_from(now)
        except (VaultDeniedError, NotFoundError) as error:
            if error.reason is Reason.LOGIN_FAILED:
                raise
            raise refused_login(error, who=workload.name, path=path) from error
        if _ALL_RIGHTS in (reply.require_auth().policies or ()):
            await self.revoke(token)
            text = f"the vault gave {workload.name} a token with all rights at {path}, which is refused: mend the role"
            raise VaultDeniedError(Reason.LOGIN_FAILED, text)
        return token, _exchanged(workload, reply.request_id, accessor=token.accessor)

    async def agent_call(self, request: VaultRequest, *, into: type[T], now: Instant) -> Reply[T]:
        """Performs `request` with the agent's own rights: for what no workload may do, such as signing a JWT."""
        reply, _ = await self._own_session().call(request, into=into, now=now)
        return reply

    async def renew(self, token: VaultToken, increment_s: float, *, now: Instant) -> VaultToken:
        """`token` with `increment_s` seconds from now, or as much as its maximum leaves. Raises VaultDeniedError."""
        return await renew_token(self._client, token, now=now, increment_s=increment_s)

    async def revoke(self, token: VaultToken) -> None:
        """Ends `token` and every lease made with it. Raises TokenwardError when it may still be alive."""
        await revoke_token(self._client, token)

    async def revoke_accessor(self, accessor: str, *, now: Instant) -> None:
        """Ends the token with this accessor, of which nothing else is known, and every lease made with it.

        Needs the agent's own login. Raises TokenwardError when the token may still be alive.
        """
        body = {"accessor": accessor}
        try:
            await self.agent_call(VaultRequest("POST", "auth/token/revoke-accessor", body), into=NoData, now=now)
        except NotFoundError:
            return  # it has ended already

    def forget(self, workload: str) -> VaultToken | None:
        """Lets go of the token that is kept for `workload`; it is the caller's to revoke now."""
        _, keeper = self._kept.pop(workload, (None, None))
        return keeper.let_go() if keeper is not None else None

    # -- within ---------------------------------------------------------------------------------------------------

    def _keeper(self, workload: Workload) -> TokenKeeper:
        """The keeper of this workload's token; one whose proof was configured anew starts again."""
        known = self._kept.get(workload.name)
        if known is not None and _same_proof(known[0], workload):
            return known[1]
        keeper = TokenKeeper(client=self._client, source=_WorkloadLogin(self, workload))
        self._kept[workload.name] = (workload, keeper)
        return keeper

    def _own_session(self) -> AgentSession:
        if self._session is None:
            raise VaultDeniedError(Reason.LOGIN_FAILED, "the agent has no login of its own: configure vault.login")
        return self._session

    async def _child(self, path: str, workload: Workload, now: Instant) -> tuple[Reply[NoData], VaultToken]:
        """A child of the agent's token, with the SPIFFE ID as entity alias and the selectors as metadata.

        It ends with its parent, which the vault's word on its life leaves out; nor does a renewal see that the agent
        has another token by then. So its life is cut to its parent's, and it is replaced instead of renewed.
        """
        alias, meta = str(workload.spiffe_id), claims_of(workload.selectors)
        body = {"entity_alias": alias, "display_name": workload.name, "meta": meta}
        create = VaultRequest("POST", path, body, repeatable=False)
        reply, parent = await self._own_session().call(create, into=NoData, now=now)
        auth = reply.require_auth()
        token = auth.held_from(now)
        if not auth.orphan:
            ends = min((end for end in (token.expires_mono, parent.expires_mono) if end is not None), default=None)
            token = replace(token, expires_mono=ends, renewable=False)
        return reply, token

    def _jwt(self, workload: Workload, proof: SignedJwt | PlatformJwt, now: Instant) -> Secret:
        if isinstance(proof, PlatformJwt):
            return read_token(proof.token_file)
        if self._signer is None:
            raise VaultDeniedError(Reason.LOGIN_FAILED, "signed_jwt needs a signing key: configure one for the agent")
        subject, claims = str(workload.spiffe_id), claims_of(workload.selectors)
        return self._signer.sign(subject=subject, audience=self._audience, claims=claims, now=now)


class _WorkloadLogin:
    """The `TokenSource` of one workload."""

    def __init__(self, exchange: Exchange, workload: Workload) -> None:
        self._exchange = exchange
        self._workload = workload

    async def obtain(self, now: Instant) -> VaultToken:
        token, _ = await self._exchange.login(self._workload, now=now)
        return token


_ALL_RIGHTS = "root"
"""The policy that allows everything. What else a role gives is the vault's to say."""

# An auth method that is not mounted answers as an unknown token does; inline there is no token.
_LOGIN_REFUSALS = LOGIN_REFUSALS | {Refusal.BAD_TOKEN}


def claims_of(selectors: Iterable[Selector]) -> dict[str, str]:
    """The claims that state `selectors`, for the JWT and for the role that binds them: `unix:uid:7` is `unix_uid: "7"`.

    Several of one kind (supplementary groups) become one claim, their values sorted and joined by commas: a list would
    be satisfied by any one of them.
    """
    values: dict[str, list[str]] = {}
    for selector in sorted(selectors):
        values.setdefault(selector.kind.replace(":", "_").replace("-", "_"), []).append(selector.value)
    return {name: ",".join(found) for name, found in values.items()}


def _login_path(proof: AnyExchange) -> str:
    match proof:
        case SignedJwt() | PlatformJwt():
            return f"auth/{proof.mount}/login"
        case TokenRole():
            return f"auth/token/create/{proof.role}"
        case _:
            assert_never(proof)


def _same_proof(one: Workload, other: Workload) -> bool:
    proof = (other.exchange, other.spiffe_id, other.selectors)
    return (one.exchange, one.spiffe_id, one.selectors) == proof


def _exchanged(workload: Workload, request_id: str, *, accessor: str) -> Exchanged:
    return Exchanged(
        method=workload.exchange.method,
        role=workload.exchange.role,
        vault_request_id=request_id,
        accessor=accessor,
    )
