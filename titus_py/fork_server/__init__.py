"""The fork server: load, rehearse, confine, fork.

Root without files or network. Hears the parent.
"""
