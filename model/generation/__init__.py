"""Decoding with a cache of keys and values, and sampling."""
