"""ALPN (RFC 7301): what is negotiated, which backend that leads to, and who is refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from OpenSSL import SSL
from OpenSSL._util import ffi, lib

from titus_py.worker.client_hello import (
    ClientHello,
    ClientHelloReader,
    InvalidClientHello,
    offered_protocols,
)

from .certificates import Certificate
from .conftest import Certificates, Nginx, Serve
from .instance import TITUS_PY, Event, Instance, Table
from .peers import Listener, TlsClient, Truncated, alert_in, served_by

DECODE_ERROR, NO_APPLICATION_PROTOCOL = 50, 120
#: The random of a ServerHello that is one (RFC 8446 §4.1.3): its beginning.
HELLO_RETRY_REQUEST = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891")
GRPC = Path(__file__).with_name("grpc_call.py")


@pytest.fixture(scope="module")
def certificate(certificates: Certificates) -> Certificate:
    return certificates("P-256")


@pytest.fixture(scope="module")
def web(serve_all: Serve, nginx: Nginx) -> Instance:
    """As a web site has it."""
    alpn = {"alpn": ["h2", "http/1.1"], "backends": {"h2": nginx.h2_address}}
    return serve_all(nginx.address, vhost=[alpn])


def says(name: str) -> Iterator[Listener]:
    with (
        Listener.tcp() as listener,
        served_by(listener, lambda client: client.sendall(name.encode())),
    ):
        yield listener


@pytest.fixture(scope="module")
def by_protocol() -> Iterator[Listener]:
    yield from says("of the protocol")


@pytest.fixture(scope="module")
def by_default() -> Iterator[Listener]:
    yield from says("of all others")


@pytest.fixture(scope="module")
def instance(serve_all: Serve, by_protocol: Listener, by_default: Listener) -> Instance:
    hosts: list[Table] = [
        {
            "sni": ["localhost"],
            "alpn": ["x/2", "x/1", "x/0"],
            "backends": {"x/2": by_protocol.address, "x/0": by_protocol.address},
        },
        {
            "sni": ["strict.example"],
            "alpn": ["x/2"],
            "alpn_required": True,
            "groups": ["X25519"],
        },
        {"sni": ["none.example"]},
    ]
    return serve_all(by_default.address, vhost=hosts)


def event_of(instance: Instance, name: str, client: TlsClient) -> Event:
    return instance.wait_for_event(name, client=client.name)


# --- real clients -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "version", "protocol"),
    [("--http2", "2", "h2"), ("--http1.1", "1.1", "http/1.1"), ("--no-alpn", "1.1", None)],
)
def test_curl(
    web: Instance, certificate: Certificate, option: str, version: str, protocol: str | None
) -> None:
    command = [
        "curl", "--silent", "--show-error", "--fail", "--noproxy", "*", option,
        "--cacert", str(certificate.authority),
        "--resolve", f"localhost:{web.port}:127.0.0.1",
        "--write-out", "%{http_version} %{local_port}", f"https://localhost:{web.port}/",
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert answer.stderr == ""
    page, port = answer.stdout.rsplit(maxsplit=1)
    assert page == f"It works.\n{version}"
    event = web.wait_for_event("connection_ended", client=f"127.0.0.1:{port}")
    assert event.get("alpn") == protocol


def test_h2load(web: Instance) -> None:
    command = [
        "h2load", "--requests=400", "--clients=4", "--max-concurrent-streams=20",
        f"--connect-to=127.0.0.1:{web.port}", f"https://localhost:{web.port}/index.html",
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    assert "Application protocol: h2\n" in output
    assert "400 succeeded, 0 failed, 0 errored, 0 timeout" in output
    assert "status codes: 400 2xx" in output


def test_grpc(web: Instance, nginx: Nginx, certificate: Certificate) -> None:
    """A call to a server behind nginx, which speaks HTTP/2 on both sides."""
    arguments = [nginx.grpc_address, f"127.0.0.1:{web.port}", str(certificate.authority)]
    answer = subprocess.run(
        [sys.executable, GRPC, *arguments], capture_output=True, text=True, timeout=240, check=False
    )
    assert answer.stdout == "echoed: hello\n", answer.stderr


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_s_client_without_a_common_protocol(web: Instance, version: str) -> None:
    command = [
        "openssl", "s_client", "-connect", f"127.0.0.1:{web.port}", "-servername", "localhost",
        "-alpn", f"h3,spdy/1{version}", version,
    ]  # fmt: skip
    answer = subprocess.run(command, input=b"", capture_output=True, timeout=240, check=False)
    assert answer.returncode == 1
    assert b"SSL alert number 120" in answer.stderr
    event = web.wait_for_event("handshake_failed", detail=f"the client offers h3, spdy/1{version}")
    assert (event["end"], event["level"]) == ("no_application_protocol", "info")


def test_what_status_and_metrics_say(web: Instance, nginx: Nginx) -> None:
    with TlsClient(web.port, protocols=["h2"]) as client:
        client.handshake()
    event_of(web, "connection_ended", client)
    with TlsClient(web.port, protocols=["h3"]) as client, pytest.raises(SSL.Error):
        client.handshake()
    event_of(web, "handshake_failed", client)
    told = json.loads(
        subprocess.run(
            [TITUS_PY, "status", "--json", "--pid", str(web.pid)],
            capture_output=True,
            timeout=240,
            check=True,
        ).stdout
    )[0]
    assert told["counts"]["protocols"]["h2"] >= 1
    assert told["counts"]["failed"]["no_application_protocol"] >= 1
    assert told["vhosts"][0]["alpn"] == ["h2", "http/1.1"]
    assert told["vhosts"][0]["backends"] == [
        {"protocol": "h2", "backend": nginx.h2_address, "addresses": [nginx.h2_address]}
    ]


# --- what is chosen ----------------------------------------------------------------------


@pytest.mark.parametrize("newest", [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION])
@pytest.mark.parametrize(
    ("offered", "chosen", "backend"),
    [
        (["x/0", "x/1", "x/2"], "x/2", "of the protocol"),
        (["x/9", "x/0", "x/1"], "x/1", "of all others"),
        (["x/0"], "x/0", "of the protocol"),
        ([], "", "of all others"),
    ],
)
def test_the_servers_order_and_the_protocols_backend(
    instance: Instance, offered: list[str], chosen: str, backend: str, newest: int
) -> None:
    versions = SSL.TLS1_2_VERSION, newest
    with TlsClient(instance.port, protocols=offered, versions=versions) as client:
        client.handshake()
        assert client.tls.get_alpn_proto_negotiated().decode() == chosen
        assert client.receive_all().decode() == backend
    assert event_of(instance, "connection_ended", client).get("alpn", "") == chosen


def test_in_a_client_hello_that_comes_in_pieces(instance: Instance) -> None:
    with TlsClient(instance.port, protocols=["x/1"]) as client:
        hello = client.first_flight()
        for start in range(0, len(hello), 90):
            client.socket.sendall(hello[start : start + 90])
        client.handshake()
        assert client.tls.get_alpn_proto_negotiated() == b"x/1"


def test_after_a_hello_retry_request(instance: Instance) -> None:
    """The client guesses another group, and offers its protocols twice (RFC 8446 §4.1.2)."""
    with TlsClient(
        instance.port, "strict.example", protocols=["x/2"], groups=["P-256", "X25519"]
    ) as client:
        client.handshake()
        assert client.tls.get_alpn_proto_negotiated() == b"x/2"
        assert client.receive_all() == b"of all others"
    assert HELLO_RETRY_REQUEST in client.received
    assert event_of(instance, "connection_ended", client)["alpn"] == "x/2"


def test_a_protocol_that_is_offered_before_a_hello_retry_request_alone(instance: Instance) -> None:
    """No client may do that, and none gets through with it where a protocol is required."""
    with TlsClient(
        instance.port, "strict.example", protocols=["x/2"], groups=["P-256", "X25519"]
    ) as client:
        client.socket.sendall(client.first_flight())
        # pyOpenSSL's method takes no empty list.
        lib.SSL_set_alpn_protos(client.tls._ssl, ffi.NULL, 0)
        with suppress(SSL.Error, Truncated, ConnectionResetError):
            client.handshake()
            assert client.receive_all() == b""
    assert HELLO_RETRY_REQUEST in client.received
    event = event_of(instance, "connection_ended", client)
    assert (event["end"], event["level"]) == ("no_application_protocol", "info")


@pytest.mark.parametrize("offered", [["x/1"], []])
@pytest.mark.parametrize("newest", [SSL.TLS1_2_VERSION, SSL.TLS1_3_VERSION])
def test_where_one_is_required(instance: Instance, offered: list[str], newest: int) -> None:
    versions = SSL.TLS1_2_VERSION, newest
    with TlsClient(instance.port, "strict.example", protocols=offered, versions=versions) as client:
        with pytest.raises(SSL.Error):
            client.handshake()
        assert alert_in(client.received) == NO_APPLICATION_PROTOCOL
    event = event_of(instance, "handshake_failed", client)
    assert event["end"] == "no_application_protocol"
    assert event["detail"] == f"the client offers {'x/1' if offered else 'none'}"
    with TlsClient(instance.port, "strict.example", protocols=["x/2"]) as client:
        assert client.handshake().receive_all() == b"of all others"


def test_an_audit_negotiates_what_is_required(serve: Serve, by_default: Listener) -> None:
    vhost = {"alpn": ["x/2"], "alpn_required": True}
    instance = serve(by_default.address, vhost=[vhost])
    answer = subprocess.run(
        [TITUS_PY, "audit", "--quiet", "--pid", str(instance.pid)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert not instance.events_named("handshake_failed", end="no_application_protocol")


def test_without_alpn_what_a_client_offers_is_ignored(instance: Instance) -> None:
    with TlsClient(instance.port, "none.example", protocols=["x/2"]) as client:
        client.handshake()
        assert client.tls.get_alpn_proto_negotiated() == b""
        assert client.receive_all() == b"of all others"
    assert "alpn" not in event_of(instance, "connection_ended", client)


def test_a_backend_of_a_protocol_that_is_down(
    serve: Serve, by_default: Listener, tmp_path: Path
) -> None:
    """The protocol's own reason, and no other backend in its place."""
    nobody = f"unix:{tmp_path}/nobody.sock"
    vhost = {"alpn": ["x/2", "x/1"], "backends": {"x/2": nobody}}
    instance = serve(by_default.address, vhost=[vhost])
    with TlsClient(instance.port, protocols=["x/2"]) as client:
        client.handshake()
        with pytest.raises(ConnectionResetError):
            client.receive()
    ended = event_of(instance, "connection_ended", client)
    assert (ended["end"], ended["alpn"]) == ("backend_unavailable", "x/2")
    down = instance.wait_for_event("backend_unavailable", connection=ended["connection"])
    assert down["backend"] == nobody
    with TlsClient(instance.port, protocols=["x/1"]) as client:
        assert client.handshake().receive_all() == b"of all others"


def test_a_unix_socket_of_a_protocol_that_not_everybody_may_use(
    serve: Serve, by_default: Listener, tmp_path: Path
) -> None:
    """Root connects to it, and the parent is root without the capabilities that others have."""
    with Listener.unix(tmp_path / "h2.sock") as listener:
        (tmp_path / "h2.sock").chmod(0o600)
        os.chown(tmp_path / "h2.sock", 12345, 12345)
        vhost = {"alpn": ["x/2"], "backends": {"x/2": listener.address}}
        instance = serve(by_default.address, vhost=[vhost])
        with TlsClient(instance.port, protocols=["x/2"]) as client:
            client.handshake()
            with listener.accept() as connection:
                connection.sendall(b"of the socket")
            assert client.receive_all() == b"of the socket"


# --- hostile clients ---------------------------------------------------------------------


def vector(length_octets: int, content: bytes) -> bytes:
    return len(content).to_bytes(length_octets, "big") + content


def protocol_list(names: list[bytes]) -> bytes:
    return vector(2, b"".join(vector(1, name) for name in names))


def with_extension(hello: bytes, data: bytes) -> bytes:
    """A ClientHello that offers x/1, in one record, with this instead."""
    message = hello[9:]
    at = 2 + 32
    for length_octets in (1, 2, 1):  # session id, cipher suites, compression methods
        at += length_octets + int.from_bytes(message[at : at + length_octets], "big")
    old = b"\0\x10" + vector(2, protocol_list([b"x/1"]))
    extensions = message[at + 2 :]
    assert extensions.count(old) == 1
    extensions = extensions.replace(old, b"\0\x10" + vector(2, data))
    return hello[:3] + vector(2, b"\1" + vector(3, message[:at] + vector(2, extensions)))


def mutated(octets: bytes) -> st.SearchStrategy[bytes]:
    """Changed, cut or lengthened at one place."""
    place = st.integers(0, len(octets) - 1)
    return st.one_of(
        st.builds(
            lambda at, new: octets[:at] + new + octets[at + 1 :], place, st.binary(max_size=2)
        ),
        st.builds(lambda at: octets[:at], place),
        st.builds(lambda more: octets + more, st.binary(min_size=1, max_size=3)),
    )


def expected_answer(hello: bytes) -> int | None:
    """The alert, by RFC 7301; None: the handshake goes on."""
    read = ClientHelloReader().feed(hello)
    assert isinstance(read, ClientHello)
    try:
        offered = offered_protocols(read)
    except InvalidClientHello:
        return DECODE_ERROR
    common = {b"x/2", b"x/1", b"x/0"}.intersection(offered or ())
    return None if common else NO_APPLICATION_PROTOCOL


@settings(max_examples=30, deadline=None)
@given(
    mutated(protocol_list([b"x/1"]))
    | mutated(protocol_list([b"h2", b"x/0", b"x/9"]))
    | st.lists(st.sampled_from([b"", b"x", b"x/", b"x/1", b"x/12", b"\0"])).map(protocol_list)
)
def test_mutated_offers(instance: Instance, data: bytes) -> None:
    """What is malformed gets decode_error; a handshake goes on only for what we have."""
    with TlsClient(instance.port, protocols=["x/1"]) as client:
        hello = with_extension(client.first_flight(), data)
        client.socket.sendall(hello)
        answer = client.socket.recv(65536)
        if (expected := expected_answer(hello)) is None:
            assert answer[0] == 22
            return
        assert alert_in(answer) == expected
    end = "bad_client_hello" if expected == DECODE_ERROR else "no_application_protocol"
    assert event_of(instance, "handshake_failed", client)["end"] == end


# --- no page that is both ----------------------------------------------------------------

#: What systemd makes of MemoryDenyWriteExecute=: PR_SET_MDWE with PR_MDWE_REFUSE_EXEC_GAIN, and
#: before Linux 6.3 a filter.
DENYING = """\
import ctypes, errno, os, sys
import pyseccomp as seccomp
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    filter = seccomp.SyscallFilter(seccomp.ALLOW)
    for call, protection in (("mmap", 6), ("mprotect", 4)):
        masked = seccomp.Arg(2, seccomp.MASKED_EQ, protection, protection)
        filter.add_rule(seccomp.ERRNO(errno.EPERM), call, masked)
    filter.load()
"""


def writable_and_executable(maps: str) -> list[str]:
    found: list[str] = re.findall(r"^\S+ (?=[rwxps-]* )(?=\S*w)\S*x\S* .*$", maps, re.MULTILINE)
    return found


@pytest.mark.parametrize("denied", [False, True], ids=["as it is", "MemoryDenyWriteExecute"])
def test_no_memory_of_a_worker_is_both_writable_and_executable(
    serve: Serve, by_default: Listener, tmp_path: Path, denied: bool
) -> None:
    program = tmp_path / "titus-py"
    program.write_text(
        f"#!{sys.executable}\n{DENYING}os.execv({str(TITUS_PY)!r}, sys.argv)\n",
    )
    program.chmod(0o755)
    instance = serve(
        by_default.address,
        vhost=[{"alpn": ["h2", "http/1.1"]}],
        program=program if denied else None,
    )
    with TlsClient(instance.port, protocols=["h2"]) as client:
        assert client.handshake().receive_all() == b"of all others"
        # The client has yet to end its stream: this worker is there, and so are spares.
        for process in (instance.fork_server(), *instance.confined_workers(4)):
            maps = Path(f"/proc/{process.pid}/maps").read_text()
            assert "alpn." in maps
            assert writable_and_executable(maps) == []
    assert event_of(instance, "connection_ended", client)["alpn"] == "h2"


def test_a_callback_of_pyopenssls_would_need_such_memory() -> None:
    """The control: without the callback in C there would be a page, or no ALPN at all."""
    callback = (
        "from OpenSSL import SSL\n"
        "SSL.Context(SSL.TLS_SERVER_METHOD).set_alpn_select_callback(lambda *_: b'h2')\n"
        "print(open('/proc/self/maps').read())"
    )
    python = [sys.executable, "-c"]
    done = subprocess.run([*python, callback], capture_output=True, text=True, check=True)
    assert writable_and_executable(done.stdout)
    done = subprocess.run(
        [*python, DENYING + callback], capture_output=True, text=True, check=False
    )
    assert "MemoryError" in done.stderr
