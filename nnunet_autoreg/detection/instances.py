"""The objects of a scan, and the rules by which they are found.

Each is a connected component of a label map, an id of an instance map with its JSON file, or only
a box.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import Box, check_inside
from nnunet_autoreg.errors import ObjectsError, PlanError, did_you_mean
from nnunet_autoreg.geometry import Size, as_size, names_text
from nnunet_autoreg.records import MEND_YOURS, from_jsonable, read_json, shown

Ids = NDArray[np.uint16]

BLOCK = "autoreg_detection"
"""The key of dataset.json with the rules below."""
CONNECTIVITIES = (6, 18, 26)
MOST_OBJECTS = 65535
MAX_LABEL, MAX_ID = 2**31 - 1, 2**32 - 1
"""Label maps and instance maps hold no larger values."""


@dataclass(frozen=True)
class Rules:
    """Hold how a label map becomes objects, as ``dataset.json["autoreg_detection"]`` says it.

    Attributes:
        min_voxels: smaller objects are ignored: they need not be found, and a detection of one is
            not wrong.
        connectivity: number of neighbours of a voxel that belong to its component: 6, 18 or 26.
        detect_labels: names of the labels to detect; all, if empty.
        merge: new class -> labels that together are one object, e.g. ``{"tumour": ["edema",
            "core"]}``.
    """

    min_voxels: int = 3
    connectivity: int = 26
    detect_labels: tuple[str, ...] = ()
    merge: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ObjectClass:
    """Hold a class: its name, its ``label`` in results, and the label values that belong to it."""

    name: str
    label: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """Hold one object.

    Attributes:
        id: its value in the id map; from 1.
        class_index: index of its class, from 0.
        box_zyx: voxel edges.
        num_voxels: 0 if only the box is known.
        ignored: see ``Rules.min_voxels``.
    """

    id: int
    class_index: int
    box_zyx: Box
    num_voxels: int
    ignored: bool = False


@dataclass(frozen=True)
class Instances:
    """Hold the objects of a scan, and the map of their ids.

    The map is 0 outside of objects. It is None if only boxes are known.
    """

    objects: tuple[Instance, ...]
    ids_ZYX: Ids | None  # noqa: N815


def read_rules(dataset: Mapping[str, Any], where: str = "dataset.json") -> Rules:
    """Return the rules of a parsed dataset.json; the defaults, if it has none.

    Raises:
        PlanError: an unknown key or an impossible value.
    """
    rules = from_jsonable(Rules, dataset.get(BLOCK, {}), f"{where}: {BLOCK}")
    if rules.connectivity not in CONNECTIVITIES:
        raise PlanError(
            f"{where}: {BLOCK}.connectivity={rules.connectivity} must be 6, 18 or 26",
            code="detection-connectivity",
        )
    if rules.min_voxels < 1:
        raise PlanError(
            f"{where}: {BLOCK}.min_voxels={rules.min_voxels} must be at least 1",
            code="detection-min-voxels",
        )
    return rules


def object_classes(
    dataset: Mapping[str, Any],
    rules: Rules,
    where: str = "dataset.json",
) -> tuple[ObjectClass, ...]:
    """Return the classes to detect, in the order of their labels.

    Background and nnU-Net's "ignore" are not classes.

    Raises:
        PlanError: a name that is not a label, no class at all, or classes that share a label value.
    """
    values = _foreground(dataset, where)
    available = dict(values)
    merged: dict[str, tuple[int, ...]] = {}
    for new_name, names in rules.merge.items():
        merged_values: set[int] = set()
        for name in names:
            if name not in values:
                raise PlanError(
                    f"{where}: {BLOCK}.merge names the label '{name}', which does not exist; "
                    f"{did_you_mean(name, values)}",
                    code="detection-unknown-label",
                )
            merged_values.update(values[name])
            # A merged label is not a separate class, and may be part of several new ones.
            available.pop(name, None)
        merged[new_name] = tuple(sorted(merged_values))

    available |= merged
    for name in rules.detect_labels:
        if name not in available:
            raise PlanError(
                f"{where}: {BLOCK}.detect_labels names '{name}', which is not a label; "
                f"{did_you_mean(name, available)}",
                code="detection-unknown-label",
            )

    classes = []
    for name in rules.detect_labels or tuple(available):
        # A region of no labels has no voxel.
        if available[name]:
            classes.append(ObjectClass(name, available[name][0], available[name]))

    if not classes:
        raise PlanError(
            f"{where}: no label to detect is left; look at labels and {BLOCK}",
            code="detection-no-label",
        )

    # Label value -> name of its class.
    owner: dict[int, str] = {}
    for object_class in classes:
        for value in object_class.values:
            if value in owner:
                raise PlanError(
                    f"{where}: the classes '{owner[value]}' and '{object_class.name}' share the "
                    f"label value {value}, but a voxel belongs to one object: choose one of them "
                    f"with {BLOCK}.detect_labels",
                    code="detection-shared-label",
                )
            owner[value] = object_class.name
    return tuple(sorted(classes, key=lambda c: c.label))


def ignore_value(dataset: Mapping[str, Any]) -> int | None:
    """Return the value of nnU-Net's ignore label, if the dataset has one."""
    values = label_values(dataset).get("ignore")
    return values[0] if values else None


def other_label_values(
    dataset: Mapping[str, Any],
    classes: Sequence[ObjectClass],
    where: str = "dataset.json",
) -> tuple[int, ...]:
    """Return the label values of a dataset that belong to none of the classes.

    Background and nnU-Net's ignore label are left out.
    """
    others: set[int] = set()
    for values in label_values(dataset, where).values():
        others.update(values)
    for object_class in classes:
        others.difference_update(object_class.values)
    return tuple(sorted(others - {0, ignore_value(dataset)}))


def label_values(
    dataset: Mapping[str, Any],
    where: str = "dataset.json",
) -> dict[str, tuple[int, ...]]:
    """Return name -> label values in the order in which they are listed; a region has several.

    Raises:
        PlanError: there are no labels, or one is not a whole number from 0 on.
    """
    labels = dataset.get("labels")
    if not isinstance(labels, dict):
        raise PlanError(
            f"{where}: the key 'labels' is missing; write for example "
            '{"background": 0, "lesion": 1}',
            code="detection-no-labels",
        )

    found = {}
    for name, value in labels.items():
        listed = value if isinstance(value, (list, tuple)) else [value]
        try:
            values = tuple(int(number) for number in listed)
        except (TypeError, ValueError, OverflowError):
            values = (-1,)
        if not all(0 <= number <= MAX_LABEL for number in values):
            raise PlanError(
                f"{where}: labels.{name} is {shown(value)}; write a whole number, or a list of "
                "them for a region",
                code="detection-label-number",
            )
        found[str(name)] = values
    return found


def _foreground(dataset: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Return name -> sorted label values of the foreground."""
    found = {}
    for name, values in label_values(dataset, where).items():
        # Background is 0, regardless of its name.
        if name != "ignore" and values != (0,):
            found[name] = tuple(sorted(set(values)))
    return found


def find_instances(
    labels_ZYX: NDArray[Any],
    classes: Sequence[ObjectClass],
    rules: Rules,
    where: str = "label map",
) -> Instances:
    """Return the connected components of every class of a label map (Z, Y, X).

    Ids count from 1.

    Args:
        where: name of the map in an error.

    Raises:
        ObjectsError: more than 65535 components.
    """
    # 0 for background, else the index of the class plus 1.
    class_map_ZYX = np.zeros(labels_ZYX.shape, dtype=np.uint8)
    for class_index, object_class in enumerate(classes):
        class_map_ZYX[np.isin(labels_ZYX, object_class.values)] = class_index + 1

    connectivity: Any = rules.connectivity
    components, number = cc3d.connected_components(
        class_map_ZYX,
        connectivity=connectivity,
        return_N=True,
    )
    if number > MOST_OBJECTS:
        raise ObjectsError(
            f"{where} has {number} components, but no more than {MOST_OBJECTS} objects can be "
            "numbered; is this a label map?",
            code="objects-too-many",
        )

    ids = components.astype(np.uint16)
    # Each component lies in one class, so that the last write of any of its voxels is right.
    class_of_id = np.zeros(number + 1, dtype=np.uint8)
    class_of_id[ids] = class_map_ZYX
    objects = []
    for i, (box, count) in boxes_of_ids(ids).items():
        class_index = int(class_of_id[i]) - 1
        objects.append(Instance(i, class_index, box, count, count < rules.min_voxels))
    return Instances(tuple(objects), ids)


def boxes_of_ids(ids_ZYX: NDArray[Any]) -> dict[int, tuple[Box, int]]:
    """Return id -> (box in voxel edges, number of voxels) of every id but 0 in an id map."""
    if not ids_ZYX.size:
        return {}

    values = None
    if int(ids_ZYX.max()) >= ids_ZYX.size:
        # cc3d's tables are as long as the largest id, and it refuses ids that are larger than the
        # number of voxels: renumber them, with 0 staying 0.
        values, ids_ZYX = np.unique(ids_ZYX, return_inverse=True)
        if values[0] != 0:
            values = np.concatenate([[0], values])
            ids_ZYX = ids_ZYX + 1
        ids_ZYX = ids_ZYX.astype(np.uint32)

    numbers = cc3d.statistics(np.ascontiguousarray(ids_ZYX), no_slice_conversion=True)
    found = {}
    for i in np.flatnonzero(numbers["voxel_counts"]).tolist():
        z0, z1, y0, y1, x0, x1 = (float(v) for v in numbers["bounding_boxes"][i])
        own_id = i if values is None else int(values[i])
        if own_id:
            # cc3d's boxes end with their last voxel, ours one further.
            box = (z0, y0, x0, z1 + 1, y1 + 1, x1 + 1)
            found[own_id] = (box, int(numbers["voxel_counts"][i]))
    return found


def read_objects_file(file: Path, advice: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        ObjectsError: it cannot be read; the message ends with ``advice``.
    """
    try:
        return read_json(file, advice)
    except PlanError as error:
        raise ObjectsError(str(error), code="objects-unreadable") from error


def labels_of_instances(file: Path) -> dict[int, int]:
    """Return id -> label value, from ``{"instances": {"1": 2, ...}}``.

    Raises:
        ObjectsError: the file cannot be read or has another form.
    """
    data = read_objects_file(file, MEND_YOURS)
    listed = data.get("instances") if isinstance(data, dict) else None
    if not isinstance(listed, dict):
        raise ObjectsError(
            f'{file}: expected {{"instances": {{"1": <label>, ...}}}}',
            code="objects-format",
        )
    try:
        found = {int(i): int(label) for i, label in listed.items()}
        for number in (*found, *found.values()):
            if abs(number) > MAX_ID:
                raise ValueError(f"{shown(number)} is too large")
        return found
    except (TypeError, ValueError, OverflowError) as error:
        raise ObjectsError(
            f"{file}: ids and labels must be whole numbers ({error})",
            code="objects-format",
        ) from error


def known_instances(
    ids_ZYX: NDArray[Any],
    label_of: Mapping[int, int],
    classes: Sequence[ObjectClass],
    rules: Rules,
    where: str,
    other_labels: Sequence[int] = (),
) -> Instances:
    """Return the objects of an instance map (Z, Y, X) with the labels that its JSON gives them.

    One object may have several parts.

    Args:
        label_of: id -> label value, from the JSON file.
        where: name of the map in an error.
        other_labels: label values of the dataset that are not to be detected. Such objects are
            removed from the map.

    Raises:
        ObjectsError: map and JSON disagree, or a label that the dataset does not have.
    """
    lowest = float(np.min(ids_ZYX))
    highest = float(np.max(ids_ZYX))
    if lowest < 0 or highest > MOST_OBJECTS or not (ids_ZYX == np.rint(ids_ZYX)).all():
        raise ObjectsError(
            f"{where}: an instance map holds whole numbers from 0 to {MOST_OBJECTS}, this one has "
            f"values from {lowest:g} to {highest:g}",
            code="objects-map-values",
        )

    ids = np.ascontiguousarray(ids_ZYX).astype(np.uint16)
    boxes = boxes_of_ids(ids)
    _require_same_ids(set(boxes), set(label_of), where)

    class_index_of = class_index_by_value(classes)
    objects = []
    for i, (box, count) in boxes.items():
        label = label_of[i]
        if label in class_index_of:
            is_ignored = count < rules.min_voxels
            objects.append(Instance(i, class_index_of[label], box, count, is_ignored))
        elif label not in other_labels:
            raise ObjectsError(
                f"{where}: instance {i} has label {label}, which is not a class; known are: "
                f"{_listed_classes(classes)}",
                code="objects-unknown-label",
            )

    # The map must not show objects that are not detected.
    removed = sorted(set(boxes) - {item.id for item in objects})
    if removed:
        ids[np.isin(ids, removed)] = 0
    return Instances(tuple(objects), ids)


def _require_same_ids(in_map: set[int], in_json: set[int], where: str) -> None:
    """Refuse an instance map and a JSON file that do not have the same objects."""
    unlisted = sorted(in_map - in_json)
    if unlisted:
        raise ObjectsError(
            f"{where}: the map holds {_listed_ids(unlisted)}, which the JSON does not list; add "
            "them, or set those voxels to 0",
            code="objects-unlisted",
        )
    unseen = sorted(in_json - in_map)
    if unseen:
        raise ObjectsError(
            f"{where}: the JSON lists {_listed_ids(unseen)}, of which the map has no voxel; remove "
            "them from the JSON",
            code="objects-without-voxels",
        )


def class_index_by_value(classes: Sequence[ObjectClass]) -> dict[int, int]:
    """Return label value -> index of its class."""
    found = {}
    for class_index, object_class in enumerate(classes):
        for value in object_class.values:
            found[value] = class_index
    return found


def _listed_classes(classes: Sequence[ObjectClass]) -> str:
    index_of = class_index_by_value(classes)
    return ", ".join(f"{value} ({classes[index].name})" for value, index in index_of.items())


def _listed_ids(ids: Sequence[int]) -> str:
    noun = "ids" if len(ids) > 1 else "id"
    return f"{noun} {names_text(ids, most=5)}"


@dataclass(frozen=True)
class TrueBox:
    """Hold a box of a ``boxesTr`` file."""

    box_zyx: Box
    label: int
    ignore: bool = False


def read_true_boxes(
    file: Path,
    classes: Sequence[ObjectClass],
    shape_vox: Size | None,
    other_labels: Sequence[int] = (),
) -> Instances:
    """Read objects of which only the box is known.

    The file holds ``{"boxes": [{"box_zyx": [z0, y0, x0, z1, y1, x1], "label": 1}]}``, with boxes in
    voxel edges, half open (scanfile.AXES). ``"ignore": true`` marks one that does not count. Other
    keys are allowed, so that a file of detections can be corrected by hand and used.

    Args:
        shape_vox: shape of the image, (z, y, x); not checked if None.
        other_labels: label values of the dataset that are not to be detected. Such boxes are left
            out.

    Raises:
        ObjectsError: the file cannot be read, a box has no extent or lies outside, or a label is
            not a class.
    """
    data = read_objects_file(file, MEND_YOURS)
    listed = data.get("boxes") if isinstance(data, dict) else None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise ObjectsError(
            f'{file}: expected {{"boxes": [{{"box_zyx": [z0, y0, x0, z1, y1, x1], "label": 1}}, '
            "...]}",
            code="objects-format",
        )

    class_index_of = class_index_by_value(classes)
    objects = []
    for n, entry in enumerate(listed):
        where = f"{file}: boxes[{n}]"
        known = {key: entry[key] for key in ("box_zyx", "label", "ignore") if key in entry}
        try:
            box = from_jsonable(TrueBox, known, where)
        except PlanError as error:
            raise ObjectsError(str(error), code="objects-unreadable") from error

        check_inside(box.box_zyx, shape_vox or as_size([2**31] * 3), where)
        if box.label in class_index_of:
            class_index = class_index_of[box.label]
            objects.append(Instance(n + 1, class_index, box.box_zyx, 0, box.ignore))
        elif box.label not in other_labels:
            raise ObjectsError(
                f"{where}: label {box.label} is not a class; known are: {_listed_classes(classes)}",
                code="objects-unknown-label",
            )
    return Instances(tuple(objects), None)


def with_ellipsoids(instances: Instances, shape_vox: Size) -> Instances:
    """Draw the ellipsoids that fill the boxes, so that augmentation can carry them as an id map.

    A voxel belongs to an ellipsoid that touches it, so the ellipsoid's own box of whole voxels is
    the box that was given. Small objects are drawn last and stay visible. An object that is
    hidden nevertheless keeps its box and has no voxel.

    Args:
        shape_vox: shape of the map, (z, y, x).
    """

    def volume(item: Instance) -> float:
        return float(np.prod(np.subtract(item.box_zyx[3:], item.box_zyx[:3])))

    ids = np.zeros(shape_vox, dtype=np.uint16)
    # Large objects first, so that small ones lie on top.
    for item in sorted(instances.objects, key=volume, reverse=True):
        region = []
        squares = []
        for axis in range(3):
            start = item.box_zyx[axis]
            end = item.box_zyx[axis + 3]
            low = max(0, int(np.floor(start)))
            high = min(shape_vox[axis], int(np.ceil(end)))
            region.append(slice(low, high))

            # Half a voxel nearer: the edge of a voxel touches before its centre lies inside.
            centres = np.arange(low, high) + 0.5
            away = np.abs(centres - (start + end) / 2) - 0.5
            half_side = (end - start) / 2
            squares.append((np.clip(away, 0, None) / half_side) ** 2)
        z, y, x = squares
        is_inside = z[:, None, None] + y[None, :, None] + x[None, None, :] < 1
        ids[tuple(region)][is_inside] = item.id

    largest_id = max((item.id for item in instances.objects), default=0)
    counts = np.bincount(ids.ravel(), minlength=largest_id + 1)
    objects = [replace(item, num_voxels=int(counts[item.id])) for item in instances.objects]
    return Instances(tuple(objects), ids)
