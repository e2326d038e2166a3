"""File names: image endings, nnU-Net's case and channel numbers, and the natural order."""

import os
import re
from pathlib import Path, PurePosixPath

IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".hdr")
VOXEL_ENDINGS = {".hdr": (".img", ".img.gz"), ".mhd": (".raw", ".zraw")}
"""Endings of the files that hold the voxels of a header beside them."""
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg")
"""Of files that hold one 2D image."""
CHANNEL_SUFFIX = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$")
BIDS_SUFFIXES = (
    "T1w",
    "T2w",
    "FLAIR",
    "PDw",
    "PDT2",
    "T2starw",
    "inplaneT1",
    "inplaneT2",
    "UNIT1",
    "MP2RAGE",
    "T1map",
    "T2map",
    "T2starmap",
    "angio",
    "SWI",
    "swi",
    "dwi",
    "ADC",
    "bold",
    "sbref",
    "cbv",
    "asl",
    "m0scan",
    "epi",
    "pet",
    "ct",
    "CT",
    "PET",
)
BIDS_ENTITY = re.compile(r"(?:^|[_/])(sub|ses)-([A-Za-z0-9]+)")
BIDS_AGENT = re.compile(r"_ce-[A-Za-z0-9]+")
LABEL_SUFFIX = re.compile(r"_(dseg|probseg|mask|defacemask)$", re.IGNORECASE)


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which scan2 comes before scan10."""
    key = []
    for part in re.split(r"(\d+)", text):
        # Numbers before words; they are never compared with each other.
        if part.isdecimal():
            # By length and then by digits, since Python converts no number of many digits.
            digits = part.lstrip("0")
            key.append((0, len(digits), digits))
        elif part:
            key.append((1, 0, part.lower()))
    return key


def is_picture(name: str) -> bool:
    """Return whether a file is a 2D image by its ending."""
    return name.lower().endswith(PICTURE_ENDINGS)


def strip_ending(name: str) -> str:
    """Return a file name without its image ending; unchanged if it has none."""
    for ending in IMAGE_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def voxel_file(header: Path) -> Path | None:
    """Return the file beside a header that holds its voxels.

    It is None if no file has its name, and for images that are a single file.
    """
    for ending in VOXEL_ENDINGS.get(header.suffix.lower(), ()):
        # NAME.HDR belongs to NAME.IMG.
        found = header.with_suffix(ending.upper() if header.suffix.isupper() else ending)
        if found.is_file():
            return found
    return None


def absolute(path: str | Path) -> Path:
    """Return an absolute path without ``..``.

    Links are left as they are: ``resolve`` would follow them and change ids.
    """
    return Path(os.path.abspath(path))  # noqa: PTH100


def case_and_channel(path: Path) -> tuple[str, int]:
    """Return case and channel number of an image that is named as in nnU-Net.

    ``a.b.1_0000.nii.gz`` is channel 0 of case ``a.b.1``.
    """
    stem = strip_ending(path.name)
    match = CHANNEL_SUFFIX.match(stem)
    # A file without a channel number is taken for the only channel.
    return (match["case"], int(match["channel"])) if match else (stem, 0)


def bids_names(inside: str) -> tuple[str, str, str]:
    """Return (subject, session, contrast) of a BIDS file name without ending.

    The subject has the folders above it. Other names give empty texts.
    """
    name = PurePosixPath(inside).name
    entities = dict(BIDS_ENTITY.findall(name))
    if not name.startswith("sub-") or "sub" not in entities:
        return "", "", ""

    # Other suffixes are free text, which may be anything.
    above = inside[: inside.index("sub-")]
    suffix = name.rpartition("_")[2]
    word = suffix if suffix in BIDS_SUFFIXES else ""
    agent = "-ce" if word and BIDS_AGENT.search(name) else ""
    session = f"ses-{entities['ses']}" if "ses" in entities else ""
    return f"{above}sub-{entities['sub']}", session, word + agent


def modality_of_contrast(word: str) -> str:
    """Return MR, CT or PT for a BIDS suffix; "" for none."""
    kind = word.removesuffix("-ce").lower()
    return {"ct": "CT", "pet": "PT", "": ""}.get(kind, "MR")


def is_label_name(inside: str) -> bool:
    """Return whether a path below a folder, without ending, names a label map.

    These are BIDS ``_dseg`` and ``_mask``, and files in folders ``labels*``.
    """
    path = PurePosixPath(inside)
    if LABEL_SUFFIX.search(path.name):
        return True
    return any(folder.lower().startswith("labels") for folder in path.parts[:-1])
