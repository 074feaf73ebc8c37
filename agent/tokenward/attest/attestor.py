"""Attestation: turns a peer into the set of selectors that hold for its process.

Owns which facts are read (those that some workload asks for) and that they are all of one process in one state: read
again when it called exec meanwhile, void when it ended. Leaves to `core.policy` what the selectors prove, and to
`caller` how long that counts. What could not be read is reported by selector type, never left out.
"""

from __future__ import annotations

import asyncio
import grp
import pwd
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenward.attest import pods, procfs, systemd
from tokenward.attest.cgroup import Reading, parse_memberships
from tokenward.attest.digests import Digests
from tokenward.attest.peer import Peer, gone
from tokenward.attest.procfs import Executable
from tokenward.core.identity import Selector
from tokenward.core.model import Attestation, Process, Workload
from tokenward.errors import AttestationError, Reason

_TRIES = 3
_PATIENCE_S = 5.0
_IMAGE_KINDS = frozenset({"unix:path", "unix:sha256"})
_CGROUP_KINDS = systemd.KINDS | pods.KINDS
_OTHER_NAMESPACE = (
    "the process is in another pid namespace, where the agent sees only its uid and gid; let both share one "
    "(shareProcessNamespace in a pod), or use unix:uid, k8s:ns and k8s:sa"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """An attestation with what it stands on."""

    attestation: Attestation
    executable: Executable | None
    """What the process ran all the while; None where that could not be read."""
    workloads: tuple[Workload, ...]
    """The workloads whose needs were read for."""
    generation: int


@dataclass(slots=True)
class _Findings:
    """What one look at a process brought, while it is being gathered."""

    selectors: set[Selector]
    unreadable: dict[str, str]
    executable: Executable | None = None
    path: str = ""
    sha256: str = ""

    def add(self, kind: str, value: str) -> None:
        self.selectors.add(Selector(kind, value))

    def take(self, reading: Reading) -> None:
        self.selectors |= reading.selectors
        self.unreadable |= reading.unreadable


class Attestor:
    """Attests peers for a set of workloads.

    `platform` are the selectors that hold for every caller because of where the agent runs, such as `k8s:sa`, and
    `platform_unreadable` says why some of those could not be told. A proof counts for `reattest_s` seconds.
    """

    def __init__(
        self,
        *,
        workloads: Iterable[Workload],
        platform: frozenset[Selector] = frozenset(),
        platform_unreadable: Mapping[str, str] | None = None,
        reattest_s: float = 60.0,
    ) -> None:
        self.reattest_s = reattest_s
        self.generation = 0
        """+1 whenever the workloads change: whoever was proved before is proved again."""
        self._workloads = tuple(workloads)
        self._platform = platform
        self._platform_unreadable = dict(platform_unreadable or {})
        self._digests = Digests()

    def replace(
        self,
        workloads: Iterable[Workload],
        *,
        platform: frozenset[Selector] | None = None,
        platform_unreadable: Mapping[str, str] | None = None,
        reattest_s: float | None = None,
    ) -> None:
        """From now on attests for `workloads` and no others. What else is not given stays as it is."""
        self._workloads = tuple(workloads)
        self._platform = self._platform if platform is None else platform
        if platform_unreadable is not None:
            self._platform_unreadable = dict(platform_unreadable)
        self.reattest_s = self.reattest_s if reattest_s is None else reattest_s
        self.generation += 1

    async def attest(self, peer: Peer) -> Attestation:
        """Everything that some workload needs to know of `peer`, and its path for the record.

        Raises:
            DeniedError: PEER_GONE, the process ended before all was read.
            AttestationError: it could not be read in one state, or not in time.
        """
        return (await self.examine(peer)).attestation

    async def examine(self, peer: Peer) -> Examined:
        """As `attest`, with what the attestation stands on."""
        workloads, generation = self._workloads, self.generation
        try:
            async with asyncio.timeout(_PATIENCE_S):
                findings = await self._settled(peer, workloads)
        except TimeoutError as error:
            raise AttestationError(
                Reason.ATTESTATION_INCOMPLETE,
                f"the calling process could not be examined within {_PATIENCE_S:.0f} seconds; try again",
            ) from error
        process = Process(pid=peer.pid, uid=peer.uid, gid=peer.gid, path=findings.path, sha256=findings.sha256)
        attestation = Attestation(
            process=process, selectors=frozenset(findings.selectors), unreadable=findings.unreadable
        )
        return Examined(
            attestation=attestation,
            executable=findings.executable,
            workloads=workloads,
            generation=generation,
        )

    async def _settled(self, peer: Peer, workloads: tuple[Workload, ...]) -> _Findings:
        """Findings of a process that ran the same executable from before the first reading until after the last."""
        for _ in range(_TRIES):
            findings = await self._look(peer, workloads)
            same = peer.pid == 0 or procfs.executable(peer.pid) == findings.executable
            if not peer.is_alive():  # asked last: until here the pid belonged to the process that connected
                raise gone()
            if same:
                return findings
        raise AttestationError(
            Reason.ATTESTATION_INCOMPLETE, "the calling process keeps changing its executable; try again"
        )

    async def _look(self, peer: Peer, workloads: tuple[Workload, ...]) -> _Findings:
        kinds = frozenset(selector.kind for workload in workloads for selector in workload.selectors)
        findings = _Findings(set(self._platform), dict(self._platform_unreadable))
        _read_socket(peer, kinds, findings)
        await asyncio.to_thread(_read_system, peer, kinds, findings)
        if findings.executable is not None and _would_match_by_hash(workloads, findings):
            try:
                findings.sha256 = await self._digests.of(peer.pid, findings.executable)
                findings.add("unix:sha256", findings.sha256)
            except AttestationError as error:
                findings.unreadable["unix:sha256"] = error.public
        return findings


def _read_socket(peer: Peer, kinds: frozenset[str], findings: _Findings) -> None:
    """What the kernel said when the connection was made."""
    findings.add("unix:uid", str(peer.uid))
    findings.add("unix:gid", str(peer.gid))
    for gid in peer.groups:
        findings.add("unix:supplementary_gid", str(gid))
    if peer.label:
        findings.add("lsm:label", peer.label)
    elif "lsm:label" in kinds:
        findings.unreadable["lsm:label"] = "the kernel gives no security label for sockets (SO_PEERSEC)"


def _read_system(peer: Peer, kinds: frozenset[str], findings: _Findings) -> None:
    """What the user database and /proc say. May block, so it runs in a thread."""
    # Names are looked up each time: a uid may be given to another user while the agent runs.
    if "unix:user" in kinds and (user := _user_name(peer.uid)) is not None:
        findings.add("unix:user", user)
    if "unix:group" in kinds and (group := _group_name(peer.gid)) is not None:
        findings.add("unix:group", group)
    if peer.pid == 0:
        findings.unreadable |= dict.fromkeys(kinds & (_IMAGE_KINDS | _CGROUP_KINDS), _OTHER_NAMESPACE)
        return
    _read_image(peer.pid, findings)
    if kinds & _CGROUP_KINDS:
        findings.take(_read_cgroups(peer.pid))


def _read_image(pid: int, findings: _Findings) -> None:
    try:
        image = procfs.image(pid)
    except AttestationError as error:
        findings.unreadable |= dict.fromkeys(_IMAGE_KINDS, error.public)
        return
    findings.executable, findings.path = image.executable, image.path
    try:
        if image.is_at_its_path():
            findings.add("unix:path", image.path)
    except AttestationError as error:
        findings.unreadable["unix:path"] = error.public


def _read_cgroups(pid: int) -> Reading:
    try:
        memberships = parse_memberships(procfs.cgroup_text(pid))
    except AttestationError as error:
        return Reading.failed(_CGROUP_KINDS, error.public)
    except ValueError as error:
        return Reading.failed(_CGROUP_KINDS, f"/proc/{pid}/cgroup: {error}")
    private = procfs.is_in_private_cgroup_namespace()
    unit = systemd.read(memberships, private=private)
    container = pods.read(memberships, private=private)
    return Reading(unit.selectors | container.selectors, {**unit.unreadable, **container.unreadable})


def _would_match_by_hash(workloads: Iterable[Workload], findings: _Findings) -> bool:
    """Whether some workload lacks nothing but a hash: only then is it worth reading a whole file for."""
    for workload in workloads:
        missing = workload.selectors - findings.selectors
        if any(selector.kind == "unix:sha256" for selector in missing) and all(
            selector.kind == "unix:sha256" or selector.kind in findings.unreadable for selector in missing
        ):
            return True
    return False


def _user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _group_name(gid: int) -> str | None:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return None
