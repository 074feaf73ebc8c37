"""Every spelling of /proc/<pid>/cgroup that we know, and what is to be believed of it. One file, one line here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tokenward.attest import pods, systemd
from tokenward.attest.cgroup import parse_memberships

_SAMPLES = Path(__file__).parents[2] / "samples" / "cgroup"
_A = "4f797c539e6c745de61a93ca3ff892358ecbcaccd8414d5db545c38428142970"
_B = "9ec39b91f3d70e1beff50a308f77067065ea6be0d91a3378375056cd4422cf3d"
_POD = "2c48913c-b29f-11e7-9350-020968147796"
_POD_SLICE = _POD.replace("-", "_")
_HIDDEN = "?"
"""Could not be told."""


@dataclass(frozen=True)
class Told:
    unit: str = ""
    slice: str = ""
    container: str = ""
    k8s_container: str = ""
    pod: str = ""


def _container(unit: str = "", slice_name: str = "", container: str = _A, pod: str = "") -> Told:
    return Told(unit, slice_name, container, container if pod else "", pod)


def _unbelieved(unit: str = "", slice_name: str = "") -> Told:
    return Told(unit, slice_name, _HIDDEN, _HIDDEN, _HIDDEN)


_EXPECTED = {
    "v2-systemd-service": Told("stripe-sync.service", "system.slice"),
    "v2-systemd-template": Told(r"stripe-sync@eu\x2dwest.service", r"system-stripe\x2dsync.slice"),
    "v2-systemd-slice": Told("ledger.service", "payments-sync.slice"),
    "v2-login-session": Told("session-3.scope", "user-1000.slice"),
    "v2-user-service": Told("user@1000.service", "user-1000.slice"),
    "v2-delegated-below-service": Told("stripe-sync.service", "system.slice"),
    "v2-init": Told("init.scope", "-.slice"),
    "v2-root": Told(),
    "v1-systemd-service": Told("stripe-sync.service", "system.slice"),
    "hybrid-systemd-service": Told("app.service", "system.slice"),
    "hybrid-no-systemd": Told(),
    "v2-nspawn-payload": Told("systemd-nspawn@web.service", "machine.slice"),
    "v1-docker-cgroupfs": _container(),
    "hybrid-docker-cgroupfs": _container(_HIDDEN, _HIDDEN),  # never the unit of the runtime that started it
    "v1-docker-systemd": _container(f"docker-{_A}.scope", "system.slice"),
    "v2-docker-systemd": _container(f"docker-{_A}.scope", "system.slice"),
    "v2-docker-cgroupfs": _container(),
    "v2-docker-in-docker": _container(),
    "v2-systemd-in-docker": _container(),
    "v2-podman-systemd": _container(f"libpod-{_A}.scope", "machine.slice"),
    "v2-podman-conmon": Told(f"libpod-conmon-{_A}.scope", "machine.slice"),  # the monitor is not the container
    "v2-podman-pod-systemd": _container(f"libpod-{_A}.scope", f"machine-libpod_pod_{_B}.slice"),
    "v2-podman-cgroupfs": _container(),
    "hybrid-podman-pod-cgroupfs": _container(),
    "v2-podman-rootless": _unbelieved("user@1000.service", "user-1000.slice"),
    "v2-podman-quadlet-split": _unbelieved("stripe-sync.service", "system.slice"),
    "v2-podman-private-namespace": Told(_HIDDEN, _HIDDEN, _A, _HIDDEN, _HIDDEN),
    "v2-podman-pod-private-namespace": _unbelieved(_HIDDEN, _HIDDEN),
    "v2-containerd-private-namespace": Told(_HIDDEN, _HIDDEN, _A, _A, _HIDDEN),
    "v2-containerd-other-pod-private-namespace": _container(_HIDDEN, _HIDDEN, pod=_POD),
    "v1-kubepods-cgroupfs-burstable": _container(pod=_POD),
    "v1-kubepods-cgroupfs-besteffort": _container(pod=_POD),
    "v1-kubepods-cgroupfs-guaranteed": _container(pod=_POD),
    "v1-crio-cgroupfs": _container(pod=_POD),
    "v1-kubepods-docker-systemd": _container(
        f"docker-{_A}.scope", f"kubepods-burstable-pod{_POD_SLICE}.slice", pod=_POD
    ),
    "v2-containerd-systemd-besteffort": _container(
        f"cri-containerd-{_A}.scope", f"kubepods-besteffort-pod{_POD_SLICE}.slice", pod=_POD
    ),
    "v2-containerd-systemd-burstable": _container(
        f"cri-containerd-{_A}.scope", f"kubepods-burstable-pod{_POD_SLICE}.slice", pod=_POD
    ),
    "v2-containerd-systemd-guaranteed": _container(
        f"cri-containerd-{_A}.scope", f"kubepods-pod{_POD_SLICE}.slice", pod=_POD
    ),
    "v2-containerd-static-pod": _container(
        f"cri-containerd-{_A}.scope", f"kubepods-burstable-pod{_B[:32]}.slice", pod=_B[:32]
    ),
    "v2-containerd-drivers-mixed": _container("containerd.service", "system.slice", pod=_POD),
    "v2-crio-systemd": _container(f"crio-{_A}.scope", f"kubepods-burstable-pod{_POD_SLICE}.slice", pod=_POD),
    "v2-crio-conmon": Told(f"crio-conmon-{_A}.scope", f"kubepods-burstable-pod{_POD_SLICE}.slice", pod=_POD),
    "v2-kind-node": _container(
        f"cri-containerd-{_A}.scope", f"kubelet-kubepods-burstable-pod{_POD_SLICE}.slice", pod=_POD
    ),
    "v2-kind-from-host": _container(f"docker-{_B}.scope", "system.slice", container=_B),
    "v2-forged-below-user-manager": _unbelieved("user@1000.service", "user-1000.slice"),
    "v2-forged-pod-below-service": _unbelieved("stripe-sync.service", "system.slice"),
    "v2-forged-below-container": _container(),
    "v2-forged-below-session": _unbelieved("session-3.scope", "user-1000.slice"),
    "v2-unknown-parent": _unbelieved(),
    "v1-contradicting": _unbelieved(),
}


def _told(text: str, *, private: bool) -> Told:
    memberships = parse_memberships(text)
    values: dict[str, str] = {}
    for reading in (systemd.read(memberships, private=private), pods.read(memberships, private=private)):
        for selector in reading.selectors:
            assert selector.kind not in values
            values[selector.kind] = selector.value
        for kind, cause in reading.unreadable.items():
            assert kind not in values
            assert cause
            values[kind] = _HIDDEN
    return Told(
        unit=values.get("systemd:unit", ""),
        slice=values.get("systemd:slice", ""),
        container=values.get("container:id", ""),
        k8s_container=values.get("k8s:container-id", ""),
        pod=values.get("k8s:pod-uid", ""),
    )


def test_every_sample_is_expected_to_be_something() -> None:
    assert _EXPECTED.keys() == {sample.name for sample in _SAMPLES.iterdir()}


@pytest.mark.parametrize("name", _EXPECTED)
def test_sample(name: str) -> None:
    assert _told((_SAMPLES / name).read_text(), private="private-namespace" in name) == _EXPECTED[name]


@pytest.mark.parametrize("name", ["v2-root", "hybrid-no-systemd"])
def test_what_shares_the_agents_own_cgroup_in_a_private_namespace_could_be_anything(name: str) -> None:
    assert _told((_SAMPLES / name).read_text(), private=True) == _unbelieved(_HIDDEN, _HIDDEN)


def test_a_unit_below_the_root_of_a_private_namespace_is_one_of_the_systemd_in_there() -> None:
    told = _told((_SAMPLES / "v2-systemd-service").read_text(), private=True)
    assert told == _unbelieved("stripe-sync.service", "system.slice")
