"""Load a model that nnU-Net's command has trained, with its folds, for prediction on new scans.

nnU-Net preprocesses the scans. Detection and classification add the outputs of their networks.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from torch import nn

from nnunet_autoreg.corpus.private import without_names
from nnunet_autoreg.corpus.read import check_3d
from nnunet_autoreg.downstream.results import public_model
from nnunet_autoreg.downstream.scans import check_image
from nnunet_autoreg.errors import PlanError, ScanError, UsageError, WeightsError
from nnunet_autoreg.geometry import Size, as_size, size_text
from nnunet_autoreg.io.files import quiet_readers
from nnunet_autoreg.io.names import natural_key
from nnunet_autoreg.machine import has_bf16
from nnunet_autoreg.records import read_object
from nnunet_autoreg.safe_load import plain_loading

FOLD_ALL = "all"

Plan = TypeVar("Plan")
"""Plan of a task, such as ``DetectionPlan``."""

log = logging.getLogger(__name__)


class TrainedModel(Generic[Plan]):
    """A trained folder of ``nnUNetv2_train``; detection and classification each have a subclass.

    Args:
        folder: ``<trainer>__<plans>__<configuration>``.
        folds: folds to use; if empty, all finished ones except ``all``, which must be named.
        device: device of the network.
        checkpoint: file name of the checkpoint in each fold.

    Raises:
        UsageError: there is no such model or fold.
        PlanError: it was trained for another task.
        WeightsError: a checkpoint does not belong to the plans, or would run code.
    """

    kind: ClassVar[str]
    """Part of the names of its trainers. Messages suggest only models with such a trainer."""
    noun: ClassVar[str]
    """Name of such a model in messages."""
    read_plan: Callable[[Mapping[str, Any], str], Plan | None]
    """Return the checked plan of the task in a configuration of parsed plans; None without one."""

    def __init__(
        self,
        folder: Path,
        folds: Sequence[str],
        device: torch.device,
        checkpoint: str = "checkpoint_final.pth",
    ):
        self.folder = folder
        self.device = device
        self.checkpoint = checkpoint
        self.folds = finished_folds(folder, folds, checkpoint, self.kind)
        # nnU-Net prints advice about a switch that is off here.
        with redirect_stdout(io.StringIO()):
            self.stock = nnUNetPredictor(
                use_mirroring=False,
                perform_everything_on_device=False,
                device=device,
                allow_tqdm=False,
            )
        self.plan: Plan = self._checked_plan()
        try:
            # nnU-Net would unpickle all that checkpoints hold, but a folder from elsewhere must not
            # run code.
            fold = self.folds[0] if len(self.folds) == 1 else "*"
            with plain_loading(folder / f"fold_{fold}" / checkpoint):
                self.stock.initialize_from_trained_model_folder(str(folder), self.folds, checkpoint)
        except RuntimeError as error:
            raise WeightsError(
                f"{folder}: its {checkpoint} does not fit its plans.json "
                f"({str(error).splitlines()[0]}); were the plans changed after the training? Train "
                "again",
                code="model-weights-do-not-fit",
            ) from error

        self.configuration = self.stock.configuration_manager
        network: Any = self.stock.network
        self.network: nn.Module = network.to(device).eval()

        plans_bytes = (folder / "plans.json").read_bytes()
        self.sha256: dict[str, str] = {}
        for name, parameters in zip(self.folds, self.stock.list_of_parameters, strict=True):
            self.sha256[name] = digest_of(parameters, plans_bytes)

    @property
    def num_channels(self) -> int:
        """Return the number of channels of the images."""
        number = determine_num_input_channels(
            self.stock.plans_manager,
            self.configuration,
            self.stock.dataset_json,
        )
        return int(number)

    @property
    def file_ending(self) -> str:
        """Return the file ending of the images that it was trained on."""
        return str(self.stock.dataset_json["file_ending"])

    def describe(self) -> dict[str, Any]:
        """Return the description of the model for results.

        ``sha256`` has a digest of the weights and plans for every fold. A new training changes it.
        """
        trainer, plans, configuration = self.folder.name.split("__")
        return public_model(
            {
                "dataset": self.stock.plans_manager.dataset_name,
                "trainer": trainer,
                "plans": plans,
                "configuration": configuration,
                "folds": list(self.folds),
                "checkpoint": self.checkpoint,
                "sha256": self.sha256,
            },
        )

    def _checked_plan(self) -> Plan:
        """Return the plan of the task.

        Raises:
            PlanError: there is no such plan, or a value of it is impossible.
        """
        file = self.folder / "plans.json"
        plans = read_object(file, ("configurations",))
        name = self.folder.name.rsplit("__", 1)[-1]
        configuration: dict[str, Any] = {}
        configurations = plans["configurations"]
        if isinstance(configurations, dict) and name in configurations:
            # A configuration may inherit the block from another one.
            configuration = PlansManager(plans).get_configuration(name).configuration
        plan = type(self).read_plan(configuration, str(file))
        if plan is None:
            raise PlanError(
                f"{self.folder} holds no {self.noun}; train one with -tr Autoreg{self.kind}Trainer",
                code="model-of-other-task",
            )
        return plan

    def weights(self) -> Iterator[None]:
        """Load the weights of one fold after the other into the network.

        Yields:
            None, once for each fold.
        """
        for parameters in self.stock.list_of_parameters:
            self.network.load_state_dict(parameters)
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass, in the precision of training and validation."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.autocast("cuda", dtype=half_precision(self.device))

    def preprocess(self, files: list[str], name: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return a preprocessed scan (C, Z, Y, X), and nnU-Net's properties of it.

        Args:
            files: one file per channel.
            name: name of the scan in log lines.

        Raises:
            ScanError: it cannot be read or resampled, has another number of channels or dimensions,
                or voxels that are not finite.
        """
        data, properties = self._read(files, name)
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        try:
            with np.errstate(invalid="ignore"):
                image, _, properties = preprocessor.run_case_npy(
                    data,
                    None,
                    properties,
                    self.stock.plans_manager,
                    self.configuration,
                    self.stock.dataset_json,
                )
        except ValueError as error:
            size = size_text(data.shape[1:])
            spacing = ", ".join(f"{mm:g}" for mm in properties["spacing"])
            raise ScanError(
                "spacing",
                f"nnU-Net cannot resample {size} voxels of {spacing} mm (z, y, x) ({error}); look "
                "at its header",
            ) from error

        image = np.asarray(image, dtype=np.float32)
        if not np.isfinite(image).all():
            # One NaN spreads over the whole scan when it is normalised.
            num_before = int((~np.isfinite(data)).sum())
            num_after = int((~np.isfinite(image)).sum())
            raise ScanError(
                "nonfinite",
                f"{num_before} of {data.size} voxels are NaN or infinite, and after preprocessing "
                f"{num_after} of {image.size}; repair or leave out the scan",
            )
        return torch.from_numpy(image), properties

    def _read(self, files: list[str], name: str) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Read a scan (C, Z, Y, X) with nnU-Net's reader, and its properties.

        Raises:
            ScanError: it cannot be read, or is not an image for this model.
        """
        # The reader raises errors of any kind, and prints the reason of some.
        printed = io.StringIO()
        reader = self.stock.plans_manager.image_reader_writer_class()
        try:
            with redirect_stdout(printed), quiet_readers():
                data, properties = reader.read_images(files)
        except Exception as error:
            lines = str(error).strip().splitlines()[-1:]
            if not lines:
                lines = printed.getvalue().splitlines()[:1]
            reason = lines[0].strip() if lines else type(error).__name__
            listed = ", ".join(Path(file).name for file in files)
            # Paths may hold the names of patients.
            raise ScanError(
                "unreadable",
                f"nnU-Net cannot read {listed} ({without_names(reason, files)})",
            ) from error
        if printed.getvalue():
            text = " ".join(printed.getvalue().split())
            log.warning("%s: %s", name, without_names(text, files))

        check_image(data, self.num_channels)
        spacing = properties.get("sitk_stuff", {}).get("spacing", (1, 1, 1))
        check_3d(len(spacing))
        return data, properties


def prediction_device(wanted: str | None) -> torch.device:
    """Return the device of ``--device``; by default the GPU if there is one.

    Args:
        wanted: value of the option; None without it.

    Raises:
        UsageError: a GPU is wanted and there is none (code "device-no-gpu").
    """
    device = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "--device cuda: torch finds no GPU; use --device cpu, or see autoreg_doctor",
            code="device-no-gpu",
        )
    return torch.device(device)


def half_precision(device: torch.device) -> torch.dtype:
    """Return the type in which a GPU computes, as in training: bfloat16 if the hardware has it."""
    return torch.bfloat16 if has_bf16(device) else torch.float16


def digest_of(parameters: Mapping[str, torch.Tensor], plans: bytes) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a network's plans and weights."""
    # The plans are included, because results depend on them too.
    digest = hashlib.sha256(plans)
    for name, value in parameters.items():
        as_bytes = value.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode())
        digest.update(as_bytes.numpy().data)
    return digest.hexdigest()[:16]


def original_shape(properties: Mapping[str, Any], transpose_backward: Sequence[int]) -> Size:
    """Return the shape (z, y, x) of the image as it was read."""
    before = properties["shape_before_cropping"]
    return as_size([before[axis] for axis in transpose_backward])


def trained_folder(
    results: Path,
    dataset: str,
    trainer: str,
    plans: str,
    configuration: str,
) -> Path:
    """Return the folder of a trained model.

    Args:
        results: ``nnUNet_results``.
        dataset: ``4``, ``004`` or ``Dataset004_Hippocampus``.

    Raises:
        UsageError: no dataset of that number has been trained on, or several have.
    """
    name = dataset
    if dataset.isdecimal():
        known = sorted(folder.name for folder in results.glob("Dataset*_*") if folder.is_dir())
        found = [other for other in known if other.startswith(f"Dataset{int(dataset):03}_")]
        if len(found) > 1:
            raise UsageError(
                f"-d {dataset}: {' and '.join(found)} share that number; give the full name",
                code="model-dataset-ambiguous",
            )
        if not found:
            raise UsageError(
                f"-d {dataset}: {results} (nnUNet_results) has no trained dataset of that number; "
                f"there are: {', '.join(known) or 'none'}",
                code="model-dataset-unknown",
            )
        name = found[0]
    return results / name / f"{trainer}__{plans}__{configuration}"


def finished_folds(
    folder: Path,
    wanted: Sequence[str],
    checkpoint: str,
    kind: str = "",
) -> tuple[str, ...]:
    """Return the folds to use; by default all finished ones except ``all``.

    Args:
        folder: folder of a trained model.
        wanted: names of the folds; may be empty.
        checkpoint: file that a finished fold has.
        kind: part of the names of trainers that a message may suggest.

    Raises:
        UsageError: there is no such model or fold.
    """
    if not folder.is_dir():
        others: list[str] = []
        if folder.parent.is_dir():
            others = sorted(p.name for p in folder.parent.glob(f"*{kind}*"))
        advice = f"there are: {', '.join(others)}" if others else "train it first"
        raise UsageError(f"there is no trained model {folder}; {advice}", code="model-not-found")

    finished = [p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}")]
    finished.sort(key=natural_key)
    if not finished:
        raise UsageError(
            f"{folder} has no finished fold (fold_*/{checkpoint}); finish a training, or use "
            "--checkpoint checkpoint_best.pth",
            code="model-no-fold",
        )
    missing = [fold for fold in wanted if fold not in finished]
    if missing:
        raise UsageError(
            f"-f {' '.join(missing)}: not finished in {folder}; there are: {', '.join(finished)}",
            code="model-fold-unfinished",
        )
    # Fold all has seen every case, so it could not be validated. It is not combined with the others
    # unless the user asks for it.
    usual = [fold for fold in finished if fold != FOLD_ALL]
    if not wanted and not usual:
        raise UsageError(
            f"{folder} has no finished fold but all; add -f all to use that",
            code="model-fold-all-only",
        )
    # Always in the same order, so that -f 1 0 continues the results of -f 0 1.
    chosen = [fold for fold in finished if fold in wanted]
    return tuple(chosen or usual)
