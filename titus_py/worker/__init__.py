"""A worker: one connection, from its ClientHello to its end, and the filter that it lives under.

A uid of its own, no capability, no file. Hears one client and one backend, both hostile.
"""

# In C: one library for all.
from titus_py.native import flow, transcript

__all__ = ["flow", "transcript"]
