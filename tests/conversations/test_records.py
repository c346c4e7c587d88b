"""Records: messages cut into them, empty ones, over-long ones, and ChangeCipherSpec anywhere."""

import pytest
from integration.instance import Instance

from titus_py.worker.client_hello import MAX_RECORDS

from .client import (
    ALERT,
    CCS,
    DATA,
    HANDSHAKE,
    NAMES,
    TLS12,
    TLS13,
    Client,
    Extension,
    Handshake,
    Version,
    message,
    vector,
)
from .outcome import SERVED, Conversation, Converse, after_the_handshake, outcome

UNEXPECTED_MESSAGE, RECORD_OVERFLOW = "unexpected_message", "record_overflow"
DECODE_ERROR, BAD_RECORD_MAC = "decode_error", "bad_record_mac"
LONGEST = 1 << 14


# --- fragmentation -----------------------------------------------------------------------


@pytest.mark.parametrize("version", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("fragment", [1, 2, 3, 4, 5, 50])
@pytest.mark.parametrize("segment", [None, 1, 7])
def test_every_message_may_come_in_fragments_and_segments(
    instance: Instance, version: Version, fragment: int, segment: int | None
) -> None:
    """RFC 8446 §5.1, RFC 5246 §6.2.1: also both ClientHellos, and a KeyUpdate."""

    def converse(client: Client) -> None:
        client.fragment, client.segments.size = fragment, segment
        if version == TLS13:
            client.start_twice()
            client.finish()
            client.update_keys()
            client.update_keys(request=1)
        else:
            client.shake_hands()

    with Client(instance.port, version) as client:
        assert outcome(client, converse) == SERVED


def coalesced(client: Client) -> None:
    """More of a handshake in the ClientHello's record, which has the last plain octets."""
    client.record(HANDSHAKE, client.hello() + b"\x14\0\0\x20")
    client.hear_first_flight()


def update_behind_finished(client: Client) -> None:
    client.start()
    client.fragment = LONGEST
    finished = client.finished()
    client.record(HANDSHAKE, finished + message(Handshake.KEY_UPDATE, b"\0"))
    client.hear()


def two_updates_in_a_record(client: Client) -> None:
    client.shake_hands()
    client.record(HANDSHAKE, 2 * message(Handshake.KEY_UPDATE, b"\0"))


def data_within_a_message(client: Client) -> None:
    client.shake_hands()
    client.record(HANDSHAKE, b"\x18\0\0")
    client.record(DATA, b"data")


def too_many_records(client: Client) -> None:
    hello = client.hello({Extension.GREASE: bytes(MAX_RECORDS)})
    for octet in hello[: MAX_RECORDS + 1]:
        client.record(HANDSHAKE, bytes((octet,)))
    client.hear()


def alert_within_a_message(client: Client) -> None:
    client.record(HANDSHAKE, client.hello()[:20])
    client.record(ALERT, b"\1\0")
    client.hear()


def ccs_within_a_key_exchange(client: Client) -> None:
    client.start()
    client.record(HANDSHAKE, b"\x10\0\0\x21\x20")
    client.record(CCS, b"\1")
    client.hear()


FRAGMENTS = [
    Conversation("more behind the ClientHello", TLS13, "5.1", UNEXPECTED_MESSAGE, coalesced),
    Conversation("KeyUpdate behind Finished", TLS13, "5.1", UNEXPECTED_MESSAGE,
                 update_behind_finished),
    Conversation("KeyUpdate behind KeyUpdate", TLS13, "5.1", UNEXPECTED_MESSAGE,
                 two_updates_in_a_record),
    Conversation("data within a message", TLS13, "5.1", UNEXPECTED_MESSAGE, data_within_a_message),
    Conversation("a ClientHello in too many records", TLS13, "5.1", UNEXPECTED_MESSAGE,
                 too_many_records),
    Conversation("an alert within a message", TLS13, "5.1", UNEXPECTED_MESSAGE,
                 alert_within_a_message),
    Conversation("ChangeCipherSpec within a message", TLS12, "RFC 5246 7.1", UNEXPECTED_MESSAGE,
                 ccs_within_a_key_exchange),
]  # fmt: skip


# --- empty, and over-long ----------------------------------------------------------------


def instead_of_a_hello(kind: int, content: bytes) -> Converse:
    def converse(client: Client) -> None:
        client.record(kind, content)
        client.hear()

    return converse


def instead_of_finished(kind: int, content: bytes) -> Converse:
    def converse(client: Client) -> None:
        client.start()
        client.record(kind, content)
        client.hear()

    return converse


def raw_after_the_handshake(octets: bytes) -> Converse:
    def converse(client: Client) -> None:
        client.shake_hands()
        client.raw(octets)
        client.hear()

    return converse


def padded(content: int, padding: int) -> Converse:
    def converse(client: Client) -> None:
        client.shake_hands()
        client.pad(padding)
        client.record(DATA, bytes(content))
        client.pad(0)
        client.receive(content)

    return converse


def echoed(length: int) -> Converse:
    def converse(client: Client) -> None:
        client.shake_hands()
        client.record(DATA, bytes(length))
        client.receive(length)

    return converse


def no_content_type(client: Client) -> None:
    client.shake_hands()
    client.pad(10)
    client.record(0, b"")
    client.hear()


def with_broken_tag(client: Client) -> None:
    client.shake_hands()
    client.raw(b"\x17\3\3" + vector(2, bytes(40)))
    client.hear()


def empties(number: int) -> Converse:
    return after_the_handshake(*number * [(DATA, b"")])


SIZES = [
    Conversation("empty data", TLS13, "5.1", SERVED, empties(30)),
    Conversation("empty data", TLS12, "RFC 5246 6.2.1", SERVED, empties(30)),
    Conversation("too much empty data", TLS13, "5.4", UNEXPECTED_MESSAGE, empties(40),
                 "a limit of its own: 32"),
    Conversation("too much empty data", TLS12, "RFC 5246 6.2.1", UNEXPECTED_MESSAGE, empties(40),
                 "a limit of its own: 32"),
    Conversation("an empty handshake record", TLS13, "5.1", DECODE_ERROR,
                 instead_of_a_hello(HANDSHAKE, b"")),
    Conversation("an empty protected handshake record", TLS13, "5.4", UNEXPECTED_MESSAGE,
                 instead_of_finished(HANDSHAKE, b"")),
    Conversation("an empty handshake record later", TLS13, "5.4", UNEXPECTED_MESSAGE,
                 after_the_handshake((HANDSHAKE, b""))),
    Conversation("an empty alert", TLS13, "5.4", UNEXPECTED_MESSAGE,
                 after_the_handshake((ALERT, b""))),
    Conversation("an empty alert at first", TLS13, "5.1", UNEXPECTED_MESSAGE,
                 instead_of_a_hello(ALERT, b"")),
    Conversation("nothing but padding", TLS13, "5.4", UNEXPECTED_MESSAGE, no_content_type),
    Conversation("the longest data", TLS13, "5.1", SERVED, echoed(LONGEST)),
    Conversation("the longest data", TLS12, "RFC 5246 6.2.1", SERVED, echoed(LONGEST)),
    Conversation("padding", TLS13, "5.4", SERVED, padded(100, 1000)),
    Conversation("the longest padding", TLS13, "5.4", SERVED, padded(1, LONGEST - 1)),
    Conversation("too much padding", TLS13, "5.4", SERVED, padded(1, LONGEST),
                 "not record_overflow: it bounds the record, and the data in it"),
    Conversation("data too long", TLS13, "5.4", RECORD_OVERFLOW,
                 after_the_handshake((DATA, bytes(LONGEST + 1)))),
    Conversation("data too long", TLS12, "RFC 5246 6.2.1", RECORD_OVERFLOW,
                 after_the_handshake((DATA, bytes(LONGEST + 1)))),
    Conversation("a record too long", TLS13, "5.2", RECORD_OVERFLOW,
                 raw_after_the_handshake(b"\x17\3\3" + vector(2, bytes(LONGEST + 257)))),
    Conversation("a record too long", TLS12, "RFC 5246 6.2.3", RECORD_OVERFLOW,
                 raw_after_the_handshake(b"\x17\3\3" + vector(2, bytes(LONGEST + 2049)))),
    Conversation("a ClientHello's record too long", TLS13, "5.1", RECORD_OVERFLOW,
                 instead_of_a_hello(HANDSHAKE, bytes(LONGEST + 1))),
    Conversation("a key exchange's record too long", TLS12, "RFC 5246 6.2.1", RECORD_OVERFLOW,
                 instead_of_finished(HANDSHAKE, bytes(LONGEST + 1))),
    Conversation("shorter than its tag", TLS13, "5.2", BAD_RECORD_MAC,
                 raw_after_the_handshake(b"\x17\3\3\0\5abcde")),
    Conversation("shorter than its tag", TLS12, "RFC 5246 6.2.3.3", BAD_RECORD_MAC,
                 raw_after_the_handshake(b"\x17\3\3\0\5abcde")),
    Conversation("a wrong tag", TLS13, "5.2", BAD_RECORD_MAC, with_broken_tag),
    Conversation("a wrong tag", TLS12, "RFC 5246 6.2.3.3", BAD_RECORD_MAC, with_broken_tag),
    Conversation("an unknown type", TLS13, "5", UNEXPECTED_MESSAGE,
                 after_the_handshake((99, b"x"))),
    Conversation("an unknown type", TLS12, "RFC 5246 6", UNEXPECTED_MESSAGE,
                 after_the_handshake((99, b"x"))),
    Conversation("heartbeat", TLS12, "RFC 5246 6", UNEXPECTED_MESSAGE,
                 after_the_handshake((24, b"\1\0\1x" + bytes(16)))),
    Conversation("a type unprotected", TLS13, "5.2", UNEXPECTED_MESSAGE,
                 raw_after_the_handshake(b"\x16\3\3\0\5\x18\0\0\1\0")),
]  # fmt: skip


# --- ChangeCipherSpec --------------------------------------------------------------------


def ccs_first(client: Client) -> None:
    client.record(CCS, b"\1")
    client.start()
    client.finish()


def ccs_in_compatibility(*contents: bytes) -> Converse:
    def converse(client: Client) -> None:
        client.start()
        for content in contents:
            client.plain(CCS, content)
        client.finish()

    return converse


def ccs_within_finished(client: Client) -> None:
    client.start()
    finished = client.finished()
    client.record(HANDSHAKE, finished[:10])
    client.plain(CCS, b"\1")
    client.record(HANDSHAKE, finished[10:])
    client.change_keys()


def ccs_protected(client: Client) -> None:
    """What tlslite-ng would not protect: the type is the last octet that is no padding."""
    client.start()
    client.record(0, b"\1" + bytes((CCS,)))
    client.hear()


def ccs_late(client: Client) -> None:
    client.shake_hands()
    client.plain(CCS, b"\1")
    client.hear()


def ccs_late_12(client: Client) -> None:
    client.shake_hands()
    client.record(CCS, b"\1")
    client.hear()


def ccs_before_the_key_exchange(client: Client) -> None:
    client.start()
    client.record(CCS, b"\1")
    client.hear()


def ccs_between_two_hellos(client: Client) -> None:
    client.start_twice(between=lambda: client.plain(CCS, b"\1"))
    client.finish()


def ccs_twice(client: Client) -> None:
    client.start()
    client.exchange_keys()
    client.change_cipher()
    client.record(CCS, b"\1")
    client.hear()


def ccs_of(content: bytes) -> Converse:
    def converse(client: Client) -> None:
        client.start()
        client.exchange_keys()
        client.plain(CCS, content)
        client.hear()

    return converse


def ccs_of_nothing(client: Client) -> None:
    client.start()
    client.record(CCS, b"")
    client.finish()


CHANGES = [
    Conversation("before the ClientHello", TLS13, "5", UNEXPECTED_MESSAGE, ccs_first),
    Conversation("before the ClientHello", TLS12, "RFC 5246 7.1", UNEXPECTED_MESSAGE, ccs_first),
    Conversation("before Finished", TLS13, "D.4", SERVED, ccs_in_compatibility(b"\1")),
    Conversation("twice", TLS13, "5", SERVED, ccs_in_compatibility(b"\1", b"\1")),
    Conversation("between two ClientHellos", TLS13, "D.4", SERVED, ccs_between_two_hellos),
    Conversation("of 2", TLS13, "5", UNEXPECTED_MESSAGE, ccs_in_compatibility(b"\2")),
    Conversation("of two octets", TLS13, "5", UNEXPECTED_MESSAGE, ccs_in_compatibility(b"\1\1")),
    Conversation("of nothing", TLS13, "5", UNEXPECTED_MESSAGE, ccs_in_compatibility(b"")),
    Conversation("within Finished", TLS13, "5.1", SERVED, ccs_within_finished,
                 "not unexpected_message: dropped, as §5 has it between messages"),
    Conversation("protected", TLS13, "5", UNEXPECTED_MESSAGE, ccs_protected),
    Conversation("after the handshake", TLS13, "5", UNEXPECTED_MESSAGE, ccs_late),
    Conversation("after the handshake", TLS12, "RFC 5246 7.1", UNEXPECTED_MESSAGE, ccs_late_12),
    Conversation("before the key exchange", TLS12, "RFC 5246 7.1", UNEXPECTED_MESSAGE,
                 ccs_before_the_key_exchange),
    Conversation("twice", TLS12, "RFC 5246 7.1", UNEXPECTED_MESSAGE, ccs_twice),
    Conversation("of 2", TLS12, "RFC 5246 7.1", UNEXPECTED_MESSAGE, ccs_of(b"\2")),
    Conversation("of two octets", TLS12, "RFC 5246 7.1", UNEXPECTED_MESSAGE, ccs_of(b"\1\1")),
    Conversation("of nothing", TLS12, "RFC 5246 6.2.1", SERVED, ccs_of_nothing, "skipped"),
]  # fmt: skip


@pytest.mark.parametrize("row", FRAGMENTS + SIZES, ids=str)
def test_records(instance: Instance, row: Conversation) -> None:
    with Client(instance.port, row.version) as client:
        assert outcome(client, row.converse) == row.expected, row.section


@pytest.mark.parametrize("row", CHANGES, ids=str)
def test_change_cipher_spec(instance: Instance, row: Conversation) -> None:
    with Client(instance.port, row.version) as client:
        assert outcome(client, row.converse) == row.expected, row.section
