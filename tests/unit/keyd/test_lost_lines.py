"""Lines that there is no room for, where standard error is written by a thread of its own."""

import threading

from keyd.standard_error import QUEUE_LINES, StandardError


def test_a_signals_handler_may_lose_a_line_while_one_is_counted() -> None:
    """It runs in the middle of that, in the same thread."""
    standard_error = StandardError()
    for _ in range(QUEUE_LINES):
        print("there is room", file=standard_error)
    done = threading.Event()

    def interrupted() -> None:
        with standard_error._counting:
            print("there is none", file=standard_error)
        done.set()

    threading.Thread(target=interrupted, daemon=True).start()
    assert done.wait(10)
    assert standard_error._lost == 1
