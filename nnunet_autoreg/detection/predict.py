"""Detect objects in new scans with a trained detector.

Scans are preprocessed by nnU-Net, all folds and mirrorings are merged, and results lie in the
original image.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray

from nnunet_autoreg.corpus.private import without_names
from nnunet_autoreg.detection.geometry import preprocessing_of, reader_turn, stored_array
from nnunet_autoreg.detection.infer import (
    DEFAULT_NMS,
    Candidates,
    MergedBoxes,
    NmsSettings,
    ScanDetector,
    concatenate,
    merge,
)
from nnunet_autoreg.detection.instances import Ids
from nnunet_autoreg.detection.net import Detector
from nnunet_autoreg.detection.nndetection import write_boxes
from nnunet_autoreg.detection.plan import DetectionPlan, read_plan
from nnunet_autoreg.detection.scanfile import (
    FileBox,
    ScanFile,
    draw_boxes,
    draw_instances,
    make_scan_file,
    with_score,
    write_markup,
    write_scan_file,
)
from nnunet_autoreg.detection.scans import Scan, ready
from nnunet_autoreg.detection.validate import FOLD_ALL, as_stored, in_original, score_thresholds
from nnunet_autoreg.errors import PlanError, ScanError, UsageError, WeightsError
from nnunet_autoreg.geometry import Size, as_size, size_text
from nnunet_autoreg.io.files import quiet_stderr
from nnunet_autoreg.io.names import natural_key
from nnunet_autoreg.io.orientation import turned
from nnunet_autoreg.machine import has_bf16
from nnunet_autoreg.records import read_json
from nnunet_autoreg.safe_load import plain_loading

DRAWN_FROM = 0.5
"""Score from which boxes are drawn, if neither a score nor an operating point is asked for."""
DRAWING = ("filled", "instances")
"""The settings on which no box depends, but only the drawings."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DetectionOptions:
    """Define how to detect and what to write.

    Attributes:
        mirror: also along every axis, which costs eight times the time.
        nms: overlaps, and how many boxes are kept.
        min_score: one for all classes, or by class; lower scores are left out everywhere. None
            keeps all.
        filled: label maps of boxes are solid.
        with_instances: write the segmentation inside the boxes.
        for_nndetection: write nnDetection's pickle too.
    """

    mirror: bool = False
    nms: NmsSettings = DEFAULT_NMS
    min_score: float | Mapping[str, float] | None = None
    filled: bool = False
    with_instances: bool = True
    for_nndetection: bool = False


class Model:
    """A trained folder of ``nnUNetv2_train``.

    Args:
        folder: ``<trainer>__<plans>__<configuration>``.
        folds: which; all that are finished if empty, except for ``all``, which has to be named.

    Raises:
        UsageError: there is no such model or fold.
        PlanError: it is no detector.
        WeightsError: a checkpoint does not belong to the plans, or would run code.
    """

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
        self.folds = _folds(folder, folds, checkpoint)
        # nnU-Net prints advice about a switch that is off here.
        with redirect_stdout(io.StringIO()):
            self.stock = nnUNetPredictor(
                use_mirroring=False,
                perform_everything_on_device=False,
                device=device,
                allow_tqdm=False,
            )
        self._check_plans()
        try:
            # A folder from elsewhere must not run code: nnU-Net would unpickle all that its
            # checkpoints hold.
            fold = self.folds[0] if len(self.folds) == 1 else "*"
            with plain_loading(folder / f"fold_{fold}" / checkpoint):
                self.stock.initialize_from_trained_model_folder(str(folder), self.folds, checkpoint)
        except RuntimeError as error:
            raise WeightsError(
                f"{folder}: its {checkpoint} does not fit its plans.json "
                f"({str(error).splitlines()[0]}); were the plans changed after the training? Train "
                "again",
                code="detection-weights-do-not-fit",
            ) from error

        self.configuration = self.stock.configuration_manager
        plan = read_plan(self.configuration.configuration, str(folder / "plans.json"))
        network = self.stock.network
        assert plan is not None and isinstance(network, Detector)
        self.plan: DetectionPlan = plan
        self.network = network.to(device).eval()
        # In evaluation mode it would give the segmentation alone.
        self.network.detect = True

        plans_bytes = (folder / "plans.json").read_bytes()
        self.sha256: dict[str, str] = {}
        for name, parameters in zip(self.folds, self.stock.list_of_parameters, strict=True):
            self.sha256[name] = digest_of(parameters, plans_bytes)

    @property
    def num_channels(self) -> int:
        """Return the number of channels of the images."""
        return int(
            determine_num_input_channels(
                self.stock.plans_manager, self.configuration, self.stock.dataset_json
            )
        )

    @property
    def file_ending(self) -> str:
        """Return the file ending of the images that it was trained on."""
        return str(self.stock.dataset_json["file_ending"])

    def describe(self) -> dict[str, Any]:
        """Return what results say about the model.

        ``sha256`` is that of every fold's weights and plans; a new training changes it.
        """
        trainer, plans, configuration = self.folder.name.split("__")
        return {
            "dataset": self.stock.plans_manager.dataset_name,
            "trainer": trainer,
            "plans": plans,
            "configuration": configuration,
            "folds": list(self.folds),
            "checkpoint": self.checkpoint,
            "sha256": self.sha256,
        }

    def thresholds(self, fp_per_scan: float, num_mirrorings: int) -> dict[str, float]:
        """Return class -> the score threshold with so many false positives per scan in validation.

        The validation of all folds counts together.

        Args:
            num_mirrorings: with which it is to be used; validation may have had others.

        Raises:
            UsageError: a fold has no usable validation, or is ``all``.
        """
        classes = list(self.plan.labels)
        return score_thresholds(self.folder, self.folds, classes, fp_per_scan, num_mirrorings)

    def _check_plans(self) -> None:
        file = self.folder / "plans.json"
        plans = read_json(file)
        name = self.folder.name.rsplit("__", 1)[-1]
        plan = None
        if name in plans.get("configurations", {}):
            # A configuration may have the block from the one that it inherits from.
            configuration = PlansManager(plans).get_configuration(name).configuration
            plan = read_plan(configuration, str(file))
        if plan is None:
            raise PlanError(
                f"{self.folder} holds no detector; train one with -tr AutoregDetectionTrainer",
                code="detection-no-detector",
            )

    def weights(self) -> Iterator[None]:
        """Give the network the weights of one fold after the other."""
        for parameters in self.stock.list_of_parameters:
            self.network.load_state_dict(parameters)
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass, in the precision of training and validation."""
        if self.device.type != "cuda":
            return nullcontext()
        return torch.autocast("cuda", dtype=half_precision(self.device))

    def preprocess(self, files: list[str], name: str) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return a scan as the network sees it (C, Z, Y, X), and nnU-Net's properties of it.

        Args:
            name: of the scan in log lines.

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
        """Read a scan with nnU-Net's reader, whose errors are of any kind, and partly printed."""
        printed = io.StringIO()
        reader = self.stock.plans_manager.image_reader_writer_class()
        try:
            with redirect_stdout(printed), quiet_stderr():
                data, properties = reader.read_images(files)
        except Exception as error:
            lines = str(error).strip().splitlines()[-1:] or printed.getvalue().splitlines()[:1]
            reason = lines[0].strip() if lines else type(error).__name__
            listed = ", ".join(Path(file).name for file in files)
            # Paths may hold the names of patients.
            raise ScanError(
                "unreadable", f"nnU-Net cannot read {listed} ({without_names(reason, files)})"
            ) from error
        if printed.getvalue():
            text = " ".join(printed.getvalue().split())
            log.warning("%s: %s", name, without_names(text, files))

        if len(data) != self.num_channels:
            raise ScanError(
                "channels",
                f"its files hold {len(data)} channels and the model needs {self.num_channels}; is "
                "one of them 4D or in colour?",
            )
        num_dimensions = len(properties.get("sitk_stuff", {}).get("spacing", (1, 1, 1)))
        if num_dimensions != 3:
            raise ScanError("not3d", f"it has {num_dimensions} dimensions; store it as a 3D image")
        return data, properties


def half_precision(device: torch.device) -> torch.dtype:
    """Return the type a GPU computes in, as in training: bfloat16 where the hardware has it."""
    return torch.bfloat16 if has_bf16(device) else torch.float16


def digest_of(parameters: Mapping[str, torch.Tensor], plans: bytes) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a network's plans and weights."""
    # Plans decide how boxes are made of the same weights.
    digest = hashlib.sha256(plans)
    for name, value in parameters.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Detected:
    """Hold a scan's file, and its segmentation (Z, Y, X) in the image as it was read.

    ``properties`` are nnU-Net's.
    """

    record: ScanFile
    labels_ZYX: NDArray[Any] | None  # noqa: N815
    properties: dict[str, Any]


def detect(model: Model, scan: Scan, options: DetectionOptions) -> Detected:
    """Find the objects of a scan.

    Raises:
        ScanError: it cannot be read, or does not fit the model.
        WeightsError: the network gives numbers that are not finite.
    """
    inputs = scan.inputs()
    with ready(scan) as files:
        image, properties = model.preprocess(files, scan.name)  # (C, Z, Y, X)
    merged, logits = _merged(model, image, options)

    manager = model.stock.plans_manager
    shape = original_shape(properties, manager.transpose_backward)
    geometry = preprocessing_of(properties, as_size(image.shape[1:]), manager.transpose_backward)
    detections = []
    for found in in_original(merged, geometry, shape, model.plan.classes):
        if found.score >= lowest_score(options.min_score, found.name):
            detections.append(found)

    stored = stored_array(properties, shape)
    record = make_scan_file(
        scan.name,
        stored.frame,
        as_stored(detections, stored),
        model.plan.labels,
        model.describe(),
        settings_of(model, options),
        inputs,
    )
    labels = None
    if logits is not None:
        labels = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits,
            manager,
            model.configuration,
            model.stock.label_manager,
            properties,
            num_threads_torch=torch.get_num_threads(),
        )
    return Detected(record, labels, properties)


def _merged(
    model: Model, image_CZYX: torch.Tensor, options: DetectionOptions
) -> tuple[MergedBoxes, torch.Tensor | None]:
    """Return what all folds and mirrorings find together, in the preprocessed image.

    Beside it stands the mean of their segmentation logits (C, Z, Y, X).
    """
    detector = ScanDetector(
        model.network,
        model.plan.anchors,
        as_size(model.configuration.patch_size),
        model.device,
        mirror_axes=_mirror_axes(model, options),
        nms=options.nms,
        autocast=model.autocast,
    )
    needs_logits = _with_instances(model, options)
    parts: list[Candidates] = []
    logits: torch.Tensor | None = None
    for number, _ in enumerate(model.weights()):
        found, of_fold = detector.candidates(image_CZYX, with_logits=needs_logits)
        # Members are numbered through over the folds.
        members = found.members_N + number * detector.num_members
        parts.append(replace(found, members_N=members))
        if of_fold is not None:
            logits = of_fold if logits is None else logits + of_fold
    merged = merge(concatenate(parts), len(parts) * detector.num_members, options.nms)
    return merged, None if logits is None else logits / len(parts)


def settings_of(model: Model, options: DetectionOptions) -> dict[str, Any]:
    """Return the options as results state them.

    No box depends on the last two (``DRAWING``), but only the drawings.
    """
    return {
        "thinning": options.nms.for_file(),
        "mirrorings": num_mirrorings(model, options),
        "min_score": options.min_score,
        "filled": options.filled,
        "instances": _with_instances(model, options),
    }


def _with_instances(model: Model, options: DetectionOptions) -> bool:
    return options.with_instances and model.plan.has_masks


def num_mirrorings(model: Model, options: DetectionOptions) -> int:
    """Return in how many mirrorings every model looks at a scan."""
    return int(2 ** len(_mirror_axes(model, options)))


def _mirror_axes(model: Model, options: DetectionOptions) -> tuple[int, ...]:
    return tuple(model.stock.allowed_mirroring_axes or ()) if options.mirror else ()


def original_shape(properties: Mapping[str, Any], transpose_backward: Sequence[int]) -> Size:
    """Return the shape (z, y, x) of the image as it was read."""
    before = properties["shape_before_cropping"]
    return as_size([before[axis] for axis in transpose_backward])


def lowest_score(min_score: float | Mapping[str, float] | None, name: str) -> float:
    """Return the lowest score of a class that is kept."""
    if min_score is None:
        return 0.0
    return min_score[name] if isinstance(min_score, Mapping) else min_score


def write(model: Model, found: Detected, folder: Path, options: DetectionOptions) -> None:
    """Write the files of a scan; its JSON file comes last, so that where it is, all is."""
    instances = None
    if found.labels_ZYX is not None:
        labels_ZYX = np.asarray(found.labels_ZYX)
        stored = stored_array(found.properties, labels_ZYX.shape)
        # The segmentation lies in the reader's array, the boxes of the file in the stored one.
        boxes = []
        for box in _drawn(found.record, options):
            z0, y0, x0, z1, y1, x1 = (float(v) for v in stored.to_reader(box.box_zyx))
            boxes.append(replace(box, box_zyx=(z0, y0, x0, z1, y1, x1)))
        instances = draw_instances(boxes, labels_ZYX, model.plan.classes)
    writer = model.stock.plans_manager.image_reader_writer_class()
    write_record(
        found.record, instances, writer, model.file_ending, found.properties, folder, options
    )


def write_record(
    record: ScanFile,
    instances_ZYX: Ids | None,
    writer: Any,
    file_ending: str,
    properties: dict[str, Any],
    folder: Path,
    options: DetectionOptions,
) -> None:
    """Write the files of a scan, its JSON file last, and remove those of an earlier run.

    Args:
        writer: nnU-Net's for images of these properties.
    """
    name = record.scan
    boxes = _drawn(record, options)
    # The JSON file is removed first: where it is, all files are there, and of one run.
    for old in (f"{name}.json", f"{name}_instances{file_ending}", f"{name}_boxes.pkl"):
        (folder / old).unlink(missing_ok=True)

    drawn = draw_boxes(boxes, record.shape_zyx, options.filled)
    # The writer takes the array that the reader gave, and turns it back into the stored one.
    drawn = turned(drawn, reader_turn(properties))
    writer.write_seg(drawn, str(folder / f"{name}_boxes{file_ending}"), properties)
    if instances_ZYX is not None:
        writer.write_seg(instances_ZYX, str(folder / f"{name}_instances{file_ending}"), properties)
    write_markup(folder / f"{name}.mrk.json", name, boxes, record.frame)
    if options.for_nndetection:
        write_boxes(folder / f"{name}_boxes.pkl", record)
    write_scan_file(folder / f"{name}.json", record)


def _drawn(record: ScanFile, options: DetectionOptions) -> list[FileBox]:
    # With a score asked for, all that is left is drawn. Without one, low scores, which are for
    # evaluation, are not drawn.
    return with_score(record.boxes, DRAWN_FROM if options.min_score is None else 0.0)


def trained_folder(
    results: Path, dataset: str, trainer: str, plans: str, configuration: str
) -> Path:
    """Return the folder of a trained model.

    The dataset is given as ``4``, ``004`` or ``Dataset004_Hippocampus``.

    Raises:
        UsageError: no dataset of that number has been trained on, or several have.
    """
    name = dataset
    if dataset.isdecimal():
        found = sorted(p.name for p in results.glob(f"Dataset{int(dataset):03}_*") if p.is_dir())
        if len(found) > 1:
            raise UsageError(
                f"-d {dataset}: {' and '.join(found)} share that number; give the full name",
                code="detect-dataset-ambiguous",
            )
        if not found:
            known = sorted(p.name for p in results.glob("Dataset*_*") if p.is_dir())
            raise UsageError(
                f"-d {dataset}: {results} (nnUNet_results) has no trained dataset of that number; "
                f"there are: {', '.join(known) or 'none'}",
                code="detect-dataset-unknown",
            )
        name = found[0]
    return results / name / f"{trainer}__{plans}__{configuration}"


def _folds(folder: Path, wanted: Sequence[str], checkpoint: str) -> tuple[str, ...]:
    if not folder.is_dir():
        others: list[str] = []
        if folder.parent.is_dir():
            others = sorted(p.name for p in folder.parent.glob("*Detection*"))
        advice = f"there are: {', '.join(others)}" if others else "train it first"
        raise UsageError(f"there is no trained model {folder}; {advice}", code="detect-no-model")

    finished = [p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}")]
    finished.sort(key=natural_key)
    if not finished:
        raise UsageError(
            f"{folder} has no finished fold (fold_*/{checkpoint}); finish a training, or use "
            "--checkpoint checkpoint_best.pth",
            code="detect-no-fold",
        )
    missing = [fold for fold in wanted if fold not in finished]
    if missing:
        raise UsageError(
            f"-f {' '.join(missing)}: not finished in {folder}; there are: {', '.join(finished)}",
            code="detect-fold-unfinished",
        )
    # Fold all has seen every case: it is not a further member beside the folds, and nobody knows
    # how good it is.
    usual = [fold for fold in finished if fold != FOLD_ALL]
    if not wanted and not usual:
        raise UsageError(
            f"{folder} has no finished fold but all; add -f all to use that",
            code="detect-fold-all-only",
        )
    return tuple(dict.fromkeys(wanted)) or tuple(usual)
