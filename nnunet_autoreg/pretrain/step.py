"""One optimiser step: forward and backward part by part, the sum over processes, the guard's
verdict, the update.
"""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nnunet_autoreg.model.parameters import is_decayed
from nnunet_autoreg.objectives.base import LossTerms, Objective
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.pretrain.batches import parts_of
from nnunet_autoreg.pretrain.compiled import (
    cannot_compile,
    fast_path,
    first_line,
    place_on,
    run_by,
)
from nnunet_autoreg.pretrain.distributed import ALONE, World, share_of, spread, summing
from nnunet_autoreg.pretrain.guard import StepGuard, skip_if
from nnunet_autoreg.pretrain.schedule import learning_rate
from nnunet_autoreg.pretrain.validation import autocast
from nnunet_autoreg.sampling.sample import Batch

log = logging.getLogger(__name__)


class BatchLoss(nn.Module):
    """An objective's loss as the forward of a module, which is where DDP and FSDP take hold.

    Args:
        loss: ``objective.loss``, or the same with its layers compiled.
    """

    def __init__(self, objective: Objective, loss: Callable[[Batch], LossTerms]):
        super().__init__()
        self.module = objective.module
        self.loss = loss

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the loss and what it sums over, scalars."""
        terms = self.loss(batch)
        return terms.total, terms.count


class TrainingStep:
    """Called with a step's number and this process's share of its batch, trains the objective's
    module, in place.

    Args:
        sharded: parameters and moments are spread over the processes.

    Attributes:
        numbers: which samples of a batch are this process's own.
        micro_batch_size: how many of them are on the device at once.
    """

    def __init__(
        self,
        plan: Plan,
        objective: Objective,
        device: torch.device,
        world: World = ALONE,
        sharded: bool = False,
    ):
        self.plan, self.objective, self.device, self.world, self.sharded = (
            plan,
            objective,
            device,
            world,
            sharded,
        )
        self.numbers = share_of(plan.optim.batch_size, world.rank, world.size, sharded)
        self.micro_batch_size = min(
            plan.optim.micro_batch_size or len(self.numbers), len(self.numbers)
        )
        place_on(device, objective.module, sharded)
        self.module = objective.module
        self.fast_path = fast_path(plan, device, sharded)
        loss = run_by(self.fast_path, objective.loss)
        self.loss_of = spread(BatchLoss(objective, loss), device, world, sharded)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.module, plan.optim.weight_decay, plan.optim.decay_all),
            lr=plan.optim.lr,
            betas=plan.optim.betas,
            fused=True,
        )
        self.guard = StepGuard(plan.run, device)

    def __call__(self, step: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimiser step on a batch of any device; returns the loss and the gradient's norm
        before clipping, the same on all processes. Nothing waits for the device.
        """
        rate = learning_rate(self.plan.optim, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._accumulated(batch)
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.plan.optim.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        skip_if(self.optimizer, self.guard.judge(loss, norm))
        self.optimizer.step()
        self.objective.after_step(step)
        return loss, norm

    def _accumulated(self, batch: Batch) -> Tensor:
        """Return what ``_accumulate`` does; where compiling fails, log it once and compute
        everything eagerly from then on.
        """
        try:
            return self._accumulate(batch)
        except Exception as error:
            # Other processes have added up gradients of this step already; and the dry step decides
            # for itself.
            path, is_training = self.fast_path, self.plan.run.peak_memory_gib is not None
            failed = path is not None and cannot_compile(error)
            if (
                path is None
                or path.is_given_up
                or self.world.size > 1
                or not (is_training and failed)
            ):
                raise
            path.is_given_up = True
            log.warning(
                "a layer could not be compiled (%s): training goes on uncompiled, slower",
                first_line(error),
            )

        self.optimizer.zero_grad(set_to_none=True)
        return self._accumulate(batch)

    def _accumulate(self, batch: Batch) -> Tensor:
        """Leave the gradient of the mean over all that is supervised in the whole batch, part by
        part; return that mean.

        How much is supervised is known after the last part, of all processes, only: each part adds
        the gradient of its sum (over a constant, to keep numbers near 1), and the division comes at
        the end. So the parts' sizes change nothing but rounding. DDP and FSDP give the mean over
        processes, which the number of processes turns into the sum.
        """
        scale = batch.real[0].numel() * self.plan.optim.batch_size
        sums = torch.zeros(2, device=self.device)
        parts = list(parts_of(batch, self.micro_batch_size))
        for number, part in enumerate(parts, start=1):
            with summing(self.loss_of, last=number == len(parts)):
                with autocast(self.device):
                    total, count = self.loss_of(part.to(self.device))
                torch.autograd.backward(total / scale)
            sums += torch.stack([total.detach().float(), count.float()])
        total, count = self.world.add(sums).unbind()
        count = count.clamp(min=1)
        factor = scale * self.world.size / count
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return total / count


def parameter_groups(
    module: nn.Module, weight_decay: float, decay_all: bool = False
) -> list[dict[str, object]]:
    """AdamW groups, with and without decay; ``decay_all`` leaves the second one empty."""
    decayed = [p for name, p in module.named_parameters() if decay_all or is_decayed(name, p)]
    plain = [p for name, p in module.named_parameters() if not (decay_all or is_decayed(name, p))]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
