"""Which scan inside a file, folder or archive: the text of ``Candidate.part``, taken apart and put
together.
"""

from dataclasses import dataclass, fields
from urllib.parse import quote, unquote

from nnunet_autoreg.errors import ScanError


@dataclass(frozen=True)
class ScanPart:
    """What inside a path is one scan.

    Attributes:
        member: name of a file within a .zip.
        series, instance: SeriesInstanceUID; SOPInstanceUID of a multi-frame file.
        below: "yes" if the series lies in several folders below the path.
        stack: number of the stack, "" if the series has one.
        t: number of the volume of a 4D file or series, "" if it is 3D.
    """

    member: str = ""
    series: str = ""
    instance: str = ""
    below: str = ""
    stack: str = ""
    t: str = ""

    def __str__(self) -> str:
        # Names of members may hold ";" and "=", so values are quoted.
        named = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value:
                named.append(f"{field.name}={quote(value, safe='/ ')}")
        return ";".join(named)


def parse_part(text: str) -> ScanPart:
    """Return the parts that a ``Candidate.part`` names.

    Raises:
        ScanError: ``unreadable``: it is none.
    """
    known = {f.name for f in fields(ScanPart)}
    values = {}
    for item in filter(None, text.split(";")):
        name, _, value = item.partition("=")
        if name not in known or (name in ("stack", "t") and not value.isdecimal()):
            raise ScanError(
                "unreadable",
                f"'{name}' names no part of a file; remove scans.csv so that it is written again",
            )
        values[name] = unquote(value)
    return ScanPart(**values)
