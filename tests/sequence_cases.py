"""Cases whose voxels show where they came from, and plans for sequences of them."""

from dataclasses import dataclass

import numpy as np

from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.planning.make import make_plan as plan_run
from nnunet_autoreg.planning.pool import Hardware, Overrides, Pool
from nnunet_autoreg.sampling.pool import SamplingPool, StoredGroup, StoredLocation, Structure

TINY = encoder_size("primus_tiny")
WORDS = ("T1w", "T1w-ce", "T2w", "FLAIR")


@dataclass(frozen=True)
class Ramp:
    """A case whose voxels are their own raster index."""

    shape_vox: tuple[int, int, int]
    spacing_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def read_padded(self, start, size):
        # The index begins at 1, so that 0 is padding.
        indices = np.arange(np.prod(self.shape_vox), dtype=np.float32)
        whole = indices.reshape(self.shape_vox) + 1
        crop = np.zeros(size, np.float32)
        valid_mask = np.zeros(size, bool)
        # The part of the crop that lies inside the case, in indices of the crop.
        low = [max(0, -s) for s in start]
        high = [min(n, m - s) for n, m, s in zip(size, self.shape_vox, start, strict=True)]
        inside = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        ranges = zip(start, low, high, strict=True)
        crop[inside] = whole[tuple(slice(s + a, s + b) for s, a, b in ranges)]
        valid_mask[inside] = True
        return crop[None], valid_mask


def make_plan(**sequence):
    settings = {"crop_size_vox": (16, 24, 16), **sequence}
    return Plan(
        "t",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan("primus_tiny", TINY.class_path, TINY.arguments, TINY.token_size),
        SequencePlan(**settings),
        PredictionPlan(),
        OptimPlan(10, 2, 1e-3, 1),
        RunPlan(7, 10, 10),
    )


def plan_for(encoder: str, shape_vox: tuple[int, int, int]) -> Plan:
    """What autoreg_pretrain plans for scans of 2 mm and a run of ten steps on a CPU."""
    pool = Pool(40, (2.0, 2.0, 2.0), shape_vox, 4_000_000, None)
    token = encoder_size(encoder).token_size
    overrides = Overrides(encoder, num_steps=10, batch_size=2, token_size_vox=token)
    hardware = Hardware("cpu", 24.0)
    return plan_run("run", pool, hardware, overrides, 0, {}, lambda *_: (0.0, 0.0))


def narrow(encoder: str) -> tuple[str, ...]:
    """Settings of the plan that make a CNN small; a transformer is small enough."""
    if encoder != "resenc_tiny":
        return ()
    return (
        "encoder.arguments.features_per_stage=[4,6,8,8]",
        "encoder.arguments.n_blocks_per_stage=[1,1,1,1]",
    )


@dataclass(frozen=True)
class Shifted(Ramp):
    """Another contrast: the same ramp and a constant that shows whose it is."""

    by: float = 0.0

    def read_padded(self, start, size):
        crop, valid_mask = super().read_padded(start, size)
        return crop + np.float32(self.by) * valid_mask, valid_mask


def contrast_material(num_groups=2):
    groups = []
    for g in range(num_groups):
        # Ramps have at most 40^3 = 64 000 values, so a step of 100 000 keeps cases apart.
        shifts = [1e5 * (4 * g + i) for i in range(len(WORDS))]
        cases = [Shifted((30, 40, 30), by=shift) for shift in shifts]
        groups.append(StoredGroup(f"case {g}", tuple(zip(WORDS, cases, strict=True))))
    return SamplingPool((), tuple(groups))


def contrast_plan(**sequence):
    settings = {
        "crop_size_vox": (32, 32, 32),
        "weights": {"contrast": 1.0},
        "contrasts": WORDS,
        "contrast_members": 4,
        **sequence,
    }
    return make_plan(**settings)


def semantic_material():
    def structure(name, of, subjects):
        """Two places for each subject; the constant is 1e6 per subject and 1e5 per structure."""
        places = []
        for subject in subjects:
            case = Shifted((40, 40, 40), by=1e6 * subject + 1e5 * of)
            places += [StoredLocation(f"patient {subject}", case, (20.0, 10.0, 30.0))] * 2
        return Structure(name, (1.0, 1.0, 1.0), tuple(places))

    kidney = structure("kidney", 0, range(6))
    liver = structure("liver", 5, range(5))
    return SamplingPool((), (), (kidney, liver))


def semantic_plan(**sequence):
    settings = {
        "crop_size_vox": (32, 32, 32),
        "weights": {"semantic": 1.0},
        "semantic_members": 4,
        **sequence,
    }
    return make_plan(**settings)
