"""Imported last by the fork server: fills a cache that every program would fill again."""

from configs import load

load._defaults()
