"""The kinds of sequences: which are available, how often each is drawn, and the crops of members.

Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from nnunet_autoreg.geometry import Size, multiplied, volume
from nnunet_autoreg.plan import KINDS, VIEW_KINDS, Plan, SequencePlan

CONTRAST_WEIGHT = SEMANTIC_WEIGHT = 0.5


@dataclass(frozen=True)
class AvailableKinds:
    """The kinds of sequences that a pool of scans allows.

    Attributes:
        num_inputs: datasets and folders given.
        num_cases: usable scans.
        contrasts: names of the commonest set of contrasts of one subject, in their fixed order; ()
            if no subject has two.
        num_groups: number of subjects and sessions that have these contrasts.
        num_other_groups: number of those with another set of at least two contrasts.
        structures: name -> number of subjects in which its position is known (labels, boxes,
            classes), two or more.
        semantic_source: source of the positions, e.g. "label maps"; "" without positions.
        num_subjects: different patients, as far as that is known.
    """

    num_inputs: int
    num_cases: int
    contrasts: tuple[str, ...] = ()
    num_groups: int = 0
    num_other_groups: int = 0
    structures: Mapping[str, int] | None = None
    semantic_source: str = ""
    num_subjects: int = 0


def plan_weights(available: AvailableKinds) -> tuple[dict[str, float], str]:
    """Return the weights of the kinds, and the reason.

    A single dataset is trained on spatial sequences, as measured. A pool of several adds contrast
    sequences if subjects have several contrasts, and semantic ones if positions are known.
    Positions by similarity only are never used by default.
    """
    weights = {"spatial": 1.0}
    if available.num_inputs < 2:
        return weights, "one input: spatial sequences; --sequences asks for others"

    reasons = []
    if available.num_groups:
        weights["contrast"] = CONTRAST_WEIGHT
        contrasts = ", ".join(available.contrasts)
        reasons.append(f"{available.num_groups} subjects have the contrasts {contrasts}")

    if available.structures:
        weights["semantic"] = SEMANTIC_WEIGHT
        reasons.append(
            f"{available.semantic_source} say where {len(available.structures)} structures "
            "lie (read for positions only)",
        )

    if not reasons:
        reasons = [
            "no subject has several contrasts, and no label maps or boxes say where structures lie",
        ]
    return weights, "; ".join(reasons)


def choose_members(available: AvailableKinds, most: int) -> int:
    """Return how many images a semantic sequence has, at least two and at most ``most``.

    There are no more than subjects with the structure that is known in most of them; without
    structures, no more than subjects.
    """
    num_subjects = available.num_subjects
    if available.structures:
        num_subjects = max(available.structures.values())
    return max(2, min(most, num_subjects))


def num_members(sequence: SequencePlan, kind: str) -> int:
    """Return how many images one sequence of this kind has."""
    if kind == "contrast":
        return sequence.contrast_members
    if kind == "semantic":
        return sequence.semantic_members
    return 1


def planned_kinds(plan: Plan) -> tuple[str, ...]:
    """Return the kinds that are drawn, in the order of ``KINDS`` and ``VIEW_KINDS``."""
    weights = plan.sequence.weights
    every_kind = (*KINDS, *VIEW_KINDS)
    return tuple(kind for kind in every_kind if weights.get(kind, 0) > 0)


def member_codes(plan: Plan) -> dict[str, range]:
    """Return the codes of the members by kind.

    A contrast keeps its code in all sequences. The members of a semantic sequence are numbered. The
    one image of spatial and strided sequences has the code 0, as images have in fine-tuning.
    """
    kinds = planned_kinds(plan)
    num_contrasts = len(plan.sequence.contrasts) if "contrast" in kinds else 0
    num_semantic = plan.sequence.semantic_members if "semantic" in kinds else 0

    contrast_codes = range(num_contrasts)
    semantic_codes = range(num_contrasts, num_contrasts + num_semantic)
    return {"contrast": contrast_codes, "semantic": semantic_codes}


def num_codes(plan: Plan) -> int:
    """Return how many member codes there are; 1 if no sequence has several members."""
    ends = [codes.stop for codes in member_codes(plan).values()]
    return max(1, *ends)


def member_crop(plan: Plan, kind: str) -> Size:
    """Return the crop of one member of a sequence.

    It is the plan's crop for a single member. For several members it is smaller, so that all
    together hold no more tokens: the axis that has lost least is shortened by a block until they
    fit. Every axis keeps at least one block.
    """
    s = plan.sequence
    members = num_members(s, kind)
    if members == 1:
        return s.crop_size_vox
    if s.member_crop_vox is not None:
        return s.member_crop_vox

    block_vox = multiplied(plan.encoder.token_size_vox, s.block_tokens)
    whole = [crop // side for crop, side in zip(s.crop_size_vox, block_vox, strict=True)]
    blocks = list(whole)

    while volume(blocks) * members > volume(whole) and max(blocks) > 1:
        # The axis with the largest share of its blocks left; of equal ones, the longest.
        axes = [axis for axis in range(3) if blocks[axis] > 1]
        least_shortened = max(axes, key=lambda i: (blocks[i] / whole[i], blocks[i]))
        blocks[least_shortened] -= 1

    return multiplied(blocks, block_vox)


def num_blocks(plan: Plan, kind: str = "spatial") -> int:
    """Return the number of blocks of a sequence of this kind."""
    s = plan.sequence
    block_vox = multiplied(plan.encoder.token_size_vox, s.block_tokens)
    sequence_vox = num_members(s, kind) * volume(member_crop(plan, kind))
    return sequence_vox // volume(block_vox)
