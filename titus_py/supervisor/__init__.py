"""The supervisor: generations, reload, listeners, log, metrics, control.

Runs as root from start to end. Hears signals, root's commands, its own children and the readers of
the metrics.
"""
