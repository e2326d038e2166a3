"""``report.html``: one self-contained page on a run - what went in, what was planned, whether it
learns, what to type next.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from nnunet_autoreg.corpus.rows import read_index
from nnunet_autoreg.geometry import grid_of, volume
from nnunet_autoreg.nnunet_api import dataset_number
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import to_jsonable, write_text
from nnunet_autoreg.report import page
from nnunet_autoreg.report.curves import Line, Points, chart
from nnunet_autoreg.report.metrics import read_lines
from nnunet_autoreg.report.scans import scans_section
from nnunet_autoreg.report.slices import Picture, panels

log = logging.getLogger(__name__)

REPORT_NAME = "report.html"
FAR = 1.2
"""A baseline this much above all other curves would flatten them."""
BASELINES = {"heldout_copy": "copying the previous block", "heldout_mean": "predicting the mean"}
Series = Mapping[str, Points]


@dataclass(frozen=True)
class Setting:
    """What the folder does not say: where the run trains, and on how many scans."""

    device: str
    num_training: int
    num_heldout: int


class Reporter:
    """Writes ``report.html`` into a run's folder, from its scans.csv, which is read once, and its
    metrics.jsonl, read each time.
    """

    def __init__(self, folder: Path, plan: Plan, setting: Setting):
        self.folder, self.plan, self.setting = folder, plan, setting
        self.scans = ""

    def write(self, make_pictures: Callable[[], Sequence[Picture]]) -> None:
        """Write the report, whole or not at all.

        A report that fails is named in the log and ends no training.
        """
        try:
            rows = () if self.scans else read_index(self.folder / "scans.csv", is_private=False)
            self.scans = self.scans or scans_section(
                rows, self.setting.num_training, self.setting.num_heldout
            )
            logged = read_series(self.folder), read_notes(self.folder)
            text = report(self.plan, self.setting, *logged, self.scans, make_pictures())
            write_text(self.folder / REPORT_NAME, text)
        except Exception as error:
            log.warning(
                "%s could not be written (%s: %s); training goes on",
                self.folder / REPORT_NAME,
                type(error).__name__,
                error,
            )


def read_series(folder: Path) -> Series:
    """Metric -> (steps done, value), as logged so far."""
    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in read_lines(folder / "metrics.jsonl"):
        if line["unit"] != "text":
            series[str(line["name"])].append((line["step"] + 1, line["value"]))
    return series


def read_notes(folder: Path) -> list[str]:
    """What was said in words, "step n: ...", the latest first."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["unit"] == "text"]
    return [f"step {line['step'] + 1:,}: {line['value']}" for line in reversed(lines)]


def report(
    plan: Plan,
    setting: Setting,
    series: Series,
    notes: Sequence[str],
    scans: str,
    pictures: Sequence[Picture],
) -> str:
    """The whole page; ``scans`` is the section on what went in, ``notes`` what training said in
    words, the latest first.
    """
    body = [
        f"<header><h1>Pretraining: {escape(plan.name)}</h1>{_contents()}</header>\n<main>",
        _verdict(plan, series, notes),
        _tiles(plan, setting, series),
        _next(plan, series),
        scans,
        _learning(plan, series),
        _health(series),
        _pictures(pictures, setting),
        _cost(plan, setting, series),
        _plan(plan),
        "</main>",
    ]
    return page.page(f"Pretraining {plan.name}", body)


def _contents() -> str:
    links = (
        ("next", "Next"),
        ("scans", "What went in"),
        ("learning", "Does it learn?"),
        ("pictures", "Pictures"),
        ("cost", "Time and memory"),
        ("plan", "Plan"),
    )
    return (
        '<nav aria-label="Contents">'
        + "".join(f'<a href="#{name}">{title}</a>' for name, title in links)
        + "</nav>"
    )


def _last(series: Series, name: str) -> float | None:
    return series[name][-1][1] if series.get(name) else None


def _last_step(series: Series, name: str) -> float:
    return series[name][-1][0] if series.get(name) else 0


def steps_done(series: Series) -> int:
    """The last step that anything was logged for."""
    return int(max((points[-1][0] for points in series.values() if points), default=0))


def verdict(plan: Plan, series: Series) -> tuple[bool, str]:
    """Whether the encoder learns, in words; the flag says whether all is as hoped."""
    error = _last(series, "heldout_error")
    references = {name: value for name in BASELINES if (value := _last(series, name)) is not None}
    if error is None or not references:
        return (
            False,
            "Nothing says whether it learns: no scan was held out (that takes two cases or more), "
            "or none was looked at yet.",
        )
    against = " and ".join(
        f"{value:.3f} for {BASELINES[name]}" for name, value in references.items()
    )
    best = min(references.values())
    figures = f"held-out next-block error {error:.3f}, against {against}"
    if error < best:
        return (
            True,
            f"It learns: {figures} - {100 * (1 - error / best):.0f} % below the better of the two. "
            "Lower is better.",
        )
    if steps_done(series) <= plan.optim.warmup_steps:
        return True, f"Too early to say: {figures}; the rate is still warming up."
    return (
        False,
        f"It has not learned to predict yet: {figures}. Train longer, or look at the pictures and "
        "at scans.csv.",
    )


def _verdict(plan: Plan, series: Series, notes: Sequence[str]) -> str:
    good, words = verdict(plan, series)
    said = page.paragraph(words, "verdict" if good else "verdict warn")
    latest = f"step {int(_last_step(series, 'heldout_error')):,}: "
    said += "".join(
        page.paragraph(f"At {note}", "verdict warn") for note in notes if note.startswith(latest)
    )
    earlier = [(note,) for note in notes if not note.startswith(latest)]
    if not earlier:
        return said
    return said + page.folded(
        f"Earlier warnings: {len(earlier)}", page.table("Earlier warnings", ("warning",), earlier)
    )


def _seconds(series: Series) -> float:
    """Time spent in steps, from the means that were logged."""
    total, before = 0.0, 0.0
    for step, seconds in series.get("step_time", ()):
        total, before = total + seconds * (step - before), step
    return total


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _typical(points: Points) -> float | None:
    """The median of the last half of a series."""
    late = sorted(value for _, value in points[len(points) // 2 :])
    return late[len(late) // 2] if late else None


def _tiles(plan: Plan, setting: Setting, series: Series) -> str:
    done, error = steps_done(series), _last(series, "heldout_error")
    speed, memory = _typical(series.get("tokens_per_second", ())), _last(series, "peak_memory")
    state = "finished" if done >= plan.optim.num_steps else "not finished"
    values = [
        ("steps", f"{done:,} of {plan.optim.num_steps:,}", state),
        (
            "scans",
            f"{setting.num_training + setting.num_heldout:,}",
            f"{setting.num_heldout:,} of them held out",
        ),
        (
            "held-out error",
            "-" if error is None else f"{error:.3f}",
            _NOTHING_COSTS.get(plan.objective.target, ""),
        ),
        ("time in steps", _duration(_seconds(series)), f"on {setting.device}"),
    ]
    if speed is not None:
        values.append(("speed", f"{speed:,.0f}", "tokens per second"))
    if memory is not None:
        values.append(("memory", f"{memory:.1f} GiB", _memory_of(setting)))
    return page.tiles(values)


def _memory_of(setting: Setting) -> str:
    return "peak, allocated on the GPU" if setting.device == "cuda" else "peak, main process"


def _next(plan: Plan, series: Series) -> str:
    done = steps_done(series)
    if done < plan.optim.num_steps:
        text = (
            f"The last step logged is {done:,} of {plan.optim.num_steps:,}. Should the run have "
            "stopped, type the same "
            "autoreg_pretrain line again: it continues from its last checkpoint."
        )
        return page.section("next", "What to type next", page.paragraph(text))
    number = _dataset_number(plan)
    lines = [
        f"export autoreg_weights={plan.name}",
        f"nnUNetv2_plan_and_preprocess -d {number} -pl AutoregPlanner",
        f"nnUNetv2_train {number} 3d_fullres 0 -tr AutoregPretrainedTrainer -p AutoregPlans --npz",
    ]
    whose = " (put its number for ID)" if number == "ID" else ""
    text = (
        f"Fine-tune on a labelled nnU-Net dataset{whose}; then folds 1 to 4 likewise, --c resumes:"
    )
    return page.section("next", "What to type next", page.paragraph(text), page.commands(lines))


def _dataset_number(plan: Plan) -> str:
    """Of the first dataset that was asked for; "ID" if there was none."""
    named = [str(dataset) for dataset in plan.request.get("datasets", ())]
    return dataset_number(named[0]) if named else "ID"


def _learning(plan: Plan, series: Series) -> str:
    def line(label: str, name: str, look: str = "main") -> Line:
        return Line(label, series.get(name, ()), look)

    errors = [
        line("held-out", "heldout_error"),
        line("training", "train_error", "second"),
        line("mean", "heldout_mean", "base2"),
    ]
    copy, highest = (
        _last(series, "heldout_copy"),
        max((value for drawn in errors for _, value in drawn.points), default=0.0),
    )
    note = _MEAN_IS[plan.objective.target == "normalised"]
    if copy is not None and copy > FAR * highest:
        note += f" Copying the previous block costs {copy:.3g}, above this chart."
    elif copy is not None:
        errors.append(line("copy", "heldout_copy", "base"))
        note += " Dashed: copying the previous block."
    charts = [
        chart("Next-block error", "per voxel", errors, note),
        *_by_kind(series),
        chart("Learning rate", f"peak {plan.optim.lr:.3g}", (line("rate", "lr", "second"),)),
        chart(
            "Gradient norm",
            "before clipping",
            (line("norm", "gradient_norm", "second"),),
            f"Clipped at {plan.optim.clip_norm:g}.",
            logarithmic=True,
        ),
        chart("Time per step", "s", (line("seconds", "step_time", "second"),)),
        chart("Waiting for data", "share of time", (line("share", "data_wait", "second"),)),
    ]
    text = _TARGET_IS[plan.objective.target]
    return page.section(
        "learning",
        "Does it learn?",
        page.paragraph(text),
        f'<div class="charts">{"".join(charts)}</div>',
    )


_NOTHING_COSTS = {"normalised": "predicting nothing gives about 1"}
_MEAN_IS = {
    True: "Dotted: predicting each token's mean.",
    False: "Dotted: predicting the mean of the scan.",
}
_TARGET_IS = {
    "normalised": "Voxels are normalised within each token, so that an error of 1 is what "
    "predicting nothing but the mean costs; "
    "lower is better.",
    "normalised_with_statistics": "The error is a sum of three: of voxels normalised within each "
    "token, of the token's mean, and of "
    "the logarithm of its deviation; lower is better.",
    "voxels": "Voxels are compared as they are, in standard deviations of the scan; lower is "
    "better.",
}

BY_KIND = "heldout_error_"


def _by_kind(series: Series) -> list[str]:
    """The held-out error of each kind of sequences, where there are several."""
    names = [name for name in series if name.startswith(BY_KIND)]
    looks = ("main", "second", "base", "base2")
    lines = [
        Line(name.removeprefix(BY_KIND), series[name], look)
        for name, look in zip(names, looks, strict=False)
    ]
    return [chart("Held-out error by kind of sequences", "per voxel", lines)] if lines else []


HEALTH = {
    "token_variance": (
        "Token variance",
        "share",
        "How much of the features depends on the image, not on the place; near 0: a collapse.",
    ),
    "effective_rank": (
        "Effective rank",
        "directions",
        "Over how many directions the features spread; near 1: a collapse.",
    ),
}
PROBES = {"probe_features": "main", "probe_voxels": "base", "probe_chance": "base2"}


def _health(series: Series) -> str:
    """Health and probes, where they were measured; whatever else was logged comes after them."""
    shown = {
        "train_error",
        "heldout_error",
        *BASELINES,
        "lr",
        "gradient_norm",
        "step_time",
        "tokens_per_second",
        "peak_memory",
        "share_of_peak",
        "data_wait",
    }
    charts = [
        chart(title, unit, (Line("now", series[name]),), note)
        for name, (title, unit, note) in HEALTH.items()
        if name in series
    ]
    probes = [
        Line(name.removeprefix("probe_"), series[name], look)
        for name, look in PROBES.items()
        if name in series
    ]
    charts.append(
        chart(
            "Frozen probe on labels",
            "balanced accuracy, other subjects",
            probes,
            "Labels told from the frozen features by a linear reading, against the same from raw "
            "voxels.",
        )
    )
    rest = sorted(
        name
        for name in series
        if name not in shown
        and name not in HEALTH
        and name not in PROBES
        and not name.startswith(BY_KIND)
    )
    charts += [
        chart(
            name.replace("_", " ").capitalize(),
            "from metrics.jsonl",
            (Line("now", series[name], "second"),),
        )
        for name in rest
    ]
    drawn = "".join(charts)
    return (
        page.section("health", "Health and probes", f'<div class="charts">{drawn}</div>')
        if drawn
        else ""
    )


def _pictures(pictures: Sequence[Picture], setting: Setting) -> str:
    if not pictures:
        why = "no case was held out" if not setting.num_heldout else "none was drawn yet"
        return page.section(
            "pictures",
            "Held-out scans: true and predicted",
            page.paragraph(f"There are no pictures: {why}."),
        )
    text = (
        "Each row is a slice of a held-out scan. The blue part was given; every further block was "
        "predicted from the true blocks before "
        "it, not from earlier predictions. Only a token's pattern is predicted: its mean and "
        "deviation are put back from the truth, so "
        'the coarse look of a prediction is not its own, and "nothing predicted" shows how much of '
        "it comes for free. Judge the detail "
        'that "predicted" adds. Error: absolute difference. Hatched: padding, or nothing to '
        "predict."
    )
    figures = "".join(_figure(number, picture) for number, picture in enumerate(pictures, start=1))
    return page.section(
        "pictures",
        "Held-out scans: true and predicted",
        page.paragraph(text),
        '<p class="soft">error: none <span class="bar" aria-hidden="true"></span> half of the grey '
        "range</p>",
        figures,
    )


def _figure(number: int, picture: Picture) -> str:
    planes = []
    for cut in picture.slices:
        cells = "".join(
            f"<div><span>{escape(title)}</span>{svg}</div>" for title, svg in panels(cut)
        )
        planes.append(f'<p class="soft">{escape(cut.name)}</p><div class="panels">{cells}</div>')
    title = f"Sample {number}: {picture.num_given:,} of {picture.num_blocks:,} blocks given"
    return (
        f'<figure aria-label="{escape(title)}"><h3>{escape(title)}</h3>{"".join(planes)}</figure>'
    )


def _cost(plan: Plan, setting: Setting, series: Series) -> str:
    tokens = volume(grid_of(plan.sequence.crop_size_vox, plan.encoder.token_size_vox))
    seconds, done = _typical(series.get("step_time", ())), steps_done(series)
    rows: list[tuple[str, str, str]] = [
        ("trained on", setting.device, ""),
        ("tokens per crop", f"{tokens:,}", "padding included"),
        ("crops per step", f"{plan.optim.batch_size:,}", ""),
    ]
    if seconds:
        rows += [
            ("seconds per step", f"{seconds:.3g}", "median of the later half"),
            ("steps per second", f"{1 / seconds:.3g}", ""),
            ("tokens per second", f"{plan.optim.batch_size * tokens / seconds:,.0f}", ""),
            (
                "time in steps so far",
                _duration(_seconds(series)),
                "reading and preprocessing come on top",
            ),
        ]
        if done < plan.optim.num_steps:
            rows.append(
                ("time left", _duration(seconds * (plan.optim.num_steps - done)), "at this speed")
            )
    memory, share = _last(series, "peak_memory"), _typical(series.get("share_of_peak", ()))
    waits = _typical(series.get("data_wait", ()))
    if waits is not None:
        rows.append(
            (
                "waiting for data",
                f"{100 * waits:.0f} %",
                "of the time in steps, on the host's clock",
            )
        )
    if memory is not None:
        rows.append(("memory", f"{memory:.2f} GiB", _memory_of(setting)))
    if share is not None:
        rows.append(
            (
                "share of the device's peak",
                f"{100 * share:.0f} %",
                "of a large bf16 matrix product; attention counted dense",
            )
        )
    return page.section(
        "cost",
        "Time and memory",
        page.table("Time and memory", ("what", "value", "remark"), rows, ("", "n", "wide")),
    )


def _plan(plan: Plan) -> str:
    values = dict(
        _leaves(
            {
                key: value
                for key, value in to_jsonable(plan).items()
                if key not in ("request", "reasons")
            }
        )
    )
    chosen = [(key, _shown(_at(plan, key, values)), reason) for key, reason in plan.reasons.items()]
    rest = [(key, _shown(value)) for key, value in values.items() if key not in plan.reasons]
    return page.section(
        "plan",
        "The plan",
        page.paragraph(
            "Every value that was chosen for this run, and why. plan.json has them all."
        ),
        page.table("Values with reasons", ("setting", "value", "why"), chosen, ("", "", "wide")),
        page.folded(
            f"{len(rest)} further values", page.table("Further values", ("setting", "value"), rest)
        ),
    )


def _leaves(data: Mapping[str, Any], where: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        name = f"{where}.{key}" if where else str(key)
        if isinstance(value, dict) and value:
            yield from _leaves(value, name)
        else:
            yield name, value


def _at(plan: Plan, key: str, values: Mapping[str, Any]) -> Any:
    """The value of a reason's key, which may be a record: then what lies below it."""
    if key in values:
        return values[key]
    return {
        name.removeprefix(f"{key}."): value
        for name, value in values.items()
        if name.startswith(f"{key}.")
    }


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, list):
        numbers = all(isinstance(v, (int, float)) for v in value)
        return (" x " if numbers else ", ").join(_shown(v) for v in value) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items()) or "-"
    return "-" if value is None else str(value)
