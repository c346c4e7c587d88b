"""Which generation has which uids for its workers, and when they are free again.

Run by the supervisor. Two generations never share a uid: a block is given back only once no
process has any of its uids.
"""

import errno
from collections.abc import Iterable

from titus_py.between.event_loop import EventLoop
from titus_py.configuration import Configuration
from titus_py.configuration.held_uids import Held, HeldUids, any_process_has, process_with
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.reaping import reap_orphans
from titus_py.supervisor.record import Event

__all__ = ["NoUids", "UidBlocks", "free_block"]

#: How soon to look whether uids are free, and the longest pause between two looks.
_PAUSE_SECONDS = 0.05
_LONGEST_PAUSE_SECONDS = 1.0


class NoUids(Exception):
    """There are no uids for another generation's workers; the text says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"worker.uids: {reason}")


class UidBlocks:
    """``held`` are the uids that other instances are kept from."""

    def __init__(self, loop: EventLoop, event: Event, held: HeldUids) -> None:
        self._loop = loop
        self._event = event
        self.held = held
        #: The blocks that earlier parents' workers may still have.
        self.used: list[range] = []
        #: The uids of the resolver and of the metrics server, by name: each a block of one.
        self.singles: dict[str, range] = {}

    def hold(self, configuration: Configuration, path: str) -> None:
        """Keep other instances from these uids until we end. Raises Held."""
        keyd = configuration.keyd
        try:
            self.held.hold(configuration.worker.uids, None if keyd.socket else keyd.user.uid, path)
        except OSError as error:
            self._event("uids_not_held", level="warning", reason=error.strerror)

    def hold_again(self, generations: Iterable[Generation]) -> None:
        """Keep other instances from the uids of these, where the file may have been removed."""
        for generation in generations:
            try:
                self.hold(generation.configuration, generation.checked.path)
            except Held as error:
                self._event("uids_not_held", level="warning", reason=str(error))

    def free(self, generation: Generation, others: Iterable[Generation]) -> range | None:
        """A free block for this generation's workers; None if there is none now."""
        return self._free(generation, others, self.used)

    def free_later(self, generation: Generation, others: Iterable[Generation]) -> range | None:
        """As ``free``, once no process has the uids of parents that have ended any more."""
        return self._free(generation, others, ())

    def _free(
        self, generation: Generation, others: Iterable[Generation], used: Iterable[range]
    ) -> range | None:
        taken = [*used, *self.singles.values(), *(other.uids for other in others if other.uids)]
        return free_block(generation.configuration.worker.uids, generation.uids_needed, taken)

    def single(self, name: str, generations: Generations) -> int:
        """The last free uid of the range, for the only process of this name.

        Raises OSError if there is none.
        """
        uids = generations.serving.configuration.worker.uids
        singles = [uids for other, uids in self.singles.items() if other != name]
        taken = [*self.used, *singles, *(generation.uids for generation in generations)]
        for uid in reversed(uids):
            if not any(uid in block for block in taken) and not any_process_has(
                range(uid, uid + 1)
            ):
                self.singles[name] = range(uid, uid + 1)
                return uid
        raise OSError(errno.EAGAIN, "worker.uids has no free uid for it")

    def demand(self, generation: Generation, others: Generations) -> None:
        """Raises NoUids if there is no block for a generation beside the existing ones."""
        range_of_all, needed = generation.configuration.worker.uids, generation.uids_needed
        uids = self.free(generation, others)
        lasting = [others.serving.uids, *self.singles.values()]
        if uids is None and free_block(range_of_all, needed, lasting):
            raise NoUids(
                "connections of earlier generations still have too many of them: "
                "widen the range, or wait for those connections to end"
            )
        if uids is None:
            raise NoUids(
                f"max + spare = {needed - 1} workers and their parent find no room in the range "
                "beside those that serve: widen it, or set one apart from the former"
            )
        # No process of ours has one of these uids: a block is free only when none has.
        if (uid := process_with(uids)) is not None:
            raise NoUids(f"{uid} is the uid of a process that is not of this instance")

    def give_back(self, generation: Generation) -> None:
        """Free the uids of a generation whose parent has ended, once no process has them."""
        uids, generation.uids = generation.uids, range(0)
        self.used.append(uids)
        self._loop.after(0, lambda: self.release(uids))

    def release(self, uids: range, pause: float = _PAUSE_SECONDS) -> None:
        """Free used uids, once no process has them any more.

        The first looks come soon, since a new parent may wait. Then they get rarer, since each
        goes through all processes.
        """
        reap_orphans()
        if any_process_has(uids):
            longer = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            self._loop.after(pause, lambda: self.release(uids, longer))
        else:
            self.used.remove(uids)


def free_block(uids: range, count: int, taken: Iterable[range]) -> range | None:
    """The first ``count`` uids in a row that none of ``taken`` overlaps; None if there are none."""
    start = uids.start
    for block in sorted(taken, key=lambda block: block.start):
        if start + count <= block.start:
            break
        start = max(start, block.stop)
    return range(start, start + count) if start + count <= uids.stop else None
