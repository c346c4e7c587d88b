"""The machine and the versions: what figures mean nothing without."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from OpenSSL import SSL

from bench.peers import Peer, version_of_package

__all__ = ["describe_machine", "describe_versions", "watch_others"]


def describe_machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    memory = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": fields.get("model name", platform.machine()),
        "processors": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / (1 << 20):.0f} GiB",
        "kernel": f"Linux {platform.release().partition('-')[0]}",
        "system": platform.freedesktop_os_release()["PRETTY_NAME"],
    }


def describe_versions(peers: Sequence[Peer]) -> dict[str, str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    library = SSL.SSLeay_version(SSL.SSLEAY_VERSION).decode()
    versions = {"titus-py": f"{commit}, Python {sys.version.split()[0]}, {library}"}
    for peer in peers:
        if peer.packages:
            versions[peer.name] = version_of_package(peer.packages[0])
    # Debian 13 has renamed it.
    debians = version_of_package("libssl3t64") or version_of_package("libssl3")
    versions["libssl3 (the others, and the load)"] = debians
    if erlang := version_of_package("erlang-base"):
        versions["Erlang"] = erlang
    versions["backend"] = f"nginx {version_of_package('nginx-light')}"
    return versions


def watch_others() -> Callable[[], str]:
    """What to call at the end, to learn how much of the processors others had in between.

    Figures of a machine that was busy otherwise are worth less, and have to say so.
    """
    begun, busy, own = time.monotonic(), _busy_seconds(), _own_seconds()

    def others() -> str:
        seconds = len(os.sched_getaffinity(0)) * (time.monotonic() - begun)
        share = (_busy_seconds() - busy - (_own_seconds() - own)) / seconds
        return f"{100 * max(0, share):.0f} %"

    return others


def _busy_seconds() -> float:
    """Of all processors since boot: everything but idle and waiting for disks."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """Of this process and of all that it has started and that has ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
