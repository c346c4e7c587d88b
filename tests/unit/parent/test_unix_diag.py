"""What the kernel says of real unix sockets."""

import os
import socket

from titus_py.parent.sock_diag import CLOSE_WAIT, ESTABLISHED
from titus_py.parent.unix_diag import UnixDiag


def test_whether_the_peer_has_left_and_what_is_unread() -> None:
    ours, peer = socket.socketpair()
    inode = os.fstat(ours.fileno()).st_ino
    with ours, peer, UnixDiag() as kernel:
        seen = kernel.look_at(inode)
        assert seen is not None
        assert (seen.state, seen.unread) == (ESTABLISHED, 0)
        peer.send(b"abc")
        # It may still read what it is sent.
        peer.shutdown(socket.SHUT_WR)
        half = kernel.look_at(inode)
        assert half is not None
        assert (half.state, half.unread) == (ESTABLISHED, 3)
        peer.close()
        gone = kernel.look_at(inode)
        assert gone is not None
        assert (gone.state, gone.unread) == (CLOSE_WAIT, 3)
        assert ours.recv(2) == b"ab"
        after = kernel.look_at(inode)
        assert after is not None
        assert after.unread == 1
        ours.close()
        assert kernel.look_at(inode) is None
