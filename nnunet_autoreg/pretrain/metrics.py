"""``metrics.jsonl``: one JSON line per value - step, name, value, unit - and its picture."""

import json
from collections import defaultdict
from pathlib import Path

from nnunet_autoreg.records import atomic_path, write_text


class MetricsFile:
    """Appends metrics; on resume, drops the lines of steps that will be run again.

    Args:
        path: of the file.
        first_step: lines of this step and later ones are dropped.
    """

    def __init__(self, path: Path, first_step: int):
        self.path = path
        kept = [line for line in read_lines(path) if line["step"] < first_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, step: int, name: str, value: float, unit: str) -> None:
        """Append one value."""
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, "name": name, "value": value, "unit": unit}) + "\n")


def read_lines(path: Path) -> list[dict[str, float]]:
    """All whole lines; a torn last line (the process was killed while writing) is left out. No file: no lines."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def draw_progress(metrics: Path, picture: Path) -> None:
    """Draw ``progress.png``: training and held-out error with the trivial baselines, rate, and seconds per step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in read_lines(metrics):
        series[str(line["name"])].append((line["step"], line["value"]))
    figure = Figure(figsize=(9, 10), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True)
    for name, label in LABELS.items():
        if name in series:
            top.plot(*zip(*series[name], strict=True), label=label, linestyle="--" if "baseline" in label else "-")
    top.set(ylabel="squared error per voxel\n(normalised token = 1)", title="Next-block prediction")
    if top.lines:
        top.legend()
    for axis, name, label in ((middle, "lr", "learning rate"), (bottom, "step_time", "seconds per step")):
        if name in series:
            axis.plot(*zip(*series[name], strict=True))
        axis.set_ylabel(label)
    bottom.set_xlabel("step")
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=100)


LABELS = {
    "train_error": "training scans",
    "heldout_error": "held-out scans",
    "heldout_copy": "baseline: copy the previous block",
    "heldout_mean": "baseline: predict the mean",
}
