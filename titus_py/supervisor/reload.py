"""A reload: asked for, read, taken or refused, answered. Run by the supervisor.

Slow work (reading and checking a configuration, trying out another program) is done in a thread.
A bad configuration changes nothing. A good one becomes a new generation beside the others; the
reload is done when that generation has taken over.
"""

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from titus_py.between.event_loop import EventLoop
from titus_py.configuration.checking import Checked, Served
from titus_py.configuration.held_uids import Held
from titus_py.supervisor.child import Child
from titus_py.supervisor.children import START_SECONDS, Children
from titus_py.supervisor.control import Answer
from titus_py.supervisor.cut import Cut
from titus_py.supervisor.generation import Generation
from titus_py.supervisor.generations import Generations
from titus_py.supervisor.installed import installed
from titus_py.supervisor.keyd_service import KeydService
from titus_py.supervisor.listeners import CannotListen, Listeners
from titus_py.supervisor.lost import Lost
from titus_py.supervisor.privileges import given_up
from titus_py.supervisor.record import Event
from titus_py.supervisor.room import Room
from titus_py.supervisor.service import Service
from titus_py.supervisor.starting import Starting
from titus_py.supervisor.takeover import Awaited, Takeover
from titus_py.supervisor.uid_blocks import NoUids, UidBlocks

__all__ = ["READ_SECONDS", "ReadAgain", "Reload"]

#: How long reading the configuration and the files that it names may take: longer than checking
#: the largest number of certificates that is possible.
READ_SECONDS = 1000.0

_Found = TypeVar("_Found")
#: Reads and checks the configuration; it is told which certificates are served.
ReadAgain = Callable[[Served], Checked]


class Reload:
    """``read_again`` reads and checks the configuration; it may be slow. ``adopt`` applies a
    generation's configuration to the supervisor itself, or raises OSError with a part of it done.
    ``change_program`` begins a reload that another program goes on with.
    """

    def __init__(
        self,
        loop: EventLoop,
        event: Event,
        service: Service,
        listeners: Listeners,
        children: Children,
        uids: UidBlocks,
        generations: Generations,
        takeover: Takeover,
        starting: Starting,
        keyd_service: KeydService,
        cut: Cut,
        read_again: ReadAgain,
        adopt: Callable[[Generation], None],
        change_program: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._event = event
        self._service = service
        self._listeners = listeners
        self._uids = uids
        self._generations = generations
        self._takeover = takeover
        self._starting = starting
        self._keyd_service = keyd_service
        self._cut = cut
        self._room = Room(event, generations, children, uids)
        self._read_again = read_again
        self._adopt = adopt
        self._change_program = change_program
        self._program = installed()
        starting.outdated = self._is_outdated
        #: This is a renewal and no reload: a generation is replaced by one with the same
        #: configuration.
        self._renewing = False
        #: What is renewed can still serve: nothing is lost if the renewal fails.
        self._unforced = False
        #: Whom to tell whether the renewal has come to be.
        self._renewal_over: Callable[[bool], None] | None = None
        self.asked_again = False
        #: The next reload begins by changing the program.
        self.program_asked = False
        #: Processes that another program is to start.
        self.lost_processes = Lost(loop, event, service, generations, self._lost_still)
        #: Another program is to take over, whatever the configuration says by now.
        self._forced = False
        #: This reload, or the next one, ends connections that it no longer allows.
        self._cuts = False
        self._cut_asked = False
        #: The clients that wait for the outcome of this reload, and of the next one.
        self.answers: list[Answer] = []
        self.later_answers: list[Answer] = []

    def answer(self, answer: Answer, program: bool = False, cut: bool = False) -> None:
        """For ``titus-py reload``: begin a reload, and answer once it is over."""
        if self._service.stops:
            answer({"reloaded": False, "problems": ["it is being stopped"]})
            return
        # A reload in progress may have read the files already, and a renewal reads none.
        (self.later_answers if self._service.reloading else self.answers).append(answer)
        self.begin(program, cut)

    def begin(self, program: bool = False, cut: bool = False) -> None:
        """Read the configuration anew. With ``program``, the installed program does that.

        With ``cut``, end the connections that the new configuration no longer allows.
        """
        if self._service.ends:
            return
        self.program_asked = self.program_asked or program
        self._cut_asked = self._cut_asked or cut
        if self._service.reloading:
            self.asked_again = True
            awaited = self._takeover.awaited
            if self._renewing and awaited is not None and awaited.generation.waits_for_keyd:
                # Give the renewal up: the new configuration may name a keyd that is there.
                self._renewing = False
                self._takeover.abandon_keyless(awaited.generation)
            return
        # Otherwise children of the new program would speak to this one.
        program, self.program_asked = self.program_asked or self._is_outdated(), False
        self._cuts, self._cut_asked = self._cut_asked, False
        self._event("reloading")
        self._service.begin_reload()
        if program:
            self._change_program()
        else:
            self.read()

    def read(self) -> None:
        serving = self._generations.serving
        served = Served(serving.certificates, not serving.lacks_keys)
        self.aside(lambda: self._read_again(served), self._take)

    def lost(self, name: str, start: Callable[[], None]) -> None:
        """A process is lost, and ``start`` starts it again, as this program would have it.

        If another program is installed, the process would be of that one, and might not understand
        this one. So that one takes over, and starts it. It does also if the configuration has a
        mistake by now: it serves what was served. ``start`` is called only if it cannot take over,
        and could start: if it cannot, it is tried again.
        """
        if not self._is_outdated():
            start()
        elif self.lost_processes.add(name, start):
            self.begin()

    def _lost_still(self) -> None:
        """Try the installed program again, unless it is the one that runs by now."""
        if self._is_outdated():
            self.begin()
        elif not self._service.reloading:
            self.lost_processes.settle("")

    @property
    def urgent(self) -> bool:
        """Whether another program takes over for a lost process, and not for a configuration."""
        return self._forced or bool(self.lost_processes)

    def for_keys(self) -> None:
        """keyd was started again with other keys: reload, the certificates may be others too."""
        self._event("keys_changed", level="warning", action="reloading")
        self.begin()

    def aside(self, work: Callable[[], _Found], take: Callable[[_Found], None]) -> None:
        """Call ``work`` in a thread, and then ``take`` in this one, with the result.

        Without a result, the reload fails.
        """
        try:
            ours, theirs = os.pipe2(os.O_CLOEXEC)
        except OSError as error:
            self._not_read(error)
            return
        found: list[_Found] = []

        def run() -> None:
            try:
                found.append(work())
            finally:
                os.close(theirs)

        def done() -> None:
            too_late.cancel()
            self._loop.unwatch(ours)
            os.close(ours)
            if found:
                take(found[0])
            else:
                self.failed(["it could not be read: see the lines above"])

        def give_up() -> None:
            self._loop.unwatch(ours)
            os.close(ours)
            self.failed([f"it could not be read within {READ_SECONDS:g} s"])

        try:
            self._loop.watch(ours, done)
        except OSError as error:
            os.close(ours)
            os.close(theirs)
            self._not_read(error)
            return
        too_late = self._loop.after(READ_SECONDS, give_up)
        try:
            threading.Thread(target=run, daemon=True).start()
        except RuntimeError as error:  # the limit on processes is reached
            self._event("start_failed", level="error", reason=str(error))
            os.close(theirs)

    def _not_read(self, error: OSError) -> None:
        self.failed([f"it could not be read: {error.strerror}"])

    def _take(self, checked: Checked) -> None:
        """Have a good configuration take over. A bad one changes nothing."""
        if self._service.stops:
            return
        if checked.configuration is None:
            self.failed([str(mistake) for mistake in checked.mistakes])
            return
        if reason := given_up(checked.configuration):
            self.failed([reason])
            return
        try:
            generation = self._starting.prepare(checked)
            self._uids.demand(generation, self._generations)
            added = self._listeners.add(generation.listening, generation.wishes)
        except (CannotListen, OSError, Held, NoUids) as error:
            self.failed([str(error)])
            return
        self._generations.append(generation)
        try:
            self._adopt(generation)
        except OSError as error:
            self._listeners.close(added)
            self._takeover.forget(generation)
            self._adopt_again()
            self.failed([str(error)])
            return
        self._listeners.open |= added
        patient = self._renewing and not self._unforced
        awaited = Awaited(generation, patient, self._settled, same_keys=self._unforced)
        self._takeover.expect(awaited, added)
        self._starting.start(generation)

    def _settled(self, problems: list[str]) -> None:
        """End the reload: the awaited generation has taken over, or has failed."""
        serving = self._generations.serving
        if not problems:
            self._took_over({"reloaded": True, "generation": serving.number})
            return
        self._adopt_again()
        self.failed(problems)

    def _adopt_again(self) -> None:
        """Have the supervisor itself as the generation wants it that goes on serving."""
        try:
            self._adopt(self._generations.serving)
        except OSError as error:
            self._event("start_failed", level="error", reason=str(error))

    def _took_over(self, outcome: dict[str, object]) -> None:
        if self._cuts and not self._renewing:
            self._cut.begin(
                list(self._generations), self.aside, lambda added: self._ended(outcome | added)
            )
        else:
            self._ended(outcome)

    def failed(self, problems: list[str], cannot_start: bool = False) -> None:
        """``cannot_start``: the installed program, which was to take over."""
        if self._service.stops:
            return
        for problem in problems:
            self._event("reload_failed", level="error", problem=problem)
        self._ended({"reloaded": False, "problems": problems}, problems[0] if cannot_start else "")

    def _ended(self, outcome: dict[str, object], cannot_start: str = "") -> None:
        serving = self._generations.serving
        renewing, self._renewing = self._renewing, False
        self._unforced = self._forced = False
        if renewing:
            self._end_crippled(serving, serving.parent)
        else:
            self._loop.after(0, lambda: self.renew(serving))
        self._service.end_reload()
        over, self._renewal_over = self._renewal_over, None
        if over is not None:
            over(bool(outcome["reloaded"]))
        for answer in self.answers:
            answer(outcome)
        self.answers, self.later_answers = self.later_answers, []
        if self.asked_again:
            self.asked_again = False
            self.begin()
        else:
            self.lost_processes.settle(cannot_start)
            self._keyd_service.use_after_all(serving)

    # --- another fork server -----------------------------------------------

    def replace(self, over: Callable[[bool], None], urgently: int | None = None) -> None:
        """``renewals.Replace``. If it fails, the generation that serves goes on."""
        serving = self._generations.serving
        if self._service.ends or self._service.reloading or not serving.ready:
            over(False)
        elif urgently is not None and serving.number != urgently:
            return
        elif self._is_outdated():
            # It is the new program's to replace. That does not wait for a better configuration.
            self._forced = True
            self.begin()
            over(False)
        elif not self._room.is_there(serving):
            if urgently is not None:
                self._room.make(serving)
            over(False)
        else:
            self._service.reloading = self._renewing = self._unforced = True
            self._renewal_over = over
            self._take(serving.checked)

    def renew(self, generation: Generation) -> None:
        """Replace a generation that can make no more workers by one with the same configuration.

        Its connections go on, as in a reload. If it cannot be replaced, they end, and it is
        started anew. A reload in progress may replace it too; if not, the renewal follows
        (``_ended``).
        """
        if not self._may_renew(generation):
            return
        if self._service.reloading:
            parent = generation.parent
            self._loop.after(START_SECONDS, lambda: self._end_crippled(generation, parent))
        else:
            self.lost("fork server", lambda: self._renew(generation))

    def _renew(self, generation: Generation) -> None:
        if self._may_renew(generation) and not self._service.reloading:
            self._service.reloading = self._renewing = True
            self._take(generation.checked)

    def _may_renew(self, generation: Generation) -> bool:
        return generation.crippled and not (generation.retired or self._service.stops)

    def _is_outdated(self) -> bool:
        """Whether another program was installed since this one was started."""
        try:
            return installed() != self._program
        except OSError:
            # No descriptor is left, perhaps: the reload itself says so.
            return False

    def _end_crippled(self, generation: Generation, parent: Child | None) -> None:
        """If nothing has replaced the generation, kill its parent: a new start follows."""
        crippled = generation.crippled and not generation.retired
        if self._service.stops or self._renewing or not crippled or self.lost_processes:
            return
        if parent is not None and parent is generation.parent:
            parent.kill()
