"""What is one object: connected components of a label map, an instance map with its JSON, or boxes
alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cc3d
import numpy as np
from numpy.typing import NDArray

from nnunet_autoreg.detection.geometry import check_inside
from nnunet_autoreg.errors import ObjectsError, PlanError, did_you_mean
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.records import MEND_YOURS, from_jsonable, read_json

Ids = NDArray[np.uint16]
Box = tuple[float, float, float, float, float, float]

BLOCK = "autoreg_detection"
"""The key of dataset.json with the rules below."""
CONNECTIVITIES = (6, 18, 26)
MOST_OBJECTS = 65535


@dataclass(frozen=True)
class Rules:
    """How a label map becomes objects; ``dataset.json["autoreg_detection"]``.

    Attributes:
        min_voxels: smaller objects are ignored: neither to be found nor wrong to be found.
        connectivity: 6, 18 or 26 neighbours make a component.
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
    """A class: its ``name``, the ``label`` it has in results, and the label values that belong to
    it.
    """

    name: str
    label: int
    values: tuple[int, ...]


@dataclass(frozen=True)
class Instance:
    """One object.

    Attributes:
        id: its value in the id map; from 1.
        place: of its class among the classes, from 0.
        box_zyx: voxel edges.
        num_voxels: 0 if only the box is known.
        ignored: see ``Rules.min_voxels``.
    """

    id: int
    place: int
    box_zyx: Box
    num_voxels: int
    ignored: bool = False


@dataclass(frozen=True)
class Instances:
    """The objects of a scan, and their map: 0 where there is none; None if only boxes are known."""

    objects: tuple[Instance, ...]
    ids_ZYX: Ids | None  # noqa: N815


def read_rules(dataset: Mapping[str, Any], where: str = "dataset.json") -> Rules:
    """The rules that a parsed dataset.json asks for; the defaults, if it asks for none.

    Raises:
        PlanError: an unknown key or a value that cannot be.
    """
    rules = from_jsonable(Rules, dataset.get(BLOCK, {}), f"{where}: {BLOCK}")
    if rules.connectivity not in CONNECTIVITIES:
        raise PlanError(f"{where}: {BLOCK}.connectivity={rules.connectivity} must be 6, 18 or 26")
    if rules.min_voxels < 1:
        raise PlanError(f"{where}: {BLOCK}.min_voxels={rules.min_voxels} must be at least 1")
    return rules


def object_classes(
    dataset: Mapping[str, Any], rules: Rules, where: str = "dataset.json"
) -> tuple[ObjectClass, ...]:
    """The classes to detect, in the order of their labels; background and nnU-Net's "ignore" are
    none.

    Raises:
        PlanError: a name that is no label, no class at all, or classes that share a label value.
    """
    values = _label_values(dataset, where)
    united = {name for names in rules.merge.values() for name in names}
    available = {name: of_name for name, of_name in values.items() if name not in united}
    for name in united - set(values):
        raise PlanError(
            f"{where}: {BLOCK}.merge names the label '{name}', which is not there; "
            f"{did_you_mean(name, values)}"
        )
    for name, names in rules.merge.items():
        available[name] = tuple(sorted({v for n in names for v in values[n]}))
    for name in rules.detect_labels:
        if name not in available:
            raise PlanError(
                f"{where}: {BLOCK}.detect_labels names '{name}', which is no label; "
                f"{did_you_mean(name, available)}"
            )
    wanted = rules.detect_labels or tuple(available)
    classes = [
        ObjectClass(name, available[name][0], available[name]) for name in wanted if available[name]
    ]
    if not classes:
        raise PlanError(f"{where}: no label to detect is left; look at labels and {BLOCK}")
    _refuse_shared_values(classes, where)
    return tuple(sorted(classes, key=lambda c: c.label))


def ignore_value(dataset: Mapping[str, Any]) -> int | None:
    """The value of nnU-Net's ignore label, if the dataset has one."""
    value = dataset.get("labels", {}).get("ignore")
    return None if value is None else int(value)


def _label_values(dataset: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Name -> label values, of the foreground; a region has several."""
    labels = dataset.get("labels")
    if not isinstance(labels, dict):
        raise PlanError(
            f'{where}: the key \'labels\' is missing; give e.g. {{"background": 0, "lesion": 1}}'
        )
    found = {}
    for name, value in labels.items():
        values = tuple(int(v) for v in value) if isinstance(value, (list, tuple)) else (int(value),)
        if name != "ignore" and values != (0,):
            found[str(name)] = tuple(sorted(set(values)))
    return found


def _refuse_shared_values(classes: Sequence[ObjectClass], where: str) -> None:
    owner: dict[int, str] = {}
    for kind in classes:
        for value in kind.values:
            if value in owner:
                raise PlanError(
                    f"{where}: the classes '{owner[value]}' and '{kind.name}' share the label "
                    f"value {value}, but a voxel "
                    f"belongs to one object: choose among them with {BLOCK}.detect_labels"
                )
            owner[value] = kind.name


def find_instances(
    labels_ZYX: NDArray[Any], classes: Sequence[ObjectClass], rules: Rules, where: str = "label map"
) -> Instances:
    """Connected components, per class, of a label map (Z, Y, X); ids count from 1 class by class.

    Args:
        where: names the map in an error.

    Raises:
        ObjectsError: more than 65535 components.
    """
    kinds = np.zeros(labels_ZYX.shape, dtype=np.uint8)
    for place, kind in enumerate(classes):
        kinds[np.isin(labels_ZYX, kind.values)] = place + 1
    connectivity: Any = rules.connectivity
    components, number = cc3d.connected_components(kinds, connectivity=connectivity, return_N=True)
    if number > MOST_OBJECTS:
        raise ObjectsError(
            f"{where}: {number} components, at most {MOST_OBJECTS} can be told apart; is this a "
            "label map?"
        )
    ids = components.astype(np.uint16)
    boxes = boxes_of_ids(ids)
    kind_of = _value_at(ids, kinds, number)
    objects = tuple(
        Instance(i, int(kind_of[i]) - 1, box, count, count < rules.min_voxels)
        for i, (box, count) in boxes.items()
    )
    return Instances(objects, ids)


def boxes_of_ids(ids_ZYX: NDArray[Any]) -> dict[int, tuple[Box, int]]:
    """Id -> its box in voxel edges and its number of voxels, for every id but 0 in an id map."""
    if not ids_ZYX.size:
        return {}
    values = None
    if int(ids_ZYX.max()) >= ids_ZYX.size:
        # cc3d's tables are as long as the largest id, and it refuses ids beyond the number of
        # voxels.
        values, ids_ZYX = np.unique(ids_ZYX, return_inverse=True)
        if values[0] != 0:
            values, ids_ZYX = np.concatenate([[0], values]), ids_ZYX + 1
        ids_ZYX = ids_ZYX.astype(np.uint32)
    numbers = cc3d.statistics(np.ascontiguousarray(ids_ZYX), no_slice_conversion=True)
    found = {}
    for i in np.flatnonzero(numbers["voxel_counts"]).tolist():
        z0, z1, y0, y1, x0, x1 = (float(v) for v in numbers["bounding_boxes"][i])
        own = i if values is None else int(values[i])
        if own:
            found[own] = ((z0, y0, x0, z1 + 1, y1 + 1, x1 + 1), int(numbers["voxel_counts"][i]))
    return found


def _value_at(ids: Ids, values: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """(number + 1,) the value that ``values`` has throughout each id."""
    table = np.zeros(number + 1, dtype=np.uint8)
    table[ids] = values
    return table


def labels_of_instances(file: Path) -> dict[int, int]:
    """Id -> label value, from ``{"instances": {"1": 2, ...}}``.

    Raises:
        ObjectsError: it cannot be read or does not look like that.
    """
    try:
        data = read_json(file, MEND_YOURS)
    except PlanError as error:
        raise ObjectsError(str(error)) from error
    listed = data.get("instances") if isinstance(data, dict) else None
    if not isinstance(listed, dict):
        raise ObjectsError(f'{file}: expected {{"instances": {{"1": <label>, ...}}}}')
    try:
        return {int(i): int(label) for i, label in listed.items()}
    except (TypeError, ValueError) as error:
        raise ObjectsError(f"{file}: ids and labels must be whole numbers ({error})") from error


def known_instances(
    ids_ZYX: NDArray[Any],
    label_of: Mapping[int, int],
    classes: Sequence[ObjectClass],
    rules: Rules,
    where: str,
    other_labels: Sequence[int] = (),
) -> Instances:
    """The objects of an instance map (Z, Y, X) and of the labels its JSON gives; one object may
    have several parts.

    Args:
        other_labels: label values of the dataset that are not to be detected; such objects are left
            out of the map.

    Raises:
        ObjectsError: map and JSON disagree, or a label that the dataset does not have.
    """
    if (
        float(np.min(ids_ZYX)) < 0
        or not (ids_ZYX == np.rint(ids_ZYX)).all()
        or float(np.max(ids_ZYX)) > MOST_OBJECTS
    ):
        found = f"{ids_ZYX.min():g} to {ids_ZYX.max():g}"
        raise ObjectsError(
            f"{where}: an instance map holds whole numbers from 0 to {MOST_OBJECTS}, this one has "
            f"values from {found}"
        )
    ids = np.ascontiguousarray(ids_ZYX).astype(np.uint16)
    boxes = boxes_of_ids(ids)
    unlisted, unseen = sorted(set(boxes) - set(label_of)), sorted(set(label_of) - set(boxes))
    if unlisted:
        raise ObjectsError(
            f"{where}: the map holds {_some(unlisted)}, which the JSON does not list; add them, or "
            "set those voxels to 0"
        )
    if unseen:
        raise ObjectsError(
            f"{where}: the JSON lists {_some(unseen)}, of which the map has no voxel; remove them "
            "from the JSON"
        )
    place_of = {value: place for place, kind in enumerate(classes) for value in kind.values}
    objects = []
    for i, (box, count) in boxes.items():
        label = label_of[i]
        if label in place_of:
            objects.append(Instance(i, place_of[label], box, count, count < rules.min_voxels))
        elif label not in other_labels:
            known = ", ".join(
                f"{value} ({classes[place].name})" for value, place in place_of.items()
            )
            raise ObjectsError(
                f"{where}: instance {i} has label {label}, which is no class; known are: {known}"
            )
    dropped = sorted(set(boxes) - {o.id for o in objects})
    if dropped:
        ids[np.isin(ids, dropped)] = 0
    return Instances(tuple(objects), ids)


def _some(ids: Sequence[int]) -> str:
    listed = ", ".join(map(str, ids[:5]))
    return f"{'ids' if len(ids) > 1 else 'id'} {listed}{' and more' if len(ids) > 5 else ''}"


@dataclass(frozen=True)
class TrueBox:
    """A box of a ``boxesTr`` file."""

    box_zyx: Box
    label: int
    ignore: bool = False


def read_true_boxes(
    file: Path,
    classes: Sequence[ObjectClass],
    shape_vox: Size | None,
    other_labels: Sequence[int] = (),
) -> Instances:
    """Objects of which only the box is known:

    ``{"boxes": [{"box_zyx": [z0, y0, x0, z1, y1, x1], "label": 1}]}``.

    Boxes are in voxel edges, half open (scanfile.AXES); ``"ignore": true`` marks one that does not
    count. Other keys are allowed, so that a file of detections can be corrected by hand and used.

    Args:
        shape_vox: of the image, (z, y, x); not checked if None.

    Raises:
        ObjectsError: it cannot be read, a box is none or lies outside, or a label is no class.
    """
    try:
        data = read_json(file, MEND_YOURS)
        listed = data.get("boxes") if isinstance(data, dict) else None
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise ObjectsError(
                f'{file}: expected {{"boxes": [{{"box_zyx": [z0, y0, x0, z1, y1, x1], "label": '
                f"1}}, ...]}}"
            )
        read = [
            from_jsonable(
                TrueBox,
                {k: v for k, v in entry.items() if k in ("box_zyx", "label", "ignore")},
                f"{file}: boxes[{n}]",
            )
            for n, entry in enumerate(listed)
        ]
    except PlanError as error:
        raise ObjectsError(str(error)) from error
    place_of = {value: place for place, kind in enumerate(classes) for value in kind.values}
    objects = []
    for n, box in enumerate(read):
        where = f"{file}: boxes[{n}]"
        check_inside(box.box_zyx, shape_vox or as_size([2**31] * 3), where)
        if box.label in place_of:
            objects.append(Instance(n + 1, place_of[box.label], box.box_zyx, 0, box.ignore))
        elif box.label not in other_labels:
            known = ", ".join(
                f"{value} ({classes[place].name})" for value, place in place_of.items()
            )
            raise ObjectsError(f"{where}: label {box.label} is no class; known are: {known}")
    return Instances(tuple(objects), None)


def with_ellipsoids(instances: Instances, shape_vox: Size) -> Instances:
    """Boxes rasterised as the ellipsoids they hold, so that they can be carried through
    augmentation like any object.

    A voxel belongs to an ellipsoid that touches it: the box of whole voxels stays as it was. Small
        objects are drawn last and stay
    visible; one that is hidden all the same keeps its box and no voxel.
    """
    ids = np.zeros(shape_vox, dtype=np.uint16)
    by_size = sorted(
        instances.objects, key=lambda o: -float(np.prod(np.subtract(o.box_zyx[3:], o.box_zyx[:3])))
    )
    for item in by_size:
        low = [max(0, int(np.floor(v))) for v in item.box_zyx[:3]]
        high = [min(s, int(np.ceil(v))) for v, s in zip(item.box_zyx[3:], shape_vox, strict=True)]
        squares = []
        for axis in range(3):
            start, end = item.box_zyx[axis], item.box_zyx[axis + 3]
            middle = np.arange(low[axis], high[axis]) + 0.5
            away = np.clip(np.abs(middle - (start + end) / 2) - 0.5, 0, None) / ((end - start) / 2)
            squares.append(away**2)
        inside = (
            squares[0][:, None, None] + squares[1][None, :, None] + squares[2][None, None, :] < 1
        )
        ids[low[0] : high[0], low[1] : high[1], low[2] : high[2]][inside] = item.id
    counts = np.bincount(
        ids.ravel(), minlength=max((o.id for o in instances.objects), default=0) + 1
    )
    objects = tuple(
        Instance(o.id, o.place, o.box_zyx, int(counts[o.id]), o.ignored) for o in instances.objects
    )
    return Instances(objects, ids)
