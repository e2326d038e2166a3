"""From an oblique, anisotropic image with an empty border through nnU-Net's preprocessing, tiles
and merging, back to where objects are.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunet_autoreg.detection.anchors import AnchorPlan
from nnunet_autoreg.detection.data import IdMapMaker, instances_folder
from nnunet_autoreg.detection.instances import ObjectClass, Rules
from nnunet_autoreg.detection.net import Output
from nnunet_autoreg.detection.objects import ObjectSource
from nnunet_autoreg.detection.plan import DetectionPlan
from nnunet_autoreg.detection.predict import DetectionOptions, detect, write
from nnunet_autoreg.downstream.scans import find

SEG = {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None}
DATA = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
CONFIGURATION = {
    "preprocessor_name": "DefaultPreprocessor",
    "patch_size": [16, 16, 16],
    "spacing": [1.0, 2.0, 1.0],
    "batch_size": 2,
    "normalization_schemes": ["NoNormalization"],
    "use_mask_for_norm": [False],
    "data_identifier": "x",
    "architecture": {},
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": DATA,
    "resampling_fn_seg_kwargs": SEG,
    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
    "resampling_fn_probabilities_kwargs": {**DATA, "order": 1},
}
PLANS = {
    "dataset_name": "D",
    "plans_name": "P",
    "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager",
    "transpose_forward": [1, 0, 2],
    "transpose_backward": [1, 0, 2],
    "configurations": {"3d_fullres": CONFIGURATION},
    "foreground_intensity_properties_per_channel": {"0": {}},
}
DATASET: dict[str, Any] = {
    "labels": {"background": 0, "lesion": 1},
    "channel_names": {"0": "MRI"},
    "file_ending": ".nii.gz",
}
# z, y, x: 4 x 8 x 8 voxels of 2 x 1 x 1 mm; 8 x 4 x 8 once transposed and resampled to
# (y, z, x) = 1 x 2 x 1 mm.
BOX = (4, 8, 16, 8, 16, 24)


class Bright(torch.nn.Module):
    """Finds, for every anchor, how much of it is bright."""

    def forward(self, image: torch.Tensor) -> Output:
        # An anchor has the size of the object, so it is full only exactly on the object: 30 - 25
        # is a probability of 0.993, and 0.9 of the voxels give 2 (0.88, below the limit of 0.9).
        filled = torch.nn.functional.avg_pool3d(image, (8, 4, 8), stride=(1, 1, 1))
        scores = (filled * 30 - 25).flatten()[None, :, None]
        cells = (filled.shape[2], filled.shape[3], filled.shape[4])
        segmentation = torch.cat([0.5 - image, image - 0.5], 1)
        return Output(segmentation, scores, torch.zeros(1, scores.shape[1], 6), (cells,))

    def eval(self) -> "Bright":
        return self


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """24 x 32 x 40 voxels of 2 x 1 x 1 mm, turned about two axes; zero outside of the middle, 1 in
    one box, 0.1 around it.
    """
    import SimpleITK

    array = np.zeros((24, 32, 40), np.float32)
    array[2:22, 4:28, 6:34] = 0.1
    array[BOX[0] : BOX[3], BOX[1] : BOX[4], BOX[2] : BOX[5]] = 1
    image: Any = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.0, 2.0))
    image.SetOrigin((-30.0, 12.0, 99.0))
    turn: Any = SimpleITK.Euler3DTransform()
    turn.SetRotation(0.3, 0.0, -0.4)
    image.SetDirection(turn.GetMatrix())
    file = tmp_path / "scans" / "a_0000.nii.gz"
    file.parent.mkdir()
    SimpleITK.WriteImage(image, str(file))
    return file


def shifted_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anchors of the stand-in: a corner at every voxel."""
    from nnunet_autoreg.detection import infer
    from nnunet_autoreg.detection.anchors import AnchorGrid

    def every_voxel(plan: AnchorPlan, cells: Any, device: Any) -> AnchorGrid:
        axes = [torch.arange(float(n)) for n in cells[0]]
        corners = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        boxes = torch.cat([corners, corners + torch.tensor([8.0, 4.0, 8.0])], 1)
        return AnchorGrid(boxes, tuple(cells), ((1, 1, 1),), 1)

    monkeypatch.setattr(infer, "lay_out", every_voxel)


READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient")


def model(reader: str = "SimpleITKIO") -> Any:
    """Return a loaded model as ``detect`` gets it, with nnU-Net's own preprocessing."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager({**PLANS, "image_reader_writer": reader})
    configuration = manager.get_configuration("3d_fullres")
    plan = DetectionPlan(
        (ObjectClass("lesion", 1, (1,)),),
        Rules(),
        AnchorPlan((0,), ((1, 1, 1),), ((8.0, 4.0, 8.0),), 1.0, {}),
        8,
        True,
    )

    def preprocess(files: list[str], name: str) -> tuple[torch.Tensor, dict[str, Any]]:
        preprocessor = configuration.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case(files, None, manager, configuration, DATASET)
        return torch.from_numpy(data), properties

    stock = SimpleNamespace(
        plans_manager=manager,
        allowed_mirroring_axes=(0, 1, 2),
        label_manager=manager.get_label_manager(DATASET),
    )
    return SimpleNamespace(
        stock=stock,
        configuration=configuration,
        plan=plan,
        network=Bright(),
        device=torch.device("cpu"),
        preprocess=preprocess,
        autocast=torch.inference_mode,
        weights=lambda: iter([None]),
        describe=dict,
        file_ending=".nii.gz",
    )


@pytest.mark.parametrize(
    ("reader", "mirror"),
    [(READERS[0], True), *((reader, False) for reader in READERS)],
)
def test_an_object_is_found_where_it_is_in_voxels_and_in_the_world(
    image_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reader: str,
    mirror: bool,
) -> None:
    import SimpleITK

    shifted_grid(monkeypatch)
    made = model(reader)
    options = DetectionOptions(mirror=mirror, min_score=0.9)
    (scan,) = find(image_file.parent, ".nii.gz", 1)

    found = detect(made, scan, options)

    # The border of the object was resampled, so it may be off by some tenths of a voxel.
    (box,) = found.record.boxes

    assert box.box_zyx == pytest.approx(BOX, abs=0.3)

    image = SimpleITK.ReadImage(str(image_file))
    # The middle as an index of voxel centres, x first: half a voxel below the middle of the edges.
    middle = [(BOX[a] + BOX[a + 3]) / 2 - 0.5 for a in (2, 1, 0)]

    place = image.TransformContinuousIndexToPhysicalPoint(middle)
    assert box.center_mm_lps == pytest.approx(place, abs=0.5)
    # 4 x 2 mm, 8 x 1 mm and 8 x 1 mm.
    assert box.size_mm == pytest.approx((8, 8, 8), abs=0.5)

    write(made, found, tmp_path, options)
    instances = SimpleITK.ReadImage(str(tmp_path / "a_instances.nii.gz"))

    assert instances.GetOrigin() == pytest.approx(image.GetOrigin())
    assert instances.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-6)

    inside = SimpleITK.GetArrayFromImage(instances) == 1
    truth = np.zeros(inside.shape, bool)
    truth[BOX[0] : BOX[3], BOX[1] : BOX[4], BOX[2] : BOX[5]] = True

    assert (inside & truth).sum() / (inside | truth).sum() > 0.9

    # The drawn frame lies on the box too, in the stored array.
    drawn = SimpleITK.ReadImage(str(tmp_path / "a_boxes.nii.gz"))
    frame = np.argwhere(SimpleITK.GetArrayFromImage(drawn))

    assert [*frame.min(0), *(frame.max(0) + 1)] == list(BOX)


def test_ids_are_resampled_as_nnunet_resamples_the_labels(image_file: Path, tmp_path: Path) -> None:
    import blosc2
    import SimpleITK
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    made = model()
    image = SimpleITK.ReadImage(str(image_file))
    is_lesion = SimpleITK.GetArrayFromImage(image) == 1
    labels: Any = SimpleITK.GetImageFromArray(is_lesion.astype(np.uint8))
    labels.CopyInformation(image)
    raw = tmp_path / "raw" / "labelsTr" / "a.nii.gz"
    raw.parent.mkdir(parents=True)
    SimpleITK.WriteImage(labels, str(raw))
    preprocessor = made.configuration.preprocessor_class(verbose=False)
    data, seg, properties = preprocessor.run_case(
        [str(image_file)],
        str(raw),
        made.stock.plans_manager,
        made.configuration,
        DATASET,
    )
    folder = tmp_path / "preprocessed"
    folder.mkdir()
    options = {"chunks": (1, 8, 8, 8), "blocks": (1, 8, 8, 8)}
    nnUNetDatasetBlosc2.save_case(data, seg, properties, str(folder / "a"), **options)
    source = ObjectSource(raw.parent, raw.parent, DATASET, SimpleITKIO)
    # The order of the axes, the spacing, the patch, and nnU-Net's function for label maps.
    resample = made.configuration.resampling_fn_seg
    maker = IdMapMaker(folder, source, (1, 0, 2), (1.0, 2.0, 1.0), (16, 16, 16), resample)

    found = maker.make("a")

    ids = blosc2.open(str(instances_folder(folder) / "a.b2nd"))[:]

    assert np.array_equal(ids > 0, seg[0] > 0)
    assert ids.max() == 1

    (item,) = found.objects
    low = np.argwhere(ids == 1).min(0)
    high = np.argwhere(ids == 1).max(0) + 1

    # Boxes are kept in numbers of the original grid, so they differ by up to half a voxel.
    assert item.box_zyx == pytest.approx([*low, *high], abs=0.51)
    assert item.num_voxels == (ids == 1).sum()
