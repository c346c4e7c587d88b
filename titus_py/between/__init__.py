"""What the processes say to each other, and how: messages, plan, report, hand-over, event loop.

Imported by all of them, workers included: nothing here imports more than it must.
"""
