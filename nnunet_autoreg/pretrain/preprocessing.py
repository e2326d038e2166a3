"""From indexed scans to the sampling pools of all kinds of sequences.

File 3 of 11 in reading order.

Scans are split into training and validation and preprocessed, possibly in parts on several
machines. Then the kinds of sequences and their weights are decided, and the cases, groups of
contrasts and positions of structures from which they are cut.
"""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_autoreg import nnunet_api
from nnunet_autoreg.corpus.fingerprint import row_spacing
from nnunet_autoreg.corpus.groups import ContrastGroup, commonest, contrast_groups, reduced
from nnunet_autoreg.corpus.locations import (
    PLACES_NAME,
    StructureLocation,
    locations_of_boxes,
    locations_of_classes,
    locations_of_labels,
    read_boxes,
    read_places,
    subject_of,
)
from nnunet_autoreg.corpus.rows import ScanRow, read_index, write_index
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.machine import num_processes
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.pool import BY_USER
from nnunet_autoreg.pretrain.request import (
    INDEX_NAME,
    PLAN_NAME,
    Request,
    index_of,
    logged_to,
    matching_plan,
    parse_kinds,
    run_folder,
)
from nnunet_autoreg.records import write_json
from nnunet_autoreg.sampling.gather import check_training, gather, validation_kinds
from nnunet_autoreg.sampling.kinds import (
    AvailableKinds,
    choose_members,
    member_crop,
    plan_weights,
    planned_kinds,
)
from nnunet_autoreg.sampling.neighbours import places_alike
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.groups import store_groups
from nnunet_autoreg.store.store import Store, StorePart

log = logging.getLogger(__name__)

MOST_CONTRASTS = 4
SALTED_CASE = re.compile(r".*-[0-9a-f]{16}")
"""How the case of a DICOM series is called: modality and salted hash."""
BY_LIKENESS = "places that look alike"


def volumes_of(rows: Sequence[ScanRow]) -> list[ScanRow]:
    """Return the rows without those of 2D images."""
    return [row for row in rows if not row.is_image]


def usable_rows(rows: Sequence[ScanRow]) -> list[ScanRow]:
    """Return the rows of scans that can be used."""
    return [row for row in rows if row.status == "ok"]


def split(
    rows: Sequence[ScanRow],
    fraction: float,
    seed: int,
    salt_free: bool = True,
) -> tuple[list[ScanRow], list[ScanRow]]:
    """Return the training scans and the validation scans.

    All scans of a subject, and all channels of a case, go to the same side. A hash of the cases'
    names decides, so the side of a case does not depend on other cases. For a subject the lowest
    hash of its cases decides, because the hash of its id differs between machines.

    Args:
        salt_free: ``data.salt_free`` of the plan: identify a DICOM series, whose case is a salted
            hash, by its content.
    """
    # (dataset, case) -> subject, "" if the subject is not known
    subjects = {(row.dataset, row.case): row.subject for row in reversed(rows)}
    contents = {}
    if salt_free:
        series = [row for row in rows if SALTED_CASE.fullmatch(row.case)]
        contents = {(row.dataset, row.case): row.content_hash for row in series}

    lowest: dict[object, str] = {}
    for case, subject in subjects.items():
        unit = subject or case
        lasting_name = contents.get(case, case)
        digest = hashlib.sha256(f"{seed}/{lasting_name}".encode()).hexdigest()
        lowest[unit] = min(digest, lowest.get(unit, digest))

    num_validation = 0
    if fraction > 0 and len(lowest) > 1:
        wanted_units = max(1, round(fraction * len(lowest)))
        num_validation = min(wanted_units, len(lowest) - 1)
    chosen = set(sorted(lowest, key=lambda unit: lowest[unit])[:num_validation])

    training: list[ScanRow] = []
    validation: list[ScanRow] = []
    for row in rows:
        case = (row.dataset, row.case)
        unit = subjects[case] or case
        (validation if unit in chosen else training).append(row)
    return training, validation


def split_as_planned(plan: Plan, rows: Sequence[ScanRow]) -> tuple[list[ScanRow], list[ScanRow]]:
    """Return the training scans and the validation scans of a run."""
    return split(rows, plan.data.holdout_fraction, plan.run.seed, plan.data.salt_free)


def groups_as_planned(
    plan: Plan,
    training: Sequence[ScanRow],
    validation: Sequence[ScanRow],
) -> list[ContrastGroup]:
    """Return the groups of contrasts of a run; no group has scans of both sides."""
    groups = []
    for side in (training, validation):
        groups += contrast_groups(side, plan.data.salt_free)
    return groups


def remove_failed(
    folder: Path,
    rows: list[ScanRow],
    store: Store,
    has_begun: bool,
) -> list[ScanRow]:
    """Return the scans that are in the store; write into scans.csv why others are not.

    Args:
        has_begun: training has begun, so its scans must stay the same.

    Raises:
        AutoregError: no scan is left, or one is missing from a training that has begun.
    """
    if not store.failures:
        return rows
    failed = {row: (error.status, str(error)) for row, error in store.failures.items()}
    remaining = [row for row in rows if row.id not in failed]
    first, (status, reason) = next(iter(failed.items()))
    if not remaining:
        raise AutoregError(
            f"none of {len(rows)} scans could be preprocessed; the first, {first}, is {status}: "
            f"{reason}",
            code="run-nothing-preprocessed",
        )
    if has_begun:
        raise AutoregError(
            f"{len(failed)} scans of this run are missing from the store and cannot be read again; "
            f"the first, {first}, is {status} ({reason}): put them back, so that the run stays the "
            "same, or use another --name",
            code="run-scan-missing",
        )

    index_file = folder / INDEX_NAME
    indexed = []
    for row in read_index(index_file):
        if row.id in failed:
            status, reason = failed[row.id]
            indexed.append(replace(row, status=status, reason=reason))
        else:
            indexed.append(row)
    write_index(index_file, indexed)
    log.warning(
        "%d scans could not be preprocessed and are left out; %s gives the reasons",
        len(failed),
        index_file,
    )
    return remaining


def preprocess_part(request: Request, part: StorePart) -> int:
    """Preprocess one part of a planned run, for job arrays.

    Parts on several machines write to one store without a coordinator. They only read the run's
    folder, so no part waits for another.

    Returns:
        the number of cases of the run that other parts have not preprocessed yet.

    Raises:
        UsageError: the run is not planned yet, or was planned with other settings.
        PlanError: its edited plan is impossible.
        StoreError: the disk is full, or the store cannot be written; finished cases stay.
    """
    folder = run_folder(nnunet_api.results_folder(), request.check().name)
    store = Store()
    if not (folder / PLAN_NAME).exists():
        raise UsageError(
            f"--part {part.number}/{part.count}: the run '{request.name}' has no {PLAN_NAME} and "
            f"{INDEX_NAME} yet, which all parts share; type the same line once with --dry-run "
            "instead of --part",
            code="run-not-planned",
        )

    with logged_to(folder, f"preprocessing_log_{part.number}of{part.count}"):
        plan = check(matching_plan(folder, request))
        rows = usable_rows(read_index(index_of(folder)))
        spacing_of = partial(row_spacing, data=plan.data)
        keys = store.ensure(rows, spacing_of, plan.data.ct_window, num_processes(), part)
        preprocess_groups(plan, rows, store, part)

        num_missing, num_all = store.num_missing(rows, spacing_of, plan.data.ct_window)
        log.info(
            "part %d of %d: %d cases are in the store, %d scans could not be preprocessed; of the "
            "whole run %d of %d cases are there",
            part.number,
            part.count,
            len(set(keys.values())),
            len(store.failures),
            num_all - num_missing,
            num_all,
        )
    # Scans that cannot be preprocessed stay missing; they do not keep the others from training.
    return max(0, num_missing - len(store.failures))


def preprocess_groups(plan: Plan, rows: list[ScanRow], store: Store, part: StorePart) -> None:
    """Preprocess this part's groups of contrasts, if the plan has contrast sequences."""
    if "contrast" not in planned_kinds(plan):
        return
    training, validation = split_as_planned(plan, rows)
    groups = groups_as_planned(plan, training, validation)

    own_groups = []
    for group in groups:
        if part.takes(hashlib.sha256(group.name.encode()).hexdigest()):
            own_groups.append(group)
    log.info(
        "part %d of %d: %d of %d groups of contrasts",
        part.number,
        part.count,
        len(own_groups),
        len(groups),
    )
    store_groups(plan, store, own_groups, num_processes())


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
    """Return whether the plan may depend on positions of structures.

    It does if semantic sequences were requested, or if no kind was requested and there are several
    inputs.
    """
    if requested:
        return "semantic" in requested
    return len({row.dataset for row in rows}) > 1


def known_places(
    rows: Sequence[ScanRow],
    boxes: str | None,
    num_workers: int,
) -> tuple[list[StructureLocation], str]:
    """Return the positions of structures, and their sources.

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
    rows: Sequence[ScanRow],
    places: Sequence[StructureLocation],
    source: str,
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
    refuse_impossible(weights, available)

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
        reason = f"there are neither label maps nor boxes nor classes: {BY_LIKENESS}"
        if available.structures:
            counts = available.structures.values()
            num_enough = sum(count >= s.semantic_members for count in counts)
            reason = (
                f"{num_enough} of {len(counts)} structures are known in at least "
                f"{s.semantic_members} subjects, from {available.semantic_source}"
            )
        reasons["sequence.semantic_members"] = reason
    if "strided" in weights:
        # The crop is cut into sub-volumes of whole blocks along z.
        side = plan.encoder.token_size_vox[0] * s.block_tokens[0] * s.num_subvolumes
        depth = max(s.crop_size_vox[0] // side, 1) * side
        if depth != s.crop_size_vox[0]:
            s = replace(s, crop_size_vox=(depth, *s.crop_size_vox[1:]))
            reasons["sequence.crop_size_vox"] = (
                f"{plan.reasons.get('sequence.crop_size_vox', '')}; {depth} along z for "
                f"{s.num_subvolumes} sub-volumes of whole blocks"
            )
    return replace(plan, sequence=s, reasons=reasons)


def refuse_impossible(weights: Mapping[str, float], available: AvailableKinds) -> None:
    """Refuse kinds of sequences that the training scans do not allow.

    Raises:
        UsageError: a kind is not possible.
    """
    if "contrast" in weights and not available.num_groups:
        raise UsageError(
            "--sequences contrast: no subject of the training scans has two contrasts (channels "
            "of a case, or images of one subject and session); describe the scans with "
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


def make_sampling_pools(
    folder: Path,
    plan: Plan,
    store: Store,
    cases: Mapping[str, StoredCase],
    training: Sequence[ScanRow],
    validation: Sequence[ScanRow],
    num_workers: int,
) -> tuple[SamplingPool, SamplingPool]:
    """Return the pools of training and validation sequences.

    Groups of contrasts that are missing in the store are preprocessed.

    Args:
        cases: the stored cases of all scans by scan id.

    Raises:
        AutoregError: the training scans cannot give a kind of sequence that the plan asks for.
    """
    kinds = planned_kinds(plan)
    groups, places = [], []
    if "contrast" in kinds:
        all_groups = groups_as_planned(plan, training, validation)
        groups = store_groups(plan, store, all_groups, num_workers)
    if "semantic" in kinds:
        places = places_of_run(folder, plan, cases, training, validation, num_workers)

    pools = []
    for rows in (training, validation):
        volumes = {row.id: cases[row.id] for row in rows if not row.is_image}
        images = [cases[row.id] for row in rows if row.is_image]
        pools.append(gather(plan, volumes, groups, places, images))
    training_pool, validation_pool = pools
    check_training(plan, training_pool)
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
