"""The private key is in keyd's memory and in no other, and the search that says so works."""

import contextlib
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from keyd.inspection import nameless_files
from keyd.inspection.key_search import (
    Needle,
    Search,
    labels,
    needles,
    predictable,
    search,
    search_all,
)
from keyd.inspection.mappings import mappings
from keyd.inspection.open_files import opened
from keyd.inspection.pages_in_use import in_use
from keyd.inspection.worth_reading import Known
from keyd.linux.mounts import mounts
from keyd.powers import PrivateKey
from titus_py.audit.instance import Role, all_processes, connections_to, instance_processes
from titus_py.audit.throwaway_authority import KEY_TYPES

from .conftest import Certificates, Serve
from .instance import Instance, eventually
from .peers import Listener, TlsClient
from .service import reload

PAGE = mmap.PAGESIZE

# --- A running instance -----------------------------------------------------------------------

#: Pages that the kernel puts into every process.
KERNEL = {"[vvar]", "[vvar_vclock]", "[vsyscall]"}


def assert_only_keyd_holds(sought: list[Needle], instance: Instance) -> dict[Role, int]:
    """Returns how many processes of each role were searched to the end."""
    processes = instance_processes(instance.pid)
    searched: dict[Role, int] = {}
    for process, found in zip(
        processes, search_all([process.pid for process in processes], sought), strict=True
    ):
        assert {part.mapping for part in found.skipped} <= KERNEL
        if process.role is Role.KEYD:
            # The control: here, the same search does find it.
            assert found.hits
        else:
            assert not found.hits, f"{process}: {[str(hit) for hit in found.hits]}"
        if not found.ended:
            assert found.octets > 5_000_000
            searched[process.role] = searched.get(process.role, 0) + 1
    return searched


def one_of_each(searched: dict[Role, int]) -> bool:
    """Of all but workers."""
    counts = [count for role, count in searched.items() if role is not Role.WORKER]
    return counts == [1] * 4


@contextlib.contextmanager
def handshakes_all_the_time(port: int) -> Iterator[Callable[[], int]]:
    """Yields how many there have been."""
    enough = threading.Event()
    count = 0

    def shake_hands() -> None:
        nonlocal count
        while not enough.is_set():
            with TlsClient(port).handshake():
                count += 1

    thread = threading.Thread(target=shake_hands)
    thread.start()
    try:
        yield lambda: count
    finally:
        enough.set()
        thread.join()


@pytest.mark.parametrize(
    ("kind", "encrypted"),
    [("RSA-2048", False), ("P-256", False), ("Ed25519", False), ("P-256", True)],
)
def test_key_is_in_keyd_and_nowhere_else(
    kind: str,
    encrypted: bool,
    serve: Serve,
    echoing: Listener,
    certificates: Certificates,
    tmp_path: Path,
) -> None:
    issued = certificates(kind)
    key = load_pem_private_key(issued.key.read_bytes(), None)
    assert isinstance(key, PrivateKey)
    vhost = {"certificate": issued.certificate, "key": issued.key}
    if encrypted:
        vhost["key"] = tmp_path / "encrypted.key"
        vhost["passphrase_file"] = tmp_path / "passphrase"
        vhost["passphrase_file"].write_text("correct horse battery staple\n")
        vhost["key"].write_bytes(
            key.private_bytes(
                Encoding.PEM,
                PrivateFormat.PKCS8,
                BestAvailableEncryption(b"correct horse battery staple"),
            )
        )
    sought = needles(key)
    instance = serve(echoing.address, vhost=[vhost])

    idle = assert_only_keyd_holds(sought, instance)
    assert one_of_each(idle)

    with contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(TlsClient(instance.port, authority=issued.authority))
            client.handshake().send(b"something")
            assert client.receive_exactly(9) == b"something"
        count = stack.enter_context(handshakes_all_the_time(instance.port))

        def meanwhile() -> dict[Role, int] | None:
            before = count()
            searched = assert_only_keyd_holds(sought, instance)
            return searched if count() > before else None

        busy = eventually(meanwhile, "a handshake during the search")
        # The three, at least: others come and go.
        assert busy[Role.WORKER] >= 3
        assert one_of_each(busy)

    # Spares alone. While others end, the next may be forked: there are more then.
    instance.settled_counts()
    after = assert_only_keyd_holds(sought, instance)
    assert after[Role.WORKER] == 4
    assert one_of_each(after)


def test_a_key_beside_its_certificate_is_in_keyd_and_nowhere_else(
    serve: Serve, echoing: Listener, certificates: Certificates, tmp_path: Path
) -> None:
    """One file for both, as other servers want it."""
    issued = certificates("RSA-2048")
    key = load_pem_private_key(issued.key.read_bytes(), None)
    assert isinstance(key, PrivateKey)
    both = tmp_path / "both.pem"
    both.touch(mode=0o600)
    # And a comment that is no UTF-8.
    comment = b"subject=/O=M\xfcller\n"
    both.write_bytes(comment + issued.certificate.read_bytes() + issued.key.read_bytes())
    instance = serve(echoing.address, vhost=[{"certificate": both, "key": both}])
    assert reload(instance)["reloaded"]
    with TlsClient(instance.port, authority=issued.authority) as client:
        client.handshake().send(b"something")
        assert client.receive_exactly(9) == b"something"
        # Its keyd, its parent, and its fork server, each in its own time.
        eventually(
            lambda: one_of_each(Counter(one.role for one in instance_processes(instance.pid))),
            "the first generation has ended",
        )
        assert one_of_each(assert_only_keyd_holds(needles(key), instance))


def test_roles_and_whose_connection(serve: Serve, echoing: Listener) -> None:
    instance = serve(echoing.address)
    with TlsClient(instance.port).handshake() as client:
        client.send(b"x")
        assert client.receive_exactly(1) == b"x"
        spawned = instance.confined_workers(4)
        processes = instance_processes(instance.pid)
        assert {found.pid: (found.ppid, found.uid, found.started) for found in processes} == {
            found.pid: (found.parent, found.uid, found.started) for found in instance.processes()
        }
        by_role: dict[Role, list[int]] = {}
        for found in processes:
            by_role.setdefault(found.role, []).append(found.pid)
        assert by_role.pop(Role.SUPERVISOR) == [instance.pid]
        assert by_role.pop(Role.PARENT) == [instance.parent().pid]
        assert by_role.pop(Role.FORK_SERVER) == [instance.fork_server().pid]
        assert by_role.pop(Role.KEYD) == [instance.keyd().pid]
        workers = by_role.pop(Role.WORKER)
        assert sorted(workers) == sorted(found.pid for found in spawned)
        assert not by_role

        [(worker, connection)] = connections_to(instance.port, processes).items()
        assert worker.pid in workers
        assert connection.remote == client.socket.getsockname()
        assert connection.local == client.socket.getpeername()
    ended = instance.wait_for_event("connection_ended")
    assert ended["uid"] == worker.uid


# --- An ordinary process, in which something has been planted -----------------------------------

#: Keeps what it is given, in hexadecimal, at an offset in memory of its own.
HOLDER = """
import ctypes, mmap, sys
offset, octets = int(sys.argv[1]), bytes.fromhex(sys.stdin.readline())
memory = mmap.mmap(-1, 64 * mmap.PAGESIZE, mmap.MAP_PRIVATE)
memory[offset:offset + len(octets)] = octets
del octets
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""

#: Makes an integer of it, and keeps that.
INTEGER_HOLDER = """
import sys
import tempfile
number = int(sys.stdin.readline(), 16)
print(id(number), flush=True)
sys.stdin.read()
"""


class Held(NamedTuple):
    pid: int
    address: int


@contextlib.contextmanager
def holder(octets: bytes, offset: int = 0, program: str = HOLDER) -> Iterator[Held]:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program, str(offset)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(octets.hex() + "\n")
        process.stdin.flush()
        yield Held(process.pid, int(process.stdout.readline()) + offset)
        process.stdin.close()


@pytest.fixture(scope="module")
def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def octets_of(number: int) -> bytes:
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


def rsa_numbers(key: rsa.RSAPrivateKey) -> dict[str, int]:
    numbers = key.private_numbers()
    return {
        "d": numbers.d,
        "p": numbers.p,
        "q": numbers.q,
        "dp": numbers.dmp1,
        "dq": numbers.dmq1,
        "qinv": numbers.iqmp,
    }


def names_at(found: Search, address: int, length: int) -> set[str]:
    return {hit.needle for hit in found.hits if address <= hit.address < address + length}


@pytest.mark.parametrize("name", ["d", "p", "q", "dp", "dq", "qinv"])
@pytest.mark.parametrize("order", ["big", "little"])
def test_finds_each_rsa_number_in_either_order(
    name: str, order: str, rsa_key: rsa.RSAPrivateKey
) -> None:
    octets = octets_of(rsa_numbers(rsa_key)[name])
    octets = octets if order == "big" else octets[::-1]
    with holder(octets, offset=12_345) as held:
        found = search(held.pid, needles(rsa_key))
        assert names_at(found, held.address, len(octets)) == {f"{name}, {order}-endian"}
        assert all(hit.pid == held.pid and hit.mapping for hit in found.hits)


@pytest.mark.parametrize("kind", ["P-256", "P-384", "P-521", "Ed25519"])
@pytest.mark.parametrize("order", ["big", "little"])
def test_finds_the_scalar_or_seed_in_either_order(kind: str, order: str) -> None:
    key = KEY_TYPES[kind]()
    if isinstance(key, ed25519.Ed25519PrivateKey):
        name, octets = "seed", key.private_bytes_raw()
    else:
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        name, octets = "scalar", octets_of(key.private_numbers().private_value)
    octets = octets if order == "big" else octets[::-1]
    with holder(octets) as held:
        found = search(held.pid, needles(key))
        assert names_at(found, held.address, len(octets)) == {f"{name}, {order}-endian"}


@pytest.mark.parametrize("before", [1, 64, 127])
def test_finds_what_lies_across_two_pieces(before: int, rsa_key: rsa.RSAPrivateKey) -> None:
    octets = octets_of(rsa_key.private_numbers().p)
    with holder(octets, offset=9 * PAGE - before) as held:
        # Wherever the first piece begins, no page lies in two of them.
        for piece in (PAGE, 3 * PAGE, 512 * 1024):
            found = search(held.pid, needles(rsa_key), piece)
            at_place = [hit for hit in found.hits if hit.address == held.address + 64]
            assert [hit.needle for hit in at_place] == ["p, big-endian"]


def test_finds_each_place_once(rsa_key: rsa.RSAPrivateKey) -> None:
    octets = octets_of(rsa_key.private_numbers().q) * 50
    with holder(octets, offset=PAGE - 60) as held:
        found = search(held.pid, needles(rsa_key), PAGE)
        places = [hit.address for hit in found.hits if 0 <= hit.address - held.address < 6400]
        assert places == [held.address + 64 + 128 * number for number in range(50)]


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (kind, form)
        for kind in ("RSA-2048", "P-256", "P-384", "P-521", "Ed25519")
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL, PrivateFormat.OpenSSH)
        # For Ed25519 keys, there is no traditional one.
        if (kind, form) != ("Ed25519", PrivateFormat.TraditionalOpenSSL)
    ],
)
@pytest.mark.parametrize("columns", [64, 76, 100_000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_finds_pem_text_however_it_is_broken_into_lines(
    kind: str, columns: int, end: bytes, form: PrivateFormat
) -> None:
    key = KEY_TYPES[kind]()
    pem = key.private_bytes(Encoding.PEM, form, NoEncryption())
    body = b"".join(pem.splitlines()[1:-1])
    lines = [body[start : start + columns] for start in range(0, len(body), columns)]
    found = {needle.name for needle in needles(key) if needle.octets in end.join(lines)}
    secret = {"RSA-2048": "d", "Ed25519": "seed"}.get(kind, "scalar")
    assert f"{secret}, in PEM" in found


def test_finds_pem_in_memory_and_by_a_fragment(rsa_key: rsa.RSAPrivateKey) -> None:
    pem = rsa_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with holder(pem) as held:
        found = search(held.pid, needles(rsa_key))
        assert names_at(found, held.address, len(pem)) == {
            f"{name}, in PEM" for name in rsa_numbers(rsa_key)
        }
    middle = pem[len(pem) // 2 - 150 : len(pem) // 2 + 150]
    with holder(middle) as held:
        assert names_at(search(held.pid, needles(rsa_key)), held.address, len(middle))


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_finds_der(form: PrivateFormat, rsa_key: rsa.RSAPrivateKey) -> None:
    der = rsa_key.private_bytes(Encoding.DER, form, NoEncryption())
    with holder(der) as held:
        names = names_at(search(held.pid, needles(rsa_key)), held.address, len(der))
        assert "DER, traditional" in names  # PKCS #8 wraps it
        assert ("DER, PKCS #8" in names) == (form is PrivateFormat.PKCS8)
        assert {f"{name}, big-endian" for name in rsa_numbers(rsa_key)} <= names


@pytest.mark.parametrize("kind", ["RSA-2048", "P-256"])
def test_finds_an_integer_of_python(kind: str) -> None:
    key = KEY_TYPES[kind]()
    if isinstance(key, rsa.RSAPrivateKey):
        name, number = "qinv", key.private_numbers().iqmp
    else:
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        name, number = "scalar", key.private_numbers().private_value
    with holder(octets_of(number), program=INTEGER_HOLDER) as held:
        size = sys.getsizeof(number)
        names = names_at(search(held.pid, needles(key)), held.address, size)
        assert names == {f"{name}, Python integer"}


@pytest.mark.parametrize("kind", ["RSA-2048", "P-256", "Ed25519"])
def test_does_not_find_what_is_public_or_another_key(kind: str) -> None:
    key, other = KEY_TYPES[kind](), KEY_TYPES[kind]()
    form = PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(Encoding.PEM, form)
    public += key.public_key().public_bytes(Encoding.DER, form)
    another = other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with holder(public + another) as held:
        assert search(held.pid, needles(key)).hits == []
        assert search(held.pid, needles(other)).hits != []


# --- What can go wrong --------------------------------------------------------------------------


def test_memory_that_many_share_is_read_once_unless_something_is_there() -> None:
    program = (
        "import mmap, os, sys; there = mmap.mmap(-1, 1 << 24); there[:] = os.urandom(1 << 24);"
        "secret = bytes.fromhex(sys.argv[1]); there[1 << 23:(1 << 23) + len(secret)] = secret;"
        "other = os.fork(); other and print(other, flush=True); sys.stdin.read()"
    )
    secret, without = os.urandom(32), os.urandom(32)
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program, secret.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pids = process.pid, int(process.stdout.readline())
        for octets, places, saved in ((secret, 1, False), (without, 0, True)):
            known: Known = {}
            both = [search(pid, [Needle("it", octets)], known=known) for pid in pids]
            for found in both:
                shared = [hit for hit in found.hits if hit.mapping == "/dev/zero (deleted)"]
                assert len(shared) == places
            assert (both[1].octets < both[0].octets - (1 << 23)) == saved
        process.communicate()


#: Holds the octets in a file in memory, of which the first page is mapped.
IN_A_FILE = """
import mmap, os, sys
octets = bytes.fromhex(sys.stdin.readline())
file = os.memfd_create("file")
os.ftruncate(file, 1 << 40)
there = mmap.mmap(file, mmap.PAGESIZE)
there[:len(octets)] = octets
os.pwrite(file, octets, 1 << 39)
del octets
print(0, flush=True)
sys.stdin.read()
"""


def test_a_file_in_memory_need_not_be_mapped(rsa_key: rsa.RSAPrivateKey) -> None:
    octets = octets_of(rsa_key.private_numbers().d)
    with holder(octets, program=IN_A_FILE) as held:
        found = search(held.pid, needles(rsa_key))
    hits = [(hit.mapping, hit.address) for hit in found.hits if "memfd:file" in hit.mapping]
    (_, mapped), (where, place) = hits
    half = (1 << 39) + (len(octets) + 1) // 2
    assert (where, place) == ("/memfd:file (deleted), open", half)
    assert mapped != place
    assert not found.unread


#: One of its threads has a file in memory open that no other has.
IN_A_THREAD = """
import ctypes, os, sys, threading
octets = bytes.fromhex(sys.stdin.readline())
def hold():
    assert ctypes.CDLL(None).unshare(0x400) == 0  # CLONE_FILES
    os.write(os.memfd_create("file"), octets)
    print(0, flush=True)
    sys.stdin.read()
for _ in range(3):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
threading.Thread(target=hold).start()
"""


@pytest.mark.parametrize("compares", [True, False])
def test_a_thread_may_have_descriptors_of_its_own(
    compares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nameless_files, "_CAN_COMPARE", compares)
    secret = os.urandom(32)
    with holder(secret, program=IN_A_THREAD) as held:
        found = search(held.pid, [Needle("secret", secret)])
        tables = {table for table, _ in nameless_files._descriptors(held.pid)}
    hits = [hit.address for hit in found.hits if hit.mapping == "/memfd:file (deleted), open"]
    assert hits == [0]
    assert not found.unread
    assert len(tables) == (2 if compares else 5)


#: Removes files that it has open, but for one; if it is told to, in memory that only it sees.
REMOVED = """
import ctypes, os, sys
octets = bytes.fromhex(sys.stdin.readline())
place, kind = b"PLACE", "KIND"
if kind == "tmpfs":
    libc = ctypes.CDLL(None)
    assert libc.unshare(0x20000) == 0  # CLONE_NEWNS
    assert libc.mount(b"it", b"/", None, 0x44000, None) == 0  # MS_PRIVATE, of all
    assert libc.mount(b"it", place, b"tmpfs", 0, None) == 0
os.chdir(place)
files = []
for name, size in ("small", 100_000), ("large", 10_000_000), ("left", 100_000):
    files.append(open(name, "wb"))
    files[-1].write(octets)
    files[-1].truncate(size)
    files[-1].flush()
    if name != "left":
        os.remove(name)
print(0, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["disk", "tmpfs"])
def test_a_file_that_was_removed_and_is_open_is_searched(kind: str) -> None:
    """Also one that is larger than a key's, if it is in memory."""
    # /tmp may be in memory.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        _a_removed_file_is_searched(kind, Path(directory))


def _a_removed_file_is_searched(kind: str, directory: Path) -> None:
    if kind == "disk":
        with open(directory / "it", "wb") as file:
            number = opened("self", file.fileno()).mount
        if not any(
            one.number == number and one.kind in ("ext4", "xfs", "btrfs") for one in mounts()
        ):
            pytest.skip("no disk here")
    secret = os.urandom(32)
    program = REMOVED.replace("PLACE", str(directory)).replace("KIND", kind)
    with holder(secret, program=program) as held:
        found = search(held.pid, [Needle("secret", secret)])
    hits = {Path(hit.mapping).name for hit in found.hits if hit.mapping.endswith(", open")}
    assert hits == {"small (deleted), open", *["large (deleted), open"] * (kind == "tmpfs")}
    assert not found.unread


#: Maps such a file privately, touches nothing of it, and does not have it open any more.
MAPPED_PRIVATELY = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
octets = bytes.fromhex(sys.stdin.readline())
file = os.memfd_create("file")
os.pwrite(file, octets, mmap.PAGESIZE)
address = libc.mmap(None, 2 * mmap.PAGESIZE, mmap.PROT_READ, mmap.MAP_PRIVATE, file, 0)
os.close(file)
del octets
print(address, flush=True)
sys.stdin.read()
"""


def test_of_what_is_mapped_privately_the_file_is_memory_too(rsa_key: rsa.RSAPrivateKey) -> None:
    """Nothing of it is among the pages that the process has in use."""
    octets = octets_of(rsa_key.private_numbers().d)
    with holder(octets, program=MAPPED_PRIVATELY) as held:
        found = search(held.pid, needles(rsa_key))
    assert "/memfd:file (deleted)" in {hit.mapping for hit in found.hits}
    assert not found.unread


#: Holds the octets three times: in a page that nothing may touch, in a shared file whose other
#: pages are beyond its end, and in one that no other process can read (memfd_secret(2)).
UNREADABLE = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
octets = bytes.fromhex(sys.stdin.readline())
closed = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE)
closed[:len(octets)] = octets
address = ctypes.addressof(ctypes.c_char.from_buffer(closed))
assert libc.mprotect(ctypes.c_void_p(address), mmap.PAGESIZE, 0) == 0
file = os.memfd_create("cut")
os.ftruncate(file, 3 * mmap.PAGESIZE)
cut = mmap.mmap(file, 3 * mmap.PAGESIZE)
os.ftruncate(file, mmap.PAGESIZE)
cut[:len(octets)] = octets
secret = libc.syscall(447, 0)
if secret >= 0:
    os.ftruncate(secret, 2 * mmap.PAGESIZE)
    hidden = mmap.mmap(secret, 2 * mmap.PAGESIZE)
    hidden[:len(octets)] = octets
del octets
print(address, flush=True)
sys.stdin.read()
"""


def test_says_what_it_could_not_read_and_goes_on(rsa_key: rsa.RSAPrivateKey) -> None:
    octets = octets_of(rsa_key.private_numbers().d)
    with holder(octets, program=UNREADABLE) as held:
        found = search(held.pid, needles(rsa_key))
        # Closed to the process itself, and not to us.
        assert names_at(found, held.address, PAGE) == {"d, big-endian"}
        # What is beyond a file's end is no memory.
        [hit] = [hit for hit in found.hits if "memfd:cut" in hit.mapping]
        assert hit.needle == "d, big-endian"
        maps = Path(f"/proc/{held.pid}/maps").read_text()
        hidden = [(part.octets, part.reason) for part in found.unread]
        assert hidden == [(2 * PAGE, "Input/output error")] * ("secretmem" in maps)
        others = {part.mapping for part in found.skipped if part not in found.unread}
        assert others <= KERNEL
        assert ("[vsyscall]" in others) == ("[vsyscall]" in maps)


def test_reads_no_page_that_the_process_has_not_touched(rsa_key: rsa.RSAPrivateKey) -> None:
    program = HOLDER.replace("64 * mmap.PAGESIZE", "1 << 34")
    octets = octets_of(rsa_key.private_numbers().d)
    with holder(octets, offset=1 << 33, program=program) as held:
        status = Path(f"/proc/{held.pid}/smaps_rollup")
        before = status.read_text()
        found = search(held.pid, needles(rsa_key))
        assert names_at(found, held.address, len(octets)) == {"d, big-endian"}
        assert found.octets < 100_000_000
        # It may have gone on for a moment itself; the search would have added gigabytes.
        assert abs(_resident_kib(status.read_text()) - _resident_kib(before)) < 1024


def _resident_kib(rollup: str) -> int:
    return int(rollup.split("Rss:", 1)[1].split()[0])


def test_a_file_that_is_mapped_may_have_any_name(
    tmp_path: Path, rsa_key: rsa.RSAPrivateKey
) -> None:
    """What str.splitlines takes for the end of a line is a part of the name."""
    name = "a\f\x1c\N{LINE SEPARATOR}\rb"
    program = (
        "import mmap, sys; file = open(sys.argv[1], 'r+b'); file.truncate(4096);"
        "there = mmap.mmap(file.fileno(), 4096); there[:] = sys.stdin.buffer.read(4096);"
        "print(flush=True); input()"
    )
    (tmp_path / name).touch()
    sought = needles(rsa_key)
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program, tmp_path / name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(sought[0].octets.ljust(4096, b"\0"))
        process.stdin.flush()
        process.stdout.readline()
        found = search(process.pid, sought[:1])
        process.communicate(b"\n")
    assert any(str(tmp_path) in hit.mapping for hit in found.hits)


#: Maps a file that has a name of more than three thousand octets, very often.
MAPS_A_LONG_NAME = """
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None)
for _ in range(13):
    os.mkdir(250 * "d")
    os.chdir(250 * "d")
file = os.open("it", os.O_RDWR | os.O_CREAT)
os.ftruncate(file, mmap.PAGESIZE)
for _ in range(5000):
    libc.mmap(None, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
print(flush=True)
sys.stdin.read()
"""


def test_long_names_of_what_is_mapped_take_no_memory(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-I", "-c", MAPS_A_LONG_NAME],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        tracemalloc.start()
        try:
            found = mappings(process.pid)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            process.communicate()
    names = [len(one.span.mapping) for one in found]
    assert len([length for length in names if length > 3000]) == 5000
    assert peak < sum(names) / 2


@pytest.mark.parametrize("name", [b"\rUid:\t7\t7\t7", b"\rUid: a b", b"\xff"], ids=ascii)
def test_a_process_may_have_any_name(name: bytes) -> None:
    """It is within what the kernel says of the process, and changes nothing else of that."""
    program = (
        "import os, sys; open('/proc/self/comm', 'wb').write(os.fsencode(sys.argv[1]));"
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", program, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            (seen,) = [one for one in all_processes() if one.pid == process.pid]
        finally:
            process.communicate(b"\n")
    assert seen.uid == os.geteuid()


def test_copes_with_a_process_that_is_gone(rsa_key: rsa.RSAPrivateKey) -> None:
    sought = needles(rsa_key)
    process = subprocess.Popen(["sleep", "60"])
    assert not search(process.pid, sought).ended
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert search(process.pid, sought) == Search(process.pid, [], [], 0, ended=True)
    process.wait()
    assert search(process.pid, sought) == Search(process.pid, [], [], 0, ended=True)


def test_another_program_that_is_executed_meanwhile_is_searched_as_well(
    rsa_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    sought = needles(rsa_key)
    octets = octets_of(rsa_key.private_numbers().d)
    words = ["sh", "-c", 'read -r _; exec "$@"', "sh", sys.executable, "-I", "-c", HOLDER, "0"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        lines = []

        def after_execution(*arguments: int) -> Iterator[tuple[int, int]]:
            assert process.stdin is not None
            assert process.stdout is not None
            if not lines:
                process.stdin.write(b"go on\n")
                process.stdin.flush()
                process.stdin.write(octets.hex().encode() + b"\n")
                process.stdin.flush()
                lines.append(process.stdout.readline())
            return in_use(*arguments)

        monkeypatch.setattr("keyd.inspection.worth_reading.in_use", after_execution)
        found = search(process.pid, sought)
        process.communicate()
    assert names_at(found, int(lines[0]), len(octets)) == {"d, big-endian"}
    assert not found.ended


#: Its first thread ends, and another one goes on with the secret.
HEADLESS = """
import ctypes, os, sys, threading
secret = bytes.fromhex(sys.stdin.readline())
threading.Thread(target=sys.stdin.read).start()
exit_this_thread = {"x86_64": 60, "aarch64": 93}[os.uname().machine]
ctypes.CDLL(None).syscall(exit_this_thread, 0)
"""


def test_a_process_whose_first_thread_has_ended_is_searched() -> None:
    secret = os.urandom(32)
    command = [sys.executable, "-I", "-c", HEADLESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(secret.hex() + "\n")
        process.stdin.flush()
        maps = Path(f"/proc/{process.pid}/maps")
        eventually(lambda: maps.read_bytes() == b"", "its first thread has ended")
        found = search(process.pid, [Needle("secret", secret)])
        process.kill()
    assert found.hits
    assert (found.pid, found.ended) == (process.pid, False)


def test_a_process_that_always_executes_another_program_has_not_ended(
    rsa_key: rsa.RSAPrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what it has had, and the search says so."""
    again = 'echo; read -r _; exec sh -c "$0" "$0"'
    with subprocess.Popen(
        ["sh", "-c", again, again], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def after_execution(*arguments: int) -> Iterator[tuple[int, int]]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(b"go on\n")
            process.stdin.flush()
            process.stdout.readline()
            return in_use(*arguments)

        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr("keyd.inspection.worth_reading.in_use", after_execution)
        found = search(process.pid, needles(rsa_key))
        process.kill()
    assert not found.ended
    assert [part.reason for part in found.unread] == ["it executed one program after the other"]


def test_copes_with_processes_that_end_meanwhile(rsa_key: rsa.RSAPrivateKey) -> None:
    sought = needles(rsa_key)
    program = "memory = bytearray(b'x') * 200_000_000; print(flush=True); input()"
    ended = 0
    for delay in (0.0, 0.01, 0.05, 0.1):
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            killer = threading.Timer(delay, process.kill)
            killer.start()
            found = search(process.pid, sought)
            killer.join()
            assert not found.hits
            ended += found.ended
    assert ended >= 3


def test_a_number_too_short_to_be_recognized_is_left_out() -> None:
    names = [needle.name for needle in needles(ec.derive_private_key(5, ec.SECP256R1()))]
    assert names == ["DER, PKCS #8", "DER, traditional"]


def test_needles_do_not_show_what_they_look_for(rsa_key: rsa.RSAPrivateKey) -> None:
    sought = needles(rsa_key)
    shown = f"{sought} {sought[0]} {search(os.getppid(), sought)}"
    assert all(repr(needle.octets)[2:-1] not in shown for needle in sought)
    with pytest.raises(ValueError, match="everywhere"):
        search(1, [Needle("nothing", b"")])


def test_a_needle_that_is_everywhere_hides_no_other(rsa_key: rsa.RSAPrivateKey) -> None:
    """Somebody may have filled memory with a key of their own."""
    numbers = rsa_key.private_numbers()
    octets = octets_of(numbers.p) * 12_000 + octets_of(numbers.q)
    program = HOLDER.replace("64 * mmap", "400 * mmap")
    with holder(octets, program=program) as held:
        found = search(held.pid, needles(rsa_key))
    places = Counter(hit.needle for hit in found.hits)
    assert places["p, big-endian"] == 100
    assert found.often == ("p, big-endian",)
    assert held.address + len(octets) - 64 in {
        hit.address for hit in found.hits if hit.needle == "q, big-endian"
    }
    assert not found.ended


def test_no_two_keys_have_one_name() -> None:
    short, one, other = "/live/site/key.pem", "/a/b/key.pem", "/c/b/key.pem"
    assert labels([short, one, other]) == {short: "site/key.pem", one: one, other: other}


def test_what_could_be_anywhere_is_not_looked_for(rsa_key: rsa.RSAPrivateKey) -> None:
    """A key that somebody has chosen, as others' memory is full of it."""
    assert not predictable(rsa_key)
    half = ec.derive_private_key(int.from_bytes(os.urandom(16)) << 128, ec.SECP256R1())
    assert predictable(half) == ["scalar, in PEM"]
    (whole,) = (one.octets for one in needles(half) if one.name == "scalar, big-endian")
    assert whole == octets_of(half.private_numbers().private_value)
    ones = ec.derive_private_key(int.from_bytes(b"\1" * 32), ec.SECP256R1())
    assert "scalar, big-endian" in predictable(ones)
    with holder(bytes(20_000)) as held:
        found = search(held.pid, [*needles(half), *needles(ones)])
    assert not found.hits


def test_is_quick(rsa_key: rsa.RSAPrivateKey) -> None:
    """60 MB of what is neither zeros nor text, in well under a second where nothing else runs."""
    program = HOLDER.replace("64 * mmap.PAGESIZE", "60_000_000").replace(
        "print(", "import os; memory[300:] = os.urandom(len(memory) - 300); print("
    )
    with holder(octets_of(rsa_key.private_numbers().d), program=program) as held:
        sought = needles(rsa_key)
        before = time.process_time()
        found = search(held.pid, sought)
        seconds = time.process_time() - before
        assert found.octets > 60_000_000
        assert names_at(found, held.address, 300)
        # Of the processor's time; twice what is expected of a slow one.
        assert seconds < 2
