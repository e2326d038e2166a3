"""Boxes through crop, resampling and transpose, in the world, and in the file of a scan."""

import json

import numpy as np
import pytest
from refusals import refused

from nnunet_autoreg.detection.geometry import (
    Preprocessing,
    check_inside,
    frame_of_affine,
    frame_of_itk,
    frame_of_properties,
    preprocessing_of,
    to_ijk,
)
from nnunet_autoreg.detection.scanfile import (
    Detection,
    make_scan_file,
    read_scan_file,
    write_scan_file,
)
from nnunet_autoreg.errors import ObjectsError


def test_boxes_come_back_through_resampling_crop_and_transpose_by_hand():
    # Original (z, y, x) = (40, 60, 50), transposed to (x, z, y), cropped from (5, 2, 1) to 40 x 30
    # x 50, resampled to 20 x 60 x 50.
    way = Preprocessing((20, 60, 50), (40, 30, 50), (5, 2, 1), (1, 2, 0))

    back = way.to_original([[2, 10, 3, 4, 20, 7]])

    # x: 2..4 times 2 plus 5; z: 10..20 times 1/2 plus 2; y: 3..7 plus 1.
    assert back.tolist() == [[7, 4, 9, 12, 8, 13]]
    assert way.to_preprocessed(back).tolist() == [[2, 10, 3, 4, 20, 7]]


def test_whole_images_map_to_whole_images_for_any_rounding():
    # Factors that are not whole numbers: 10 / 33, 3 and 13 / 11.
    way = Preprocessing((33, 7, 11), (10, 21, 13), (0, 0, 0))

    found = way.to_original([[0, 0, 0, 33, 7, 11]])

    assert found[0] == pytest.approx([0, 0, 0, 10, 21, 13])


def ellipsoid(shape, centre, radii):
    """Return the mask of an ellipsoid; the centre is given in edges, so voxels are at n + 0.5."""
    grid = np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij")
    parts = zip(grid, centre, radii, strict=True)
    return sum(((g - c) / r) ** 2 for g, c, r in parts) < 1


def box_around(mask):
    """Return the half-open box (low, high) of the voxels of a mask."""
    places = np.nonzero(mask)
    low = [float(p.min()) for p in places]
    return np.array(low + [float(p.max()) + 1 for p in places])


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0)])
def test_an_ellipsoid_resampled_by_nnunet_comes_back_to_its_location(transpose):
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.resampling.default_resampling import (
        compute_new_shape,
        resample_data_or_seg_to_shape,
    )

    # Slices of 5 mm are resampled to 1 mm, which is the hard direction.
    spacing = np.array([5.0, 0.8, 0.8])
    target = np.array([1.0, 1.0, 1.0])
    overlaps, away_mm = [], []
    for seed in range(4):
        random = np.random.default_rng(seed)
        shape = (16, 61, 57)
        centre = random.uniform([6, 22, 22], [10, 38, 34])
        radii = random.uniform(9, 14, 3) / spacing
        # The image is 0 at its border, so nnU-Net crops it.
        image = np.zeros((1, *shape), np.float32)
        image[0, 2:14, 3:60, 5:55] = 1
        labels = ellipsoid(shape, centre, radii).astype(np.float32)[None]

        # Transpose, crop and resample as nnU-Net does.
        order = [0, *(1 + t for t in transpose)]
        data, seg, crop = crop_to_nonzero(image.transpose(order), labels.transpose(order))
        moved = spacing[list(transpose)]
        new = compute_new_shape(data.shape[1:], moved, target)
        how = {"is_seg": True, "order": 1, "order_z": 0}
        resampled = resample_data_or_seg_to_shape(seg, new, moved, target, **how)[0] == 1

        properties = {
            "bbox_used_for_cropping": crop,
            "shape_after_cropping_and_before_resampling": data.shape[1:],
        }
        way = preprocessing_of(properties, new, np.argsort(transpose).tolist())
        found = way.to_original(box_around(resampled).tolist())
        true = box_around(labels[0])

        sides = np.minimum(found[3:], true[3:]) - np.maximum(found[:3], true[:3])
        common = np.prod(np.clip(sides, 0, None))
        union = np.prod(found[3:] - found[:3]) + np.prod(true[3:] - true[:3]) - common
        overlaps.append(common / union)
        away = ((found[3:] + found[:3]) - (true[3:] + true[:3])) / 2
        away_mm.append(np.linalg.norm(away * spacing))

    # A border of the resampled box is off by up to half a voxel (0.5 mm) on either side.
    assert np.mean(overlaps) >= 0.90
    assert np.mean(away_mm) <= 0.35


def turn():
    """A rotation of 20 and 35 degrees with one axis flipped: oblique and left-handed."""
    a = np.radians(20)
    b = np.radians(35)
    z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return z @ x @ np.diag([1.0, -1.0, 1.0])


SPACING_XYZ = (0.7, 0.9, 3.3)
ORIGIN_XYZ = (-80.5, 33.25, 410.0)


def test_world_coordinates_are_simpleitks_on_an_oblique_flipped_image():
    sitk = pytest.importorskip("SimpleITK")
    image = sitk.Image([20, 30, 10], sitk.sitkUInt8)
    image.SetSpacing(SPACING_XYZ)
    image.SetOrigin(ORIGIN_XYZ)
    image.SetDirection(turn().ravel().tolist())
    frame = frame_of_itk((10, 30, 20), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    assert frame.spacing_mm == pytest.approx((3.3, 0.9, 0.7))

    # SimpleITK's index is that of the centre of a voxel, ours counts edges.
    for point in np.random.default_rng(0).uniform(0, 10, (5, 3)):
        theirs = image.TransformContinuousIndexToPhysicalPoint((point[::-1] - 0.5).tolist())
        assert frame.to_lps(point) == pytest.approx(theirs, abs=1e-3)

    assert frame.to_lps((0.5, 0.5, 0.5)) == pytest.approx(ORIGIN_XYZ)


def test_world_coordinates_are_nibabels_however_the_image_is_stored(tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    nibabel = pytest.importorskip("nibabel", reason="nibabel is the oracle of this test")
    array = np.zeros((10, 30, 20), np.uint8)
    array[2:5, 10:14, 3:9] = 1
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING_XYZ)
    image.SetOrigin(ORIGIN_XYZ)
    image.SetDirection(turn().ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    stored = nibabel.load(tmp_path / "a.nii.gz")
    ours = frame_of_itk((10, 30, 20), image.GetSpacing(), image.GetOrigin(), image.GetDirection())
    theirs = frame_of_affine(stored.affine, (10, 30, 20))
    # The object in edges, and the centres of its eight corner voxels as indices (i, j, k).
    box = (2.0, 10.0, 3.0, 5.0, 14.0, 9.0)
    ends = [[i, j, k] for i in (2.5, 8.5) for j in (9.5, 13.5) for k in (1.5, 4.5)]
    corners = np.sort(nibabel.affines.apply_affine(stored.affine, ends), 0)

    assert np.sort(ours.corners_ras(box), 0) == pytest.approx(corners, abs=1e-3)
    assert theirs.to_ras([3.5, 12, 6]) == pytest.approx(ours.to_ras([3.5, 12, 6]), abs=1e-3)

    # Turned to RAS the same object has other indices and the same location.
    turned = nibabel.as_closest_canonical(stored)
    data = np.asarray(turned.dataobj).transpose(2, 1, 0)
    places = np.nonzero(data)
    middle = [(p.min() + p.max() + 1) / 2 for p in places]

    place = frame_of_affine(turned.affine, data.shape).to_ras(middle)
    assert place == pytest.approx(ours.to_ras([3.5, 12, 6]), abs=1e-3)


def test_frames_come_from_the_properties_of_every_reader_of_nnunet():
    itk = {
        "sitk_stuff": {
            "spacing": SPACING_XYZ,
            "origin": ORIGIN_XYZ,
            "direction": turn().ravel().tolist(),
        },
    }
    frame = frame_of_properties(itk, (10, 30, 20))
    nibabel = {
        "nibabel_stuff": {
            "original_affine": np.eye(4),
            "reoriented_affine": np.array(frame.affine_ras),
        },
    }

    assert frame_of_properties(nibabel, (10, 30, 20)) == frame

    plain = frame_of_properties({"spacing": (3, 2, 1)}, (4, 4, 4))

    # Without a direction the image is at the origin: index 1 of each axis times 1, 2 and 3 mm.
    assert plain.to_lps((1.5, 1.5, 1.5)).tolist() == [1, 2, 3]


def test_indices_are_half_a_voxel_less_than_edges_and_in_the_order_x_y_z():
    # Reversed to x, y, z, then half a voxel less: 2 - 0.5 = 1.5 and so on.
    assert to_ijk([0, 1, 2, 4, 5, 6]).tolist() == [1.5, 0.5, -0.5, 5.5, 4.5, 3.5]

    frame = frame_of_itk((10, 10, 10), (1, 2, 3), (0, 0, 0), np.eye(3).ravel().tolist())

    # x: 4 voxels of 1 mm, y: 2 of 2 mm, z: 1 of 3 mm.
    assert frame.size_mm((0, 0, 0, 1, 2, 4)) == (4, 4, 3)


FRAME = frame_of_itk((10, 30, 20), SPACING_XYZ, ORIGIN_XYZ, turn().ravel().tolist())
FOUND = [
    Detection((2, 10, 3, 5, 14, 9), 1, "lesion", 0.4, 2),
    Detection((0, 0, 0, 10, 30, 20), 1, "lesion", 0.9),
]


def test_a_scan_file_comes_back_as_it_was_and_its_numbers_agree(tmp_path):
    made = make_scan_file("case_1", FRAME, FOUND, {"lesion": 1}, {"folds": [0, 1]}, {"nms": 0.1})

    write_scan_file(tmp_path / "case_1.json", made)
    read = read_scan_file(tmp_path / "case_1.json")

    assert read == made
    assert read.frame == FRAME
    # Sorted by score; ids follow the order.
    assert [(b.id, b.score, b.votes) for b in read.boxes] == [(1, 0.9, 1), (2, 0.4, 2)]

    small = read.boxes[1]

    # Edges 3 to 9 of x are the centres 2.5 to 8.5; 6 x 0.7, 4 x 0.9 and 3 x 3.3 mm.
    assert small.box_ijk == (2.5, 9.5, 1.5, 8.5, 13.5, 4.5)
    assert small.size_mm == pytest.approx((4.2, 3.6, 9.9), abs=1e-4)

    affine = np.array(read.affine_ras)
    middle = (np.array(small.box_ijk[:3]) + small.box_ijk[3:]) / 2

    # A reader of the file gets the same place from the affine, in RAS and in LPS.
    x, y, z = small.center_mm_ras
    assert affine[:3, :3] @ middle + affine[:3, 3] == pytest.approx((x, y, z), abs=1e-3)
    assert small.center_mm_lps == pytest.approx((-x, -y, z))
    assert np.mean(small.corners_mm_ras, 0) == pytest.approx(small.center_mm_ras, abs=1e-3)


def test_a_scan_without_detections_has_a_file_too(tmp_path):
    write_scan_file(tmp_path / "empty.json", make_scan_file("empty", FRAME, [], {"lesion": 1}))

    assert read_scan_file(tmp_path / "empty.json").boxes == ()


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        # x ends at 29 of 20.
        ({"box_zyx": [2, 10, 3, 5, 14, 29]}, "box-outside", ["box 2", "10 x 30 x 20"]),
        ({"box_zyx": [5, 10, 3, 2, 14, 9]}, "box-without-extent", ["box 2"]),
        ({"score": 1.5}, "detections-score", ["box 2", 1.5]),
        ({"name": "tumour"}, "detections-unknown-class", ["'tumour'", 1, "lesion 1"]),
        ({"id": 1}, "detections-same-id", ["box 1"]),
        ({"box_zyx": [2, 10, 3]}, "objects-unreadable", ["box_zyx"]),
        ({"colour": 1}, "objects-unreadable", ["'colour'"]),
    ],
)
def test_a_scan_file_that_contradicts_itself_is_refused(tmp_path, change, code, values):
    write_scan_file(tmp_path / "a.json", make_scan_file("a", FRAME, FOUND, {"lesion": 1}))
    data = json.loads((tmp_path / "a.json").read_text())
    data["boxes"][1].update(change)
    (tmp_path / "a.json").write_text(json.dumps(data))

    with refused(ObjectsError, code, "a.json", *values):
        read_scan_file(tmp_path / "a.json")


def test_other_json_files_are_not_taken_for_detections(tmp_path):
    (tmp_path / "a.json").write_text("{}")

    with refused(ObjectsError, "detections-format", "a.json"):
        read_scan_file(tmp_path / "a.json")

    (tmp_path / "a.json").write_text("{")

    with refused(ObjectsError, "objects-unreadable", "a.json"):
        read_scan_file(tmp_path / "a.json")

    with refused(ObjectsError, "box-not-finite", "here"):
        check_inside((0, 0, 0, 1, 1, float("nan")), (4, 4, 4), "here")
