"""What a scan shows in one harmless word, such as T1w, FLAIR or DWI.

Free text is matched, never passed on.
"""

import re

from nnunet_autoreg.io.dicom_header import DicomHeader

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
    r"(?<![a-z])(post|gad|gd|km|ce|contrast)(?![a-z])|\+\s*c\b|t1.?post|t1.?gd|t1c(?![a-z])",
)


def has_contrast_agent(header: DicomHeader) -> bool:
    """Return whether a header names a contrast agent."""
    return header.text("ContrastBolusAgent").lower() not in ("", "none", "no", "0")


def contrast_of(modality: str, header: DicomHeader) -> str:
    """Return the word for a DICOM series; "" if it is unknown.

    What a series is called comes first, then its sequence and times.
    """
    names = [header.text(keyword) for keyword in ("SeriesDescription", "ProtocolName")]
    called = " ".join(names).lower()
    if modality == "PT":
        corrected = header.text("CorrectedImage")
        return "PT" if not corrected or "ATTN" in corrected else "PTnac"
    agent = has_contrast_agent(header)
    if modality == "CT":
        return "CT-ce" if agent else "CT"
    if modality != "MR":
        return ""

    matching = (word for pattern, word in KEYWORDS if re.search(pattern, called))
    word = next(matching, "") or _contrast_by_times(header)
    is_after_agent = agent or AFTER_AGENT.search(called)
    return f"{word}-ce" if word == "T1w" and is_after_agent else word


def _contrast_by_times(header: DicomHeader) -> str:
    """Return the contrast of an MR sequence by its echo, repetition and inversion times in ms."""
    echo = header.number("EchoTime", 0)
    repetition = header.number("RepetitionTime", 0)
    inversion = header.number("InversionTime", 0)
    if header.number("DiffusionBValue", 0) > 0 or "ep_b" in header.text("SequenceName").lower():
        return "DWI"
    if not echo or not repetition:
        return ""

    if inversion > 1500 and echo > 60:
        return "FLAIR"
    if "GR" in header.text("ScanningSequence"):
        if echo < 10:
            return "T1w"
        return "T2starw" if echo > 15 else ""
    if echo <= 30:
        if repetition <= 1000:
            return "T1w"
        return "PDw" if repetition >= 1500 else ""
    return "T2w" if echo >= 60 and repetition >= 1500 else ""
