"""`python -m serve SETTINGS [FD PARENT]`: a server for `serve.backends`, or behind the relay of another one.

SETTINGS is a `serve.settings.Settings` in JSON. FD is the listening socket that it inherits, and PARENT the process
whose death ends it; without them it listens where the settings say, and answers only the gateway that started it.
"""

from __future__ import annotations

import os
import socket
import sys

from serve.keys import GATEWAY, Key, Rights
from serve.server import listen, run
from serve.settings import Settings
from suite.processes import die_with


def main() -> int:
    """Serve until told to stop."""
    settings, inherited = Settings.model_validate_json(sys.argv[1]), sys.argv[2:]
    if inherited:
        die_with(int(inherited[1]))
        return run(settings, socket.socket(fileno=int(inherited[0])))
    key = Key.of(os.environ.pop(GATEWAY), "gateway", Rights(admin=True))
    with listen(settings.host, settings.port) as sock:
        return run(settings, sock, keys=[key])


if __name__ == "__main__":
    raise SystemExit(main())
