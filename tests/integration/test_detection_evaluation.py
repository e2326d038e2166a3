"""Real lesions: objects of the label maps, written as detections and read back, score 1 and lie
where SimpleITK says.
"""

import json

import numpy as np
import pytest
import SimpleITK

from nnunet_autoreg.cli.evaluate_detection import main
from nnunet_autoreg.detection.geometry import frame_of_itk
from nnunet_autoreg.detection.instances import find_instances, object_classes, read_rules
from nnunet_autoreg.detection.scanfile import (
    Detection,
    make_scan_file,
    read_scan_file,
    write_scan_file,
)

pytestmark = pytest.mark.integration
# Two patients with multiple sclerosis, and the lesions that the description of the data counts.
OBJECTS = {"patient07": 37, "patient26": 19}


def test_the_objects_of_real_label_maps_score_1_and_lie_in_their_lesions(shared_data, tmp_path):
    dataset = shared_data / "nnUNet_raw" / "Dataset061_MSLesions"
    known = json.loads((dataset / "dataset.json").read_text())
    rules = read_rules(known)
    classes = object_classes(known, rules)
    counted = {}
    for file in sorted((dataset / "labelsTr").glob("*.nii.gz")):
        name = file.name.removesuffix(".nii.gz")
        image = SimpleITK.ReadImage(str(file))
        array = SimpleITK.GetArrayFromImage(image)
        geometry = (image.GetSpacing(), image.GetOrigin(), image.GetDirection())
        frame = frame_of_itk(array.shape, *geometry)
        objects = find_instances(array, classes, rules).objects
        counted[name] = len(objects)
        found = [Detection(o.box_zyx, 1, "lesion", 0.9) for o in objects if not o.ignored]
        file_of_boxes = tmp_path / "found" / f"{name}.json"
        write_scan_file(file_of_boxes, make_scan_file(name, frame, found, {"lesion": 1}))

        for box in read_scan_file(file_of_boxes).boxes:
            index = image.TransformPhysicalPointToContinuousIndex(box.center_mm_lps)
            z0, y0, x0, z1, y1, x1 = box.box_zyx
            # Half-open edges: the middle of the voxels 3 and 4 is 3.5, of their edges 3 and 5 is 4.
            middle = [(x0 + x1 - 1) / 2, (y0 + y1 - 1) / 2, (z0 + z1 - 1) / 2]
            assert index == pytest.approx(middle, abs=1e-3)
            assert np.any(array[int(z0) : int(z1), int(y0) : int(y1), int(x0) : int(x1)])

    # As counted in the description of the data set.
    assert counted == OBJECTS
    line = ["-p", str(tmp_path / "found"), "-g", str(dataset / "labelsTr")]
    assert main([*line, "-o", str(tmp_path / "s.json"), "--bootstrap", "0"]) == 0

    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["ap"]["0.1"]["mean"] == scores["ap"]["0.5"]["mean"] == 1
    assert scores["froc"]["cpm"]["mean"] == 1
    # Not an empty page.
    assert (tmp_path / "s_scans.png").stat().st_size > 50_000
