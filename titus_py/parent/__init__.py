"""The parent of a generation's workers: accept, admit, hand over, dial, and note how each ended.

Root with next to no capability. Reads no client's octet.
"""
