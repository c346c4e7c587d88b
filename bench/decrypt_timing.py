"""Whether keyd's decryption tells good padding from bad by the time that it takes.

Ciphertexts of several classes, of each many different ones, are decrypted in random order:
by ``keyd.powers.perform`` within this process, and by a keyd of its own over a channel, as a
worker has it. For each class, its times are held against those of good ones by three tests:
Welch's t (means), Mann-Whitney's U (ranks) and Kolmogorov-Smirnov's D (whole distributions);
and what difference would have been found is computed from the noise that there was. The same
is done with a decryption that leaks on purpose, which must be found.

    python bench/decrypt_timing.py [--samples 20000] [--bits 2048]

Exit code 0: no difference was found, and the leak was. Run it on a quiet machine.
"""

import argparse
import gc
import math
import random
import socket
import statistics
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import padding, rsa

from keyd.daemon import Keyd
from keyd.powers import ALL_POWERS, perform
from keyd.protocol import Done, Open, Operation, Refusal, Reply, Request
from keyd.reference import key_id

_VERSION = 0x0303
#: Different ciphertexts of each class: one alone would show what is its own, and no more.
_CIPHERTEXTS = 64
#: Times above this quantile of all are the machine's, not the code's.
_KEPT = 0.7
#: Two-sided, over all comparisons of a run (Bonferroni).
_SIGNIFICANCE = 0.01
_POWER_QUANTILE = 0.8416  # a power of 80 %

#: From the kernel: also for what is not secret, so that nobody has to ask.
_random = random.SystemRandom()

Measure = Callable[[bytes], object]
Clock = Callable[[], int]


class Difference(NamedTuple):
    """One class of ciphertexts against the good ones; times in nanoseconds."""

    name: str
    mean: float
    median: float
    welch: float
    mann_whitney: float
    kolmogorov_smirnov: float
    detectable: float


# --- ciphertexts ----------------------------------------------------------------------------


def ciphertexts(key: rsa.RSAPrivateKey) -> dict[str, list[bytes]]:
    """Of each class, several; "good" is what the others are held against."""
    numbers = key.public_key().public_numbers()
    size = (key.key_size + 7) // 8

    def encrypt(encoded: bytes) -> bytes:
        return pow(int.from_bytes(encoded, "big"), numbers.e, numbers.n).to_bytes(size, "big")

    def padded(content: bytes, start: bytes = b"\0\2") -> bytes:
        filling = bytes(_random.choices(range(1, 256), k=size - 3 - len(content)))
        return start + filling + b"\0" + content

    def secret(version: int = _VERSION, length: int = 48) -> bytes:
        return version.to_bytes(2, "big") + _random.randbytes(length - 2)

    def without_end() -> bytes:
        return b"\0\2" + bytes(_random.choices(range(1, 256), k=size - 2))

    def short_filling() -> bytes:
        return b"\0\2" + b"\1\1\1\0" + _random.randbytes(size - 6)

    makers: dict[str, Callable[[], bytes]] = {
        "good": lambda: padded(secret()),
        # Held against itself: what the method finds where there is nothing to be found.
        "good, again": lambda: padded(secret()),
        "wrong version": lambda: padded(secret(0x0301)),
        "wrong type": lambda: padded(secret(), b"\0\1"),
        "no leading zero": lambda: padded(secret(), b"\1\2"),
        "no end of the padding": without_end,
        "padding too short": short_filling,
        "47 octets": lambda: padded(secret(length=47)),
        "49 octets": lambda: padded(secret(length=49)),
        "nothing": lambda: padded(b""),
        "random": lambda: b"\0" + _random.randbytes(size - 1),
    }
    return {name: [encrypt(make()) for _ in range(_CIPHERTEXTS)] for name, make in makers.items()}


# --- measuring ------------------------------------------------------------------------------


def measure(
    classes: dict[str, list[bytes]], samples: int, do: Measure, clock: Clock
) -> dict[str, list[int]]:
    """So many times for each class, in random order, in nanoseconds."""
    order = [name for name in classes for _ in range(samples)]
    random.shuffle(order)
    times: dict[str, list[int]] = {name: [] for name in classes}
    choose = random.choice
    gc.collect()
    gc.disable()
    try:
        for name in order:
            ciphertext = choose(classes[name])
            begun = clock()
            do(ciphertext)
            times[name].append(clock() - begun)
    finally:
        gc.enable()
    return times


def compare(times: dict[str, list[int]]) -> list[Difference]:
    everything = sorted(one for taken in times.values() for one in taken)
    longest = everything[int(_KEPT * len(everything)) - 1]
    kept = {name: sorted(t for t in taken if t <= longest) for name, taken in times.items()}
    good = kept.pop("good")
    # Quantile of the normal distribution, two-sided, shared by all comparisons.
    critical = statistics.NormalDist().inv_cdf(1 - _SIGNIFICANCE / 3 / len(kept) / 2)
    return [
        Difference(
            name,
            statistics.fmean(taken) - statistics.fmean(good),
            statistics.median(taken) - statistics.median(good),
            _welch(taken, good),
            _mann_whitney(taken, good),
            _kolmogorov_smirnov(taken, good),
            (critical + _POWER_QUANTILE) * _standard_error(taken, good),
        )
        for name, taken in kept.items()
    ]


def significant(differences: Sequence[Difference]) -> list[Difference]:
    """Those that chance alone hardly explains."""
    level = _SIGNIFICANCE / 3 / len(differences)
    return [
        one
        for one in differences
        if min(one.welch, one.mann_whitney, one.kolmogorov_smirnov) < level
    ]


def _two_sided(z: float) -> float:
    return math.erfc(abs(z) / math.sqrt(2))


def _standard_error(a: Sequence[int], b: Sequence[int]) -> float:
    return math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))


def _welch(a: Sequence[int], b: Sequence[int]) -> float:
    """The p-value; with thousands of samples, Student's distribution is the normal one."""
    return _two_sided((statistics.fmean(a) - statistics.fmean(b)) / _standard_error(a, b))


def _mann_whitney(a: Sequence[int], b: Sequence[int]) -> float:
    """The p-value, by the normal approximation; both sorted."""
    ranks = 0.0
    below = 0
    for value in a:
        while below < len(b) and b[below] < value:
            below += 1
        ranks += below + (bisect_right(b, value, below) - below) / 2
    mean = len(a) * len(b) / 2
    deviation = math.sqrt(len(a) * len(b) * (len(a) + len(b) + 1) / 12)
    return _two_sided((ranks - mean) / deviation)


def _kolmogorov_smirnov(a: Sequence[int], b: Sequence[int]) -> float:
    """The p-value, asymptotically; both sorted."""
    distance = max(
        abs(bisect_right(a, value) / len(a) - bisect_right(b, value) / len(b))
        for value in {*a[:: max(1, len(a) // 2000)], *b[:: max(1, len(b) // 2000)]}
    )
    scaled = distance * math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    terms = ((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
    return min(1.0, max(0.0, 2 * sum(terms))) if scaled > 0.2 else 1.0


# --- what is measured -----------------------------------------------------------------------


def in_this_process(key: rsa.RSAPrivateKey) -> Measure:
    return lambda ciphertext: perform(
        Operation.DECRYPT, key, _VERSION, ciphertext, ALL_POWERS, None
    )


def leaking(key: rsa.RSAPrivateKey) -> Measure:
    """Says no a microsecond later: the control, which must be found."""

    def decrypt(ciphertext: bytes) -> bytes:
        secret = key.decrypt(ciphertext, padding.PKCS1v15())
        if len(secret) == 48 and secret[:2] == _VERSION.to_bytes(2, "big"):
            return secret
        until = time.perf_counter_ns() + 1000
        while time.perf_counter_ns() < until:
            pass
        return _random.randbytes(48)

    return decrypt


def over_a_channel(key: rsa.RSAPrivateKey) -> tuple[Measure, Callable[[], None]]:
    """As a worker has it: keyd's own code, threads and epoll, in this process unconfined.

    A channel is opened once, for as many operations as are asked for.
    """
    name = key_id(key.public_key())
    keyd = Keyd({name: key})
    ours, keyds = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    grants = {name: ALL_POWERS}
    terms = Open(1, 0xFFFF_FFFF, 0xFFFF, 0)
    keyd.open(terms, grants, keyds, _print_refusal)
    server = threading.Thread(target=keyd._work, daemon=True)
    server.start()

    def ask(ciphertext: bytes) -> bytes:
        ours.send(Request(Operation.DECRYPT, _VERSION, name, ciphertext).encode())
        return Reply.decode(ours.recv(2048)).payload

    return ask, keyd.stop


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=5000, help="for each class")
    parser.add_argument("--bits", type=int, default=2048)
    arguments = parser.parse_args()
    key = rsa.generate_private_key(65537, arguments.bits)
    classes = ciphertexts(key)
    print(f"RSA-{arguments.bits}, {arguments.samples} samples of each class")
    # The processor's time, which no other process disturbs.
    taken = measure(classes, arguments.samples, in_this_process(key), time.thread_time_ns)
    found = _report("perform", taken)
    # The time that a worker would see.
    ask, stop = over_a_channel(key)
    most = min(arguments.samples, 0xFFFF // len(classes))
    found += _report("over a channel", measure(classes, most, ask, time.perf_counter_ns))
    stop()
    taken = measure(classes, most, leaking(key), time.thread_time_ns)
    leak = _report("a decryption that leaks a microsecond", taken)
    expected = len(classes) - 3  # all but the good ones; "random" may be good, by chance
    print(f"\nfound: {len(found)}; of the leak: {len(leak)}, at least {expected} expected")
    return int(bool(found) or len(leak) < expected)


def _report(what: str, times: dict[str, list[int]]) -> list[Difference]:
    differences = compare(times)
    found = significant(differences)
    print(f"\n{what}: good ones take {statistics.median(times['good']) / 1000:.1f} µs\n")
    print("| against good | mean, ns | median, ns | Welch p | Mann-Whitney p | KS p | seen from |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for one in differences:
        mark = " **!**" if one in found else ""
        print(
            f"| {one.name}{mark} | {one.mean:+.0f} | {one.median:+.0f} | {one.welch:.3g} "
            f"| {one.mann_whitney:.3g} | {one.kolmogorov_smirnov:.3g} | {one.detectable:.0f} ns |"
        )
    return found


def _print_refusal(report: Refusal | Done) -> None:
    if isinstance(report, Refusal):
        print(report, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
