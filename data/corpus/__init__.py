"""From files or a hub to tokens on disk, once for all runs."""
