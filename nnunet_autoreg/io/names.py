"""File names: image endings, nnU-Net's case and channel numbers, and the natural order."""

import os
import re
from pathlib import Path

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which scan2 comes before scan10."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part.lower())
        for part in re.split(r"(\d+)", text)
        if part
    ]


def strip_ending(name: str) -> str:
    """A file name without its image ending; unchanged if it has none."""
    return next((name[: -len(e)] for e in IMAGE_ENDINGS if name.lower().endswith(e)), name)


def absolute(path: str | Path) -> Path:
    """An absolute path without ``..``, links left as they are (``resolve`` would follow them and
    change ids).
    """
    return Path(os.path.abspath(path))  # noqa: PTH100


def case_and_channel(path: Path) -> tuple[str, int]:
    """Return case and channel number of an image that is named as nnU-Net does, such as
    ``a.b.1_0000.nii.gz``.
    """
    stem = strip_ending(path.name)
    match = CHANNEL_SUFFIX.match(stem)
    return (match["case"], int(match["channel"])) if match else (stem, 0)
