"""The shared object itself: what it exports, what it links to, what it keeps."""

import struct
import subprocess
import sys
from pathlib import Path

import pytest

from .support import (
    CFLAGS,
    SOURCES,
    Keyd,
    Site,
    build,
    configure,
    environment,
    have,
)


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_it_compiles_without_a_warning(tmp_path: Path, compiler: str) -> None:
    if not have(compiler):
        pytest.skip(f"no {compiler}")
    build(tmp_path / "keyd.so", "-O2", "-D_FORTIFY_SOURCE=2", compiler=compiler)


def test_what_is_exported(provider_path: Path) -> None:
    """For OpenSSL, and for a worker, which says where the handshake's messages are."""
    command = ["nm", "-D", "--defined-only", "--format=posix", str(provider_path)]
    symbols = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert [line.split()[0] for line in symbols.splitlines()] == [
        "OSSL_provider_init",
        "keyd_take_messages_from",
    ]


def test_no_libcrypto_is_linked(provider_path: Path) -> None:
    command = ["objdump", "-p", str(provider_path)]
    headers = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    needed = [line.split()[1] for line in headers.splitlines() if "NEEDED" in line]

    assert needed == ["libc.so.6"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_nothing_mutable_is_kept(tmp_path: Path, source: Path) -> None:
    """But for one pointer: where a worker has the handshake's messages."""
    output = tmp_path / "part.o"
    subprocess.run(["gcc", *CFLAGS, "-O2", "-c", "-o", str(output), str(source)], check=True)
    command = ["size", "-A", str(output)]
    sections = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sizes = {line.split()[0]: int(line.split()[1]) for line in sections.splitlines()[2:-2]}

    mutable = {
        name: size
        for name, size in sizes.items()
        if name.startswith((".data", ".bss", ".tdata", ".tbss"))
        and not name.startswith(".data.rel.ro")
        and size
    }
    pointer = struct.calcsize("P")
    assert mutable == ({".bss": pointer} if source.name == "channel.c" else {})


TWO_LIBRARIES = """
import ssl, sys
from OpenSSL import SSL

certificate, reference = sys.argv[1:]
standard = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
standard.load_cert_chain(certificate, reference)
other = SSL.Context(SSL.TLS_SERVER_METHOD)
other.use_certificate_chain_file(certificate)
other.use_privatekey_file(reference)
client_context = ssl.create_default_context(cafile=certificate)
client_context.check_hostname = False

def client():
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    return client_context.wrap_bio(into, out), into, out

def step(handshake, wants):
    try:
        handshake()
    except wants:
        return False
    return True

def by_standard():
    side, into, out = client()
    server = standard.wrap_bio(out, into, server_side=True)
    wants = ssl.SSLWantReadError
    while not all([step(side.do_handshake, wants), step(server.do_handshake, wants)]):
        pass
    return side.version()

def by_other():
    side, into, out = client()
    server = SSL.Connection(other, None)
    server.set_accept_state()
    done = False
    while not done:
        done = step(side.do_handshake, ssl.SSLWantReadError)
        if out.pending:
            server.bio_write(out.read())
        done = step(server.do_handshake, SSL.WantReadError) and done
        try:
            into.write(server.bio_read(65536))
        except SSL.WantReadError:
            pass
    return side.version()

print(ssl.OPENSSL_VERSION, "and", SSL.SSLeay_version(0).decode())
print(by_standard(), by_other(), by_standard(), by_other())
"""


@pytest.mark.parametrize("name", ["rsa", "p256", "ed25519"])
def test_two_libcryptos_in_one_process(
    sanitized_provider_path: Path,
    sanitizer_preloaded: dict[str, str],
    keyd: Keyd,
    sites: dict[str, Site],
    tmp_path: Path,
    name: str,
) -> None:
    """Python's own ssl module, and cryptography's OpenSSL, with the same provider file."""
    site = sites[name]
    configuration = configure(
        tmp_path / "openssl.cnf", sanitized_provider_path, f"socket = {keyd.path}"
    )
    done = subprocess.run(
        [sys.executable, "-c", TWO_LIBRARIES, str(site.certificate), str(site.reference)],
        check=False,
        capture_output=True,
        text=True,
        env=environment(configuration, **sanitizer_preloaded),
    )

    assert done.returncode == 0, done.stderr
    versions, handshakes = done.stdout.splitlines()
    first, second = versions.split(" and ")
    assert first != second, "these are meant to be two libraries"
    assert handshakes == "TLSv1.3 TLSv1.3 TLSv1.3 TLSv1.3"
