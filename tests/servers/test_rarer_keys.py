"""A stock nginx with keys of rarer kinds in keyd: as many as this system's OpenSSL knows."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from integration.instance import eventually, free_port

from keyd.certificates import load_chain, refer_to
from keyd.provider import openssl_configuration

from .keyd import PATIENCE, ListeningKeyd


class Kind(NamedTuple):
    """What openssl(1) makes such a key with, and what it calls its signatures."""

    name: str
    options: tuple[str, ...]
    signature: str


def _known() -> Iterator[Kind]:
    bits = ("-pkeyopt", "rsa_keygen_bits:2048")
    yield Kind("rsa-pss", ("-newkey", "rsa-pss", *bits), "rsa.pss")
    yield Kind("ed25519", ("-newkey", "ed25519"), "ed25519")
    command = ["openssl", "list", "-signature-algorithms"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for number in ("44", "65", "87"):
        if f"ML-DSA-{number}" in listed:  # since OpenSSL 3.5
            yield Kind(f"mldsa{number}", ("-newkey", f"ML-DSA-{number}"), f"mldsa{number}")


KINDS = list(_known())


class Nginx(NamedTuple):
    directory: Path
    ports: dict[str, int]


@pytest.fixture(scope="module")
def nginx() -> Iterator[Nginx]:
    """One server for each kind of key. It runs as nobody, in whose group it asks keyd."""
    directory = Path(tempfile.mkdtemp(prefix="titus-py-servers-"))
    directory.chmod(0o755)
    ports, servers = {}, ""
    try:
        with ListeningKeyd(directory, "nogroup", [directory / "keyd.sock"]) as keyd:
            for kind in KINDS:
                certificate = directory / f"{kind.name}.crt"
                _make(kind, certificate, keyd.keys / f"{kind.name}.key")
                leaf = load_chain(str(certificate))[0].certificate
                reference = directory / f"{kind.name}.reference"
                reference.write_text(refer_to(leaf, str(certificate))[1])
                ports[kind.name] = port = free_port()
                servers += f"server {{ listen {port} ssl; ssl_certificate {certificate};"
                servers += f" ssl_certificate_key {reference}; return 204; }}\n"
            keyd.start()
            yield from _serving(directory, ports, servers)
    finally:
        shutil.rmtree(directory)


def _make(kind: Kind, certificate: Path, key: Path) -> None:
    command = ["openssl", "req", "-x509", "-nodes", "-subj", "/CN=localhost", *kind.options]
    files = ["-keyout", key, "-out", certificate]
    subprocess.run([*command, *files], check=True, capture_output=True)


def _serving(directory: Path, ports: dict[str, int], servers: str) -> Iterator[Nginx]:
    (directory / "openssl.cnf").write_text(openssl_configuration(f"socket = {directory}/keyd.sock"))
    (directory / "nginx.conf").write_text(
        f"user nobody nogroup; daemon off; pid {directory}/nginx.pid; events {{}}"
        f" http {{ access_log off; ssl_protocols TLSv1.2 TLSv1.3; {servers} }}"
    )
    process = subprocess.Popen(
        ["nginx", "-c", directory / "nginx.conf", "-e", directory / "nginx.log"],
        env=os.environ | {"OPENSSL_CONF": str(directory / "openssl.cnf")},
    )
    try:
        eventually((directory / "nginx.pid").exists, "nginx serves", PATIENCE)
        yield Nginx(directory, ports)
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_nginx_serves_with_a_key_of_a_rarer_kind(nginx: Nginx, kind: Kind) -> None:
    done = subprocess.run(
        [
            *("openssl", "s_client", "-connect", f"localhost:{nginx.ports[kind.name]}"),
            *("-CAfile", nginx.directory / f"{kind.name}.crt", "-verify_return_error"),
        ],
        input="",
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr + (nginx.directory / "nginx.log").read_text()
    assert re.search(rf"(?i)peer signature type: {kind.signature}", done.stdout)
