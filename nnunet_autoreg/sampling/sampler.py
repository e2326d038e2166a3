"""Draws samples for training and for validation.

Light and picklable, so that loader processes can hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunet_autoreg import rng
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling import members, spatial, strided
from nnunet_autoreg.sampling.corruption import draw_corruption
from nnunet_autoreg.sampling.kinds import num_blocks, wanted
from nnunet_autoreg.sampling.pool import SamplingPool, as_pool
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.store.case import StoredCase

TRAINING, VALIDATION = "training", "held-out"
"""Purposes of a sample. All random numbers depend on these words, so that they must not change."""

VALIDATION_PREFIXES = (0.0, 0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Shown:
    """Where a sample came from, for pictures: its kind, and per member a name and the start of its
    crop.

    Attributes:
        cases, names, starts: per member.
        subject: what the members have in common.
    """

    kind: str
    subject: str
    cases: tuple[StoredCase, ...]
    names: tuple[str, ...]
    drawn: "spatial.SpatialDraw | strided.StridedDraw | members.MembersDraw"


@dataclass(frozen=True)
class SequenceSampler:
    """Sequences as the plan describes them."""

    plan: Plan

    def kind(self, pool: SamplingPool, purpose: str, number: int) -> str:
        """Return the kind of the sequences of a training step, or of a validation sample.

        The kind of a step is drawn by the plan's weights; validation samples take kinds in turn.
        One kind per step keeps the shapes of a batch equal. The validation scans may allow fewer
        kinds than the training scans.
        """
        kinds = wanted(self.plan)
        if purpose == VALIDATION:
            kinds = tuple(kind for kind in kinds if pool.num_sources(kind))
            return kinds[number % len(kinds)]
        if len(kinds) == 1:
            return kinds[0]
        weights = np.array([self.plan.sequence.weights[kind] for kind in kinds])
        generator = rng.generator(self.plan.run.seed, f"{purpose}: kind", number)
        return kinds[int(generator.choice(len(kinds), p=weights / weights.sum()))]

    def draw(self, cases: "SamplingPool | Sequence[StoredCase]", purpose: str, *ids: int) -> Sample:
        """One sequence; everything random comes from (run seed, purpose, ids), its kind from the
        first id alone.

        Training samples alone are rotated, zoomed and corrupted. Validation samples take fixed
        prefixes, so that their errors compare from one time to the next - and, unless the plan
        fixes its own, from one plan to the other.
        """
        pool, seed = as_pool(cases), self.plan.run.seed
        kind = self.kind(pool, purpose, ids[0])
        # Rotation, zoom and corruption have generators of their own, so that they change nothing
        # else that is drawn.
        is_training = purpose == TRAINING
        affine_generator = (
            rng.generator(seed, f"{purpose}: rotation and zoom", *ids) if is_training else None
        )
        sample, _ = self.draw_kind(kind, pool, rng.generator(seed, purpose, *ids), affine_generator)
        if is_training and self.plan.objective.corruption > 0:
            generator = rng.generator(seed, f"{purpose}: corruption", *ids)
            sample = replace(
                sample, corruption=draw_corruption(self.plan.objective.corruption, generator)
            )
        if purpose != VALIDATION:
            return sample
        num_kinds = len([kind for kind in wanted(self.plan) if pool.num_sources(kind)])
        if self.plan.sequence.prefix == "fixed":
            return sample
        share = VALIDATION_PREFIXES[ids[0] // num_kinds % len(VALIDATION_PREFIXES)]
        return replace(sample, prefix=max(1, int(share * num_blocks(self.plan, kind))))

    def draw_kind(
        self,
        kind: str,
        pool: SamplingPool,
        generator: np.random.Generator,
        affine_generator: np.random.Generator | None = None,
    ) -> tuple[Sample, Shown]:
        """Draw one sequence of this kind from a case, group or structure chosen uniformly; say
        where it came from.

        Args:
            affine_generator: draws rotation and zoom; None for samples that are never rotated or
                zoomed.
        """
        if kind == "strided":
            return self._strided(pool, generator)
        draw = {"spatial": self._spatial, "contrast": self._contrast, "semantic": self._semantic}[
            kind
        ]
        return draw(pool, generator, affine_generator)

    def _spatial(
        self,
        pool: SamplingPool,
        generator: np.random.Generator,
        affine_generator: np.random.Generator | None,
    ) -> tuple[Sample, Shown]:
        case = pool.cases[int(generator.integers(len(pool.cases)))]
        drawn = spatial.draw(
            self.plan, case.shape_vox, generator, case.spacing_mm, affine_generator
        )
        return spatial.apply(self.plan, case, drawn), Shown("spatial", "", (case,), ("",), drawn)

    def _strided(self, pool: SamplingPool, generator: np.random.Generator) -> tuple[Sample, Shown]:
        case = pool.cases[int(generator.integers(len(pool.cases)))]
        drawn = strided.draw(self.plan, case.shape_vox, generator, case.spacing_mm)
        return strided.apply(self.plan, case, drawn), Shown("strided", "", (case,), ("",), drawn)

    def _contrast(
        self,
        pool: SamplingPool,
        generator: np.random.Generator,
        affine_generator: np.random.Generator | None,
    ) -> tuple[Sample, Shown]:
        group = pool.groups[int(generator.integers(len(pool.groups)))]
        chosen = members.choose_contrasts(self.plan, group, generator)
        cases = [case for _, case in chosen]
        codes = [code for code, _ in chosen]
        first = cases[0]
        drawn = members.draw_contrast(
            self.plan, first.shape_vox, first.spacing_mm, codes, generator, affine_generator
        )
        names = tuple(self.plan.sequence.contrasts[code] for code in codes)
        return members.apply(self.plan, "contrast", cases, drawn), Shown(
            "contrast", group.name, tuple(cases), names, drawn
        )

    def _semantic(
        self,
        pool: SamplingPool,
        generator: np.random.Generator,
        affine_generator: np.random.Generator | None,
    ) -> tuple[Sample, Shown]:
        structure = pool.structures[int(generator.integers(len(pool.structures)))]
        places = members.choose_places(self.plan, structure, generator)
        drawn = members.draw_semantic(
            self.plan, places, structure.spacing_mm, generator, affine_generator
        )
        cases, names = tuple(p.case for p in places), tuple(p.subject for p in places)
        return members.apply(self.plan, "semantic", cases, drawn), Shown(
            "semantic", structure.name, cases, names, drawn
        )
