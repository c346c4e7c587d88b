"""Virtual hosts whose keys other hosts have: served, and what is said when those are away."""

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL

from keyd.inspection.key_search import needles, search_all
from keyd.powers import PrivateKey
from titus_py.audit.throwaway_authority import ThrowawayAuthority

from .conftest import Serve
from .instance import TITUS_PY, UIDS, Instance, Table, eventually, zombies
from .lender import Lender, lending
from .peers import Listener, TlsClient
from .service import reload, status
from .tokens import scratch

VERSIONS = {"1.2": SSL.TLS1_2_VERSION, "1.3": SSL.TLS1_3_VERSION}
KINDS = ("RSA-2048", "P-256", "Ed25519")


class Served(NamedTuple):
    """An instance with a site for each kind of key, all other hosts', and with one of its own."""

    instance: Instance
    directory: Path
    authority: Path
    keys: list[PrivateKey]

    @property
    def upstreams(self) -> tuple[Path, Path]:
        return self.directory / "a.sock", self.directory / "b.sock"

    def client(self, name: str, version: int = SSL.TLS1_3_VERSION) -> TlsClient:
        return TlsClient(self.instance.port, name, self.authority, (version, version))

    def shake_hands(self, name: str, version: int = SSL.TLS1_3_VERSION) -> None:
        with self.client(name, version) as client:
            client.handshake().send(b"x")
            assert client.receive_exactly(1) == b"x"

    def states(self) -> list[str]:
        return [one["state"] for one in status(self.instance)["upstreams"]]


@pytest.fixture(scope="module")
def served(serve_all: Serve, echoing: Listener) -> Iterator[Served]:
    yield from _served(serve_all, echoing)


@pytest.fixture
def unlent(serve: Serve, echoing: Listener) -> Iterator[Served]:
    """One whose upstreams never come."""
    yield from _served(serve, echoing)


def _served(serve: Serve, echoing: Listener) -> Iterator[Served]:
    """It starts, though none of its upstreams is there."""
    authority = ThrowawayAuthority()
    with scratch() as directory:
        vhosts: list[Table] = []
        keys: list[PrivateKey] = []
        for kind in (*KINDS, "own"):
            name = f"{kind.lower()}.example"
            issued = authority.issue(kind if kind in KINDS else "P-256", [name])
            certificate, key = directory / f"{name}.crt", "upstream"
            certificate.write_bytes(issued.certificate)
            if kind in KINDS:
                loaded = load_pem_private_key(issued.key, None)
                keys.append(loaded)  # type: ignore[arg-type]
            else:
                path = directory / f"{name}.key"
                path.touch(0o600)
                path.write_bytes(issued.key)
                key = str(path)
            vhosts.append({"sni": [name], "certificate": certificate, "key": key})
        (directory / "authority.pem").write_bytes(authority.certificate)
        uids = UIDS.take(2)
        keyd = {
            "user": str(uids[0]),
            "upstream": [f"unix:{directory / one}" for one in ("a.sock", "b.sock")],
            "upstream_user": str(uids[1]),
        }
        instance = serve(echoing.address, vhost=vhosts, keyd=keyd)
        yield Served(instance, directory, directory / "authority.pem", keys)
    UIDS.give_back(uids)


def refused_one(served: Served) -> TlsClient:
    """A client of a site whose key nobody lends."""
    with served.client("p-256.example") as client, pytest.raises(SSL.Error, match="internal error"):
        client.handshake()
    return client


def test_it_starts_without_its_upstreams_and_serves_the_others(unlent: Served) -> None:
    unlent.shake_hands("own.example")
    first, second = unlent.upstreams
    for path in (first, second):
        event = unlent.instance.wait_for_event("upstream_unusable", upstream=f"unix:{path}")
        assert event["reason"] == "cannot be connected to: No such file or directory"
    client = refused_one(unlent)
    refused = unlent.instance.wait_for_event("keyd_refused", client=client.name)
    assert (refused["level"], refused["status"]) == ("error", "failed")
    assert f"unix:{first}: cannot be connected to" in refused["attempted"]
    assert f"unix:{second}: cannot be connected to" in refused["attempted"]
    unlent.shake_hands("own.example")
    # What keyd has started ends after it, and leads a session.
    unlent.instance.expected_alarms.add("keyd_died")
    unlent.instance.keyd().kill()
    unlent.instance.wait_for_event("keyd_died")
    eventually(lambda: zombies(unlent.instance.pid), "its end")
    eventually(lambda: not zombies(unlent.instance.pid), "no zombies")


def test_the_audit_says_once_that_a_site_is_not_served(unlent: Served) -> None:
    """Its worker has ended before anybody can look at it, and that breaks no promise."""
    # The first one waits for both of them. An audit waits for less.
    refused_one(unlent)
    command = [TITUS_PY, "audit", f"--pid={unlent.instance.pid}", "--json"]
    audit = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (report,) = json.loads(audit.stdout)
    (only,) = [one for one in report["findings"] if one["verdict"] == "broken"]
    assert only["promised"] == "a client that comes is served"
    assert "internal error" in only["seen"]


@pytest.fixture(scope="module")
def lent(served: Served) -> Iterator[Lender]:
    """By the second upstream: the first is away."""
    _, second = served.upstreams
    with lending(second, served.keys) as lender:
        served.instance.wait_for_event("upstream_ready", upstream=f"unix:{second}")
        yield lender


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_key_is_served(served: Served, lent: Lender, kind: str, version: str) -> None:
    before = lent.signed
    served.shake_hands(f"{kind.lower()}.example", VERSIONS[version])
    assert lent.signed == before + 1


def test_their_keys_are_in_no_process_of_this_host(served: Served, lent: Lender) -> None:
    with served.client("p-256.example") as client:
        client.handshake()
        processes = served.instance.processes()
        names = {Path(f"/proc/{one.pid}/comm").read_text().strip() for one in processes}
        assert "keyd-connect" in names
        sought = [needle for key in served.keys for needle in needles(key)]
        for one, found in zip(
            processes, search_all([one.pid for one in processes], sought), strict=True
        ):
            assert not found.hits, f"{one}: {[str(hit) for hit in found.hits]}"
        # The control: the same search finds the site's own key.
        (own,) = served.directory.glob("own*.key")
        of_own = needles(load_pem_private_key(own.read_bytes(), None))
        assert search_all([served.instance.keyd().pid], of_own)[0].hits


def test_a_reload_keeps_on_asking_them(served: Served, lent: Lender) -> None:
    answer = reload(served.instance)
    assert answer["reloaded"], answer
    served.shake_hands("p-256.example")
    eventually(lambda: "ready" in served.states(), "the new keyd is connected")


def test_the_first_is_asked_when_it_is_there_and_the_second_when_it_is_not(
    served: Served, lent: Lender
) -> None:
    first, _ = served.upstreams
    since = len(served.instance.events())
    with lending(first, served.keys) as better:
        eventually(lambda: served.states() == ["ready", "ready"], "both are connected")
        served.shake_hands("p-256.example")
        assert better.signed
    before = lent.signed
    served.shake_hands("p-256.example")
    # One that was slow to answer is not the only one that was asked.
    assert lent.signed > before
    served.instance.wait_for_event("upstream_unusable", since=since, upstream=f"unix:{first}")

    def told() -> bool:
        one = status(served.instance)["upstreams"][1]
        assert not one["failed"]
        return bool(one["done"] and not one["in_flight"])

    # keyd tells of both once a second.
    eventually(told, "it is counted")
    command = [TITUS_PY, "status", f"--pid={served.instance.pid}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"upstream +state +asked now +signed +failed", text), text


def test_the_audit_knows_what_connects(served: Served, lent: Lender) -> None:
    command = [TITUS_PY, "audit", f"--pid={served.instance.pid}", "--json"]
    audit = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    (report,) = json.loads(audit.stdout)
    found = [one for one in report["findings"] if one["process"]["role"] == "upstreams' process"]
    confined = {"capabilities", "no_new_privs", "hidden", "filter", "namespaces", "network"}
    assert {one["check"] for one in found} >= confined
    assert not [one for one in report["findings"] if one["verdict"] == "broken"]
