"""keyd: the process that holds the private keys, and nothing else.

This package stands on its own: it imports nothing from ``titus_py``.
"""
