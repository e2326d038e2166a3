"""``nnUNetv2_train DATASET 3d_fullres FOLD -tr AutoregDetectionTrainer -p AutoregPlans``: detection
inside nnU-Net.

A Retina U-Net on the plan's encoder: boxes are learned beside the segmentation, which stock
``nnUNetv2_predict`` still gives; ``autoreg_detect`` gives the boxes.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed, nn

from nnunet_autoreg.detection.average import MovingAverage
from nnunet_autoreg.detection.data import InstanceDataset, InstanceLoader, Maker, prepare_instances
from nnunet_autoreg.detection.infer import ScanDetector
from nnunet_autoreg.detection.instances import BLOCK
from nnunet_autoreg.detection.net import Detector, Output, build_detector, stage_strides
from nnunet_autoreg.detection.objects import ObjectSource
from nnunet_autoreg.detection.plan import (
    DetectionPlan,
    check_same_dataset,
    make_plan,
    read_plan,
    store,
)
from nnunet_autoreg.detection.score import quick_scores
from nnunet_autoreg.detection.thresholds import SUMMARY
from nnunet_autoreg.detection.training import (
    ForwardedLog,
    Losing,
    absent_classes,
    detection_recipe,
    keep_thread_limit,
    make_segmentation_loss,
    mean_dice,
    patches_scored,
    without_decay_on_norms,
)
from nnunet_autoreg.detection.validate import validate_cases, write_summary
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import AutoregBlock, read_block
from nnunet_autoreg.finetune.network import build_network, own_arguments
from nnunet_autoreg.finetune.one_line import one_line_errors
from nnunet_autoreg.finetune.recipe import (
    IterationRates,
    make_optimizer,
    make_schedule,
    parameter_groups,
)
from nnunet_autoreg.geometry import as_size, as_spacing
from nnunet_autoreg.records import read_json, write_json
from nnunet_autoreg.trainers.autoreg_trainers import AutoregPretrainedTrainer, trainer_of_length

SCORES = {"det_map": "map_0.1:0.5:0.05", "det_ap10": "ap_0.1", "det_ap50": "ap_0.5"}
"""What the logger keeps of the scores of an epoch."""


class AutoregDetectionTrainer(AutoregPretrainedTrainer):  # type: ignore[misc]
    """Trains a detector on the plan's pretrained encoder."""

    transfers_decoder = False
    block: AutoregBlock
    plan: DetectionPlan
    inference_allowed_mirroring_axes: Any

    def initialize(self) -> None:
        """Find the objects, plan if nobody has, then nnU-Net's own preparations."""
        if not self.was_initialized:
            keep_thread_limit()
            with one_line_errors(), self._library_log():
                self._prepare()
        super().initialize()
        network = self.unwrapped()
        self.average = MovingAverage(network, self.plan.average_decay)
        self.average.attach(self.optimizer)
        for name in SCORES:
            self.logger.local_logger.my_fantastic_logging.setdefault(name, [])

    def _prepare(self) -> None:
        if self.is_cascaded:
            raise PlanError(
                f"{self.configuration_name} is the second stage of a cascade; detection has one "
                "stage: train 3d_fullres"
            )
        if self.is_ddp and self.local_rank > 0:
            distributed.barrier()
        self.source = self._objects()
        self.index = prepare_instances(self._maker(), self._all_cases(), default_num_processes)
        self.plan = self._planned()
        if self.is_ddp and self.local_rank == 0:
            distributed.barrier()
        self.block = replace(self.block, recipe=detection_recipe(self.block.recipe, self.plan))
        self.enable_deep_supervision = False
        self.num_epochs = self.length or self.plan.num_epochs
        self.oversample_foreground_percent = self.plan.object_share

    def _objects(self) -> ObjectSource:
        base, reader = (
            Path(self.preprocessed_dataset_folder_base),
            self.plans_manager.image_reader_writer_class,
        )
        return ObjectSource.of_dataset(
            base / "gt_segmentations", base.name, self.dataset_json, reader
        )

    def _maker(self) -> Maker:
        configuration = self.configuration_manager
        return Maker(
            Path(self.preprocessed_dataset_folder),
            self.source,
            as_size(self.plans_manager.transpose_forward),
            as_spacing(configuration.spacing),
            as_size(configuration.patch_size),
            configuration.resampling_fn_seg,
        )

    def _all_cases(self) -> list[str]:
        folder = self.preprocessed_dataset_folder
        return sorted(infer_dataset_class(folder).get_identifiers(folder))

    def _planned(self) -> DetectionPlan:
        """The plan of this configuration; made now, and written into the plans file, if there is
        none.
        """
        configuration, name = self.configuration_manager, self.configuration_name
        file = Path(self.preprocessed_dataset_folder_base) / f"{self.plans_manager.plans_name}.json"
        plan = read_plan(configuration.configuration, f"{file.name}: {name}")
        if plan is None:
            arguments, patch = (
                own_arguments(configuration.network_arch_init_kwargs),
                as_size(configuration.patch_size),
            )
            encoder = self.block.encoder
            plan = make_plan(
                self.dataset_json,
                self.index.sizes_vox(),
                stage_strides(encoder.class_path, arguments, patch),
                patch,
                is_tiny=encoder.name.endswith("_tiny"),
                has_masks=self.index.has_masks,
            )
            store(self.plans_manager.plans, name, plan)
            configuration.configuration[BLOCK] = self.plans_manager.plans["configurations"][name][
                BLOCK
            ]
            if self.local_rank == 0:
                on_disk = read_json(file)
                store(on_disk, name, plan)
                write_json(file, on_disk)
                self.print_to_log_file(
                    f"detection was planned ({plan.reasons['anchors']}) and is now part of {file}"
                )
        check_same_dataset(plan, self.dataset_json, f"{file.name}: {name}")
        return plan

    @contextmanager
    def _library_log(self) -> Iterator[None]:
        """What the library says goes to nnU-Net's log file and to the terminal."""
        logger = logging.getLogger("nnunet_autoreg.detection")
        handler, level = ForwardedLog(self.print_to_log_file), logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The plan's network with heads, random weights; prediction calls this too."""
        with one_line_errors():
            block = read_block(plans_manager.plans)
            where = f"{plans_manager.plans_name}.json"
            plan = read_plan(configuration_manager.configuration, where)
            if plan is None:
                raise PlanError(
                    f'{where} has no "{BLOCK}" block for this configuration; train an '
                    "AutoregDetectionTrainer first"
                )
            arguments, patch = (
                own_arguments(configuration_manager.network_arch_init_kwargs),
                configuration_manager.patch_size,
            )
            network = build_network(
                block, patch, num_input_channels, num_output_channels, arguments
            )
            return build_detector(
                network,
                block.encoder.class_path,
                arguments,
                stages=plan.anchors.stages,
                num_shapes=plan.anchors.num_shapes,
                num_classes=len(plan.classes),
                num_channels=plan.head_channels,
            )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, IterationRates]:
        """As for segmentation, but norms and biases are never decayed."""
        network, recipe = self.unwrapped(), self.block.recipe
        groups = without_decay_on_norms(parameter_groups(network, recipe), network)
        optimizer = make_optimizer(groups, recipe, self.initial_lr)
        batch_size, per_epoch = self.configuration_manager.batch_size, self.num_iterations_per_epoch
        schedule = make_schedule(
            recipe, self.initial_lr, self.num_epochs, per_epoch, batch_size, self.uses_weights
        )
        return optimizer, IterationRates(optimizer, schedule, per_epoch)

    def _build_loss(self) -> Losing:
        labels = self.label_manager
        loss = make_segmentation_loss(labels.has_regions, labels.ignore_label, self.is_ddp)
        return Losing(
            self.plan,
            loss,
            labels.foreground_regions if labels.has_regions else None,
            labels.ignore_label,
        )

    def get_dataloaders(self) -> tuple[Any, Any]:
        """nnU-Net's, with objects: same augmentation, our loader."""
        patch = self.configuration_manager.patch_size
        rotation, is_flat, initial_patch, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        # Regions are made on the device: nnU-Net's transform would drop the ids.
        training = self.get_training_transforms(
            patch,
            rotation,
            None,
            mirror_axes,
            is_flat,
            use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
        )
        stock_training, stock_validation = self.get_tr_and_val_datasets()
        self._tell_fold(stock_training.identifiers, stock_validation.identifiers)
        validation = self.get_validation_transforms(None)
        loaders = [
            self._loader(stock_training, initial_patch, training),
            self._loader(stock_validation, patch, validation),
        ]
        num_processes = get_allowed_n_proc_DA()
        if num_processes == 0:
            made = [SingleThreadedAugmenter(loader, None) for loader in loaders]
        else:
            made = [
                self._augmenter(loader, n)
                for loader, n in zip(
                    loaders, (num_processes, max(1, num_processes // 2)), strict=True
                )
            ]
        for augmenter in made:
            next(augmenter)
        return made[0], made[1]

    def _loader(self, stock: Any, patch: Any, transforms: Any) -> InstanceLoader:
        dataset = InstanceDataset(stock, Path(self.preprocessed_dataset_folder), self.index)
        return InstanceLoader(
            dataset,
            self.batch_size,
            patch,
            self.configuration_manager.patch_size,
            self.label_manager,
            oversample_foreground_percent=self.oversample_foreground_percent,
            transforms=transforms,
        )

    def _augmenter(self, loader: InstanceLoader, num_processes: int) -> Any:
        cached = max(6, num_processes // 2)
        is_cuda = self.device.type == "cuda"
        return NonDetMultiThreadedAugmenter(
            loader,
            None,
            num_processes,
            num_cached=cached,
            seeds=None,
            pin_memory=is_cuda,
            wait_time=0.002,
        )

    def _tell_fold(self, training: list[str], validation: list[str]) -> None:
        left_out = "it is left out of the scores"
        not_learned = "it cannot be learned"
        for what, cases, consequence in (
            ("training", training, not_learned),
            ("validation", validation, left_out),
        ):
            absent = absent_classes(self.index, cases)
            if absent:
                self.print_to_log_file(
                    f"WARNING: no {what} case of fold {self.fold} has an object of "
                    f"{', '.join(absent)}; "
                    f"{consequence}"
                )
        if len(absent) == len(self.plan.classes):
            self.print_to_log_file(
                "WARNING: validation has nothing to find: its scores stay 0, and "
                "checkpoint_best.pth is that of the "
                "first epoch; use checkpoint_final.pth"
            )

    def on_train_start(self) -> None:
        """nnU-Net's preparations and the pretrained encoder, from which the average of the weights
        then begins.
        """
        super().on_train_start()
        if self.is_fresh_start:
            self.average.reset()

    def save_checkpoint(self, filename: str) -> None:
        """A checkpoint whose network is the averaged one; what ``--c`` needs besides lies in the
        optimiser's state.
        """
        with self.average.saved():
            super().save_checkpoint(filename)

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Continue or validate from a checkpoint."""
        super().load_checkpoint(filename_or_checkpoint)
        self.average.restore()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One step on the three losses."""
        self.lr_scheduler.step(self.current_epoch, self.iteration)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self.network(self._on_device(batch["data"]))
        losses = self.loss.losses(output, self._on_device(batch["target"]), batch["objects"])
        self._update(losses.total, is_decoder_first=False)
        self.average.update(self.current_epoch * self.num_iterations_per_epoch + self.iteration)
        self.iteration += 1
        numbers: dict[str, Any] = losses.numbers()
        return numbers

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """nnU-Net's own, and the parts of the loss."""
        super().on_train_epoch_end(train_outputs)
        parts = {
            name: float(np.mean([o[f"loss_{name}"] for o in train_outputs]))
            for name in ("class", "box", "seg")
        }
        self.print_to_log_file(
            "losses", ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        )

    def on_validation_epoch_start(self) -> None:
        """Validate the averaged weights, and ask them for boxes."""
        super().on_validation_epoch_start()
        self._validating = ExitStack()
        self._validating.enter_context(self.average.applied())
        self._detector().detect = True

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Losses, voxels right and wrong, and the boxes of each patch."""
        with self._autocast():
            output: Output = self.network(self._on_device(batch["data"]))
        target = self._on_device(batch["target"])
        losses = self.loss.losses(output, target, batch["objects"])
        scans = patches_scored(
            output, self.loss.grid(output), batch["objects"], 0, self.loss.uncounted(target)
        )
        return {
            "loss": losses.numbers()["loss"],
            "scans": scans,
            **self.loss.confusion(output, target),
        }

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Scores over all patches; the mean AP from IoU 0.1 to 0.5 stands where nnU-Net looks for
        the best epoch.
        """
        self._detector().detect = False
        self._validating.close()
        outputs = self._from_all_processes(val_outputs)
        scores = quick_scores(
            [scan for o in outputs for scan in o["scans"]], len(self.plan.classes)
        )
        epoch = self.current_epoch
        self.logger.log("mean_fg_dice", scores[SCORES["det_map"]], epoch)
        self.logger.log("dice_per_class_or_region", mean_dice(outputs), epoch)
        self.logger.log("val_losses", float(np.mean([o["loss"] for o in outputs])), epoch)
        for name, score in SCORES.items():
            self.logger.log(name, scores[score], epoch)
        self.print_to_log_file(
            "patches: "
            + ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items())
        )

    def _from_all_processes(self, outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not self.is_ddp:
            return outputs
        gathered: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, outputs)
        return [output for of_one in gathered for output in of_one]

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's Dice of whole cases, then their boxes in the original images:

        ``validation_detection/summary_detection.json``.

        On a CPU nothing is mirrored.
        """
        trained_axes = self.inference_allowed_mirroring_axes
        if self.device.type == "cpu":
            # Eight times the time, for a segmentation that only helps.
            self.inference_allowed_mirroring_axes = None
        with self.average.applied():
            super().perform_actual_validation(save_probabilities)
            with one_line_errors(), self._library_log():
                self._validate_boxes()
        self.inference_allowed_mirroring_axes = trained_axes

    def _validate_boxes(self) -> None:
        summary = Path(self.output_folder) / SUMMARY
        _, cases = self.do_split()
        mine = sorted(cases)
        if self.is_ddp:
            mine = mine[self.local_rank :: distributed.get_world_size()]
        detector = self._detector()
        network, detector.detect = detector.eval(), True
        scan_detector = ScanDetector(
            network,
            self.plan.anchors,
            as_size(self.configuration_manager.patch_size),
            self.device,
            mirror_axes=self.inference_allowed_mirroring_axes or (),
            autocast=self._autocast,
        )
        model = {
            "dataset": self.plans_manager.dataset_name,
            "trainer": self.__class__.__name__,
            "plans": self.plans_manager.plans_name,
            "configuration": self.configuration_name,
            "folds": [self.fold],
            "validation": True,
        }
        stock = self.dataset_class(self.preprocessed_dataset_folder, mine)
        found = validate_cases(
            scan_detector,
            stock,
            mine,
            self.source,
            self.plan,
            self.plans_manager.transpose_backward,
            summary.parent,
            model,
        )
        detector.detect = False
        every = self._from_all_processes([{"scan": scan} for scan in found])
        if self.local_rank == 0:
            scores = write_summary(
                summary,
                [o["scan"] for o in every],
                self.plan,
                {**model, "mirrorings": scan_detector.num_voters},
            )
            for name, value in scores.items():
                self.logger.log_summary(f"final_val/{name}", value)
            told = ", ".join(
                f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items()
            )
            self.print_to_log_file(f"Validation boxes, original images: {told}")

    def _detector(self) -> Detector:
        network = self.unwrapped()
        assert isinstance(network, Detector)
        return network


class AutoregDetectionScratchTrainer(AutoregDetectionTrainer):
    """The twin from random weights: same plan, length, augmentation and steps; only its own best
    rate differs.
    """

    uses_weights = False


def __getattr__(name: str) -> Any:
    """Return the trainer of a name with a length, e.g. ``AutoregDetectionTrainer_20epochs``."""
    return trainer_of_length(sys.modules[__name__], name)
