"""Makes the gRPC stubs from `protos/`: `python -m tests.generate`. Run it after a change of a .proto file."""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ("tokenward/v1/admin.proto", "tokenward/v1/credentials.proto", "tokenward/v1/status.proto")


def generate(into: Path) -> None:
    """Writes the stubs and their type stubs below `into`. Raises RuntimeError when protoc refuses."""
    well_known = Path(protoc.__file__).parent / "_proto"
    programs = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{ROOT / 'protos'}",
        f"-I{well_known}",
        f"--python_out={into}",
        f"--grpc_python_out={into}",
        *(f"--plugin=protoc-gen-{name}={programs / f'protoc-gen-{name}'}" for name in ("mypy", "mypy_grpc")),
        f"--mypy_out={into}",
        f"--mypy_grpc_out={into}",
        *PROTOS,
    ]
    if protoc.main(arguments) != 0:
        raise RuntimeError("protoc failed")
    for proto in PROTOS:  # a file without services still gets an empty stub module
        if "service " not in (ROOT / "protos" / proto).read_text():
            for suffix in ("_pb2_grpc.py", "_pb2_grpc.pyi"):
                (into / proto.replace(".proto", suffix)).unlink(missing_ok=True)


if __name__ == "__main__":
    generate(ROOT / "agent")
    sys.exit(0)
