"""Describe a benchmark before it runs: the split of the patients, the trainings and their time."""

from collections.abc import Sequence

from nnunet_autoreg.benchmark.prepare import Bench, expected_pretrainings
from nnunet_autoreg.benchmark.protocol import BenchmarkRequest, runs_of, twin_arms
from nnunet_autoreg.benchmark.split import CROSS_VALIDATION, SMALL_TEST
from nnunet_autoreg.corpus.private import public_dataset
from nnunet_autoreg.wording import counted, duration


def division_lines(bench: Bench) -> list[str]:
    """Return lines about the split of the patients."""
    record, request = bench.record, bench.request
    lines = [record.rule] if record.rule else []
    num_patients = len(set(record.subjects.values()))
    lines += [
        f"--labels counts {record.label_unit}",
        f"{public_dataset(request.dataset)}: {len(record.subjects)} labelled cases of "
        f"{num_patients} patients",
    ]

    # A case is one scan; a patient may have several.
    def patients_of(cases: Sequence[str]) -> int:
        return len({record.subjects[case] for case in cases})

    num_tested = [patients_of(record.scored(split)) for split in request.splits]
    if request.split == CROSS_VALIDATION:
        sizes = " or ".join(map(str, sorted(set(num_tested))))
        num_labels = min(map(record.num_available, request.splits))
        lines.append(
            f"{counted(len(num_tested), 'fold')} of {sizes} patients, who are scored by networks "
            f"that did not see them; up to {counted(num_labels, 'labelled patient')} in a training",
        )
        return lines

    uses = {"pool": "may be labelled", "development": "for choices", "test": "for the result"}
    parts = []
    for name, use in uses.items():
        cases = getattr(record.division, name)
        patients = counted(patients_of(cases), "patient")
        parts.append(f"{name} {len(cases)} ({patients}, {use})")
    lines.append(", ".join(parts))
    if num_tested[0] < SMALL_TEST:
        lines.append(
            f"scores of {counted(num_tested[0], 'patient')} say little; with --split "
            f"{CROSS_VALIDATION} every patient is scored once",
        )
    return lines


def trainings_line(request: BenchmarkRequest, num_jobs: int) -> str:
    """Return how many trainings there are and, of a time budget, how long they take."""
    lengths = request.steps or request.budget_min
    num_runs = len([*runs_of(request, range(len(lengths)), 1)])
    text = f"{counted(num_runs, 'training')}, {num_jobs} at a time"
    seconds = training_seconds(request, num_jobs)
    if seconds is None:
        steps = " or ".join(f"{steps:,}" for steps in lengths)
        return f"{text}, of {steps} steps"

    # Weights that are given need no pretraining, but a twin with another objective does.
    is_pretrained = request.weights and not set(request.arms) & set(twin_arms())
    pretraining = "" if is_pretrained else "pretraining, "
    return f"{text}: about {duration(seconds)}, plus {pretraining}prediction and scoring"


def pretraining_lines(bench: Bench, num_jobs: int) -> list[str]:
    """Return the time of the missing pretrainings, and the total time with the trainings."""
    expected = expected_pretrainings(bench)
    lines = [str(pretraining) for pretraining in expected]
    seconds = [one.seconds for one in expected if one.seconds is not None]

    # A total needs the time of every pretraining.
    if not expected or len(seconds) < len(expected):
        return lines
    training_s = training_seconds(bench.request, num_jobs)
    if training_s is None:
        return [*lines, "the trainings are timed after pretraining"]
    total = duration(sum(seconds) + training_s)
    return [*lines, f"in all about {total}, plus preprocessing, prediction and scoring"]


def training_seconds(request: BenchmarkRequest, num_jobs: int) -> float | None:
    """Return how long all trainings of a time budget take; None if steps are given."""
    if not request.budget_min:
        return None
    num_runs_of_a_length = len([*runs_of(request, [0], 1)])
    return 60 * num_runs_of_a_length * sum(request.budget_min) / num_jobs
