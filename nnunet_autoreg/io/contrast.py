"""What a scan shows in one harmless word, such as T1w, FLAIR or DWI.

Free text is matched, never passed on.
"""

import re

from nnunet_autoreg.io.tags import (
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
