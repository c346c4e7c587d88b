"""The audit's TLS client, in this process: what a peer can do to it."""

import itertools
import socket
import ssl
import threading
from contextlib import suppress

from titus_py.audit import client as client_module
from titus_py.audit import probe
from titus_py.audit.client import Client, shake_hands
from titus_py.configuration.tables import Worker

# A record of 16 KiB that begins with a ServerHello of 16 KiB: nothing is wrong with it yet.
FLIGHT = itertools.chain(bytes.fromhex("16 0303 4000  02 003ffc 0303"), itertools.repeat(0))


def test_a_worker_ends_a_slow_handshake_before_the_client_does_and_that_before_the_audit() -> None:
    assert Worker().handshake_timeout < client_module._SECONDS < probe._CLIENT_SECONDS


def test_a_server_that_is_never_done_does_not_keep_the_audit() -> None:
    """Each octet comes in time for a limit on single waits."""
    ours, theirs = socket.socketpair()
    done = threading.Event()

    def trickle() -> None:
        with suppress(OSError):
            for octet in FLIGHT:
                theirs.sendall(bytes([octet]))
                if done.wait(0.02):
                    return

    server = threading.Thread(target=trickle)
    server.start()
    context = ssl.create_default_context()
    client = Client(context, ours, "localhost", None, seconds=2.0)
    watchdog = threading.Timer(20, lambda: theirs.shutdown(socket.SHUT_RDWR))
    watchdog.start()
    try:
        assert client.begin() == {}
        assert shake_hands(client) == {"error": "timed out"}
    finally:
        done.set()
        watchdog.cancel()
        server.join()
        ours.close()
        theirs.close()
