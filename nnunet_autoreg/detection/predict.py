"""A trained detector over new scans: nnU-Net's preprocessing, all folds and mirrorings merged,
results in the original image.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, replace
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

from nnunet_autoreg.detection.export import Ids, draw_boxes, draw_instances, shown, write_markup
from nnunet_autoreg.detection.geometry import (
    StoredArray,
    preprocessing_of,
    reader_turn,
    stored_array,
)
from nnunet_autoreg.detection.infer import (
    USUAL,
    Candidates,
    Found,
    ScanDetector,
    Thinning,
    joined,
    merge,
)
from nnunet_autoreg.detection.net import Detector
from nnunet_autoreg.detection.nndetection import write_boxes
from nnunet_autoreg.detection.plan import DetectionPlan, read_plan
from nnunet_autoreg.detection.scanfile import FileBox, ScanFile, make_scan_file, write_scan_file
from nnunet_autoreg.detection.scans import Scan, ready
from nnunet_autoreg.detection.thresholds import FOLD_ALL, score_thresholds
from nnunet_autoreg.detection.validate import as_stored, in_original
from nnunet_autoreg.errors import PlanError, ScanError, UsageError, WeightsError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.io.files import quiet_stderr
from nnunet_autoreg.io.names import natural_key
from nnunet_autoreg.io.orientation import turned
from nnunet_autoreg.records import read_json
from nnunet_autoreg.safe_load import plain_loading

DRAWN_FROM = 0.5
"""Score from which boxes are drawn, if neither a score nor an operating point is asked for."""
DRAWING = ("filled", "instances")
"""The settings that no box depends on, and only what is drawn."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to detect and what to write.

    Attributes:
        mirror: also along every axis, which costs eight times the time.
        thinning: overlaps, and how many boxes are kept.
        min_score: one for all classes, or by class; lower scores are left out everywhere. None
            keeps all.
        filled: label maps of boxes are solid.
        with_instances: write the segmentation inside the boxes.
        for_nndetection: write nnDetection's pickle too.
    """

    mirror: bool = False
    thinning: Thinning = USUAL
    min_score: float | Mapping[str, float] | None = None
    filled: bool = False
    with_instances: bool = True
    for_nndetection: bool = False


class Model:
    """A trained folder of ``nnUNetv2_train``.

    Args:
        folder: ``<trainer>__<plans>__<configuration>``.
        folds: which; all that are finished if empty, but for ``all``, which has to be asked for.

    Raises:
        UsageError: there is no such model or fold.
        PlanError: it is no detector.
        WeightsError: a checkpoint does not belong to the plans, or asks to run code.
    """

    def __init__(
        self,
        folder: Path,
        folds: Sequence[str],
        device: torch.device,
        checkpoint: str = "checkpoint_final.pth",
    ):
        self.folder, self.device, self.checkpoint = folder, device, checkpoint
        self.folds = _folds(folder, folds, checkpoint)
        # It prints advice about a switch that is off here.
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
                f"({str(error).splitlines()[0]}); were the plans "
                "changed after the training? Train again"
            ) from error
        self.configuration = self.stock.configuration_manager
        plan = read_plan(self.configuration.configuration, str(folder / "plans.json"))
        network = self.stock.network
        assert plan is not None and isinstance(network, Detector)
        self.plan: DetectionPlan = plan
        self.network = network.to(device).eval()
        self.network.detect = True
        plans_bytes = (folder / "plans.json").read_bytes()
        digests = (
            digest_of(parameters, plans_bytes) for parameters in self.stock.list_of_parameters
        )
        self.sha256: dict[str, str] = dict(zip(self.folds, digests, strict=True))

    @property
    def num_channels(self) -> int:
        """Of the images."""
        return int(
            determine_num_input_channels(
                self.stock.plans_manager, self.configuration, self.stock.dataset_json
            )
        )

    @property
    def file_ending(self) -> str:
        """Of the images it was trained on."""
        return str(self.stock.dataset_json["file_ending"])

    def describe(self) -> dict[str, Any]:
        """What results say of the model; ``sha256`` is that of every fold's weights and plans,
        which a new training changes.
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
        """Class -> the score threshold that gave so many false positives per scan in the validation
        of all folds together.

        Args:
            num_mirrorings: with which it is to be used; validation may have had others.

        Raises:
            UsageError: a fold has no validation to tell, or is ``all``.
        """
        return score_thresholds(
            self.folder, self.folds, list(self.plan.labels), fp_per_scan, num_mirrorings
        )

    def _check_plans(self) -> None:
        file = self.folder / "plans.json"
        plans = read_json(file)
        name = self.folder.name.rsplit("__", 1)[-1]
        known = name in plans.get("configurations", {})
        # A configuration may have the block from the one that it inherits from.
        if (
            not known
            or read_plan(PlansManager(plans).get_configuration(name).configuration, str(file))
            is None
        ):
            raise PlanError(
                f"{self.folder} holds no detector; train one with -tr AutoregDetectionTrainer"
            )

    def weights(self) -> Iterator[None]:
        """Give the network the weights of one fold after the other."""
        for parameters in self.stock.list_of_parameters:
            self.network.load_state_dict(parameters)
            yield

    def autocast(self) -> AbstractContextManager[Any]:
        """Of a forward pass, in the precision of training and validation."""
        return (
            torch.autocast("cuda", dtype=half_precision(self.device))
            if self.device.type == "cuda"
            else nullcontext()
        )

    def preprocess(self, files: list[str]) -> tuple[torch.Tensor, dict[str, Any]]:
        """A scan as the network sees it (C, Z, Y, X), and where it comes from.

        Raises:
            ScanError: it cannot be read or resampled, has another number of channels or dimensions,
                or voxels that are no finite numbers.
        """
        data, properties = self._read(files)
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
            size = " x ".join(str(n) for n in data.shape[1:])
            spacing = ", ".join(f"{mm:g}" for mm in properties["spacing"])
            raise ScanError(
                "spacing",
                f"nnU-Net cannot resample {size} voxels of {spacing} mm (z, y, x) ({error}); look "
                "at its header",
            ) from error
        image = np.asarray(image, dtype=np.float32)
        if not np.isfinite(image).all():
            raise ScanError(
                "nonfinite",
                f"{int((~np.isfinite(data)).sum())} of {data.size} voxels are NaN or infinite, and "
                "after "
                f"preprocessing {int((~np.isfinite(image)).sum())} of {image.size}; repair or "
                "leave out the scan",
            )
        return torch.from_numpy(image), properties

    def _read(self, files: list[str]) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """nnU-Net's reader, whose errors are of any kind, and partly printed."""
        said = io.StringIO()
        try:
            with redirect_stdout(said), quiet_stderr():
                data, properties = self.stock.plans_manager.image_reader_writer_class().read_images(
                    files
                )
        except Exception as error:
            reason = (
                str(error).strip().splitlines()[-1:]
                or said.getvalue().splitlines()[:1]
                or [type(error).__name__]
            )
            raise ScanError(
                "unreadable",
                f"nnU-Net cannot read {', '.join(Path(f).name for f in files)} "
                f"({reason[0].strip()})",
            ) from error
        if said.getvalue():
            log.warning("%s: %s", files[0], " ".join(said.getvalue().split()))
        if len(data) != self.num_channels:
            raise ScanError(
                "channels",
                f"its files hold {len(data)} channels and the model needs {self.num_channels}; is "
                "one of them 4D "
                "or in colour?",
            )
        if len(properties.get("sitk_stuff", {}).get("spacing", (1, 1, 1))) != 3:
            raise ScanError(
                "not3d",
                f"it has {len(properties['sitk_stuff']['spacing'])} dimensions; store it as a 3D "
                "image",
            )
        return data, properties


def half_precision(device: torch.device) -> torch.dtype:
    """What a GPU computes in, as the trainers have it: bfloat16 where it is in hardware."""
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def digest_of(parameters: Mapping[str, torch.Tensor], plans: bytes) -> str:
    """16 hexadecimal digits of the SHA-256 of a network's plans and weights."""
    digest = hashlib.sha256(plans)
    for name, value in parameters.items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Detected:
    """A scan's file, and the segmentation (Z, Y, X) that came along, in the image as it was read;
    properties are nnU-Net's.
    """

    record: ScanFile
    labels_ZYX: NDArray[Any] | None  # noqa: N815
    properties: dict[str, Any]


def detect(model: Model, scan: Scan, options: Options) -> Detected:
    """Find the objects of a scan.

    Raises:
        ScanError: it cannot be read, or does not fit the model.
        WeightsError: the network answers with numbers that are none.
    """
    inputs = scan.inputs()
    with ready(scan) as files:
        image, properties = model.preprocess(files)
    merged, logits = _merged(model, image, options)
    manager = model.stock.plans_manager
    shape = original_shape(properties, manager.transpose_backward)
    geometry = preprocessing_of(properties, as_size(image.shape[1:]), manager.transpose_backward)
    detections = [
        d
        for d in in_original(merged, geometry, shape, model.plan.classes)
        if d.score >= lowest(options.min_score, d.name)
    ]
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
    model: Model, image_CZYX: torch.Tensor, options: Options
) -> tuple[Found, torch.Tensor | None]:
    """What all folds and mirrorings find together, in the preprocessed image, and the mean of their
    segmentation logits (C, Z, Y, X).
    """
    detector = ScanDetector(
        model.network,
        model.plan.anchors,
        as_size(model.configuration.patch_size),
        model.device,
        mirror_axes=_mirror_axes(model, options),
        thinning=options.thinning,
        autocast=model.autocast,
    )
    parts: list[Candidates] = []
    logits: torch.Tensor | None = None
    for number, _ in enumerate(model.weights()):
        found, of_fold = detector.candidates(
            image_CZYX, with_logits=_with_instances(model, options)
        )
        parts.append(replace(found, voters_N=found.voters_N + number * detector.num_voters))
        if of_fold is not None:
            logits = of_fold if logits is None else logits + of_fold
    merged = merge(joined(parts), len(parts) * detector.num_voters, options.thinning)
    return merged, None if logits is None else logits / len(parts)


def settings_of(model: Model, options: Options) -> dict[str, Any]:
    """What results say of the options that they depend on; the last two (``DRAWING``) are of
    pictures alone.
    """
    return {
        "thinning": asdict(options.thinning),
        "mirrorings": num_mirrorings(model, options),
        "min_score": options.min_score,
        "filled": options.filled,
        "instances": _with_instances(model, options),
    }


def _with_instances(model: Model, options: Options) -> bool:
    return options.with_instances and model.plan.has_masks


def num_mirrorings(model: Model, options: Options) -> int:
    """How often every model looks at a scan."""
    return int(2 ** len(_mirror_axes(model, options)))


def _mirror_axes(model: Model, options: Options) -> tuple[int, ...]:
    return tuple(model.stock.allowed_mirroring_axes or ()) if options.mirror else ()


def original_shape(properties: Mapping[str, Any], transpose_backward: Sequence[int]) -> Size:
    """Shape (z, y, x) of the image as it was read."""
    before = properties["shape_before_cropping"]
    return as_size([before[axis] for axis in transpose_backward])


def lowest(min_score: float | Mapping[str, float] | None, name: str) -> float:
    """The lowest score of a class that is kept."""
    if min_score is None:
        return 0.0
    return min_score[name] if isinstance(min_score, Mapping) else min_score


def write(model: Model, found: Detected, folder: Path, options: Options) -> None:
    """Write the files of a scan; its JSON comes last, so that where it is, all is."""
    instances = None
    if found.labels_ZYX is not None:
        labels_ZYX = np.asarray(found.labels_ZYX)
        boxes = _in_readers_array(
            _drawn(found.record, options), stored_array(found.properties, labels_ZYX.shape)
        )
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
    options: Options,
) -> None:
    """Write the files of a scan, its JSON last, and remove those of an earlier run; ``writer`` is
    nnU-Net's for images of these properties.
    """
    name, boxes = record.scan, _drawn(record, options)
    # The JSON first: where it is, all is, and of one run.
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


def _in_readers_array(boxes: Sequence[FileBox], stored: StoredArray) -> list[FileBox]:
    """The boxes of a file with their edges in the array that nnU-Net's reader gave."""
    moved = []
    for box in boxes:
        z0, y0, x0, z1, y1, x1 = (float(v) for v in stored.to_reader(box.box_zyx))
        moved.append(replace(box, box_zyx=(z0, y0, x0, z1, y1, x1)))
    return moved


def _drawn(record: ScanFile, options: Options) -> list[FileBox]:
    # Who asked for a score sees all that is left; else low scores, which are for evaluation, are
    # not drawn.
    return shown(record.boxes, DRAWN_FROM if options.min_score is None else 0.0)


def trained_folder(
    results: Path, dataset: str, trainer: str, plans: str, configuration: str
) -> Path:
    """The folder of a trained model; the dataset is given as ``4``, ``004`` or
    ``Dataset004_Hippocampus``.

    Raises:
        UsageError: no dataset of that number has been trained on, or several have.
    """
    name = dataset
    if dataset.isdecimal():
        found = sorted(p.name for p in results.glob(f"Dataset{int(dataset):03}_*") if p.is_dir())
        if len(found) > 1:
            raise UsageError(
                f"-d {dataset}: {' and '.join(found)} share that number; give the full name"
            )
        if not found:
            known = (
                ", ".join(sorted(p.name for p in results.glob("Dataset*_*") if p.is_dir()))
                or "none"
            )
            raise UsageError(
                f"-d {dataset}: {results} (nnUNet_results) has no trained dataset of that number; "
                f"there are: {known}"
            )
        name = found[0]
    return results / name / f"{trainer}__{plans}__{configuration}"


def _folds(folder: Path, wanted: Sequence[str], checkpoint: str) -> tuple[str, ...]:
    if not folder.is_dir():
        beside = (
            sorted(p.name for p in folder.parent.glob("*Detection*"))
            if folder.parent.is_dir()
            else []
        )
        raise UsageError(
            f"there is no trained model {folder}; "
            f"{'there are: ' + ', '.join(beside) if beside else 'train it first'}"
        )
    present = sorted(
        (p.parent.name.removeprefix("fold_") for p in folder.glob(f"fold_*/{checkpoint}")),
        key=natural_key,
    )
    if not present:
        raise UsageError(
            f"{folder} has no finished fold (fold_*/{checkpoint}); finish a training, or use "
            "--checkpoint checkpoint_best.pth"
        )
    missing = [fold for fold in wanted if fold not in present]
    if missing:
        raise UsageError(
            f"-f {' '.join(missing)}: not finished in {folder}; there are: {', '.join(present)}"
        )
    # Fold all has seen every case: it is no fifth opinion beside the folds, and nobody knows how
    # good it is.
    usual = [fold for fold in present if fold != FOLD_ALL]
    if not wanted and not usual:
        raise UsageError(f"{folder} has no finished fold but all; add -f all to use that")
    return tuple(dict.fromkeys(wanted)) or tuple(usual)
