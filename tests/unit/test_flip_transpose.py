"""Flips and axis swaps travel with a sample and are carried out where it is used: every bit as if
they had been done where it was read.
"""

from dataclasses import fields, replace
from itertools import permutations, product

import numpy as np
import pytest
import torch
from sequence_cases import (
    Ramp,
    contrast_material,
    contrast_plan,
    make_plan,
    semantic_material,
    semantic_plan,
)

from nnunet_autoreg import rng
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.pretrain.data import (
    StepBatches,
    micro_batches,
    training_batches,
    validation_batches,
)
from nnunet_autoreg.pretrain.training_step import TrainingStep
from nnunet_autoreg.pretrain.validation import Validation
from nnunet_autoreg.report.preview import upright
from nnunet_autoreg.sampling import members, spatial, strided
from nnunet_autoreg.sampling.flip_transpose import UNCHANGED, FlipTranspose
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Batch, collate
from nnunet_autoreg.sampling.sampler import TRAINING, VALIDATION, SequenceSampler

CPU = torch.device("cpu")
FLIPS = tuple(product((False, True), repeat=3))
AXES = tuple(permutations(range(3)))
# All 48 symmetries of a cube: 2 x 2 x 2 flips times 6 orders of the axes.
FLIP_TRANSPOSES = [FlipTranspose(flips, axes) for flips in FLIPS for axes in AXES]


def by_hand(volume_ZYX, flip_transpose):
    """Voxel by voxel: along axis i of the result runs axis axes[i] of the crop, backwards where
    that axis is mirrored.
    """
    shape_ZYX = volume_ZYX.shape
    out = np.empty([shape_ZYX[axis] for axis in flip_transpose.axes], volume_ZYX.dtype)
    for place in np.ndindex(*out.shape):
        source = [0, 0, 0]
        for i, axis in enumerate(flip_transpose.axes):
            if flip_transpose.flips[axis]:
                source[axis] = shape_ZYX[axis] - 1 - place[i]
            else:
                source[axis] = place[i]
        out[place] = volume_ZYX[tuple(source)]
    return out


def plainly(voxels_MCZYX, real_MZYX, flip_transpose):
    """What the loaders did when they turned crops themselves: numpy's flip, then its transpose,
    image by image.
    """
    flipped = tuple(axis for axis, flip in enumerate(flip_transpose.flips) if flip)
    # Voxels have one axis more, of the channels.
    flipped_voxels = [axis + 1 for axis in flipped]
    axes = (0, *(axis + 1 for axis in flip_transpose.axes))
    voxels = [np.flip(v, flipped_voxels).transpose(axes) for v in voxels_MCZYX]
    valid_mask = [np.flip(r, flipped).transpose(flip_transpose.axes) for r in real_MZYX]
    return np.stack(voxels), np.stack(valid_mask)


def test_flips_and_swaps_act_alike_on_arrays_and_tensors():
    # Three different sides, so that a wrong order of the axes shows in the shape.
    volume = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    several = np.stack([volume, -volume])[:, None]

    assert len(FLIP_TRANSPOSES) == 48

    for flip_transpose in FLIP_TRANSPOSES:
        expected = by_hand(volume, flip_transpose)
        assert np.array_equal(flip_transpose.array(volume), expected)
        assert np.array_equal(flip_transpose.tensor(torch.from_numpy(volume)).numpy(), expected)

        # Leading axes, here of images and channels, stay where they are.
        expected_several = np.stack([expected, -expected])[:, None]
        turned = flip_transpose.tensor(torch.from_numpy(several))
        assert np.array_equal(flip_transpose.array(several), expected_several)
        assert np.array_equal(turned.numpy(), expected_several)
        assert flip_transpose.array(volume).flags.c_contiguous

    # x = 1 and z = 1, which comes first after the flip, over all y: 12 + 4 y + 1.
    turned = FlipTranspose((True, False, False), (2, 0, 1)).array(volume)
    assert turned[1, 0].tolist() == [13.0, 17.0, 21.0]


def check_turned(sample, voxels, valid_mask, before):
    """In numpy and in a batch, ``sample`` turns to exactly these arrays, ``before`` to its own;
    once only, and nothing else changes.
    """
    batch = collate([before, sample])
    augmented = batch.to(CPU)
    by_numpy = sample.augmented()

    assert np.array_equal(by_numpy.voxels, voxels)
    assert np.array_equal(by_numpy.valid_mask, valid_mask)
    assert by_numpy.flip_transpose == UNCHANGED
    assert np.array_equal(augmented.voxels[1].numpy(), voxels)
    assert np.array_equal(augmented.valid_mask[1].numpy(), valid_mask)
    assert np.array_equal(augmented.voxels[0].numpy(), before.augmented().voxels)
    assert augmented.voxels.dtype == torch.float32
    assert augmented.valid_mask.dtype == torch.bool
    assert augmented.voxels.is_contiguous()

    for f in fields(Batch):
        if f.name not in ("voxels", "valid_mask", "flip_transposes"):
            assert getattr(augmented, f.name) is getattr(batch, f.name)

    # The batch itself stays as it was read, and what is augmented is not augmented again.
    assert np.array_equal(batch.voxels[1].numpy(), sample.voxels)
    assert augmented.flip_transposes == ()
    assert augmented.to(CPU).voxels is augmented.voxels


@pytest.mark.parametrize("flip_transpose", FLIP_TRANSPOSES)
def test_spatial_crops_with_padding_are_turned_as_the_loaders_turned_them(flip_transpose):
    plan = make_plan(crop_size_vox=(16, 16, 16))
    drawn = spatial.draw(plan, (30, 30, 30), rng.generator(0, "x"))
    other_way = FlipTranspose((False, True, True), (1, 2, 0))
    other = spatial.apply(plan, Ramp((30, 30, 30)), replace(drawn, flip_transpose=other_way))
    # A scan smaller than the crop: a part of the crop is padding, and must travel with it.
    beyond = replace(drawn, start=(-3, -1, 4), flip_transpose=flip_transpose)
    sample = spatial.apply(plan, Ramp((10, 6, 30)), beyond)

    voxels, valid_mask = Ramp((10, 6, 30)).read_padded((-3, -1, 4), (16, 16, 16))

    assert 0 < valid_mask.mean() < 1

    check_turned(sample, *plainly(voxels[None], valid_mask[None], flip_transpose), before=other)


@pytest.mark.parametrize("flip_transpose", FLIP_TRANSPOSES)
def test_all_members_of_a_sequence_are_turned_alike(flip_transpose):
    plan = contrast_plan(member_crop_vox=(8, 8, 8))
    group = contrast_material(1).groups[0]
    cases = [case for _, case in group.members]
    drawn = members.draw_contrast(
        plan,
        cases[0].shape_vox,
        (1.0, 1.0, 1.0),
        range(4),
        rng.generator(0, "x"),
    )
    drawn = replace(drawn, starts=((-2, 5, 25),) * 4)
    other = members.apply(plan, "contrast", cases, replace(drawn, flip_transpose=UNCHANGED))

    read = [case.read_padded((-2, 5, 25), (8, 8, 8)) for case in cases]

    assert all(0 < valid_mask.mean() < 1 for _, valid_mask in read)

    voxels = np.stack([voxels for voxels, _ in read])
    valid_mask = np.stack([valid_mask for _, valid_mask in read])
    sample = members.apply(plan, "contrast", cases, replace(drawn, flip_transpose=flip_transpose))
    check_turned(sample, *plainly(voxels, valid_mask, flip_transpose), before=other)


@pytest.mark.parametrize(
    "flip_transpose",
    [flip_transpose for flip_transpose in FLIP_TRANSPOSES if flip_transpose.axes[0] == 0],
)
def test_strided_slices_are_flipped_before_sub_volumes_are_cut(flip_transpose):
    plan = make_plan(
        crop_size_vox=(32, 16, 16),
        weights={"strided": 1.0},
        num_subvolumes=2,
        stride_vox=8,
        mask_seen=True,
    )
    case = Ramp((20, 40, 12))
    start = (-1, 3, -2)
    drawn = strided.draw(plan, case.shape_vox, rng.generator(0, "x"), case.spacing_mm)
    unchanged = replace(drawn, start=start, flip_transpose=UNCHANGED)
    sample = strided.apply(plan, case, replace(unchanged, flip_transpose=flip_transpose))
    other = strided.apply(plan, case, unchanged)
    # Two sub-volumes of 16 slices with a stride of 8 lie in 24 slices.
    voxels, valid_mask = case.read_padded(start, (24, 16, 16))
    voxels, valid_mask = plainly(voxels[None], valid_mask[None], flip_transpose)
    slices = [*range(16), *range(8, 24)]

    check_turned(sample, voxels[:, :, slices], valid_mask[:, slices], before=other)

    assert np.array_equal(sample.loss_mask, other.loss_mask)


def test_strided_sequences_never_swap_the_axis_of_their_slices():
    plan = make_plan(
        crop_size_vox=(32, 16, 16),
        weights={"strided": 1.0},
        num_subvolumes=2,
        stride_vox=8,
    )
    drawn = []
    for i in range(60):
        draw = strided.draw(plan, (40, 40, 40), rng.generator(0, "x", i), (1.0, 1.0, 1.0))
        drawn.append(draw.flip_transpose)

    # Of six orders only the two that keep z first; all eight flips occur in 60 draws.
    assert {flip_transpose.axes for flip_transpose in drawn} == {(0, 1, 2), (0, 2, 1)}
    assert {flip_transpose.flips for flip_transpose in drawn} == set(FLIPS)


def test_a_batch_keeps_its_turns_in_parts_and_in_loader_processes():
    batches = StepBatches(
        SequenceSampler(make_plan()),
        [Ramp((30, 30, 30)), Ramp((16, 40, 20))],
        range(5),
    )
    (batch,) = training_batches(batches, range(3, 4), num_workers=1, pin_memory=False)

    assert len(batch.flip_transposes) == 5
    assert len(set(batch.flip_transposes)) > 1

    parts = [part.to(CPU) for part in micro_batches(batch, 2)]

    assert [len(part.prefix) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.voxels for part in parts]), batch.to(CPU).voxels)
    assert not torch.equal(batch.to(CPU).voxels, batch.voxels)


def test_without_flips_and_swaps_a_batch_is_shared_and_not_copied():
    plan = make_plan(flip=False, swap_axes=False)
    batch = collate(
        [SequenceSampler(plan).draw([Ramp((30, 30, 30))], TRAINING, 0, i) for i in range(2)],
    )

    assert batch.flip_transposes == ()
    assert batch.to(CPU).voxels is batch.voxels


def seeing(plan):
    """Return an objective, and the list of batches whose loss was computed."""
    objective = Autoregressive(plan)
    seen = []
    loss = objective.loss

    def watched(batch, references=False):
        seen.append(batch)
        return loss(batch, references)

    objective.loss = watched
    return objective, seen


def test_training_and_validation_batches_reach_the_loss_turned():
    plan = make_plan(crop_size_vox=(16, 16, 16))
    cases = [Ramp((30, 30, 30)), Ramp((12, 40, 20))]
    objective, seen = seeing(plan)
    step = TrainingStep(plan, objective, CPU)
    step(0, StepBatches(objective.sampler, cases, step.numbers)[0])
    drawn = [objective.sampler.draw(cases, TRAINING, 0, i) for i in step.numbers]
    Validation(objective, validation_batches(objective.sampler, cases, 4, 1), [], CPU).measure()
    drawn += [objective.sampler.draw(cases, VALIDATION, i) for i in range(4)]

    assert any(sample.flip_transpose != UNCHANGED for sample in drawn[:2])
    assert any(sample.flip_transpose != UNCHANGED for sample in drawn[2:])

    voxels = torch.cat([batch.voxels for batch in seen]).numpy()
    valid_mask = torch.cat([batch.valid_mask for batch in seen]).numpy()

    assert np.array_equal(voxels, np.stack([sample.augmented().voxels for sample in drawn]))
    assert np.array_equal(valid_mask, np.stack([sample.augmented().valid_mask for sample in drawn]))


def test_the_loss_is_one_graph_for_all_flips_and_swaps():
    plan = make_plan(crop_size_vox=(16, 16, 16))
    small = {**plan.encoder.arguments, "embed_dim": 48, "eva_depth": 1, "eva_numheads": 2}
    plan = replace(plan, encoder=replace(plan.encoder, arguments=small))
    sampler = SequenceSampler(plan)
    graphs = []
    samples = [sampler.draw([Ramp((30, 30, 30))], TRAINING, 0, i) for i in range(4)]
    assert len({sample.flip_transpose for sample in samples}) > 2

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    # Every new graph is compiled in the middle of a training.
    torch._dynamo.reset()
    loss = torch.compile(Autoregressive(plan).loss, dynamic=False, backend=counting, fullgraph=True)
    for pair in (samples[:2], samples[2:], [samples[0].augmented(), samples[1].augmented()]):
        loss(collate(pair).to(CPU))

    assert len(graphs) == 1


def test_semantic_samples_carry_one_turn_for_all_their_patients():
    sampler = SequenceSampler(semantic_plan())
    pool = semantic_material()
    drawn = [sampler.draw(pool, TRAINING, step, 0).flip_transpose for step in range(60)]

    assert {flip_transpose.flips for flip_transpose in drawn} == set(FLIPS)
    assert len({flip_transpose.axes for flip_transpose in drawn}) > 1


@pytest.mark.parametrize("kind", ["spatial", "strided", "contrast"])
def test_pictures_show_sequences_turned_the_usual_way_round(kind):
    plan = contrast_plan(weights={kind: 1.0}, num_subvolumes=2, stride_vox=16)
    pool = SamplingPool((Ramp((40, 40, 40)),), contrast_material(1).groups)
    _, shown = SequenceSampler(plan).draw_kind(kind, pool, rng.generator(0, "x"))

    sample, again = upright(plan, shown)

    # The radiological orientation: y and x run backwards.
    assert sample.flip_transpose == UNCHANGED
    assert again.drawn.flip_transpose == FlipTranspose((False, True, True))

    start = again.drawn.starts[0] if kind == "contrast" else again.drawn.start
    voxels, valid_mask = shown.cases[0].read_padded(start, sample.voxels.shape[2:])

    assert np.array_equal(sample.voxels[0, 0], voxels[0, :, ::-1, ::-1])
    assert np.array_equal(sample.valid_mask[0], valid_mask[:, ::-1, ::-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_turning_on_a_gpu_gives_the_same_bits_and_waits_for_nothing():
    sampler = SequenceSampler(make_plan())
    device = torch.device("cuda")
    batch = collate([sampler.draw([Ramp((30, 30, 30))], TRAINING, 0, i) for i in range(4)])
    pinned = batch.pin_memory()

    assert pinned.flip_transposes == batch.flip_transposes

    # From here on torch raises an error if the CPU waits for the GPU.
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = pinned.to(device)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert torch.equal(augmented.voxels.cpu(), batch.to(CPU).voxels)
    assert torch.equal(augmented.valid_mask.cpu(), batch.to(CPU).valid_mask)
