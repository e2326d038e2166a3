"""Measure how good the pairs of Alice are, and how much memory a step on them takes.

    python benchmarks/evidence.py prepare --raw RAW --data ixi
    python benchmarks/alice.py pairs --data ixi
    python benchmarks/alice.py memory --encoder primus_tiny resenc_tiny

``pairs`` measures how far apart the two crops of a pair really are. The pairs are those that
training uses if no labels are given: places that look alike. The labels of the prepared set show
where they should be. A place is carried from one patient to the other by the structure whose
centroid is nearest to it and that both patients have: the true partner lies at the same offset from
that structure's centroid. The pairs are compared with three simple rules: the same voxel, the same
share of each axis, and a random place.

``memory`` compares the planner's estimate of a step on pairs with the measured peak on a CPU.

Each result is one JSON line in ``benchmarks/results/objectives.jsonl``.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from evidence_data import SETS, ResidentSet, load_set
from evidence_lines import Line, ResultFile, circumstances
from evidence_pretrain import PretrainJob, plan_of, sampling_pool
from measuring import peak_bytes
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.model.memory import CONTEXT_BYTES
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.dry_run import plan_memory
from nnunet_autoreg.pretrain.training_step import TrainingStep
from nnunet_autoreg.sampling.pool import StoredLocation
from nnunet_autoreg.sampling.sample import Batch

RESULTS = Path(__file__).parent / "results" / "objectives.jsonl"
OBJECTIVE = "alice"
CPU = torch.device("cpu")

NUM_RESAMPLED = 1000
SMALLER_HALF = 1 / 3
"""A structure has two halves if its second largest part is at least this large beside the first."""
QUARTILES = (25, 50, 75)

Point = NDArray[np.float64]
Centroids = Mapping[tuple[int, str], Point]
"""(class, "left", "right" or "whole") -> (z, y, x) in voxels."""


def centroids_of(labels_ZYX: NDArray[np.uint8], classes: Sequence[int]) -> Centroids:
    """Return the centroids of the structures of a scan; halves of paired structures separately."""
    found: dict[tuple[int, str], Point] = {}
    for value in classes:
        parts_ZYX, num_parts = ndimage.label(labels_ZYX == value)
        if num_parts == 0:
            continue
        sizes = np.bincount(parts_ZYX.ravel())[1:]
        first, *others = np.argsort(-sizes, kind="stable")[:2] + 1
        is_paired = bool(others) and sizes[others[0] - 1] >= SMALLER_HALF * sizes[first - 1]
        if not is_paired:
            centre = ndimage.center_of_mass(labels_ZYX == value)
            found[value, "whole"] = np.array(centre)
            continue

        halves = [np.array(ndimage.center_of_mass(parts_ZYX == n)) for n in (first, others[0])]
        halves.sort(key=lambda centre: float(centre[2]))
        for side, centre in zip(("left", "right"), halves, strict=True):
            found[value, side] = centre
    return found


def true_partner(
    place: Point,
    first: Centroids,
    second: Centroids,
    spacing_mm: Point,
) -> tuple[Point, float] | None:
    """Return where a place of one patient lies in another, and its distance to the centroid used.

    None where the patients have no structure in common. The distance is in mm.
    """
    common = [key for key in first if key in second]
    if not common:
        return None
    distances = [float(np.linalg.norm((place - first[key]) * spacing_mm)) for key in common]
    nearest = common[int(np.argmin(distances))]
    return place - first[nearest] + second[nearest], min(distances)


def partners_by_rule(
    place: Point,
    partner: Point,
    shapes: tuple[Point, Point],
    generator: np.random.Generator,
) -> dict[str, Point]:
    """Return the partner of a pair, and those that simple rules give."""
    first_shape, second_shape = shapes
    return {
        "pair": partner,
        "same voxel": place,
        "same share of each axis": (place + 0.5) / first_shape * second_shape - 0.5,
        "random": generator.uniform(size=3) * second_shape - 0.5,
    }


def measure_pairs(data: ResidentSet, results: ResultFile) -> None:
    """Write the errors of the pairs of a prepared set as one line."""
    job = PretrainJob(data.facts.name, "pairs", "resenc_tiny", OBJECTIVE, 0, 1, 1)
    structures = sampling_pool(plan_of(job, data, CPU), data).structures
    spacing_mm = np.array(data.facts.spacing_mm)

    # The last class of a brain is all the rest of it, which has no place.
    classes = [n for n, name in enumerate(data.facts.classes, start=1) if "other" not in name]
    centroids = {case: centroids_of(data.labels[case], classes) for case in data.division.pool}
    generator = np.random.default_rng(0)

    errors: dict[str, list[float]] = {}
    owners, offsets = [], []
    for structure in structures:
        query, *others = structure.locations
        for other in others:
            measured = _errors(query, other, centroids, data, generator)
            if measured is None:
                continue
            of_rules, offset = measured
            for rule, error in of_rules.items():
                errors.setdefault(rule, []).append(error)
            owners.append(query.subject)
            offsets.append(offset)

    line: Line = {
        "part": "pairs",
        "set": data.facts.name,
        "pairs": len(owners),
        "patients": len(set(owners)),
        "spacing_mm": list(data.facts.spacing_mm),
        "offset_from_centroid_mm": _quartiles(offsets),
        "centroid_carried_by_its_neighbour_mm": _quartiles(
            neighbour_errors(centroids, spacing_mm, generator),
        ),
        "error_mm": {},
    }
    for rule, of_rule in errors.items():
        line["error_mm"][rule] = {
            "quartiles": _quartiles(of_rule),
            "mean": round(float(np.mean(of_rule)), 2),
            "median_95": _interval(of_rule, owners),
        }
    results.append({**line, **circumstances(CPU)})
    for rule, numbers in line["error_mm"].items():
        print(f"{data.facts.name}, {rule}: {numbers}")


def _errors(
    query: StoredLocation,
    other: StoredLocation,
    centroids: Mapping[str, Centroids],
    data: ResidentSet,
    generator: np.random.Generator,
) -> tuple[dict[str, float], float] | None:
    """Return the error of every rule in mm, and how far the place lies from the centroid used."""
    first, second = query.case.name, other.case.name  # type: ignore[attr-defined]
    spacing_mm = np.array(data.facts.spacing_mm)
    place, partner = np.array(query.centre_vox), np.array(other.centre_vox)
    true = true_partner(place, centroids[first], centroids[second], spacing_mm)
    if true is None:
        return None
    expected, offset = true

    shapes = (np.array(query.case.shape_vox), np.array(other.case.shape_vox))
    found = {}
    for rule, point in partners_by_rule(place, partner, shapes, generator).items():
        found[rule] = float(np.linalg.norm((point - expected) * spacing_mm))
    return found, offset


def neighbour_errors(
    centroids: Mapping[str, Centroids],
    spacing_mm: Point,
    generator: np.random.Generator,
) -> list[float]:
    """Return how well a centroid is carried over by its nearest other structure, in mm.

    This is the uncertainty of the measurement itself, since anatomy differs between patients.
    """
    cases = sorted(centroids)
    found = []
    for _ in range(len(cases)):
        one, two = generator.choice(len(cases), 2, replace=False)
        first, second = centroids[cases[one]], centroids[cases[two]]
        for key in first:
            others = {other: centre for other, centre in first.items() if other != key}
            true = true_partner(first[key], others, second, spacing_mm)
            if key in second and true is not None:
                found.append(float(np.linalg.norm((true[0] - second[key]) * spacing_mm)))
    return found


def _quartiles(values: Sequence[float]) -> list[float]:
    return [round(float(value), 2) for value in np.percentile(values, QUARTILES)]


def _interval(errors: Sequence[float], owners: Sequence[str]) -> list[float]:
    """Return the 95 % bootstrap interval of the median; patients are resampled."""
    generator = np.random.default_rng(0)
    by_owner: dict[str, list[float]] = {}
    for owner, error in zip(owners, errors, strict=True):
        by_owner.setdefault(owner, []).append(error)
    names = sorted(by_owner)

    medians = []
    for _ in range(NUM_RESAMPLED):
        chosen = generator.integers(len(names), size=len(names))
        drawn = np.concatenate([by_owner[names[number]] for number in chosen])
        medians.append(float(np.median(drawn)))
    return [round(float(value), 2) for value in np.percentile(medians, (2.5, 97.5))]


def measure_memory(data: ResidentSet, encoder: str, pairs: int, results: ResultFile) -> None:
    """Write estimate and measured peak of a step on some pairs as one line."""
    job = PretrainJob(data.facts.name, "memory", encoder, OBJECTIVE, 0, 10, pairs)
    plan = plan_of(job, data, CPU)
    plan = replace(plan, optim=replace(plan.optim, micro_batch_size=pairs))
    estimate = plan_memory(plan, half=False).total_bytes(pairs) - CONTEXT_BYTES

    peak = peak_of_step(plan, pairs)
    line = {
        "part": "memory",
        "encoder": encoder,
        "crop_vox": list(plan.sequence.crop_size_vox),
        "pairs": pairs,
        "estimated_gib": round(estimate / 2**30, 4),
        "measured_gib": round(peak / 2**30, 4),
        "estimate_over_measured": round(estimate / peak, 3),
    }
    results.append({**line, **circumstances(CPU)})
    print(line)


def peak_of_step(plan: Plan, num_pairs: int) -> int:
    """Return the bytes at the peak of the second of two steps, which has moments."""
    torch.manual_seed(0)
    objective = build_objective(plan)
    step = TrainingStep(plan, objective, CPU)
    objective.begin()
    batch = random_pairs(objective.example_batch(num_pairs))
    step(0, batch)

    states = step.optimizer.state.values()
    moments = [v for state in states for v in state.values() if isinstance(v, Tensor)]
    kept = [*objective.module.parameters(), *objective.module.buffers()]
    extra = list(objective.extra.state_dict().values())
    objective.module.zero_grad(set_to_none=True)
    return peak_bytes(partial(step, 1, batch), [*kept, *extra, *moments], CPU)


def random_pairs(batch: Batch) -> Batch:
    """Return the batch with noise and blocks in a random order."""
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(batch.order_index.shape, generator=generator).argsort(dim=1)
    voxels = torch.randn(batch.voxels.shape, generator=generator)
    return replace(batch, voxels=voxels, order_index=order)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    described = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=described)
    commands = p.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="errors of matched pairs in mm")
    memory = commands.add_parser("memory", help="estimated and measured memory of a step")
    for command in (pairs, memory):
        command.add_argument("--data", choices=SETS, default="ixi")
        command.add_argument("--work", type=Path, default=Path("evidence_work"))
        command.add_argument("--out", type=Path, default=RESULTS)
    memory.add_argument("--encoder", nargs="+", default=["primus_tiny", "resenc_tiny"])
    memory.add_argument("--pairs", type=int, nargs="+", default=[1, 2])
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. An error that the user can correct is one line on stderr."""
    args = parser().parse_args(argv)
    torch.set_num_threads(1)
    results = ResultFile(args.out)
    try:
        data = load_set(args.work, args.data)
        jobs: list[Callable[[], None]] = [partial(measure_pairs, data, results)]
        if args.command == "memory":
            jobs = [
                partial(measure_memory, data, encoder, num_pairs, results)
                for encoder in args.encoder
                for num_pairs in args.pairs
            ]
        for job in jobs:
            job()
    except AutoregError as error:
        print(f"alice.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
