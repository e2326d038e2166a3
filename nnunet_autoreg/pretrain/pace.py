"""How long a step takes here, measured before the run: for a length given in hours."""

import time

from nnunet_autoreg.pretrain.batches import training_batches
from nnunet_autoreg.pretrain.loop import Trainer

WARM_UP_STEPS, MIN_STEPS, MAX_STEPS = 2, 3, 50
ENOUGH_S = 20.0


def seconds_per_step(trainer: Trainer) -> float:
    """Mean seconds of a training step, loading included, over up to 50 steps or about 20 s after
    two steps of warm-up.

    Args:
        trainer: is trained by this and not to be used afterwards.
    """
    steps = range(WARM_UP_STEPS + MAX_STEPS)
    prepared = training_batches(
        trainer.batches, steps, trainer.num_workers, trainer.device.type == "cuda"
    )
    start, done = time.monotonic(), 0
    for step, batch in zip(steps, prepared, strict=True):
        loss, _ = trainer.train_step(step, batch)
        float(loss)  # waits for the device
        if step < WARM_UP_STEPS:
            start = time.monotonic()
            continue
        done += 1
        if trainer.world.any(done >= MIN_STEPS and time.monotonic() - start > ENOUGH_S):
            break
    return (time.monotonic() - start) / done
