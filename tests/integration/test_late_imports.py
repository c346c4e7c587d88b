"""Once a process is confined, it imports nothing: it can open no file, and its filter ends it.

Every kind of confined process, in every mode that has modules of its own, lives here for some
seconds: it starts, has its first client, its first error and its periodic work, and ends. Which
kinds and modes there are, is read from the code: one that nobody starts here is a failure, too.
"""

import ast
import signal
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import load_pem_x509_certificate
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL

from keyd.linux import landlock
from keyd.protocol import MAX_REPLY_OCTETS, Operation, Reply, Request, SignatureScheme, Status
from keyd.reference import key_id
from titus_py.audit.instance import Role, instance_processes

from .client_authority import ClientAuthority, spki_of
from .conftest import Certificates, Serve
from .instance import PATIENCE, UIDS, Instance, Process, descendants, eventually, free_port
from .peers import Listener, TlsClient, connect, receive_all
from .service import FAILS, edit, reload, status
from .test_metrics_process import scrape
from .tls_server import server_context, tls_server
from .tokens import USER, Hsm, scratch
from .watched import Watched

REPOSITORY = Path(__file__).parents[2]
#: Rooms whose processes confine themselves. ``keyd status`` and its like look from outside.
ROOMS = "keyd.", "titus_py.between.", "titus_py.fork_server.", "titus_py.worker."
ROOMS += "titus_py.parent.", "titus_py.resolver.", "titus_py.metrics."
FROM_OUTSIDE = ("keyd.inspection.",)
NAME = "db.example.test"
#: Longer than keyd's own timers, and those of the others, take; and a handshake on a busy machine.
QUICK = {"handshake_timeout": "10s", "connect_timeout": "1s"}
#: Of no machine (RFC 5737).
NOWHERE = "192.0.2.1"
#: What is signed in TLS 1.3 (RFC 8446 §4.4.3).
VERIFY = b"\x20" * 64 + b"TLS 1.3, server CertificateVerify\0" + bytes(32)
#: PostgreSQL's.
SSL_REQUEST = bytes.fromhex("0000000804d2162f")


# --- what there is -----------------------------------------------------------------------


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for package in ("titus_py", "keyd"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(parts).removesuffix(".__init__"), ast.parse(path.read_text())


MODULES = dict(_modules())


def take_the_last_step() -> set[str]:
    """The modules that confine the process that they run in."""
    steps = {"seccomp.install", "landlock.restrict_self"}
    if not landlock.version():
        steps.remove("landlock.restrict_self")
    return {
        name
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in steps
    }


def of_modes() -> set[str]:
    """The modules that a process imports where it needs them: within a function."""
    found = set()
    for name, tree in MODULES.items():
        if not name.startswith(ROOMS) or name.startswith(FROM_OUTSIDE):
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import):
                        found |= {each.name for each in node.names}
                    elif isinstance(node, ast.ImportFrom):
                        found |= {f"{node.module}.{each.name}" for each in node.names}
                        found.add(str(node.module))
    # A package without a line of code is no mode.
    return {name for name in found & {*MODULES} if MODULES[name].body[1:]}


# --- what happens ------------------------------------------------------------------------


class Scene(NamedTuple):
    """What all take part in."""

    program: Watched
    serve: Serve
    certificates: Certificates
    authority: ClientAuthority
    echoing: Listener
    directory: Path
    stack: ExitStack

    def run(self, *command: object) -> str:
        """A command of the program's, which has to succeed."""
        words = [str(word) for word in command]
        # An audit takes many times as long as the others.
        patience = 4 * PATIENCE
        done = subprocess.run(words, capture_output=True, text=True, timeout=patience, check=False)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout


def shake_hands(port: int, name: str, *versions: int, **more: Any) -> None:
    """In each of these versions, and be served."""
    for version in versions or (SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION):
        with TlsClient(port, name, versions=(version, version), **more) as client:
            client.handshake().send(b"x")
            assert client.receive(1)


def fail(port: int, name: str) -> None:
    with TlsClient(port, name) as client, pytest.raises(FAILS):
        client.handshake().receive_exactly(1)


def stall(instance: Instance) -> None:
    """Come half way, and stay until the time for a handshake is over.

    The periodic work is done meanwhile, and a channel to keyd is idle.
    """
    versions = SSL.TLS1_2_VERSION, SSL.TLS1_2_VERSION
    with TlsClient(instance.port, versions=versions) as client:
        # keyd signs for it, and its channel stays open.
        client.socket.sendall(client.first_flight())
        assert client.socket.recv(1)
        instance.wait_for_event("handshake_failed", client=client.name, end="handshake_timeout")


def stop_each(processes: Iterable[Process]) -> None:
    """For a moment. A call that waits for so long is another one after that: restart_syscall(2)."""
    for one in processes:
        # A spare may be needed meanwhile, and end.
        with suppress(FileNotFoundError, ProcessLookupError):
            one.kill(signal.SIGSTOP)
            one.kill(signal.SIGCONT)


def unharmed(instance: Instance, do: Callable[[], object]) -> None:
    """Stop each process while it waits, let it go on, and do this: none has ended but workers."""
    before = {one.pid for one in instance_processes(instance.pid) if one.role is not Role.WORKER}
    stop_each(instance.processes())
    do()
    after = {one.pid for one in instance_processes(instance.pid)}
    assert before <= after, instance.log()


def site(scene: Scene) -> None:
    """A host with all that a virtual host and a tunnel can have."""
    at, authority = scene.directory, scene.authority
    live = at / "live"
    issued = scene.certificates("P-256", "directory.test")
    (live / "directory.test").mkdir(parents=True)
    (live / "directory.test" / "fullchain.pem").symlink_to(issued.certificate)
    (live / "directory.test" / "privkey.pem").symlink_to(issued.key)
    client = authority.issue(dns=("a.example.org",))
    known = authority.issue("known", dns=(), self_signed=True)
    shown = authority.issue(dns=(NAME,), usage=ExtendedKeyUsageOID.SERVER_AUTH)
    server = scene.stack.enter_context(tls_server(server_context(shown)))

    def agree(connection: socket.socket) -> None:
        assert connection.recv(8, socket.MSG_WAITALL) == SSL_REQUEST
        connection.sendall(b"S")

    asked = scene.stack.enter_context(tls_server(server_context(shown), before=agree))
    plain, proxied, asking, through, after_asking = (free_port() for _ in range(5))
    nobody = f"127.0.0.1:{free_port()}"
    local = {"backend": scene.echoing.address}
    vhosts: list[dict[str, Any]] = [
        {
            "sni": ["localhost"],
            "backend": [f"localhost:{scene.echoing.port}", nobody],
            "health": {"every": "100ms", "timeout": "5s", "fall": 2, "rise": 2},
            "alpn": ["h2", "http/1.1"],
            "backends": {"h2": f"unix:{at}/h2"},
        },
        {"sni": ["told.test"], "send_proxy": "v2-tls", **local},
        {"sni": ["source.test"], "source_address": "client", "backend": f"{NOWHERE}:9"},
        {"sni": ["down.test"], "backend": nobody},
        {
            "sni": ["certified.test"],
            "client_certificates": "optional",
            "client_ca": authority.file,
            "client_crl": authority.crl(),
            "client_allow": {"dns": ["*.example.org"]},
            **local,
        },
        {
            "sni": ["known.test"],
            "client_certificates": "required",
            "client": [{"name": "known", "spki": [known.spki], "connections": 2}],
            **local,
        },
        {"certificate_dir": live, **local},
    ]
    metrics = free_port()
    by_ca = {"ca": authority.file, "server_name": NAME}
    instance = scene.serve(
        program=scene.program.titus_py,
        listen=[
            {"address": f"127.0.0.1:{plain}"},
            {"address": f"127.0.0.1:{proxied}", "accept_proxy_from": ["127.0.0.0/8"]},
            {"address": f"127.0.0.1:{asking}", "starttls": "postgresql"},
            {"address": f"unix:{at}/direct", "socket_mode": "0666"},
        ],
        vhost=vhosts,
        tunnel=[
            {"listen": f"127.0.0.1:{through}", "connect": server, **by_ca},
            {
                "listen": f"127.0.0.1:{after_asking}",
                "connect": asked,
                "starttls": "postgresql",
                **by_ca,
            },
        ],
        worker=QUICK,
        metrics={"address": f"127.0.0.1:{metrics}"},
    )

    def live_through_it() -> None:
        for name in ("localhost", "told.test", "certified.test", "directory.test"):
            shake_hands(plain, name)
        shake_hands(plain, "certified.test", certificate=(client.chain, client.key))
        shake_hands(plain, "known.test", certificate=(known.chain, known.key))
        for name in ("unknown.test", "known.test", "down.test", "source.test"):
            fail(plain, name)
        with connect(plain) as nonsense:
            nonsense.sendall(b"GET / HTTP/1.0\r\n\r\n")
            receive_all(nonsense)
        with connect(proxied) as header:
            header.sendall(b"PROXY UNKNOWN\r\n")
            with TlsClient(0, source=header) as balanced:
                balanced.handshake().send(b"x")
        with connect(asking) as asker:
            asker.sendall(SSL_REQUEST)
            assert asker.recv(1) == b"S"
            with TlsClient(0, source=asker) as agreed:
                agreed.handshake().send(b"x")
        local_client = socket.socket(socket.AF_UNIX)
        local_client.connect(f"{at}/direct")
        with TlsClient(0, source=local_client) as direct:
            direct.handshake().send(b"x")
        for port in (through, after_asking):
            with connect(port) as client_of_tunnel:
                client_of_tunnel.sendall(b"no message of PostgreSQL's")
                assert client_of_tunnel.recv(1)
        stall(instance)
        assert "titus_build_info" in scrape(("127.0.0.1", metrics))
        status(instance)
        scene.run(scene.program.titus_py, "status", f"--pid={instance.pid}")

    unharmed(instance, live_through_it)
    # On a busy machine, an audit's handshake takes longer.
    edit(instance, lambda tables: tables["worker"].update(handshake_timeout="120s"))
    assert reload(instance)["reloaded"]
    scene.run(scene.program.titus_py, "audit", "--quiet", f"--pid={instance.pid}")
    scene.run(scene.program.titus_py, "check", "--config", instance.directory / "titus.toml")
    assert instance.terminate() == 0


def hosts(scene: Scene) -> None:
    """A host that lends keys, one of them in a token; and one that borrows them."""
    at, authority = scene.directory, scene.authority
    (at / "hsm").mkdir()
    hsm = Hsm(at / "hsm")
    in_token = ec.generate_private_key(ec.SECP256R1())
    hsm.add_token("web", key=in_token)
    borrower = authority.issue("proxy", dns=(), self_signed=True)
    borrowed = scene.certificates("P-256", "site.test")
    own = scene.certificates("P-256", "keys.test")
    lend, borrow = f"unix:{at}/lend", f"unix:{at}/borrow"
    lender = scene.serve(
        lend,
        program=scene.program.titus_py,
        vhost=[
            {
                "certificate": own.certificate,
                "key": own.key,
                "client_certificates": "required",
                "send_proxy": "v2-tls-cert",
                "client": [{"name": "proxy", "spki": [borrower.spki]}],
            }
        ],
        keyd={
            "lend": lend,
            "token_user": USER,
            "token_paths": [hsm.directory],
            "token_environment": [f"SOFTHSM2_CONF={hsm.configuration}"],
            "client": [{"name": "proxy", "keys": [borrowed.key, hsm.uri("web", "key")]}],
        },
        worker=QUICK,
    )
    pin = spki_of(load_pem_x509_certificate(own.certificate.read_bytes()))
    uids = UIDS.take(2)
    proxy = scene.serve(
        scene.echoing.address,
        program=scene.program.titus_py,
        vhost=[{"certificate": borrowed.certificate, "key": "upstream"}],
        tunnel=[
            {
                "listen": borrow,
                "connect": f"127.0.0.1:{lender.port}",
                "pins": [pin],
                "certificate": borrower.chain,
                "key": borrower.key,
                "socket_mode": "0666",
            }
        ],
        keyd={"user": str(uids[0]), "upstream": [borrow], "upstream_user": str(uids[1])},
        worker=QUICK,
    )

    def is_ready() -> bool:
        (upstream,) = status(proxy)["upstreams"]
        return bool(upstream["state"] == "ready")

    def live_through_it() -> None:
        shake_hands(proxy.port, "site.test")
        # A host that is none of those that have keys.
        fail(lender.port, "keys.test")
        stall(proxy)

    eventually(is_ready, "the keys are within reach")
    unharmed(lender, lambda: unharmed(proxy, live_through_it))
    for instance in (lender, proxy):
        assert reload(instance)["reloaded"]
    eventually(is_ready, "the keys are within reach of the next one")
    shake_hands(proxy.port, "site.test")
    assert [instance.terminate() for instance in (proxy, lender)] == [0, 0]


class OwnKeyd:
    """A keyd that no titus-py has started, with keys in a file and in a token."""

    def __init__(self, scene: Scene, command: str, key: Path, in_token: ec.EllipticCurvePrivateKey):
        at = scene.directory / command
        (at / "hsm").mkdir(parents=True)
        hsm = Hsm(at / "hsm")
        hsm.add_token("web", key=in_token)
        self.socket, self._log = at / "socket", at / "log"
        self._manager = scene.stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._manager.settimeout(PATIENCE)
        self._manager.bind(str(at / "notify"))
        words = [
            *(scene.program.keyd, command, f"--socket={self.socket}", "--user=nobody"),
            *(f"--chroot={at}/empty", f"--token-user={USER}", f"--token-path={hsm.directory}"),
            f"--token-environment=SOFTHSM2_CONF={hsm.configuration}",
            *(f"--key={key}", f"--key={hsm.uri('web', 'key')}"),
        ]
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                words,
                stdout=file,
                stderr=file,
                env={"NOTIFY_SOCKET": str(at / "notify"), "WATCHDOG_USEC": "60000000"},
                start_new_session=True,
            )
        scene.stack.callback(self.process.wait)
        scene.stack.callback(self.process.kill)
        self.tick()

    def tick(self, times: int = 3) -> None:
        """Wait until it has done its periodic work so often; it is ready before."""
        while times:
            assert self.process.poll() is None, self._log.read_text()
            times -= b"WATCHDOG=1" in self._manager.recv(4096)

    def read_its_keys_again(self) -> None:
        self.process.send_signal(signal.SIGHUP)
        eventually(lambda: "keys read again" in self._log.read_text(), f"see {self._log}")

    def processes(self) -> list[Process]:
        return descendants(self.process.pid)

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0, self._log.read_text()


def control(scene: Scene) -> None:
    """keyd as a service of its own, and a titus-py that it serves."""
    issued = scene.certificates("RSA-2048", "control.test")
    keyd = OwnKeyd(scene, "control", issued.key, ec.generate_private_key(ec.SECP256R1()))
    at = scene.directory / "served"
    at.mkdir()
    tables = {
        "listen": [{"address": f"127.0.0.1:{free_port()}"}],
        "vhost": [{"certificate": issued.certificate, "backend": scene.echoing.address}],
        "keyd": {"socket": keyd.socket},
        "worker": QUICK,
    }
    instance = Instance.from_tables(at, tables, program=scene.program.titus_py)
    scene.stack.callback(instance.close)
    instance.wait_for_event("listening")

    def live_through_it() -> None:
        shake_hands(instance.port, "control.test")
        keyd.read_its_keys_again()
        stall(instance)
        shake_hands(instance.port, "control.test")

    before = keyd.processes()
    stop_each(before)
    unharmed(instance, live_through_it)
    assert keyd.processes() == before
    assert instance.terminate() == 0
    keyd.end()


def listen(scene: Scene) -> None:
    """keyd for other servers, which gets requests of all kinds."""
    in_token = ec.generate_private_key(ec.SECP256R1())
    keyd = OwnKeyd(scene, "listen", scene.certificates("P-256", "listen.test").key, in_token)
    before = keyd.processes()
    stop_each(before)
    wanted = Operation.SIGN, SignatureScheme.ecdsa_secp256r1_sha256, key_id(in_token.public_key())
    answers = [
        ask(keyd.socket, Request(*wanted, payload).encode()) for payload in (VERIFY, b"what?")
    ]
    assert [one.status is Status.DONE for one in answers] == [True, False]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as nonsense:
        nonsense.connect(str(keyd.socket))
        nonsense.send(b"?")
        nonsense.recv(MAX_REPLY_OCTETS)
    keyd.read_its_keys_again()
    keyd.tick()
    assert ask(keyd.socket, Request(*wanted, VERIFY).encode()).status is Status.DONE
    assert keyd.processes() == before
    keyd.end()


def ask(path: Path, request: bytes) -> Reply:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.settimeout(PATIENCE)
        channel.connect(str(path))
        channel.send(request)
        return Reply.decode(channel.recv(MAX_REPLY_OCTETS))


def commands(scene: Scene) -> None:
    """Those that start a confined process for what they do."""
    at = scene.directory / "new"
    at.mkdir(mode=0o700)
    program = scene.program
    scene.run(program.titus_py, "keys", "new", "web-1", "--directory", at)
    assert scene.run(program.titus_py, "keys", "pin", at / "web-1.crt").startswith("sha256:")


# --- what came of it -----------------------------------------------------------------------


@pytest.mark.timeout(600)  # half a minute, where nothing else runs
def test_nothing_is_imported_later(
    serve: Serve,
    certificates: Certificates,
    echoing: Listener,
    tmp_path: Path,
) -> None:
    with scratch() as directory, ExitStack() as stack:
        program = Watched(directory / "program")
        authority = ClientAuthority(tmp_path)
        scene = Scene(program, serve, certificates, authority, echoing, directory, stack)
        try:
            for happens in (commands, listen, control, site, hosts):
                happens(scene)
        finally:
            notes = program.notes()
            late = {(one.command, module) for one in notes for module in one.late}
            # Shown with whatever has failed: it may be why.
            print(late)
    confined = {module for one in notes for module in one.withdrew}
    loaded = {name for one in notes if one.withdrew for name in one.imported}
    # And every kind of confined process was there, in every mode that has a module of its own.
    assert (late, take_the_last_step() ^ confined, of_modes() - loaded) == (set(), set(), set())


def test_what_is_imported_later_is_seen(tmp_path: Path) -> None:
    """The witness itself: in a process that is confined, and then imports something."""
    program = Watched(tmp_path / "program")
    script = "import keyd.parsing; keyd.parsing.confine_parser(); import heapq"
    subprocess.run([program.python, "-I", "-c", script], capture_output=True, check=False)
    (one,) = program.notes()
    assert one.withdrew
    assert one.late[0] == "heapq <string>:1"
