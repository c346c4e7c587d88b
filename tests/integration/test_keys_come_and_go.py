"""A keyd of its own takes new keys and lets go of old ones, on SIGHUP, and loses no channel."""

import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from keyd.inspection.key_search import needles, search
from keyd.keys import load_private_key
from keyd.mldsa import KEY_TYPES
from keyd.powers import PrivateKey
from keyd.protocol import MAX_REPLY_OCTETS, Operation, Reply, Request, SignatureScheme, Status
from keyd.reference import key_id

from .instance import TITUS_PY, eventually

_CERTIFICATE_VERIFY = b"\x20" * 64 + b"TLS 1.3, server CertificateVerify\x00" + bytes(32)


class KeyFiles:
    """A ``keyd listen`` with one key by its file and the others in a directory."""

    def __init__(self, directory: Path) -> None:
        self.named, self.others = directory / "named.key", directory / "keys"
        self.others.mkdir()
        self.socket, self._log = directory / "keyd.sock", directory / "log"
        self.first = self.write(self.named)
        self.second = self.write(self.others / "second.key", rsa.generate_private_key(65537, 2048))
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(TITUS_PY.with_name("keyd"), "listen", f"--socket={self.socket}"),
                    *(f"--key={self.named}", f"--key-directory={self.others}"),
                    *("--user=nobody", f"--chroot={directory / 'empty'}"),
                ],
                stdin=subprocess.DEVNULL,
                stderr=log,
            )
        eventually(lambda: "guards against" in self.log(), "keyd serves")
        eventually(lambda: self.ask(self.first) is Status.DONE, "keyd serves")

    @staticmethod
    def write(path: Path, key: PrivateKey | None = None) -> PrivateKey:
        """Put a key there as renewal tools do, and return it."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        new = path.with_name(f".{path.name}.new")
        new.touch(0o600)
        new.write_bytes(pem)
        new.rename(path)
        return key

    def log(self) -> str:
        return self._log.read_text()

    def hang_up(self) -> None:
        """SIGHUP, and wait until the files have been read."""
        before = self.log().count("keys read again")
        self.process.send_signal(signal.SIGHUP)
        eventually(lambda: self.log().count("keys read again") > before, "keys are read again")

    def connect(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.settimeout(60)
        channel.connect(str(self.socket))
        return channel

    def ask(
        self,
        key: PrivateKey,
        scheme: SignatureScheme | None = None,
        channel: socket.socket | None = None,
    ) -> Status:
        is_rsa = isinstance(key, rsa.RSAPrivateKey)
        scheme = (
            scheme or SignatureScheme["rsa_pss_rsae_sha256" if is_rsa else "ecdsa_secp256r1_sha256"]
        )
        identity = key_id(key.public_key())
        with channel or self.connect() as asking:
            asking.send(Request(Operation.SIGN, scheme, identity, _CERTIFICATE_VERIFY).encode())
            return Reply.decode(asking.recv(MAX_REPLY_OCTETS)).status


@pytest.fixture
def files(tmp_path: Path) -> Iterator[KeyFiles]:
    files = KeyFiles(tmp_path)
    yield files
    files.process.kill()
    files.process.wait()


def test_new_keys_come_old_ones_go_and_a_bad_file_keeps_its_key(files: KeyFiles) -> None:
    channels = [files.connect() for _ in range(3)]
    new = files.write(files.named)
    third = files.write(files.others / "third.key", ec.generate_private_key(ec.SECP256R1()))
    (files.others / "second.key").write_text("-----BEGIN PRIVATE KEY-----\nno\n")
    # Not before the signal.
    assert files.ask(new) is Status.NOT_GRANTED
    files.hang_up()
    assert files.ask(new) is Status.DONE
    assert files.ask(third) is Status.DONE
    assert files.ask(files.first) is Status.NOT_GRANTED
    assert f"{files.named}: a new key" in files.log()
    assert f"{files.named}: its former key is let go of" in files.log()
    assert "second.key holds a PEM private key that is damaged: its former key stays" in files.log()
    # Channels that were open go on, with the keys that there are now.
    assert files.ask(new, channel=channels[0]) is Status.DONE
    assert files.ask(files.second, channel=channels[1]) is Status.DONE
    assert files.ask(files.first, channel=channels[2]) is Status.NOT_GRANTED
    (files.others / "second.key").unlink()
    files.named.unlink()
    files.hang_up()
    assert files.ask(files.second) is Status.NOT_GRANTED
    # Named on the command line: that may be a renewal half-way.
    assert files.ask(new) is Status.DONE
    assert files.ask(third) is Status.DONE


def test_two_files_with_one_key_let_go_of_it_together(files: KeyFiles) -> None:
    other = files.others / "copy.key"
    files.write(other, files.first)
    files.hang_up()
    new = files.write(files.named)
    files.write(other, new)
    files.hang_up()
    assert files.ask(new) is Status.DONE
    assert files.ask(files.first) is Status.NOT_GRANTED


def test_keys_of_every_kind_come(files: KeyFiles) -> None:
    """What the library loads late, it has loaded before keyd was confined."""
    made = ["openssl", "genpkey", "-algorithm", "rsa-pss", "-pkeyopt", "rsa_keygen_bits:2048"]
    bound = ["rsa_pss_keygen_md:sha384", "rsa_pss_keygen_mgf1_md:sha384"]
    made += [word for one in (*bound, "rsa_pss_keygen_saltlen:48") for word in ("-pkeyopt", one)]
    subprocess.run([*made, "-out", files.others / "pss.key"], check=True, capture_output=True)
    pss = load_private_key(str(files.others / "pss.key"), None)
    ed = files.write(files.others / "ed.key", ed25519.Ed25519PrivateKey.generate())
    others = {ed: SignatureScheme.ed25519}
    for name, scheme in (
        ("ML-DSA-44", SignatureScheme.mldsa44),
        ("ML-DSA-87", SignatureScheme.mldsa87),
    ):
        key = KEY_TYPES[name][0].generate()  # type: ignore[attr-defined]
        others[files.write(files.others / f"{name}.key", key)] = scheme
    files.hang_up()
    assert files.ask(pss, SignatureScheme.rsa_pss_pss_sha384) is Status.DONE
    assert files.ask(pss, SignatureScheme.rsa_pss_pss_sha256) is Status.NOT_TLS
    for key, scheme in others.items():
        assert files.ask(key, scheme) is Status.DONE


def test_a_key_that_was_let_go_of_is_in_no_memory(files: KeyFiles) -> None:
    """Those that keyd began with, and many after: what the library forgets to clear is often
    overwritten by chance."""
    pid = files.process.pid
    (files.others / "second.key").unlink()
    here = files.first
    for number in range(30):
        # The control: it is there as long as it is served.
        assert search(pid, needles(here)).hits
        gone, here = here, files.write(files.named)
        files.hang_up()
        assert not search(pid, needles(gone)).hits
        if number % 2:
            assert files.ask(here) is Status.DONE
    assert not search(pid, needles(files.second)).hits
    (reader,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert not search(int(reader), needles(here)).hits


def test_the_reader_ends_with_keyd(files: KeyFiles) -> None:
    pid = files.process.pid
    (reader,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    files.process.kill()
    files.process.wait()
    eventually(lambda: not Path(f"/proc/{reader}").exists(), "the reader has ended")


def test_without_a_usable_key_it_is_said_why_there_is_none(tmp_path: Path) -> None:
    """In the last line: the one that ``systemctl status`` shows."""
    key = ec.generate_private_key(ec.SECP256R1())
    encrypted = BestAvailableEncryption(b"secret")
    (tmp_path / "keys").mkdir(mode=0o700)
    (tmp_path / "keys/www.key").write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encrypted)
    )
    ended = subprocess.run(
        [
            *(TITUS_PY.with_name("keyd"), "listen", f"--socket={tmp_path}/keyd.sock"),
            *("--user=nobody", f"--key-directory={tmp_path}/keys"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"keyd: no private key in {tmp_path}/keys: {tmp_path}/keys/www.key is encrypted: "
        "set passphrase_file (--passphrase-file)"
    )
