"""`python -m serve SETTINGS`: a server for `serve.backends`, on the listening socket that it inherits.

SETTINGS is JSON: the fields of `serve.server.Settings`, `fd` of the socket, and `parent`, whose death ends the server.
"""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

from serve.server import Settings, run
from suite.processes import die_with


def main() -> int:
    """Serve until told to stop."""
    given = json.loads(sys.argv[1])
    die_with(given.pop("parent"))
    sock = socket.socket(fileno=given.pop("fd"))
    adapters = {name: Path(path) for name, path in given.pop("adapters").items()}
    return run(Settings(**{**given, "model": Path(given["model"]), "adapters": adapters}), sock)


if __name__ == "__main__":
    raise SystemExit(main())
