"""Objects out of JSON lines and JSON arrays, one after another, each with the byte offset at which it begins."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, Protocol

from pairtrace.errors import DataFormatError

_CHUNK = 1 << 20
_BOM = "\ufeff"
_BLANK = b" \t\r\n"
_BLANKS = re.compile(r"[ \t\r\n]*")
# A literal, escape or number that the end of the buffer cuts is reported at most this far before the end.
_CUT_MARGIN = 16
_DECODER = json.JSONDecoder()

JsonRows = Iterator[tuple[int, dict[str, Any]]]


class ByteReader(Protocol):
    """The part of a binary file that the parsers use."""

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""

    def readline(self) -> bytes:
        """One line with its end; none at the end."""


def line_objects(file: ByteReader, name: str, offset: int) -> JsonRows:
    """Yield offset and object of every line; blank lines are skipped.

    Args:
        file: stands at `offset`.
        name: name of the file in messages.
        offset: beginning of a line.

    Raises:
        DataFormatError: a line is not UTF-8, not JSON or not an object.
    """
    number = 0
    while line := file.readline():
        number += 1
        begin, offset = offset, offset + len(line)
        content = line.strip(_BLANK) if begin else line.removeprefix(codecs.BOM_UTF8).strip(_BLANK)
        if not content:
            continue
        try:
            record = json.loads(content.decode())
        except UnicodeDecodeError as error:
            raise DataFormatError(f"{name}, line {number}: {_not_utf8(error)}") from error
        except (ValueError, RecursionError) as error:
            raise DataFormatError(f"{name}, line {number}: {_not_json(error)}") from error
        yield begin, _require_object(record, f"{name}, line {number}")


def array_objects(file: ByteReader, name: str, offset: int) -> JsonRows:
    """Yield offset and object of every element of a top-level array, decoding no more than a window of it.

    Args:
        file: stands at `offset`.
        name: name of the file in messages.
        offset: 0, or the beginning of an element.

    Raises:
        DataFormatError: an element is not UTF-8, not JSON or not an object, or the array is not closed.
    """
    window = _Window(file, name, offset)
    if offset == 0:
        if window.peek() == _BOM:
            window.skip()
        assert window.peek() == "[", "the caller looked at the first character"
        window.skip()
    number = 0
    mark = window.peek()
    while mark != "]" or number:
        number += 1
        window.peek()
        begin = window.offset
        yield begin, window.element(number)
        mark = window.peek()
        if mark == "]":
            break
        if mark != ",":
            found = f"found {mark!r}" if mark else "the file ends: it is cut short"
            raise DataFormatError(
                f"{name}, line {window.line}: expected ',' or ']' after element {number}, but {found}"
            )
        window.skip()
    window.skip()
    if window.peek():
        raise DataFormatError(f"{name}, line {window.line}: there is text after the end of the array")


class _Window:
    """The text of a file from a position on, decoded piece by piece.

    Attributes:
        offset: position in bytes from the beginning of the file.
        line: line of the position, counted from where reading began.
    """

    def __init__(self, file: ByteReader, name: str, offset: int) -> None:
        self.offset = offset
        self.line = 1
        self._file = file
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._text = ""
        self._position = 0

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            blanks = _BLANKS.match(self._text, self._position)
            assert blanks is not None
            self._advance(blanks.end())
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._fill():
                return ""

    def skip(self) -> None:
        """Step over one character."""
        self._advance(self._position + 1)

    def element(self, number: int) -> dict[str, Any]:
        """Decode the object at the position and step over it."""
        where = f"{self._name}, element {number} (line {self.line})"
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _CUT_MARGIN
                if cut and self._fill():
                    continue
                line = self.line + self._text.count("\n", self._position, error.pos)
                raise DataFormatError(
                    f"{self._name}, element {number} (line {line}): not valid JSON: {error.msg}"
                ) from error
            except (ValueError, RecursionError) as error:
                raise DataFormatError(f"{where}: {_not_json(error)}") from error
            record = _require_object(value, where)
            self._advance(end)
            return record

    def _advance(self, end: int) -> None:
        passed = self._text[self._position : end]
        self.offset += len(passed.encode())
        self.line += passed.count("\n")
        self._position = end

    def _fill(self) -> bool:
        """Read on; as much again as there is left, so that a long element is not retried often."""
        left = self._text[self._position :]
        block = self._file.read(max(_CHUNK, len(left)))
        try:
            self._text = left + self._decode(block, not block)
        except UnicodeDecodeError as error:
            line = self.line + left.count("\n") + error.object.count(b"\n", 0, error.start)
            raise DataFormatError(f"{self._name}, line {line}: {_not_utf8(error)}") from error
        self._position = 0
        return bool(block)


def _require_object(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = {"list": "a list", "str": "text", "NoneType": "null"}.get(type(value).__name__, "a bare value")
    raise DataFormatError(f"{where}: expected an object with the columns of a row, found {kind}")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"


def _not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "not usable JSON: nested too deeply"
    return f"not usable JSON: {error}"
