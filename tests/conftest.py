"""What all tests start from."""

import signal

# A shell that is not interactive has its background jobs ignore these two (POSIX, "Shell Command
# Language", 2.11), and so would all that the tests start.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
