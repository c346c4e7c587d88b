"""Messages of the handshake that are wrong, out of place or too many, and KeyUpdate anywhere."""

from collections.abc import Callable, Iterator, Sequence

import pytest
from integration.instance import Instance
from integration.test_pump import until_it_stands

from titus_py.worker.farewell import unread

from .backends import FLOOD, HEARD
from .client import ALERT, DATA, HANDSHAKE, TLS12, TLS13, Client, Closed, Handshake, message
from .outcome import CLOSED, SERVED, Conversation, Converse, after_the_handshake, outcome

UNEXPECTED_MESSAGE, DECODE_ERROR = "unexpected_message", "decode_error"
ILLEGAL_PARAMETER, DECRYPT_ERROR = "illegal_parameter", "decrypt_error"
BAD_RECORD_MAC, NO_RENEGOTIATION = "bad_record_mac", "no_renegotiation"

#: A message and a KeyUpdate that are as they should be, but for their place.
CERTIFICATE = message(Handshake.CERTIFICATE, b"\0\0\0\0")
UPDATE = message(Handshake.KEY_UPDATE, b"\0")


# --- out of place ------------------------------------------------------------------------


def first(octets: bytes) -> Converse:
    """Instead of a ClientHello."""

    def converse(client: Client) -> None:
        client.record(HANDSHAKE, octets)
        client.hear()

    return converse


def second(octets: bytes) -> Converse:
    """Instead of what comes after the server's first flight."""

    def converse(client: Client) -> None:
        client.start()
        client.record(HANDSHAKE, octets)
        client.hear()

    return converse


def after_the_key_exchange(octets: bytes) -> Converse:
    def converse(client: Client) -> None:
        client.start()
        client.exchange_keys()
        client.record(HANDSHAKE, octets)
        client.hear()

    return converse


def at_last(octets: bytes) -> Converse:
    """When all is done."""

    def converse(client: Client) -> None:
        client.shake_hands()
        client.record(HANDSHAKE, octets)
        client.hear()

    return converse


def hello_at_last(client: Client) -> None:
    client.shake_hands()
    client.record(HANDSHAKE, client.hello())
    client.hear()


def second_hello(client: Client) -> None:
    client.start()
    client.record(HANDSHAKE, client.hello())
    client.hear()


def data_too_early(client: Client) -> None:
    client.start()
    client.record(DATA, b"data")
    client.hear()


def data_unprotected(client: Client) -> None:
    client.say(client.hello())
    client.plain(DATA, b"data")
    client.hear_first_flight()
    client.hear()


def finished_unprotected(client: Client) -> None:
    client.start()
    client.plain(HANDSHAKE, client.finished())
    client.hear()


def another_hello_after_retry(client: Client) -> None:
    """Without the key share that was asked for."""
    client.start_twice(hello=client.hello({51: b"\0\0"}))


def finished_without_change(client: Client) -> None:
    client.start()
    client.exchange_keys()
    client.say(client.finished())
    client.hear()


PLACES = [
    Conversation("HelloRequest at first", TLS12, "RFC 5246 7.4.1.1", UNEXPECTED_MESSAGE,
                 first(b"\0\0\0\0")),
    Conversation("Finished at first", TLS13, "4", UNEXPECTED_MESSAGE,
                 first(message(20, bytes(32)))),
    Conversation("ServerHello at first", TLS13, "4", UNEXPECTED_MESSAGE,
                 first(message(2, bytes(40)))),
    Conversation("a second ClientHello", TLS13, "4.1.2", UNEXPECTED_MESSAGE, second_hello),
    Conversation("a second ClientHello", TLS12, "RFC 5246 7.3", UNEXPECTED_MESSAGE, second_hello),
    Conversation("a ClientHello at last", TLS13, "4.1.2", UNEXPECTED_MESSAGE, hello_at_last),
    Conversation("a ClientHello at last", TLS12, "RFC 5246 7.2.2", NO_RENEGOTIATION, hello_at_last),
    Conversation("a ClientHello that ignores the retry", TLS13, "4.1.2", ILLEGAL_PARAMETER,
                 another_hello_after_retry),
    Conversation("Certificate unasked", TLS13, "4.4.2", UNEXPECTED_MESSAGE, second(CERTIFICATE)),
    Conversation("Certificate unasked", TLS12, "RFC 5246 7.4.6", UNEXPECTED_MESSAGE,
                 second(b"\x0b\0\0\3\0\0\0")),
    Conversation("Certificate at last", TLS13, "4.6.2", UNEXPECTED_MESSAGE, at_last(CERTIFICATE)),
    Conversation("CertificateVerify", TLS13, "4.4.3", UNEXPECTED_MESSAGE,
                 second(message(15, b"\x08\4\0\0"))),
    Conversation("CertificateVerify", TLS12, "RFC 5246 7.4.8", UNEXPECTED_MESSAGE,
                 after_the_key_exchange(message(15, b"\x08\4\0\0"))),
    Conversation("EndOfEarlyData", TLS13, "4.5", UNEXPECTED_MESSAGE, second(message(5, b""))),
    Conversation("NewSessionTicket", TLS13, "4.6.1", UNEXPECTED_MESSAGE,
                 at_last(message(4, bytes(20)))),
    Conversation("NewSessionTicket", TLS12, "RFC 5077 3.3", UNEXPECTED_MESSAGE,
                 at_last(message(4, bytes(20)))),
    Conversation("KeyUpdate before Finished", TLS13, "4.6.3", UNEXPECTED_MESSAGE, second(UPDATE)),
    Conversation("KeyUpdate", TLS12, "RFC 5246 7.4", UNEXPECTED_MESSAGE, at_last(UPDATE)),
    Conversation("Finished again", TLS13, "4", UNEXPECTED_MESSAGE, at_last(message(20, bytes(32)))),
    Conversation("Finished again", TLS12, "RFC 5246 7.3", UNEXPECTED_MESSAGE,
                 at_last(message(20, bytes(12)))),
    Conversation("an unknown message", TLS13, "4", UNEXPECTED_MESSAGE, second(message(99, b"x"))),
    Conversation("an unknown message", TLS12, "RFC 5246 7.4", UNEXPECTED_MESSAGE,
                 second(message(99, b"x"))),
    Conversation("an unknown message at last", TLS13, "4", UNEXPECTED_MESSAGE,
                 at_last(message(99, b"x"))),
    Conversation("HelloRequest at last", TLS12, "RFC 5246 7.4.1.1", UNEXPECTED_MESSAGE,
                 at_last(b"\0\0\0\0")),
    Conversation("data before Finished", TLS13, "4.4.4", UNEXPECTED_MESSAGE, data_too_early),
    Conversation("data before Finished", TLS12, "RFC 5246 7.3", UNEXPECTED_MESSAGE, data_too_early),
    Conversation("data unprotected", TLS13, "5.2", BAD_RECORD_MAC, data_unprotected),
    Conversation("Finished unprotected", TLS13, "4.4.4", UNEXPECTED_MESSAGE, finished_unprotected),
    Conversation("no key exchange", TLS12, "RFC 5246 7.4.7", UNEXPECTED_MESSAGE,
                 second(message(20, bytes(12)))),
    Conversation("no ChangeCipherSpec", TLS12, "RFC 5246 7.4.9", UNEXPECTED_MESSAGE,
                 finished_without_change),
]  # fmt: skip


# --- wrong in themselves -----------------------------------------------------------------


def finishing(change: Callable[[bytes], bytes]) -> Converse:
    """With this Finished, made of the right one's content."""

    def converse(client: Client) -> None:
        client.start()
        if client.version == TLS12:
            client.exchange_keys()
            client.change_cipher()
        client.say(message(Handshake.FINISHED, change(client.finished()[4:])))
        client.hear()

    return converse


def exchanging(exchange: bytes) -> Converse:
    """With this ClientKeyExchange."""

    def converse(client: Client) -> None:
        client.start()
        client.exchange_keys(exchange)
        client.hear()

    return converse


def too_long(kind: int) -> Converse:
    def converse(client: Client) -> None:
        client.start()
        client.record(HANDSHAKE, bytes((kind,)) + b"\1\0\0" + bytes(100))
        client.hear()

    return converse


MESSAGES = [
    Conversation("a wrong Finished", TLS13, "4.4.4", DECRYPT_ERROR,
                 finishing(lambda right: right[:-1] + bytes((right[-1] ^ 1,)))),
    Conversation("a wrong Finished", TLS12, "RFC 5246 7.4.9", DECRYPT_ERROR,
                 finishing(lambda right: right[:-1] + bytes((right[-1] ^ 1,)))),
    Conversation("a short Finished", TLS13, "4.4.4", DECODE_ERROR,
                 finishing(lambda right: right[:-1])),
    Conversation("a short Finished", TLS12, "RFC 5246 7.4.9", DECODE_ERROR,
                 finishing(lambda right: right[:-1])),
    Conversation("a long Finished", TLS13, "4.4.4", DECODE_ERROR,
                 finishing(lambda right: right + b"\0")),
    Conversation("a long Finished", TLS12, "RFC 5246 7.4.9", DECODE_ERROR,
                 finishing(lambda right: right + b"\0")),
    Conversation("an empty Finished", TLS13, "4.4.4", DECODE_ERROR, finishing(lambda right: b"")),
    Conversation("an over-long Finished", TLS13, "6.2", ILLEGAL_PARAMETER, too_long(20)),
    Conversation("an over-long key exchange", TLS12, "RFC 5246 7.2.2", ILLEGAL_PARAMETER,
                 too_long(16)),
    Conversation("an empty key exchange", TLS12, "RFC 8422 5.7", "handshake_failure",
                 exchanging(b""), "not decode_error"),
    Conversation("an empty share", TLS12, "RFC 8422 5.7", DECODE_ERROR, exchanging(b"\0")),
    Conversation("a short share", TLS12, "RFC 8422 5.11", ILLEGAL_PARAMETER,
                 exchanging(b"\x1f" + bytes(31))),
    Conversation("a share of zeros", TLS12, "RFC 8422 5.11", ILLEGAL_PARAMETER,
                 exchanging(b"\x20" + bytes(32))),
    Conversation("a share cut", TLS12, "RFC 5246 7.2.2", DECODE_ERROR,
                 exchanging(b"\x20" + bytes(10))),
    Conversation("a share too long", TLS12, "RFC 5246 7.2.2", DECODE_ERROR,
                 exchanging(b"\x20" + bytes(33))),
    Conversation("KeyUpdate of 2", TLS13, "4.6.3", ILLEGAL_PARAMETER, at_last(message(24, b"\2"))),
    Conversation("KeyUpdate of nothing", TLS13, "6.2", DECODE_ERROR, at_last(message(24, b""))),
    Conversation("KeyUpdate of two octets", TLS13, "6.2", ILLEGAL_PARAMETER,
                 at_last(message(24, b"\0\0")), "not decode_error: longer than it can be"),
    Conversation("KeyUpdate without new keys", TLS13, "4.6.3", BAD_RECORD_MAC,
                 after_the_handshake((HANDSHAKE, UPDATE), (DATA, b"data"))),
]  # fmt: skip


# --- KeyUpdate ---------------------------------------------------------------------------


def update(*requests: int) -> Converse:
    def converse(client: Client) -> None:
        client.shake_hands()
        for request in requests:
            client.update_keys(request)
        client.record(DATA, b"data")
        assert client.receive(4) == b"data"
        # Several that come at once may be answered by one.
        assert bool(sum(requests)) <= client.updates_heard <= sum(requests)

    return converse


def update_between_data(request: int) -> Converse:
    def converse(client: Client) -> None:
        client.shake_hands()
        for number in range(5):
            client.record(DATA, b"data")
            client.update_keys(request)
            client.record(DATA, b"data")
            assert client.receive(8) == b"datadata"
            assert client.updates_heard == request * (number + 1)

    return converse


UPDATES = [
    Conversation("KeyUpdate", TLS13, "4.6.3", SERVED, update(0)),
    Conversation("KeyUpdate, requested", TLS13, "4.6.3", SERVED, update(1)),
    Conversation("many", TLS13, "4.6.3", SERVED, update(*20 * [0])),
    Conversation("many requested", TLS13, "4.6.3", SERVED, update(*20 * [1])),
    Conversation("one of each", TLS13, "4.6.3", SERVED, update(0, 1, 0, 1)),
    Conversation("between data", TLS13, "4.6.3", SERVED, update_between_data(0)),
    Conversation("requested between data", TLS13, "4.6.3", SERVED, update_between_data(1)),
]  # fmt: skip


# --- alerts ------------------------------------------------------------------------------


def alert_first(content: bytes) -> Converse:
    def converse(client: Client) -> None:
        client.say(client.hello())
        client.plain(ALERT, content)
        client.hear_first_flight()
        client.hear()

    return converse


ALERTS = [
    Conversation("user_canceled", TLS13, "6.1", SERVED, after_the_handshake((ALERT, b"\1\x5a"))),
    Conversation("close_notify", TLS13, "6.1", "close_notify",
                 after_the_handshake((ALERT, b"\1\0"))),
    Conversation("close_notify", TLS12, "RFC 5246 7.2.1", "close_notify",
                 after_the_handshake((ALERT, b"\1\0"))),
    Conversation("a fatal one", TLS13, "6.2", CLOSED, after_the_handshake((ALERT, b"\2\x28"))),
    Conversation("a fatal one", TLS12, "RFC 5246 7.2.2", CLOSED,
                 after_the_handshake((ALERT, b"\2\x28"))),
    Conversation("a warning that is none", TLS13, "6", CLOSED,
                 after_the_handshake((ALERT, b"\1\x28"))),
    Conversation("too many warnings", TLS12, "RFC 5246 7.2.2", UNEXPECTED_MESSAGE,
                 after_the_handshake(*5 * [(ALERT, b"\1\x5a")]), "a limit of its own: 5"),
    Conversation("a warning", TLS12, "RFC 5246 7.2", SERVED,
                 after_the_handshake((ALERT, b"\1\x5a"))),
    Conversation("of one octet", TLS13, "6", UNEXPECTED_MESSAGE,
                 after_the_handshake((ALERT, b"\1"))),
    Conversation("of one octet", TLS12, "RFC 5246 7.2", UNEXPECTED_MESSAGE,
                 after_the_handshake((ALERT, b"\1"))),
    Conversation("two in a record", TLS13, "5.1", UNEXPECTED_MESSAGE,
                 after_the_handshake((ALERT, b"\1\x5a\1\x5a"))),
    Conversation("of level 3", TLS12, "RFC 5246 7.2", ILLEGAL_PARAMETER,
                 after_the_handshake((ALERT, b"\3\x5a"))),
    Conversation("a fatal one after the ClientHello", TLS13, "6.2", CLOSED, alert_first(b"\2\x28")),
]  # fmt: skip


@pytest.fixture
def flooded(instance: Instance) -> Iterator[Client]:
    """A client that has not read yet, and for which there is more than there is room for."""
    with Client(
        instance.port, TLS13, server_name=b"flood.localhost", receive_buffer=4096
    ) as client:
        client.shake_hands()
        until_it_stands(lambda: unread(client.socket))
        yield client


@pytest.mark.parametrize("fragment", [2, 1 << 14], ids=["in pieces", "whole"])
@pytest.mark.parametrize("requests", [(1, 0), (1, 1), (0, 1), 20 * (1,)], ids=str)
def test_keys_are_updated_while_a_write_waits(
    flooded: Client, requests: Sequence[int], fragment: int
) -> None:
    """§4.6.3: with the server's records half sent, in every part of a message."""
    flooded.fragment = fragment
    for request in requests:
        flooded.update_keys(request)
    heard = flooded.receive(len(FLOOD) // 2)
    flooded.update_keys(1)
    heard += flooded.receive(len(FLOOD) - len(heard))
    assert heard == FLOOD
    # Several may be answered by one.
    assert 1 <= flooded.updates_heard <= sum(requests) + 1


@pytest.mark.parametrize("requests", [(1, 0), (1, 1), 20 * (1,)], ids=str)
def test_keys_are_updated_after_the_servers_close_notify(
    instance: Instance, requests: Sequence[int]
) -> None:
    """§6.1: that is the end of one direction. An answer could not follow it."""
    with Client(instance.port, TLS13, server_name=b"ended.localhost") as client:
        client.shake_hands()
        assert client.hear_record() == (ALERT, b"\1\0")
        for number, request in enumerate(requests):
            client.update_keys(request)
            client.record(DATA, b"data %d, " % number)
        client.record(ALERT, b"\1\0")
        data = b"".join(b"data %d, " % number for number in range(len(requests)))
        assert HEARD.get(timeout=60) == data
        with pytest.raises(Closed):
            client.hear_record()


@pytest.mark.parametrize("row", PLACES + MESSAGES, ids=str)
def test_messages(instance: Instance, row: Conversation) -> None:
    with Client(instance.port, row.version) as client:
        assert outcome(client, row.converse) == row.expected, row.section


@pytest.mark.parametrize("row", UPDATES, ids=str)
def test_key_update(instance: Instance, row: Conversation) -> None:
    with Client(instance.port, row.version) as client:
        assert outcome(client, row.converse) == row.expected, row.section


@pytest.mark.parametrize("row", ALERTS, ids=str)
def test_alerts(instance: Instance, row: Conversation) -> None:
    with Client(instance.port, row.version) as client:
        assert outcome(client, row.converse) == row.expected, row.section
