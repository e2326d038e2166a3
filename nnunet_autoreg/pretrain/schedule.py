"""The learning rate as a pure function of the step."""

import math

from nnunet_autoreg.plan import OptimPlan


def learning_rate(optim: OptimPlan, step: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up to ``lr`` over ``warmup_steps``, then half a cosine to
    0 at ``num_steps``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.num_steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
