"""The cost of a pretraining in FLOPs, samples and seconds, to compare arms at equal cost."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_autoreg import rng
from nnunet_autoreg.benchmark.results import Cost
from nnunet_autoreg.geometry import Size, Spacing, as_size
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import from_jsonable, read_json
from nnunet_autoreg.report.metrics import read_lines
from nnunet_autoreg.sampling.pool import Place, SamplingPool, StoredGroup, Structure
from nnunet_autoreg.sampling.sample import collate
from nnunet_autoreg.sampling.sampler import TRAINING

log = logging.getLogger(__name__)

NUM_STEPS_COUNTED = 4
"""Kinds of sequences and shares of known blocks, and with them FLOPs, change from step to step."""

NUM_SUBJECTS = 16


@dataclass(frozen=True)
class NoiseCase:
    """A case without a file: noise of some shape, enough to count the arithmetic of a step."""

    shape_vox: Size
    spacing_mm: Spacing

    def read_padded(
        self,
        start_zyx: Sequence[int],
        size_zyx: Sequence[int],
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return noise (1, Z, Y, X) and which of its voxels lie inside the case."""
        size = as_size(size_zyx)
        # The same crop has the same noise, as of a case on disk.
        generator = rng.generator(0, "cost of a step", *(abs(int(first)) for first in start_zyx))
        noise = generator.normal(size=(1, *size)).astype(np.float32)

        is_real = np.ones(size, dtype=bool)
        for axis, (first, extent) in enumerate(zip(start_zyx, self.shape_vox, strict=True)):
            places = np.arange(first, first + size[axis])
            is_inside = (places >= 0) & (places < extent)
            is_real &= is_inside.reshape([-1 if a == axis else 1 for a in range(3)])
        return noise * is_real, is_real


def pretraining_cost(folder: Path) -> Cost | None:
    """Return the cost of a run from its plan and its metrics; None where it left no plan."""
    file = folder / "plan.json"
    if not file.is_file():
        return None
    plan = from_jsonable(Plan, read_json(file), str(file))

    samples = plan.optim.batch_size * plan.optim.num_steps
    flops = None
    try:
        flops = flops_per_sample(plan) * samples
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("the arithmetic of '%s' could not be counted (%s)", folder.name, reason)

    # The mean step time that was logged, times the steps.
    times = []
    for line in read_lines(folder / "metrics.jsonl"):
        is_number = isinstance(line["value"], int | float)
        if line["name"] == "step_time" and is_number:
            times.append(float(line["value"]))

    seconds = round(statistics.fmean(times) * plan.optim.num_steps, 1) if times else None

    return Cost(flops, samples, seconds)


def flops_per_sample(plan: Plan) -> float:
    """Return multiplications and additions of a training step on one crop, mean over a few steps.

    Activations are not recomputed here: recomputing costs time, but it is no part of the method.
    """
    optim = replace(plan.optim, checkpoint_activations=False)
    plan = replace(plan, optim=optim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = build_objective(plan)

    pool = _noise_pool(plan)

    counts = []
    for step in range(NUM_STEPS_COUNTED):
        batch = collate([objective.sampler.draw(pool, TRAINING, step, 0)])
        # The counter knows no fused attention of a CPU, but the matrix products of the plain one.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            torch.autograd.backward(objective.loss(batch).total)
        objective.module.zero_grad(set_to_none=True)
        counts.append(float(counter.get_total_flops()))
    return statistics.fmean(counts)


def _noise_pool(plan: Plan) -> SamplingPool:
    """Return a sampling pool for every kind of sequence, in scans of twice the crop's extent."""
    shape = as_size([2 * extent for extent in plan.sequence.crop_size_vox])
    spacing_mm = plan.data.spacing_mm
    case = NoiseCase(shape, spacing_mm)

    # Noise stands in for stored cases: it has their shape, their spacing and their one method.
    members: Any = tuple((name, case) for name in plan.sequence.contrasts)
    group = StoredGroup("noise", members)
    centre = (shape[0] / 2, shape[1] / 2, shape[2] / 2)
    stand_in: Any = case
    places = [Place(f"subject {n}", stand_in, centre) for n in range(NUM_SUBJECTS)]
    structure = Structure("noise", spacing_mm, tuple(places))
    return SamplingPool((stand_in,), (group,), (structure,))
