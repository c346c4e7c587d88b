"""The fork server: load, rehearse, confine, fork.

Root without files or network. Hears the parent.
"""

# In C: one library for all.
from titus_py.native import forking, heap, immortal

__all__ = ["forking", "heap", "immortal"]
