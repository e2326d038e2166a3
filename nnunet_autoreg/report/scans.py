"""The report's section about the scans: counts, and why scans were left out, without names."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from nnunet_autoreg.corpus.identity import NUM_HEX
from nnunet_autoreg.corpus.rows import OK, ScanRow
from nnunet_autoreg.report import page
from nnunet_autoreg.wording import counted

NUM_EXAMPLES = 3
HIDDEN = "[name]"
HASH = re.compile(rf"[0-9a-f]{{{NUM_HEX}}}")
PATH = re.compile(
    r"(?<![\w)])(?:/[^\s'\",;:()]+|[A-Za-z]:\\\S+)"
    r"|\S+\.(?:nii|gz|nrrd|mha|mhd|hdr|img|dcm|ima|dicom|zip)\b",
)
"""Text that looks like the path or name of a scan."""


def scans_section(rows: Sequence[ScanRow], num_training: int, num_validation: int) -> str:
    """Return the section about the scans as HTML. Its counts equal those of scans.csv.

    Nothing that may identify a patient is shown: scans are referred to by their lines in scans.csv.
    """
    num_used = sum(row.status == OK for row in rows)
    entries = counted(len(rows), "entry")
    num_left_out = len(rows) - num_used
    summary = (
        f"{entries} found: {num_used:,} used ({num_training:,} for training, {num_validation:,} "
        f"for validation), {num_left_out:,} left out. scans.csv in this folder lists all of them."
    )
    privacy = (
        "This page contains no file names, paths or identifiers. Line numbers "
        "refer to scans.csv; its header is line 1."
    )
    by_status = page.table(
        "Scans by status",
        ("status", "scans", "why, for example"),
        _status_rows(rows),
        ("", "n", "wide"),
    )
    parts = [page.paragraph(summary), by_status, page.paragraph(privacy, "soft")]

    if num_used:
        by_dataset = page.table(
            "Scans that are used, by dataset",
            ("dataset", "modality", "channel or contrast", "scans", "modality known from"),
            _dataset_rows(rows),
            ("", "", "", "n", "wide"),
        )
        parts += ["<h3>Scans that are used</h3>", by_dataset]
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
    # scan -> its line. An id is a hash, or a path in an index of an earlier version; it is never an
    # ordinary word.
    line_of = {}
    for number, row in enumerate(rows, start=2):
        if row.status != OK:
            lines[row.status][row.reason].append(number)
        if HASH.fullmatch(row.id) or "/" in row.id:
            line_of[row.id] = number

    examples = defaultdict(list)
    for status, numbers_of_reason in lines.items():
        for reason in list(numbers_of_reason)[:NUM_EXAMPLES]:
            first, *more = numbers_of_reason[reason]
            where = f"line {first} and {len(more):,} more" if more else f"line {first}"
            examples[status].append(f"{where}: {_readable(reason, line_of)}")
    return examples


def _readable(reason: str, line_of: Mapping[str, int]) -> str:
    """Return a reason in which other scans are referred to by their lines in scans.csv.

    No other word is replaced, even if a folder or a scan has it as a name. Indexes of earlier
    versions hold paths; everything that looks like one is hidden.
    """
    for scan, line in line_of.items():
        if scan in reason:
            reason = re.sub(rf"(?<!\w){re.escape(scan)}(?!\w)", f"line {line}", reason)
    return PATH.sub(HIDDEN, reason)


def _dataset_rows(rows: Sequence[ScanRow]) -> Iterable[Sequence[str]]:
    """Yield (dataset, modality, channel or contrast, count, source of the modality)."""
    datasets: dict[str, str] = {}
    for row in rows:
        # nnU-Net's own names are shown; the name of a user's folder may be that of a patient.
        is_of_nnunet = re.fullmatch(r"Dataset\d{3,}(_\S+)?", row.dataset)
        shown = row.dataset if is_of_nnunet else f"input {len(datasets) + 1} (a folder)"
        datasets.setdefault(row.dataset, shown)

    counts: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        if row.status == OK:
            counts[row.dataset, row.modality, row.contrast or row.channel, row.modality_rule] += 1
    for (dataset, modality, channel, rule), count in counts.items():
        yield datasets[dataset], modality, channel or "-", f"{count:,}", PATH.sub(HIDDEN, rule)
