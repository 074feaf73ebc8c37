"""How each figure is taken. Both sides take turns, round by round, so that what disturbs one disturbs the other."""

from __future__ import annotations

import asyncio
import functools
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench import load, rotation
from bench.figures import Figure, Target
from bench.records import is_answered_get, is_request_for
from bench.servers import TOKENWARD, Agent, BenchError, Proxy, Server, get
from bench.site import SECRETS, Site
from bench.unix_http import UnixHttp
from tokenward.client import Client
from tokenward.v1 import credentials_pb2 as pb
from tokenward.vault.embedded import EmbeddedVault

_ROUNDS = 5
_SETTLE_S = 0.5
_COLD = slice(1, 150)
_WARM_UP = slice(150, 200)
_KEPT = slice(200, 1200)
_LIGHT, _HEAVY = 2000, 6000
"""Requests of one run with 1 and with 32 in flight."""
_TOKEN = "auth/token/create"
_METHOD = "/tokenward.v1.CredentialService/GetCredential"
_MIB = 1 << 20
_KIB = 1 << 10


def starting(site: Site) -> Iterator[Figure]:
    """From the start of a process to ready, and what it weighs then."""
    ready: dict[str, list[float]] = {"tokenward": [], "proxy": [], "agent": []}
    weight: dict[str, list[float]] = {"tokenward": [], "proxy": [], "agent": []}
    for number in range(_ROUNDS):
        for kind in ("tokenward", "proxy", "agent"):
            name = f"{kind}-{number}"
            server = site.agent(name, SECRETS[:1]) if kind == "tokenward" else site.proxy(name, mode=kind)
            with server:
                ready[kind].append(server.ready_s())
                time.sleep(_SETTLE_S)
                weight[kind].append(server.resident_bytes() / _MIB)
    yield Figure(
        what="start to ready, with a login at the vault",
        unit="s",
        ours=ready["tokenward"],
        theirs=ready["proxy"],
        target=Target(below=1.0),
    )
    ours = weight["tokenward"]
    yield Figure(what="memory, idle", unit="MiB", ours=ours, theirs=weight["proxy"], target=Target(below=64))
    yield Figure(
        what="memory, idle; beside `bao agent`",
        unit="MiB",
        ours=ours,
        theirs=weight["agent"],
        target=Target(below_theirs=True),
    )


def starting_with_vault() -> Iterator[Figure]:
    """`tokenward dev` to ready, beyond what its vault needs to start."""
    beyond = []
    for _ in range(3):
        with tempfile.TemporaryDirectory(prefix="tokenward-bench-") as made:
            began = time.monotonic()
            with EmbeddedVault(directory=made):
                vault_s = time.monotonic() - began
            place = Path(made)
            command = [TOKENWARD, "dev", "--json", "--dir", str(place / "dev")]
            with Server(place=place, command=command) as server:
                said = place / "log"
                ready_s = server.seconds_until(functools.partial(_says, said, b"workload_socket"))
                beyond.append(ready_s - vault_s)
    what = "`tokenward dev` to ready, beyond its vault's start"
    yield Figure(what=what, unit="s", ours=beyond, target=Target(below=1.0))


def first_fetch(site: Site, agent: Agent, proxy: Proxy) -> Iterator[Figure]:
    """Secrets that were never asked for, on open connections; and the same calls made at the vault itself."""
    vault, through = UnixHttp(site.vault_socket), UnixHttp(proxy.socket)
    as_workload, as_proxy = site.workload_headers(), site.proxy_headers()
    ours, ours_beyond, theirs, theirs_beyond = [], [], [], []
    with agent.channel() as channel:
        fetch = get(channel)
        fetch(SECRETS[0])
        for name in SECRETS[_COLD]:
            path = f"bench/data/{name}"
            took = _took_ms(fetch, name)
            ours.append(took)
            ours_beyond.append(took - _took_ms(vault.call, "GET", path, None, as_workload))
            took = _took_ms(through.call, "GET", path)
            theirs.append(took)
            theirs_beyond.append(took - _took_ms(vault.call, "GET", path, None, as_proxy))
    yield Figure(what="first fetch", unit="ms", ours=ours, theirs=theirs)
    yield Figure(
        what="first fetch, beyond the vault's own time",
        unit="ms",
        ours=ours_beyond,
        theirs=theirs_beyond,
        target=Target(below=5.0),
    )


def cached_gets(site: Site, agent: Agent, proxy: Proxy, scratch: Path) -> Iterator[Figure]:
    """One credential again and again. The proxy caches tokens, which is what its answers here are; it caches no KV
    secret, so the read that ours answers from memory goes on to the vault there: that is the third in each round.

    Raises BenchError unless every answer of ours is in the audit file, and the vault saw what it should of the others.
    """
    name = SECRETS[0]
    ours = load.grpc_target(agent.socket, _METHOD, pb.GetCredentialRequest(name=name).SerializeToString())
    json_type = {"content-type": "application/json"}
    token = load.Target(proxy.socket, f"/v1/{_TOKEN}", json_type, b'{"policies": ["proxy"]}', http1=True)
    secret = load.Target(proxy.socket, f"/v1/bench/data/{name}", http1=True)
    for in_flight, requests in ((1, _LIGHT), (32, _HEAVY)):
        our_runs, token_runs, secret_runs = [], [], []
        for _ in range(_ROUNDS):
            agent.audit.new()
            our_runs.append(load.run(ours, requests=requests, connections=in_flight, scratch=scratch))
            if agent.audit.count(is_answered_get) != requests:
                raise BenchError("not every request to tokenward was answered with a credential")
            site.vault_audit.new()
            token_runs.append(load.run(token, requests=requests, connections=in_flight, scratch=scratch))
            if site.vault_audit.count(is_request_for(_TOKEN)) > 1:
                raise BenchError("the proxy passed requests on to the vault instead of answering from its cache")
            passed = requests // 4
            secret_runs.append(load.run(secret, requests=passed, connections=in_flight, scratch=scratch))
            if site.vault_audit.count(is_request_for(f"bench/data/{name}")) != passed:
                raise BenchError("the proxy did not pass every read of a secret on to the vault")
        yield from _told(f"cached get, {in_flight} in flight", in_flight, our_runs, token_runs)
        what = f"... beside a secret read through the proxy, {in_flight} in flight"
        rates = [run.per_s for run in our_runs], [run.per_s for run in secret_runs]
        yield Figure(what=what, unit="1/s", ours=rates[0], theirs=rates[1])


def _told(name: str, in_flight: int, ours: Sequence[load.Load], theirs: Sequence[load.Load]) -> Iterator[Figure]:
    rates = [run.per_s for run in ours], [run.per_s for run in theirs]
    least = Target(at_least=4000) if in_flight == 32 else None
    yield Figure(what=name, unit="1/s", ours=rates[0], theirs=rates[1], target=least)
    p50s = [run.p50_ms for run in ours], [run.p50_ms for run in theirs]
    yield Figure(what=f"{name}, p50", unit="ms", ours=p50s[0], theirs=p50s[1])
    p99s = [run.p99_ms for run in ours], [run.p99_ms for run in theirs]
    most = Target(below=3.0) if in_flight == 1 else None
    yield Figure(what=f"{name}, p99", unit="ms", ours=p99s[0], theirs=p99s[1], target=most)


def keeping(agent: Agent, proxy: Proxy) -> Iterator[Figure]:
    """What each credential costs that is kept, once the first ones have been; for the proxy, each token.

    To be taken before there was load: memory that load left free would hide it.
    """
    through = UnixHttp(proxy.socket)
    kept = []
    with agent.channel() as channel:
        for server, keep in ((agent, get(channel)), (proxy, functools.partial(_make_token, through))):
            for name in SECRETS[_WARM_UP]:
                keep(name)
            before = server.resident_bytes()
            for name in SECRETS[_KEPT]:
                keep(name)
            kept.append((server.resident_bytes() - before) / len(SECRETS[_KEPT]) / _KIB)
    ours, theirs = kept
    what = "memory per cached credential"
    yield Figure(what=what, unit="KiB", ours=[ours], theirs=[theirs], target=Target(below=4.0))


def reading(agent: Agent) -> Iterator[Figure]:
    """`.value` in an application."""
    with Client(agent.socket) as client:
        handle = client.credential(SECRETS[0])
        handle.value  # noqa: B018 -- the first one waits for the agent
        times = 100_000
        took = [timeit.timeit(lambda: handle.value, number=times) / times * 1e6 for _ in range(_ROUNDS)]
    yield Figure(what="`.value` in the Python client", unit="us", ours=took, target=Target(below=1.0))


def rotating(site: Site, agent: Agent) -> Iterator[Figure]:
    """One new value to everybody who watches."""
    took = asyncio.run(rotation.spread_ms(site, agent, _ROUNDS))
    what = f"one rotation to {rotation.WATCHERS:,} watchers"
    yield Figure(what=what, unit="ms", ours=took, target=Target(below=250.0))


def _took_ms(call: Callable[..., object], *arguments: object) -> float:
    began = time.perf_counter()
    call(*arguments)
    return (time.perf_counter() - began) * 1000


def _make_token(through: UnixHttp, name: str) -> None:
    """A token that the proxy has not been asked for yet; it keeps it."""
    status, answer = through.call("POST", _TOKEN, {"policies": ["proxy"], "display_name": name})
    if status != 200:
        raise BenchError(f"the proxy got no token: {answer.get('errors')}")


def _says(file: Path, text: bytes) -> bool:
    return text in file.read_bytes()
