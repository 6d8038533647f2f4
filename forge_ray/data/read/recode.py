"""Text of other encodings and line ends → UTF-8 with line feeds, a block at a time, and where its rows lie in the file."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from forge_ray.data.read.lines import Raw

BYTEWISE = "forge_ray-bytewise"  # what is not of the encoding: a lone surrogate a byte, which is no UTF-8 either
_LONE = re.compile("[\udc00-\udcff]")
_CR = re.compile(rb"\r(?!\n)")


def _bytewise(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "".join(chr(0xDC00 + byte) for byte in error.object[error.start : error.end]), error.end


codecs.register_error(BYTEWISE, _bytewise)


class Recoded:
    """The blocks of a file as UTF-8. `placed` tells where in the file each of their rows lies; it takes them in order."""

    def __init__(self, source: Iterable[bytes], encoding: str) -> None:
        self.source, self.encoding = source, encoding
        self.ahead: deque[bytes] = deque()  # blocks that were handed out and hold rows to come
        self.within = 0  # bytes of the first of them that are counted
        self.position = self.offset = 0  # where that is: in the UTF-8, and in the file

    def __iter__(self) -> Iterator[bytes]:
        decode = codecs.getincrementaldecoder(self.encoding)(BYTEWISE).decode
        for block in self.source:
            yield from self._handed(decode(block))
        yield from self._handed(decode(b"", True))

    def _handed(self, text: str) -> Iterator[bytes]:
        if text:
            self.ahead.append(text.encode("utf-8", "surrogatepass"))
            yield self.ahead[-1]

    def placed(self, row: Raw) -> Raw:
        """The row with its offset in the file; one whose bytes are not of the encoding is refused by its name."""
        reason = row.reason.replace("not UTF-8", f"not {self.encoding}")
        if row.raw is not None:
            try:
                row.raw.decode()
            except UnicodeDecodeError:
                reason = f"not {self.encoding}"
        return replace(row, offset=self._stored(row.offset), raw=None if reason else row.raw, reason=reason)

    def _stored(self, position: int) -> int:
        while self.ahead and self.position < position:
            part = self.ahead[0][self.within : self.within + position - self.position]
            text = part.decode("utf-8", "surrogatepass")
            encodable, num_unknown = _LONE.subn("", text)
            self.offset += len(encodable.encode(self.encoding)) + num_unknown
            self.position += len(part)
            self.within += len(part)
            if self.within == len(self.ahead[0]):
                self.ahead.popleft()
                self.within = 0
        return self.offset


def line_feeds(source: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes with a line feed for each CR that stands alone; places stay."""
    open_end = b""
    for block in source:
        whole = open_end + block
        open_end = whole[-1:] if whole.endswith(b"\r") else b""
        if data := _CR.sub(b"\n", whole[: len(whole) - len(open_end)]):
            yield data
    if open_end:
        yield b"\n"
