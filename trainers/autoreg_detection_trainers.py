"""Detection inside nnU-Net.

``nnUNetv2_train DATASET 3d_fullres FOLD -tr AutoregDetectionTrainer -p AutoregPlans`` trains a
Retina U-Net on the plan's encoder. Boxes are learned together with the segmentation. Stock
``nnUNetv2_predict`` still gives the segmentation, and ``autoreg_detect`` gives the boxes.
"""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import nn

from nnunet_autoreg.detection.data import (
    IdMapMaker,
    InstanceDataset,
    InstanceLoader,
    prepare_instances,
)
from nnunet_autoreg.detection.evaluate import quick_scores
from nnunet_autoreg.detection.infer import ScanDetector
from nnunet_autoreg.detection.instances import BLOCK
from nnunet_autoreg.detection.net import Detector, Output, build_detector, stage_strides
from nnunet_autoreg.detection.objects import ObjectSource
from nnunet_autoreg.detection.plan import (
    DetectionPlan,
    check_same_dataset,
    make_plan,
    read_plan,
)
from nnunet_autoreg.detection.training import (
    DetectionLoss,
    MovingAverage,
    absent_classes,
    detection_recipe,
    make_segmentation_loss,
    mean_dice,
    patches_scored,
    without_decay_on_norms,
)
from nnunet_autoreg.detection.validate import SUMMARY, validate_cases, write_summary
from nnunet_autoreg.downstream.loaders import started
from nnunet_autoreg.downstream.training import from_all_processes
from nnunet_autoreg.finetune.block import AutoregBlock
from nnunet_autoreg.finetune.network import own_arguments
from nnunet_autoreg.finetune.one_line import one_line_errors
from nnunet_autoreg.geometry import Size, as_size, as_spacing
from nnunet_autoreg.trainers.autoreg_trainers import trainer_of_length
from nnunet_autoreg.trainers.task_trainer import TaskTrainer

SCORES = {"det_map": "map_0.1:0.5:0.05", "det_ap10": "ap_0.1", "det_ap50": "ap_0.5"}
"""Name in the logger -> name of the score of an epoch."""


class AutoregDetectionTrainer(TaskTrainer):
    """Train a detector on the plan's pretrained encoder."""

    task = "detection"
    task_block = BLOCK
    read_task_plan = staticmethod(read_plan)
    block: AutoregBlock
    plan: DetectionPlan
    inference_allowed_mirroring_axes: Any

    def initialize(self) -> None:
        """Find the objects, plan if that was not done, then make nnU-Net's own preparations."""
        super().initialize()
        network = self.unwrapped()
        self.average = MovingAverage(network, self.plan.average_decay)
        self.average.attach(self.optimizer)
        for name in SCORES:
            self.logger.local_logger.my_fantastic_logging.setdefault(name, [])

    def prepare_task(self) -> None:
        """Find the objects of all cases."""
        base = Path(self.preprocessed_dataset_folder_base)
        reader = self.plans_manager.image_reader_writer_class
        labels = base / "gt_segmentations"
        self.source = ObjectSource.of_dataset(labels, base.name, self.dataset_json, reader)

        configuration = self.configuration_manager
        folder = self.preprocessed_dataset_folder
        maker = IdMapMaker(
            preprocessed=Path(folder),
            source=self.source,
            transpose=as_size(self.plans_manager.transpose_forward),
            target_spacing_mm=as_spacing(configuration.spacing),
            patch_size=as_size(configuration.patch_size),
            resample_seg=configuration.resampling_fn_seg,
        )
        cases = sorted(infer_dataset_class(folder).get_identifiers(folder))
        self.index = prepare_instances(maker, cases, default_num_processes)

    def make_task_plan(self) -> tuple[DetectionPlan, str]:
        """Return a new plan, and the reason of its anchors."""
        arguments = own_arguments(self.configuration_manager.network_arch_init_kwargs)
        patch = as_size(self.configuration_manager.patch_size)
        encoder = self.block.encoder
        plan = make_plan(
            self.dataset_json,
            self.index.sizes_vox(),
            stage_strides(encoder.class_path, arguments, patch),
            patch,
            is_tiny=encoder.name.endswith("_tiny"),
            has_masks=self.index.has_masks,
        )
        return plan, plan.reasons["anchors"]

    def check_task_plan(self, where: str) -> None:
        """Compare the plan with the dataset, which may have been edited since."""
        check_same_dataset(self.plan, self.dataset_json, where)

    def use_plan(self) -> None:
        """Set the recipe, and how often patches are drawn around objects."""
        self.block = replace(self.block, recipe=detection_recipe(self.block.recipe, self.plan))
        self.oversample_foreground_percent = self.plan.object_share

    @classmethod
    def task_network(
        cls,
        network: nn.Module,
        class_path: str,
        arguments: dict[str, Any],
        patch: Size,
        plan: DetectionPlan,
    ) -> Detector:
        """Return the network with heads for boxes."""
        return build_detector(
            network,
            class_path,
            arguments,
            stages=plan.anchors.stages,
            num_shapes=plan.anchors.num_shapes,
            num_classes=len(plan.classes),
            num_channels=plan.head_channels,
        )

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return the groups of segmentation, without weight decay for norms and biases."""
        return without_decay_on_norms(super().optimizer_groups(), self.unwrapped())

    def _build_loss(self) -> DetectionLoss:
        labels = self.label_manager
        loss = make_segmentation_loss(labels.has_regions, labels.ignore_label, self.is_ddp)
        regions = labels.foreground_regions if labels.has_regions else None
        return DetectionLoss(self.plan, loss, regions, labels.ignore_label)

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return loaders with objects: nnU-Net's augmentation, and our way to draw patches."""
        patch = self.configuration_manager.patch_size

        # Regions are made on the device, because nnU-Net's transform would drop the ids.
        initial_patch, training = self.training_patches()
        stock_training, stock_validation = self.get_tr_and_val_datasets()

        consequences = {
            "training": (stock_training.identifiers, "it cannot be learned"),
            "validation": (stock_validation.identifiers, "it is left out of the scores"),
        }
        for part, (cases, consequence) in consequences.items():
            absent = absent_classes(self.index, cases)
            if absent:
                self.print_to_log_file(
                    f"WARNING: no {part} case of fold {self.fold} has an object of "
                    f"{', '.join(absent)}; {consequence}",
                )
        if len(absent_classes(self.index, stock_validation.identifiers)) == len(self.plan.classes):
            self.print_to_log_file(
                "WARNING: validation has nothing to find, so its scores stay 0, and "
                "checkpoint_best.pth is that of the first epoch; use checkpoint_final.pth",
            )

        validation = self.get_validation_transforms(None)
        training_loader = self._loader(stock_training, initial_patch, training)
        validation_loader = self._loader(stock_validation, patch, validation)

        return started(training_loader, validation_loader, self.device.type == "cuda")

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

    def on_train_start(self) -> None:
        """Load the pretrained encoder, from which the average of the weights begins."""
        super().on_train_start()
        if self.is_fresh_start:
            self.average.reset()

    def save_checkpoint(self, filename: str) -> None:
        """Save the averaged network; the optimiser's state holds the weights that ``--c`` needs."""
        with self.average.saved():
            super().save_checkpoint(filename)

    def load_checkpoint(self, checkpoint: dict[str, Any] | str, /) -> None:
        """Continue or validate from a checkpoint."""
        super().load_checkpoint(checkpoint)
        self.average.restore()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make one step on the three losses."""
        self.lr_scheduler.step(self.current_epoch, self.iteration)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            output = self.network(self._on_device(batch["data"]))
        losses = self.loss.losses(output, self._on_device(batch["target"]), batch["objects"])

        self._update(losses.total, is_decoder_first=False)
        step = self.current_epoch * self.num_iterations_per_epoch + self.iteration
        self.average.update(step)
        self.iteration += 1
        numbers: dict[str, Any] = losses.numbers()
        return numbers

    def on_train_epoch_end(self, train_outputs: list[dict[str, Any]]) -> None:
        """Log nnU-Net's own values, and the parts of the loss."""
        super().on_train_epoch_end(train_outputs)
        parts = []
        for name in ("class", "box", "seg"):
            values = [output[f"loss_{name}"] for output in train_outputs]
            parts.append(f"{name} {float(np.mean(values)):.4f}")
        self.print_to_log_file("losses", ", ".join(parts))

    def on_validation_epoch_start(self) -> None:
        """Validate the averaged weights, with boxes."""
        super().on_validation_epoch_start()

        # on_validation_epoch_end closes it, so that the network has its own weights again.
        self._validating = ExitStack()
        self._validating.enter_context(self.average.applied())
        self._detector().detect = True

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the loss, numbers of right and wrong voxels, and the boxes of each patch."""
        with self._autocast():
            output: Output = self.network(self._on_device(batch["data"]))
        target = self._on_device(batch["target"])
        losses = self.loss.losses(output, target, batch["objects"])
        scans = patches_scored(
            output,
            self.loss.grid(output),
            batch["objects"],
            first=0,
            uncounted_BZYX=self.loss.uncounted(target),
        )
        return {
            "loss": losses.numbers()["loss"],
            "scans": scans,
            **self.loss.confusion(output, target),
        }

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log scores over all patches.

        By the mean AP from IoU 0.1 to 0.5, nnU-Net chooses the best epoch.
        """
        self._detector().detect = False
        self._validating.close()
        outputs = from_all_processes(val_outputs, self.is_ddp)
        scans = []
        for output in outputs:
            scans.extend(output["scans"])
        scores = quick_scores(scans, len(self.plan.classes))
        epoch = self.current_epoch

        # nnU-Net chooses the best epoch by this name.
        self.logger.log("mean_fg_dice", scores[SCORES["det_map"]], epoch)
        self.logger.log("dice_per_class_or_region", mean_dice(outputs), epoch)
        mean_loss = np.mean([output["loss"] for output in outputs])
        self.logger.log("val_losses", float(mean_loss), epoch)
        for name, score in SCORES.items():
            self.logger.log(name, scores[score], epoch)
        self.print_to_log_file(f"patches: {_listed(scores)}")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Compute nnU-Net's Dice of whole cases, then their boxes in the original images.

        The figures of the boxes go into ``validation_detection/summary_detection.json``. On a CPU
        nothing is mirrored.
        """
        trained_axes = self.inference_allowed_mirroring_axes
        if self.device.type == "cpu":
            # Mirroring would take eight times as long, for a segmentation that is not the aim.
            self.inference_allowed_mirroring_axes = None
        with self.average.applied():
            super().perform_actual_validation(save_probabilities)
            with one_line_errors(), self._library_log():
                self._validate_boxes()
        self.inference_allowed_mirroring_axes = trained_axes

    def _validate_boxes(self) -> None:
        """Detect in the validation cases, and write the figures of all processes."""
        summary = Path(self.output_folder) / SUMMARY
        _, cases = self.do_split()
        mine = self.own_share(cases)
        detector = self._detector().eval()
        detector.detect = True
        scan_detector = ScanDetector(
            detector,
            self.plan.anchors,
            as_size(self.configuration_manager.patch_size),
            self.device,
            mirror_axes=self.inference_allowed_mirroring_axes or (),
            autocast=self._autocast,
        )
        model = {**self.described_model(), "validation": True}

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

        # Every process has validated other cases.
        every = from_all_processes([{"scan": scan} for scan in found], self.is_ddp)
        if self.local_rank == 0:
            scores = write_summary(
                summary,
                [output["scan"] for output in every],
                self.plan,
                {**model, "mirrorings": scan_detector.num_members},
            )
            for name, value in scores.items():
                self.logger.log_summary(f"final_val/{name}", value)
            self.print_to_log_file(f"Validation boxes, original images: {_listed(scores)}")

    def _detector(self) -> Detector:
        network = self.unwrapped()
        assert isinstance(network, Detector)
        return network


def _listed(scores: dict[str, float]) -> str:
    parts = []
    for name, value in scores.items():
        label = name.replace("_", " ")
        parts.append(f"{label} {value:.4f}")
    return ", ".join(parts)


class AutoregDetectionScratchTrainer(AutoregDetectionTrainer):
    """Train the same detector from random weights.

    Plan, length, augmentation and steps are the same; only the peak learning rate differs.
    """

    uses_weights = False


def __getattr__(name: str) -> Any:
    """Return a trainer of another length, such as ``AutoregDetectionTrainer_20epochs``."""
    return trainer_of_length(sys.modules[__name__], name)
