"""Which container and which Kubernetes pod a process belongs to, from its cgroups. Pure.

Container runtimes write the container's id, and the kubelet the pod's uid, into the names of the cgroups they make:

    cgroupfs driver   /kubepods/burstable/pod<uid>/<id>   /docker/<id>   /libpod_parent/libpod-<id>
    systemd driver    /kubepods.slice/kubepods-pod<uid>.slice/cri-containerd-<id>.scope
                      /system.slice/docker-<id>.scope     /machine.slice/libpod-<id>.scope/container

Names can be forged by whoever owns a cgroup: a user below `user@1000.service`, root of a container below the container.
So the path is walked from the top, through parents that only root makes, and the first container is the one. Behind a
parent that nobody vouches for, a container's name is reported as not to be told, and never believed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tokenward.attest.cgroup import Membership, Reading
from tokenward.core.identity import Selector

KINDS = frozenset({"container:id", "k8s:container-id", "k8s:pod-uid"})

_ID = r"(?P<id>[0-9a-f]{64})"
_UID = r"(?P<uid>[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32})"  # 32: static pods
_POD_SLICE = rf"(?:[a-z0-9-]+-)?kubepods(?:-besteffort|-burstable)?-pod{_UID}\.slice"

_BARE = re.compile(_ID)
_NAMED = re.compile(rf"(?P<runtime>docker|cri-containerd|crio|libpod|libpod-payload|nerdctl)-{_ID}(?:\.scope)?")
_MIXED = re.compile(rf"(?:{_POD_SLICE}|system\.slice):(?P<runtime>cri-containerd|crio|docker):{_ID}")
"""What runc with the cgroupfs driver makes of a path that was meant for the systemd driver."""
_POD = re.compile(rf"pod{_UID}|{_POD_SLICE.replace('<uid>', '<slice_uid>')}")
_SLICE = re.compile(r"[A-Za-z0-9:_.\\@-]+\.slice")

_ROOTS_OWN = frozenset({"docker", "kubelet", "kubepods", "besteffort", "burstable", "guaranteed", "libpod_parent"}) | {
    f"{runtime}.service" for runtime in ("containerd", "crio", "docker")
}
_CRI = frozenset({"cri-containerd", "crio"})


@dataclass(frozen=True, slots=True)
class _Place:
    container: str = ""
    pod: str = ""
    is_kubernetes: bool = False


def read(memberships: Iterable[Membership], *, private: bool) -> Reading:
    """`container:id`, `k8s:container-id` and `k8s:pod-uid`. `private`: the reader is in a cgroup namespace."""
    memberships = tuple(memberships)
    try:
        places = {_place(m.parts) for m in memberships} - {_Place()}
    except ValueError as error:
        return Reading.failed(KINDS, str(error))
    if len(places) > 1:
        return Reading.failed(KINDS, "the cgroup hierarchies of the process name different containers or pods")
    place = places.pop() if places else _Place()
    selectors: set[Selector] = set()
    unknown: frozenset[str] = frozenset()
    if place.container:
        selectors.add(Selector("container:id", place.container))
        if place.is_kubernetes:
            selectors.add(Selector("k8s:container-id", place.container))
    if place.pod:
        selectors.add(Selector("k8s:pod-uid", place.pod))
    elif private or any(m.parts[:1] == ("..",) for m in memberships):
        unknown = KINDS - {selector.kind for selector in selectors}
    elif place.is_kubernetes:
        unknown = frozenset({"k8s:pod-uid"})
    cause = "the agent's cgroup namespace hides the container or pod of the process; run the agent in the host's"
    return Reading(frozenset(selectors), dict.fromkeys(unknown, cause))


def _place(parts: tuple[str, ...]) -> _Place:
    """The outermost container on the path. Raises ValueError where a name cannot be believed."""
    pod = ""
    for depth, part in enumerate(parts):
        if found := _MIXED.fullmatch(part):
            return _Place(found["id"], _uid(found["uid"]) or pod, is_kubernetes=bool(found["uid"] or pod))
        if found := _NAMED.fullmatch(part):
            return _Place(found["id"], pod, is_kubernetes=bool(pod) or found["runtime"] in _CRI)
        if _BARE.fullmatch(part):
            if depth and parts[depth - 1] == "libpod_parent":
                continue  # a pod of Podman's; its containers are below
            _verify_no_podman_pod(parts, depth)
            return _Place(part, pod, is_kubernetes=bool(pod))
        if not pod and (found := _POD.fullmatch(part)):
            pod = _uid(found["uid"] or found["slice_uid"])
            continue
        if part in _ROOTS_OWN or part == ".." or (_SLICE.fullmatch(part) and not _POD.fullmatch(part)):
            continue
        _verify_no_container(parts[depth:])
        break
    return _Place(pod=pod, is_kubernetes=bool(pod))


def _uid(text: str | None) -> str:
    return (text or "").replace("_", "-")


def _verify_no_podman_pod(parts: tuple[str, ...], depth: int) -> None:
    """From inside a cgroup namespace, a Podman pod and a container that made a child cgroup look the same."""
    if parts[0] == ".." and depth + 1 < len(parts) and _NAMED.fullmatch(parts[depth + 1]):
        raise ValueError("the agent's cgroup namespace hides whether the process is in a container or in a Podman pod")


def _verify_no_container(parts: tuple[str, ...]) -> None:
    owner, *below = parts
    if any(_MIXED.fullmatch(part) or _NAMED.fullmatch(part) or _BARE.fullmatch(part) for part in below):
        shown = owner if owner.isprintable() else "another cgroup"
        raise ValueError(f"the container's cgroup is below {shown}, whose owner may name it at will")
