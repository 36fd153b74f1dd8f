"""Print docs/settings.md, a table of all settings: `python -m configs > docs/settings.md`."""

import sys

from configs.cli import settings_table

_HEAD = """\
# Settings

Defaults < `config=NAME.yaml` < `section.key=value`. `python -m configs` writes this page from
[configs/schema.py](../configs/schema.py); `python train.py --help` prints the same.

"""

sys.stdout.write(_HEAD + settings_table())
