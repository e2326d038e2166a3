"""The report's section about the scans: counts, and why scans were left out, without names."""

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


def scans_section(rows: Sequence[ScanRow], num_training: int, num_validation: int) -> str:
    """Return the section about the scans as HTML. Its counts equal those of scans.csv.

    Nothing that may name a patient is shown: a scan is referred to by its line in scans.csv.
    """
    num_used = sum(row.status == OK for row in rows)
    summary = (
        f"{len(rows):,} entries were found. {num_used:,} are used ({num_training:,} for training, "
        f"{num_validation:,} for validation) and {len(rows) - num_used:,} are left out. scans.csv "
        "in this folder lists every one of them."
    )
    privacy = (
        "File names, paths and identifiers are left out of this page on purpose. Line numbers "
        "refer to scans.csv; its header is line 1."
    )
    parts = [
        page.paragraph(summary),
        page.table(
            "Scans by status",
            ("status", "scans", "why, for example"),
            _status_rows(rows),
            ("", "n", "wide"),
        ),
        page.paragraph(privacy, "soft"),
    ]

    if num_used:
        parts.append("<h3>Scans that are used</h3>")
        parts.append(
            page.table(
                "Scans that are used, by dataset",
                ("dataset", "modality", "channel or contrast", "scans", "modality known from"),
                _dataset_rows(rows),
                ("", "", "", "n", "wide"),
            )
        )
    return "\n".join(parts)


def _status_rows(rows: Sequence[ScanRow]) -> Iterable[Sequence[str]]:
    """Yield (status, count, examples): scans that are used first, then the most frequent."""
    counts = Counter(row.status for row in rows)
    examples = _examples(rows)
    by_count = sorted(counts.items(), key=lambda item: (item[0] != OK, -item[1], item[0]))

    for status, count in by_count:
        reasons = "used" if status == OK else "\n".join(examples[status])
        yield status, f"{count:,}", reasons


def _examples(rows: Sequence[ScanRow]) -> dict[str, list[str]]:
    """Return a few different reasons for each status that is not ok."""
    # status -> reason -> lines of scans.csv, whose header is line 1
    lines: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, row in enumerate(rows, start=2):
        if row.status != OK:
            lines[row.status][row.reason].append(number)

    chosen = []
    for status, reasons in lines.items():
        for reason, numbers in list(reasons.items())[:NUM_EXAMPLES]:
            chosen.append((status, reason, numbers))

    # All at once, because the names to hide are collected from all rows.
    cleaned = without_names([reason for _, reason, _ in chosen], rows)
    examples = defaultdict(list)
    for (status, _, numbers), reason in zip(chosen, cleaned, strict=True):
        where = f"line {numbers[0]}"
        if len(numbers) > 1:
            where += f" and {len(numbers) - 1:,} more"
        examples[status].append(f"{where}: {reason}")

    return examples


def without_names(texts: Sequence[str], rows: Sequence[ScanRow]) -> list[str]:
    """Return the texts without names of patients and without paths.

    Every id, case, subject, path and file name of the index is replaced, and anything else that
    looks like a path.
    """
    cleaned = list(texts)
    # A name may be a part of another one: the longer one is replaced first.
    for name in sorted(_names(rows), key=len, reverse=True):
        for i, text in enumerate(cleaned):
            if name in text:
                # Only whole words: a case called "hip" must not change "hippocampus".
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

    # Short names, such as a case "1", would hide every number of a message.
    return {name for name in names if len(name) >= MIN_NAME} - HARMLESS


def _dataset_rows(rows: Sequence[ScanRow]) -> Iterable[Sequence[str]]:
    """Yield (dataset, modality, channel or contrast, count, where the modality is known from)."""
    datasets: dict[str, str] = {}
    for row in rows:
        datasets.setdefault(row.dataset, _name_of_dataset(len(datasets) + 1, row.dataset))

    counts = Counter(
        (row.dataset, row.modality, row.contrast or row.channel, row.modality_rule)
        for row in rows
        if row.status == OK
    )
    rules = without_names([rule for *_, rule in counts], rows)
    for ((dataset, modality, channel, _), count), rule in zip(counts.items(), rules, strict=True):
        yield datasets[dataset], modality, channel or "-", f"{count:,}", rule


def _name_of_dataset(number: int, name: str) -> str:
    """Return nnU-Net's own names as they are; a user's folder may be called after a patient."""
    return name if re.fullmatch(r"Dataset\d{3,}(_\S+)?", name) else f"input {number} (a folder)"
