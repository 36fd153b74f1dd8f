"""Numerics of one device: nothing here communicates or knows what a layer is."""
