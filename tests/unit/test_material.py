"""Groups of contrasts, places of structures, and the material that sequences are cut from; with
small scans on disk.
"""

import json
import pickle
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import SimpleITK
from dicom_files import volume, write_series
from refusals import logged, refused
from sequence_cases import plan_for

from nnunet_autoreg import rng
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.grid import (
    Grid,
    brought_onto,
    grid_of_scan,
    oriented_voxel,
    read_label_map,
)
from nnunet_autoreg.corpus.groups import commonest, contrast_groups, contrast_word
from nnunet_autoreg.corpus.index import index_scans
from nnunet_autoreg.corpus.locations import (
    locations_of_boxes,
    locations_of_classes,
    locations_of_labels,
    part_centres,
    read_boxes,
)
from nnunet_autoreg.corpus.read import load_scan
from nnunet_autoreg.errors import AutoregError, ScanError, UsageError
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objective_kinds import with_objective
from nnunet_autoreg.objectives.prediction_plan import PredictionPlan
from nnunet_autoreg.plan import (
    DataPlan,
    EncoderPlan,
    OptimPlan,
    Plan,
    RunPlan,
    SequencePlan,
)
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.preprocessing import (
    available_kinds,
    make_sampling_pools,
    parse_kinds,
    plan_sequences,
    plan_with_sequences,
    split,
)
from nnunet_autoreg.pretrain.request import Request
from nnunet_autoreg.records import from_jsonable, to_jsonable
from nnunet_autoreg.report.preview import draw_preview, use_of_blocks
from nnunet_autoreg.sampling.kinds import num_codes
from nnunet_autoreg.sampling.members import choose_locations
from nnunet_autoreg.sampling.neighbours import places_alike
from nnunet_autoreg.sampling.pool import StoredLocation, Structure
from nnunet_autoreg.sampling.sampler import SequenceSampler
from nnunet_autoreg.store.groups import ensure_groups
from nnunet_autoreg.store.store import Store

TINY = encoder_size("primus_tiny")
RAS = (-1, 0, 0, 0, -1, 0, 0, 0, 1)


def make_plan(**sequence):
    settings = {"crop_size_vox": (16, 16, 16), **sequence}
    return Plan(
        "t",
        DataPlan((1.0, 1.0, 1.0)),
        EncoderPlan("primus_tiny", TINY.class_path, TINY.arguments, TINY.token_size),
        SequencePlan(**settings),
        PredictionPlan(),
        OptimPlan(10, 2, 1e-3, 1),
        RunPlan(7, 10, 10),
    )


def write_image(path, array, spacing=(1, 1, 1), origin=(0, 0, 0), direction=RAS):
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))


def noise(seed, shape=(20, 24, 22)):
    return (np.random.default_rng(seed).normal(size=shape) * 100 + 500).astype(np.float32)


def write_dataset(raw, channels=("T1", "FLAIR"), num_cases=3, name="Dataset700_Two"):
    """Cases with a margin of zeros that differs between channels, and label maps with a cube at (8,
    12, 6).
    """
    folder = raw / name
    for case in range(num_cases):
        for channel in range(len(channels)):
            array = noise(sum(name.encode()) + 10 * case + channel)
            array[: 2 + channel] = 0
            write_image(folder / "imagesTr" / f"case{case}_{channel:04d}.nii.gz", array)
        labels = np.zeros((20, 24, 22), np.uint8)
        labels[7:10, 11:14, 5:8] = 1
        labels[15:18, 3:6, 18:21] = 2
        write_image(folder / "labelsTr" / f"case{case}.nii.gz", labels)
    description = {
        "channel_names": dict(enumerate(channels)),
        "labels": {"background": 0, "cube": 1, "other": 2},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def rows_of(*folders, salt="pepper"):
    return list(index_scans(find_scans([], list(folders), salt=salt), set(), 1, salt=salt).usable)


def test_channels_of_a_case_are_a_group_in_the_fixed_order_of_contrasts(tmp_path):
    rows = rows_of(write_dataset(tmp_path, ("FLAIR", "T1post", "T1")))
    groups = contrast_groups(rows)

    assert [group.contrasts for group in groups] == [("T1w", "T1w-ce", "FLAIR")] * 3
    assert [row.channel for row in groups[0].rows] == ["T1", "T1post", "FLAIR"]
    assert {row.case for row in groups[1].rows} == {"case1"}
    assert commonest(groups) == ("T1w", "T1w-ce", "FLAIR")


def test_one_contrast_has_one_word_wherever_it_is_named(tmp_path):
    row = rows_of(write_dataset(tmp_path))[0]
    words = {
        contrast_word(replace(row, contrast=name)) for name in ("T1w-ce", "t1post", "T1c", "T1Gd")
    }

    assert words == {"T1w-ce"}
    assert contrast_word(replace(row, contrast="", channel="0")) == "Dataset700 channel 0"


def test_scans_of_one_subject_and_session_are_a_group(tmp_path):
    # Of two T1w images the one with more voxels is taken; other sessions and subjects have only
    # one contrast each.
    names = (
        "sub-1_ses-1_T1w",
        "sub-1_ses-1_run-2_T1w",
        "sub-1_ses-1_T2w",
        "sub-1_ses-2_T2w",
        "sub-2_ses-1_T1w",
    )
    for seed, name in enumerate(names):
        shape = (24, 24, 22) if "run" in name else (20, 24, 22)
        write_image(tmp_path / "bids" / f"{name}.nii.gz", noise(seed, shape))

    (group,) = contrast_groups(rows_of(tmp_path / "bids"))

    assert group.contrasts == ("T1w", "T2w")
    assert not group.channels
    assert [row.shape_vox for row in group.rows] == [(24, 24, 22), (20, 24, 22)]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_channels_are_stored_in_the_box_around_all_of_them(tmp_path, store):
    groups = contrast_groups(rows_of(write_dataset(tmp_path)))
    keys = ensure_groups(store, groups, lambda row: (1.0, 1.0, 1.0), None, 1)
    cases = [store.open(key) for key in keys[groups[0].name]]

    # The first channel is zero in 2 slices, the second in 3: the common box leaves out 2.
    assert [case.shape_vox for case in cases] == [(18, 24, 22)] * 2

    raw = noise(sum(b"Dataset700_Two") + 1)
    raw[:3] = 0
    stored = cases[1].read((0, 0, 0), (18, 24, 22))[0]

    # Normalised, so the voxels agree up to scale and offset.
    assert np.corrcoef(stored.ravel(), raw[2:].ravel())[0, 1] == pytest.approx(1, abs=1e-6)
    assert ensure_groups(store, groups, lambda row: (1.0, 1.0, 1.0), None, 1) == keys


def smooth(z, y, x):
    return (np.sin(z / 9) + np.cos(y / 11) + np.sin(x / 7)) * 100 + 500


def test_images_of_a_session_share_one_grid_that_all_of_them_cover(tmp_path, store):
    """The second image has other voxels, another corner and reversed axes, but shows the same
    function of the place in mm.
    """
    fine = np.meshgrid(np.arange(30.0), np.arange(32.0), np.arange(28.0), indexing="ij")
    write_image(
        tmp_path / "b" / "sub-1_T1w.nii.gz",
        smooth(*fine).astype(np.float32),
        (1, 1, 1),
        (0, 0, 0),
        (1, 0, 0, 0, 1, 0, 0, 0, 1),
    )
    coarse = np.meshgrid(
        4 + 2 * np.arange(12.0),
        2 + 2 * np.arange(14.0),
        24 - 2 * np.arange(12.0),
        indexing="ij",
    )
    other = smooth(*coarse).astype(np.float32)
    write_image(
        tmp_path / "b" / "sub-1_T2w.nii.gz",
        other,
        (2, 2, 2),
        (24, 2, 4),
        (-1, 0, 0, 0, 1, 0, 0, 0, 1),
    )
    groups = contrast_groups(rows_of(tmp_path / "b"))
    keys = ensure_groups(store, groups, lambda row: (1.0, 1.0, 1.0), None, 1)

    first, second = (store.open(key) for key in keys[groups[0].name])

    # Covered by the second: z 3..27, y 1..29 and x 1..25 mm, to half of its voxels.
    assert first.shape_vox == second.shape_vox
    assert all(20 <= n <= 29 for n in first.shape_vox)

    # Away from the edges, where interpolation has nothing to lean on.
    a = first.read((0, 0, 0), first.shape_vox)[0][2:-2, 2:-2, 2:-2]
    b = second.read((0, 0, 0), second.shape_vox)[0][2:-2, 2:-2, 2:-2]

    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.999


def test_images_of_different_parts_of_the_body_make_no_group_and_say_so(tmp_path, store, caplog):
    write_image(tmp_path / "b" / "sub-1_T1w.nii.gz", noise(0))
    write_image(tmp_path / "b" / "sub-1_T2w.nii.gz", noise(1), origin=(0, 0, 500))
    groups = contrast_groups(rows_of(tmp_path / "b"))

    assert ensure_groups(store, groups, lambda row: (1.0, 1.0, 1.0), None, 1) == {}
    assert "make no sequence (geometry)" in caplog.text
    assert "different parts of the body" in caplog.text


def test_the_grid_of_a_scan_fits_the_array_for_any_order_of_axes(tmp_path):
    array = np.zeros((10, 12, 14), np.float32)
    array += noise(0, array.shape)
    # One bright voxel, whose place in mm SimpleITK knows.
    array[2, 3, 5] = 9000
    stored = {"ras": RAS, "lps": (1, 0, 0, 0, 1, 0, 0, 0, 1), "turned": (0, 0, 1, 1, 0, 0, 0, 1, 0)}
    for name, direction in stored.items():
        path = tmp_path / f"{name}.nii.gz"
        write_image(path, array, (1.0, 1.5, 2.0), (5, 6, 7), direction)
        image = SimpleITK.ReadImage(str(path))
        world = np.array(image.TransformIndexToPhysicalPoint((5, 3, 2)))

        grid = grid_of_scan(path)
        scan = load_scan(path).array_CZYX[0]

        assert grid.shape_vox == scan.shape
        z, y, x = np.unravel_index(scan.argmax(), scan.shape)
        offset_mm = np.array([x, y, z]) * grid.spacing_mm[::-1]
        found = np.array(grid.origin_mm) + np.array(grid.direction).reshape(3, 3) @ offset_mm
        assert np.allclose(found, world, atol=1e-4)
        assert oriented_voxel(path, "", (2, 3, 5)) == (z, y, x)
        labels, label_grid = read_label_map(path)
        assert label_grid == grid
        assert labels[z, y, x] == 9000


def test_the_place_of_a_scan_in_an_archive_is_refused_in_words(tmp_path):
    with refused(ScanError, "scan-geometry", "part of a file"):
        grid_of_scan(tmp_path, "member=a.nii")


def test_resampling_onto_a_shifted_grid_moves_the_voxels_by_the_shift():
    here = Grid((4, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (1, 0, 0, 0, 1, 0, 0, 0, 1))
    array = np.arange(64, dtype=np.float32).reshape(4, 4, 4)
    moved = brought_onto(array, here, replace(here, origin_mm=(1.0, 0.0, 0.0)), -1.0)

    assert np.array_equal(moved[:, :, :3], array[:, :, 1:])
    assert (moved[:, :, 3] == -1).all()
    # A micrometre is rounding; a tenth of a millimetre is another grid.
    assert here.is_like(replace(here, origin_mm=(0.001, 0, 0)))
    assert not here.is_like(replace(here, origin_mm=(0.1, 0, 0)))


def test_label_maps_give_positions_in_the_cropped_box(tmp_path):
    places = locations_of_labels(rows_of(write_dataset(tmp_path)), 1)
    # Three cases, two channels, two structures.
    assert len(places) == 3 * 2 * 2

    cube = [p for p in places if p.structure == "Dataset700: cube, T1"]
    assert len({p.subject for p in cube}) == 3
    # Centre (8, 12, 6); 2 of 20 slices are cropped away in front.
    assert cube[0].centre == pytest.approx(((8.5 - 2) / 18, 12.5 / 24, 6.5 / 22))

    flair = next(p for p in places if p.structure == "Dataset700: cube, FLAIR")
    assert flair.centre[0] == pytest.approx((8.5 - 3) / 17)


def test_each_part_of_a_structure_has_its_centre_and_specks_have_none():
    # Two cubes of 27 and 125 voxels and a single voxel, as a label map of both kidneys has them.
    mask = np.zeros((20, 20, 20), bool)
    mask[2:5, 2:5, 2:5] = True
    mask[10:15, 10:15, 10:15] = True
    mask[18, 18, 18] = True

    assert part_centres(mask) == [(12, 12, 12), (3, 3, 3)]

    # A structure that is nothing but a speck still has a place.
    speck = np.zeros((5, 5, 5), bool)
    speck[1, 2, 3] = True

    assert part_centres(speck) == [(1, 2, 3)]


def test_a_label_map_of_another_size_is_left_out_with_its_reason(tmp_path, caplog):
    folder = write_dataset(tmp_path, num_cases=2)
    write_image(folder / "labelsTr" / "case1.nii.gz", np.ones((5, 5, 5), np.uint8))
    rows = rows_of(folder)

    places = locations_of_labels(rows, 1)

    names = {row.id: row.name for row in rows}
    assert places
    assert all(names[place.scan].startswith("Dataset700_Two/case0") for place in places)

    left_out = next(row.id for row in rows if row.name == "Dataset700_Two/case1_0000")

    assert f"the label map of {left_out} is left out" in caplog.text
    assert "(5, 5, 5) voxels" in caplog.text


def test_boxes_give_their_middle_and_slices_make_one_box(tmp_path, caplog):
    rows = rows_of(write_dataset(tmp_path, ("MRI",)))
    whole = tmp_path / "boxes.csv"
    slices = tmp_path / "slices.csv"
    whole.write_text(
        "scan,class,zmin,ymin,xmin,zmax,ymax,xmax\n"
        "case0,lesion,7,11,5,9,13,7\n"
        "nobody,lesion,0,0,0,1,1,1\n",
    )
    slices.write_text(
        "series,z_index,class,xmin,ymin,xmax,ymax\n"
        + "".join(f"case0,{z},lesion,5,11,7,13\n" for z in (7, 8, 9)),
    )

    (place,) = locations_of_boxes(read_boxes(whole), rows)

    assert place.structure == "lesion, MRI"
    # As for the cube in the label maps: middles of voxels, in shares of the cropped scan.
    assert place.centre == pytest.approx((6.5 / 18, 12.5 / 24, 6.5 / 22))
    assert locations_of_boxes(read_boxes(slices), rows) == [place]
    assert logged(caplog, "--boxes", "1 of 2")


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("scan,class,zmin,ymin,xmin,zmax,ymax\n", "boxes-missing-column", "'xmax'"),
        (
            "scan,class,zmin,ymin,xmin,zmax,ymax,xmax\na,b,1,2,3,0,5,6\n",
            "boxes-reversed",
            "line 2",
        ),
        (
            "scan,class,zmin,ymin,xmin,zmax,ymax,xmax\na,b,one,2,3,0,5,6\n",
            "boxes-number",
            "line 2",
        ),
    ],
)
def test_wrong_boxes_are_refused_by_line(tmp_path, text, code, value):
    path = tmp_path / "boxes.csv"
    path.write_text(text)

    with refused(UsageError, code, path, value):
        read_boxes(path)


def test_a_class_of_the_manifest_lies_in_the_middle_of_its_scan(tmp_path):
    rows = [replace(row, label_class="benign") for row in rows_of(write_dataset(tmp_path))[:1]]

    (place,) = locations_of_classes(rows)

    assert (place.structure, place.centre, place.scan) == ("benign", (0.5, 0.5, 0.5), rows[0].id)


def test_words_of_sequences_are_weights_and_wrong_ones_are_refused():
    assert parse_kinds(["spatial", "contrast=0.5"]) == {"spatial": 1.0, "contrast": 0.5}

    for word, code, value in (
        ("contrst", "request-unknown-kind", "'contrast'"),
        ("contrast=x", "request-kind-weight", "'x'"),
        ("contrast=0", "request-kind-weight", "contrast=0"),
    ):
        with refused(UsageError, code, value):
            parse_kinds([word])
    with refused(UsageError, "request-repeated-kind", "'spatial'"):
        parse_kinds(["spatial", "spatial=2"])


def stored_material(folder, plan, rows, store, validation=()):
    keys = store.ensure([*rows, *validation], (1.0, 1.0, 1.0), None, 1)
    return make_sampling_pools(
        folder,
        plan,
        store,
        {i: store.open(key) for i, key in keys.items()},
        rows,
        list(validation),
        1,
    )


def test_one_dataset_stays_spatial_unless_other_kinds_are_requested(tmp_path):
    rows = rows_of(write_dataset(tmp_path))
    request = Request("t", folders=("x",))
    alone = plan_with_sequences(tmp_path, make_plan(), request, rows, rows, 1)

    assert alone.sequence.weights == {"spatial": 1.0}
    assert not (tmp_path / "places.json").exists()

    wanted = replace(request, sequences=("contrast", "semantic=0.5"))
    asked = check(plan_with_sequences(tmp_path, make_plan(), wanted, rows, rows, 1))

    sequence = asked.sequence
    assert sequence.weights == {"contrast": 1.0, "semantic": 0.5}
    assert sequence.contrasts == ("T1w", "FLAIR")
    # Two contrasts, and the three subjects that there are.
    assert (sequence.contrast_members, sequence.semantic_members) == (2, 3)
    assert num_codes(asked) == 5
    reason = "4 of 4 structures are known in at least 3 subjects, from label maps"
    assert reason in asked.reasons["sequence.semantic_members"]


def test_several_datasets_get_all_kinds_of_sequences_that_they_allow(tmp_path):
    rows = rows_of(write_dataset(tmp_path), write_dataset(tmp_path, ("CT",), name="Dataset701_One"))
    plan = plan_with_sequences(tmp_path, make_plan(), Request("t", folders=("x",)), rows, rows, 1)
    assert plan.sequence.weights == {"spatial": 1.0, "contrast": 0.5, "semantic": 0.5}
    assert "3 subjects have the contrasts T1w, FLAIR" in plan.reasons["sequence.weights"]


def test_contrast_sequences_of_scans_without_contrasts_are_refused(tmp_path):
    rows = rows_of(write_dataset(tmp_path, ("MRI",)))

    with refused(UsageError, "sequences-no-contrasts", "contrast", "--manifest"):
        plan_sequences(make_plan(), {"contrast": 1.0}, available_kinds(rows, [], ""))


def test_structures_in_too_few_subjects_are_refused(tmp_path):
    rows = rows_of(write_dataset(tmp_path, num_cases=1))
    request = Request("t", folders=("x",), sequences=("semantic",))

    with refused(UsageError, "sequences-no-structures", "label maps", "1 training subjects"):
        plan_with_sequences(tmp_path, make_plan(), request, rows, rows, 1)
    with refused(UsageError, "sequences-no-structures", "semantic", "1 training subjects"):
        plan_sequences(make_plan(), {"semantic": 1.0}, available_kinds(rows, [], ""))


def test_a_crop_for_strided_sequences_is_cut_to_whole_sub_volumes(tmp_path):
    rows = rows_of(write_dataset(tmp_path, ("MRI",)))
    strided = {"strided": 1.0}
    plan = plan_sequences(
        make_plan(crop_size_vox=(40, 16, 16)),
        strided,
        available_kinds(rows, [], ""),
    )

    # Four sub-volumes of one token of 8 slices each.
    assert check(plan).sequence.crop_size_vox == (32, 16, 16)
    assert "32 along z for 4 sub-volumes" in plan.reasons["sequence.crop_size_vox"]


def test_semantic_crops_show_the_labelled_structure_in_every_patient(tmp_path, store):
    folder = write_dataset(tmp_path, ("MRI",))
    # The cube is brighter than all else, so a crop shows whether it holds the cube.
    for case in range(3):
        array = noise(case) / 100
        array[7:10, 11:14, 5:8] = 1e4
        write_image(folder / "imagesTr" / f"case{case}_0000.nii.gz", array)
    rows = rows_of(folder)
    request = Request("t", folders=("x",), sequences=("semantic",))
    small = make_plan(member_crop_vox=(16, 16, 16))
    plan = check(plan_with_sequences(tmp_path, small, request, rows, rows, 1))
    training, _ = stored_material(tmp_path, plan, rows, store)
    sampler = SequenceSampler(plan)

    num_cubes = 0
    for number in range(6):
        sample, shown = sampler.draw_kind("semantic", training, rng.generator(0, "x", number))
        if shown.subject.startswith("Dataset700: cube"):
            num_cubes += 1
            assert all(member.max() > 5 for member in sample.voxels)
        assert len(set(shown.names)) == 3

    assert num_cubes > 0


def test_too_few_scans_leave_a_kind_unmeasured_or_end_the_run(tmp_path, store, caplog):
    caplog.set_level("INFO")
    rows = rows_of(write_dataset(tmp_path))
    request = Request("t", folders=("x",), sequences=("spatial", "semantic"))
    plan = plan_with_sequences(tmp_path, make_plan(), request, rows[:4], rows, 1)
    training, validation = stored_material(tmp_path, plan, rows[:4], store, rows[4:])
    # Two subjects train; the third has one scan per channel, too few for a sequence over subjects.
    assert len(training.structures) == 4
    assert validation.num_sources("semantic") == 0
    assert validation.num_sources("spatial") == 2
    assert "validation scans are too few for semantic sequences" in caplog.text
    greedy = replace(plan, sequence=replace(plan.sequence, semantic_members=3))

    with refused(AutoregError, "sequences-impossible", "semantic", "3 subjects", "--name"):
        stored_material(tmp_path, greedy, rows[:4], store, rows[4:])


def test_without_labels_similar_places_of_other_patients_are_found(tmp_path, store):
    # One pattern of 16 voxels at the same place in four scans, above noise that differs.
    pattern = np.kron(np.random.default_rng(5).normal(size=(4, 4, 4)), np.ones((4, 4, 4))) * 3000
    for case in range(4):
        array = noise(case, (24, 24, 24))
        array[4:20, 4:20, 4:20] += pattern
        write_image(tmp_path / "plain" / f"scan{case}.nii.gz", array.astype(np.float32))
    rows = rows_of(tmp_path / "plain")
    keys = store.ensure(rows, (1.0, 1.0, 1.0), None, 1)
    cases = {row.id: store.open(keys[row.id]) for row in rows}

    places = places_alike(rows, cases, (16, 16, 16), 3)

    structures = {p.structure for p in places}
    assert structures

    distances = []
    for name in structures:
        centres = [p.centre for p in places if p.structure == name]
        assert len({p.subject for p in places if p.structure == name}) == 3
        for p, q in product(centres, repeat=2):
            distances.append(np.abs(np.subtract(p, q)).max())

    # Places that are alike lie at the same place, up to a seventh of the scan.
    assert np.median(distances) < 0.15
    assert places == places_alike(rows, cases, (16, 16, 16), 3)


def test_a_continued_run_takes_the_places_it_was_planned_with(tmp_path, store):
    folder = write_dataset(tmp_path, ("MRI",))
    rows = rows_of(folder)
    plan = plan_with_sequences(
        tmp_path,
        make_plan(),
        Request("t", folders=("x",), sequences=("semantic",)),
        rows,
        rows,
        1,
    )
    # Label maps that are gone, or were changed, must not change a run that has begun.
    for label in (folder / "labelsTr").iterdir():
        label.unlink()

    training, _ = stored_material(tmp_path, plan, rows, store)

    assert {s.name for s in training.structures} == {
        "Dataset700: cube, MRI",
        "Dataset700: other, MRI",
    }


def test_the_picture_shows_sequences_of_every_kind(tmp_path, store):
    rows = rows_of(write_dataset(tmp_path))
    request = Request("t", folders=("x",), sequences=("spatial", "strided", "contrast", "semantic"))
    plan = plan_with_sequences(
        tmp_path,
        make_plan(crop_size_vox=(32, 24, 16)),
        request,
        rows,
        rows,
        1,
    )
    picture = draw_preview(tmp_path, check(plan), rows, store, 1)

    image = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(picture)))

    assert picture.name == "sequences.png"
    assert image.shape[0] > 1500
    assert len(np.unique(image[..., 0])) > 100


@pytest.mark.parametrize(
    ("objective", "changes", "at_once"),
    [
        ("autoregressive", {}, False),
        ("masked", {"prefix": "fixed", "order": "random"}, True),
        ("autoregressive", {"predictor": "network", "order": "random"}, True),
    ],
)
def test_the_picture_says_whether_blocks_are_predicted_one_after_another(
    objective,
    changes,
    at_once,
):
    plan = replace(make_plan(**changes), objective=PredictionPlan(objective))

    assert plan.sequence.is_at_once is at_once
    assert ("in the order of the numbers" in use_of_blocks(plan)) is not at_once


def test_the_picture_of_alice_speaks_of_student_and_teacher():
    text = use_of_blocks(with_objective(make_plan(), "alice"))

    assert "student" in text
    assert "teacher" in text


def test_groups_and_members_survive_pickling_for_loader_processes(tmp_path, store):
    rows = rows_of(write_dataset(tmp_path))
    request = Request("t", folders=("x",), sequences=("contrast",))
    plan = plan_with_sequences(tmp_path, make_plan(), request, rows, rows, 1)
    training, _ = stored_material(tmp_path, plan, rows, store)
    copied = pickle.loads(pickle.dumps(training))

    first = SequenceSampler(plan).draw(training, "training", 3, 1)
    second = SequenceSampler(plan).draw(copied, "training", 3, 1)

    assert np.array_equal(first.voxels, second.voxels)


SALTS = ("pepper", "sugar", "vinegar")


def test_another_salt_holds_out_the_same_dicom_series(tmp_path):
    # Another folder of preprocessed data meant another split: salted hashes decided which scans
    # are held out.
    for number in range(8):
        series = f"1.2.3.{number}"
        patient = f"P{number}"
        voxels = volume(seed=number)
        write_series(tmp_path / "d" / patient, voxels, series=series, t00100020=("LO", patient))

    by_salt = set()
    by_salt_before = set()
    for salt in SALTS:
        rows = rows_of(tmp_path / "d", salt=salt)
        for found, salt_free in ((by_salt, True), (by_salt_before, False)):
            _, validation = split(rows, 0.3, 0, salt_free)
            found.add(tuple(row.source for row in validation))

    assert len(rows) == 8
    assert len(by_salt) == 1
    # 0.3 of 8.
    assert len(by_salt.pop()) == 2
    # Runs that were planned before continue with the split that they began with.
    assert len(by_salt_before) > 1


def test_another_salt_takes_the_same_of_two_equal_contrasts(tmp_path):
    for subject in range(4):
        for number, name in enumerate(("run-1_T1w", "run-2_T1w", "T2w")):
            image = tmp_path / "b" / f"sub-{subject}_{name}.nii.gz"
            write_image(image, noise(10 * subject + number))

    by_salt = set()
    by_salt_before = set()
    for salt in SALTS:
        rows = rows_of(tmp_path / "b", salt=salt)
        for found, salt_free in ((by_salt, True), (by_salt_before, False)):
            groups = contrast_groups(rows, salt_free)
            found.add(tuple(row.source for group in groups for row in group.rows))

    assert len(groups) == 4
    assert len(by_salt) == 1
    assert len(by_salt_before) > 1


def test_the_names_of_patients_do_not_decide_which_of_them_are_drawn():
    plan = make_plan(semantic_members=3)
    renewed = replace(plan, data=replace(plan.data, salt_free=True))

    def drawn(plan, names):
        places = tuple(StoredLocation(name, number, (0, 0, 0)) for number, name in enumerate(names))
        structure = Structure("kidney", (1.0, 1.0, 1.0), places)
        chosen = choose_locations(plan, structure, np.random.default_rng(5))
        return [place.case for place in chosen]

    names, others = "abcdef", "fbdace"

    # The same places in the order of the index, under other names.
    assert drawn(renewed, names) == drawn(renewed, others) == drawn(plan, names)
    # A run that was planned before draws by the order of the names.
    in_order = [others.index(names[number]) for number in drawn(plan, names)]
    assert drawn(plan, others) == in_order != drawn(plan, names)


def test_a_new_plan_draws_without_salt_and_an_earlier_one_as_it_began():
    planned = plan_for("primus_tiny", (32, 32, 32))
    earlier = to_jsonable(planned)
    del earlier["data"]["salt_free"]

    assert planned.data.salt_free
    assert not from_jsonable(Plan, earlier, "plan.json").data.salt_free
