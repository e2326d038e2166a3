"""Plan for a pretrained encoder: ``nnUNetv2_plan_and_preprocess -d DATASET -pl AutoregPlanner``."""

import io
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import (
    ExperimentPlanner,
)
from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
    residual_encoder_unet_planners as stock_planners,
)
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.finetune.block import BLOCK_KEY, AutoregBlock
from nnunet_autoreg.finetune.families import is_cnn
from nnunet_autoreg.finetune.network import architecture_entry
from nnunet_autoreg.finetune.normalization import as_pretrained
from nnunet_autoreg.finetune.one_line import one_line_errors
from nnunet_autoreg.finetune.plans import (
    DEFAULT_TARGET_GIB,
    Budget,
    Fit,
    SegmentationTask,
    check_plans_name,
    fit_configuration,
    kept_configurations,
    make_block,
    memory_estimator,
    with_ct_window,
    with_fits,
)
from nnunet_autoreg.finetune.resenc import fit_resenc, stock_planner
from nnunet_autoreg.finetune.resolve import (
    Choice,
    DatasetTraits,
    choose_weights,
    setting_of_environment,
)
from nnunet_autoreg.geometry import Size, as_spacing, size_text
from nnunet_autoreg.machine import device_option
from nnunet_autoreg.model.card import IMPORTED
from nnunet_autoreg.model.memory import TrainingMemory
from nnunet_autoreg.model.verdict import NO_VERDICT
from nnunet_autoreg.nnunet_api import preprocessed_folder, raw_folder, results_folder
from nnunet_autoreg.records import read_object, shown, to_jsonable, write_json

DETECTION_BLOCK = "autoreg_detection"
"""If dataset.json has this key, detection is planned as well."""

READER_KEY = "overwrite_image_reader_writer"
"""With this key of dataset.json, nnU-Net reads images by the class of that name."""

log = logging.getLogger(__name__)


class AutoregPlanner(ExperimentPlanner):  # type: ignore[misc]
    """Plan like nnU-Net, but with the patch, batch, network and intensities of the encoder.

    Fingerprint, target spacing, transposition and cascade are nnU-Net's own.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "AutoregPlans",
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ):
        is_explicit = gpu_memory_target_in_gb is not None
        self.budget = Budget(float(gpu_memory_target_in_gb or DEFAULT_TARGET_GIB), is_explicit)
        super().__init__(
            dataset_name_or_id,
            self.budget.gib,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.fits: dict[str, Fit] = {}

    def plan_experiment(self) -> dict[str, Any]:
        """Plan, write ``<plans_name>.json`` and print the choices and their reasons.

        Raises:
            SystemExit: with one line if no plan can be made.
        """
        stock_output = io.StringIO()
        with one_line_errors():
            median_shape = np.median(np.array(self.dataset_fingerprint["shapes_after_crop"]), 0)
            if 1 in median_shape:
                raise PlanError(
                    f"{self.dataset_name} holds 2D images, but these encoders are 3D; use -pl "
                    "ExperimentPlanner",
                    code="plan-2d",
                )
            check_plans_name(self.plans_identifier, self._old_plans())
            self._print_choice(self.choice)

            # nnU-Net prints every attempt, and a 2D U-Net that these plans do not contain.
            with redirect_stdout(stock_output):
                plans: dict[str, Any] = super().plan_experiment()
        log.debug("output of nnU-Net's planner:\n%s", stock_output.getvalue())

        # nnU-Net's own warning about this is hidden together with its planner's other output.
        wanted = self.dataset_json.get(READER_KEY, "None")
        reader = plans["image_reader_writer"]
        if wanted not in ("None", reader):
            log.warning(
                "dataset.json asks for %s %s, which nnU-Net's package imageio does not have; %s is "
                "used, as in preprocessing; correct the name, or remove the key",
                READER_KEY,
                shown(wanted),
                reader,
            )
        self._print_plans(plans)
        return plans

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """Return one configuration for nnU-Net's planner.

        It is empty for 2D, and ``save_plans`` removes it.

        Args:
            spacing, median_shape: (z, y, x) at the target spacing, axes transposed.
            data_identifier: ``<plans name>_<configuration>``.
            approximate_n_voxels_dataset: number of voxels of all cases together.
        """
        if len(spacing) == 2:
            return {}

        task = self._task(spacing, median_shape)
        fit = self._fit(task, approximate_n_voxels_dataset, _cache)
        name = data_identifier.removeprefix(f"{self.plans_identifier}_")
        self.fits[name] = fit

        data, data_kwargs, seg, seg_kwargs = self.determine_resampling()
        probabilities, probabilities_kwargs = self.determine_segmentation_softmax_export_fn()
        stock_schemes, stock_mask = (
            self.determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        )
        schemes, use_mask = as_pretrained(stock_schemes, stock_mask, self.choice.card)
        return {
            "data_identifier": data_identifier,
            "preprocessor_name": self.preprocessor_name,
            "batch_size": fit.batch_size,
            "patch_size": list(fit.patch_size),
            "median_image_size_in_voxels": np.array(median_shape, dtype=float),
            "spacing": np.array(spacing, dtype=float),
            "normalization_schemes": schemes,
            "use_mask_for_norm": use_mask,
            "resampling_fn_data": data.__name__,
            "resampling_fn_seg": seg.__name__,
            "resampling_fn_data_kwargs": data_kwargs,
            "resampling_fn_seg_kwargs": seg_kwargs,
            "resampling_fn_probabilities": probabilities.__name__,
            "resampling_fn_probabilities_kwargs": probabilities_kwargs,
            "architecture": architecture_entry(self.block, fit.patch_size, fit.arguments),
        }

    def _fit(self, task: SegmentationTask, dataset_vox: float, cache: dict[str, Any]) -> Fit:
        """Return patch, batch size and network of a configuration.

        Args:
            dataset_vox: number of voxels of all cases together.
            cache: memory estimates of nnU-Net's planner.
        """
        encoder = self.block.encoder
        shares = {"dataset_vox": dataset_vox, "max_share": self.max_dataset_covered}
        if is_cnn(encoder):
            return fit_resenc(self._resenc_planner, encoder, task, self.budget, cache, **shares)
        return fit_configuration(encoder, task, self.budget, self._memory_of, **shares)

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Write the plans, whole or not at all.

        Only the user's own configurations of an earlier plans file are kept.
        """
        plans["configurations"].pop("2d", None)
        plans["foreground_intensity_properties_per_channel"] = with_ct_window(
            plans["foreground_intensity_properties_per_channel"],
            self._channel_names(),
            self.choice.card,
        )

        # nnU-Net leaves out a low resolution that is close to the full one.
        fits = {name: fit for name, fit in self.fits.items() if name in plans["configurations"]}
        # Without its block in dataset.json, detection is planned when its trainer is first run.
        if DETECTION_BLOCK in self.dataset_json:
            # Imported here, because segmentation does not need it.
            from nnunet_autoreg.detection.plan import plan_from_labels

            for name, fit in fits.items():
                plan_from_labels(
                    plans,
                    name,
                    self.dataset_json,
                    raw_folder() / str(self.dataset_name),
                    self.determine_reader_writer(),
                    self.block.encoder,
                    fit,
                )

        block = with_fits(
            self.block,
            fits,
            self.choice.card,
            int(self.dataset_json["numTraining"]),
            self._channel_names(),
        )
        plans[BLOCK_KEY] = to_jsonable(block)

        custom, left_out = kept_configurations(
            self._old_plans() or {},
            plans,
            block.encoder.class_path,
        )
        plans["configurations"].update(custom)
        for line in left_out:
            log.warning(line)

        recursive_fix_for_json_export(plans)
        write_json(self._plans_file(), plans)

    @cached_property
    def choice(self) -> Choice:
        """Return the pretrained weights of these plans."""
        forward, _ = self.determine_transpose()
        spacing = as_spacing(self.determine_fullres_target_spacing()[forward])
        traits = DatasetTraits(self.dataset_name, tuple(self._channel_names()), spacing)
        return choose_weights(results_folder(), traits, setting_of_environment())

    @cached_property
    def block(self) -> AutoregBlock:
        """Return the ``"autoreg"`` block: encoder, weights and recipe."""
        forward, _ = self.determine_transpose()
        spacing = self.determine_fullres_target_spacing()

        # The median shape at the target spacing.
        shapes_vox = np.array(self.dataset_fingerprint["shapes_after_crop"])  # (cases, 3)
        sizes_mm = shapes_vox * np.array(self.dataset_fingerprint["spacings"])
        median_vox = np.median(sizes_mm / spacing, 0)
        task = self._task(spacing[forward], median_vox[forward])
        return make_block(self.choice, task, self.budget, results_folder())

    @cached_property
    def _resenc_planner(self) -> stock_planners.ResEncUNetPlanner:
        """Return nnU-Net's planner for the encoder's preset."""
        return stock_planner(self.block.encoder, self.dataset_name, self.budget)

    @cached_property
    def _memory_of(self) -> Callable[[Size], TrainingMemory]:
        """Return the function that estimates the memory of a training by its patch size."""
        return memory_estimator(
            self.block,
            len(self._channel_names()),
            len(self.dataset_json["labels"]),
        )

    def _task(self, spacing: Any, median_shape: Any) -> SegmentationTask:
        """Return the facts about the dataset for planning at a target spacing (z, y, x)."""
        z, y, x = (float(v) for v in median_shape)
        return SegmentationTask(
            num_cases=int(self.dataset_json["numTraining"]),
            median_shape_vox=(z, y, x),
            spacing_mm=as_spacing(spacing),
            num_channels=len(self._channel_names()),
            num_classes=len(self.dataset_json["labels"]),
        )

    def _channel_names(self) -> list[str]:
        # Older datasets call the channels "modality".
        key = "channel_names" if "channel_names" in self.dataset_json else "modality"
        return [str(name) for name in self.dataset_json[key].values()]

    def _plans_file(self) -> Path:
        return preprocessed_folder() / str(self.dataset_name) / f"{self.plans_identifier}.json"

    def _old_plans(self) -> dict[str, Any] | None:
        file = self._plans_file()
        return read_object(file) if file.is_file() else None

    def _print_choice(self, choice: Choice) -> None:
        """Print which pretrained weights are used, and why."""
        for line in choice.rejected:
            print(f"not used: {line}")
        for line in choice.warnings:
            print(f"WARNING: {line}")

        card = choice.card
        print(f"weights: {card.name if card else 'none'} - {choice.reason}")
        if card is None:
            return
        # An imported encoder was not pretrained here, so it has no verdict.
        if IMPORTED not in card.extra:
            verdict = card.verdict or NO_VERDICT
            print(f"verdict of {card.name}: {verdict.message}")
        if card.has_decoder:
            print(f"decoder: {self.block.reasons['recipe.transfer_decoder']}")
        if card.licence_line:
            print(card.licence_line)

    def _print_plans(self, plans: dict[str, Any]) -> None:
        """Print the plans with their reasons, and the commands that train by them."""
        print(f"encoder: {self.block.encoder.name} - {self.block.reasons['encoder']}")
        for name, configuration in plans["configurations"].items():
            if name not in self.fits:
                continue
            patch = size_text(configuration["patch_size"], ".4g")
            spacing = size_text(configuration["spacing"], ".4g")
            print(
                f"{name}: patch {patch}, batch {configuration['batch_size']}, spacing {spacing} mm "
                f"- {self.fits[name].reason}",
            )

        recipe = self.block.recipe
        print(
            f"length: {recipe.num_epochs} epochs of {recipe.num_iterations_per_epoch} iterations - "
            f"{self.block.reasons['recipe.num_epochs']}",
        )

        # This stage is decided when the plans are written, so it is not in self.block.
        written = plans[BLOCK_KEY]
        share = written["recipe"]["decoder_first_fraction"]
        if share:
            reason = written["reasons"]["recipe.decoder_first_fraction"].removeprefix("on, ")
            print(f"first {100 * share:.0f} % of the steps: only the decoder is trained - {reason}")
        print(f"plans: {self._plans_file()}")

        segmenting, detecting = "AutoregScratchTrainer", "AutoregDetectionScratchTrainer"
        if self.block.weights:
            segmenting, detecting = "AutoregPretrainedTrainer", "AutoregDetectionTrainer"
        start = f"nnUNetv2_train {self.dataset_name} 3d_fullres 0"
        end = f"-p {self.plans_identifier}"
        if DETECTION_BLOCK in self.dataset_json:
            print(f"for detection: {start} -tr {detecting} {end}")
        print(f"next: {start} -tr {segmenting} {end} --npz{device_option()}")
