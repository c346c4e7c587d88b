"""Two hosts, as docs/remote-keys.md has them: one that serves a site, and one that has its key.

Both are titus-py, with TLS between them. What a host does that was taken over is in test_lending.
"""

import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate
from OpenSSL import SSL

from keyd.inspection.key_search import needles, search_all

from .certificates import Certificate
from .client_authority import ClientAuthority, spki_of
from .conftest import Certificates, Serve
from .instance import UIDS, Instance, Process, eventually
from .peers import Listener, TlsClient, Truncated
from .service import PATIENCE, reload, status
from .tokens import scratch

_RATE = '"1000/s"'


class Hosts(NamedTuple):
    site: Certificate
    proxy: Instance
    keys: Instance

    def shake_hands(self) -> None:
        """And be served. Raises what a TlsClient raises."""
        with TlsClient(self.proxy.port, "site.test", self.site.authority) as client:
            client.handshake().send(b"x")
            assert client.receive_exactly(1) == b"x"

    def is_ready(self) -> bool:
        (upstream,) = status(self.proxy)["upstreams"]
        return bool(upstream["state"] == "ready")

    def is_ready_again(self) -> bool:
        """Once the other host has reloaded: by the keyd that lends now.

        What is told once a second may still be of the stream to the keyd before.
        """
        told = status(self.keys)
        (lent,) = told["lending"]
        return len(told["generations"]) == lent["streams"] == 1 and self.is_ready()


@pytest.fixture(scope="module")
def hosts(serve_all: Serve, certificates: Certificates, echoing: Listener) -> Iterator[Hosts]:
    site = certificates("P-256", "site.test")
    uids = UIDS.take(2)
    UIDS.hold(uids)
    with scratch() as directory:
        authority = ClientAuthority(directory / "hosts")
        proxy_a, proxy_b = (
            authority.issue(name, dns=(), self_signed=True) for name in ("proxy-a", "proxy-b")
        )
        keys_1 = certificates("P-256", "keys-1")
        lend, borrow = f"unix:{directory / 'lend.sock'}", f"unix:{directory / 'keys.sock'}"
        keys = serve_all(
            lend,
            vhost=[
                {
                    "certificate": keys_1.certificate,
                    "key": keys_1.key,
                    "min_version": "TLSv1.3",
                    "client_certificates": "required",
                    "send_proxy": "v2-tls-cert",
                    "client": [
                        {"name": "proxy-a", "spki": [proxy_a.spki]},
                        {"name": "proxy-b", "spki": [proxy_b.spki]},
                    ],
                }
            ],
            keyd={
                "lend": lend,
                "client": [{"name": "proxy-a", "keys": [site.key], "rate": "1000/s"}],
            },
        )
        pin = spki_of(load_pem_x509_certificate(keys_1.certificate.read_bytes()))
        proxy = serve_all(
            echoing.address,
            vhost=[{"certificate": site.certificate, "key": "upstream"}],
            tunnel=[
                {
                    "listen": borrow,
                    "connect": f"127.0.0.1:{keys.port}",
                    "pins": [pin],
                    "certificate": proxy_a.chain,
                    "key": proxy_a.key,
                    "socket_mode": "0666",
                }
            ],
            keyd={"user": str(uids[0]), "upstream": [borrow], "upstream_user": str(uids[1])},
        )
        found = Hosts(site, proxy, keys)
        eventually(found.is_ready, "the proxy has reached the keys")
        yield found
    UIDS.give_back(uids)


def change(instance: Instance, old: str, new: str) -> None:
    configuration = instance.directory / "titus.toml"
    text = configuration.read_text()
    assert old in text
    configuration.write_text(text.replace(old, new))
    assert reload(instance)["reloaded"]


@pytest.mark.parametrize("version", [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION])
def test_a_site_is_served_whose_key_is_on_the_other_host(hosts: Hosts, version: int) -> None:
    versions = version, version

    def lent() -> int:
        return int(status(hosts.keys)["counts"]["lent"].get("proxy-a", 0))

    before = lent()
    with TlsClient(hosts.proxy.port, "site.test", hosts.site.authority, versions) as client:
        client.handshake().send(b"x")
        assert client.receive_exactly(1) == b"x"

    def lends() -> list[tuple[str, int]]:
        return [(one["client"], one["streams"]) for one in status(hosts.keys)["lending"]]

    # Its keyd tells of both once a second.
    eventually(lambda: lent() > before, "the other host has counted it")
    eventually(lambda: lends() == [("proxy-a", 1)], "for one host, with one stream")


def test_nobody_notices_that_the_process_is_killed_which_connects(hosts: Hosts) -> None:
    """keyd cannot start it again. So another keyd follows, and reaches what is lost later."""
    (connecting,) = (
        one for one in hosts.proxy.processes() if title(one) == "keyd: connecting to upstreams"
    )
    since = len(hosts.proxy.events())
    connecting.kill()
    hosts.proxy.wait_for_event("reloaded", since=since)
    eventually(hosts.is_ready, "another keyd", PATIENCE)
    hosts.keys.expected_alarms |= {"connection_ended", "worker_failed"}
    for worker in hosts.keys.workers():
        # That of the stream to the keyd before may be ending.
        with suppress(ProcessLookupError):
            worker.kill()
    hosts.shake_hands()
    eventually(hosts.is_ready, "the keys are there again", PATIENCE)


def title(process: Process) -> str:
    """Of one that may have ended."""
    with suppress(OSError):
        octets = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        return octets.partition(b"\0")[0].decode()
    return ""


def test_the_key_is_in_no_process_of_the_proxy(hosts: Hosts) -> None:
    key = load_pem_private_key(hosts.site.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    processes = [one.pid for one in hosts.proxy.processes()]
    assert not any(found.hits for found in search_all(processes, needles(key)))
    # The control: the same search finds it where it is.
    assert search_all([hosts.keys.keyd().pid], needles(key))[0].hits


def test_no_client_that_tries_again_notices_a_reload_of_the_other_host(hosts: Hosts) -> None:
    failed: list[str] = []
    over = threading.Event()

    def many() -> None:
        while not over.is_set():
            try:
                hosts.shake_hands()
            except (SSL.Error, Truncated, ConnectionResetError):
                try:
                    hosts.shake_hands()
                except (SSL.Error, Truncated, ConnectionResetError) as error:
                    failed.append(repr(error))

    client = threading.Thread(target=many)
    client.start()
    try:
        assert reload(hosts.keys)["reloaded"]
    finally:
        over.set()
        client.join()
    assert failed == []


def test_too_many_are_refused_by_name(hosts: Hosts) -> None:
    """Each client is told by an alert, and both hosts' logs say why. The other host is unharmed."""
    change(hosts.keys, _RATE, '"3/h"')
    eventually(hosts.is_ready_again, "the proxy has connected again")

    def outcome() -> str:
        try:
            hosts.shake_hands()
        except SSL.Error as error:
            return str(error)
        return "served"

    outcomes = [outcome() for _ in range(6)]
    assert outcomes[:3] == ["served"] * 3
    assert all("alert internal error" in one for one in outcomes[3:]), outcomes
    hosts.keys.wait_for_event("lending_refused", client_name="proxy-a", status="exhausted")
    refused = hosts.proxy.wait_for_event("keyd_refused", status="failed")
    assert "exhausted" in refused["attempted"].lower(), refused
    change(hosts.keys, '"3/h"', _RATE)
    eventually(hosts.is_ready_again, "the proxy has connected again")
    hosts.shake_hands()


def test_a_host_that_was_taken_out_has_nothing_signed(hosts: Hosts) -> None:
    """Its connections are still known by name."""
    change(hosts.keys, 'name = "proxy-a"\nkeys', 'name = "proxy-b"\nkeys')
    try:
        hosts.keys.wait_for_event("lending_refused", client_name="proxy-a", status="stranger")
        with pytest.raises(SSL.Error, match="alert internal error"):
            hosts.shake_hands()
    finally:
        change(hosts.keys, 'name = "proxy-b"\nkeys', 'name = "proxy-a"\nkeys')
    eventually(hosts.is_ready_again, "the proxy has connected again")
    hosts.shake_hands()
