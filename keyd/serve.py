"""``keyd serve``: the keyd of one titus-py, which started it and states all terms.

Begins as root, with inherited descriptors alone: of the settings, of the supervisor and of the
parent. It hears nobody before it is confined.
"""

import argparse
import json
import os
import signal
import socket
import sys
from typing import NoReturn

import prctl

from keyd.confinement import Confinement, confine, lock_before_keys
from keyd.daemon import Keyd
from keyd.linux.sealed import read_all
from keyd.linux.side_channels import guard
from keyd.linux.title import set_title
from keyd.loading import load, readable
from keyd.orders import Orders
from keyd.powers import Key
from keyd.protocol import fingerprint
from keyd.reference import key_id
from keyd.succession import inherited, receive
from keyd.telling import Teller
from keyd.token.keys import States, hear_first
from keyd.token.starting import start_told
from keyd.words import leave_standard_error

__all__ = ["THREADS", "leave", "serve"]

#: One more than there are cores, so that a slow key does not hold up the quick ones.
THREADS = (os.cpu_count() or 1) + 1


def serve(arguments: argparse.Namespace) -> NoReturn:
    """Serve one parent, on the terms that it states."""
    set_title("keyd", "keyd")
    settings = json.loads(read_all(arguments.settings_fd))
    supervisor = socket.socket(fileno=arguments.supervisor_fd)
    parent = socket.socket(fileno=arguments.parent_fd)
    for descriptor in (supervisor, parent):
        descriptor.set_inheritable(False)

    if settings["lending"]:
        # Others do not need it, and nothing can be imported later.
        from keyd.upstream.lender import Lender

    lock_before_keys(settings["must_lock"])
    guards = guard()
    tokens = start_told(settings["tokens"]) if settings["tokens"] else []
    broker = None
    if settings["upstreams"]:
        # Imported here: most have no key that is another host's.
        from keyd.upstream.starting import start_told as start_upstreams

        broker = start_upstreams(settings["upstreams"])
    keys: dict[bytes, Key] = {} if broker is None else dict(broker.keys)
    keys |= load(readable(settings["keys"]))
    handed = [] if arguments.predecessor_fd is None else receive(arguments.predecessor_fd)
    keys |= {key_id(key.public_key()): key for token in tokens for key in token.keys}
    program = bytes.fromhex(settings["filter"])
    to = Confinement(*(settings[key] for key in ("uid", "gid", "chroot", "must_lock")))
    locked = confine(to)
    keys |= load(inherited(handed, settings["inherited"]))

    # After confine(): a change of uid clears the parent-death signal.
    prctl.set_pdeathsig(signal.SIGKILL)

    teller = Teller(supervisor)
    tell, tell_news = teller.tell, teller.tell_news
    leave_standard_error(teller.say)

    hear_first(tokens)
    states = States(tokens)

    def tick() -> None:
        teller.tell_kept()
        tell("alive")
        if (news := states.news()) is not None:
            tell_news("tokens", tokens=news)
        if broker is not None and (upstreams := broker.news()) is not None:
            tell_news("upstreams", upstreams=upstreams)
        if (counts := states.counted()) is not None:
            tell_news("token_operations", tokens=counts)
        if (operations := keyd.tally.news()) is not None:
            tell_news("operations", **operations)
        if lender is not None:
            for refusals in lender.tick():
                if not tell("lending_refused", **refusals):
                    lender.keep(refusals)
            if (lent := lender.news()) is not None:
                tell_news("lent", clients=lent)

    def ready() -> None:
        tick()
        tell_news(
            "ready",
            keys=fingerprint(keys),
            all_memory_locked=locked,
            guards=", ".join(guards) or "none",
        )

    keyd = Keyd(keys, tick, judged_again=() if broker is None else broker.keys)
    lender = Lender(settings["lending"], keys, keyd) if settings["lending"] else None
    for token in tokens:
        keyd.hear_process(token.socket, token.hear)
    if broker is not None:
        broker.serve(keyd)
    keyd.hear_parent(parent, gone=keyd.stop)
    orders = Orders(supervisor, keys, lender.orders if lender else {})
    keyd.hear_process(supervisor, orders.hear)

    keyd.serve(THREADS, program, ready)
    leave()


def leave() -> NoReturn:
    """End at once: the filter does not allow the calls that shut an interpreter down."""
    sys.stderr.flush()
    os._exit(0)
