"""keyd ends before it has answered: the next one is asked the same, once.

All of it under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from keyd.protocol import Reply, Status
from titus_py.between import messages
from titus_py.between.hand_over import give

from .support import PATIENCE, Harness, Keyd, Site, StartHarness, keyds_answer

#: Where a worker has them; 4 is free.
_PARENT, _CHANNEL = 3, 5
_GONE = "[keyd|keyd is gone|keyd: gone: "


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Worker:
    """A harness with a channel, and a socket on which the next one comes."""

    def __init__(self, harness: Harness, keyd: socket.socket, parent: socket.socket) -> None:
        self.harness = harness
        self.keyd = keyd
        self.parent = parent

    def gets_a_channel(self, message: bytes = messages.CHANNEL) -> socket.socket:
        """The next keyd's end of it."""
        keyds, theirs = pair()
        give(self.parent, message, [theirs])
        keyds.settimeout(PATIENCE)
        return keyds

    @property
    def descriptors(self) -> set[str]:
        return set(os.listdir(f"/proc/{self.harness.process.pid}/fd"))


@contextmanager
def worker(start_harness: StartHarness, site: Site, *settings: str) -> Iterator[Worker]:
    with ExitStack() as stack:
        keyd, channel, parent, workers = (
            stack.enter_context(one) for both in (pair(), pair()) for one in both
        )
        given = channel.fileno(), workers.fileno()
        moves = f"{_CHANNEL}<&{given[0]} {_PARENT}<&{given[1]} {given[0]}<&- {given[1]}<&-"
        harness = stack.enter_context(
            start_harness(
                f"channel_fd = {_CHANNEL}",
                f"next_channel_fd = {_PARENT}",
                *settings,
                pass_fds=given,
                run_by=("bash", "-c", f'exec "$0" "$@" {moves}'),
            )
        )
        for one in (channel, workers):
            one.close()
        keyd.settimeout(PATIENCE)
        harness.load(site.reference.read_bytes())
        yield Worker(harness, keyd, parent)


def answers(keyd: socket.socket, reply: bytes) -> threading.Thread:
    """Have it read one request and reply; an empty reply closes the channel."""

    def answer() -> None:
        with keyd:
            assert keyd.recv(2000)
            if reply:
                keyd.send(reply)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


@pytest.mark.parametrize("asked", [False, True], ids=["before it is asked", "asked"])
def test_the_next_keyd_answers(
    start_harness: StartHarness, sites: dict[str, Site], asked: bool
) -> None:
    reply = Reply(Status.DONE, b"s" * 72)
    with worker(start_harness, sites["p256"]) as one:
        before = one.descriptors
        threads = [answers(one.gets_a_channel(), reply.encode())]
        if asked:
            threads.append(answers(one.keyd, b""))
        else:
            one.keyd.close()
        assert one.harness.sign("SHA256") == f"ok {reply.payload.hex()}"
        for thread in threads:
            thread.join()
        assert one.descriptors == before


def test_the_next_keyd_is_waited_for(start_harness: StartHarness, sites: dict[str, Site]) -> None:
    reply = Reply(Status.DONE, b"s" * 72)
    with worker(start_harness, sites["p256"]) as one:
        asked = threading.Event()

        def end_and_begin() -> None:
            assert one.keyd.recv(2000)
            one.keyd.close()
            asked.set()
            answers(one.gets_a_channel(), reply.encode()).join()

        thread = threading.Thread(target=end_and_begin)
        thread.start()
        assert one.harness.sign("SHA256") == f"ok {reply.payload.hex()}"
        assert asked.is_set()
        thread.join()


def test_a_third_keyd_is_not_asked(start_harness: StartHarness, sites: dict[str, Site]) -> None:
    with worker(start_harness, sites["p256"]) as one:
        one.keyd.close()
        second = answers(one.gets_a_channel(), b"")
        with one.gets_a_channel() as third:
            assert _GONE in one.harness.sign("SHA256")
            second.join()
            third.setblocking(False)
            with pytest.raises(BlockingIOError):
                third.recv(2000)


def test_a_refusal_is_an_answer(start_harness: StartHarness, sites: dict[str, Site]) -> None:
    """keyd closes a channel after it, too."""
    with worker(start_harness, sites["p256"]) as one:
        refusing = answers(one.keyd, Reply(Status.NOT_TLS).encode())
        with one.gets_a_channel() as following:
            assert "refused: not TLS" in one.harness.sign("SHA256")
            refusing.join()
            following.setblocking(False)
            with pytest.raises(BlockingIOError):
                following.recv(2000)


def test_no_other_is_waited_for_where_keyd_cannot_send_its_refusal(
    start_harness: StartHarness, sites: dict[str, Site]
) -> None:
    """It ends what it sends, and keeps the channel until the worker has left it."""
    with worker(start_harness, sites["p256"], f"timeout_ms = {1000 * PATIENCE:.0f}") as one:

        def hang_up() -> None:
            assert one.keyd.recv(2000)
            one.keyd.shutdown(socket.SHUT_WR)
            assert one.keyd.recv(2000) == b""

        thread = threading.Thread(target=hang_up)
        thread.start()
        with one.gets_a_channel() as following:
            assert "keyd: gone: it cannot send its answer" in one.harness.sign("SHA256")
            thread.join()
            following.setblocking(False)
            with pytest.raises(BlockingIOError):
                following.recv(2000)


@pytest.mark.parametrize(
    "case", ["nothing", "the end", "no descriptor", "something else", "an empty carrier"]
)
def test_without_another_channel_it_is_gone(
    start_harness: StartHarness, sites: dict[str, Site], case: str
) -> None:
    timeout = 200 if case == "nothing" else 1000 * PATIENCE
    with worker(start_harness, sites["p256"], f"timeout_ms = {timeout:.0f}") as one:
        before = one.descriptors
        one.keyd.close()
        match case:
            case "the end":
                one.parent.close()
            case "no descriptor":
                one.parent.send(messages.CHANNEL)
            case "something else":
                one.gets_a_channel(messages.BACKEND).close()
            case "an empty carrier":
                give(one.parent, messages.CHANNEL, [])
        assert _GONE in one.harness.sign("SHA256")
        assert one.descriptors <= before


def test_a_number_of_its_own_is_another_mistake(
    start_harness: StartHarness, sites: dict[str, Site]
) -> None:
    with start_harness("channel_fd = 5\nnext_channel_fd = x") as harness:
        outcome = harness.load(sites["rsa"].reference.read_bytes())
        assert "next_channel_fd is no file descriptor" in outcome


def test_who_connects_for_each_request_connects_again(
    start_harness: StartHarness, sites: dict[str, Site], bad_keyd: Keyd
) -> None:
    """systemd holds the socket, whichever keyd accepts."""
    site = sites["p256"]
    answer = keyds_answer([site])
    bad_keyd.answer = lambda request: b"" if len(bad_keyd.requests) == 1 else answer(request)
    with start_harness(f"socket = {bad_keyd.path}") as harness:
        harness.load(site.reference.read_bytes())
        assert harness.sign("SHA256").startswith("ok ")
        first, second = bad_keyd.requests
        assert first == second
        bad_keyd.answer = lambda _: b""
        assert _GONE in harness.sign("SHA256")
        assert len(bad_keyd.requests) == 4
