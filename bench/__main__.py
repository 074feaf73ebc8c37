"""`python -m bench`: every figure of the design beside `bao proxy`, in one run of about two minutes."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from bench import load, measures
from bench.figures import Figure, as_json, table
from bench.servers import BenchError
from bench.site import ROTATING, SECRETS, Site


def main() -> int:
    """Prints the table; 1 when a target is missed, 2 when it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there, too")
    options = parser.parse_args()
    if not load.is_installed():
        print("h2load is needed: install Debian's nghttp2-client, or nghttp2 elsewhere", file=sys.stderr)
        return 2
    try:
        figures = taken()
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(table(figures))
    if options.json is not None:
        about = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "kernel": platform.release(),
            "python": platform.python_version(),
        }
        options.json.write_text(as_json(figures, about))
    return 1 if any(figure.is_met is False for figure in figures) else 0


def taken() -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="tokenward-bench-") as made:
        directory = Path(made)
        figures = list(measures.starting_with_vault())
        with Site(directory=directory) as site:
            figures += measures.starting(site)
            agent, proxy = site.agent("agent", [*SECRETS, ROTATING]), site.proxy("proxy")
            with proxy, agent:
                proxy.ready_s()
                agent.ready_s()
                figures += measures.first_fetch(site, agent, proxy)
                figures += measures.keeping(agent, proxy)
                figures += measures.cached_gets(site, agent, proxy, directory)
                figures += measures.reading(agent)
                figures += measures.rotating(site, agent)
    return figures


if __name__ == "__main__":
    sys.exit(main())
