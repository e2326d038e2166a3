"""The report's section on what went in: counts by status, dataset and modality, and why scans were
left out - without names.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from nnunet_autoreg.corpus.rows import OK, ScanRow
from nnunet_autoreg.report import page

NUM_EXAMPLES = 3
MIN_NAME = 3
HIDDEN = "[name]"
HARMLESS = {"imagesTr", "imagesTs", "labelsTr", "labelsTs", "dataset"}


def scans_section(rows: Sequence[ScanRow], num_training: int, num_heldout: int) -> str:
    """Counts equal those of scans.csv.

    Nothing that may name a patient is shown: scans are told by their line in scans.csv.
    """
    used = sum(row.status == OK for row in rows)
    said = (
        f"{len(rows):,} entries were found; {used:,} take part ({num_training:,} to train on, "
        f"{num_heldout:,} held out), "
        f"{len(rows) - used:,} left out. scans.csv in this folder has every one of them."
    )
    statuses = page.table(
        "Scans by status",
        ("status", "scans", "why, for example"),
        _status_rows(rows),
        ("", "n", "wide"),
    )
    pools = page.table(
        "Scans that take part, by dataset",
        ("dataset", "modality", "channel or contrast", "scans", "told by"),
        _pool_rows(rows),
        ("", "", "", "n", "wide"),
    )
    hidden = (
        "File names, paths and identifiers are left out of this page on purpose. Lines are those "
        "of scans.csv; its header is line 1."
    )
    return page.section(
        "scans",
        "What went in",
        page.paragraph(said),
        statuses,
        page.paragraph(hidden, "soft"),
        "<h3>What takes part</h3>" + pools if used else "",
    )


def _status_rows(rows: Sequence[ScanRow]) -> Iterable[Sequence[str]]:
    counts = Counter(row.status for row in rows)
    examples = _examples(rows)
    for status, count in sorted(
        counts.items(), key=lambda item: (item[0] != OK, -item[1], item[0])
    ):
        yield status, f"{count:,}", "takes part" if status == OK else "\n".join(examples[status])


def _examples(rows: Sequence[ScanRow]) -> dict[str, list[str]]:
    """A few scans of each status that is not ok, of reasons as different as there are."""
    lines: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, start=2):
        if row.status != OK:
            lines[row.status][row.reason].append(number)
    wanted = [
        (status, reason, numbers)
        for status, reasons in lines.items()
        for reason, numbers in list(reasons.items())[:NUM_EXAMPLES]
    ]
    cleaned = without_names([reason for _, reason, _ in wanted], rows)
    examples = defaultdict(list)
    for (status, _, numbers), reason in zip(wanted, cleaned, strict=True):
        where = (
            f"line {numbers[0]}"
            if len(numbers) == 1
            else f"line {numbers[0]} and {len(numbers) - 1:,} more"
        )
        examples[status].append(f"{where}: {reason}")
    return examples


def without_names(texts: Sequence[str], rows: Sequence[ScanRow]) -> list[str]:
    """The texts with every id, case, subject, path and file name of the index replaced, and
    anything else that looks like a path.
    """
    cleaned = list(texts)
    for name in sorted(_names(rows), key=len, reverse=True):
        for i, text in enumerate(cleaned):
            if name in text:
                cleaned[i] = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", HIDDEN, text)
    like_path = re.compile(
        r"(?<![\w)])(?:/[^\s'\",;:()]+|[A-Za-z]:\\\S+)|\S+\.(?:nii|gz|nrrd|mha|mhd|dcm|ima|dicom|zip)\b"
    )
    return [like_path.sub(HIDDEN, text) for text in cleaned]


def _names(rows: Iterable[ScanRow]) -> set[str]:
    names: set[str] = set()
    for row in rows:
        source = PurePath(row.source)
        names |= {row.id, row.case, row.subject, row.session, row.part, row.source}
        names |= {source.name, source.name.split(".")[0], source.parent.name}
    return {name for name in names if len(name) >= MIN_NAME} - HARMLESS


def _pool_rows(rows: Sequence[ScanRow]) -> Iterable[Sequence[str]]:
    datasets = {
        name: _dataset(number, name)
        for number, name in enumerate(dict.fromkeys(row.dataset for row in rows), start=1)
    }
    counts = Counter(
        (row.dataset, row.modality, row.contrast or row.channel, row.modality_rule)
        for row in rows
        if row.status == OK
    )
    rules = without_names([rule for *_, rule in counts], rows)
    for ((dataset, modality, channel, _), count), rule in zip(counts.items(), rules, strict=True):
        yield datasets[dataset], modality, channel or "-", f"{count:,}", rule


def _dataset(number: int, name: str) -> str:
    """nnU-Net's own names are shown; a folder of the user's may be called after a patient."""
    return name if re.fullmatch(r"Dataset\d{3,}(_\S+)?", name) else f"input {number} (a folder)"
