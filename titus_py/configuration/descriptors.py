"""Whether the descriptor limit is high enough for ``worker.max`` connections."""

import resource
from collections.abc import Iterator

from titus_py.configuration.mistake import Mistake, Source
from titus_py.configuration.tables import Configuration
from titus_py.parent.descriptors import connections_within, descriptors_needed

__all__ = ["descriptor_warnings"]


def descriptor_warnings(configuration: Configuration, source: Source) -> Iterator[Mistake]:
    """Warns if the hard limit is too low. Each process raises its soft limit to that."""
    worker = configuration.worker
    needed = descriptors_needed(worker.max, worker.spare)
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if needed > limit:
        possible = connections_within(limit, worker.spare)
        yield source.mistake(
            "worker.max",
            f"{worker.max} connections may take {needed} descriptors, and here {limit} are "
            f"allowed: beyond {possible} connections, clients would wait in the listen queue. Set "
            f"LimitNOFILE={needed} in the unit, or 'ulimit -n {needed}' where it is started",
        )
