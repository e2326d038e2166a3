"""What a scan shows in one harmless word (T1w, FLAIR, DWI ...), and BIDS names.

Free text is matched, never passed on.
"""

import re
from pathlib import PurePosixPath

from nnunet_autoreg.corpus.tags import (
    B_VALUE,
    CONTRAST_AGENT,
    CORRECTED_IMAGE,
    ECHO_TIME,
    INVERSION_TIME,
    PROTOCOL_NAME,
    REPETITION_TIME,
    SCANNING_SEQUENCE,
    SEQUENCE_NAME,
    SERIES_DESCRIPTION,
    Tags,
    number,
    text,
)

# Looked for in this order in a series' description and protocol name; the first that is there names
# the contrast.
KEYWORDS = (
    (r"flair|dark.?fluid", "FLAIR"),
    (r"\badc\b|apparent.?diff", "ADC"),
    (r"dwi|diff|\bdti\b|trace", "DWI"),
    (r"\bswi\b|swan", "SWI"),
    (r"\btof\b|angio|\bmra\b", "TOF"),
    (r"\basl\b", "ASL"),
    (r"perf|\bdsc\b|\bdce\b", "PWI"),
    (r"bold|fmri", "BOLD"),
    (r"cine", "CINE"),
    (r"t2.?\*|t2.?star|\bt2s\b", "T2starw"),
    (r"(?<![a-z0-9])t1", "T1w"),
    (r"mp.?rage|\bbravo\b|spgr|\bvibe\b", "T1w"),
    (r"(?<![a-z0-9])t2", "T2w"),
    (r"(?<![a-z0-9])pd(?![a-z])|proton.?dens", "PDw"),
    (r"stir|tirm", "STIR"),
)
AFTER_AGENT = re.compile(
    r"(?<![a-z])(post|gad|gd|km|ce|contrast)(?![a-z])|\+\s*c\b|t1.?post|t1.?gd|t1c(?![a-z])"
)
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


def contrast_of(modality: str, tags: Tags) -> str:
    """The word for a DICOM series: from what it is called, else from its sequence and times; "" if
    neither tells.
    """
    called = " ".join(text(tags, tag) for tag in (SERIES_DESCRIPTION, PROTOCOL_NAME)).lower()
    if modality == "PT":
        corrected = text(tags, CORRECTED_IMAGE)
        return "PT" if not corrected or "ATTN" in corrected else "PTnac"
    agent = text(tags, CONTRAST_AGENT).lower() not in ("", "none", "no", "0")
    if modality == "CT":
        return "CT-ce" if agent else "CT"
    if modality != "MR":
        return ""
    word = next((w for pattern, w in KEYWORDS if re.search(pattern, called)), "") or _by_times(tags)
    return f"{word}-ce" if word == "T1w" and (agent or AFTER_AGENT.search(called)) else word


def _by_times(tags: Tags) -> str:
    """Contrast of an MR sequence by its echo, repetition and inversion times in ms."""
    echo, repetition, inversion = (
        number(tags, ECHO_TIME, 0),
        number(tags, REPETITION_TIME, 0),
        number(tags, INVERSION_TIME, 0),
    )
    kind, name = text(tags, SCANNING_SEQUENCE), text(tags, SEQUENCE_NAME).lower()
    if number(tags, B_VALUE, 0) > 0 or "ep_b" in name:
        return "DWI"
    if not echo or not repetition:
        return ""
    if inversion > 1500 and echo > 60:
        return "FLAIR"
    if "GR" in kind:
        return "T1w" if echo < 10 else "T2starw" if echo > 15 else ""
    if echo <= 30:
        return "T1w" if repetition <= 1000 else "PDw" if repetition >= 1500 else ""
    return "T2w" if echo >= 60 and repetition >= 1500 else ""


def bids_names(inside: str) -> tuple[str, str, str]:
    """(subject with the folders above it, session, contrast) of a BIDS file name without ending;
    ("", "", "") for other names.
    """
    name = PurePosixPath(inside).name
    entities = dict(BIDS_ENTITY.findall(name))
    if not name.startswith("sub-") or "sub" not in entities:
        return "", "", ""
    above = inside[: inside.index("sub-")]
    suffix = name.rpartition("_")[2]
    word = suffix if suffix in BIDS_SUFFIXES else ""
    agent = "-ce" if word and BIDS_AGENT.search(name) else ""
    session = f"ses-{entities['ses']}" if "ses" in entities else ""
    return f"{above}sub-{entities['sub']}", session, word + agent


def modality_of_contrast(word: str) -> str:
    """MR, CT or PT for a BIDS suffix; "" for none."""
    kind = word.removesuffix("-ce").lower()
    return {"ct": "CT", "pet": "PT", "": ""}.get(kind, "MR")


def is_label_name(inside: str) -> bool:
    """Whether a path below a folder, without ending, names a label map:

    BIDS ``_dseg`` and ``_mask``, folders ``labels*``.
    """
    path = PurePosixPath(inside)
    return bool(LABEL_SUFFIX.search(path.name)) or any(
        part.lower().startswith("labels") for part in path.parts[:-1]
    )
