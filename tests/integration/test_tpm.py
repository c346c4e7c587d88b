"""Keys in a TPM: swtpm's, by way of Debian's tpm2-pkcs11, served by nginx and by titus-py.

The keys are imported into it, so that they can be looked for: they are in no process.
"""

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from keyd.inspection.key_search import needles, search_all
from keyd.powers import PrivateKey
from titus_py.audit.throwaway_authority import ThrowawayAuthority

from .conftest import Serve
from .instance import UIDS, all_processes, descendants, eventually
from .peers import Listener
from .tokens import PIN, USER, TokenKeyd, nginx_asking, s_client, scratch

MODULE = next(Path("/usr/lib").glob("*/pkcs11/libtpm2_pkcs11.so"))
KINDS = {"rsa": "RSA-2048", "ecdsa": "P-256"}


class Tpm(NamedTuple):
    directory: Path
    environment: dict[str, str]
    keys: dict[str, PrivateKey]

    def uri(self, kind: str) -> str:
        pin = self.directory.parent / "pin"
        return f"pkcs11:token=tpm;object={kind}?module-path={MODULE}&pin-source=file:{pin}"


@pytest.fixture(scope="module")
def tpm() -> Iterator[Tpm]:
    with scratch() as directory:
        home = directory / "tpm"
        for name in (home, home / "state", home / "store"):
            name.mkdir()
        socket = home / "socket"
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={home / 'state'}"]
        command += ["--server", f"type=unixio,path={socket}"]
        command += ["--ctrl", f"type=unixio,path={socket}.ctrl"]
        command += ["--flags", "startup-clear,not-need-init"]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
            try:
                eventually(socket.is_socket, "swtpm listens")
                tcti = f"swtpm:path={socket}"
                environment = {"TPM2_PKCS11_STORE": str(home / "store"), "TPM2_PKCS11_TCTI": tcti}
                tpm = Tpm(home, environment, {})
                _fill(tpm, {**environment, "TPM2TOOLS_TCTI": tcti})
                yield tpm
            finally:
                running.kill()


def _fill(tpm: Tpm, environment: dict[str, str]) -> None:
    """Make a token, and import an RSA and an ECDSA key into it."""
    directory = tpm.directory.parent
    tools = directory / "tools"
    tools.mkdir()
    # There is no resource manager, as the kernel's TPM has one: after each command, make room.
    for tool in Path("/usr/bin").glob("tpm2_*"):
        if tool.name not in ("tpm2_ptool", "tpm2_flushcontext"):
            room = "tpm2_flushcontext -t >/dev/null 2>&1"
            script = f'#!/bin/sh\n{tool} "$@"\ncode=$?\n{room}\nexit $code\n'
            (tools / tool.name).write_text(script)
            (tools / tool.name).chmod(0o755)
    (directory / "pin").write_text(PIN + "\n")
    (directory / "pin").chmod(0o600)

    plain = {**os.environ, **environment}
    making_room = {**plain, "PATH": f"{tools}:{plain['PATH']}"}

    def run(*words: str, variables: dict[str, str]) -> None:
        done = subprocess.run(words, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def ptool(*words: str) -> None:
        path = environment["TPM2_PKCS11_STORE"]
        run("tpm2_ptool", *words, f"--path={path}", variables=making_room)

    run("tpm2_ptool", "init", f"--path={environment['TPM2_PKCS11_STORE']}", variables=plain)
    run("tpm2_flushcontext", "-t", variables=plain)
    secrets = ["--label=tpm", f"--userpin={PIN}"]
    ptool("addtoken", "--pid=1", "--sopin=12345678", *secrets)
    authority = ThrowawayAuthority()
    (directory / "authority.pem").write_bytes(authority.certificate)
    for kind, key_type in KINDS.items():
        issued = authority.issue(key_type, ["localhost"])
        (directory / f"{kind}.crt").write_bytes(issued.certificate)
        key = directory / f"{kind}.key"
        key.write_bytes(issued.key)
        algorithm = "rsa" if kind == "rsa" else "ecc"
        ptool(
            "import",
            f"--privkey={key}",
            f"--algorithm={algorithm}",
            f"--key-label={kind}",
            *secrets,
        )
        key.unlink()
        tpm.keys[kind] = load_pem_private_key(issued.key, None)  # type: ignore[assignment]
    user = pwd.getpwnam(USER)
    for path in (tpm.directory, *tpm.directory.rglob("*")):
        os.chown(path, user.pw_uid, user.pw_gid)
    shutil.rmtree(tools)


def variables(tpm: Tpm) -> list[str]:
    return [f"{name}={value}" for name, value in tpm.environment.items()]


def nothing_found(tpm: Tpm, pids: list[int]) -> bool:
    """Whether the keys are in no memory: not of the module's process either."""
    sought = [needle for key in tpm.keys.values() for needle in needles(key)]
    return not [hit for found in search_all(pids, sought) for hit in found.hits]


def test_nginx_serves_with_keys_of_a_tpm(tpm: Tpm) -> None:
    """Before titus-py does: without a resource manager, a TPM has room for one."""
    directory = tpm.directory.parent
    keyd = TokenKeyd(directory, tpm.directory, [tpm.uri(kind) for kind in KINDS], *variables(tpm))
    try:
        keyd.wait_for("token tpm: ecdsa is ready")
        with nginx_asking(keyd.socket, directory, tpm.keys) as nginx:
            for kind in KINDS:
                for version in ("-tls1_2", "-tls1_3"):
                    s_client(nginx.port, directory / "authority.pem", kind, version)
            searched = [*descendants(keyd.process.pid), *descendants(nginx.pid)]
            assert nothing_found(tpm, [one.pid for one in searched])
    finally:
        modules = keyd.token_processes()
        keyd.close()
        eventually(lambda: not {*modules} & {*all_processes()}, "its end")


def test_titus_py_serves_with_keys_of_a_tpm(tpm: Tpm, serve: Serve, echoing: Listener) -> None:
    directory = tpm.directory.parent
    instance = serve(
        echoing.address,
        keyd={
            "user": str(UIDS.take(2)[0]),
            "token_user": USER,
            "token_paths": [str(tpm.directory)],
            "token_environment": variables(tpm),
        },
        vhost=[
            {
                "certificates": [
                    {"certificate": str(directory / f"{kind}.crt"), "key": tpm.uri(kind)}
                    for kind in KINDS
                ]
            }
        ],
    )
    # The one that checked the keys may have left the TPM just now.
    instance.wait_for_event("token_ready")
    for kind in KINDS:
        for version in ("-tls1_2", "-tls1_3"):
            s_client(instance.port, directory / "authority.pem", kind, version)
    assert nothing_found(tpm, [process.pid for process in instance.processes()])
