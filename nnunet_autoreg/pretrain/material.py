"""What a pool offers beside single crops, how often each kind of sequence is drawn, and the
material for it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnunet_autoreg.corpus.fingerprint import row_spacing
from nnunet_autoreg.corpus.groups import ContrastGroup, commonest, contrast_groups, reduced
from nnunet_autoreg.corpus.places import (
    KnownPlace,
    places_of_boxes,
    places_of_classes,
    places_of_labels,
    read_boxes,
    subject_of,
)
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import UsageError, did_you_mean
from nnunet_autoreg.plan import KINDS, Plan, SequencePlan
from nnunet_autoreg.pretrain.folder import Request
from nnunet_autoreg.records import from_jsonable, read_json, write_json
from nnunet_autoreg.sampling.gather import check_training, gather, heldout_kinds
from nnunet_autoreg.sampling.kinds import Offers, choose_members, member_crop, plan_weights, wanted
from nnunet_autoreg.sampling.material import Material
from nnunet_autoreg.sampling.neighbours import places_alike
from nnunet_autoreg.store.case import StoredCase
from nnunet_autoreg.store.groups import ensure_groups
from nnunet_autoreg.store.store import Store

log = logging.getLogger(__name__)

PLACES_NAME = "places.json"
MOST_CONTRASTS = 4
BY_USER, BY_LIKENESS = "set by the user", "places that look alike"


def parse_kinds(asked: Sequence[str]) -> dict[str, float]:
    """Weights from ``--sequences`` words such as ``spatial`` or ``contrast=0.5``.

    Raises:
        UsageError: an unknown kind, a kind named twice, or no number.
    """
    weights: dict[str, float] = {}
    for word in asked:
        kind, equals, number = word.partition("=")
        if kind not in KINDS:
            raise UsageError(
                f"--sequences {word}: there are no '{kind}' sequences; {did_you_mean(kind, KINDS)}"
            )
        if kind in weights:
            raise UsageError(f"--sequences {word}: '{kind}' is named twice")
        try:
            weights[kind] = float(number) if equals else 1.0
        except ValueError as error:
            raise UsageError(
                f"--sequences {word}: '{number}' is no number; write it like {kind}=0.5"
            ) from error
        if not 0 < weights[kind] < float("inf"):
            raise UsageError(f"--sequences {word}: the weight must be greater than 0")
    return weights


def wants_places(asked: Mapping[str, float], rows: Sequence[ScanRow]) -> bool:
    """Whether positions of structures may matter for the plan: semantic sequences are asked for, or
    the pool has several inputs.
    """
    return "semantic" in asked if asked else len({row.dataset for row in rows}) > 1


def known_places(
    rows: Sequence[ScanRow], boxes: str | None, num_workers: int
) -> tuple[list[KnownPlace], str]:
    """Where structures lie, from label maps, boxes and classes, and from which of these.

    Raises:
        UsageError: the boxes cannot be read.
    """
    sources = {
        "label maps": places_of_labels(rows, num_workers),
        "boxes": places_of_boxes(read_boxes(Path(boxes)), rows) if boxes else [],
        "classes of the manifest": places_of_classes(rows),
    }
    return [place for places in sources.values() for place in places], " and ".join(
        name for name, places in sources.items() if places
    )


def offers_of(rows: Sequence[ScanRow], places: Sequence[KnownPlace], source: str) -> Offers:
    """What training scans offer."""
    groups = contrast_groups(rows)
    contrasts = commonest(groups)[:MOST_CONTRASTS]
    fitting = [
        g for g in (reduced(group, contrasts) for group in groups) if len(g.rows) == len(contrasts)
    ]
    training = {row.id for row in rows}
    subjects: dict[str, set[str]] = {}
    for place in places:
        if place.scan in training:
            subjects.setdefault(place.structure, set()).add(place.subject)
    structures = {name: len(of) for name, of in subjects.items() if len(of) > 1}
    inputs = len({row.dataset for row in rows})
    return Offers(
        inputs,
        len(rows),
        contrasts,
        len(fitting),
        len(groups) - len(fitting),
        structures,
        source,
        len({subject_of(row) for row in rows}),
    )


def plan_sequences(plan: Plan, asked: Mapping[str, float], offers: Offers) -> Plan:
    """The plan with the kinds of sequences that were asked for, or that the pool offers.

    Raises:
        UsageError: a kind was asked for that the pool cannot give.
    """
    planned, why = plan_weights(offers)
    weights = dict(asked) if asked else planned
    if "contrast" in weights and not offers.num_groups:
        raise UsageError(
            "--sequences contrast: no subject of the training scans has two contrasts (channels of "
            "a case, or images of one "
            "subject and session); say whose and what they are with --manifest, or leave it out"
        )
    if "semantic" in weights and (
        offers.num_subjects < 2 or (offers.semantic_source and not offers.structures)
    ):
        known = (
            f"{offers.semantic_source} show no structure"
            if offers.semantic_source
            else "nothing can be found"
        )
        raise UsageError(
            f"--sequences semantic: {known} in two of the {offers.num_subjects} training subjects; "
            "give more scans, or leave "
            "it out"
        )
    s = replace(plan.sequence, weights=weights)
    reasons = {**plan.reasons, "sequence.weights": BY_USER if asked else why}
    if "contrast" in weights:
        s = replace(s, contrasts=offers.contrasts, contrast_members=len(offers.contrasts))
        left = (
            f"; {offers.num_other_groups} subjects with other contrasts are used alone"
            if offers.num_other_groups
            else ""
        )
        reasons["sequence.contrasts"] = (
            f"the commonest of the pool, in {offers.num_groups} subjects{left}"
        )
    if "semantic" in weights:
        s = replace(s, semantic_members=choose_members(offers, s.semantic_members))
        reasons["sequence.semantic_members"] = _semantic_reason(offers, s.semantic_members)
    if "strided" in weights:
        s, reason = _fit_strided(plan, s)
        reasons.update({"sequence.crop_size_vox": reason} if reason else {})
    return replace(plan, sequence=s, reasons=reasons)


def _semantic_reason(offers: Offers, members: int) -> str:
    if not offers.structures:
        return f"neither label maps nor boxes nor classes are there: {BY_LIKENESS}"
    enough = sum(1 for count in offers.structures.values() if count >= members)
    return (
        f"{enough} of {len(offers.structures)} structures are known in at least {members} "
        f"subjects, from {offers.semantic_source}"
    )


def _fit_strided(plan: Plan, s: SequencePlan) -> tuple[SequencePlan, str]:
    """A crop that can be cut into sub-volumes along z."""
    side = plan.encoder.token_size_vox[0] * s.block_tokens[0] * s.num_subvolumes
    depth = max(s.crop_size_vox[0] // side, 1) * side
    if depth == s.crop_size_vox[0]:
        return s, ""
    reason = (
        f"{plan.reasons.get('sequence.crop_size_vox', '')}; {depth} along z for {s.num_subvolumes} "
        "sub-volumes of whole blocks"
    )
    return replace(s, crop_size_vox=(depth, *s.crop_size_vox[1:])), reason


def plan_with_sequences(
    folder: Path,
    plan: Plan,
    request: Request,
    training: Sequence[ScanRow],
    rows: Sequence[ScanRow],
    num_workers: int,
) -> Plan:
    """``plan_sequences`` for what a user typed; positions of structures in all ``rows`` are kept in
    the run's folder.

    Raises:
        UsageError: a kind was asked for that the training scans cannot give, or the boxes cannot be
            read.
    """
    asked, source = parse_kinds(request.sequences), ""
    places: list[KnownPlace] = []
    if wants_places(asked, rows):
        places, source = known_places(rows, request.boxes, num_workers)
    if places:
        write_json(folder / PLACES_NAME, places)
    return plan_sequences(plan, asked, offers_of(training, places, source))


def make_material(
    folder: Path,
    plan: Plan,
    store: Store,
    cases: Mapping[str, StoredCase],
    training: Sequence[ScanRow],
    heldout: Sequence[ScanRow],
    num_workers: int,
) -> tuple[Material, Material]:
    """What training and held-out sequences are cut from; preprocesses groups of contrasts that are
    missing in the store.

    Raises:
        AutoregError: the training scans cannot give a kind of sequence that the plan asks for.
    """
    groups, places = [], []
    if "contrast" in wanted(plan):
        groups = stored_groups(
            plan, store, [*contrast_groups(training), *contrast_groups(heldout)], num_workers
        )
    if "semantic" in wanted(plan):
        places = places_of_run(folder, plan, cases, training, heldout, num_workers)
    made = [
        gather(plan, {row.id: cases[row.id] for row in rows}, groups, places)
        for rows in (training, heldout)
    ]
    check_training(plan, made[0])
    for kind in (k for k in wanted(plan) if k in ("contrast", "semantic")):
        log.info(
            "%s sequences: from %d %s",
            kind,
            made[0].offers(kind),
            "subjects" if kind == "contrast" else "structures",
        )
    return made[0], made[1] if heldout_kinds(plan, made[1]) else Material(())


def stored_groups(
    plan: Plan, store: Store, groups: Sequence[ContrastGroup], num_workers: int
) -> list[tuple[ContrastGroup, list[StoredCase]]]:
    """The groups that have enough of the plan's contrasts, on one grid each."""
    fitting = [
        g
        for g in (reduced(group, plan.sequence.contrasts) for group in groups)
        if len(g.rows) >= plan.sequence.contrast_members
    ]
    keys = ensure_groups(
        store, fitting, partial(row_spacing, data=plan.data), plan.data.ct_window, num_workers
    )
    return [
        (group, [store.open(key) for key in keys[group.name]])
        for group in fitting
        if group.name in keys
    ]


def places_of_run(
    folder: Path,
    plan: Plan,
    cases: Mapping[str, StoredCase],
    training: Sequence[ScanRow],
    heldout: Sequence[ScanRow],
    num_workers: int,
) -> list[KnownPlace]:
    """The places that the run's plan was made with, or else made now and written: a run that goes
    on sees the same ones.
    """
    path = folder / PLACES_NAME
    if path.exists():
        return read_places(path)
    boxes = plan.request.get("boxes")
    places, _ = known_places(
        [*training, *heldout], None if boxes is None else str(boxes), num_workers
    )
    if not places:
        log.info("no label maps, boxes or classes: semantic sequences are made of %s", BY_LIKENESS)
        for rows in (training, heldout):
            if len({subject_of(row) for row in rows}) >= plan.sequence.semantic_members:
                places += places_alike(
                    rows, cases, member_crop(plan, "semantic"), plan.sequence.semantic_members
                )
    write_json(path, places)
    return places


def read_places(path: Path) -> list[KnownPlace]:
    """What ``write_json`` made of places.

    Raises:
        PlanError: the file is damaged.
    """
    return [from_jsonable(KnownPlace, item, str(path)) for item in read_json(path)]
