"""docs/kubernetes: the manifests are of the cluster's schema, keep to the restricted level, and name what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest

from tests.containers.manifests import KUBERNETES, ROOT, Object, containers, deployment, pod_spec, read
from tokenward import cli, health
from tokenward.config import Config, load
from tokenward.core.model import PlatformJwt

VARIANTS = ("base", "shared-pid")
OLDEST = "1.29"
"""The first Kubernetes that has native sidecars switched on."""
DIRECTORY = "tokenward-directory"


def all_objects() -> list[Object]:
    names = ("namespace", "serviceaccount", "networkpolicy")
    return [
        *(each for name in names for each in read(KUBERNETES / "base" / f"{name}.yaml")),
        *map(deployment, VARIANTS),
    ]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def spec(variant: str) -> Object:
    return pod_spec(variant)


@pytest.fixture
def config(variant: str) -> Config:
    return load(str(KUBERNETES / variant / "tokenward.toml"))


@pytest.mark.parametrize("version", [OLDEST, "latest"])
def test_every_object_is_of_its_schema_and_has_no_unknown_key(version: str) -> None:
    validator: Any = pytest.importorskip("kubernetes_validate", reason="no kubernetes-validate, which has the schemas")
    wanted = validator.latest_version() if version == "latest" else version
    for made in all_objects():
        validator.validate(made, wanted, strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, which renders with Kustomize")
def test_kustomize_renders_what_the_tests_look_at(variant: str, tmp_path: Path) -> None:
    """The tests merge the patch themselves: here it is seen that Kustomize does the same."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / variant)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "rendered.yaml"
    file.write_text(done.stdout)
    rendered = {each["kind"]: each for each in read(file)}
    made = rendered["Deployment"]["spec"]["template"]["spec"]
    name = rendered["ConfigMap"]["metadata"]["name"]
    expected = pod_spec(variant)
    volume = next(each for each in expected["volumes"] if each["name"] == "config")
    volume["projected"]["sources"][0]["configMap"]["name"] = name
    for container in containers(expected).values():
        tag = "0.1.0" if container["image"] == "tokenward" else "1"
        container["image"] = f"registry.example/{container['image']}:{tag}"
    assert made == expected
    level = rendered["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == ("restricted" if variant == "base" else "privileged")


def test_the_base_is_within_the_restricted_level() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, each control that a Pod can break."""
    spec = pod_spec("base")
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(spec).values():
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["runAsUser"] > 0
        assert not {"privileged", "procMount", "seccompProfile", "runAsNonRoot"} & context.keys()
    allowed = {"configMap", "downwardAPI", "emptyDir", "projected", "secret"}
    assert all(volume.keys() - {"name"} <= allowed for volume in spec["volumes"])


def test_the_shared_namespace_costs_one_capability_of_the_agent_and_nothing_else() -> None:
    base, shared = containers(pod_spec("base")), containers(pod_spec("shared-pid"))
    assert pod_spec("shared-pid")["shareProcessNamespace"] is True
    assert {name for name in base if base[name] != shared[name]} == {"tokenward", DIRECTORY}
    agent = shared["tokenward"]["securityContext"]
    assert agent["capabilities"] == {"drop": ["ALL"], "add": ["SYS_PTRACE"]}
    assert (agent["allowPrivilegeEscalation"], agent["readOnlyRootFilesystem"]) == (False, True)


def test_the_agent_is_a_native_sidecar_between_its_directory_and_the_apps(spec: Object) -> None:
    assert [each["name"] for each in spec["initContainers"]] == [DIRECTORY, "tokenward"]
    assert [each.get("restartPolicy") for each in spec["initContainers"]] == [None, "Always"]


def test_commands_are_those_of_the_command_line(spec: Object) -> None:
    agent = containers(spec)["tokenward"]
    probes = [agent[name]["exec"]["command"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    entry = re.search(r'^ENTRYPOINT \["(.+)"\]$', (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert entry
    for program, *arguments in [[entry[1], *agent["args"]], *probes]:
        assert program == "tokenward"
        command = cli.cli.get_command(click.Context(cli.cli), arguments[0])
        assert command is not None
        command.make_context(arguments[0], arguments[1:])  # raises for what it does not know
    assert probes[0] == ["tokenward", "health"]
    assert probes[1:] == [["tokenward", "health", "--live"]] * 2, "a vault that is away must take nobody out of service"


def test_probes_have_the_time_that_the_command_takes_for_itself(spec: Object) -> None:
    agent = containers(spec)["tokenward"]
    (own,) = (option for option in cli.health.params if option.name == "timeout_s")
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert agent[name]["timeoutSeconds"] > own.default


def test_every_path_of_the_configuration_is_in_a_volume_of_the_agent(spec: Object, config: Config) -> None:
    mounts = {each["mountPath"]: each for each in containers(spec)["tokenward"]["volumeMounts"]}
    volumes = {each["name"]: each for each in spec["volumes"]}

    def content(path: str) -> set[str]:
        mount = mounts[str(Path(path).parent)]
        assert mount.get("readOnly") is True
        found: set[str] = set()
        for source in volumes[mount["name"]]["projected"]["sources"]:
            match source:
                case {"configMap": {"name": "tokenward"}}:
                    found.add("tokenward.toml")
                case {"configMap": {"items": items}}:
                    found |= {item["path"] for item in items}
                case {"serviceAccountToken": {"path": path}}:
                    found.add(path)
        return found

    (argument,) = (each for each in containers(spec)["tokenward"]["args"] if each.startswith("/"))
    read_files = {argument, config.vault.ca_file}
    read_files |= {each.exchange.token_file for each in config.workloads.values()}  # type: ignore[union-attr]
    for file in read_files:
        assert Path(file).name in content(file)
    for file in (config.audit.file, config.state.file, config.listen.workload_socket):
        mount = mounts[str(Path(file).parent)]
        assert "emptyDir" in volumes[mount["name"]]
        assert not mount.get("readOnly")


def test_apps_reach_the_socket_where_clients_look_and_cannot_replace_it(spec: Object, config: Config) -> None:
    """Who could write the socket's directory could answer in the agent's place."""
    assert config.listen.workload_socket == health.SYSTEM_SOCKET
    agent = next(e for e in containers(spec)["tokenward"]["volumeMounts"] if e["name"] == "socket")
    for app in spec["containers"]:
        assert app["volumeMounts"] == [{**agent, "readOnly": True}]
    made = containers(spec)[DIRECTORY]
    assert made["command"][:2] == ["python3", "-c"]
    assert f"'{made['volumeMounts'][0]['mountPath']}/{agent['subPath']}', 0o755" in made["command"][2]
    assert made["securityContext"]["runAsUser"] == containers(spec)["tokenward"]["securityContext"]["runAsUser"]
    socket = next(each for each in spec["volumes"] if each["name"] == "socket")
    assert socket["emptyDir"]["medium"] == "Memory"


def test_workloads_are_the_apps_and_their_namespace(spec: Object, config: Config, variant: str) -> None:
    uids = {app["name"]: app["securityContext"]["runAsUser"] for app in spec["containers"]}
    assert config.workloads.keys() == uids.keys()
    account = read(KUBERNETES / "base" / "serviceaccount.yaml")[0]["metadata"]["name"]
    namespace = read(KUBERNETES / "base" / "namespace.yaml")[0]["metadata"]["name"]
    assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == (account, False)
    assert len({*uids.values(), containers(spec)["tokenward"]["securityContext"]["runAsUser"]}) == 3
    for name, workload in config.workloads.items():
        shown = set(map(str, workload.selectors))
        assert {f"k8s:ns:{namespace}", f"k8s:sa:{account}"} < shown
        assert isinstance(workload.exchange, PlatformJwt)
        if variant == "base":
            assert f"unix:uid:{uids[name]}" in shown


def test_the_token_has_the_audience_that_vault_setup_binds(spec: Object, config: Config) -> None:
    from tokenward.vault.setup import Step, plan

    sources = next(each for each in spec["volumes"] if each["name"] == "token")["projected"]["sources"]
    steps = [each for each in plan(config, public_key_pem="") if isinstance(each, Step) and "/role/" in each.path]
    assert len(steps) == len(config.workloads)
    for step in steps:
        assert step.body["bound_audiences"] == [sources[0]["serviceAccountToken"]["audience"]]


def test_the_network_policy_lets_the_agent_reach_the_vault_of_the_configuration(config: Config) -> None:
    policy = read(KUBERNETES / "base" / "networkpolicy.yaml")[0]["spec"]
    assert policy["podSelector"]["matchLabels"] == deployment("base")["spec"]["template"]["metadata"]["labels"]
    vault, names = policy["egress"]
    found = re.fullmatch(r"https://[^.]+\.([^.]+)\.svc\.cluster\.local:(\d+)", config.vault.addresses[0])
    assert found
    assert vault["to"][0]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": found[1]}
    assert [each["port"] for each in vault["ports"]] == [int(found[2])]
    assert {each["port"] for each in names["ports"]} == {53}


def test_the_page_names_only_files_and_commands_that_exist() -> None:
    page = (KUBERNETES / "README.md").read_text()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page):
        assert (KUBERNETES / link).exists(), link
    commands = re.findall(r"^    (?:\S+ )*?tokenward ([a-z-]+)", page, re.MULTILINE)
    for name in [*commands, *re.findall(r"`tokenward ([a-z-]+)", page)]:
        assert cli.cli.get_command(click.Context(cli.cli), name), name
