"""`python -m serve SETTINGS FD PARENT`: a server for `serve.backends`.

SETTINGS is a `serve.settings.Settings` in JSON, FD the listening socket that it inherits, and PARENT the process whose
death ends it.
"""

from __future__ import annotations

import socket
import sys

from serve.server import run
from serve.settings import Settings
from suite.processes import die_with


def main() -> int:
    """Serve until told to stop."""
    settings, fd, parent = sys.argv[1:]
    die_with(int(parent))
    return run(Settings.model_validate_json(settings), socket.socket(fileno=int(fd)))


if __name__ == "__main__":
    raise SystemExit(main())
