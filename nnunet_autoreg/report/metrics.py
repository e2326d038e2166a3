"""``metrics.jsonl``: one JSON line per value - step, name, value, unit - and its picture."""

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_autoreg.records import atomic_path, write_text
from nnunet_autoreg.report.sinks import Sink

log = logging.getLogger(__name__)


class MetricsFile:
    """Appends metrics; on resume, drops the lines of steps that will be run again.

    Args:
        path: of the file.
        first_step: lines of this step and later ones are dropped.
        sinks: where every value goes too.
    """

    def __init__(self, path: Path, first_step: int, sinks: Sequence[Sink] = ()):
        self.path, self.sinks = path, sinks
        kept = [line for line in read_lines(path) if line["step"] < first_step]
        write_text(path, "".join(_line(line) for line in kept))

    def log(self, step: int, name: str, value: float, unit: str) -> None:
        """Append one value."""
        self._append(step, name, value, unit)
        for sink in self.sinks:
            sink.log(step, name, value)

    def note(self, step: int, name: str, text: str) -> None:
        """Append a sentence, with the unit "text"; sinks take numbers only."""
        self._append(step, name, text, "text")

    def close(self) -> None:
        """Hand over what the sinks still hold back."""
        for sink in self.sinks:
            sink.close()

    def _append(self, step: int, name: str, value: float | str, unit: str) -> None:
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(_line({"step": step, "name": name, "value": value, "unit": unit}))


class NoMetrics(MetricsFile):
    """What processes beside the main one log to: nothing comes of it."""

    def __init__(self, path: Path):
        self.path, self.sinks = path, ()

    def _append(self, step: int, name: str, value: float | str, unit: str) -> None:
        pass


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines: a torn last one (the process was killed while writing) is left out, others
    with a word. No file: no lines.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(
        path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    ):
        try:
            record = json.loads(line)
            found.append({key: record[key] for key in ("step", "name", "value", "unit")})
        except (ValueError, KeyError, TypeError):
            log.warning("%s: line %d is damaged and left out", path, number + 1)
    return found


def draw_progress(metrics: Path, picture: Path) -> None:
    """Draw ``progress.png``: error with the trivial baselines, rate, gradient norm, seconds per
    step, and the health of the features.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in read_lines(metrics):
        if line["unit"] != "text":
            series[str(line["name"])].append((line["step"] + 1, line["value"]))
    shown = [(name, label) for name, label in PANELS.items() if name in series]
    num_rows = 2 + (len(shown) + 1) // 2
    figure = Figure(figsize=(11, 3 * num_rows), layout="constrained")
    grid = figure.add_gridspec(num_rows, 2)
    top = figure.add_subplot(grid[:2, :])
    for name, (label, colour, style) in LABELS.items():
        if name in series:
            top.plot(
                *zip(*series[name], strict=True),
                label=f"{label}: {series[name][-1][1]:.3f}",
                color=colour,
                linestyle=style,
            )
    top.set(
        ylabel="squared error per voxel\n(normalised token = 1)",
        title="Next-block prediction",
        xlabel="step",
    )
    if top.lines:
        top.legend()
    axes = [figure.add_subplot(grid[2 + i // 2, i % 2], sharex=top) for i in range(len(shown))]
    for axis, (name, label) in zip(axes, shown, strict=True):
        axis.plot(
            *zip(*series[name], strict=True),
            color="#0072b2",
            marker="." if len(series[name]) < 20 else None,
        )
        axis.set(title=label, xlabel="step")
    for axis in (top, *axes):
        axis.grid(alpha=0.3)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


# Colours that people with any colour vision tell apart (Okabe and Ito).
LABELS = {
    "train_error": ("training scans", "#56b4e9", "-"),
    "heldout_error": ("held-out scans", "#d55e00", "-"),
    "heldout_copy": ("baseline: copy the previous block", "#666666", "--"),
    "heldout_mean": ("baseline: predict the mean", "#666666", ":"),
}
PANELS = {
    "lr": "learning rate",
    "step_time": "seconds per step",
    "data_wait": "share of time spent waiting for data",
    "gradient_norm": "gradient norm before clipping",
    "tokens_per_second": "tokens per second",
    "token_variance": "token variance (near 0: collapse)",
    "effective_rank": "effective rank (near 1: collapse)",
    "probe_features": "frozen probe: balanced accuracy",
    "skipped_steps": "skipped steps",
}
