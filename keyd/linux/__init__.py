"""The operating system's part: processes, credentials, sealed files, sockets' descriptors.

This package has every call of Linux's that Python's standard library lacks. It is part
of ``keyd`` because keyd imports nothing of the proxy, and the proxy may import keyd.
Nothing here knows of either.
"""
