"""keyd as it is, less its confinement, so that tests need no privileges.

    keyd_server.py SOCKET CONTROL_FD ID=KEY...

Serves one operation to whoever connects to the socket, and opens channels as the
control socket asks.
"""

import socket
import sys

from keyd.daemon import Keyd
from keyd.keys import load_private_key
from keyd.protocol import Open, Operation


def main() -> None:
    path, control, *entries = sys.argv[1:]
    pairs = [entry.split("=", 1) for entry in entries]
    keys = {bytes.fromhex(name): load_private_key(file, None) for name, file in pairs}
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    keyd = Keyd(keys, lambda _: None)
    grants = dict.fromkeys(keys, frozenset(Operation))
    keyd.hear_listener(listener, Open(0, lifetime_ms=60_000, operations=1, grants=grants))
    keyd.hear_parent(socket.socket(fileno=int(control)))
    print("ready", flush=True)
    keyd.serve(2)


if __name__ == "__main__":
    main()
