"""The fork server's life: load the certificates, confine itself, fork a worker for each order.

Started by the parent, as root. Every worker inherits its memory, so it learns nothing about
clients: it gets uids and descriptors, and forks. First it puts the part of the confinement
that is the same for all workers on itself. It keeps the privileges for making processes of
other users, and no way to a file or a network. The workers are the parent's children
(CLONE_PARENT), not its own. It trusts the parent.
"""

import gc
import sys

if __name__ == "__main__":
    # The imports make no garbage, and there are many.
    gc.disable()

from titus_py.fork_server.heap import fill_holes, give_back, use_one_heap
from titus_py.fork_server.huge_pages import fill_up, heap, open_up, use_huge_pages

use_one_heap()
#: For contexts, the code that connections run, and what else is made before the first fork.
_ROOM_OCTETS = 1 << 20

# Python's hashlib would load the system's OpenSSL beside the one of pyOpenSSL: megabytes and
# mappings for each worker, and code that no worker needs. hashlib also has implementations
# without OpenSSL.
sys.modules["_hashlib"] = None  # type: ignore[assignment]

import warnings
from types import ModuleType

# This is a decorator of pyOpenSSL's, which loads inspect, ast and dis: a megabyte of each worker.
# What it makes warns whoever calls it, and here no warning is heard (see below).
_WHERE = warnings if sys.version_info >= (3, 13) else ModuleType("typing_extensions")
vars(_WHERE)["deprecated"] = lambda *_, **__: lambda decorated: decorated
sys.modules.setdefault(_WHERE.__name__, _WHERE)

# Most of what is loaded, workers only look at. They write to what OpenSSL makes for itself, first,
# and to most of what is made once all is loaded. Both are on the same huge page, or two: there is
# room behind the first.
_before = fill_up(heap())
from cryptography.hazmat.bindings import _rust

_rust._openssl.lib.SSL_CTX_free(_rust._openssl.lib.SSL_CTX_new(_rust._openssl.lib.TLS_method()))
_FILLED = fill_up(heap(), _ROOM_OCTETS)
# For what is loaded from here on.
open_up(_before)

import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from keyd.without_mail import load_certificates_without_mail

load_certificates_without_mail()
from OpenSSL import SSL

if sys.modules.get("typing_extensions") is _WHERE:
    # It has nothing else for whoever imports it later: in a test, for one.
    del sys.modules["typing_extensions"]

from keyd.linux import prctl
from keyd.linux.credentials import hide_memory
from keyd.linux.descriptors import inherited_descriptors
from keyd.linux.process import CLONE_PARENT, encode, leave, why_failed
from keyd.linux.sealed import read_all
from keyd.linux.seccomp import Program
from keyd.linux.title import CommandLine
from titus_py.between.hand_over import PARENT_FD
from titus_py.between.messages import Leaving, Prepared, Ready
from titus_py.between.plan import Plan, VirtualHost
from titus_py.between.report import ReportWriter
from titus_py.fork_server.confinement import (
    SCORE_FD,
    WORKER_NAMESPACES,
    Given,
    confine_fork_server,
    parting_calls,
    worker_calls,
)
from titus_py.fork_server.forking import ORDERED, fork_as_ordered
from titus_py.fork_server.gathering import gather_code
from titus_py.fork_server.huge_code import use_huge_pages_for_code
from titus_py.fork_server.immortality import make_all_immortal
from titus_py.fork_server.out_of_memory import OutOfMemory, give_code_back
from titus_py.fork_server.rehearsal import CONNECTIONS, FEW, rehearse
from titus_py.worker.life import Site, Terms, live
from titus_py.worker.tls import Credentials, client_hello, make_context

if TYPE_CHECKING:
    from OpenSSL import SSL

    from titus_py.between.client_identity import ClientTerms
    from titus_py.worker.client_certificate import Verifier
    from titus_py.worker.proxy_header import ProxyHeaderReader
    from titus_py.worker.tunnel import Conduit

__all__ = ["main"]

_TITLE, _WORKERS_TITLE = "titus-py: fork server", "titus-py: worker"


def main() -> int:
    """``python -m titus_py.fork_server.life``: started by the parent, on inherited descriptors.

    The arguments are ``--plan-fd``, ``--parent-fd`` and ``--openssl-conf-fd``. OpenSSL has read
    the last one by now (OPENSSL_CONF names it).
    """
    gc.enable()
    given = inherited_descriptors(sys.argv[1:])
    command_line = CommandLine()
    command_line.write([_TITLE])
    prctl.set_name("titus-forks")
    prctl.set_pdeathsig(signal.SIGKILL)
    hide_memory()
    plan = Plan.decode(read_all(given["--plan-fd"]))
    # For a warning, of a certificate for example, Python reads source files: a worker that
    # tried that would be killed.
    warnings.simplefilter("ignore")
    fill_holes()
    # What is there stays: it is not looked through each time that garbage is sought.
    gc.freeze()
    room = open_up(_FILLED)
    # Workers write to these two, which were made earlier: the connections that pyOpenSSL knows, and
    # the slice that Python keeps for the next one.
    SSL.Connection._reverse_mapping = WeakValueDictionary()
    kept = slice(0)
    fill_holes(room.start, room.stop)
    sites = [_site(vhost) for vhost in plan.vhosts]
    practice = [_practice_context(*each) for each in zip(sites, plan.vhosts, strict=True)]
    terms = Terms(
        plan.handshake_timeout,
        plan.limits.idle_timeout,
        plan.limits.half_closed_timeout,
        sites,
        encode(parting_calls()),
        ReportWriter(),
        client_hello(),
        practice[0] if practice else None,
        _proxy_header_reader(plan),
        _conduits(plan),
    )
    gather_code(room, lambda: _practise(plan, terms, FEW), (_serve, live))
    # Where the code was before.
    fill_holes(room.start, room.stop)
    _practise(plan, terms, CONNECTIONS)
    give_code_back()
    code_pages = use_huge_pages_for_code()
    worker_filter = Program(bytes.fromhex(plan.worker_filter))
    place = heap()
    confine_fork_server(plan.chroot, given["--parent-fd"])
    parent = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fileno=PARENT_FD)
    code = _serve(parent, plan, terms, worker_filter, command_line, place, code_pages)
    del kept
    return code


def _practise(plan: Plan, terms: Terms, connections: int) -> None:
    # What a worker does before it waits for a client.
    for _ in range(connections):
        why_failed((), -1, 0)
        Ready().encode()
    rehearse(terms, connections)
    if plan.tunnels:
        # Others do not need it in their memory.
        from titus_py.fork_server.tunnel_rehearsal import rehearse_tunnel

        rehearse_tunnel(terms, connections)


def _proxy_header_reader(plan: Plan) -> "Callable[[], ProxyHeaderReader] | None":
    """What reads load balancers' headers; loaded only if any are to come."""
    if not any(listener.accept_proxy_from for listener in plan.listeners):
        return None
    from titus_py.worker.proxy_header import ProxyHeaderReader

    return ProxyHeaderReader


def _conduits(plan: Plan) -> "list[Conduit]":
    """What carries connections through tunnels; loaded only if there are any."""
    if not plan.tunnels:
        return []
    from titus_py.worker.tunnel import conduit

    return [conduit(tunnel) for tunnel in plan.tunnels]


def _site(vhost: VirtualHost) -> Site:
    credentials = [Credentials(one.chain, one.key_reference) for one in vhost.certificates]
    context = make_context(credentials, vhost.tls)
    names = tuple(vhost.server_names) if vhost.server_names is not None else None
    index = None
    if vhost.certificate_index is not None:
        from titus_py.between.certificate_index import CertificateIndex

        index = CertificateIndex(vhost.certificate_index)
    return Site(
        names,
        context,
        vhost.truncated == "reset",
        vhost.passes_tls_facts,
        tuple(name.encode() for name in vhost.tls.alpn or ()),
        vhost.tls.alpn_required,
        _verifier(vhost.clients, vhost.passes_certificate, context),
        index,
    )


def _verifier(
    terms: "ClientTerms | None", passed_on: bool, context: "SSL.Context"
) -> "Verifier | None":
    """Who judges the certificates of a context's clients, where it asks for any."""
    if terms is None:
        return None
    # Other workers do not need it in their memory.
    from titus_py.worker.client_certificate import Verifier

    verifier = Verifier(terms, passed_on)
    verifier.demand(context)
    return verifier


def _practice_context(site: Site, vhost: VirtualHost) -> SSL.Context:
    """The context that a spare touches memory with: that of the first virtual host, or as it."""
    if site.certificate_index is None:
        return site.context
    from titus_py.worker.indexed import practise

    return practise(site.certificate_index, vhost.tls)


def _serve(
    parent: socket.socket,
    plan: Plan,
    terms: Terms,
    worker_filter: Program,
    command_line: CommandLine,
    place: range,
    code_pages: int,
) -> int:
    """Fork as ordered, until the parent hangs up. A worker does not return."""
    try:
        calls = worker_calls(worker_filter, terms.report.address, Given(*ORDERED))
        encoded = encode(calls)
        out_of_memory = OutOfMemory(SCORE_FD)
        title = command_line.place([_WORKERS_TITLE])
        gc.collect()
        # A worker copies each page that it writes to. What exists now stays: a worker counts no
        # references to it, and its garbage collector does not touch it.
        make_all_immortal()
        gc.freeze()
        # This gives back what Python keeps of freed objects, to use it again, wherever they lie.
        fill_holes()
        in_use = fill_up(place).place
        fill_holes()
        # Each fork copies the entries of what is mapped, and each worker's end clears them.
        give_back()
        parent.send(Prepared(use_huge_pages(in_use), code_pages).encode())
        worker = fork_as_ordered(
            parent.fileno(),
            plan.first_uid,
            plan.last_uid,
            WORKER_NAMESPACES | CLONE_PARENT,
            out_of_memory.as_workers,
            encoded,
            out_of_memory.as_fork_server,
            *title,
        )
    except (ValueError, OSError, MemoryError) as error:
        # Only the fork server comes here: a worker is what the last of these calls returns.
        with suppress(OSError):
            parent.send(Leaving(str(error) or "out of memory").encode(), socket.MSG_DONTWAIT)
        return 1
    if worker is not None:
        live(terms, why_failed(calls, *worker))
    return 0


if __name__ == "__main__":
    leave(main())
