"""Files of JSON lines or of one JSON array, plain or gzipped, read as streams.

Opening a file parses all of it once: every error is found before any work begins, and rows are counted. Memory stays
bounded by the longest row.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from pairtrace.engine.json_rows import ByteReader, JsonRows, array_objects, line_objects
from pairtrace.engine.tables import BATCH_ROWS, Record
from pairtrace.errors import DataFormatError

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile)

_Parser = Callable[[ByteReader, str, int], JsonRows]


class JsonTable:
    """The objects of one JSON file.

    Args:
        path: a file of JSON lines, or of one array of objects; gzip is recognised by its first bytes.

    Raises:
        DataFormatError: invalid UTF-8 or JSON, or a row that is not an object; names the file and the line.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._parse = self._layout()
        self._offsets = array("q")
        digest = hashlib.sha256()
        columns: dict[str, None] = {}
        rows = 0
        with _open(path) as file:
            for offset, record in self._records(_Hashing(file, digest), 0):
                if rows % BATCH_ROWS == 0:
                    self._offsets.append(offset)
                if not columns.keys() >= record.keys():
                    columns.update(dict.fromkeys(record))
                rows += 1
            compressed = isinstance(file, gzip.GzipFile)
        self.rows = rows
        self.columns = tuple(columns)
        self._digest = digest.hexdigest()
        # Each jump into a gzip file decompresses it from the beginning: reading on is cheaper.
        self.block_starts: Sequence[int] = [0] if compressed else range(0, max(rows, 1), BATCH_ROWS)

    def digest(self) -> str:
        """SHA-256 of the uncompressed content, in hex."""
        return self._digest

    def read(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[Record]:
        """The rows from `start` up to `stop`, with all their columns.

        Raises:
            DataFormatError: the file changed after it was opened.
        """
        stop = min(stop, self.rows)
        if start >= stop:
            return
        block, skipped = divmod(start, BATCH_ROWS)
        with _open(self._path) as file:
            file.seek(self._offsets[block])
            records = self._records(file, self._offsets[block])
            for _, record in islice(records, skipped, skipped + stop - start):
                yield record

    def _records(self, file: ByteReader, offset: int) -> JsonRows:
        try:
            yield from self._parse(file, self.name, offset)
        except _GZIP_DAMAGE as error:
            raise self._damaged(error) from error

    def _layout(self) -> _Parser:
        """Whether the file is an array or lines, by its first character: suffixes are often wrong."""
        try:
            with _open(self._path) as file:
                first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
                while not first and (line := file.readline()):
                    first = line.strip()
        except _GZIP_DAMAGE as error:
            raise self._damaged(error) from error
        if first == b"{":
            raise DataFormatError(
                f"{self.name}: this is one JSON object over several lines; expected an array of objects, or one "
                "object per line"
            )
        return array_objects if first.startswith(b"[") else line_objects

    def _damaged(self, error: Exception) -> DataFormatError:
        return DataFormatError(f"{self.name}: the gzip stream is damaged or cut short ({error})")


class _Hashing:
    """A binary file that hashes what is read from it."""

    def __init__(self, file: ByteReader, digest: Any) -> None:
        self._file = file
        self._digest = digest

    def read(self, size: int, /) -> bytes:
        block = self._file.read(size)
        self._digest.update(block)
        return block

    def readline(self) -> bytes:
        line = self._file.readline()
        self._digest.update(line)
        return line


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
    return gzip.GzipFile(path, "rb") if compressed else path.open("rb")
