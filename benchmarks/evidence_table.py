"""From the lines of ``evidence.py`` to paired differences with their uncertainty, as Markdown.

Shape suffixes: R pretraining runs, D draws, J patients, N bootstrap samples.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from evidence_lines import Line
from numpy.typing import NDArray
from scipy import stats

from nnunet_autoreg import rng

Array = NDArray[np.float64]

SCRATCH = "scratch"
NUM_BOOTSTRAP = 10_000
FEW_DRAWS = 8
"""With fewer draws, a bootstrap over draws is too narrow. Then the t interval is shown as well."""
NORMAL_95 = 1.96
OF_PRETRAINED = {
    "transfer_decoder",
    "decoder_rate_factor",
    "decoder_first_fraction",
    "pretrained_rate",
}
"""Values of the recipe that change nothing if all weights are random."""


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two arms.

    Attributes:
        mean: over pretraining runs, draws and patients.
        sd: standard deviation of the difference of mean scores, over all pairs of a pretraining run
            and a draw.
        bootstrap: 95 % interval; runs, draws and patients are resampled, each independently.
        t_interval: 95 % interval of Student's t over draws; None with one draw, or with 8 and more.
        needed: pairs after which a 95 % interval would reach ``wanted`` to either side.
    """

    mean: float
    sd: float
    bootstrap: tuple[float, float]
    t_interval: tuple[float, float] | None
    needed: int | None
    num_runs: int
    num_draws: int
    num_patients: int


def compare(difference_RDJ: Array, wanted: float, num_bootstrap: int = NUM_BOOTSTRAP) -> Comparison:
    """Return the comparison of paired differences.

    Args:
        difference_RDJ: of every pretraining run, draw and patient; finite.
        wanted: the difference that one would like to show.
    """
    num_runs, num_draws, num_patients = difference_RDJ.shape
    pairs_RD = difference_RDJ.mean(axis=2)
    sd = float(pairs_RD.std(ddof=1)) if pairs_RD.size > 1 else math.nan

    generator = rng.generator(0, "evidence: bootstrap")
    weights = [_resampled(generator, n, num_bootstrap) for n in difference_RDJ.shape]
    means_N = np.einsum("nr,nd,nj,rdj->n", *weights, difference_RDJ, optimize=True)
    low, high = np.percentile(means_N, [2.5, 97.5])

    # Pretraining runs are no repetitions of a draw, so they are averaged first.
    draws_D = pairs_RD.mean(axis=0)
    t_interval = None
    if 1 < num_draws < FEW_DRAWS:
        mean = float(draws_D.mean())
        half = float(stats.t.ppf(0.975, num_draws - 1) * draws_D.std(ddof=1) / math.sqrt(num_draws))
        t_interval = (mean - half, mean + half)

    needed = None
    if math.isfinite(sd):
        needed = math.ceil((NORMAL_95 * sd / wanted) ** 2)
    return Comparison(
        mean=float(difference_RDJ.mean()),
        sd=sd,
        bootstrap=(float(low), float(high)),
        t_interval=t_interval,
        needed=needed,
        num_runs=num_runs,
        num_draws=num_draws,
        num_patients=num_patients,
    )


def _resampled(generator: np.random.Generator, count: int, num_bootstrap: int) -> Array:
    """Return the weights of bootstrap samples, (N, count): how often each item is drawn."""
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=num_bootstrap)
    return np.asarray(drawn / count, dtype=np.float64)


Scores = Mapping[str, float]
ScoresOf = Callable[[Line], Scores]


def patient_means(field: str) -> ScoresOf:
    """Return a function from a line to patient -> mean over classes, of "dice" or "surface"."""

    def means(line: Line) -> Scores:
        found = {}
        for patient, values in line[field].items():
            known = [value for value in values if value is not None]
            if known:
                found[patient] = float(np.mean(known))
        return found

    return means


def paired(ours: Sequence[Line], theirs: Sequence[Line], scores_of: ScoresOf) -> Array | None:
    """Return the differences (R, D, J) of two arms, ours minus theirs.

    A draw counts if both arms have it with every pretraining seed that they share. A run from
    scratch, which has no pretraining seed, is compared with every seed of the other arm. Patients
    that lack a score in any run are left out. None if the arms have nothing in common.
    """
    our_runs, their_runs = _by_run(ours), _by_run(theirs)
    our_seeds = sorted({seed for seed, _ in our_runs}, key=str)
    their_seeds = {seed for seed, _ in their_runs}
    partner = {seed: None if their_seeds == {None} else seed for seed in our_seeds}
    seeds = [seed for seed in our_seeds if partner[seed] in their_seeds]
    draws = []
    for draw in sorted({draw for _, draw in our_runs}):
        has_all = [(s, draw) in our_runs and (partner[s], draw) in their_runs for s in seeds]
        if has_all and all(has_all):
            draws.append(draw)
    if not draws:
        return None

    # (index of the seed, index of the draw) -> scores of both sides
    pairs: dict[tuple[int, int], tuple[Scores, Scores]] = {}
    for r, seed in enumerate(seeds):
        for d, draw in enumerate(draws):
            our_scores = scores_of(our_runs[seed, draw])
            pairs[r, d] = (our_scores, scores_of(their_runs[partner[seed], draw]))

    everywhere = [set(a) & set(b) for a, b in pairs.values()]
    patients = sorted(set.intersection(*everywhere))
    if not patients:
        return None
    difference_RDJ = np.zeros((len(seeds), len(draws), len(patients)))
    for position, (a, b) in pairs.items():
        difference_RDJ[position] = [a[patient] - b[patient] for patient in patients]
    return difference_RDJ


def _by_run(lines: Sequence[Line]) -> dict[tuple[int | None, int], Line]:
    """Return (pretraining seed, draw) -> line."""
    runs = {}
    for line in lines:
        runs[line["pretraining_seed"], line["draw"]] = line
    return runs


@dataclass(frozen=True)
class Arm:
    """The fine-tunings of one arm with one group of settings.

    Attributes:
        objective: of its pretraining; "scratch" without one, "" if the pretraining has no line.
    """

    name: str
    objective: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class ArmSetting:
    """The values that runs must share to be compared."""

    data: str
    encoder: str
    labels: int
    split: str
    steps: int

    def title(self) -> str:
        """Return the setting as a title."""
        patients = "patient" if self.labels == 1 else "patients"
        return (
            f"{self.data}, {self.encoder}, {self.labels} labelled {patients}, {self.steps} steps, "
            f"scored on {self.split} patients"
        )


def settings_of(lines: Sequence[Line]) -> dict[ArmSetting, list[Line]]:
    """Return the fine-tunings of each setting, sorted by setting."""
    found: dict[ArmSetting, list[Line]] = {}
    for line in lines:
        if line["command"] == "finetune":
            key = ArmSetting(
                line["set"],
                line["encoder"],
                line["labels"],
                line["split"],
                line["steps"],
            )
            found.setdefault(key, []).append(line)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def with_transfer_named(line: Line) -> Line:
    """Return a line whose settings say whether a pretrained decoder was transferred.

    Older lines name it only if it was not the planned value of that time, which has changed.
    """
    if line["command"] != "finetune" or line["pretraining_seed"] is None:
        return line
    settings, used = line["settings"], line["recipe"].get("transfer_decoder")
    is_named = any(item.startswith("transfer_decoder=") for item in settings["recipe"])
    if is_named or used is None or not line["encoder"].startswith("resenc"):
        return line
    recipe = [*settings["recipe"], f"transfer_decoder={str(used).lower()}"]
    return {**line, "settings": {**settings, "recipe": recipe}}


def arms_of(lines: Sequence[Line], objectives: Mapping[tuple[str, str], str]) -> list[Arm]:
    """Return the arms of one setting; an arm run with several values is one arm for each."""
    by_name: dict[str, dict[str, list[Line]]] = {}
    for line in lines:
        settings = json.dumps(line["settings"], sort_keys=True)
        by_name.setdefault(line["arm"], {}).setdefault(settings, []).append(line)

    arms = []
    for name, variants in sorted(by_name.items()):
        for settings, members in sorted(variants.items()):
            others = [json.loads(other) for other in variants]
            differing = _differing(json.loads(settings), others)
            is_scratch = name.split()[0] == SCRATCH
            known = objectives.get((members[0]["set"], name), "")
            objective = SCRATCH if is_scratch else known
            arms.append(Arm(f"{name} {differing}".strip(), objective, tuple(members)))
    return arms


def _differing(settings: Mapping[str, object], variants: Sequence[Mapping[str, object]]) -> str:
    """Return the values in which an arm's variants differ, as ``(lr=0.01)``; "" for one variant."""
    values = []
    for key, value in settings.items():
        if any(other.get(key) != value for other in variants):
            values.append(f"{key}={value}")
    return f"({', '.join(values)})" if values else ""


def contrasts(arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Yield the pairs to compare: pretrained with scratch, and autoregressive with masked.

    Both sides were fine-tuned with the same settings. Settings that only pretrained weights have,
    such as whether a decoder is transferred, are no difference to a run from random weights.
    """
    for ours in arms:
        for theirs in arms:
            our_settings = ours.lines[0]["settings"]
            their_settings = theirs.lines[0]["settings"]
            is_from_scratch = theirs.objective == SCRATCH and ours.objective != SCRATCH
            are_twins = (ours.objective, theirs.objective) == ("autoregressive", "masked")
            if is_from_scratch:
                our_settings = _without_weights(our_settings)
                their_settings = _without_weights(their_settings)
            if our_settings == their_settings and (is_from_scratch or are_twins):
                yield ours, theirs


def _without_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings without those that concern only pretrained weights."""
    kept = {key: value for key, value in settings.items() if key != "encoder_lr"}
    changed = settings.get("recipe", ())
    kept["recipe"] = [item for item in changed if item.partition("=")[0] not in OF_PRETRAINED]
    return kept


def table(lines: Sequence[Line], data: str | None, split: str | None, wanted: float) -> str:
    """Return all results as Markdown: pretrainings, then the arms of every setting.

    Args:
        data, split: set and split to show; None for all.
        wanted: the difference for which the number of pairs is planned.
    """
    lines = [with_transfer_named(line) for line in lines]
    pretrainings = []
    objectives = {}
    for line in lines:
        if line["command"] == "pretrain" and data in (None, line["set"]):
            pretrainings.append(line)
            objectives[line["set"], line["arm"]] = line["objective"]

    parts = []
    if pretrainings:
        parts += ["## Pretraining", _pretraining_rows(pretrainings)]
    for setting, members in settings_of(lines).items():
        if data not in (None, setting.data) or split not in (None, setting.split):
            continue
        arms = arms_of(members, objectives)
        parts += [f"## {setting.title()}", _arm_rows(arms), _difference_rows(arms, wanted)]
    parts += _probe_parts(lines, data, split, wanted)
    return "\n\n".join(part for part in parts if part) or "no results yet"


def _probe_parts(
    lines: Sequence[Line],
    data: str | None,
    split: str | None,
    wanted: float,
) -> list[str]:
    """Return the titles and tables of the dense probes."""
    groups: dict[tuple[str, str, str, int], list[Line]] = {}
    for line in lines:
        is_shown = data in (None, line["set"]) and split in (None, line.get("split"))
        if line["command"] != "probe" or not is_shown:
            continue
        for result in line["results"]:
            # One line for each draw, as of fine-tunings.
            expanded = {**line, **result, "arm": f"{line['arm']}, {result['levels']}"}
            key = (line["set"], line["encoder"], line["split"], result["labels"])
            groups.setdefault(key, []).append(expanded)

    parts = []
    for (name, encoder, scored, labels), members in sorted(groups.items()):
        title = f"{name}, {encoder}, dense probe, {labels} labelled patients, scored on {scored}"
        parts += [f"## {title} patients", _probe_rows(members, wanted)]
    return parts


def _probe_rows(lines: Sequence[Line], wanted: float) -> str:
    """Return the probes of one setting: their Dice, and the difference to random weights."""
    header = ["arm", "probes", "Dice", "difference to random", "95 % bootstrap", "sd of a pair"]
    by_arm: dict[str, list[Line]] = {}
    for line in lines:
        by_arm.setdefault(line["arm"], []).append(line)

    rows = []
    for arm, members in by_arm.items():
        means = [np.mean(list(line["dice"].values())) for line in members]
        levels = members[0]["levels"]
        # Weights with other tokens have other features, so their own random twin comes first.
        name = arm.removesuffix(f", {levels}")
        of_same_tokens = by_arm.get(f"random (like {name}), {levels}")
        random = of_same_tokens or by_arm.get(f"random, {levels}", [])
        difference = None
        if random and members[0]["pretraining_seed"] is not None:
            difference = paired(members, random, lambda line: line["dice"])
        cells = ["-", "-", "-"]
        if difference is not None:
            found = compare(difference, wanted)
            sd = f"{found.sd:.4f}" if math.isfinite(found.sd) else "-"
            cells = [f"{found.mean:+.4f}", _interval(found.bootstrap), sd]
        rows.append([arm, len(members), f"{np.mean(means):.4f}", *cells])
    return markdown(header, rows)


def _pretraining_rows(lines: Sequence[Line]) -> str:
    header = [
        "set",
        "arm",
        "seed",
        "encoder",
        "objective",
        "steps",
        "crops",
        "PFLOPs",
        "seconds",
        "first loss",
        "last loss",
    ]
    rows = []
    for line in lines:
        losses = [f"{value:.4f}" for _, value in line["loss"]] or ["-"]
        petaflops = line["flops_per_step"] * line["steps"] / 1e15
        sizes = [line["steps"], line["samples"], f"{petaflops:.3g}", f"{line['seconds']:.0f}"]
        who = [
            line["set"],
            line["arm"],
            line["pretraining_seed"],
            line["encoder"],
            line["objective"],
        ]
        rows.append([*who, *sizes, losses[0], losses[-1]])
    return markdown(header, rows)


def _arm_rows(arms: Sequence[Arm]) -> str:
    header = [
        "arm",
        "runs",
        "Dice",
        "sd over runs",
        "surface Dice",
        "Dice on the way",
        "PFLOPs",
        "s / step",
    ]
    rows = []
    for arm in arms:
        dice = [line["dice_mean"] for line in arm.lines]
        surface = float(np.mean([line["surface_mean"] for line in arm.lines]))
        petaflops = (
            float(np.mean([line["flops_per_step"] * line["steps"] for line in arm.lines])) / 1e15
        )
        pace = float(np.median([line["seconds"] / line["steps"] for line in arm.lines]))
        sd = f"{np.std(dice, ddof=1):.4f}" if len(dice) > 1 else "-"
        score = [f"{np.mean(dice):.4f}", sd, f"{surface:.4f}", _on_the_way(arm)]
        rows.append([arm.name, len(dice), *score, f"{petaflops:.3g}", f"{pace:.3f}"])
    return markdown(header, rows)


def _on_the_way(arm: Arm) -> str:
    """Return the mean Dice at the earlier steps that every run was scored at."""
    common = set.intersection(*(set(line["curve"]) for line in arm.lines))
    found = []
    for step in sorted(common, key=int):
        means = [np.nanmean(list(line["curve"][step].values())) for line in arm.lines]
        found.append(f"{step}: {np.mean(means):.4f}")
    return ", ".join(found) or "-"


def _difference_rows(arms: Sequence[Arm], wanted: float) -> str:
    header = [
        "difference",
        "score",
        "mean",
        "sd of a pair",
        "95 % bootstrap",
        "95 % t over draws",
        "runs x draws x patients",
        f"pairs for {wanted:g}",
    ]
    rows = []
    for ours, theirs in contrasts(arms):
        for score, scores_of in scores_to_compare(ours, theirs):
            difference = paired(ours.lines, theirs.lines, scores_of)
            if difference is None:
                continue
            found = compare(difference, wanted)
            size = f"{found.num_runs} x {found.num_draws} x {found.num_patients}"
            sd = f"{found.sd:.4f}" if math.isfinite(found.sd) else "-"
            needed = "-" if found.needed is None else found.needed
            intervals = [_interval(found.bootstrap), _interval(found.t_interval)]
            name = f"{ours.name} - {theirs.name}"
            rows.append([name, score, f"{found.mean:+.4f}", sd, *intervals, size, needed])
    return markdown(header, rows) if rows else ""


def scores_to_compare(ours: Arm, theirs: Arm) -> Iterator[tuple[str, ScoresOf]]:
    """Yield the scores that two arms share: at earlier steps, at the end, and of surfaces."""
    scored_steps = [set(line["curve"]) for line in (*ours.lines, *theirs.lines)]
    common = set.intersection(*scored_steps)
    for step in sorted(common, key=int):
        yield f"Dice at {step}", at_step(step)
    yield "Dice", patient_means("dice")
    yield "surface Dice", patient_means("surface")


def at_step(step: str) -> ScoresOf:
    """Return a function from a line to patient -> mean Dice at an earlier step."""

    def means(line: Line) -> Scores:
        dice = line["curve"][step]
        return {patient: value for patient, value in dice.items() if math.isfinite(value)}

    return means


def _interval(interval: tuple[float, float] | None) -> str:
    if interval is None:
        return "-"
    low, high = interval
    return f"{low:+.4f} to {high:+.4f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in rows:
        cells = [str(cell) for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
