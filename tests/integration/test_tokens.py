"""Keys in tokens (PKCS #11): SoftHSM's, served by keyd to itself and to nginx, and what goes wrong.

The module is SoftHSM, or one that is SoftHSM until it is told to fail.
"""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from keyd.powers import PrivateKey
from keyd.protocol import MAX_REPLY_OCTETS, Reply, SignatureScheme, Status
from keyd.provider import openssl_configuration
from keyd.reference import reference_pem
from titus_py.audit.key_search import needles, search_all
from titus_py.audit.throwaway_authority import ThrowawayAuthority

from .instance import descendants, eventually, free_port
from .tokens import Hsm, TokenKeyd, attempt_unconfined, build_shim, scratch

RSA, ECDSA = SignatureScheme.rsa_pss_rsae_sha256, SignatureScheme.ecdsa_secp256r1_sha256


class Site(NamedTuple):
    certificate: bytes
    key: PrivateKey


class Nginx(NamedTuple):
    port: int
    pid: int


class Served(NamedTuple):
    """A keyd with the tokens ``web`` (SoftHSM) and ``shaky`` (which fails as it is told)."""

    directory: Path
    hsm: Hsm
    authority: bytes
    rsa: Site
    ecdsa: Site
    shaky: PrivateKey
    keyd: TokenKeyd

    def behave(self, how: str) -> None:
        behaviour = self.hsm.directory / "behaviour"
        new = behaviour.with_suffix(".new")
        new.write_text(how)
        new.chmod(0o644)
        new.rename(behaviour)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    authority = ThrowawayAuthority()

    def site(kind: str) -> Site:
        issued = authority.issue(kind, ["localhost"])
        key = load_pem_private_key(issued.key, None)
        return Site(issued.certificate, key)  # type: ignore[arg-type]

    rsa, ecdsa, (_, shaky) = site("RSA-2048"), site("P-256"), site("P-256")
    with scratch() as directory:
        home = directory / "hsm"
        home.mkdir()
        hsm = Hsm(home)
        hsm.add_token("web", rsa=rsa.key, ecdsa=ecdsa.key)
        hsm.add_token("shaky", key=shaky)
        shim = build_shim(directory)
        wrong = directory / "wrong-pin"
        wrong.write_text("not the PIN\n")
        keyd = TokenKeyd(
            directory,
            hsm,
            [
                hsm.uri("web", "rsa"),
                hsm.uri("web", "ecdsa"),
                hsm.uri("shaky", "key", shim),
                hsm.uri("web", "rsa", shim, wrong),
                hsm.uri("web", "missing"),
                hsm.uri("none", "key"),
            ],
            *(f"SHIM_{name.upper()}={home / name}" for name in ("behaviour", "logins", "attempts")),
        )
        try:
            yield Served(directory, hsm, authority.certificate, rsa, ecdsa, shaky, keyd)
        finally:
            keyd.close()
    eventually(lambda: not descendants(keyd.process.pid), "tokens' processes end with keyd")


def test_it_says_of_each_token_how_it_is(served: Served) -> None:
    served.keyd.wait_for("token none cannot be used: there is no such token")
    served.keyd.wait_for("token web: missing is not in the token")
    served.keyd.wait_for("token shaky: key is ready")


def test_a_wrong_pin_is_named_and_never_tried_again(served: Served) -> None:
    served.keyd.wait_for("token web cannot be used: its PIN was not taken (PinIncorrect)")
    served.keyd.wait_for("it is not tried again before a reload or a restart")
    # The other line is that of the token that it belongs to, and whose PIN is right.
    assert (served.hsm.directory / "logins").read_text().splitlines() == ["login", "login"]


@pytest.mark.parametrize("version", ["-tls1_3", "-tls1_2"])
@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_nginx_serves_with_keys_of_a_token(
    served: Served, nginx_with_keyd: Nginx, kind: str, version: str
) -> None:
    done = subprocess.run(
        [
            *("openssl", "s_client", "-connect", f"localhost:{nginx_with_keyd.port}", version),
            *("-CAfile", served.directory / "authority.pem", "-verify_return_error"),
            *("-sigalgs", "RSA-PSS+SHA256" if kind == "rsa" else "ECDSA+SHA256"),
        ],
        input=b"",
        capture_output=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    expected = b"RSA-PSS" if kind == "rsa" else b"ECDSA"
    assert b"Peer signature type: " + expected in done.stdout


@pytest.fixture(scope="module")
def nginx_with_keyd(served: Served) -> Iterator[Nginx]:
    """A stock nginx whose keys are in the token ``web``."""
    directory, port = served.directory, free_port()
    (directory / "authority.pem").write_bytes(served.authority)
    for name, site in (("rsa", served.rsa), ("ecdsa", served.ecdsa)):
        (directory / f"{name}.crt").write_bytes(site.certificate)
        (directory / f"{name}.ref").write_bytes(reference_pem(site.key.public_key()))
    (directory / "openssl.cnf").write_text(openssl_configuration(f"socket = {served.keyd.socket}"))
    (directory / "nginx.conf").write_text(
        f"""
        user nobody nogroup;
        daemon off;
        pid {directory}/nginx.pid;
        events {{}}
        http {{
            access_log off;
            server {{
                listen {port} ssl;
                ssl_protocols TLSv1.2 TLSv1.3;
                ssl_certificate {directory}/rsa.crt;
                ssl_certificate_key {directory}/rsa.ref;
                ssl_certificate {directory}/ecdsa.crt;
                ssl_certificate_key {directory}/ecdsa.ref;
                return 204;
            }}
        }}
        """
    )
    log = directory / "nginx.log"
    nginx = subprocess.Popen(
        ["nginx", "-c", directory / "nginx.conf", "-e", log],
        env=os.environ | {"OPENSSL_CONF": str(directory / "openssl.cnf")},
    )
    try:
        eventually((directory / "nginx.pid").exists, "nginx serves")
        yield Nginx(port, nginx.pid)
    finally:
        nginx.terminate()
        nginx.wait()


@pytest.mark.parametrize(
    ("behaviour", "named"),
    [
        ("crash", "its module ended its process: killed by SIGSEGV"),
        ("exec", "its module ended its process: killed by SIGSYS"),
        ("pulled", "DeviceRemoved"),
        ("session lost", "SessionHandleInvalid"),
    ],
)
def test_a_token_that_fails_is_named_is_used_again_and_holds_up_no_other(
    served: Served, behaviour: str, named: str
) -> None:
    ready = served.keyd.log().count("token shaky: key is ready")
    served.behave(behaviour)
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    assert served.keyd.ask(served.ecdsa.key, ECDSA).status is Status.DONE
    served.keyd.wait_for(f"token shaky cannot be used: {named}")
    served.behave("")
    served.keyd.wait_for("token shaky: key is ready", ready + 1)
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE


def test_a_token_that_hangs_holds_up_no_other(served: Served) -> None:
    ready = served.keyd.log().count("token shaky: key is ready")
    served.behave("hang")
    with ExitStack() as channels:
        # More of them than keyd has threads.
        asking = [
            channels.enter_context(served.keyd.asking(served.shaky, ECDSA))
            for _ in range(2 * (os.cpu_count() or 1) + 2)
        ]
        for key, scheme in ((served.ecdsa.key, ECDSA), (served.rsa.key, RSA)):
            assert served.keyd.ask(key, scheme).status is Status.DONE
        assert not select.select(asking, [], [], 0)[0]
        for channel in asking:
            assert Reply.decode(channel.recv(MAX_REPLY_OCTETS)).status is Status.FAILED
    served.behave("")
    served.keyd.wait_for("token shaky cannot be used: its module hung, and was killed")
    served.keyd.wait_for("token shaky: key is ready", ready + 1)
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE


def test_a_mechanism_that_is_missing_is_named_and_costs_one_handshake(served: Served) -> None:
    served.behave("no mechanism")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.FAILED
    served.keyd.wait_for("refused, FAILED: sign: token shaky: MechanismInvalid")
    served.behave("")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE


def test_the_module_can_do_nothing_but_sign(served: Served) -> None:
    attempts = served.hsm.directory / "attempts"
    served.behave("attempts")
    assert served.keyd.ask(served.shaky, ECDSA).status is Status.DONE
    served.behave("")
    confined = attempts.read_text().splitlines()[-3:]
    attempts.unlink()
    # The control: the same user, in a process that is not confined.
    attempt_unconfined(served.directory / "shim.so", attempts)
    assert list(zip(confined, attempts.read_text().splitlines(), strict=True)) == [
        ("read: Permission denied", "read: done"),
        ("write: Permission denied", "write: done"),
        ("connect: Permission denied", "connect: Connection refused"),
    ]


def test_the_key_is_in_no_process_but_the_tokens(served: Served, nginx_with_keyd: Nginx) -> None:
    sought = [*needles(served.rsa.key), *needles(served.ecdsa.key)]
    for key, scheme in ((served.ecdsa.key, ECDSA), (served.rsa.key, RSA)):
        assert served.keyd.ask(key, scheme).status is Status.DONE
    with_module = served.keyd.token_processes()
    others = [
        *(served.keyd.process.pid, nginx_with_keyd.pid),
        *(one.pid for one in descendants(nginx_with_keyd.pid)),
        *(pid for pid in with_module if "softhsm" not in Path(f"/proc/{pid}/maps").read_text()),
    ]
    assert len(others) < 4 + len(with_module)
    for pid, found in zip(others, search_all(others, sought), strict=True):
        assert not found.hits, f"{pid}: {[str(hit) for hit in found.hits]}"
    # The control: the same search finds the same keys in a process that has them.
    with holder(served.rsa.key) as pid:
        assert search_all([pid], sought)[0].hits


@contextmanager
def holder(key: PrivateKey) -> Iterator[int]:
    """A process that has a key in its memory: its pid."""
    program = (
        "import sys; from cryptography.hazmat.primitives.serialization import load_pem_private_key;"
        "key = load_pem_private_key(sys.stdin.buffer.read(), None); print(flush=True);"
        "import time; time.sleep(60)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        process.stdin.close()
        process.stdout.readline()
        yield process.pid
        process.kill()
