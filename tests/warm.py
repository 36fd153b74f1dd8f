"""Imported last by the fork server: fills the caches that every program would fill again."""

from configs import parse_config

parse_config(["config=gpt_debug.yaml"])
