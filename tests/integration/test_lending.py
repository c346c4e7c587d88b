"""Keys that are lent to other hosts: to those that the configuration names, and to nobody else.

One titus-py has the keys. The test is the other hosts, also those that were taken over.
"""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL

from keyd.protocol import Power, Reply, Status
from keyd.reference import key_id
from keyd.upstream.messages import Greeting

from .client_authority import ClientAuthority, ClientCertificate
from .conftest import Certificates, Serve
from .hellos import certificate_verify, client_hello, flight
from .instance import TITUS_PY, Event, Instance, eventually
from .lending import Borrowing, signing
from .peers import Listener, Truncated
from .service import reload, status
from .tokens import USER, Hsm, scratch

#: How a connection ends that nobody wants.
ENDS = (SSL.Error, Truncated, ConnectionResetError, BrokenPipeError)


class Lender(NamedTuple):
    instance: Instance
    socket: Path
    hosts: dict[str, ClientCertificate]
    keys: dict[str, bytes]
    public: ec.EllipticCurvePublicKey


def identity_of(key: Path) -> bytes:
    return key_id(load_pem_private_key(key.read_bytes(), None).public_key())


@pytest.fixture(scope="module")
def lender(serve_all: Serve, certificates: Certificates) -> Iterator[Lender]:
    with scratch() as directory:
        yield _lender(serve_all, certificates, directory)


def _lender(serve_all: Serve, certificates: Certificates, directory: Path) -> Lender:
    """One of the keys is in a token."""
    in_token = ec.generate_private_key(ec.SECP256R1())
    home = directory / "hsm"
    home.mkdir()
    hsm = Hsm(home)
    hsm.add_token("web", key=in_token)
    authority = ClientAuthority(directory / "hosts")
    hosts = {
        name: authority.issue(name, dns=(), self_signed=True)
        for name in ("proxy-a", "proxy-b", "proxy-c", "stranger")
    }
    own, others = certificates("P-256", "a.test"), certificates("P-256", "b.test")
    path = directory / "lend.sock"
    instance = serve_all(
        f"unix:{path}",
        vhost=[
            {
                "client_certificates": "required",
                "send_proxy": "v2-tls-cert",
                "client": [
                    {"name": name, "spki": [host.spki]}
                    for name, host in hosts.items()
                    if name != "stranger"
                ],
            }
        ],
        keyd={
            "lend": f"unix:{path}",
            "token_user": USER,
            "token_paths": [home],
            "token_environment": [f"SOFTHSM2_CONF={hsm.configuration}"],
            "client": [
                {"name": "proxy-a", "keys": [own.key, hsm.uri("web", "key")]},
                {"name": "proxy-b", "keys": [others.key], "rate": "5/h"},
            ],
        },
    )
    keys = {
        "own": identity_of(own.key),
        "others": identity_of(others.key),
        "in token": key_id(in_token.public_key()),
    }
    public = load_pem_private_key(own.key.read_bytes(), None).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    return Lender(instance, path, hosts, keys, public)


def borrowing(lender: Lender, host: str) -> Borrowing:
    return Borrowing(lender.instance.port, lender.hosts[host])


def test_a_host_has_signed_what_it_may(lender: Lender) -> None:
    with borrowing(lender, "proxy-a") as host:
        assert host.begin() == Greeting(frozenset({lender.keys["own"], lender.keys["in token"]}))
        reply = host.ask(signing(lender.keys["own"]))
        assert reply.status is Status.DONE
        octets = certificate_verify(client_hello(), flight())
        lender.public.verify(reply.payload, octets, ec.ECDSA(hashes.SHA256()))

        def shown() -> bool:
            counts = status(lender.instance)["counts"]
            (one, _) = status(lender.instance)["lending"]
            return counts["lent"].get("proxy-a", 0) >= 1 and one["streams"] == 1

        eventually(shown, "the status has it")
    command = [TITUS_PY, "status", f"--pid={lender.instance.pid}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.search(r"keys lent to .*\n.*\n proxy-a +\d +2 +1000/s +\d", text), text


def test_a_key_in_a_token(lender: Lender) -> None:
    """Whose answer comes later than others that were asked for after it, perhaps."""
    with borrowing(lender, "proxy-a") as host:
        host.begin()
        host.client.send(signing(lender.keys["in token"], 1).encode())
        host.client.send(signing(lender.keys["own"], 2).encode())
        answers = [host.answer() for _ in range(2)]
    found = {one.id: one.reply.status for one in answers}
    assert found == {1: Status.DONE, 2: Status.DONE}


def test_a_strangers_host(lender: Lender) -> None:
    """Whose key no virtual host knows: it does not get past the handshake."""
    with borrowing(lender, "stranger") as host, pytest.raises(ENDS):
        host.begin()
    ended = lender.instance.wait_for_event("handshake_failed", client=host.client.name)
    assert ended["end"] == "client_certificate"


def test_a_host_that_keyd_does_not_know(lender: Lender) -> None:
    """Its virtual host does: the refusal has its name."""
    with borrowing(lender, "proxy-c") as host:
        host.client.handshake()
        assert host.ends()
    refused = lender.instance.wait_for_event("lending_refused", client_name="proxy-c")
    assert (refused["status"], refused["level"], refused["count"]) == ("stranger", "error", 1)

    def counted() -> bool:
        return "proxy-c stranger" in status(lender.instance)["counts"]["lending_refused"]

    eventually(counted, "it is counted")


def test_a_host_that_asks_for_anothers_key(lender: Lender) -> None:
    """It is told no, and counted by its name; what it may ask, it may still ask."""
    with borrowing(lender, "proxy-a") as host:
        host.begin()
        assert host.ask(signing(lender.keys["others"])) == Reply(Status.NOT_GRANTED)
        refused = lender.instance.wait_for_event(
            "lending_refused", client_name="proxy-a", status="not_lent"
        )
        assert refused["attempted"].endswith(
            f"{lender.keys['others'].hex()}, which is not lent to it"
        )
        assert host.ask(signing(lender.keys["own"])).status is Status.DONE

        def counted() -> bool:
            return "proxy-a not_lent" in status(lender.instance)["counts"]["lending_refused"]

        eventually(counted, "it is counted")


@pytest.mark.parametrize(
    ("changed", "answer"),
    [
        ({"powers": frozenset({Power.SIGN_TLS12})}, Status.NOT_GRANTED),
        ({"client_hello": client_hello(random=bytes(32))}, Status.NOT_TLS),
        ({"client_hello": b""}, Status.UNWITNESSED),
    ],
)
def test_what_no_handshake_needs(
    lender: Lender, changed: dict[str, object], answer: Status
) -> None:
    with borrowing(lender, "proxy-a") as host:
        host.begin()
        assert host.ask(signing(lender.keys["own"], **changed)) == Reply(answer)
    lender.instance.wait_for_event(
        "lending_refused", client_name="proxy-a", status=answer.name.lower()
    )


def test_a_flood(lender: Lender) -> None:
    """So many in an hour: of the others, the log has a few lines, and another host no harm."""
    with borrowing(lender, "proxy-b") as host, borrowing(lender, "proxy-a") as other:
        host.begin()
        other.begin()
        for number in range(200):
            host.client.send(signing(lender.keys["others"], number).encode())
        statuses = [host.answer().reply.status for _ in range(200)]
        assert statuses == [Status.DONE] * 5 + [Status.EXHAUSTED] * 195
        assert other.ask(signing(lender.keys["own"])).status is Status.DONE

        def counted() -> bool:
            counts = status(lender.instance)["counts"]["lending_refused"]
            return bool(counts.get("proxy-b exhausted") == 195)

        eventually(counted, "each is counted")

    def told() -> list[Event]:
        return lender.instance.events_named(
            "lending_refused", client_name="proxy-b", status="exhausted"
        )

    eventually(lambda: sum(event["count"] for event in told()) == 195, "each is logged")
    assert all(event["level"] == "warning" for event in told())


def attempt(path: Path) -> str:
    """Another user's; returns what is said if it fails."""
    program = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    return subprocess.run(
        ["/usr/bin/python3", "-S", "-c", program, path],
        user="nobody",
        group="nogroup",
        extra_groups=[],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    ).stderr


def test_nobody_else_connects(lender: Lender) -> None:
    """Not another user, by the socket's mode; and keyd does not hear root."""
    assert "PermissionError" in attempt(lender.socket)
    with socket.socket(socket.AF_UNIX) as anybodys:
        beside = lender.socket.with_name("anybodys.sock")
        anybodys.bind(str(beside))
        beside.chmod(0o666)
        anybodys.listen()
        assert attempt(beside) == ""
    with socket.socket(socket.AF_UNIX) as root:
        root.settimeout(60)
        root.connect(str(lender.socket))
        assert root.recv(1) == b""
    what = f"a connection from uid {os.getuid()}"
    refused = lender.instance.wait_for_event("lending_refused", status="stranger", attempted=what)
    assert "client_name" not in refused


def test_nor_do_the_groups_that_backends_have(serve: Serve, certificates: Certificates) -> None:
    """A stranger that connects may hold keyd up: by what it leaves in its socket (SO_LINGER)."""
    with scratch() as directory:
        directory.chmod(0o755)
        path, key = directory / "lend.sock", certificates("P-256", "a.test").key
        host = ClientAuthority(directory / "hosts").issue("proxy-a", dns=(), self_signed=True)
        instance = serve(
            f"unix:{path}",
            vhost=[
                {
                    "client_certificates": "required",
                    "send_proxy": "v2-tls-cert",
                    "client": [{"name": "proxy-a", "spki": [host.spki]}],
                }
            ],
            keyd={"lend": f"unix:{path}", "client": [{"name": "proxy-a", "keys": [key]}]},
            worker={"backend_groups": ["nogroup"]},
        )
        for _ in range(2):
            assert "PermissionError" in attempt(path)
            with Borrowing(instance.port, host) as borrowed:
                assert borrowed.begin().keys == {identity_of(key)}
            # The next parent has another group.
            assert reload(instance)["reloaded"]


def test_the_audit_finds_nothing_amiss(lender: Lender) -> None:
    with borrowing(lender, "proxy-a") as host:
        host.begin()
        with subprocess.Popen(
            [TITUS_PY, "audit", "--quiet", f"--pid={lender.instance.pid}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as audit:
            host.stay_until_it_ends(audit)
            said, _ = audit.communicate()
        assert audit.returncode == 0, said
        assert host.ask(signing(lender.keys["own"])).status is Status.DONE


def test_a_reload_that_fails_leaves_the_socket_where_it_was(lender: Lender) -> None:
    configuration = lender.instance.directory / "titus.toml"
    text = configuration.read_text()
    with Listener.tcp() as taken:
        metrics = f'[metrics]\naddress = "{taken.address}"\n'
        configuration.write_text(text.replace("/lend.sock", "/elsewhere.sock") + metrics)
        answer = reload(lender.instance)
        configuration.write_text(text)
    assert not answer["reloaded"]
    assert "metrics.address" in answer["problems"][0]
    assert not lender.socket.with_name("elsewhere.sock").exists()
    with borrowing(lender, "proxy-a") as host:
        host.begin()
        assert host.ask(signing(lender.keys["own"])).status is Status.DONE


def test_another_program_takes_a_host_out_and_lends_elsewhere(lender: Lender) -> None:
    """One that stays has its stream ended, to connect to what serves now."""
    configuration = lender.instance.directory / "titus.toml"
    before = text = configuration.read_text()
    with borrowing(lender, "proxy-a") as host, borrowing(lender, "proxy-b") as out:
        host.begin()
        out.begin()
        # The second table goes.
        start = text.index("[[keyd.client]]", text.index("[[keyd.client]]") + 1)
        end = text.index("\n[", start + 3) + 1
        text = (text[:start] + text[end:]).replace("/lend.sock", "/elsewhere.sock")
        configuration.write_text(text)
        command = [TITUS_PY, "reload", "--program", f"--pid={lender.instance.pid}"]
        subprocess.run(command, check=True)
        for one in (host, out):
            assert one.ends()
    assert not lender.socket.exists()
    assert lender.socket.with_name("elsewhere.sock").is_socket()
    with borrowing(lender, "proxy-a") as host:
        host.begin()
        assert host.ask(signing(lender.keys["own"])).status is Status.DONE
    with borrowing(lender, "proxy-b") as out:
        out.client.handshake()
        assert out.ends()
    lender.instance.wait_for_event("lending_refused", client_name="proxy-b", status="stranger")
    # The other tests may come in any order.
    configuration.write_text(before)
    assert reload(lender.instance)["reloaded"]
    assert lender.socket.is_socket()


@pytest.fixture
def another_lender(serve: Serve, certificates: Certificates) -> Iterator[Lender]:
    """For a test to end."""
    with scratch() as directory:
        yield _lender(serve, certificates, directory)


def test_after_a_keyd_that_died_another_one_lends_and_a_stop_waits_for_no_host(
    another_lender: Lender,
) -> None:
    lender = another_lender
    lender.instance.expected_alarms.add("keyd_died")
    lender.instance.keyd().kill()
    lender.instance.wait_for_event("keyd_died")

    def lends_again() -> bool:
        with suppress(*ENDS, AssertionError), borrowing(lender, "proxy-a") as host:
            host.begin()
            return host.ask(signing(lender.keys["own"])).status is Status.DONE
        return False

    eventually(lends_again, "the next keyd lends")
    with borrowing(lender, "proxy-a") as host:
        host.begin()
        lender.instance.signal(signal.SIGTERM)
        assert host.ends()
        host.client.socket.close()
        # worker.drain is longer than this is waited for.
        assert lender.instance.wait() == 0
    assert not lender.socket.exists()
