"""The life of a run: its state, its folder, its steps and how it ends."""
