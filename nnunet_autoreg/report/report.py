"""``report.html``: one page about a run, written again and again while it trains.

It shows the scans, the plan, whether the encoder learns, and the next command.
"""

import base64
import logging
import platform
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.private import PATH_FIELDS
from nnunet_autoreg.corpus.rows import read_index
from nnunet_autoreg.corpus.spacing import MEDIAN
from nnunet_autoreg.geometry import grid_of, volume
from nnunet_autoreg.machine import num_processes
from nnunet_autoreg.model.verdict import HEADLINES, LEARNT, UNKNOWN, judge, longer_training
from nnunet_autoreg.nnunet_api import dataset_number
from nnunet_autoreg.objective_kinds import SliceGroup, figure_of_merit
from nnunet_autoreg.plan import DEFAULT_OBJECTIVE, Plan
from nnunet_autoreg.records import to_jsonable, write_text
from nnunet_autoreg.report import page, palette
from nnunet_autoreg.report.charts import (
    COLOURS,
    Chart,
    Points,
    Series,
    cost_charts,
    figure_of,
    health_charts,
    learning_charts,
    read_series,
    read_units,
)
from nnunet_autoreg.report.galleries import html_of
from nnunet_autoreg.report.metrics import read_lines
from nnunet_autoreg.report.scans import scans_section
from nnunet_autoreg.report.slices import Picture, panels, plain_panel
from nnunet_autoreg.wording import counted, duration

log = logging.getLogger(__name__)

REPORT_NAME = "report.html"

PACKAGES = ("nnunet-autoreg", "nnunetv2", "torch", "numpy", "dynamic-network-architectures")
FLAGS = {
    "datasets": "-d",
    "folders": "-i",
    "modality": "--modality",
    "split_4d": "--split-4d",
    "exclude": "--exclude",
    "manifest": "--manifest",
    "boxes": "--boxes",
    "encoder": "--encoder",
    "init": "--init",
    "num_steps": "--steps",
    "num_epochs": "--epochs",
    "num_hours": "--hours",
    "batch_size": "--batch",
    "spacing": "--spacing",
    "sequences": "--sequences",
    "objective": "--objective",
    "preset": "--preset",
    "seed": "--seed",
    "gpu_memory_gib": "--gpu-memory",
    "settings": "--set",
}
"""Field of a request -> option of autoreg_pretrain."""

DEFAULTS = {
    "encoder": ("auto",),
    "spacing": (MEDIAN,),
    "objective": (DEFAULT_OBJECTIVE,),
    "seed": (0,),
}
"""Defaults of a request that are neither None nor empty."""


@dataclass(frozen=True)
class RunSetting:
    """Facts about a run that its folder does not hold: its device and its numbers of scans.

    Attributes:
        scan_axes: for each axis of the stored arrays, the axis of the scan (see ``slices``); None
            if scans differ.
    """

    device: str
    num_training: int
    num_validation: int
    scan_axes: tuple[int, ...] | None = None


class Reporter:
    """Write ``report.html`` into a run's folder.

    It reads scans.csv once, and metrics.jsonl each time.
    """

    def __init__(self, folder: Path, plan: Plan, setting: RunSetting):
        self.folder, self.plan, self.setting = folder, plan, setting
        self.scans = ""

    def write(self, make_pictures: Callable[[], Sequence[Picture | SliceGroup]]) -> None:
        """Write the report; if that fails, keep the previous one.

        A failure is logged and never ends the training.
        """
        path = self.folder / REPORT_NAME
        metrics = self.folder / "metrics.jsonl"
        num_scans = (self.setting.num_training, self.setting.num_validation)

        try:
            if not self.scans:
                rows = read_index(self.folder / "scans.csv", is_private=False)
                self.scans = scans_section(rows, *num_scans)

            text = report(
                self.folder,
                self.plan,
                self.setting,
                read_series(metrics),
                read_notes(metrics),
                self.scans,
                make_pictures(),
            )
            write_text(path, text)
        except Exception as error:
            log.warning(
                "%s could not be written (%s: %s); training continues",
                path,
                type(error).__name__,
                error,
            )


def read_notes(metrics: Path) -> list[str]:
    """Return the warnings of a ``metrics.jsonl`` as "step n: ...", the latest first."""
    notes = []
    for line in reversed(read_lines(metrics)):
        if line["unit"] == "text":
            num_done = line["step"] + 1
            notes.append(f"step {num_done:,}: {line['value']}")
    return notes


def report(
    folder: Path,
    plan: Plan,
    setting: RunSetting,
    series: Series,
    notes: Sequence[str],
    scans: str,
    pictures: Sequence[Picture | SliceGroup],
) -> str:
    """Return the whole page as HTML.

    Args:
        folder: folder of the run; its pictures are embedded.
        notes: warnings of the training, the latest first.
        scans: the section about the scans, as HTML.
    """
    fingerprint = _embedded(
        folder / "fingerprint.png",
        "All usable scans: spacings with their targets, sizes with the crop, and intensities.",
    )

    # Only --dry-run --show draws this picture.
    sequences = _embedded(
        folder / "sequences.png",
        "Some sequences as the network sees them, drawn before training.",
    )
    if sequences:
        sequences = page.section("sequences", "What the network has to predict", sequences)

    units = read_units(folder / "metrics.jsonl")
    health = _figures(health_charts(series, plan, units))
    if health:
        health = page.section("health", "Health and probes", _grid(health))

    return page.filled_template(
        {
            "name": escape(plan.name),
            "curve_colours": _css_variables(COLOURS),
            "curve_colours_on_dark": _css_variables(palette.CURVES_ON_DARK),
            "verdict": _verdict(plan, series, notes),
            "tiles": _tiles(plan, setting, series),
            "next": next_section(plan, series, setting),
            "scans": scans,
            "fingerprint": fingerprint,
            "sequences": sequences,
            "provenance": _provenance(plan, setting),
            "error_unit": escape(figure_of_merit(plan).explanation),
            "learning": _figures(learning_charts(series, plan)),
            "health": health,
            "pictures": _pictures_or_galleries(plan, pictures, setting),
            "cost": _cost(plan, setting, series),
            "plan": _plan(plan),
        },
    )


def _css_variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _figures(charts: Iterable[Chart]) -> str:
    return "\n".join(figure_of(chart) for chart in charts)


def _grid(figures: str) -> str:
    """Return figures that are placed beside each other if the page is wide enough."""
    return f'<div class="charts">\n{figures}\n</div>'


def _last(series: Series, name: str) -> float | None:
    """Return the last value of a metric; None if it was not logged."""
    points = series.get(name)
    if not points:
        return None
    _, value = points[-1]
    return value


def _typical(points: Points) -> float | None:
    """Return the median of the later half of a metric; None without points."""
    if not points:
        return None
    # The first steps compile, and read files that are not in the file cache yet.
    later_half = points[len(points) // 2 :]
    values = sorted(value for _, value in later_half)
    return values[len(values) // 2]


def steps_done(series: Series) -> int:
    """Return the last step of all metrics."""
    last_steps = [0.0]
    for points in series.values():
        if points:
            step, _ = points[-1]
            last_steps.append(step)
    return int(max(last_steps))


def verdict(plan: Plan, series: Series) -> tuple[bool, str]:
    """Return whether the encoder learns as it should, and a few sentences about it."""
    error = _last(series, "heldout_error")
    if error is None:
        return (
            False,
            f"{HEADLINES[UNKNOWN]} There are no validation scans (they need at least two cases), "
            "or none was evaluated yet.",
        )

    figure = figure_of_merit(plan)
    baselines = _newest(series, {name: f"heldout_{name}" for name in figure.references})
    probe = _newest(series, {name: f"probe_{name}" for name in ("features", "voxels")})
    errors = {"error": error, **baselines}
    outcome, reason = judge(figure, errors, probe if len(probe) == 2 else None)
    figures = f"{reason[0].upper()}{reason[1:]}."

    if outcome == LEARNT:
        text = f"{HEADLINES[LEARNT]} {figures}"
        if baselines:
            share = 100 * (1 - error / min(baselines.values()))
            baseline = "baseline" if len(baselines) == 1 else "better baseline"
            text += f" That is {share:.0f} % below the {baseline}; lower is better."
        return True, text

    if steps_done(series) <= plan.optim.warmup_steps:
        return True, f"It is too early to say. {figures} The learning rate is still warming up."
    advice = "Train longer, or look at the pictures and at scans.csv."
    return False, f"{HEADLINES[outcome]} {figures} {advice}"


def _newest(series: Series, keys: Mapping[str, str]) -> dict[str, float]:
    """Return the last values of those metrics that were logged, by other names."""
    found = {}
    for name, key in keys.items():
        value = _last(series, key)
        if value is not None:
            found[name] = value
    return found


def _verdict(plan: Plan, series: Series, notes: Sequence[str]) -> str:
    """Return the verdict, the warnings of the latest validation, and the earlier ones folded."""
    is_good, text = verdict(plan, series)
    parts = [page.paragraph(text, "verdict" if is_good else "verdict warn")]

    errors = series.get("heldout_error", ())
    latest_step = int(errors[-1][0]) if errors else 0
    earlier = []
    for note in notes:
        if note.startswith(f"step {latest_step:,}: "):
            parts.append(page.paragraph(f"At {note}", "verdict warn"))
        else:
            earlier.append((note,))

    if earlier:
        table = page.table("Earlier warnings", ("warning",), earlier)
        parts.append(page.folded(f"Earlier warnings: {len(earlier)}", table))
    return "\n".join(parts)


def _seconds_in_steps(series: Series) -> float:
    """Return the time spent in steps, from the mean of every logged interval."""
    total, previous_step = 0.0, 0.0
    for step, seconds in series.get("step_time", ()):
        total += seconds * (step - previous_step)
        previous_step = step
    return total


def _tiles(plan: Plan, setting: RunSetting, series: Series) -> str:
    """Return the key figures at the top of the page."""
    done = steps_done(series)
    state = "finished" if done >= plan.optim.num_steps else "not finished"
    num_scans = setting.num_training + setting.num_validation
    error = _last(series, "heldout_error")
    shown_error = "-" if error is None else f"{error:.3f}"
    time_in_steps = duration(_seconds_in_steps(series))

    values = [
        ("steps", f"{done:,} of {plan.optim.num_steps:,}", state),
        ("scans", f"{num_scans:,}", f"{setting.num_validation:,} of them for validation"),
        ("validation error", shown_error, figure_of_merit(plan).hint),
        ("time in steps", time_in_steps, f"on {setting.device}"),
    ]
    speed = _typical(series.get("tokens_per_second", ()))
    if speed is not None:
        values.append(("speed", f"{speed:,.0f}", "tokens per second"))
    memory = _last(series, "peak_memory")
    if memory is not None:
        values.append(("memory", f"{memory:.1f} GiB", _kind_of_memory(setting)))

    return page.tiles(values)


def _kind_of_memory(setting: RunSetting) -> str:
    return "peak, allocated on the GPU" if setting.device == "cuda" else "peak, main process"


def next_section(plan: Plan, series: Series, setting: RunSetting) -> str:
    """Return the user's next step: to continue, or to fine-tune."""
    done = steps_done(series)
    if done < plan.optim.num_steps:
        text = (
            f"The last logged step is {done:,} of {plan.optim.num_steps:,}. If the run has "
            "stopped, type the same line again: it continues from its last checkpoint."
        )
        return page.paragraph(text) + page.commands([command_of(plan)])

    datasets = plan.request.get("datasets", ())
    number, hint = "ID", " (replace ID by its number)"
    # A user who pretrained on a folder may have no nnU-Net dataset yet.
    if datasets:
        number, hint = dataset_number(str(datasets[0])), ""
    # nnU-Net trains on a GPU unless an option says otherwise.
    device = "" if setting.device == "cuda" else f" -device {setting.device}"
    lines = [
        f"export autoreg_weights={plan.name}",
        f"nnUNetv2_plan_and_preprocess -d {number} -pl AutoregPlanner",
        f"nnUNetv2_train {number} 3d_fullres 0 -tr AutoregPretrainedTrainer -p AutoregPlans --npz"
        f"{device}",
    ]
    text = (
        f"Fine-tune on a labelled nnU-Net dataset{hint}. Then train folds 1 to 4 in the same way; "
        "--c continues an interrupted fold."
    )
    advice = ""
    learns, _ = verdict(plan, series)
    if not learns and _last(series, "heldout_error") is not None:
        longer = longer_training(plan.optim.num_steps)
        advice = page.paragraph(f"Train longer first: {longer}.")
        advice += page.commands([command_of(plan)])
        text = f"To use the encoder anyway: {text[0].lower()}{text[1:]}"
    return advice + page.paragraph(text) + page.commands(lines)


def _pictures_or_galleries(
    plan: Plan,
    pictures: Sequence[Picture | SliceGroup],
    setting: RunSetting,
) -> str:
    """Return pictures of predictions for validation scans, or of groups of their slices."""
    galleries = [picture for picture in pictures if isinstance(picture, SliceGroup)]
    if galleries:
        return page.paragraph(figure_of_merit(plan).pictures) + html_of(galleries)

    samples = [picture for picture in pictures if isinstance(picture, Picture)]
    if not samples:
        reason = "none was drawn yet" if setting.num_validation else "there are no validation scans"
        return page.paragraph(f"There are no pictures: {reason}.")

    parts = [
        page.paragraph(figure_of_merit(plan).pictures),
        '<p class="soft">error: none <span class="bar" aria-hidden="true"></span> half of the grey '
        "range</p>",
    ]
    for number, drawn in enumerate(samples, start=1):
        title = f"Sample {number}: {drawn.num_given:,} of {drawn.num_blocks:,} blocks given"
        parts.append(f'<figure aria-label="{title}"><h3>{title}</h3>')

        for plane in drawn.planes:
            cells = [f"<div><p>{escape(name)}</p>{image}</div>" for name, image in panels(plane)]
            parts.append(f'<p class="soft">{escape(plane.name)}</p>')
            parts.append(f'<div class="panels">{"".join(cells)}</div>')

        if drawn.images:
            parts.append(_side_by_side(drawn))
        parts.append("</figure>")

    return "\n".join(parts)


def _side_by_side(picture: Picture) -> str:
    """Return the images of a sequence beside each other, one row for every plane."""
    parts = [
        '<p class="soft">The images of this sequence, each through the middle of its crop: they '
        "should show the same structure.</p>",
    ]
    for planes in zip(*picture.images, strict=True):
        cells = [
            f"<div><p>image {number}, {escape(plane.name)}</p>{plain_panel(plane)}</div>"
            for number, plane in enumerate(planes, start=1)
        ]
        parts.append(f'<div class="panels">{"".join(cells)}</div>')
    return "\n".join(parts)


def _cost(plan: Plan, setting: RunSetting, series: Series) -> str:
    """Return the table of time and memory, and their charts."""
    tokens = volume(grid_of(plan.sequence.crop_size_vox, plan.encoder.token_size_vox))
    seconds = _typical(series.get("step_time", ()))
    num_left = plan.optim.num_steps - steps_done(series)

    rows: list[tuple[str, str, str]] = [
        ("trained on", setting.device, ""),
        ("tokens per crop", f"{tokens:,}", "padding included"),
        ("crops per step", f"{plan.optim.batch_size:,}", ""),
    ]
    if seconds:
        speed = plan.optim.batch_size * tokens / seconds
        so_far = duration(_seconds_in_steps(series))
        rows += [
            ("seconds per step", f"{seconds:.3g}", "median of the later half"),
            ("steps per second", f"{1 / seconds:.3g}", ""),
            ("tokens per second", f"{speed:,.0f}", ""),
            ("time in steps so far", so_far, "without reading and preprocessing"),
        ]
        if num_left > 0:
            rows.append(("time left", duration(seconds * num_left), "at this speed"))

    waits = _typical(series.get("data_wait", ()))
    if waits is not None:
        remark = "of the time in steps, on the host's clock"
        rows.append(("waiting for data", f"{100 * waits:.0f} %", remark))

    memory = _last(series, "peak_memory")
    if memory is not None:
        rows.append(("memory", f"{memory:.2f} GiB", _kind_of_memory(setting)))

    share = _typical(series.get("share_of_peak", ()))
    if share is not None:
        remark = "of a large bf16 matrix product; attention counted dense"
        rows.append(("share of the device's peak", f"{100 * share:.0f} %", remark))

    header = ("what", "value", "remark")
    text = page.table("Time and memory", header, rows, ("", "n", "wide"))
    charts = _figures(cost_charts(series, plan))
    if charts:
        text += f"\n{_grid(charts)}"
    return text


def _plan(plan: Plan) -> str:
    """Return the table of planned values with their reasons, and the other values folded.

    The user's request is left out because its paths may name patients.
    """
    data = to_jsonable(plan)
    del data["request"], data["reasons"]
    values = dict(_leaves(data, prefix=""))

    with_reasons = []
    for key, reason in plan.reasons.items():
        # A reason may be given for a whole record. Then all values of the record are shown.
        of_record = {}
        for name, value in values.items():
            if name.startswith(f"{key}."):
                of_record[name.removeprefix(f"{key}.")] = value
        shown = _text_of(values.get(key, of_record))
        with_reasons.append((key, shown, reason))
    header = ("setting", "value", "why")
    table = page.table("Values with reasons", header, with_reasons, ("", "", "wide"))

    others = [(key, _text_of(value)) for key, value in values.items() if key not in plan.reasons]
    other_table = page.table("Further values", ("setting", "value"), others)
    folded = page.folded(f"{len(others)} further values", other_table)
    return f"{table}\n{folded}"


def command_of(plan: Plan) -> str:
    """Return the command of the run, without options that have their default values.

    Paths may identify patients, so that each is replaced by PATH.
    """
    words = ["autoreg_pretrain", "--name", plan.name]
    for field, flag in FLAGS.items():
        value = plan.request.get(field)
        if value is None or value in DEFAULTS.get(field, (False, "", [], ())):
            continue

        words.append(flag)
        if value is True:
            continue
        for item in value if isinstance(value, list | tuple) else [value]:
            if field in PATH_FIELDS:
                words.append("PATH")
            elif field == "datasets":
                words.append(dataset_number(str(item)))
            else:
                words.append(str(item))
    return shlex.join(words)


def _provenance(plan: Plan, setting: RunSetting) -> str:
    """Return the table of command, versions, device and date."""
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    versions.append(f"Python {platform.python_version()}")

    device = f"{setting.device}, {counted(num_processes(), 'core')}"
    if setting.device == "cuda":
        import torch

        device = f"cuda, {torch.cuda.get_device_name()}"

    now = datetime.now().astimezone()
    rows = [
        ("command", command_of(plan)),
        ("device", device),
        ("versions", ", ".join(versions)),
        ("system", f"{platform.system()} {platform.release()} ({platform.machine()})"),
        ("written", f"{now:%Y-%m-%d %H:%M %Z}"),
        ("use", "research software, no medical device"),
    ]
    return page.table("How this page was made", ("what", "value"), rows, ("", "wide"))


def _embedded(picture: Path, text: str) -> str:
    """Return a picture of the run's folder, folded, with its data in the page; "" without it."""
    if not picture.is_file():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode()
    image = f'<img class="picture" alt="{escape(text)}" src="data:image/png;base64,{data}">'
    return page.folded(f"{text} ({picture.name})", image)


def _leaves(data: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    """Yield (dotted name, value) of all values in nested dictionaries."""
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _text_of(value: Any) -> str:
    """Return a value of the plan as one line of text; "-" if it is None or empty."""
    if value is None or value in ([], {}):
        return "-"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        # Three numbers are sizes along z, y and x; two are, for example, the betas of AdamW.
        is_size = len(value) == 3 and all(isinstance(item, int | float) for item in value)
        separator = " x " if is_size else ", "
        return separator.join(_text_of(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text_of(item)}" for key, item in value.items())
    return str(value)
