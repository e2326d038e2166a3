"""Draw samples for training and for validation.

The sampler is small and picklable, so that every loader process can have one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nnunet_autoreg import rng
from nnunet_autoreg.plan import VIEW_KINDS, Plan
from nnunet_autoreg.sampling import members, spatial, strided, views
from nnunet_autoreg.sampling.corruption import draw_corruption
from nnunet_autoreg.sampling.kinds import num_blocks, planned_kinds
from nnunet_autoreg.sampling.pool import SamplingPool, as_pool, possible_kinds
from nnunet_autoreg.sampling.sample import Sample
from nnunet_autoreg.store.case import StoredCase

TRAINING, VALIDATION = "training", "held-out"
"""Purposes of a sample. All random numbers depend on these words, so they must not change. An
objective may have a further purpose, for samples that are neither trained nor validated on."""

VALIDATION_PREFIX_SHARES = (0.0, 0.25, 0.5, 0.75)
"""Shares of the blocks that validation samples are given in turn. At least one block is given."""


@dataclass(frozen=True)
class SampleOrigin:
    """Where a sample came from, for pictures.

    Attributes:
        subject: name of the group or structure that the members share.
        cases, names: per member.
        drawn: the random choices, with the start of every crop.
    """

    kind: str
    subject: str
    cases: tuple[StoredCase, ...]
    names: tuple[str, ...]
    drawn: "spatial.SpatialDraw | strided.StridedDraw | members.MembersDraw | views.ViewsDraw"


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
        if purpose == VALIDATION:
            kinds = possible_kinds(self.plan, pool)
            return kinds[number % len(kinds)]

        kinds = planned_kinds(self.plan)
        if len(kinds) == 1:
            return kinds[0]

        weights = np.array([self.plan.sequence.weights[kind] for kind in kinds])
        probabilities = weights / weights.sum()
        generator = rng.generator(self.plan.run.seed, f"{purpose}: kind", number)
        drawn = generator.choice(len(kinds), p=probabilities)
        return kinds[int(drawn)]

    def draw(self, cases: "SamplingPool | Sequence[StoredCase]", purpose: str, *ids: int) -> Sample:
        """Draw one sequence.

        All random choices derive from (run seed, purpose, ids); the kind only from the first id.
        Only training samples are rotated, zoomed and corrupted. Validation samples are given the
        same shares of their blocks every time, so that errors can be compared between validations
        and between plans.

        Args:
            ids: step and number of a training sample; the number of any other sample.
        """
        plan, pool = self.plan, as_pool(cases)
        seed = plan.run.seed
        kind = self.kind(pool, purpose, ids[0])
        generator = rng.generator(seed, purpose, *ids)

        if purpose == TRAINING:
            # Rotation, zoom and corruption have their own generators, so that they change nothing
            # else that is drawn.
            affine_generator = rng.generator(seed, f"{purpose}: rotation and zoom", *ids)
            sample, _ = self.draw_kind(kind, pool, generator, affine_generator)
            share = plan.objective.corruption
            if share > 0:
                corruption_generator = rng.generator(seed, f"{purpose}: corruption", *ids)
                corruption = draw_corruption(share, corruption_generator)
                sample = replace(sample, corruption=corruption)
            # Objectives that keep banks of cases need to know which row of the batch this is.
            if sample.case_id is not None:
                sample = replace(sample, number=ids[-1])
            return sample

        sample, _ = self.draw_kind(kind, pool, generator)
        if purpose != VALIDATION or plan.sequence.prefix == "fixed":
            return sample

        # Kinds take turns; each kind goes through all prefixes.
        num_kinds = len(possible_kinds(plan, pool))
        turn = ids[0] // num_kinds
        prefix_share = VALIDATION_PREFIX_SHARES[turn % len(VALIDATION_PREFIX_SHARES)]
        prefix = int(prefix_share * num_blocks(plan, kind))
        return replace(sample, prefix=max(1, prefix))

    def draw_kind(
        self,
        kind: str,
        pool: SamplingPool,
        generator: np.random.Generator,
        affine_generator: np.random.Generator | None = None,
    ) -> tuple[Sample, SampleOrigin]:
        """Draw one sequence of this kind from a case, group or structure chosen uniformly.

        Args:
            affine_generator: draws rotation and zoom; None for samples that are never rotated or
                zoomed. Strided sequences never are.

        Returns:
            the sample, and where it came from.
        """
        plan = self.plan

        if kind == "spatial":
            case = rng.any_of(pool.cases, generator)
            crop = spatial.draw(plan, case.shape_vox, generator, case.spacing_mm, affine_generator)
            sample = spatial.apply(plan, case, crop)
            return sample, SampleOrigin(kind, "", (case,), ("",), crop)

        if kind == "strided":
            case = rng.any_of(pool.cases, generator)
            slices = strided.draw(plan, case.shape_vox, generator, case.spacing_mm)
            sample = strided.apply(plan, case, slices)
            return sample, SampleOrigin(kind, "", (case,), ("",), slices)

        if kind in VIEW_KINDS:
            return self._draw_views(kind, pool, generator)
        if kind == "contrast":
            return self._draw_contrast(pool, generator, affine_generator)
        assert kind == "semantic", kind
        return self._draw_semantic(pool, generator, affine_generator)

    def _draw_views(
        self,
        kind: str,
        pool: SamplingPool,
        generator: np.random.Generator,
    ) -> tuple[Sample, SampleOrigin]:
        """Draw two views of one volume, or of one 2D image."""
        is_image = kind == "images"
        sources = pool.images if is_image else pool.cases
        index = int(generator.integers(len(sources)))
        case = sources[index]
        both = views.draw(self.plan, case.shape_vox, case.spacing_mm, generator, is_image)
        # The images are counted after the volumes, so that no two cases share a number.
        case_id = len(pool.cases) + index if is_image else index
        sample = views.apply(self.plan, case, both, case_id, is_image)
        return sample, SampleOrigin(kind, "", (case,), ("",), both)

    def _draw_contrast(
        self,
        pool: SamplingPool,
        generator: np.random.Generator,
        affine_generator: np.random.Generator | None,
    ) -> tuple[Sample, SampleOrigin]:
        """Draw one region in several contrasts of a patient."""
        plan = self.plan
        group = rng.any_of(pool.groups, generator)
        chosen = members.choose_contrasts(plan, group, generator)
        codes = [code for code, _ in chosen]
        cases = tuple(case for _, case in chosen)
        names = tuple(plan.sequence.contrasts[code] for code in codes)

        first = cases[0]
        drawn = members.draw_contrast(
            plan,
            first.shape_vox,  # All cases of a group have one shape and one spacing.
            first.spacing_mm,
            codes,
            generator,
            affine_generator,
        )
        sample = members.apply(plan, "contrast", cases, drawn)
        return sample, SampleOrigin("contrast", group.name, cases, names, drawn)

    def _draw_semantic(
        self,
        pool: SamplingPool,
        generator: np.random.Generator,
        affine_generator: np.random.Generator | None,
    ) -> tuple[Sample, SampleOrigin]:
        """Draw one structure in several patients."""
        plan = self.plan
        structure = rng.any_of(pool.structures, generator)
        locations = members.choose_locations(plan, structure, generator)
        cases = tuple(location.case for location in locations)
        names = tuple(location.subject for location in locations)
        drawn = members.draw_semantic(
            plan,
            locations,
            structure.spacing_mm,
            generator,
            affine_generator,
        )
        sample = members.apply(plan, "semantic", cases, drawn)
        return sample, SampleOrigin("semantic", structure.name, cases, names, drawn)
