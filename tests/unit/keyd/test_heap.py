"""Threads behind keyd's filter give long messages' memory back."""

import subprocess
import sys

#: keyd with two threads, its filter, and no keys. Of its two sources, the main thread takes one at
#: most. The other thread has as much memory as some of the longest requests, and gives it back.
_KEYD = """
import os, socket, threading
import prctl
from keyd.daemon import Keyd
from keyd.linux import seccomp
from keyd.protocol import MAX_REQUEST_IN_HANDSHAKE_OCTETS
from keyd.system_calls import SERVING

def hear():
    if threading.current_thread() is threading.main_thread():
        threading.Event().wait()
    for _ in range(3):
        held = [bytes(MAX_REQUEST_IN_HANDSHAKE_OCTETS) for _ in range(5)]
        del held
    os._exit(0)

keyd = Keyd({})
for _ in range(2):
    ours, theirs = socket.socketpair()
    keyd.hear_process(ours, hear)
    theirs.send(b"now")
    theirs.detach()
prctl.set_no_new_privs(1)
keyd.serve(2, seccomp.build(SERVING), lambda: None)
"""


def test_a_thread_that_has_had_something_long() -> None:
    subprocess.run([sys.executable, "-c", _KEYD], check=True, timeout=60)
