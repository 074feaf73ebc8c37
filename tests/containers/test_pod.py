"""The shipped pod, run: an agent and two apps beside a real OpenBao that believes tokens of Kubernetes' shape.

In the role of the cluster: one that signs service account tokens, and a kubelet that makes the volumes, runs the probes
and replaces the token by swapping a link. The vault is on the host's loopback, with TLS.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import rsa

from tests.agents import TOKENWARD
from tests.containers.engine import Engine
from tests.containers.manifests import KUBERNETES, containers, pod_for_podman, pod_spec
from tests.fakes import token_review
from tests.fakes.token_review import Cluster
from tests.integration.test_logins import public_pem
from tests.integration.tls_bao import TlsBao
from tests.site import until

NAMESPACE = ACCOUNT = "connectors"
APPS = {"stripe-sync": "stripe-api", "ledger": "ledger-api"}
PATHS = {"stripe-api": "connectors/data/stripe", "ledger-api": "connectors/data/ledger"}
FS_GROUP = 3000
_PATIENCE_S = 60.0

# Says who it is and what it gets, asks a lot, and then says each new value.
_APP = """
import concurrent.futures, json, sys, time, tokenward
own, other = sys.argv[1:]
client = tokenward.Client(timeout_s=30)
def got(name):
    try:
        return client.get(name).values["key"]
    except tokenward.TokenwardError as error:
        return error.reason
identity = client.identity()
first = {"workload": identity.workload, "selectors": list(identity.selectors), "own": got(own), "other": got(other)}
with concurrent.futures.ThreadPoolExecutor(20) as pool:
    first["under load"] = sorted(set(pool.map(got, [own] * 2000)))
print(json.dumps(first), flush=True)
handle = client.credential(own)
said = ""
while True:
    value = handle.value["key"]
    if value != said:
        print(json.dumps({"value": value}), flush=True)
        said = value
    time.sleep(0.05)
"""


@dataclass(slots=True)
class Pod:
    engine: Engine
    name: str
    directory: Path
    bao: TlsBao
    cluster: Cluster

    def run(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        """In a container, as a probe."""
        return self.engine.podman("exec", f"{self.name}-{container}", *command, check=False)

    def passes(self, probe: list[str]) -> bool:
        assert self.state("tokenward")["Running"], self.log()
        return self.run("tokenward", *probe).returncode == 0

    def lines(self, container: str) -> list[dict[str, Any]]:
        """What an app has said."""
        said = self.engine.podman("logs", f"{self.name}-{container}").stdout
        return [json.loads(line) for line in said.splitlines()]

    def log(self) -> str:
        done = self.engine.podman("logs", f"{self.name}-tokenward", check=False)
        return done.stdout + done.stderr

    def state(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = self.engine.inspect(f"{self.name}-{container}")["State"]
        return found

    def project(self, token: str) -> None:
        """As a kubelet does it: the whole content in a new directory, and one link that is replaced."""
        volume = self.directory / "token"
        fresh = Path(tempfile.mkdtemp(dir=volume, prefix="..2026_"))
        fresh.chmod(0o755)
        (fresh / "token").write_text(token)
        os.symlink(fresh.name, volume / "..data_tmp")
        os.replace(volume / "..data_tmp", volume / "..data")
        if not (volume / "token").is_symlink():
            os.symlink("..data/token", volume / "token")

    async def put(self, credential: str, value: str) -> None:
        await self.bao.admin("POST", PATHS[credential], {"data": {"key": value}})

    async def believe(self, *clusters: Cluster) -> None:
        """From now on the vault believes the keys of these clusters and no other."""
        body = {"jwt_validation_pubkeys": [*map(public_pem, clusters)], "bound_issuer": token_review.ISSUER}
        await self.bao.admin("POST", "auth/jwt/config", body)

    def processes(self) -> list[str]:
        """The program names that the agent's container can see."""
        script = (
            "import os\nfor p in os.listdir('/proc'):\n"
            "    if p.isdigit(): print(open(f'/proc/{p}/cmdline').read().replace(chr(0), ' '))"
        )
        return self.run("tokenward", "python3", "-c", script).stdout.splitlines()


def configured(variant: str, bao: TlsBao, engine: Engine, *, ca_file: str) -> str:
    """The shipped tokenward.toml with what is the site's own: the vault's address, a hash, a quicker look for news."""
    text = (KUBERNETES / variant / "tokenward.toml").read_text()
    program = "import hashlib, sys; print(hashlib.file_digest(open(sys.executable, 'rb'), 'sha256').hexdigest())"
    made = [
        (r"https://openbao\.vault\.svc\.cluster\.local:8200", bao.tls_address),
        (r"/etc/tokenward/vault-ca\.pem", ca_file),
        (r'kind = "kv"', 'kind = "kv"\npoll = "1s"'),
    ]
    if variant == "shared-pid":
        made.append((r"unix:sha256:0{64}", f"unix:sha256:{engine.once('python3', '-c', program).strip()}"))
    for pattern, replacement in made:
        text, count = re.subn(pattern, replacement, text)
        assert count, pattern
    return text


@contextmanager
def running(variant: str, engine: Engine) -> Iterator[Pod]:
    """The pod of `variant`, started, its sidecar past the startup probe."""
    name = f"connectors-{variant}"
    spec = pod_spec(variant)
    with tempfile.TemporaryDirectory(prefix="tokenward-pod-") as made:
        directory = Path(made)
        directory.chmod(0o755)
        (directory / "vault").mkdir(mode=0o700)
        with TlsBao(directory=directory / "vault") as bao:
            pod = Pod(engine, name, directory, bao, Cluster())
            directories = _volumes(pod, spec, configured(variant, bao, engine, ca_file="/etc/tokenward/vault-ca.pem"))
            asyncio.run(_set_up_vault(pod, configured(variant, bao, engine, ca_file=bao.ca_file)))
            pod.project(pod.cluster.token(namespace=NAMESPACE, account=ACCOUNT))
            _run_first(engine, containers(spec)["tokenward-directory"], directories)
            programs = {
                app: ["python3", "-c", _APP.lstrip(), own, next(other for other in APPS.values() if other != own)]
                for app, own in APPS.items()
            }
            environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1"}
            manifest = directory / "pod.yaml"  # JSON is YAML
            manifest.write_text(
                json.dumps(
                    pod_for_podman(
                        spec,
                        name=name,
                        image=engine.image,
                        directories=directories,
                        programs=programs,
                        environment=environment,
                    )
                )
            )
            try:
                engine.podman("kube", "play", "--quiet", str(manifest))
                startup = containers(spec)["tokenward"]["startupProbe"]["exec"]["command"]
                until(lambda: pod.passes(startup), "the agent's startup probe passes", _PATIENCE_S)
                yield pod
            finally:
                engine.podman("pod", "rm", "--force", "--time=0", name, check=False)


def _volumes(pod: Pod, spec: dict[str, Any], config: str) -> dict[str, Path]:
    """A directory for each volume, as a kubelet would make it: an emptyDir for all, of the fsGroup if there is one."""
    made = {volume["name"]: pod.directory / volume["name"] for volume in spec["volumes"]}
    for volume in spec["volumes"]:
        path = made[volume["name"]]
        path.mkdir()
        path.chmod(0o777)
        if "emptyDir" in volume and spec.get("shareProcessNamespace"):  # one of the two runs is with an fsGroup
            os.chown(path, 0, FS_GROUP)
            path.chmod(0o2777)
    (made["config"] / "tokenward.toml").write_text(config)
    shutil.copy(pod.bao.ca_file, made["config"] / "vault-ca.pem")
    return made


async def _set_up_vault(pod: Pod, config: str) -> None:
    """What an operator does: `tokenward vault-setup --apply`, and what it says is to be done by hand."""
    file = pod.directory / "vault" / "tokenward.toml"
    file.write_text(config)
    done = subprocess.run(
        [TOKENWARD, "vault-setup", "--config", str(file), "--apply", "--token-file", "-"],
        input=pod.bao.admin_token.reveal(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "by hand: whom auth/jwt believes" in done.stdout
    await pod.believe(pod.cluster)
    for credential in PATHS:
        await pod.put(credential, f"{credential} one")


def _run_first(engine: Engine, container: dict[str, Any], directories: dict[str, Path]) -> None:
    """The init container that is no sidecar, to its end."""
    context = container["securityContext"]
    options = [f"--user={context['runAsUser']}:{context['runAsGroup']}"]
    options += [f"--volume={directories[mount['name']]}:{mount['mountPath']}" for mount in container["volumeMounts"]]
    engine.once(*container["command"], options=options)


def value_of(pod: Pod, app: str) -> str:
    found = [line["value"] for line in pod.lines(app) if "value" in line]
    return str(found[-1]) if found else ""


def test_two_apps_told_apart_by_uid_alone(engine: Engine) -> None:
    """No shared pid namespace; the token is replaced during the run, the vault goes away, and the end is in order."""
    with running("base", engine) as pod:
        for app, own in APPS.items():
            until(lambda app=app: bool(value_of(pod, app)), f"{app}: {pod.log()}", _PATIENCE_S)  # type: ignore[misc]
            first = pod.lines(app)[0]
            assert (first["workload"], first["own"], first["other"]) == (app, f"{own} one", "NOT_GRANTED")
            assert first["under load"] == [f"{own} one"]
            assert {f"k8s:ns:{NAMESPACE}", f"k8s:sa:{ACCOUNT}"} < set(first["selectors"])
            assert not [each for each in first["selectors"] if each.startswith(("unix:path", "unix:sha256"))]
        assert not [each for each in pod.processes() if "stripe-api" in each]
        assert pod.state("tokenward")["OOMKilled"] is False, "96 MiB are enough under load"

        fresh = Cluster(key=rsa.generate_private_key(public_exponent=65537, key_size=2048))
        asyncio.run(pod.believe(pod.cluster, fresh))
        pod.project(fresh.token(namespace=NAMESPACE, account=ACCOUNT))
        asyncio.run(pod.believe(fresh))  # the token that was there first is worth nothing any more
        for own in APPS.values():
            asyncio.run(pod.put(own, f"{own} two"))
        for app, own in APPS.items():
            until(lambda app=app, own=own: value_of(pod, app) == f"{own} two", f"{app}: {pod.log()}", _PATIENCE_S)  # type: ignore[misc]

        asyncio.run(pod.bao.admin("POST", "sys/seal"))
        until(lambda: pod.run("tokenward", "tokenward", "health").returncode == 1, "not ready", _PATIENCE_S)
        assert "not ready" in pod.run("tokenward", "tokenward", "health").stderr
        assert pod.run("tokenward", "tokenward", "health", "--live").returncode == 0
        assert value_of(pod, "ledger") == "ledger-api two"
        assert pod.state("ledger")["Running"] is True

        engine.podman("stop", "--time=15", f"{pod.name}-tokenward")
        assert pod.state("tokenward")["ExitCode"] == 0, pod.log()


def test_a_program_told_by_its_hash_across_containers(engine: Engine) -> None:
    """A shared pid namespace, an fsGroup, and a program whose hash no workload has."""
    with running("shared-pid", engine) as pod:
        until(lambda: bool(value_of(pod, "stripe-sync")), f"told: {pod.log()}", _PATIENCE_S)
        first = pod.lines("stripe-sync")[0]
        (hashed,) = (each for each in first["selectors"] if each.startswith("unix:sha256:"))
        assert (first["workload"], first["own"], first["other"]) == ("stripe-sync", "stripe-api one", "NOT_GRANTED")
        audited = (pod.directory / "audit" / "audit.jsonl").read_text()
        assert hashed.rpartition(":")[2] in audited
        assert "/python3" in audited
        assert [each for each in pod.processes() if "stripe-api" in each]
        # The other app runs the same interpreter, so here it is the same workload: the page says so of scripts.
        until(lambda: bool(pod.lines("ledger")), f"told: {pod.log()}", _PATIENCE_S)
        assert pod.lines("ledger")[0]["workload"] == "stripe-sync"
