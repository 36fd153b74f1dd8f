"""Files as streams of bytes, compressed or not, by their extension.

A file that was cut off ends in an error, never in silence; one of several parts is read to its end.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """Opens a file for reading; OSError or EOFError if what is in it is not what its name says."""
    with _opened(file) as stream:
        try:
            yield stream
        except (lzma.LZMAError, zlib.error) as error:  # neither is an OSError
            raise OSError(f"it is damaged: {error}") from error


def _opened(file: Path) -> IO[bytes]:
    if file.suffix == ".gz":
        return cast(IO[bytes], gzip.open(file, "rb"))
    if file.suffix == ".bz2":
        return cast(IO[bytes], bz2.open(file, "rb"))
    if file.suffix == ".xz":
        return cast(IO[bytes], lzma.open(file, "rb"))
    if file.suffix == ".zst":
        # It comes with `datasets`, and importing it takes time.
        import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415

        stream = pyarrow.input_stream(str(file), compression="zstd")
        return cast(IO[bytes], io.BufferedReader(stream))
    return file.open("rb")
