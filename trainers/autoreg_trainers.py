"""Fine-tune inside nnU-Net.

The command is ``nnUNetv2_train DATASET 3d_fullres FOLD -tr AutoregPretrainedTrainer -p
AutoregPlans``.

The values of a training are in the ``"autoreg"`` block of the plans; a number in the trainer's
name only changes the length. A fine-tuned CNN is written as an ordinary nnU-Net model. Validation
and prediction are nnU-Net's own, so ``nnUNetv2_predict`` computes exactly what was validated.
"""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import dummy_context
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_autoreg.bridge import TRAINERS, split_length
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import AutoregBlock, read_block
from nnunet_autoreg.finetune.decoder import transferred_keys
from nnunet_autoreg.finetune.load import Target, load_planned_encoder
from nnunet_autoreg.finetune.network import build_network, own_arguments
from nnunet_autoreg.finetune.one_line import explain_errors_of_nnunet, one_line_errors
from nnunet_autoreg.finetune.recipe import (
    IterationRates,
    encoder_parameters,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from nnunet_autoreg.finetune.resolve import ignored_setting, setting_of_environment
from nnunet_autoreg.finetune.stock import (
    named_as_stock,
    needs_line,
    predict_line,
    runs_on_stock,
    stock_plans,
)
from nnunet_autoreg.finetune.user_weights import kept_line, named_weights, watch_loading
from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.machine import has_bf16
from nnunet_autoreg.nnunet_api import results_folder
from nnunet_autoreg.safe_load import plain_loading

explain_errors_of_nnunet()


class _AutoregTrainer(nnUNetTrainer):
    """Train like nnU-Net, but with the plan's network, optimiser and schedule."""

    uses_weights = True
    transfers_decoder = True
    """False for networks that use only the encoder of the weights, regardless of the plan."""
    length: int | None = None
    """Number of epochs; None to use the plan's."""
    my_init_kwargs: dict[str, Any]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        with one_line_errors():
            self.block = _checked_block(type(self), plans, configuration)

        # Trainers of other tasks build networks that nnU-Net does not have.
        build = type(self).build_network_architecture
        self.segments = build is _AutoregTrainer.build_network_architecture
        class_path = self.block.encoder.class_path
        self.is_stock_model = self.segments and runs_on_stock(class_path, plans)
        if self.is_stock_model:
            # nnU-Net writes these plans into the results folder and the checkpoints.
            plans = stock_plans(plans)
        super().__init__(plans, configuration, fold, dataset_json, device)

        recipe = self.block.recipe
        self.initial_lr = recipe.pretrained_rate if self.uses_weights else recipe.scratch_rate
        self.weight_decay = recipe.weight_decay
        self.num_epochs = self.length or recipe.num_epochs
        self.num_iterations_per_epoch = recipe.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = recipe.num_val_iterations_per_epoch

        # With fewer than three resolutions, nnU-Net's weights of the coarser outputs are 0 / 0. The
        # plans of a transformer have no resolutions, and it has no coarser outputs.
        self.enable_deep_supervision = False
        if recipe.deep_supervision:
            num_resolutions = len(self.configuration_manager.pool_op_kernel_sizes)
            self.enable_deep_supervision = num_resolutions > 2
        self.has_bf16 = has_bf16(self.device)
        if self.has_bf16:
            # Only float16 needs scaled gradients.
            self.grad_scaler = None
        self.is_fresh_start = True
        self.iteration = 0

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the plan's network with random weights.

        Prediction calls this as well, and needs no pretrained weights.
        """
        with one_line_errors():
            block = read_block(plans_manager.plans)
            arguments = own_arguments(configuration_manager.network_arch_init_kwargs)
            return build_network(
                block,
                configuration_manager.patch_size,
                num_input_channels,
                num_output_channels,
                arguments,
                deep_supervision=enable_deep_supervision and block.recipe.deep_supervision,
            )

    def initialize(self) -> None:
        """Initialise as nnU-Net does, and watch for weights of the user.

        nnU-Net loads ``-pretrained_weights`` between this call and ``on_train_start``.
        """
        with one_line_errors():
            self.users_weights = named_weights(sys.argv)
        super().initialize()
        self.has_users_weights = watch_loading(self.unwrapped())

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Switch the coarser outputs of a CNN on or off; other networks have only one output.

        They stay off if this training does not use them: nnU-Net switches them on after validation,
        even if they were off before.
        """
        if self.block.recipe.deep_supervision:
            decoder: Any = self.unwrapped().decoder
            decoder.deep_supervision = enabled and self.enable_deep_supervision

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, IterationRates]:
        """Return the recipe's optimiser, and the learning rates of all iterations."""
        recipe = self.block.recipe
        optimizer = make_optimizer(self.optimizer_groups(), recipe, self.initial_lr)
        schedule = make_schedule(
            recipe,
            self.initial_lr,
            self.num_epochs,
            self.num_iterations_per_epoch,
            self.configuration_manager.batch_size,
            self.uses_weights,
        )
        return optimizer, IterationRates(optimizer, schedule, self.num_iterations_per_epoch)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the parameters in groups with their learning rates and weight decays."""
        network = self.unwrapped()
        has_decoder = self.uses_weights and self.transfers_decoder
        decoder_keys = transferred_keys(network, self.block) if has_decoder else frozenset()
        return parameter_groups(network, self.block.recipe, decoder_keys)

    def unwrapped(self) -> nn.Module:
        """Return the network itself, without DDP and torch.compile."""
        network: nn.Module = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        if isinstance(network, OptimizedModule):
            return network._orig_mod
        return network

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint, whole or not at all.

        After a kill or a power cut, the previous checkpoint is still there. The checkpoint of an
        ordinary nnU-Net model names nnU-Net's own trainer, so that it predicts without ours.
        """
        temporary = Path(f"{filename}.tmp")
        with named_as_stock(self) if self.is_stock_model else nullcontext():
            super().save_checkpoint(str(temporary))
        if self.local_rank == 0 and temporary.exists():
            # The new name must not reach the disk before the content.
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(filename)

    def load_checkpoint(self, checkpoint: dict[str, Any] | str, /) -> None:
        """Continue, validate or predict from a checkpoint, without the pretrained weights.

        Code in a checkpoint is never run: the command ends with one line instead. The argument is
        given by position, because its name differs between releases of nnU-Net.
        """
        name = checkpoint if isinstance(checkpoint, str) else "the checkpoint"
        with one_line_errors(), plain_loading(Path(name)):
            super().load_checkpoint(checkpoint)
        if self.is_stock_model:
            # Checkpoints of earlier releases hold the plans with the guard.
            self.my_init_kwargs["plans"] = self.plans_manager.plans
        self.is_fresh_start = False

    def on_train_start(self) -> None:
        """Load the pretrained weights on a fresh start, then prepare as nnU-Net does.

        Every process loads them. Weights that the user has named are never overwritten.
        """
        if not self.was_initialized:
            self.initialize()

        if self.is_fresh_start and self.has_users_weights():
            weights = self.block.weights if self.uses_weights else None
            self.print_to_log_file(kept_line(self.users_weights, weights.name if weights else None))
        elif self.is_fresh_start and self.uses_weights:
            with one_line_errors():
                warning = self.block.weights and ignored_setting(
                    results_folder(),
                    self.block.weights,
                    setting_of_environment(),
                )
                if warning:
                    self.print_to_log_file(f"WARNING: {warning}")

                # Older datasets call the channels "modality".
                key = "channel_names" if "channel_names" in self.dataset_json else "modality"
                names = tuple(str(name) for name in self.dataset_json[key].values())
                target = Target(len(names), as_size(self.configuration_manager.patch_size), names)
                table = load_planned_encoder(
                    self.unwrapped(),
                    self.block,
                    results_folder(),
                    target,
                    self.transfers_decoder,
                )
                if self.local_rank == 0:
                    self.print_to_log_file("\n".join(table.lines()), add_timestamp=False)

        super().on_train_start()

    def on_train_end(self) -> None:
        """End as nnU-Net does; log how to predict, and which software prediction needs."""
        super().on_train_end()
        self.print_to_log_file(needs_line(self.is_stock_model))
        if self.segments:
            model, dataset = Path(self.output_folder_base), self.plans_manager.dataset_name
            self.print_to_log_file(predict_line(model, dataset, self.device.type))

    def on_train_epoch_start(self) -> None:
        """Begin an epoch; learning rates depend only on the epoch and the iteration in it."""
        super().on_train_epoch_start()
        self.iteration = 0

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train one step.

        It differs from nnU-Net's step by a learning rate per iteration, a decoder-first stage,
        bfloat16 if the device supports it, and the recipe's limit of the gradient norm.
        """
        self.lr_scheduler.step(self.current_epoch, self.iteration)
        is_decoder_first = self.lr_scheduler.is_decoder_first(self.current_epoch, self.iteration)
        self.iteration += 1

        data = self._on_device(batch["data"])
        target = self._on_device(batch["target"])
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self.network(data)

            # In float32, because Dice sums over millions of voxels, too many for the 8 bits of
            # bfloat16's mantissa.
            if isinstance(output, list):
                loss = self.loss([o.float() for o in output], target)
            else:
                loss = self.loss(output.float(), target)
        self._update(loss, is_decoder_first)
        return {"loss": loss.detach().cpu().numpy()}

    def _update(self, loss: torch.Tensor, is_decoder_first: bool) -> None:
        """Update the parameters, or only those of the decoder.

        Args:
            loss: scalar with gradients.
            is_decoder_first: whether the encoder is not trained in this step.
        """
        scaler = self.grad_scaler
        loss = loss if scaler is None else scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

        if is_decoder_first:
            # The optimiser skips parameters without a gradient, also their momentum and weight
            # decay. With DDP, all gradients have been summed before.
            for parameter in encoder_parameters(self.unwrapped()):
                parameter.grad = None
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.block.recipe.clip_norm)

        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()

    def _on_device(self, tensors: Any) -> Any:
        """Return a tensor, or a list with one per resolution, on the training device."""
        if isinstance(tensors, list):
            return [self._on_device(tensor) for tensor in tensors]
        return tensors.to(self.device, non_blocking=True)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass: half precision on a GPU."""
        if self.device.type != "cuda":
            return dummy_context()  # type: ignore[no-any-return]
        return torch.autocast("cuda", dtype=torch.bfloat16 if self.has_bf16 else torch.float16)


def _checked_block(
    trainer: type[_AutoregTrainer],
    plans: dict[str, Any],
    configuration: str,
) -> AutoregBlock:
    """Return the ``"autoreg"`` block of parsed plans.

    Raises:
        PlanError: the plans have no such block or configuration, or no weights for this trainer.
    """
    block = read_block(plans)
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise PlanError(
            f"{plans['plans_name']}.json has no configuration '{configuration}'; it has: {known}",
            code="plan-no-configuration",
        )
    if trainer.uses_weights and block.weights is None:
        # Every trainer has a twin that begins with random weights.
        twin = trainer.__name__.replace("Pretrained", "Scratch")
        for task in ("Detection", "Classification"):
            twin = twin.replace(f"{task}Trainer", f"{task}ScratchTrainer")
        raise PlanError(
            f"{plans['plans_name']}.json was made for training from scratch "
            f"(autoreg_weights=none); use '-tr {twin}', or plan again with weights",
            code="plan-without-weights",
        )
    return block


class AutoregPretrainedTrainer(_AutoregTrainer):
    """Fine-tune the plan's pretrained encoder."""


class AutoregScratchTrainer(_AutoregTrainer):
    """Train the same network from random weights.

    Plan, length, augmentation and steps are the same. Only the learning rate is the best one for
    training from scratch, and there is no stage in which only the decoder is trained.
    """

    uses_weights = False


def trainer_of_length(module: ModuleType, name: str) -> Any:
    """Return a trainer class of ``module`` for another number of epochs, made on first use.

    ``AutoregPretrainedTrainer_20epochs`` is a subclass of ``AutoregPretrainedTrainer`` that trains
    for 20 epochs. That is also its ``__name__``, so nnU-Net writes it into folder names and
    checkpoints, and finds the class by it again. The class becomes an attribute of the module, so
    that pickle finds it in this process, and makes it again in a spawned one.

    Raises:
        AttributeError: the module has no such trainer.
    """
    base_name, num_epochs = split_length(name)
    base = vars(module).get(base_name)
    if num_epochs is None or TRAINERS.get(base_name) != module.__name__ or base is None:
        raise AttributeError(f"module '{module.__name__}' has no attribute '{name}'")

    attributes = {
        "__doc__": f"{base_name} for {num_epochs} epochs.",
        "__module__": module.__name__,
        "length": num_epochs,
    }

    # setdefault, because two threads may ask for the same name at once.
    return vars(module).setdefault(name, type(name, (base,), attributes))


def __getattr__(name: str) -> Any:
    """Return a trainer of another length, such as ``AutoregScratchTrainer_20epochs``."""
    return trainer_of_length(sys.modules[__name__], name)
