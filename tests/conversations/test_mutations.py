"""ClientHellos with octets changed, put in and taken out: what OpenSSL alone says, the proxy says.

With the default cipher suites, and with Mozilla's intermediate list, of which keyd signs for a
part. Nothing that a client can send is an alarm: the instance fails where there was one.
"""

import contextlib
import socket
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integration.certificates import Certificate
from integration.instance import Instance
from integration.peers import connect
from integration.test_cipher_suites import MOZILLA
from OpenSSL import SSL

from titus_py.between.virtual_host import TlsSettings
from titus_py.worker.tls import Credentials, make_context

from .client import ALERT, HANDSHAKE, HELLO_RETRY_REQUEST, TLS12, TLS13, Client, Extension, vector

#: Refused by what the proxy itself reads of a ClientHello, before OpenSSL.
OWN = {"bad_client_hello", "not_tls", "plain_http"}
#: Where one record's header and the message's header are in these ClientHellos.
RECORD_LENGTH, MESSAGE_LENGTH, CONTENT = slice(3, 5), slice(6, 9), 5


class Mutation(NamedTuple):
    """What happens at a place in it."""

    change: str
    place: int
    octet: int

    def made_to(self, octets: bytearray) -> None:
        place = self.place % len(octets)
        if self.change == "set":
            octets[place] = self.octet
        elif self.change == "insert":
            octets.insert(place, self.octet)
        elif self.change == "remove":
            del octets[place : place + 1 + self.octet % 8]
        elif self.change == "double":
            octets[place:place] = octets[place : place + 1 + self.octet % 32]


CHANGES = ("set", "insert", "remove", "double")


def recorded(oldest: int, newest: int) -> bytes:
    """As the OpenSSL here sends it."""
    context = SSL.Context(SSL.TLS_CLIENT_METHOD)
    context.set_min_proto_version(oldest)
    context.set_max_proto_version(newest)
    context.set_alpn_protos([b"h2", b"http/1.1"])
    client = SSL.Connection(context)
    client.set_connect_state()
    client.set_tlsext_host_name(b"localhost")
    with contextlib.suppress(SSL.WantReadError):
        client.do_handshake()
    return client.bio_read(1 << 14)


@cache
def hellos() -> list[bytes]:
    """Three of OpenSSL's, and two short ones."""
    with socket.socket() as unused:
        short = [Client(0, version, source=unused).hello() for version in (TLS12, TLS13)]
    return [
        recorded(SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION),
        recorded(SSL.TLS1_3_VERSION, SSL.TLS1_3_VERSION),
        recorded(SSL.TLS1_2_VERSION, SSL.TLS1_2_VERSION),
        *(b"\x16\3\1" + vector(2, hello) for hello in short),
    ]


def mutated(hello: bytes, mutations: Sequence[Mutation], consistent: bool) -> bytes:
    """``consistent``: the lengths of record and message are made to fit."""
    octets = bytearray(hello)
    for mutation in mutations:
        mutation.made_to(octets)
    if consistent:
        octets[RECORD_LENGTH] = (len(octets) - CONTENT).to_bytes(2, "big")
        octets[MESSAGE_LENGTH] = (len(octets) - CONTENT - 4).to_bytes(3, "big")
    return bytes(octets)


def verdict(answer: bytes) -> object:
    """What these octets of a server say: an alert, what a ServerHello chooses, or nothing."""
    if answer[:1] == bytes((ALERT,)):
        return answer[6]
    if answer[:1] != bytes((HANDSHAKE,)):
        return answer[:8]
    hello = answer[9:]
    session = hello[34]
    suite, extensions = hello[35 + session : 37 + session], hello[40 + session :]
    end = int.from_bytes(answer[6:9], "big") - (40 + session)
    chosen = {}
    while end > 0:
        kind, length = int.from_bytes(extensions[:2]), int.from_bytes(extensions[2:4])
        body = extensions[4 : 4 + length]
        # Of a key share, the group.
        chosen[kind] = body[:2] if kind == Extension.KEY_SHARE else body
        extensions, end = extensions[4 + length :], end - 4 - length
    return hello[:2], hello[2:34] == HELLO_RETRY_REQUEST, suite, chosen


def of_openssl(context: SSL.Context, octets: bytes) -> tuple[object, bytes | None]:
    """What a plain server says to it, and the name that it read."""
    server = SSL.Connection(context)
    server.set_accept_state()
    server.bio_write(octets)
    with contextlib.suppress(SSL.Error):
        server.do_handshake()
    answer = b""
    with contextlib.suppress(SSL.WantReadError):
        answer = server.bio_read(1 << 16)
    return verdict(answer), server.get_servername()


def of_the_proxy(port: int, octets: bytes) -> tuple[object, str]:
    """What the proxy says to it, and the client's address, as it is logged."""
    answer = b""
    with connect(port) as client:
        host, own_port = client.getsockname()
        with contextlib.suppress(OSError):
            client.sendall(octets)
            client.shutdown(socket.SHUT_WR)
            while more := client.recv(1 << 16):
                answer += more
    return verdict(answer), f"{host}:{own_port}"


def holds(instance: Instance, port: int, context: SSL.Context, octets: bytes) -> None:
    """They say the same, unless the proxy itself has refused it, and may have."""
    alone, name = of_openssl(context, octets)
    # A client may get an earlier one's port.
    earlier = len(instance.events())
    proxied, client = of_the_proxy(port, octets)
    if proxied == alone:
        return
    event = instance.wait_for_event("handshake_failed", since=earlier, client=client)
    assert event["end"] in OWN, (alone, proxied, event)
    if isinstance(alone, tuple):
        # OpenSSL takes anything but NUL for a name.
        assert name is not None
        assert not (name.isascii() and name.decode().isprintable()), (alone, event)


@pytest.fixture(scope="session")
def contexts(certificate: Certificate) -> dict[str, SSL.Context]:
    """A worker's, but with the key itself."""
    credentials = Credentials(certificate.certificate.read_text(), certificate.key.read_text())
    return {
        name: make_context(
            [credentials], TlsSettings("TLSv1.2", "TLSv1.3", ciphers, None, None, False)
        )
        for name, ciphers in (("default", None), ("mozilla", MOZILLA))
    }


@pytest.mark.parametrize("suites", ["default", "mozilla"])
def test_a_mutated_client_hello_gets_what_openssl_gives_it(
    instance: Instance,
    ports: dict[str, int],
    contexts: dict[str, SSL.Context],
    suites: str,
) -> None:
    mutation = st.builds(
        Mutation, st.sampled_from(CHANGES), st.integers(0, 1 << 14), st.integers(0, 255)
    )

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(hellos()), st.lists(mutation, min_size=1, max_size=4), st.booleans())
    def mutate(hello: bytes, mutations: list[Mutation], consistent: bool) -> None:
        octets = mutated(hello, mutations, consistent)
        holds(instance, ports[suites], contexts[suites], octets)

    mutate()


@pytest.mark.usefixtures("instance")
@pytest.mark.parametrize("suites", ["default", "mozilla"])
def test_an_unchanged_client_hello_is_served(
    ports: dict[str, int], contexts: dict[str, SSL.Context], suites: str
) -> None:
    """The control."""
    for hello in hellos():
        alone, _ = of_openssl(contexts[suites], hello)
        assert isinstance(alone, tuple)
        assert of_the_proxy(ports[suites], hello)[0] == alone
