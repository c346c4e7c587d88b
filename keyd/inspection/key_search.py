"""Looking for a private key in the memory of processes (/proc/PID/mem; proc(5)).

Run as root, by the audit, the demo and the tests. The searching process holds the key,
so it must not search itself. It trusts the kernel, and nothing that the searched
processes say. It only reads, and disturbs none of them.
"""

import base64
import errno
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from keyd import mldsa
from keyd.inspection.mappings import Skipped, Span, mappings, still_mapped
from keyd.inspection.nameless_files import NamelessFile, nameless_files
from keyd.inspection.occurrences import occurrences
from keyd.inspection.pages_in_use import PAGE
from keyd.inspection.shared_memory import filled
from keyd.inspection.worth_reading import Known, WorthReading
from keyd.powers import LibraryKey, PrivateKey
from keyd.pss import PSSPrivateKey

__all__ = [
    "Hit",
    "Needle",
    "Search",
    "Skipped",
    "has_memory",
    "labels",
    "needles",
    "predictable",
    "search",
    "search_all",
]

#: A shorter number would be found by chance, and is guessed more easily than stolen.
_MIN_OCTETS = 16
#: In base64 text, two windows of this length are sought per number, within this many characters.
_WINDOW, _WINDOWS_SPAN = 24, 56
#: The dimensions of its matrix, which go into what is made of the seed (FIPS 204, table 1).
_MLDSA_DIMENSIONS = {"ML-DSA-44": b"\4\4", "ML-DSA-65": b"\6\5", "ML-DSA-87": b"\x08\7"}
#: So small a piece of memory is still in the processor's cache when it is looked at.
_PIECE_OCTETS = 512 * 1024
#: A needle that was found so often in a process is not sought there any more: its key is there,
#: whatever the process has filled its memory with. All others are.
_MOST_OF_EACH = 100
#: What has no more different octets than that may be anywhere. Of a number that was drawn by lot,
#: and of its base64, not one in 10^12 has so few.
_FEW_DIFFERENT = 6

#: So many programs are searched that a process executes meanwhile (execve(2)).
_PROGRAMS = 3
#: As /proc/PID/maps names them.
_KERNELS = ("[vsyscall]", "[vvar]", "[vvar_vclock]")
_HAS_PAGEMAP = os.path.exists("/proc/self/pagemap")


class Needle(NamedTuple):
    """Octets by which a private key is recognized, and what they are, in words."""

    name: str
    octets: bytes

    def __repr__(self) -> str:
        # Secret: not for a traceback, a log or a failed assertion.
        return f"<Needle {self.name}, {len(self.octets)} octets>"


class Hit(NamedTuple):
    """A needle, and where it was found. ``mapping`` is as in /proc/PID/maps."""

    pid: int
    mapping: str
    address: int
    needle: str

    def __str__(self) -> str:
        return f"{self.needle} in {self.mapping} at {self.address:#x} of process {self.pid}"


class Search(NamedTuple):
    """What was found in one process.

    ``octets`` is how much was read. ``ended`` is True if the process ended during the
    search: then the rest of its memory was not searched. ``often`` names needles that are in more
    places than ``hits`` has of them.
    """

    pid: int
    hits: list[Hit]
    skipped: list[Skipped]
    octets: int
    ended: bool
    often: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: list[Any]) -> "Search":
        """From what JSON makes of one."""
        pid, hits, skipped, octets, ended, often = fields
        parts = [Skipped(*one) for one in skipped]
        return cls(pid, [Hit(*hit) for hit in hits], parts, octets, ended, tuple(often))

    @property
    def unread(self) -> list[Skipped]:
        """What was skipped, but for the kernel's own pages: no process can write those."""
        return [part for part in self.skipped if part.mapping not in _KERNELS]

    @property
    def why_unread(self) -> str:
        return ", ".join(f"{part.mapping} ({part.reason})" for part in self.unread[:3])


# --- What to look for -----------------------------------------------------------------------


def needles(key: PrivateKey) -> list[Needle]:
    """What gives a private key away, wherever in memory it is, but for what is ``predictable``.

    First, its secret numbers in either byte order and as Python's own integers. Of each, the
    half that is later in memory is sought: an allocator writes into the beginning of what was
    freed. Second, the same numbers in base64, at each of the three alignments that they may
    have in a text. So a part of a PEM of any format is found, with line breaks and without.
    Third, the whole DER.
    """
    return [needle for needle in _needles(key) if not _may_be_anywhere(needle.octets)]


def predictable(key: PrivateKey) -> list[str]:
    """The names of needles that are not looked for: somebody has chosen numbers such as zeros."""
    return sorted({needle.name for needle in _needles(key) if _may_be_anywhere(needle.octets)})


def _may_be_anywhere(octets: bytes) -> bool:
    return len(set(octets)) <= _FEW_DIFFERENT


def _needles(key: PrivateKey) -> list[Needle]:
    if isinstance(key, PSSPrivateKey):
        # Its numbers are a plain RSA key's.
        key = key.key
    if parameter_set := mldsa.parameter_set(key):
        return list(_of_mldsa(key.private_bytes_raw(), parameter_set))  # type: ignore[union-attr]
    found = []
    for name, number in _secret_numbers(key).items():
        length = (number.bit_length() + 7) // 8
        if length < _MIN_OCTETS:
            continue
        big, little = number.to_bytes(length, "big"), number.to_bytes(length, "little")
        found += [
            Needle(f"{name}, big-endian", _later_half(big)),
            Needle(f"{name}, little-endian", _later_half(little)),
            Needle(f"{name}, Python integer", _later_half(_python_digits(number))),
        ]
        found += [Needle(f"{name}, in PEM", window) for window in _base64_windows(big)]
    return found + _whole_encodings(key)


def labels(paths: Iterable[str]) -> dict[str, str]:
    """The keys' names: in certbot's layout, only the directories' names differ.

    No two are the same: of a key that is found, another must not seem to be found as well.
    """
    short = {path: "/".join(Path(path).parts[-2:]) for path in paths}
    counts = Counter(short.values())
    return {path: name if counts[name] == 1 else path for path, name in short.items()}


def _secret_numbers(key: LibraryKey) -> dict[str, int]:
    match key:
        case rsa.RSAPrivateKey():
            numbers = key.private_numbers()
            return {
                "d": numbers.d,
                "p": numbers.p,
                "q": numbers.q,
                "dp": numbers.dmp1,
                "dq": numbers.dmq1,
                "qinv": numbers.iqmp,
            }
        case ec.EllipticCurvePrivateKey():
            return {"scalar": key.private_numbers().private_value}
        case ed25519.Ed25519PrivateKey():
            seed = key.private_bytes_raw()
            # What is derived from the seed (RFC 8032 §5.1.5) is enough to sign with.
            digest = hashlib.sha512(seed).digest()
            scalar = int.from_bytes(digest[:32], "little")
            scalar = scalar & ((1 << 254) - 8) | 1 << 254
            return {
                "seed": int.from_bytes(seed, "big"),
                "scalar": scalar,
                "prefix": int.from_bytes(digest[32:], "big"),
            }


def _of_mldsa(seed: bytes, parameter_set: str) -> Iterator[Needle]:
    """The seed, and K, which is made of it: an expanded key may have K alone.

    FIPS 204, algorithm 6.
    """
    k = hashlib.shake_256(seed + _MLDSA_DIMENSIONS[parameter_set]).digest(128)[96:]
    for name, octets in (("seed", seed), ("K", k)):
        yield Needle(name, octets)
        for window in _base64_windows(octets):
            yield Needle(f"{name}, in PEM", window)


def _later_half(octets: bytes) -> bytes:
    """All of it, if that half may be anywhere."""
    half = octets[-max(_MIN_OCTETS, len(octets) // 2) :]
    return octets if _may_be_anywhere(half) else half


def _python_digits(number: int) -> bytes:
    """An integer's digits as CPython keeps them (Include/cpython/longintrepr.h)."""
    bits, size = sys.int_info.bits_per_digit, sys.int_info.sizeof_digit
    digits = []
    while number:
        digits.append((number & ((1 << bits) - 1)).to_bytes(size, sys.byteorder))
        number >>= bits
    return b"".join(digits)


def _base64_windows(octets: bytes) -> Iterator[bytes]:
    """Parts of what these octets look like within a base64 text.

    Lines are 64 characters or longer, so that a line break spoils one of two windows at most.
    """
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + octets)
        # The characters at both ends may contain bits of the neighbouring octets.
        inner = encoded[-(-before * 8 // 6) : (before + len(octets)) * 8 // 6]
        start = max(0, (len(inner) - _WINDOWS_SPAN) // 2)
        inner = inner[start : start + _WINDOWS_SPAN]
        window = min(_WINDOW, len(inner) // 2)
        yield inner[:window]
        yield inner[-window:]


def _whole_encodings(key: PrivateKey) -> list[Needle]:
    formats = {"PKCS #8": PrivateFormat.PKCS8}
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        formats["traditional"] = PrivateFormat.TraditionalOpenSSL
    return [
        Needle(f"DER, {name}", key.private_bytes(Encoding.DER, form, NoEncryption()))
        for name, form in formats.items()
    ]


# --- Where to look --------------------------------------------------------------------------


def search_all(pids: Iterable[int], sought: Sequence[Needle]) -> list[Search]:
    """``search`` each of these processes, as many at once as there are processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pid: search(pid, sought), pids))


def search(
    pid: int,
    sought: Sequence[Needle],
    piece: int = _PIECE_OCTETS,
    at: Callable[[str, str], None] = lambda *_: None,
    avoid: Container[str] = (),
    known: Known | None = None,
) -> Search:
    """Look for needles in all memory of a process, ``piece`` octets at a time.

    The search reads the pages that the process has in use (present or swapped, whatever
    their protection), of shared mappings and of files in memory all that the files have as well,
    and files that the process has open and that are in no directory. It skips pages that nobody
    ever touched: they hold zeros or their file's content, and reading would bring them in.
    ``at`` is told before a mapping is looked at, as of a file that may hang, and its device; files
    on those to ``avoid`` are skipped. What earlier searches with the same ``known``, for the same
    needles, have read of files that several processes map is not read again.
    Raises PermissionError without CAP_SYS_PTRACE, ValueError for a needle without octets.
    """
    if not all(needle.octets for needle in sought):
        raise ValueError("an empty needle is everywhere")
    hits: list[Hit] = []
    often: tuple[str, ...] = ()
    known = {} if known is None else known
    for _ in range(_PROGRAMS):
        found = _search_program(_with_memory(pid), sought, piece, at, avoid, known)
        hits += found.hits
        often += found.often
        found = found._replace(pid=pid, hits=hits, often=often)
        if not (found.ended and has_memory(pid)):
            return found
    another = Skipped("[all]", 0, 0, "it executed one program after the other")
    return found._replace(skipped=[*found.skipped, another], ended=False)


def _search_program(
    pid: int,
    sought: Sequence[Needle],
    piece: int,
    at: Callable[[str, str], None],
    avoid: Container[str],
    known: Known,
) -> Search:
    """``ended`` is True, too, where the process executes another program: that has other memory."""
    with ExitStack() as stack:
        try:
            memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, memory)
            pagemap = None
            if _HAS_PAGEMAP:
                pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, pagemap)
            mapped = mappings(pid)
        except (FileNotFoundError, ProcessLookupError):
            return Search(pid, [], [], 0, ended=True)
        reader = _Reader(pid, memory, sought, piece)
        worth_reading = WorthReading(pid, pagemap, reader.skipped, known)
        # A process without mappings is a zombie.
        ended = not mapped
        skipped = []
        try:
            for mapping in mapped:
                at(mapping.span.mapping, mapping.device)
                if mapping.device in avoid:
                    reader.skipped.append(mapping.skipped("its file system does not answer"))
                    continue
                for part in worth_reading.of(mapping):
                    reader.read(part)
            if not reader.hits and all(part.mapping in _KERNELS for part in reader.skipped):
                worth_reading.had_nothing()
            if reader.skipped:
                # What the process has unmapped since is not its memory any more.
                left = [mapping.span for mapping in mappings(pid)]
                skipped = still_mapped(reader.skipped, left)
                reader.skipped.clear()
            for file in nameless_files(pid, mapped):
                at(file.name, "")
                reader.read_file(file)
            skipped += reader.skipped
        except (FileNotFoundError, ProcessLookupError):
            ended = True
        return Search(pid, reader.hits, skipped, reader.octets, ended, reader.often)


def has_memory(pid: int) -> bool:
    """Whether there is any that could be searched. Raises PermissionError."""
    return _runs(_with_memory(pid))


def _with_memory(pid: int) -> int:
    """A thread that still has the process's memory; its first one may have ended (pthread_exit(3)).

    Without any, the process itself.
    """
    if not _runs(pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            for thread in map(int, os.listdir(f"/proc/{pid}/task")):
                if _runs(thread):
                    return thread
    return pid


def _runs(pid: int) -> bool:
    try:
        return bool(mappings(pid))
    except (FileNotFoundError, ProcessLookupError):
        return False


class _Reader:
    """Reads spans in ascending order, and looks for all needles at once.

    It keeps the end of what it has read in front of what comes next. So it finds a needle
    that lies across two pieces, or two mappings.
    """

    def __init__(self, pid: int, memory: int, sought: Sequence[Needle], piece: int) -> None:
        self.hits: list[Hit] = []
        self.skipped: list[Skipped] = []
        self.octets = 0
        self.often: tuple[str, ...] = ()
        self._pid = pid
        self._memory = memory
        self._names = [needle.name for needle in sought]
        self._sought = tuple(needle.octets for needle in sought)
        #: How often each was found.
        self._counts = [0] * len(sought)
        self._piece = piece
        self._overlap = max(map(len, self._sought), default=1) - 1
        self._view = memoryview(bytearray(self._overlap + piece))
        #: How many octets from before ``_next`` are at the buffer's beginning.
        self._kept = 0
        self._next = 0

    def read_file(self, file: NamelessFile) -> None:
        """What of it is not mapped: as if it were mapped from address 0 on."""
        self._kept = 0
        try:
            with open(f"/proc/self/fd/{file.named}", "rb", buffering=0) as opened:
                for first, after in filled(file.named, file.parts):
                    # It may be cut shorter meanwhile.
                    with suppress(ProcessLookupError):
                        self.read(Span(first, after, f"{file.name}, open"), opened.fileno())
        except OSError as error:
            self.skipped.append(Skipped(file.name, 0, 0, os.strerror(error.errno or errno.EIO)))
        self._kept = 0

    def read(self, span: Span, source: int | None = None) -> None:
        """By default from memory. Raises ProcessLookupError if the process is gone."""
        source = self._memory if source is None else source
        address = span.start
        while address < span.end:
            if address != self._next:
                self._kept = 0
            wanted = min(self._piece, span.end - address)
            try:
                count = os.preadv(source, [self._view[self._kept : self._kept + wanted]], address)
            except (OSError, OverflowError) as error:
                if isinstance(error, ProcessLookupError):
                    raise
                address = self._skip(span, address, error)
                continue
            if not count:
                raise ProcessLookupError(errno.ESRCH, "ended")
            self._look(span, address, count)
            self.octets += count
            address += count
            self._keep(address, self._kept + count)

    def _look(self, span: Span, address: int, count: int) -> None:
        filled = self._view[: self._kept + count]
        for place, number in occurrences(filled, self._sought, _MOST_OF_EACH):
            # The kept octets were searched before: only a needle that ends beyond them is new.
            if place + len(self._sought[number]) <= self._kept:
                continue
            where = address - self._kept + place
            self._counts[number] += 1
            if self._counts[number] <= _MOST_OF_EACH:
                self.hits.append(Hit(self._pid, span.mapping, where, self._names[number]))
        if max(self._counts, default=0) >= _MOST_OF_EACH:
            self._leave_out_what_is_everywhere()

    def _leave_out_what_is_everywhere(self) -> None:
        left = [number for number, count in enumerate(self._counts) if count < _MOST_OF_EACH]
        self.often += tuple(
            name
            for name, count in zip(self._names, self._counts, strict=True)
            if count >= _MOST_OF_EACH
        )
        self._names = [self._names[number] for number in left]
        self._sought = tuple(self._sought[number] for number in left)
        self._counts = [self._counts[number] for number in left]

    def _keep(self, address: int, filled: int) -> None:
        self._next = address
        self._kept = min(self._overlap, filled)
        self._view[: self._kept] = bytes(self._view[filled - self._kept : filled])

    def _skip(self, span: Span, address: int, error: OSError | OverflowError) -> int:
        """Note that this memory cannot be read; returns the address to go on from."""
        if isinstance(error, OverflowError):
            # pread(2) has no offset for it: [vsyscall], the kernel's own page.
            self.skipped.append(Skipped(span.mapping, address, span.end - address, "no offset"))
            return span.end
        reason = os.strerror(error.errno or errno.EIO)
        if self.skipped:
            last = self.skipped[-1]
            if (last.mapping, last.address + last.octets, last.reason) == (
                span.mapping,
                address,
                reason,
            ):
                self.skipped[-1] = last._replace(octets=last.octets + PAGE)
                return address + PAGE
        self.skipped.append(Skipped(span.mapping, address, PAGE, reason))
        return address + PAGE
