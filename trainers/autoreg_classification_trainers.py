"""Classification inside nnU-Net.

``nnUNetv2_train DATASET 3d_fullres FOLD -tr AutoregClassificationTrainer -p AutoregPlans`` trains
the plan's encoder with a linear layer per task on the classes of ``classesTr.csv``.
``autoreg_classify`` gives the classes of new scans.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray
from torch import nn

from nnunet_autoreg.classification.baselines import PROBE
from nnunet_autoreg.classification.data import ClassLoader
from nnunet_autoreg.classification.folds import check_fold, find_folds
from nnunet_autoreg.classification.net import ClassificationLoss, Classifier
from nnunet_autoreg.classification.plan import (
    BLOCK,
    SAMPLING,
    ClassificationPlan,
    check_same_table,
    classification_recipe,
    make_plan,
    read_plan,
)
from nnunet_autoreg.classification.predict import small_scans_line
from nnunet_autoreg.classification.validate import (
    BASELINES,
    classify_cases,
    features_of_baselines,
    kept_table,
    patch_scores,
    score_lines,
    small_cases,
    write_baselines,
    write_validation,
)
from nnunet_autoreg.downstream.loaders import started
from nnunet_autoreg.downstream.model import FOLD_ALL
from nnunet_autoreg.downstream.training import from_all_processes
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import AutoregBlock
from nnunet_autoreg.finetune.one_line import one_line_errors
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import read_json
from nnunet_autoreg.trainers.autoreg_trainers import trainer_of_length
from nnunet_autoreg.trainers.task_trainer import TaskTrainer

AUC = "cls_auc"
"""Name in the logger: the mean AUC over the tasks, on validation patches."""


class AutoregClassificationTrainer(TaskTrainer):
    """Train a classifier on the plan's pretrained encoder."""

    task = "classification"
    task_block = BLOCK
    read_task_plan = staticmethod(read_plan)
    block: AutoregBlock
    plan: ClassificationPlan

    def initialize(self) -> None:
        """Read the classes, plan if that was not done, then make nnU-Net's own preparations."""
        super().initialize()
        self._classifier().gives_classes = True
        self.logger.local_logger.my_fantastic_logging.setdefault(AUC, [])

    def prepare_task(self) -> None:
        """Read the table of classes, and find the cases of this fold."""
        base = Path(self.preprocessed_dataset_folder_base)
        folder = self.preprocessed_dataset_folder
        cases = sorted(infer_dataset_class(folder).get_identifiers(folder))
        self.table = kept_table(base, self.dataset_json, cases)

        if self.fold == FOLD_ALL:
            self.parts = cases, cases
        else:
            # Patients of the cases decide which folds can be used.
            folds, source = find_folds(base, self.table)
            if self.fold >= len(folds):
                raise PlanError(
                    f"fold {self.fold}: there are {len(folds)} folds, 0 to {len(folds) - 1}, in "
                    f"{source}; train one of them",
                    code="classification-no-fold",
                )
            fold = folds[self.fold]
            for warning in check_fold(fold, self.table, str(self.fold)):
                self.print_to_log_file(f"WARNING: {warning}")
            self.print_to_log_file(
                f"folds: {source}; fold {self.fold} has {len(fold['train'])} training and "
                f"{len(fold['val'])} validation cases; {self.table.patient_rule}",
            )
            self.parts = fold["train"], fold["val"]

    def make_task_plan(self) -> tuple[ClassificationPlan, str]:
        """Return a new plan, and how unequal numbers of cases are balanced."""
        plan = make_plan(
            self.table,
            self.configuration_manager.batch_size,
            self.block.encoder.class_path,
            self.block.recipe.num_iterations_per_epoch,
        )
        return plan, f"balance {plan.balance}: {plan.reasons['balance']}"

    def check_task_plan(self, where: str) -> None:
        """Compare the plan's tasks with the table, which may have been edited since."""
        check_same_table(self.plan, self.table, where)

    def use_plan(self) -> None:
        """Set rates, and the length of an epoch."""
        recipe = classification_recipe(self.block.recipe, self.plan)
        self.block = replace(self.block, recipe=recipe)
        self.initial_lr = recipe.pretrained_rate if self.uses_weights else recipe.scratch_rate
        self.weight_decay = recipe.weight_decay
        self.num_iterations_per_epoch = self.plan.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.plan.num_val_iterations_per_epoch

    @classmethod
    def task_network(
        cls,
        network: nn.Module,
        class_path: str,
        arguments: dict[str, Any],
        patch: Size,
        plan: ClassificationPlan,
    ) -> Classifier:
        """Return the encoder with a linear layer per task."""
        return Classifier(network, class_path, arguments, patch, plan.class_numbers)

    def _build_loss(self) -> ClassificationLoss:
        training, _ = self.parts
        counts = [self.table.counts(number, training) for number in range(len(self.plan.tasks))]
        return ClassificationLoss(self.plan, counts)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the training and the validation cases; patients are never in both."""
        return self.parts

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return nnU-Net's loaders and augmentation, with the classes of the cases."""
        patch = self.configuration_manager.patch_size
        initial_patch, training = self.training_patches()
        validation = self.get_validation_transforms(None)
        stock_training, stock_validation = self.get_tr_and_val_datasets()
        is_balanced = self.plan.balance == SAMPLING
        training_loader = self._loader(stock_training, initial_patch, training, is_balanced)
        validation_loader = self._loader(stock_validation, patch, validation, False)
        return started(training_loader, validation_loader, self.device.type == "cuda")

    def _loader(self, stock: Any, patch: Any, transforms: Any, is_balanced: bool) -> ClassLoader:
        return ClassLoader(
            stock,
            self.batch_size,
            patch,
            self.configuration_manager.patch_size,
            self.label_manager,
            # Patches lie anywhere, as the tiles of a whole scan do.
            oversample_foreground_percent=0.0,
            transforms=transforms,
            labels=self.table.labels,
            is_balanced=is_balanced,
        )

    def on_train_start(self) -> None:
        """Load the pretrained encoder, scale its features, and score the baselines.

        All of this is done before the first step.
        """
        super().on_train_start()
        if not self.is_fresh_start or self.local_rank > 0:
            return

        patch = as_size(self.configuration_manager.patch_size)
        every = sorted(self.table.labels)
        stock = self.dataset_class(self.preprocessed_dataset_folder, every)
        small = small_cases(stock, every, patch)
        if small:
            self.print_to_log_file(small_scans_line(small, len(every), patch))

        network = self._classifier()
        training, validation = self.parts
        features = self._frozen_features(network, stock, patch)
        # If several processes train, DDP copies these values from the main process.
        pooled = np.stack([features[PROBE][case] for case in training])  # (cases, features)
        network.standardise(torch.from_numpy(pooled).to(self.device))
        if self.fold == FOLD_ALL:
            self.print_to_log_file("no baselines: fold all has no separate validation cases")
            return

        with one_line_errors(), self._library_log():
            found = write_baselines(
                Path(self.output_folder),
                self.table,
                training,
                validation,
                features,
            )
        for name, of_tasks in found.items():
            for line in score_lines(of_tasks, None):
                self.print_to_log_file(f"baseline {name}: {line}")

    def _frozen_features(
        self,
        network: Classifier,
        stock: Any,
        patch: Size,
    ) -> dict[str, dict[str, NDArray[Any]]]:
        """Return the inputs of the baselines: baseline -> case -> values."""
        # The label values of the foreground. A region has several.
        label_values: set[int] = set()
        for value in self.dataset_json["labels"].values():
            listed = value if isinstance(value, list) else [value]
            label_values.update(int(v) for v in listed)
        label_values -= {0, self.label_manager.ignore_label}

        # Features must not depend on other cases of a batch, nor on random numbers.
        network.eval()
        training, validation = self.parts
        features = features_of_baselines(
            network,
            stock,
            sorted({*training, *validation}),
            self.configuration_manager.spacing,
            sorted(label_values),
            patch,
            self.device,
            self._autocast,
        )
        network.train()
        return features

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Make one step on the classes."""
        self.lr_scheduler.step(self.current_epoch, self.iteration)
        self.iteration += 1
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.network(self._on_device(batch["data"]))
        loss = self.loss(logits, self._on_device(batch["classes"]))
        self._update(loss, is_decoder_first=False)
        return {"loss": loss.detach().cpu().numpy()}

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the loss and the probabilities of every patch."""
        with self._autocast():
            logits = self.network(self._on_device(batch["data"]))
        loss = self.loss(logits, self._on_device(batch["classes"]))
        probabilities = [torch.softmax(v.double(), 1).cpu().numpy() for v in logits]
        return {
            "loss": loss.detach().cpu().numpy(),
            "cases": list(batch["keys"]),
            "probabilities": probabilities,
        }

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Log the AUC over the patches, where nnU-Net looks for the best epoch."""
        outputs = from_all_processes(val_outputs, self.is_ddp)
        scores = patch_scores(self.plan, self.table, outputs)
        epoch = self.current_epoch

        mean_auc = float(np.mean(scores))
        mean_loss = float(np.mean([output["loss"] for output in outputs]))

        # nnU-Net chooses the best epoch by this name.
        self.logger.log("mean_fg_dice", mean_auc, epoch)
        self.logger.log("dice_per_class_or_region", scores, epoch)
        self.logger.log("val_losses", mean_loss, epoch)
        self.logger.log(AUC, mean_auc, epoch)

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        """Print as nnU-Net does, with the right name for the value that replaces Dice."""
        renamed = []
        for word in args:
            if isinstance(word, str):
                right = word.replace("Pseudo dice", "AUC of patches per task")
                renamed.append(right.replace("EMA pseudo Dice", "EMA AUC of patches"))
            else:
                renamed.append(word)
        super().print_to_log_file(*renamed, **kwargs)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Classify whole validation cases and write their scores, with the baselines beside them.

        ``validation/classes.csv`` always holds the probabilities, so ``--npz`` has no effect.
        """
        _, cases = self.parts
        mine = self.own_share(cases)
        network = self._classifier()
        network.eval()
        with one_line_errors():
            found = classify_cases(
                network,
                self.dataset_class(self.preprocessed_dataset_folder, mine),
                mine,
                as_size(self.configuration_manager.patch_size),
                self.device,
                self._autocast,
            )

            # Each process has classified other cases.
            merged: dict[str, Any] = {}
            for of_process in from_all_processes([found], self.is_ddp):
                merged |= of_process
            if self.local_rank == 0:
                folder = Path(self.output_folder)
                file = folder / BASELINES
                baselines = read_json(file)["baselines"] if file.is_file() else None
                tasks = write_validation(
                    folder,
                    self.table,
                    self.plan,
                    merged,
                    baselines,
                    self.described_model(),
                )
                for line in score_lines(tasks, baselines):
                    self.print_to_log_file(line)

                for name, scores in tasks.items():
                    if scores["cases"] and scores["auc"]["value"] is not None:
                        self.logger.log_summary(f"final_val/auc_{name}", scores["auc"]["value"])

    def _classifier(self) -> Classifier:
        network = self.unwrapped()
        assert isinstance(network, Classifier)
        return network


class AutoregClassificationScratchTrainer(AutoregClassificationTrainer):
    """Train the same classifier from random weights.

    Plan, length, augmentation and steps are the same; only the peak learning rate differs.
    """

    uses_weights = False


def __getattr__(name: str) -> Any:
    """Return a trainer of another length, such as ``AutoregClassificationTrainer_20epochs``."""
    return trainer_of_length(sys.modules[__name__], name)
