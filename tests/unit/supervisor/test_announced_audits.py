"""What an announcement covers: a number, for a time, and so many refusals."""

import time

from titus_py.supervisor.announced_audits import FIRST_CONNECTION, LAST_CONNECTION, AnnouncedAudits


def test_only_the_number_that_was_given_is_expected() -> None:
    audits = AnnouncedAudits()
    number = audits.announce()
    assert FIRST_CONNECTION <= number <= LAST_CONNECTION
    assert float(number) == number
    assert audits.expect(number)
    for other in (0, 1, number - 1, number + 1, float(number) + 2, str(number), None, [number]):
        assert not audits.expect(other)


def test_so_many_refusals_and_no_more() -> None:
    audits = AnnouncedAudits()
    number, another = audits.announce(), audits.announce()
    taken = [audits.expect(number) for _ in range(100)]
    assert sum(taken) == 16
    assert taken == sorted(taken, reverse=True)
    assert audits.expect(another)


def test_for_so_long_and_no_longer() -> None:
    audits = AnnouncedAudits(seconds=0.01)
    number = audits.announce()
    time.sleep(0.02)
    assert not audits.expect(number)


def test_many_announcements_are_not_remembered() -> None:
    audits = AnnouncedAudits()
    numbers = [audits.announce() for _ in range(100)]
    assert len(set(numbers)) == 100
    assert sum(map(audits.expect, numbers)) == 8
