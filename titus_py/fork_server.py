"""The fork server's life: load the certificates, confine itself, fork a worker for each order.

Started by the parent, as root. What it loads, every worker inherits, and so it has never
heard of a client: it gets uids and descriptors, and forks. What all workers have alike of
their confinement it puts on itself first; it keeps what it takes to make processes of
other users, and no way to a file or a network. The workers are the parent's children
(CLONE_PARENT), not its own. It trusts the parent.
"""

import sys

# Python's hashlib would bring the system's OpenSSL along, beside the one that pyOpenSSL
# has: megabytes and mappings for each worker, and code that none needs. It has
# implementations of its own.
sys.modules["_hashlib"] = None  # type: ignore[assignment]

import argparse
import gc
import os
import signal
import socket

import prctl

from keyd.linux.credentials import hide_memory
from keyd.linux.process import CLONE_PARENT, clone
from keyd.linux.sealed import read_all
from keyd.linux.seccomp import Program
from titus_py.confinement import (
    PARENT_FD,
    WORKER_NAMESPACES,
    Given,
    confine_fork_server,
    worker_calls,
)
from titus_py.messages import FORK_OCTETS, Fork, Forked, Ready
from titus_py.plan import Plan, VirtualHost
from titus_py.report import ReportWriter
from titus_py.tls import Credentials, make_context
from titus_py.worker import Site, Terms, live

__all__ = ["main"]


def main() -> int:
    """``python -m titus_py.fork_server``: started by the parent, on inherited descriptors."""
    parser = argparse.ArgumentParser(prog="titus_py.fork_server")
    parser.add_argument("--plan-fd", type=int, required=True)
    parser.add_argument("--parent-fd", type=int, required=True)
    # What OPENSSL_CONF names: the library has read it by now.
    parser.add_argument("--openssl-conf-fd", type=int, required=True)
    arguments = parser.parse_args()
    prctl.set_pdeathsig(signal.SIGKILL)
    hide_memory()
    plan = Plan.decode(read_all(arguments.plan_fd))
    terms = Terms(
        plan.handshake_timeout,
        plan.limits.idle_timeout,
        [_site(vhost) for vhost in plan.vhosts],
        Program(bytes.fromhex(plan.established_filter)),
        ReportWriter(),
    )
    handshake_filter = Program(bytes.fromhex(plan.handshake_filter))
    confine_fork_server(plan.chroot, arguments.parent_fd)
    parent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=PARENT_FD)
    gc.collect()
    # What there is now stays: a worker's garbage collector has no business with it.
    gc.freeze()
    parent.send(Ready().encode())
    _serve(parent, terms, handshake_filter)
    return 0


def _site(vhost: VirtualHost) -> Site:
    context = make_context(
        Credentials(vhost.certificate_chain, vhost.key_reference),
        vhost.min_version,
        vhost.max_version,
        vhost.ciphers,
        vhost.ciphersuites,
        vhost.rsa_key_exchange,
    )
    names = tuple(vhost.server_names) if vhost.server_names is not None else None
    return Site(names, context)


def _serve(parent: socket.socket, terms: Terms, handshake_filter: Program) -> None:
    """Fork as ordered, until the parent hangs up."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(parent, FORK_OCTETS, 2)
        if not message:
            return
        end, report = descriptors
        uid = Fork.decode(message).uid
        calls = worker_calls(handshake_filter, terms.report.address, Given(uid, report, end))
        try:
            child = clone(WORKER_NAMESPACES | CLONE_PARENT, calls)
        except OSError as error:
            parent.send(Forked(uid, 0, error.errno or 0).encode())
        else:
            if not child.pid:
                live(terms, child.failed)
            socket.send_fds(parent, [Forked(uid, child.pid).encode()], [child.pidfd])
            os.close(child.pidfd)
        os.close(end)
        os.close(report)


if __name__ == "__main__":
    sys.exit(main())
