"""Sockets that are given away are closed here, also where that fails; keyd never has them."""

import errno
import resource
import socket

import pytest

from keyd.linux.descriptors import packet_pair
from titus_py.between.hand_over import enclose, give, take


def test_without_descriptors_for_it_they_are_closed_as_well() -> None:
    to, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    given, peer = socket.socketpair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with to, other, given, peer:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            with pytest.raises(OSError, match="Too many open files") as failed:
                give(to, b"B", [given])
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert failed.value.errno == errno.EMFILE
        assert given.fileno() == -1


def test_who_has_the_channels_other_end_does_not_get_the_client() -> None:
    """The client is out of the parent's hands before the worker has it, and keyd cannot take it."""
    to, worker = packet_pair()
    ours, keyds = packet_pair()
    given, peer = socket.socketpair()
    enclose(keyds, [given])
    with pytest.raises(BlockingIOError):
        keyds.recvmsg(1, socket.CMSG_SPACE(64), socket.MSG_DONTWAIT)
    give(to, b"C", [given], ours)
    assert (given.fileno(), ours.fileno()) == (-1, -1)
    message, descriptors = take(worker, 9, 2)
    assert message == b"C"
    channel, client = (socket.socket(fileno=one) for one in descriptors)
    client.send(b"to the client")
    assert peer.recv(99) == b"to the client"
    channel.send(b"to keyd")
    assert keyds.recv(99) == b"to keyd"
    for one in (to, worker, keyds, peer, channel, client):
        one.close()
