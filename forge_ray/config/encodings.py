"""The encodings of text that a source may name.

Only those whose characters each take the same number of bytes wherever they stand: the byte at which a row begins can be
told from its text. All but UTF-16 and UTF-32 write ASCII as ASCII does.
"""

from __future__ import annotations

import codecs

UTF_8 = "utf-8"
WIDE = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
SINGLE_BYTE = (
    *(f"cp{page}" for page in (437, 720, 737, 775, 850, 852, 855, 857, 858, *range(860, 864), 865, 866, 869, 874, 1125)),
    *(f"cp{page}" for page in range(1250, 1259)),
    *(f"iso8859-{part}" for part in (*range(1, 12), *range(13, 17))),
    *(f"mac-{name}" for name in ("croatian", "cyrillic", "greek", "iceland", "latin2", "roman", "romanian", "turkish")),
    *("koi8-r", "koi8-t", "koi8-u", "kz1048", "ptcp154", "tis-620"),
)
ASIAN = ("big5", "big5hkscs", "cp932", "cp949", "cp950", "euc_kr", "gb18030", "gb2312", "gbk", "johab", "shift_jis")
ENCODINGS = frozenset((UTF_8, *WIDE, *SINGLE_BYTE, *ASIAN))
OTHER_NAMES = {"utf-8-sig": UTF_8, "ascii": UTF_8}  # a mark is read anyway, and ASCII is UTF-8


def encoding_named(name: str) -> str:
    """The one name of an encoding, such as `cp1252` for `Windows-1252`; "" where it is not one of `ENCODINGS`."""
    try:
        own = codecs.lookup(name).name
    except (LookupError, ValueError):
        return ""
    own = OTHER_NAMES.get(own, own)
    return own if own in ENCODINGS else ""
