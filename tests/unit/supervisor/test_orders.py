"""An order, or a last event, with a descriptor, while too many others are on their way.

The kernel counts a user's descriptors within messages that nobody has received (unix(7)). Root may
have any number.
"""

import subprocess
import sys

_LIMIT = """
import os, resource, socket, subprocess
from keyd.linux.descriptors import receive_descriptors, send_descriptors
from titus_py.between.event_loop import EventLoop
from titus_py.parent.outbox import MAX_REPORTS, Outbox
from titus_py.supervisor.child import Child

ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
file = os.memfd_create("file")
uid = 2_000_000_000 + os.getpid()  # Another such test may run now.
os.setresuid(uid, uid, uid)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))

def put_on_their_way(to):
    send_descriptors(to, b"many", [file] * 41)

def take(giver, octets=1 << 16):
    message, descriptors = receive_descriptors(giver, octets, 253)
    for one in descriptors:
        os.close(one)
    return message, len(descriptors)
"""
_ORDER = (
    _LIMIT
    + """
ours.setblocking(False)
others, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
child = Child("keyd", subprocess.Popen(["sleep", "600"]), ours)
try:
    put_on_their_way(others)
    child.queue({"do": "use keyd"}, [file])
    assert not child.send_orders()
    child.queue({"do": "accept"})
    assert not child.send_orders()
    assert not child.has_heard_all
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, 4096))
    assert take(end) == (b"many", 41)
    assert child.send_orders()
    assert child.has_heard_all
    assert take(theirs) == (b'{"do": "use keyd"}', 1)
    assert take(theirs) == (b'{"do": "accept"}', 0)
finally:
    child.kill()
    child.bury()
"""
)
_LAST_EVENTS = (
    _LIMIT
    + """
resource.setrlimit(resource.RLIMIT_NOFILE, (400, 4096))
outbox = Outbox(EventLoop(), ours)
for number in range(3 * MAX_REPORTS):
    outbox.put("connection_begun", os.dup(file), number=number)
supervisor = os.fork()
if supervisor == 0:
    ours.close()
    taken = 0
    while taken < 3 * MAX_REPORTS:
        message, count = take(theirs)
        if not message:
            os._exit(1)
        taken += count
    os._exit(0)
theirs.close()
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 4096))
outbox.send_last()
ours.close()
assert not outbox._waiting, len(outbox._waiting)
assert os.waitpid(supervisor, 0)[1] == 0
"""
)


def run(program: str) -> None:
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_an_order_is_sent_once_there_is_room_and_in_its_place() -> None:
    run(_ORDER)


def test_last_events_are_sent_once_there_is_room() -> None:
    run(_LAST_EVENTS)
