"""Group scans of one subject and session in several contrasts, for contrast sequences. Pure."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.corpus.rows import ScanRow

# AR-SSL4M goes from T1 to T1 after contrast agent, T2 and FLAIR; what it does not know follows by
# name.
ORDER = (
    "T1w",
    "T1w-ce",
    "T2w",
    "FLAIR",
    "PDw",
    "T2starw",
    "SWI",
    "DWI",
    "ADC",
    "CT",
    "CT-ce",
    "PT",
)
SAME_WORD = {
    "t1": "T1w",
    "t1w": "T1w",
    "t1n": "T1w",
    "t1pre": "T1w",
    "t1post": "T1w-ce",
    "t1c": "T1w-ce",
    "t1ce": "T1w-ce",
    "t1gd": "T1w-ce",
    "t1wce": "T1w-ce",
    "t2": "T2w",
    "t2w": "T2w",
    "flair": "FLAIR",
    "t2f": "FLAIR",
    "t2flair": "FLAIR",
    "pd": "PDw",
    "pdw": "PDw",
    "adc": "ADC",
    "dwi": "DWI",
    "swi": "SWI",
    "ct": "CT",
    "ctce": "CT-ce",
    "pet": "PT",
    "pt": "PT",
}


@dataclass(frozen=True)
class ContrastGroup:
    """Scans of one subject and session, in the fixed order of contrasts.

    Attributes:
        name: name of the case, or the hash of the subject.
        contrasts: one word per scan, no two alike.
        rows: the scans.
        channels: the scans are channels of one nnU-Net case, so they have the same grid.
    """

    name: str
    contrasts: tuple[str, ...]
    rows: tuple[ScanRow, ...]
    channels: bool


def contrast_word(row: ScanRow) -> str:
    """Return one word for the contrast of a scan; "" if unknown.

    "T1post" of a dataset.json and "T1w-ce" of a DICOM series have the same word.

    A channel that has only a number is a contrast within its dataset only.
    """
    word = row.contrast or row.channel
    if word.isdecimal():
        return f"{public_dataset(row.dataset)} channel {word}"
    return SAME_WORD.get(re.sub(r"[^a-z0-9]", "", word.lower()), word)


def order_of(word: str) -> tuple[int, str]:
    """Sort key of a contrast."""
    if word in ORDER:
        return ORDER.index(word), ""
    return len(ORDER), word


def contrast_groups(rows: Iterable[ScanRow], salt_free: bool = True) -> list[ContrastGroup]:
    """Return all groups of at least two contrasts.

    These are channels of a case, and other scans of one subject and session in one dataset or
    folder.

    Of two scans of one contrast the larger is used. Scans with an unknown contrast belong to no
    group.

    Args:
        salt_free: ``data.salt_free`` of the plan, which decides between scans of one size.
    """
    by_case: dict[tuple[str, ...], list[ScanRow]] = {}
    by_subject: dict[tuple[str, ...], list[ScanRow]] = {}
    for row in rows:
        if row.channel:
            by_case.setdefault((row.dataset, row.case), []).append(row)
        elif row.subject:
            by_subject.setdefault((row.dataset, row.subject, row.session), []).append(row)

    found = []
    for (dataset, case), members in by_case.items():
        found.append(_group(f"{dataset}/{case}", members, True, salt_free))
    for (dataset, subject, _), members in by_subject.items():
        found.append(_group(f"{dataset}/{subject}", members, False, salt_free))
    return [group for group in found if len(group.rows) >= 2]


def _group(name: str, rows: Sequence[ScanRow], channels: bool, salt_free: bool) -> ContrastGroup:
    """Return the group of these rows, with the largest scan of every contrast."""

    def largest_first(row: ScanRow) -> tuple[int, str]:
        # Between scans of one size the content decides, so that the order of the rows changes
        # nothing.
        equal = row.content_hash if salt_free else row.id
        return -row.num_vox, equal

    chosen: dict[str, ScanRow] = {}
    for row in sorted(rows, key=largest_first):
        word = contrast_word(row)
        if word:
            chosen.setdefault(word, row)
    words = sorted(chosen, key=order_of)
    members = tuple(chosen[word] for word in words)
    return ContrastGroup(name, tuple(words), members, channels)


def commonest(groups: Sequence[ContrastGroup]) -> tuple[str, ...]:
    """Return the most frequent set of contrasts.

    Of equally frequent sets it is the larger one.
    """
    counts = Counter(group.contrasts for group in groups)
    if not counts:
        return ()
    # The words themselves decide last, so that the order of the groups changes nothing.
    return max(counts, key=lambda words: (counts[words], len(words), words))


def reduced(group: ContrastGroup, contrasts: Sequence[str]) -> ContrastGroup:
    """Return the group with only the given contrasts."""
    words, rows = [], []
    for word, row in zip(group.contrasts, group.rows, strict=True):
        if word in contrasts:
            words.append(word)
            rows.append(row)
    return ContrastGroup(group.name, tuple(words), tuple(rows), group.channels)
