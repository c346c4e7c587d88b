"""What keyd signs for a worker that was taken over is for the client that the parent has seen."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from integration.certificates import Authority, Certificate
from integration.hellos import (
    RETRY,
    TLS12,
    TLS13,
    certificate_verify,
    client_hello,
    flight,
    server_hello,
)
from integration.instance import Instance
from integration.peers import Listener, echo, served_by

from keyd.protocol import Reply, Status

from .harness import Relay, infected, over_tls
from .test_oracle import HANDSHAKE, assert_refused, key_exchange, private_key, request

#: Names that a worker takes for the same order, each another virtual host's.
OWN, OTHER = "0", "00"
ASKED = {name: f"h.relay.{name}.attack.test" for name in (OWN, OTHER)}
RANDOM = bytes(range(100, 132))
FOR_RANDOM = RANDOM + bytes(24) + b"DOWNGRD\x01" + key_exchange(29, bytes(32))[64:]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    authority = Authority(tmp_path_factory.mktemp("authority"))
    return {name: authority.issue("P-256", ASKED[name]) for name in (OWN, OTHER)}


@pytest.fixture(scope="module")
def instance(
    certificates: dict[str, Certificate], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    other = certificates[OTHER]
    with (
        Listener.tcp() as backend,
        served_by(backend, echo),
        infected(
            tmp_path_factory.mktemp("infected"),
            certificates[OWN],
            backend.address,
            vhost=[
                {"sni": [ASKED[OWN], "localhost"]},
                {"sni": [ASKED[OTHER]], "certificate": other.certificate, "key": other.key},
            ],
        ) as instance,
    ):
        yield instance


@pytest.mark.parametrize("asked", [OWN, OTHER])
@pytest.mark.parametrize("key", [OWN, OTHER])
def test_the_key_is_that_of_the_virtual_host_that_the_client_asks_for(
    instance: Instance, certificates: dict[str, Certificate], asked: str, key: str
) -> None:
    """With the control: what is another's for one name is its own for the other."""
    relay = Relay(instance, asked)
    octets = relay.handshake()
    message = request(certificates[key], octets)
    if key == asked:
        reply = Reply.decode(relay.ask(message))
        public = private_key(certificates[key]).public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(reply.payload, octets, ec.ECDSA(hashes.SHA256()))
    else:
        attempted = f"for a client that asks for {ASKED[asked]}"
        assert_refused(instance, relay, message, Status.NOT_GRANTED, attempted)
    relay.close()
    assert over_tls(instance, "localhost", b"still there") == b"still there"


@pytest.mark.parametrize(
    ("hello", "octets", "attempted"),
    [
        ({"versions": [TLS12], "random": RANDOM}, FOR_RANDOM, None),
        (
            {"versions": [TLS12]},
            FOR_RANDOM,
            "a ServerKeyExchange with another random than the client's",
        ),
        (
            {"versions": [TLS13, TLS12], "random": RANDOM},
            FOR_RANDOM,
            "a ServerKeyExchange of TLS 1.2 for a client that offers TLS 1.3",
        ),
        (
            {"versions": [TLS12]},
            HANDSHAKE,
            "a CertificateVerify of TLS 1.3 for a client that does not offer it",
        ),
    ],
    ids=["the control", "another random", "a downgrade", "an upgrade"],
)
def test_the_version_and_the_random_are_the_clients(
    instance: Instance,
    certificates: dict[str, Certificate],
    hello: Mapping[str, Any],
    octets: bytes,
    attempted: str | None,
) -> None:
    relay = Relay(instance, OWN, hello=hello)
    message = request(certificates[OWN], octets)
    if attempted is None:
        assert Reply.decode(relay.ask(message)).status is Status.DONE
    else:
        assert_refused(instance, relay, message, Status.NOT_TLS, attempted)
    relay.close()


def test_what_keyd_does_not_read_is_no_alarm(
    instance: Instance, certificates: dict[str, Certificate]
) -> None:
    """Anybody can send a ClientHello with so many extensions, and have it refused."""
    relay = Relay(instance, OWN, hello={"more": [(1000 + number, b"") for number in range(300)]})
    message = request(certificates[OWN], HANDSHAKE)
    assert Reply.decode(relay.ask(message)) == Reply(Status.UNWITNESSED)
    event = instance.wait_for_event("keyd_refused", client=relay.client)
    assert (event["level"], event["status"]) == ("warning", "unwitnessed")
    assert event["attempted"] == "sign for a ClientHello with more than 256 extensions"
    relay.close()


# --- the handshake that is signed --------------------------------------------------------------


def test_a_hash_from_nowhere(instance: Instance, certificates: dict[str, Certificate]) -> None:
    """Whatever it is of: keyd has heard of no handshake."""
    relay = Relay(instance, OWN)
    attempted = "a CertificateVerify of a handshake whose messages have not come"
    message = request(certificates[OWN], HANDSHAKE)
    assert_refused(instance, relay, message, Status.NOT_TLS, attempted)
    relay.close()


@pytest.mark.parametrize("what", ["another client", "another server", "any"])
def test_the_hash_of_another_handshake(
    instance: Instance, certificates: dict[str, Certificate], what: str
) -> None:
    """A victim's elsewhere, whose ClientHello came to another server: the attacker's."""
    relay = Relay(instance, OWN)
    relay.handshake()
    victims = client_hello("localhost", random=b"victim's random, as it was sent ")
    octets = {
        "another client": certificate_verify(victims, flight()),
        "another server": certificate_verify(relay.hello, flight(certificate=b"another")),
        "any": HANDSHAKE,
    }[what]
    attempted = "a CertificateVerify of another handshake than the one whose messages came"
    message = request(certificates[OWN], octets)
    assert_refused(instance, relay, message, Status.NOT_TLS, attempted)
    relay.close()


def test_a_client_hello_that_the_worker_makes_up(
    instance: Instance, certificates: dict[str, Certificate]
) -> None:
    """It has a place for one: after a HelloRetryRequest. But that has to be the same client's."""
    victims = client_hello("localhost", random=b"victim's random, as it was sent ")
    for messages, status, level, attempted in (
        (victims + flight(), Status.NOT_TLS, "alarm", "handshake messages 1, 2, 8, 11"),
        (
            flight(0x1301, server_hello(random=RETRY), victims),
            Status.UNWITNESSED,
            "warning",
            "a second ClientHello with another random, name or version",
        ),
        (b"", Status.UNWITNESSED, "warning", "a handshake whose messages are too long"),
    ):
        relay = Relay(instance, OWN)
        relay.messages = messages
        relay.ask(request(certificates[OWN], certificate_verify(victims, flight())))
        event = instance.wait_for_event("keyd_refused", client=relay.client)
        assert (event["status"], event["level"]) == (status.name.lower(), level)
        assert attempted in event["attempted"]
        relay.close()


@pytest.mark.parametrize(("suite", "algorithm"), [(0x1301, "sha256"), (0x1302, "sha384")])
def test_a_client_hello_that_is_relayed_word_by_word(
    instance: Instance, certificates: dict[str, Certificate], suite: int, algorithm: str
) -> None:
    """What is left to an attacker: the ClientHello is the victim's, and the hole comes after it."""
    relay = Relay(instance, OWN)
    octets = relay.handshake(suite, algorithm)
    assert Reply.decode(relay.ask(request(certificates[OWN], octets))).status is Status.DONE
    relay.close()
