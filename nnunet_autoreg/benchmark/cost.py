"""The cost of a pretraining in FLOPs, samples and seconds, to compare arms at equal cost."""

import logging
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_autoreg.benchmark.results import Cost
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.records import from_jsonable, read_json
from nnunet_autoreg.report.metrics import read_lines
from nnunet_autoreg.sampling.noise import noise_pool
from nnunet_autoreg.sampling.sample import collate
from nnunet_autoreg.sampling.sampler import TRAINING

log = logging.getLogger(__name__)

NUM_STEPS_COUNTED = 4
"""Kinds of sequences and shares of known blocks, and with them FLOPs, change from step to step."""


def pretraining_cost(folder: Path) -> Cost | None:
    """Return the cost of a run from its plan and its metrics; None if it left no plan."""
    file = folder / "plan.json"
    if not file.is_file():
        return None
    plan = from_jsonable(Plan, read_json(file), str(file))

    num_samples = plan.optim.batch_size * plan.optim.num_steps
    flops = None
    try:
        flops = flops_per_sample(plan) * num_samples
    except (RuntimeError, NotImplementedError, ValueError) as error:
        message_lines = str(error).splitlines()
        reason = message_lines[0] if message_lines else type(error).__name__
        log.warning("the FLOPs of '%s' could not be counted (%s)", folder.name, reason)

    seconds_timed = 0.0
    num_timed = 0
    for line in read_lines(folder / "metrics.jsonl"):
        is_number = isinstance(line["value"], int | float)
        if line["name"] == "step_time" and is_number:
            # Each entry is the mean over the steps since the one before.
            num_new = int(line["step"]) + 1 - num_timed
            seconds_timed += float(line["value"]) * num_new
            num_timed += num_new

    seconds = None
    if num_timed:
        seconds = round(seconds_timed / num_timed * plan.optim.num_steps, 1)
    return Cost(flops, num_samples, seconds)


def flops_per_sample(plan: Plan) -> float:
    """Return the multiplications and additions of a training step per crop, mean of a few steps.

    Activations are not recomputed here: recomputing costs time, but it is not part of the method.
    """
    optim = replace(plan.optim, checkpoint_activations=False)
    plan = replace(plan, optim=optim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = build_objective(plan)

    pool = noise_pool(plan)
    counts = []
    for step in range(NUM_STEPS_COUNTED):
        batch = collate([objective.sampler.draw(pool, TRAINING, step, 0)])
        # The counter does not know the fused attention of a CPU. The plain one consists of matrix
        # products, which it counts.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            torch.autograd.backward(objective.loss(batch).total)
        objective.module.zero_grad(set_to_none=True)
        counts.append(float(counter.get_total_flops()))
    return statistics.fmean(counts)
