"""What a run says of itself at its start and at its end, in a few lines for people."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nnunet_autoreg.corpus.rows import OK, ScanRow
from nnunet_autoreg.geometry import size_text
from nnunet_autoreg.model.card import WEIGHTS_NAME, Verdict
from nnunet_autoreg.plan import DEFAULT_OBJECTIVE, Plan
from nnunet_autoreg.report.report import REPORT_NAME
from nnunet_autoreg.wording import counted, duration

WIDTH = 10
"""Of the first word of a line."""


def scans_line(rows: Sequence[ScanRow], index_file: Path) -> str:
    """Return how many scans are usable, of which modality, and how many are left out."""
    modalities = Counter(row.modality for row in rows if row.status == OK)
    num_usable = modalities.total()
    by_modality = ", ".join(f"{count:,} {name}" for name, count in modalities.most_common())
    usable = f" ({by_modality})" if by_modality else ""

    reasons = Counter(row.status for row in rows if row.status != OK)
    if not reasons:
        return _line("found", f"{counted(num_usable, 'usable scan')}{usable}, none left out")
    by_reason = ", ".join(f"{count:,} {status}" for status, count in reasons.most_common())
    return _line(
        "found",
        f"{counted(num_usable, 'usable scan')}{usable}; {reasons.total():,} left out "
        f"({by_reason}), see {index_file}",
    )


def start_lines(
    folder: Path, plan: Plan, rows: Sequence[ScanRow], device: str, is_new: bool
) -> list[str]:
    """Return what is going to be done, in six lines.

    Args:
        rows: the usable scans.
        is_new: no earlier call has planned the run.
    """
    optim, crop = plan.optim, size_text(plan.sequence.crop_size_vox)
    spacing = size_text(plan.data.spacing_mm, ".3g")
    token = size_text(plan.encoder.token_size_vox)
    objective = plan.request.get("objective", DEFAULT_OBJECTIVE)
    return [
        _line("run", f"{plan.name} ({'new' if is_new else 'continued'}) in {folder}"),
        _line("scans", f"{len(rows):,}, of which {plan.data.holdout_fraction:.0%} for validation"),
        _line("encoder", f"{plan.encoder.name}, tokens of {token} voxels, on {device}"),
        _line("crops", f"{crop} voxels of {spacing} mm, {optim.batch_size:,} per step"),
        _line("training", f"{counted(optim.num_steps, 'step')}, {objective}, rate {optim.lr:g}"),
        _line("details", "plan.json gives the reason of every value; -v shows them here"),
    ]


def end_lines(
    folder: Path, plan: Plan, num_scans: int, seconds: float, verdict: Verdict
) -> list[str]:
    """Return what was done, where the results are, and whether it has learnt, in four lines.

    Args:
        seconds: that this call took.
    """
    steps, scans = counted(plan.optim.num_steps, "step"), counted(num_scans, "scan")
    return [
        _line("finished", f"{steps} on {scans}; this call took {duration(seconds)}"),
        _line("weights", str(folder / WEIGHTS_NAME)),
        _line("report", str(folder / REPORT_NAME)),
        _line("verdict", verdict.message),
    ]


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}"
