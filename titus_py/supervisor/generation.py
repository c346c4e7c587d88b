"""A generation: one configuration, one parent and one keyd, and the sockets between them.

Run by the supervisor.
"""

import socket
import time
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from keyd.protocol import CONTROL_VERSION, VERSION
from keyd.upstream.state import UpstreamState
from titus_py.between.plan import Check, ResolvedAddress, State
from titus_py.configuration import tokens, upstreams
from titus_py.configuration.address import Address, Bindable, NameAddress
from titus_py.configuration.checking import Checked
from titus_py.configuration.lending import told
from titus_py.supervisor.child import Child, start_keyd, start_parent
from titus_py.supervisor.listeners import Wishes
from titus_py.supervisor.planning import plan_of

__all__ = ["Generation"]

#: What this program's parents and workers, and its keyd, speak with each other.
_KEYD_VERSIONS = CONTROL_VERSION, VERSION


class Generation:
    """A configuration as it was read, and the two processes that serve it.

    The certificates are those that were checked, even if the files have changed since. The files
    are not read here: they may also hold a private key, so only keyd and ``keyd check`` do that.
    """

    def __init__(self, number: int, checked: Checked, filters: Mapping[str, str]) -> None:
        if checked.configuration is None:
            raise ValueError("a configuration with mistakes")
        self.number = number
        self.checked = checked
        self.configuration = checked.configuration
        #: Where its clients' connections go on to.
        self.backends = frozenset(
            backend for vhost in self.configuration.vhost for _, backend in vhost.all_backends
        ).union(*(tunnel.connect for tunnel in self.configuration.tunnel))
        #: Those of them that are checked, each way of checking once.
        self.checks = tuple(
            dict.fromkeys(
                Check(str(backend), vhost.health.plan, vhost.send_proxy)
                for vhost in self.configuration.vhost
                if vhost.health is not None
                for _, backend in vhost.all_backends
            )
        )
        #: What its virtual hosts call the clients that they know one by one.
        self.client_names = frozenset(
            client.name for vhost in self.configuration.vhost for client in vhost.client
        )
        self.certificates = checked.certificates
        self.files = checked.files
        self.keyd: Child | None = None
        self.parent: Child | None = None
        #: Its parent's, which may be of a program before.
        self.keyd_versions = _KEYD_VERSIONS
        #: keyd is a service of its own, and is not connected yet.
        self.waits_for_keyd = self.configuration.keyd.socket is not None
        #: The parent has no connection to that keyd: not yet, or not any more. ``keyd_missed`` is
        #: why, once that is known.
        self.without_keyd = self.waits_for_keyd
        self.keyd_missed = ""
        #: keyd is there, but with other keys: it is not used before certificates are read anew.
        self.keyd_held = False
        #: Its keyd has other keys than the certificates: a file has changed since it was checked.
        self.lacks_keys = False
        #: Backends' names that have not been looked up yet.
        self.unresolved: set[NameAddress] = set()
        #: How keyd's tokens are, each with its name.
        self.tokens: list[tuple[str, str]] = []
        #: How its upstreams are.
        self.upstreams: list[UpstreamState] = []
        #: What keyd has done for each of the hosts that it lends keys to, as it says.
        self.lent: list[list[Any]] = []
        #: The keys that keyd had when it was last connected.
        self.keyds_keys: set[str] | None = None
        #: Replaced by a later generation: it keeps its connections and takes no new ones.
        self.retired = False
        #: Its connections are being ended, to make room for another generation.
        self.gives_way = False
        #: Its parent was told to retire, and has not confirmed it.
        self.retiring = False
        #: Its fork server has ended: no more workers can be made.
        self.crippled = False
        #: It has taken over, and that it listens was logged.
        self.announced = False
        #: The children that are not ready yet.
        self.starting: set[Child] = set()
        #: The parent's live connections, by number: the event with which each began.
        self.connections: dict[int, dict[str, Any]] = {}
        #: The latest connections that have ended: a refusal of keyd's may be heard after the end.
        self.ended: deque[dict[str, Any]] = deque(maxlen=1000)
        #: The listeners that were opened for it.
        self.added: dict[Bindable, socket.socket] = {}
        self.spares = 0
        #: Workers that are still there long after they were killed, or have ended.
        self.stay = 0
        #: On how many huge pages its workers have what they inherit, and code; None: not known yet.
        self.huge_pages: int | None = None
        self.huge_pages_of_code: int | None = None
        self.started, self.begun = datetime.now(UTC), time.monotonic()
        #: The uids that its parent may give to workers.
        self.uids = range(0)
        self._filters = filters

    @property
    def state(self) -> str:
        if self.retired:
            return "retired"
        return "serving" if self.ready and self.announced else "starting"

    @property
    def listening(self) -> list[Bindable]:
        """The addresses that its clients connect to."""
        return self.configuration.listening

    @property
    def wishes(self) -> Wishes:
        """How it wants its listening sockets."""
        return Wishes.of(self.configuration)

    @property
    def ready(self) -> bool:
        """Whether both processes serve, and no backend's name is waited for."""
        return not (self.starting or self.waits_for_keyd or self.unresolved)

    @property
    def understands_keyd(self) -> bool:
        """Whether its parent and workers would understand a keyd that is started now."""
        return self.keyd_versions == _KEYD_VERSIONS

    @property
    def children(self) -> list[Child]:
        return [child for child in (self.keyd, self.parent) if child is not None]

    @property
    def uids_needed(self) -> int:
        """One for each worker, and one for the parent."""
        return self.configuration.worker.max + self.configuration.worker.spare + 1

    @property
    def key_ids(self) -> set[str]:
        """The keys that keyd is to have: SHA-256 of the public key, in hexadecimal."""
        ids = {facts.key_id.hex() for facts in self.certificates.values()}
        return ids | {facts.key_id.hex() for facts in self.checked.lent.values()}

    @property
    def inherited_keys(self) -> list[str]:
        """Those that are not in their files any more: the keyd before hands them over."""
        return [
            self.certificates[one].key_id.hex() for one in sorted(self.checked.inherited, key=str)
        ]

    def start_keyd(self, predecessor: socket.socket | None = None) -> socket.socket:
        """Start keyd; returns the parent's end of its control socket. Raises OSError.

        ``predecessor`` is a socket to the keyd that hands it the keys that it inherits.
        """
        keyd = self.configuration.keyd.user
        files = dict.fromkeys(
            (
                str(one.key),
                one.passphrase_file and str(one.passphrase_file),
                one.directory is not None,
            )
            for one in self.certificates
            if one.key is not None and one not in self.checked.inherited
        )
        files |= dict.fromkeys(
            (str(one.key), one.passphrase_file and str(one.passphrase_file), False)
            for one in self.checked.lent
            if one.key is not None
        )
        self.keyd, control = start_keyd(
            {
                "inherited": self.inherited_keys,
                "uid": keyd.uid,
                "gid": keyd.gid,
                "chroot": str(self.configuration.worker.chroot),
                "must_lock": self.configuration.keyd.lock_memory == "required",
                "filter": self._filters["keyd"],
                "tokens": tokens.told(
                    self.configuration.keyd,
                    [*self.certificates.items(), *self.checked.lent.items()],
                ),
                "upstreams": upstreams.told(
                    self.configuration.keyd,
                    [facts.reference for one, facts in self.certificates.items() if one.upstream],
                ),
                "lending": told(self.configuration, self.checked.lent),
                "keys": [
                    {"key": key, "passphrase_file": phrase, "may_be_missing": in_directory}
                    for key, phrase, in_directory in files
                ],
            },
            predecessor,
        )
        self.starting.add(self.keyd)
        return control

    def start_parent(
        self,
        control: socket.socket | None,
        uids: range,
        listeners: Mapping[Bindable, socket.socket],
        addresses: Mapping[Address, tuple[ResolvedAddress, ...]],
        states: Mapping[Check, State],
    ) -> None:
        """Start the parent, which gets keyd's control socket now or later. Raises OSError."""
        self.uids = uids
        plan = plan_of(
            self.configuration,
            self.checked,
            uids,
            listeners,
            {str(backend): addresses.get(backend, ()) for backend in self.backends},
            {check: states.get(check) for check in self.checks},
            self._filters["worker"],
        )
        self.parent = start_parent(plan, control)
        self.keyd_versions = _KEYD_VERSIONS
        self.starting.add(self.parent)

    def adopt(self, name: str, pid: int, descriptor: int, starting: bool) -> None:
        """Take over a process that this process's previous program started, and its socket."""
        end = socket.socket(fileno=descriptor)
        end.setblocking(False)
        child = Child(name, pid, end)
        if name == "keyd":
            self.keyd = child
        else:
            self.parent = child
        if starting:
            self.starting.add(child)
        else:
            # Since when, nobody has said.
            child.ready = child.started
