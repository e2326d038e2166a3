"""Which kinds of sequences the scans allow, how often each is drawn, and what they are cut from."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_autoreg.corpus.groups import commonest, contrast_groups, reduced
from nnunet_autoreg.corpus.locations import (
    StructureLocation,
    locations_of_boxes,
    locations_of_classes,
    locations_of_labels,
    read_boxes,
    subject_of,
)
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.plan import Plan, SequencePlan
from nnunet_autoreg.planning.pool import BY_USER
from nnunet_autoreg.pretrain.preprocessing import store_groups
from nnunet_autoreg.pretrain.request import Request, parse_kinds
from nnunet_autoreg.records import from_jsonable, read_json, write_json
from nnunet_autoreg.sampling.gather import check_training, gather, validation_kinds
from nnunet_autoreg.sampling.kinds import (
    AvailableKinds,
    choose_members,
    member_crop,
    plan_weights,
    wanted,
)
from nnunet_autoreg.sampling.neighbours import places_alike
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.store import Store

log = logging.getLogger(__name__)

PLACES_NAME = "places.json"

MOST_CONTRASTS = 4
BY_LIKENESS = "places that look alike"


def plan_with_sequences(
    folder: Path,
    plan: Plan,
    request: Request,
    training: Sequence[ScanRow],
    rows: Sequence[ScanRow],
    num_workers: int,
) -> Plan:
    """Return the plan with the kinds of sequences that were requested, or that the scans allow.

    Positions of structures in all ``rows`` are kept in the run's ``places.json``.

    Raises:
        UsageError: a requested kind is not possible with the training scans, or the boxes cannot
            be read.
    """
    requested = parse_kinds(request.sequences)
    places: list[StructureLocation] = []
    source = ""
    if needs_places(requested, rows):
        places, source = known_places(rows, request.boxes, num_workers)
    if places:
        write_json(folder / PLACES_NAME, places)
    return plan_sequences(plan, requested, available_kinds(training, places, source))


def needs_places(requested: Mapping[str, float], rows: Sequence[ScanRow]) -> bool:
    """Return whether positions of structures may decide about the plan.

    They do if semantic sequences were requested, and where nothing was requested if there are
    several inputs.
    """
    if requested:
        return "semantic" in requested
    return len({row.dataset for row in rows}) > 1


def known_places(
    rows: Sequence[ScanRow], boxes: str | None, num_workers: int
) -> tuple[list[StructureLocation], str]:
    """Return where structures lie, and from which sources that is known.

    Args:
        boxes: path of a CSV with boxes around structures.

    Raises:
        UsageError: the boxes cannot be read.
    """
    places_by_source = {
        "label maps": locations_of_labels(rows, num_workers),
        "boxes": locations_of_boxes(read_boxes(Path(boxes)), rows) if boxes else [],
        "classes of the manifest": locations_of_classes(rows),
    }
    all_places: list[StructureLocation] = []
    sources = []
    for source, places in places_by_source.items():
        all_places += places
        if places:
            sources.append(source)
    return all_places, " and ".join(sources)


def available_kinds(
    rows: Sequence[ScanRow], places: Sequence[StructureLocation], source: str
) -> AvailableKinds:
    """Return which kinds of sequences the training scans ``rows`` allow."""
    # Contrast sequences are made of the set of contrasts that most subjects have.
    groups = contrast_groups(rows)
    contrasts = commonest(groups)[:MOST_CONTRASTS]
    with_contrasts = [reduced(group, contrasts) for group in groups]
    num_fitting = sum(len(group.rows) == len(contrasts) for group in with_contrasts)

    # Semantic sequences need a structure in several subjects.
    training = {row.id for row in rows}
    subjects: dict[str, set[str]] = {}
    for place in places:
        if place.scan in training:
            subjects.setdefault(place.structure, set()).add(place.subject)
    structures = {name: len(known) for name, known in subjects.items() if len(known) > 1}

    return AvailableKinds(
        num_inputs=len({row.dataset for row in rows}),
        num_cases=len(rows),
        contrasts=contrasts,
        num_groups=num_fitting,
        num_other_groups=len(groups) - num_fitting,
        structures=structures,
        semantic_source=source,
        num_subjects=len({subject_of(row) for row in rows}),
    )


def plan_sequences(plan: Plan, requested: Mapping[str, float], available: AvailableKinds) -> Plan:
    """Return the plan with the requested kinds of sequences, else with those that are available.

    Raises:
        UsageError: a requested kind is not possible with the training scans.
    """
    planned, why = plan_weights(available)
    weights = dict(requested) if requested else planned
    _refuse_impossible(weights, available)

    s = replace(plan.sequence, weights=weights)
    reasons = {**plan.reasons, "sequence.weights": BY_USER if requested else why}
    if "contrast" in weights:
        s = replace(s, contrasts=available.contrasts, contrast_members=len(available.contrasts))
        reason = f"the most common contrasts, in {available.num_groups} subjects"
        if available.num_other_groups:
            reason += f"; {available.num_other_groups} subjects with other contrasts are used alone"
        reasons["sequence.contrasts"] = reason
    if "semantic" in weights:
        s = replace(s, semantic_members=choose_members(available, s.semantic_members))
        reasons["sequence.semantic_members"] = _semantic_reason(available, s.semantic_members)
    if "strided" in weights:
        s, reason = _fit_strided(plan, s)
        if reason:
            reasons["sequence.crop_size_vox"] = reason
    return replace(plan, sequence=s, reasons=reasons)


def _refuse_impossible(weights: Mapping[str, float], available: AvailableKinds) -> None:
    """Refuse kinds of sequences that the training scans cannot give."""
    if "contrast" in weights and not available.num_groups:
        raise UsageError(
            "--sequences contrast: no subject of the training scans has two contrasts (channels of "
            "a case, or images of one subject and session); say whose and what they are with "
            "--manifest, or leave it out",
            code="sequences-no-contrasts",
        )

    has_sources = bool(available.semantic_source)
    lacks_structures = has_sources and not available.structures
    if "semantic" in weights and (available.num_subjects < 2 or lacks_structures):
        reason = "nothing can be found"
        if has_sources:
            reason = f"{available.semantic_source} show no structure"
        raise UsageError(
            f"--sequences semantic: {reason} in two of the {available.num_subjects} training "
            "subjects; give more scans, or leave it out",
            code="sequences-no-structures",
        )


def _semantic_reason(available: AvailableKinds, num_members: int) -> str:
    if not available.structures:
        return f"there are neither label maps nor boxes nor classes: {BY_LIKENESS}"
    num_enough = sum(count >= num_members for count in available.structures.values())
    return (
        f"{num_enough} of {len(available.structures)} structures are known in at least "
        f"{num_members} subjects, from {available.semantic_source}"
    )


def _fit_strided(plan: Plan, s: SequencePlan) -> tuple[SequencePlan, str]:
    """Return a crop that can be cut into sub-volumes along z, and the reason if it changed."""
    side = plan.encoder.token_size_vox[0] * s.block_tokens[0] * s.num_subvolumes
    depth = max(s.crop_size_vox[0] // side, 1) * side
    if depth == s.crop_size_vox[0]:
        return s, ""
    reason = (
        f"{plan.reasons.get('sequence.crop_size_vox', '')}; {depth} along z for {s.num_subvolumes} "
        "sub-volumes of whole blocks"
    )
    return replace(s, crop_size_vox=(depth, *s.crop_size_vox[1:])), reason


def make_sampling_pools(
    folder: Path,
    plan: Plan,
    store: Store,
    cases: Mapping[str, StoredCase],
    training: Sequence[ScanRow],
    validation: Sequence[ScanRow],
    num_workers: int,
) -> tuple[SamplingPool, SamplingPool]:
    """Return what training and validation sequences are cut from.

    Groups of contrasts that are missing in the store are preprocessed.

    Args:
        cases: the stored cases of all scans by scan id.

    Raises:
        AutoregError: the training scans cannot give a kind of sequence that the plan asks for.
    """
    kinds = wanted(plan)
    groups, places = [], []
    if "contrast" in kinds:
        all_groups = [*contrast_groups(training), *contrast_groups(validation)]
        groups = store_groups(plan, store, all_groups, num_workers)
    if "semantic" in kinds:
        places = places_of_run(folder, plan, cases, training, validation, num_workers)

    training_cases = {row.id: cases[row.id] for row in training}
    training_pool = gather(plan, training_cases, groups, places)
    check_training(plan, training_pool)
    validation_cases = {row.id: cases[row.id] for row in validation}
    validation_pool = gather(plan, validation_cases, groups, places)
    if not validation_kinds(plan, validation_pool):
        validation_pool = SamplingPool(())

    for kind, sources in (("contrast", "subjects"), ("semantic", "structures")):
        if kind in kinds:
            log.info("%s sequences: from %d %s", kind, training_pool.num_sources(kind), sources)
    return training_pool, validation_pool


def places_of_run(
    folder: Path,
    plan: Plan,
    cases: Mapping[str, StoredCase],
    training: Sequence[ScanRow],
    validation: Sequence[ScanRow],
    num_workers: int,
) -> list[StructureLocation]:
    """Return the places of structures that the run was planned with, or find and write them now.

    A continued run therefore sees the same places.
    """
    path = folder / PLACES_NAME
    if path.exists():
        return read_places(path)

    boxes = plan.request.get("boxes")
    rows = [*training, *validation]
    places, _ = known_places(rows, None if boxes is None else str(boxes), num_workers)
    if not places:
        log.info("no label maps, boxes or classes: semantic sequences are made of %s", BY_LIKENESS)
        num_members = plan.sequence.semantic_members
        for part in (training, validation):
            if len({subject_of(row) for row in part}) >= num_members:
                places += places_alike(part, cases, member_crop(plan, "semantic"), num_members)
    write_json(path, places)
    return places


def read_places(path: Path) -> list[StructureLocation]:
    """Return the places that ``write_json`` has written.

    Raises:
        PlanError: the file is damaged.
    """
    found = from_jsonable(tuple[StructureLocation, ...], read_json(path), str(path))
    return list(found)
