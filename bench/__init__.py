"""Benchmarks of our trainer beside others on one workload: `make bench`, docs/benchmarks.md.

bench may import everything of ours; nothing of ours imports bench. `workload.py`, `timing.py`,
`activations.py` and `peers/` also run in the peers' environments, and import nothing of ours.
"""
