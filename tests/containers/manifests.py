"""The manifests of docs/kubernetes, merged as Kustomize merges them, and turned into what podman can run.

Owns what is different from a kubelet. podman 4.3 knows no sidecars, no probes, no projected volumes and no `subPath`,
and its emptyDir is root's alone. So the volumes are directories that `pod_for_podman` is given, made as a kubelet makes
them; the init container that makes a directory runs before the pod; the test runs the probes. All else is as shipped.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "docs" / "kubernetes"
Object = dict[str, Any]


def read(path: Path) -> list[Object]:
    """The objects of a YAML file. Skips the test where nothing can read YAML."""
    yaml = pytest.importorskip("yaml", reason="no PyYAML")
    found: list[Object] = list(yaml.safe_load_all(path.read_text()))
    return found


def deployment(variant: str) -> Object:
    """The Deployment of `base`, with the patch of `variant`."""
    made = read(KUBERNETES / "base" / "deployment.yaml")[0]
    if variant != "base":
        made = _merged(made, read(KUBERNETES / variant / "deployment.yaml")[0])
    return made


def pod_spec(variant: str) -> Object:
    spec: Object = deployment(variant)["spec"]["template"]["spec"]
    return spec


def containers(spec: Object) -> dict[str, Object]:
    """All containers by name, init containers first."""
    return {each["name"]: each for each in (*spec.get("initContainers", ()), *spec["containers"])}


def _merged(one: Any, other: Any) -> Any:
    """A strategic merge: objects by key, lists of named objects by name, other lists replaced."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: _merged(one.get(key), other[key]) if key in other else one[key] for key in {**one, **other}}
    if isinstance(one, list) and isinstance(other, list) and all(isinstance(e, dict) and "name" in e for e in other):
        by_name = {each["name"]: each for each in one}
        return list({**by_name, **{e["name"]: _merged(by_name.get(e["name"]), e) for e in other}}.values())
    return copy.deepcopy(other)


def pod_for_podman(
    spec: Object,
    *,
    name: str,
    image: str,
    directories: Mapping[str, Path],
    programs: Mapping[str, list[str]],
    environment: Mapping[str, str],
) -> Object:
    """A Pod of the sidecar and the apps of `spec`.

    `directories` stand for the volumes by name, `programs` are the commands of the apps, `environment` is what a
    kubelet adds to every container.
    """
    spec = json.loads(json.dumps(spec))  # whatever YAML's anchors shared is everyone's own now
    sidecars = [each for each in spec.pop("initContainers") if each.get("restartPolicy") == "Always"]
    spec["containers"] = [*sidecars, *spec["containers"]]
    volumes: dict[str, Object] = {}
    for container in spec["containers"]:
        for key in ("restartPolicy", "startupProbe", "readinessProbe", "livenessProbe"):
            container.pop(key, None)
        container["image"] = image
        container["env"] = [{"name": key, "value": value} for key, value in environment.items()]
        if container["name"] in programs:
            container["command"] = programs[container["name"]]
        for mount in container["volumeMounts"]:
            volume, part = mount["name"], mount.pop("subPath", "")
            mount["name"] = f"{volume}-{part}" if part else volume
            path = directories[volume] / part
            volumes[mount["name"]] = {
                "name": mount["name"],
                "hostPath": {"path": str(path), "type": "Directory"},
            }
    spec |= {"volumes": list(volumes.values()), "restartPolicy": "Never", "hostNetwork": True}
    for unknown in ("serviceAccountName", "automountServiceAccountToken"):
        del spec[unknown]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
