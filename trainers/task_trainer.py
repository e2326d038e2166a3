"""Train for detection or classification: the parts that their trainers share.

A task's plan is a block of the configuration in the plans file. It is made by the first training
and kept beside the preprocessed data, so that all folds and the prediction use the same plan.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed, nn

from nnunet_autoreg.downstream.plan_block import store
from nnunet_autoreg.downstream.training import forwarded_log, keep_thread_limit
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import read_block
from nnunet_autoreg.finetune.network import build_network, own_arguments
from nnunet_autoreg.finetune.one_line import one_line_errors
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import read_json, write_json
from nnunet_autoreg.trainers.autoreg_trainers import AutoregPretrainedTrainer


class TaskTrainer(AutoregPretrainedTrainer):
    """Train for another task than segmentation; a subclass defines the task."""

    transfers_decoder = False
    task: ClassVar[str]
    """Name of the task, and of its folder in the package."""
    task_block: ClassVar[str]
    """Name of the block in the plans file."""

    plan: Any

    @staticmethod
    def read_task_plan(configuration: Mapping[str, Any], where: str) -> Any:
        """Return the checked block of a configuration of parsed plans, None if it has none.

        Args:
            where: name of the plans file in an error.
        """
        raise NotImplementedError

    def initialize(self) -> None:
        """Prepare the task if that was not done, then make nnU-Net's own preparations."""
        if not self.was_initialized:
            keep_thread_limit()
            with one_line_errors(), self._library_log():
                if self.is_cascaded:
                    raise PlanError(
                        f"{self.configuration_name} is the second stage of a cascade, but "
                        f"{self.task} has one stage; train 3d_fullres",
                        code="task-cascade",
                    )
                with self._main_process_first():
                    self.prepare_task()
                    self._find_plan()
                # The heads of a task have one output, or supervise the inner feature maps.
                self.enable_deep_supervision = False
                self.num_epochs = self.length or self.plan.num_epochs
                self.use_plan()
        super().initialize()

    def prepare_task(self) -> None:
        """Read the facts about the task from the preprocessed dataset."""
        raise NotImplementedError

    def make_task_plan(self) -> tuple[Any, str]:
        """Return a new plan, and the reason of its main choice for the log."""
        raise NotImplementedError

    def check_task_plan(self, where: str) -> None:
        """Compare the plan with the dataset, which may have been edited since.

        Raises:
            PlanError: they differ.
        """
        raise NotImplementedError

    def use_plan(self) -> None:
        """Set the values of the training that the plan decides."""
        raise NotImplementedError

    @classmethod
    def task_network(
        cls,
        network: nn.Module,
        class_path: str,
        arguments: dict[str, Any],
        patch: Size,
        plan: Any,
    ) -> nn.Module:
        """Return the network of the task.

        Args:
            network: segmentation network with the plan's encoder.
            class_path, arguments: class and arguments of that network.
            patch: size of a patch, (z, y, x).
            plan: plan of the task.
        """
        raise NotImplementedError

    @contextmanager
    def _main_process_first(self) -> Iterator[None]:
        """Let the main process write files first; the others then read them."""
        if self.is_ddp and self.local_rank > 0:
            distributed.barrier()
        yield
        if self.is_ddp and self.local_rank == 0:
            distributed.barrier()

    def _find_plan(self) -> None:
        """Read the plan of this configuration, or make it and write it into the plans file."""
        where = f"{self.plans_file.name}: {self.configuration_name}"
        self.plan = type(self).read_task_plan(self.configuration_manager.configuration, where)
        if self.plan is None:
            self.plan, reason = self.make_task_plan()

            # Checkpoints store the plans in memory; the file is for later trainings.
            name = self.configuration_name
            block = self.task_block
            plans = self.plans_manager.plans
            store(plans, name, block, self.plan)
            # nnU-Net's manager holds a copy of the configuration.
            self.configuration_manager.configuration[block] = plans["configurations"][name][block]
            if self.local_rank == 0:
                # Other configurations in the file stay as they are.
                on_disk = read_json(self.plans_file)
                store(on_disk, name, block, self.plan)
                write_json(self.plans_file, on_disk)

            self.print_to_log_file(
                f"{self.task} was planned ({reason}) and is now part of {self.plans_file}",
            )
        self.check_task_plan(where)

    @property
    def plans_file(self) -> Path:
        """The plans file of the preprocessed data, in which the block is kept."""
        base = Path(self.preprocessed_dataset_folder_base)
        return base / f"{self.plans_manager.plans_name}.json"

    def _library_log(self) -> AbstractContextManager[None]:
        """Send the library's log to nnU-Net's log file and to the terminal.

        It names cases, as nnU-Net's own lines do. The log file stays in the folder of results.
        """
        return forwarded_log(f"nnunet_autoreg.{self.task}", self.print_to_log_file)

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Return the plan's network with heads and random weights; prediction calls this too.

        Raises:
            SystemExit: with one line if the plans have no block of this task.
        """
        with one_line_errors():
            block = read_block(plans_manager.plans)
            where = f"{plans_manager.plans_name}.json"
            plan = cls.read_task_plan(configuration_manager.configuration, where)
            if plan is None:
                raise PlanError(
                    f'{where} has no "{cls.task_block}" block for this configuration; train an '
                    f"{cls.__name__} first",
                    code="task-no-block",
                )
            arguments = own_arguments(configuration_manager.network_arch_init_kwargs)
            patch = as_size(configuration_manager.patch_size)
            network = build_network(
                block,
                patch,
                num_input_channels,
                num_output_channels,
                arguments,
            )
            return cls.task_network(network, block.encoder.class_path, arguments, patch, plan)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Do nothing: there is no deep supervision."""

    def described_model(self) -> dict[str, Any]:
        """Return the description of the model for the results of its validation."""
        return {
            "dataset": self.plans_manager.dataset_name,
            "trainer": self.__class__.__name__,
            "plans": self.plans_manager.plans_name,
            "configuration": self.configuration_name,
            "folds": [self.fold],
        }

    def own_share(self, cases: Sequence[str]) -> list[str]:
        """Return the cases that this process validates; without DDP these are all."""
        if not self.is_ddp:
            return sorted(cases)
        return sorted(cases)[self.local_rank :: distributed.get_world_size()]

    def training_patches(self) -> tuple[Any, Any]:
        """Return the size (z, y, x) of a patch before augmentation, and nnU-Net's augmentation."""
        # nnU-Net draws larger patches, which it rotates and then cuts.
        rotation, is_flat, initial_patch, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        transforms = self.get_training_transforms(
            self.configuration_manager.patch_size,
            rotation,
            None,
            mirror_axes,
            is_flat,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
        )
        return initial_patch, transforms
