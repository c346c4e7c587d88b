"""The supervisor: generations, reload, listeners, log, metrics, control.

Root, from beginning to end. Hears signals, root's commands and its own children.
"""
