"""Blocks, ranks, crops and batches."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from refusals import refused
from sequence_cases import (
    WORDS,
    Ramp,
    contrast_material,
    contrast_plan,
    make_plan,
    semantic_material,
    semantic_plan,
)

from nnunet_autoreg import rng
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.plan import DataPlan, EncoderPlan
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.data import StepBatches, training_batches, validation_batches
from nnunet_autoreg.pretrain.preprocessing import split
from nnunet_autoreg.sampling import spatial, strided
from nnunet_autoreg.sampling.blocks import (
    block_ids,
    draw_order_index,
    draw_prefix,
    sequence_ids,
    window_positions,
)
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose
from nnunet_autoreg.sampling.kinds import (
    AvailableKinds,
    choose_members,
    member_crop,
    num_blocks,
    plan_weights,
)
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sampler import TRAINING, VALIDATION, SequenceSampler


def test_block_ids_go_in_raster_order_of_blocks():
    assert block_ids((1, 2, 3), (1, 1, 1)).tolist() == [0, 1, 2, 3, 4, 5]
    assert block_ids((1, 2, 4), (1, 2, 2)).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert block_ids((2, 2, 2), (1, 2, 2)).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_random_ranks_permute_blocks_and_keep_tokens_together():
    ids = block_ids((2, 2, 4), (1, 1, 2))
    order_index = draw_order_index(ids, "random", rng.generator(0, "x"))

    assert sorted(set(order_index.tolist())) == list(range(8))
    assert all(len(set(order_index[ids == block])) == 1 for block in range(8))
    assert draw_order_index(ids, "raster", rng.generator(0, "x")).tolist() == ids.tolist()


def test_prefixes_cover_1_to_one_less_than_the_blocks_evenly():
    generator = rng.generator(0, "prefix")
    sequence = make_plan().sequence
    counts = np.bincount([draw_prefix(5, generator, sequence) for _ in range(4000)], minlength=6)

    # 1000 for each of 1 to 4, with a standard deviation of 27.
    assert counts[0] == counts[5] == 0
    assert counts[1:5].min() > 900


def test_a_draw_replays_to_the_same_sample():
    plan = make_plan()
    case = Ramp((20, 30, 20))
    drawn = spatial.draw(plan, case.shape_vox, rng.generator(0, "x"))
    first = spatial.apply(plan, case, drawn)
    again = spatial.apply(plan, case, drawn)

    assert np.array_equal(first.voxels, again.voxels)
    assert first.flip_transpose == again.flip_transpose == drawn.flip_transpose

    unchanged = replace(drawn, flip_transpose=FlipTranspose())
    along_z_and_x = replace(drawn, flip_transpose=FlipTranspose((True, False, True)))

    plain = spatial.apply(plan, case, unchanged)
    flipped = spatial.apply(plan, case, along_z_and_x).augmented()

    assert np.array_equal(flipped.voxels[0, 0], plain.voxels[0, 0, ::-1, :, ::-1])

    # A case of 10 slices in the middle of a crop of 16; its voxels are larger than 0.
    along_z = FlipTranspose((True, False, False))
    beyond = replace(drawn, start=(-3, 0, 0), flip_transpose=along_z)

    small = spatial.apply(plan, Ramp((10, 30, 20)), beyond).augmented()

    assert small.valid_mask[0, :, 0, 0].tolist() == [False] * 3 + [True] * 10 + [False] * 3
    assert np.array_equal(small.valid_mask[0], small.voxels[0, 0] > 0)


def test_crops_stay_inside_large_cases_and_small_cases_stay_inside_crops():
    plan = make_plan()
    for number in range(50):
        # The crop has 16 x 24 x 16 voxels: room along z, none along y, and 7 voxels too few along
        # x.
        drawn = spatial.draw(plan, (40, 24, 9), rng.generator(0, "x", number))
        assert 0 <= drawn.start[0] <= 24
        assert drawn.start[1] == 0
        assert -7 <= drawn.start[2] <= 0


def axes_drawn(plan):
    """Return the orders of the axes that occur in 60 draws."""
    draws = [spatial.draw(plan, (40, 40, 40), rng.generator(0, "x", i)) for i in range(60)]
    return {drawn.flip_transpose.axes for drawn in draws}


def test_axes_swap_only_if_length_and_spacing_are_equal():
    # The crop has 16 x 24 x 16 voxels, so z and x can be swapped.
    anisotropic = replace(make_plan(), data=DataPlan((3.0, 1.0, 1.0)))

    assert axes_drawn(make_plan()) == {(0, 1, 2), (2, 1, 0)}
    assert axes_drawn(anisotropic) == {(0, 1, 2)}


def test_samples_depend_on_seed_step_and_number_only():
    sampler = SequenceSampler(make_plan())
    cases = [Ramp((30, 30, 30)), Ramp((16, 40, 20))]

    one, same, other = (sampler.draw(cases, TRAINING, step, 0) for step in (3, 3, 4))

    assert np.array_equal(one.voxels, same.voxels)
    assert one.prefix == same.prefix
    assert not np.array_equal(one.voxels, other.voxels)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_number_of_workers_changes_no_batch(num_workers):
    batches = StepBatches(
        SequenceSampler(make_plan()),
        [Ramp((30, 30, 30)), Ramp((16, 40, 20))],
        range(2),
    )
    prepared = list(training_batches(batches, range(2, 6), num_workers, pin_memory=False))

    assert len(prepared) == 4
    for step, batch in zip(range(2, 6), prepared, strict=True):
        assert batch.voxels.equal(batches[step].voxels)
        assert batch.prefix.equal(batches[step].prefix)
        assert batch.flip_transposes == batches[step].flip_transposes


def test_validation_samples_take_the_same_four_prefixes_every_time():
    plan = make_plan()
    assert num_blocks(plan) == 12
    cases = [Ramp((30, 30, 30))]

    batches = [validation_batches(SequenceSampler(plan), cases, 4, 1) for _ in range(2)]
    first, second = (by_kind["spatial"][0] for by_kind in batches)

    # One block, and then a quarter, a half and three quarters of twelve.
    assert first.prefix.tolist() == second.prefix.tolist() == [1, 3, 6, 9]
    assert SequenceSampler(plan).draw([Ramp((30, 30, 30))], VALIDATION, 4).prefix == 1


@dataclass(frozen=True)
class Row:
    id: str
    dataset: str
    case: str
    subject: str = ""


def test_channels_of_a_case_are_split_together_and_stay_so():
    rows = []
    for case in range(40):
        rows += [Row(f"{case}_{channel}", "D", f"case{case}") for channel in range(4)]

    training, validation = split(rows, 0.1, 0)

    # A tenth of 40 cases, with four channels each.
    assert len(validation) == 16
    assert len({row.case for row in validation}) == 4
    assert not {row.case for row in training} & {row.case for row in validation}
    # A single case is needed for training.
    assert split(rows[:4], 0.05, 0) == (rows[:4], [])


def test_scans_of_a_subject_are_held_out_together_for_any_hash():
    ways = []
    for salt in ("x", "y"):
        rows = []
        for case in range(80):
            subject = f"{salt}{case // 4}"
            rows.append(Row(f"{case}", f"D{case % 2}", f"case{case}", subject))

        training, validation = split(rows, 0.1, 0)

        # Two of 20 subjects, with four scans each.
        assert len(validation) == 8
        assert not {row.subject for row in training} & {row.subject for row in validation}
        ways.append([row.id for row in validation])

    assert ways[0] == ways[1]


def test_interleaved_order_takes_two_tokens_of_each_sub_volume_in_turn():
    """128^3 as four sub-volumes of 32 slices, tokens of 16: two tokens of each along z."""
    # For each of 8 x 8 x 8 tokens the sub-volume in which it lies.
    of_sub_volume = np.arange(8 * 8 * 8) // 64 // 2
    interleaved = sequence_ids((8, 8, 8), (1, 1, 1), 1, "interleaved")
    raster = sequence_ids((8, 8, 8), (1, 1, 1), 1, "raster")

    assert of_sub_volume[np.argsort(interleaved)][:8].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert set(of_sub_volume[np.argsort(raster)][:128].tolist()) == {0}


def test_interleaved_members_alternate_at_each_place_of_the_plane():
    ids = sequence_ids((1, 2, 2), (1, 1, 1), 2, "interleaved")

    # (y, x) of one member: 0 1 / 2 3; x is the slowest, then y, then the member.
    assert ids.tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert sequence_ids((1, 2, 2), (1, 1, 1), 2, "raster").tolist() == list(range(8))
    assert sequence_ids((2, 1, 1), (2, 1, 1), 2, "interleaved").tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(("stride", "expected"), [(8, 0.5625), (32, 0.0)])
def test_a_stride_of_8_repeats_56_percent_of_the_voxels(stride, expected):
    sequence = {
        "crop_size_vox": (128, 32, 16),
        "order": "interleaved",
        "weights": {"strided": 1.0},
        "stride_vox": stride,
    }
    plan = replace(make_plan(**sequence), encoder=EncoderPlan("x", "y", {}, (16, 16, 16)))
    order_index = sequence_ids((8, 2, 1), (1, 1, 1), 1, "interleaved")

    seen = strided.seen_before(plan, order_index)

    assert seen.mean() == expected

    # Of the first token of each later sub-volume all was seen, of the second a half; the first two
    # tokens are new. (1 + 0.5) * 3 / 8 = 0.5625, and 32 + 3 * 8 = 56 slices are read.
    if stride == 8:
        shares = [float(seen[16 * i : 16 * i + 16].mean()) for i in range(8)]
        assert shares == [0, 0, 1, 0.5, 1, 0.5, 1, 0.5]
        assert len(set(strided.source_slices(plan).tolist())) == 56


def test_strided_samples_repeat_slices_and_can_leave_them_unscored():
    plan = make_plan(
        crop_size_vox=(32, 16, 16),
        weights={"strided": 1.0},
        num_subvolumes=2,
        stride_vox=8,
        mask_seen=True,
        flip=False,
        swap_axes=False,
    )
    sample = SequenceSampler(plan).draw([Ramp((24, 16, 16))], TRAINING, 0, 0)

    # Sub-volumes are slices 0 to 15 and 8 to 23: the third quarter of the crop repeats the second.
    assert strided.stretch(plan) == (24, 16, 16)
    assert np.array_equal(sample.voxels[0, 0, 16:24], sample.voxels[0, 0, 8:16])
    assert sample.loss_mask[0, :16].all()
    assert not sample.loss_mask[0, 16:24].any()
    assert sample.loss_mask[0, 24:].all()

    unmasked = replace(plan, sequence=replace(plan.sequence, mask_seen=False))
    plain = SequenceSampler(unmasked).draw([Ramp((24, 16, 16))], TRAINING, 0, 0)

    assert plain.loss_mask is None
    assert np.array_equal(plain.voxels, sample.voxels)


def test_contrasts_come_from_one_box_of_voxels_in_the_fixed_order():
    plan = contrast_plan()
    pool = contrast_material()
    for number in range(10):
        sample = SequenceSampler(plan).draw(pool, TRAINING, number, 0)
        assert sample.voxels.shape[0] == 4
        # Members of the test's material differ by 100,000 each.
        first = sample.voxels[0, 0]
        for member in range(1, 4):
            difference = np.full(first.shape, 1e5 * member, np.float32)
            assert np.array_equal(sample.voxels[member, 0] - first, difference)
        assert sample.members.reshape(4, -1)[:, 0].tolist() == [0, 1, 2, 3]
        tokens = len(sample.order_index) // 4
        assert np.array_equal(sample.positions[:tokens], sample.positions[tokens : 2 * tokens])


def test_a_contrast_keeps_its_code_if_only_some_are_taken():
    plan = contrast_plan(contrast_members=2, order="random", predictor="query")
    found = set()
    for number in range(40):
        sample = SequenceSampler(plan).draw(contrast_material(1), TRAINING, number, 0)
        codes = sample.members.reshape(2, -1)[:, 0]
        difference = float(sample.voxels[1].max() - sample.voxels[0].max())
        assert difference == pytest.approx(1e5 * (codes[1] - codes[0]))
        found.add(tuple(codes.tolist()))

    # All six pairs of four contrasts.
    assert found == {(a, b) for a in range(4) for b in range(a + 1, 4)}


def test_a_semantic_sequence_shows_one_structure_in_four_patients():
    plan = semantic_plan()
    structures = set()
    sampler = SequenceSampler(plan)
    for number in range(20):
        generator = rng.generator(0, "x", number)
        sample, shown = sampler.draw_kind("semantic", semantic_material(), generator)
        # Patients differ by a million, and cases of the liver by another half.
        assert len(set(shown.names)) == len({case.by for case in shown.cases}) == 4
        offset = 0.0 if shown.subject == "kidney" else 5e5
        assert {case.by % 1e6 for case in shown.cases} == {offset}
        assert sample.members.reshape(4, -1)[:, 0].tolist() == [0, 1, 2, 3]
        structures.add(shown.subject)

    assert structures == {"kidney", "liver"}


def test_a_structure_lies_within_an_eighth_of_the_crop_from_its_middle():
    plan = semantic_plan()
    size = np.array(member_crop(plan, "semantic"))

    assert (size % 8 == 0).all()

    moved = []
    sampler = SequenceSampler(plan)
    for number in range(50):
        generator = rng.generator(0, "x", number)
        _, shown = sampler.draw_kind("semantic", semantic_material(), generator)
        # Structures of the material lie at (20, 10, 30).
        for start in shown.drawn.starts:
            moved.append(np.array(start) + (size - 1) / 2 - (20, 10, 30))

    # Starts are whole voxels, middles are not: half a voxel of rounding.
    assert (np.abs(moved) <= size / 8 + 0.5).all()
    assert np.abs(moved).max() > 1


def test_members_together_hold_no_more_tokens_than_one_crop():
    # 5 x 7 x 5 tokens and four members: 3 x 4 x 3 each is the largest box of like proportions.
    plan = semantic_plan(crop_size_vox=(40, 56, 40))

    assert member_crop(plan, "semantic") == (24, 32, 24)
    # 3 * 4 * 3 * 4 = 144 tokens of 5 * 7 * 5 = 175.
    assert num_blocks(plan, "semantic") == 144 <= num_blocks(plan) == 175
    assert member_crop(semantic_plan(member_crop_vox=(8, 32, 32)), "semantic") == (8, 32, 32)
    assert member_crop(plan, "spatial") == (40, 56, 40)


def test_positions_are_a_window_of_the_grid_anywhere_in_it():
    # Tokens (2, 1..2, 3..4) of a grid of 3 x 4 x 5.
    assert window_positions((3, 4, 5), (1, 2, 2), (2, 1, 3)).tolist() == [
        2 * 20 + 5 + 3,
        2 * 20 + 5 + 4,
        2 * 20 + 10 + 3,
        2 * 20 + 10 + 4,
    ]

    sampler = SequenceSampler(contrast_plan())
    windows = set()
    for number in range(60):
        windows.add(sampler.draw(contrast_material(), TRAINING, number, 0).positions[0])

    assert len(windows) > 3


def test_a_batch_holds_one_kind_and_kinds_follow_their_weights():
    both = SamplingPool((Ramp((30, 30, 30)),), contrast_material().groups)
    plan = contrast_plan(weights={"spatial": 3.0, "contrast": 1.0})
    sampler = SequenceSampler(plan)

    kinds = [sampler.kind(both, TRAINING, step) for step in range(2000)]

    # A quarter of the weight; 0.03 are three standard deviations of 2000 draws.
    assert kinds.count("contrast") / 2000 == pytest.approx(0.25, abs=0.03)

    batches = StepBatches(sampler, both, range(3))

    for step in range(6):
        assert batches[step].voxels.shape[1] == (4 if kinds[step] == "contrast" else 1)
    assert [sampler.kind(both, TRAINING, step) for step in range(20)] == kinds[:20]


def test_validation_batches_hold_every_kind_with_all_four_prefixes():
    both = SamplingPool((Ramp((30, 30, 30)),), contrast_material().groups)
    plan = contrast_plan(weights={"spatial": 1.0, "contrast": 1.0})

    by_kind = validation_batches(SequenceSampler(plan), both, 4, 2)

    batches = [batch for batches in by_kind.values() for batch in batches]
    assert list(by_kind) == ["spatial", "contrast"]
    assert [batch.voxels.shape[1] for batch in batches] == [1, 4]
    assert [len(set(batch.prefix.tolist())) for batch in batches] == [4, 4]
    of_cases = validation_batches(SequenceSampler(plan), SamplingPool(both.cases), 4, 2)
    assert [(kind, len(batches)) for kind, batches in of_cases.items()] == [("spatial", 2)]


def test_samples_of_one_dataset_do_not_depend_on_other_kinds():
    plan = make_plan()
    cases = [Ramp((30, 30, 30)), Ramp((16, 40, 20))]
    sample = SequenceSampler(plan).draw(cases, TRAINING, 3, 1)
    # Written down before there were other kinds.
    generator = rng.generator(7, TRAINING, 3, 1)
    case = cases[int(generator.integers(2))]

    drawn = spatial.draw(plan, case.shape_vox, generator)

    assert np.array_equal(sample.voxels, spatial.apply(plan, case, drawn).voxels)
    assert sample.prefix == drawn.prefix
    assert sample.positions is sample.members is sample.loss_mask is None


def test_one_input_stays_spatial_and_several_get_available_kinds():
    structures = {"liver": 5, "lesion": 2}
    one_input = AvailableKinds(1, 9, WORDS, 3, 0, structures, "label maps")
    two_inputs = AvailableKinds(2, 9, WORDS, 3, 0, structures, "label maps")

    assert plan_weights(one_input)[0] == {"spatial": 1.0}

    weights, why = plan_weights(two_inputs)

    assert weights == {"spatial": 1.0, "contrast": 0.5, "semantic": 0.5}
    assert "3 subjects have the contrasts T1w, T1w-ce, T2w, FLAIR" in why
    assert "2 structures" in why
    assert "positions only" in why
    assert plan_weights(AvailableKinds(2, 9))[0] == {"spatial": 1.0}


def test_a_semantic_sequence_has_as_many_members_as_there_are_subjects():
    # Four are wanted. The liver is known in five subjects, or in three; without labels all count.
    many = AvailableKinds(2, 9, structures={"liver": 5, "lesion": 2}, num_subjects=9)
    few = AvailableKinds(2, 9, structures={"liver": 3, "lesion": 2}, num_subjects=9)

    assert choose_members(many, 4) == 4
    assert choose_members(few, 4) == 3
    assert choose_members(AvailableKinds(2, 9, num_subjects=9), 4) == 4
    assert choose_members(AvailableKinds(2, 3, num_subjects=3), 4) == 3


@pytest.mark.parametrize(
    ("sequence", "code", "values"),
    [
        ({"weights": {"spacial": 1.0}}, "plan-unknown-kind", ["'spatial'"]),
        ({"weights": {"spatial": -1.0}}, "plan-out-of-range", ["sequence.weights.spatial=-1.0"]),
        ({"weights": {"spatial": 0.0}}, "plan-no-kinds", ["sequence.weights"]),
        ({"weights": {"contrast": 1.0}}, "plan-members", ["contrast_members=0"]),
        (
            {"weights": {"contrast": 1.0}, "contrasts": WORDS, "contrast_members": 2},
            "plan-ill-posed",
            ["contrast_members=2", "sequence.predictor=query"],
        ),
        (
            {"weights": {"semantic": 1.0}, "semantic_members": 1},
            "plan-members",
            ["semantic_members=1"],
        ),
        (
            {"weights": {"semantic": 1.0}, "member_crop_vox": (12, 16, 16)},
            "plan-members",
            ["12 on axis z", "multiple of 8"],
        ),
        ({"weights": {"strided": 1.0}}, "plan-strided", ["multiple of 32"]),
        (
            {"weights": {"strided": 1.0}, "crop_size_vox": (32, 16, 16), "stride_vox": 9},
            "plan-strided",
            ["stride_vox=9", "depth of 8"],
        ),
        ({"order": "random"}, "plan-ill-posed", ["sequence.predictor=query"]),
        ({"order": "interleafed"}, "plan-unknown-name", ["'interleaved'"]),
    ],
)
def test_ill_posed_and_impossible_sequences_are_refused(sequence, code, values):
    with refused(PlanError, code, *values):
        check(make_plan(**sequence))
