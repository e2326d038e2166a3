"""Draws samples for training and for the held-out error. Light and picklable, so that loader processes can hold it."""

from dataclasses import dataclass, replace

from nnunet_autoreg import rng
from nnunet_autoreg.geometry import volume
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sequences import spatial
from nnunet_autoreg.sequences.sample import Sample
from nnunet_autoreg.store.case import StoredCase

TRAINING, HELDOUT = "training", "held-out"
HELDOUT_PREFIXES = (0.0, 0.25, 0.5, 0.75)


def num_blocks(plan: Plan) -> int:
    """Blocks of a sequence: those of one crop."""
    return volume(plan.sequence.crop_size_vox) // (volume(plan.sequence.block_tokens) * volume(plan.encoder.token_size_vox))


@dataclass(frozen=True)
class SequenceSampler:
    """Sequences as the plan describes them."""

    plan: Plan

    def draw(self, cases: list[StoredCase], purpose: str, *ids: int) -> Sample:
        """One spatial sequence from a case chosen uniformly; everything random comes from (run seed, purpose, ids).

        Held-out samples take fixed prefixes, so that their errors compare from one time to the next.
        """
        generator = rng.generator(self.plan.run.seed, purpose, *ids)
        case = cases[int(generator.integers(len(cases)))]
        sample = spatial.apply(self.plan, case, spatial.draw(self.plan, case.shape_vox, generator))
        if purpose != HELDOUT:
            return sample
        share = HELDOUT_PREFIXES[ids[0] % len(HELDOUT_PREFIXES)]
        return replace(sample, prefix=max(1, int(share * num_blocks(self.plan))))
