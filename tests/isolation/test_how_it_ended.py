"""A worker that was taken over gives its parent a reason to kill it, and ends before it is killed.

It claims to serve a client that has as many connections as it may have. Such a worker is killed,
and that is no alarm. How it ended is told all the same, where it did not wait for that.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from integration.certificates import Certificate
from integration.instance import PATIENCE, Event, Instance, eventually, free_port, zombies
from integration.peers import Listener, TlsClient

from titus_py.between.client_allow import Facts
from titus_py.between.client_identity import Identity
from titus_py.between.messages import Dial, Ends, Proxied

from .harness import infected

KNOWN = {
    "sni": ["known.test"],
    "client_certificates": "required",
    "client": [{"name": "web-1", "spki": [f"sha256:{'11' * 32}"], "connections": 1}],
}
#: That its client is this one, and has shown so; and then that its handshake is done.
KNOWN_CLIENT = Identity(Facts((), (), (), "00" * 32), (), b"", known=0), Dial(0, None)
#: That a load balancer has named this address.
ADDRESS = (Proxied(Ends("192.0.2.1", 56324, "203.0.113.2", 443)),)

Messages = tuple[Identity | Dial | Proxied, ...]


@contextmanager
def taken_over(instance: Instance, then: str, messages: Messages) -> Iterator[TlsClient]:
    """A client whose worker sends these at its word."""
    order = ["h.word", then, *(message.encode().hex() for message in messages)]
    with TlsClient(instance.port, ".".join([*order, "attack.test"])) as client:
        client.socket.sendall(client.first_flight())
        assert client.socket.recv(1) == b"."
        yield client


def over_the_limit(instance: Instance, then: str, messages: Messages) -> Event:
    """What the log has of such a worker; its parent comes too late to kill one that ends."""
    since = len(instance.events())
    with taken_over(instance, then, messages) as client:
        parent = instance.parent()
        parent.kill(signal.SIGSTOP)
        try:
            client.socket.sendall(b"!")
            if then != "stay":
                eventually(lambda: zombies(parent.pid), "it has ended")
        finally:
            parent.kill(signal.SIGCONT)
        return instance.wait_for_event("handshake_failed", since=since)


def tables(behind_a_balancer: bool) -> dict[str, Any]:
    patience = f"{PATIENCE:g}s"
    patient = {"worker": {"handshake_timeout": patience}}
    if not behind_a_balancer:
        return patient | {"vhost": [KNOWN, {}]}
    address = f"127.0.0.1:{free_port()}"
    balanced = {"accept_proxy_from": ["127.0.0.0/8"], "proxy_timeout": patience}
    return patient | {
        "listen": [{"address": address, **balanced}],
        "limits": {"connections_per_address": 1},
    }


@pytest.mark.parametrize(
    ("messages", "limit"),
    [(KNOWN_CLIENT, "client_connections"), (ADDRESS, "connections_per_address")],
    ids=["a known client", "an address"],
)
def test_it_is_told_beside_the_reason_to_kill_it(
    certificate: Certificate, tmp_path: Path, messages: Messages, limit: str
) -> None:
    complete = tables(behind_a_balancer=messages == ADDRESS)
    # The balancer's header is not read: what is in it, the worker makes up.
    with (
        Listener.tcp() as backend,
        infected(tmp_path, certificate, backend.address, ["header"], **complete) as instance,
        taken_over(instance, "stay", messages) as first,
    ):
        first.socket.sendall(b"!")
        if messages == ADDRESS:
            instance.wait_for_event("connection_begun")
        else:
            backend.accept().close()
        # One that waits to be killed is, and that is all that there is to say.
        end = over_the_limit(instance, "stay", messages)
        assert (end["level"], end["end"], end.get("how")) == ("info", limit, None)
        end = over_the_limit(instance, "defy", messages)
        assert (end["level"], end["end"], end["how"]) == ("alarm", limit, "killed by SIGSYS")
        # It counts as any other crash: an attacker could guess at the memory layout like this.
        for _ in range(2):
            end = over_the_limit(instance, "crash", messages)
            assert (end["level"], end["end"], end["how"]) == ("alarm", limit, "killed by SIGSEGV")
        replaced = instance.wait_for_event("fork_server_replaced")
        assert replaced["reason"].endswith("the last one killed by SIGSEGV")
