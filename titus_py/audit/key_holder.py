"""The audit's search for private keys: a process of its own, which has them and no network.

Started as root by ``titus-py audit``, and by the pytest plugin, for one search. It reads the keys,
to know what to look for, and the memory of the processes that it is told. It parses nothing
that these say. No other process of the audit ever has a key.
"""

import json
import sys
from contextlib import suppress
from typing import Any

import prctl

from keyd.inspection import auditors
from keyd.inspection.key_search import Needle, labels, needles, predictable, search_all
from keyd.keys import UnusableKey, load_private_key
from keyd.linux.credentials import (
    forbid_core_dumps,
    hide_memory,
    keep_capabilities,
    lock_memory_meanwhile,
)
from keyd.linux.namespaces import leave_namespaces
from keyd.linux.process import CLONE_NEWIPC, CLONE_NEWNET

__all__ = ["main"]

_CAPABILITIES = {
    prctl.CAP_SYS_PTRACE: "memory of processes that are not dumpable",
    prctl.CAP_DAC_OVERRIDE: "key files of any owner",
    prctl.CAP_IPC_LOCK: "more locked memory, as it is needed",
}


def main() -> int:
    """Answer one question on standard input; both are JSON (``memory.look_for_keys``)."""
    forbid_core_dumps()
    hide_memory()
    with suppress(OSError):
        lock_memory_meanwhile()
    auditors.join()
    leave_namespaces(CLONE_NEWNET | CLONE_NEWIPC)
    keep_capabilities(_CAPABILITIES)
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
    return 0


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Search ``pids`` for the keys of ``files``: each a key, and its passphrase file or None."""
    sought = []
    names = labels(path for path, _ in question["files"])
    for path, passphrase_file in question["files"]:
        try:
            key = load_private_key(path, passphrase_file)
        except UnusableKey as error:
            return {"problem": error.reason}
        name = names[path]
        if left_out := predictable(key):
            return {"problem": f"{name}: what could be anywhere is no secret: {left_out[0]}"}
        sought += [Needle(f"{name}: {needle.name}", needle.octets) for needle in needles(key)]
    return {"forms": len(sought), "found": search_all(question["pids"], sought)}


if __name__ == "__main__":
    sys.exit(main())
