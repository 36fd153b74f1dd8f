"""Print docs/settings.md, a table of all settings: `python -m configs > docs/settings.md`."""

import sys

from configs.errors import format_value
from configs.fields import KEYS

_HEAD = """\
# Settings

Defaults < `config=NAME.yaml` < `section.key=value`. `python -m configs` writes this page from
[configs/schema.py](../configs/schema.py); `python train.py --help` prints the same.

"""


def settings_table() -> str:
    """Return all settings as a Markdown table, for docs/settings.md."""
    rows = [
        (*key.split("."), field.kind, format_value(field.default), field.comment)
        for key, field in KEYS.items()
    ]
    lines = [("section", "key", "type", "default", "meaning"), ("---",) * 5, *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.stdout.write(_HEAD + settings_table())
