"""One thread at a time has the lead, and only whoever has it hands it over."""

import threading

from keyd.lead import Lead


def test_one_has_it_until_it_is_handed_over() -> None:
    lead = Lead()
    assert not lead.held
    assert lead.take(0)
    assert lead.held
    taken: list[bool] = []

    def take() -> None:
        assert not lead.held
        lead.hand_over()
        taken.append(lead.take(0))
        taken.append(lead.take(60) and lead.held)
        lead.hand_over()

    other = threading.Thread(target=take)
    other.start()
    while not taken:
        pass
    assert taken == [False]
    lead.hand_over()
    assert not lead.held
    other.join()
    assert taken == [False, True]
    assert lead.take(0)
