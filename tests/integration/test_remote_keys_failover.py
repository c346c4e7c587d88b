"""A proxy without keys and two hosts that have them, on one network; one of these is killed."""

import itertools
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from conftest import Rounds
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keyd.reference import key_id

from .certificates import Certificate
from .conftest import Certificates, Serve
from .hosts import Network, network
from .instance import UIDS, Instance, Table, eventually
from .namespaces import ip
from .peers import Listener, TlsClient, echo, served_by
from .service import FAILS, PATIENCE, reload, status
from .tokens import scratch

#: On the network: where the keys are, who borrows them, and who are the clients.
KEY_HOSTS, PROXY, CLIENTS = (1, 2), 3, 4
PORT, KEYS_PORT = 8443, 8444
DROP_ALL = """
table inet cut {
    chain in { type filter hook input priority 0; policy drop; }
    chain out { type filter hook output priority 0; policy drop; }
}
"""


class Site(NamedTuple):
    network: Network
    proxy: Instance
    keys: list[Instance]
    certificate: Certificate
    upstreams: list[str]

    def client(self) -> TlsClient:
        """To be made within the clients' namespace."""
        host = f"10.77.0.{PROXY}"
        return TlsClient(PORT, "localhost", self.certificate.authority, host=host)

    def shake_hands(self) -> bool:
        """Whether it succeeds, tried again once."""
        for _ in range(2):
            try:
                with self.client() as client:
                    client.handshake().send(b"x")
                    assert client.receive_exactly(1) == b"x"
                    return True
            except FAILS:
                continue
        return False


def pin(certificate: Certificate) -> str:
    key = load_pem_private_key(certificate.key.read_bytes(), None)
    return f"sha256:{key_id(key.public_key()).hex()}"


@pytest.fixture(scope="module")
def site(serve_all: Serve, certificates: Certificates) -> Iterator[Site]:
    yield from _site(serve_all, certificates)


@pytest.fixture
def doomed(serve: Serve, certificates: Certificates) -> Iterator[Site]:
    """For a test to end."""
    yield from _site(serve, certificates)


def _site(serve: Serve, certificates: Certificates) -> Iterator[Site]:
    own, borrower = certificates("P-256", "localhost"), certificates("P-256", "proxy-a")
    with ExitStack() as opened:
        directory = opened.enter_context(scratch())
        hosts = opened.enter_context(network(4))
        app = opened.enter_context(hosts.on(PROXY, Listener.tcp))
        opened.enter_context(served_by(app, echo))
        lenders = []
        tunnels: list[Table] = []
        uid = UIDS.take(2)
        for number in KEY_HOSTS:
            shown = certificates("P-256", f"keys-{number}")
            lend = f"unix:{directory}/lend-{number}.sock"
            tables: Table = {
                "listen": [{"address": f"10.77.0.{number}:{KEYS_PORT}"}],
                "vhost": [
                    {
                        "certificate": shown.certificate,
                        "key": shown.key,
                        "min_version": "TLSv1.3",
                        "client_certificates": "required",
                        "send_proxy": "v2-tls-cert",
                        "backend": lend,
                        "client": [{"name": "proxy-a", "spki": [pin(borrower)]}],
                    }
                ],
                "limits": {"half_closed_timeout": "1s"},
                "keyd": {
                    "user": str(UIDS.take(1)[0]),
                    "lend": lend,
                    "client": [{"name": "proxy-a", "keys": [own.key], "rate": "100000/s"}],
                },
            }
            lenders.append(hosts.on(number, lambda tables=tables: serve(**tables)))
            tunnels.append(
                {
                    "listen": f"unix:{directory}/keys-{number}.sock",
                    "socket_user": str(uid[0]),
                    "connect": f"10.77.0.{number}:{KEYS_PORT}",
                    "certificate": borrower.certificate,
                    "key": borrower.key,
                    "pins": [pin(shown)],
                }
            )
        proxy = {
            "listen": [{"address": f"10.77.0.{PROXY}:{PORT}"}],
            "vhost": [
                {"certificate": own.certificate, "key": "upstream", "backend": app.address},
            ],
            "tunnel": tunnels,
            "worker": {"drain": "1h"},
            "keyd": {
                "user": str(uid[1]),
                "upstream": [tunnel["listen"] for tunnel in tunnels],
                "upstream_user": str(uid[0]),
            },
        }
        instance = hosts.on(PROXY, lambda: serve(**proxy))
        yield Site(hosts, instance, lenders, own, [tunnel["listen"] for tunnel in tunnels])


def states(instance: Instance) -> list[str]:
    return [one["state"] for one in status(instance)["upstreams"]]


def test_the_first_handshake_after_the_start_finds_its_key(site: Site) -> None:
    """keyd is there before the tunnels are: it waits for them."""
    assert site.network.on(CLIENTS, site.shake_hands)
    eventually(lambda: states(site.proxy) == ["ready", "ready"], "both can be asked")


def test_a_reload_of_the_proxy_leaves_nothing_behind(site: Site) -> None:
    """Its keyds' own connections never end by themselves, and keep no generation."""
    assert reload(site.proxy)["reloaded"]
    assert site.network.on(CLIENTS, site.shake_hands)
    eventually(lambda: len(status(site.proxy)["generations"]) == 1, "the former one has ended")
    assert site.network.on(CLIENTS, site.shake_hands)
    eventually(lambda: states(site.proxy) == ["ready", "ready"], "both can be asked again")


def test_the_first_host_is_cut_off_and_back(site: Site) -> None:
    """Nothing ends its connection: it is slow, and the second one is asked as well."""

    def done() -> list[int]:
        return [one["done"] for one in status(site.proxy)["upstreams"]]

    def first_is_asked() -> bool:
        before = done()
        assert site.network.on(CLIENTS, site.shake_hands)
        eventually(lambda: sum(done()) > sum(before), "it is counted")
        return done()[0] > before[0]

    now = done()
    site.network.on(KEY_HOSTS[0], lambda: ip("link", "set", "eth0", "down"))
    try:
        made = site.network.on(CLIENTS, lambda: [site.shake_hands() for _ in range(4)])
        assert made == [True] * 4
        eventually(lambda: done()[1] >= now[1] + 4, "the second one has done all")
    finally:
        site.network.on(KEY_HOSTS[0], lambda: ip("link", "set", "eth0", "up"))
    eventually(first_is_asked, "the first one is asked again")


def nft(rules: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


def test_all_packets_are_dropped_and_neither_end_is_told(site: Site) -> None:
    """Both find out in a bounded time. TCP gives up after a quarter of an hour."""
    first, there = site.keys[0], KEY_HOSTS[0]

    def streams() -> int:
        (one,) = status(first)["lending"]
        return int(one["streams"])

    def connections() -> int:
        (generation,) = status(first)["generations"]
        return int(generation["connections"])

    def is_asked() -> bool:
        before = [one["done"] for one in status(site.proxy)["upstreams"]]
        assert site.network.on(CLIENTS, site.shake_hands)
        return bool(status(site.proxy)["upstreams"][0]["done"] > before[0])

    eventually(lambda: streams() == 1, "there is one stream")
    eventually(is_asked, "the first one is asked")
    # It may have been before: the test above cuts it off, too.
    since = len(site.proxy.events())
    site.network.on(there, lambda: nft(DROP_ALL))
    try:
        assert site.network.on(CLIENTS, site.shake_hands)
        site.proxy.wait_for_event(
            "upstream_unusable",
            since=since,
            upstream=site.upstreams[0],
            reason="it leaves asks unanswered, and has said nothing for 4 s",
        )
        eventually(lambda: states(site.proxy)[0] != "ready", "nor is it asked any more")
        eventually(lambda: streams() == 0, "its place is free", 60)
        eventually(lambda: connections() == 0, "nor is there its connection", 60)
    finally:
        site.network.on(there, lambda: nft("delete table inet cut"))
    eventually(lambda: streams() == 1 and states(site.proxy)[0] == "ready", "it is back", 60)
    eventually(is_asked, "the first one is asked again")


def test_the_first_host_is_killed_under_load_and_the_proxy_ends_when_it_is_told_to(
    doomed: Site, rounds: Rounds
) -> None:
    """Though its keyd's connection to the second one could go on for an hour."""
    count = rounds(enough=240, full=2_000)
    numbers = itertools.count(1)
    killed = threading.Event()

    def one(_: int) -> bool:
        if next(numbers) == count // 2:
            doomed.keys[0].signal(signal.SIGKILL)
            killed.set()
        return doomed.shake_hands()

    def all_of_them() -> list[bool]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, range(count)))

    since = len(doomed.proxy.events())
    made = doomed.network.on(CLIENTS, all_of_them)
    assert killed.is_set()
    assert made == [True] * count
    doomed.proxy.wait_for_event("upstream_unusable", since=since, upstream=doomed.upstreams[0])

    def settled() -> bool:
        first, second = status(doomed.proxy)["upstreams"]
        done = first["done"] + second["done"]
        return done >= count and (second["state"], second["in_flight"]) == ("ready", 0)

    eventually(settled, "the second one has done the rest")
    doomed.proxy.signal(signal.SIGTERM)
    assert doomed.proxy.wait(PATIENCE) == 0
