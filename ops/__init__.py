"""Single-device numerics; no communication, no layers."""
