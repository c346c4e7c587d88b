"""Sockets that are given away are closed here, also where that fails."""

import errno
import resource
import socket

import pytest

from titus_py.between.hand_over import give


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
