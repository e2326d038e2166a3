"""Label maps for datasets of which only boxes are known: nnU-Net prepares no case without one."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nnunet_autoreg.detection.images import open_image
from nnunet_autoreg.detection.instances import read_true_boxes, with_ellipsoids
from nnunet_autoreg.detection.objects import BOXES, ObjectSource
from nnunet_autoreg.errors import ObjectsError, UsageError
from nnunet_autoreg.geometry import as_size
from nnunet_autoreg.io.names import CHANNEL_SUFFIX, natural_key
from nnunet_autoreg.records import MEND_YOURS, TEMPORARY_FILES, atomic_path, read_json

log = logging.getLogger(__name__)


def has_boxes_alone(dataset: Path) -> bool:
    """Whether boxes are all that a raw dataset knows of its objects."""
    return (dataset / BOXES).is_dir() and not (dataset / "labelsTr").is_dir()


def write_box_labels(dataset: Path) -> list[str]:
    """Write ``labelsTr/<case>`` with the ellipsoid of every box of ``boxesTr/<case>.json``, for
    cases that have no label map; boxes that do not count, and those of labels that are not
    detected, are left undrawn.

    Training takes the boxes themselves; the ellipsoids say where foreground is, and no segmentation
    is learned from them.

    Returns:
        The cases written.

    Raises:
        UsageError: no ``boxesTr``, or images of which some have neither boxes nor labels.
        ObjectsError: an image or boxes that cannot be read, or contradict each other.
    """
    described = read_json(dataset / "dataset.json", MEND_YOURS)
    ending, folder, labels = str(described["file_ending"]), dataset / BOXES, dataset / "labelsTr"
    if not folder.is_dir():
        raise UsageError(f"{dataset} has no folder {BOXES} with <case>.json files")
    images: dict[str, Path] = {}
    for file in sorted(
        (dataset / "imagesTr").glob(f"*{ending}"), key=lambda f: natural_key(f.name)
    ):
        named = CHANNEL_SUFFIX.match(file.name.removesuffix(ending))
        if named and not file.name.startswith("."):
            images.setdefault(named["case"], file)
    labelled = {case for case in images if (labels / f"{case}{ending}").is_file()}
    bare = [
        case for case in images if case not in labelled and not (folder / f"{case}.json").is_file()
    ]
    if bare:
        raise UsageError(
            f"{len(bare)} cases of {dataset} have neither labels nor boxes (first: {bare[0]}); for "
            "a scan without objects "
            f'write {BOXES}/{bare[0]}.json with {{"boxes": []}}'
        )
    written = [case for case in images if case not in labelled]
    for torn in labels.glob(TEMPORARY_FILES):
        torn.unlink()
    source = ObjectSource(labels, dataset, described, reader=None)
    for case in written:
        _write(images[case], folder / f"{case}.json", labels / f"{case}{ending}", source)
    log.info("%d label maps written, %d were there", len(written), len(labelled))
    return written


def _write(image_file: Path, boxes: Path, target: Path, source: ObjectSource) -> None:
    import SimpleITK

    image = open_image(image_file)
    if image.GetDimension() != 3:
        raise ObjectsError(f"{image_file} is no 3D image; detection takes nothing else")
    shape = as_size(image.GetSize()[::-1])
    known = read_true_boxes(boxes, source.classes, shape, source.other_labels)
    # A box that does not count is no foreground either: nobody says what is in it.
    found = with_ellipsoids(
        replace(known, objects=tuple(o for o in known.objects if not o.ignored)), shape
    )
    label_of = np.zeros(max((o.id for o in found.objects), default=0) + 1, np.uint8)
    for item in found.objects:
        label_of[item.id] = source.classes[item.place].label
    assert found.ids_ZYX is not None
    drawn: Any = SimpleITK.GetImageFromArray(label_of[found.ids_ZYX])
    drawn.CopyInformation(image)
    # SimpleITK knows formats by their endings, and what is half written must not have that of a
    # label map.
    with atomic_path(target) as temporary, TemporaryDirectory() as elsewhere:
        whole = Path(elsewhere) / target.name
        SimpleITK.WriteImage(drawn, str(whole), True)
        shutil.copyfile(whole, temporary)
