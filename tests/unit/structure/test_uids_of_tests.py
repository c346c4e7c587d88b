"""The uids that tests give to their instances."""

from integration.instance import Uids


def test_an_instance_that_runs_for_long_keeps_its_uids_to_itself() -> None:
    uids = Uids()
    kept = uids.take()
    uids.hold(kept)
    many = [uids.take() for _ in range(200)]
    assert not any(set(kept) & set(others) for others in many)
    assert len({*many}) < len(many), "they come round again"
    uids.give_back(kept)
    assert kept in [uids.take() for _ in range(200)]
