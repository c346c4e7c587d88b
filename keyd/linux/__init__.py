"""The operating system's part: processes, credentials, sealed files, sockets' descriptors.

One room for every call that is Linux's own and that Python's standard library
lacks. It lies in ``keyd`` because keyd stands on its own and the proxy stands on
keyd; nothing here knows of either.
"""
