"""The error that every wrong setting ends in, and how values are shown in its text.

A text names the key, the value, what is allowed and the fix, in one line:
`model.hidden_size=130 is not divisible by model.num_attention_heads=4; choose 128 or 132`.
"""

import contextlib
import errno
from collections.abc import Iterator

_SHOWN_CHARACTERS = 60
# Errors of the machine rather than of the program: full, read-only or failing storage, missing
# permission, limits of the system.
_MACHINE_ERRORS = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.EMFILE,
    errno.ENAMETOOLONG,
    errno.ENFILE,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
}


class UserError(ValueError):
    """What the user of a program can fix: printed as one line, without a traceback, exit code 2.

    Raise it deliberately. Every other exception is a defect of ours and keeps its traceback.
    """


class ConfigError(UserError):
    """A setting that cannot be used; `key` is the one to change, where there is one."""

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


@contextlib.contextmanager
def machine_errors_as_user_errors(task: str) -> Iterator[None]:
    """Raise errors of the machine as UserError `cannot {task}: reason: file`; others pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _MACHINE_ERRORS:
            raise
        file = f": {error.filename}" if error.filename is not None else ""
        raise UserError(f"cannot {task}: {error.strerror}{file}") from error


def os_error_text(error: OSError) -> str:
    """Why the system refused; errors that Python raises by itself have no strerror, only a text."""
    return error.strerror or str(error) or type(error).__name__


def format_value(value: object) -> str:
    """A value as one short line: null and booleans as in YAML, unprintable text escaped."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, tuple | list):
        value = f"[{', '.join(map(format_value, value))}]"
    text = str(value)
    if not text.isprintable() or text != text.strip() or not text:
        text = repr(text)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[:_SHOWN_CHARACTERS] + "..."
    return text
