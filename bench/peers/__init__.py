"""Other trainers on the workload, each through its own model, optimizer and parallelism.

Each program runs in an environment of its own, which `bench/setup.sh` makes. Where a package does
not run on a processor as it is, the program says what it changes.
"""
