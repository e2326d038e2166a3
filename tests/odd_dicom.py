"""DICOM files whose headers break the standard, as files of the field do: each oddity is a way to
write a file, and a change of its bytes.
"""

import struct
import zlib
from collections.abc import Callable
from typing import Any

import dicom_files as d

DEFLATED = "1.2.840.10008.1.2.1.99"


def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    """Return one explicit, little-endian element with a length of 16 bits."""
    return struct.pack("<HH", group, number) + kind + struct.pack("<H", len(value)) + value


def body_of(content: bytes) -> bytes:
    """The data set after preamble, mark and file meta group."""
    # The first element of the meta group holds its length: at 128 + 4 + 8.
    length_of_meta = struct.unpack_from("<I", content, 140)[0]
    return content[144 + length_of_meta :]


def meta_of(content: bytes) -> bytes:
    return content[: len(content) - len(body_of(content))]


def with_meta(syntax: str | None, body: bytes) -> bytes:
    elements = element(2, 2, b"UI", d.CT.encode() + b"\0")
    if syntax is not None:
        padded = syntax.encode() + b"\0" * (len(syntax) % 2)
        elements += element(2, 0x10, b"UI", padded)
    length = element(2, 0, b"UL", struct.pack("<I", len(elements)))
    return b"\0" * 128 + b"DICM" + length + elements + body


def without_meta(content: bytes) -> bytes:
    return b"\0" * 128 + b"DICM" + body_of(content)


def with_private_kind(kind: bytes) -> Callable[[bytes], bytes]:
    """A private element whose kind of value does not exist, before the series element."""

    def change(content: bytes) -> bytes:
        odd = element(0x0009, 0x0010, kind, b"VENDOR")
        tag = struct.pack("<HH", 0x10, 0x20)
        return content.replace(tag, odd + tag, 1)

    return change


# How ``dicom_files.write`` writes the file, and what is changed in its bytes afterwards.
ODDITIES: dict[str, tuple[dict[str, Any], Callable[[bytes], bytes]]] = {
    "plain": ({}, bytes),
    "implicit": ({"syntax": d.IMPLICIT}, bytes),
    "big endian": ({"syntax": d.BIG_ENDIAN}, bytes),
    "no preamble": ({"preamble": False}, bytes),
    "no preamble, implicit": ({"preamble": False, "syntax": d.IMPLICIT}, bytes),
    "no meta group": ({}, without_meta),
    "no syntax, explicit": ({}, lambda c: with_meta(None, body_of(c))),
    "no syntax, implicit": ({"syntax": d.IMPLICIT}, lambda c: with_meta(None, body_of(c))),
    "says implicit, is explicit": ({}, lambda c: with_meta(d.IMPLICIT, body_of(c))),
    "says explicit, is implicit": (
        {"syntax": d.IMPLICIT},
        lambda c: with_meta(d.EXPLICIT, body_of(c)),
    ),
    "kind ??": ({}, with_private_kind(b"??")),
    "kind of blanks": ({}, with_private_kind(b"  ")),
    "kind of zeros": ({}, with_private_kind(b"\0\0")),
    "padding behind the pixels": ({}, lambda c: c + b"\0" * 64),
    "deflated": (
        {},
        lambda c: with_meta(DEFLATED, zlib.compress(body_of(c), wbits=-zlib.MAX_WBITS)),
    ),
}
