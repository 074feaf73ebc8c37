"""The one thing of a Kubernetes API server that a vault needs: TokenReview, over TLS.

Tokens have the shape of a projected service account token and are signed by a key of the cluster's own. A review says
yes to a token of that key for one of the audiences asked for, and knows no pod that was deleted.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.fakes.authority import rsa_key

ISSUER = "https://kubernetes.default.svc.cluster.local"
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"


@dataclass(slots=True)
class Cluster:
    """A cluster's key, the pods it forgot, the one token that may ask for reviews, and the reviews asked for."""

    reviewer: str = "reviewer-token"
    deleted_pods: set[str] = field(default_factory=set)
    reviewed: list[str] = field(default_factory=list)
    address: str = ""
    key: rsa.RSAPrivateKey = field(default_factory=rsa_key)

    def token(self, *, namespace: str, account: str, pod: str = "pod-1", audience: str = "openbao") -> str:
        """What the kubelet would project into a pod."""
        begun = int(time.time())
        bound = {
            "namespace": namespace,
            "pod": {"name": pod, "uid": f"uid-of-{pod}"},
            "serviceaccount": {"name": account, "uid": f"uid-of-{account}"},
        }
        claims = {
            "aud": [audience],
            "iss": ISSUER,
            "sub": f"system:serviceaccount:{namespace}:{account}",
            "iat": begun,
            "nbf": begun,
            "exp": begun + 600,
            "kubernetes.io": bound,
        }
        return jwt.encode(claims, self.key, algorithm="RS256", headers={"kid": "cluster-key"})

    def review(self, token: str, audiences: list[str]) -> dict[str, object]:
        self.reviewed.append(token)
        try:
            claims = jwt.decode(token, self.key.public_key(), algorithms=["RS256"], audience=audiences or None)
        except jwt.InvalidTokenError as error:
            return {"authenticated": False, "error": str(error)}
        bound = claims["kubernetes.io"]
        if bound["pod"]["name"] in self.deleted_pods:
            return {"authenticated": False, "error": "the pod is gone"}
        extra = {
            "authentication.kubernetes.io/pod-name": [bound["pod"]["name"]],
            "authentication.kubernetes.io/pod-uid": [bound["pod"]["uid"]],
        }
        user = {"username": claims["sub"], "uid": bound["serviceaccount"]["uid"], "extra": extra}
        return {"authenticated": True, "user": user, "audiences": audiences or claims["aud"]}


class _Handler(BaseHTTPRequestHandler):
    cluster: Cluster

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != REVIEWS or self.headers.get("Authorization") != f"Bearer {self.cluster.reviewer}":
            self._send(403, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 403})
            return
        spec = asked["spec"]
        kind = {"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1"}
        self._send(201, {**kind, "status": self.cluster.review(spec["token"], spec.get("audiences") or [])})

    def _send(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(cluster: Cluster, *, cert_file: str, key_file: str) -> Iterator[Cluster]:
    """Serves `cluster` with TLS on a port of 127.0.0.1, and sets its `address`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ReviewHandler", (_Handler,), {"cluster": cluster}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_file, key_file)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    cluster.address = f"https://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="token review")
    thread.start()
    try:
        yield cluster
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
