"""The certificates of a directory in one sealed file, to be looked up by a server's name.

The supervisor writes it. The parent reads the names and the keys' ids, for keyd. The fork server
maps it, and every worker inherits the mapping: of a file, so that a fork copies nothing of it, and
of 10,000 certificates a worker touches the pages of one. Only configurations with a
``certificate_dir`` import this.

The file, in the machine's byte order, offsets from its start::

    slots(4) certificates(4)
    slots x name(4)             a hash table with open addressing: an offset, or 0
    certificates x entry(4)     an offset
    certificates x key(32)      SHA-256 of the public key
    names                       length(1) name certificate(4)
    entries                     count(4) and so many parts, each length(4) octets: the chain in
                                DER, the server's own certificate first; last the key's reference
"""

import binascii
import mmap
import os
import re
import struct
from collections.abc import Mapping, Sequence

from keyd.linux.sealed import sealed_file
from titus_py.between.plan import Certificate

__all__ = ["CertificateIndex", "names", "write"]

_HEADER = struct.Struct("=II")
_NUMBER = struct.Struct("=I")
_KEY_OCTETS = 32
_PEM = re.compile("-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)


def write(certificates: Sequence[Certificate], names: Mapping[str, int]) -> int:
    """A sealed file with these certificates; returns its descriptor.

    ``names`` are in lower case, ``*.`` in front for exactly one label, each with the number of its
    certificate. A name of more than 255 octets is left out: no client can ask for it.
    """
    slots = 1 << max(3, (2 * len(names)).bit_length())
    table, places = [0] * slots, []
    offset = _HEADER.size + _NUMBER.size * (slots + len(certificates))
    offset += _KEY_OCTETS * len(certificates)
    content = []
    for name, number in names.items():
        octets = name.encode()
        if len(octets) > 255:
            continue
        slot = _slot(octets, slots)
        while table[slot]:
            slot = (slot + 1) % slots
        table[slot] = offset
        content.append(bytes((len(octets),)) + octets + _NUMBER.pack(number))
        offset += len(content[-1])
    for one in certificates:
        parts = [binascii.a2b_base64(text) for text in _PEM.findall(one.chain)]
        parts.append(one.key_reference.encode())
        entry = b"".join(_NUMBER.pack(len(part)) + part for part in parts)
        content.append(_NUMBER.pack(len(parts)) + entry)
        places.append(offset)
        offset += len(content[-1])
    numbers = struct.pack(f"={slots + len(places)}I", *table, *places)
    keys = b"".join(bytes.fromhex(one.key) for one in certificates)
    head = _HEADER.pack(slots, len(certificates))
    return sealed_file("certificates", b"".join([head, numbers, keys, *content]))


def names(descriptor: int) -> list[tuple[str, bytes]]:
    """Every name, with the SHA-256 of its certificate's public key."""
    slots, count = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
    places = os.pread(descriptor, _NUMBER.size * slots, _HEADER.size)
    first = _HEADER.size + _NUMBER.size * (slots + count)
    keys = os.pread(descriptor, _KEY_OCTETS * count, first)
    found = []
    for (place,) in sorted(_NUMBER.iter_unpack(places)):
        if place:
            length = os.pread(descriptor, 1, place)[0]
            entry = os.pread(descriptor, length + _NUMBER.size, place + 1)
            (number,) = _NUMBER.unpack_from(entry, length)
            # A name that is not ASCII is nobody's.
            if entry[:length].isascii():
                key = keys[_KEY_OCTETS * number : _KEY_OCTETS * (number + 1)]
                found.append((entry[:length].decode(), key))
    return found


class CertificateIndex:
    """The file, mapped. It is trusted; the names that clients ask for are not."""

    def __init__(self, descriptor: int) -> None:
        """Map the file; raises OSError. The descriptor is not needed afterwards."""
        self._file = mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)
        self._slots, self.count = _HEADER.unpack_from(self._file)

    def find(self, server_name: str | None) -> int | None:
        """The number of the certificate for this name; None if there is none.

        A name that is there as it is comes before a wildcard. Case and a trailing dot do not
        matter, as in ``virtual_host.matches``.
        """
        if server_name is None or not server_name.isascii():
            return None
        name = server_name.removesuffix(".").lower().encode()
        number = self._look_up(name)
        label, dot, parent = name.partition(b".")
        if number is None and label and dot:
            number = self._look_up(b"*." + parent)
        return number

    def certificate(self, number: int) -> tuple[list[bytes], bytes]:
        """A chain, each certificate in DER, and the reference to the key, PEM."""
        (place,) = _NUMBER.unpack_from(
            self._file, _HEADER.size + _NUMBER.size * (self._slots + number)
        )
        (count,) = _NUMBER.unpack_from(self._file, place)
        parts, at = [], place + _NUMBER.size
        for _ in range(count):
            (length,) = _NUMBER.unpack_from(self._file, at)
            at += _NUMBER.size
            parts.append(self._file[at : at + length])
            at += length
        return parts[:-1], parts[-1]

    def _look_up(self, name: bytes) -> int | None:
        slot = _slot(name, self._slots)
        while True:
            (place,) = _NUMBER.unpack_from(self._file, _HEADER.size + _NUMBER.size * slot)
            if not place:
                return None
            end = place + 1 + self._file[place]
            if self._file[place + 1 : end] == name:
                number: int = _NUMBER.unpack_from(self._file, end)[0]
                return number
            slot = (slot + 1) % self._slots


def _slot(name: bytes, slots: int) -> int:
    """Where to begin to look for a name: an integer's hash is the same in every process."""
    return hash(int.from_bytes(name)) % slots
