"""Ours beside other trainers on one workload, timed in turn: `make bench`, docs/benchmarks.md.

May import everything of ours; nothing of ours imports it. `workload.py`, `timing.py`,
`activations.py` and `peers/` run in the peers' environments too, and import nothing of ours.
"""
