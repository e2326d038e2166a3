"""Label maps for datasets of which only boxes are known: nnU-Net prepares no case without one."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_autoreg.corpus.find import CHANNEL_SUFFIX, natural_key
from nnunet_autoreg.corpus.read import quiet_stderr
from nnunet_autoreg.detection.instances import object_classes, read_rules, read_true_boxes, with_ellipsoids
from nnunet_autoreg.detection.objects import BOXES
from nnunet_autoreg.errors import ObjectsError, UsageError
from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.records import MEND_YOURS, atomic_path, read_json

log = logging.getLogger(__name__)


def has_boxes_alone(dataset: Path) -> bool:
    """Whether boxes are all that a raw dataset knows of its objects."""
    return (dataset / BOXES).is_dir() and not (dataset / "labelsTr").is_dir()


def write_box_labels(dataset: Path) -> list[str]:
    """Write ``labelsTr/<case>`` with the ellipsoid of every box of ``boxesTr/<case>.json``, for cases that have no label map.

    Training takes the boxes themselves; the ellipsoids say where foreground is, and no segmentation is learned from them.

    Returns:
        The cases written.

    Raises:
        UsageError: no ``boxesTr``, or images of which some have neither boxes nor labels.
        ObjectsError: an image or boxes that cannot be read, or contradict each other.
    """
    described = read_json(dataset / "dataset.json", MEND_YOURS)
    ending, folder = str(described["file_ending"]), dataset / BOXES
    if not folder.is_dir():
        raise UsageError(f"{dataset} has no folder {BOXES} with <case>.json files")
    images: dict[str, Path] = {}
    for file in sorted((dataset / "imagesTr").glob(f"*{ending}"), key=lambda f: natural_key(f.name)):
        named = CHANNEL_SUFFIX.match(file.name.removesuffix(ending))
        if named:
            images.setdefault(named["case"], file)
    labelled = {case for case in images if (dataset / "labelsTr" / f"{case}{ending}").is_file()}
    bare = [case for case in images if case not in labelled and not (folder / f"{case}.json").is_file()]
    if bare:
        raise UsageError(f"{len(bare)} cases of {dataset} have neither labels nor boxes (first: {bare[0]}); for a scan without objects "
                         f"write {BOXES}/{bare[0]}.json with {{\"boxes\": []}}")
    written = [case for case in images if case not in labelled]
    rules = read_rules(described)
    classes = object_classes(described, rules)
    for case in written:
        _write(images[case], folder / f"{case}.json", dataset / "labelsTr" / f"{case}{ending}", classes)
    log.info("%d label maps written, %d were there", len(written), len(labelled))
    return written


def _write(image_file: Path, boxes: Path, target: Path, classes: Any) -> None:
    import SimpleITK

    with quiet_stderr():
        try:
            image: Any = SimpleITK.ReadImage(str(image_file))
        except RuntimeError as error:
            raise ObjectsError(f"{image_file} cannot be read as an image; open it in a viewer, or copy it again") from error
    shape = as_size(image.GetSize()[::-1])
    found = with_ellipsoids(read_true_boxes(boxes, classes, shape), shape)
    label_of = np.zeros(max((o.id for o in found.objects), default=0) + 1, np.uint8)
    for item in found.objects:
        label_of[item.id] = classes[item.place].label
    assert found.ids_ZYX is not None
    drawn: Any = SimpleITK.GetImageFromArray(label_of[found.ids_ZYX])
    drawn.CopyInformation(image)
    with atomic_path(target) as temporary:
        whole = temporary.with_name(f"{temporary.name}{''.join(target.suffixes[-2:])}")
        SimpleITK.WriteImage(drawn, str(whole))
        whole.replace(temporary)
