"""Print all settings as a Markdown table: `python -m configs`."""

import sys

from configs.cli import settings_table

sys.stdout.write(settings_table())
