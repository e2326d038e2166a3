"""Rotation, zoom and corruption of training crops: drawn by the loader, carried out on the device,
never on held-out samples.
"""

from dataclasses import dataclass, replace

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
from nnunet_autoreg.model.sequence import from_tokens
from nnunet_autoreg.objectives.autoregressive import Autoregressive
from nnunet_autoreg.pretrain.data import StepBatches, micro_batches, training_batches
from nnunet_autoreg.pretrain.training_step import TrainingStep
from nnunet_autoreg.sampling import members, spatial
from nnunet_autoreg.sampling.affine import (
    affine_of,
    draw_affine,
    in_plane_axes,
    read_source,
    resampled,
)
from nnunet_autoreg.sampling.corruption import (
    CLEAN,
    Corruption,
    corrupted,
    draw_corruption,
    stacked,
)
from nnunet_autoreg.sampling.sample import collate
from nnunet_autoreg.sampling.sampler import TRAINING, VALIDATION, SequenceSampler

CPU = torch.device("cpu")
ISOTROPIC, THICK = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0)
VARIED = {"spatial_share": 1.0, "max_rotation_deg": 30.0, "zoom": (0.7, 1.4)}
SIZE = (16, 16, 16)


@dataclass(frozen=True)
class Noisy(Ramp):
    """A case of random voxels, so that no symmetry hides a mistake."""

    def read_padded(self, start, size):
        numbers, valid_mask = super().read_padded(start, size)
        num_values = int(np.prod(self.shape_vox)) + 1
        values = np.random.default_rng(0).normal(size=num_values).astype(np.float32)
        # Numbers of voxels begin at 1, and padding is 0.
        values[0] = 0
        return values[numbers.astype(int)], valid_mask


@dataclass(frozen=True)
class Smooth(Ramp):
    """A case whose voxels are a linear function of their place, which trilinear interpolation
    reproduces.
    """

    weights: tuple[float, float, float] = (1.0, 10.0, 100.0)

    def read_padded(self, start, size):
        _, valid_mask = super().read_padded(start, size)
        axes = [np.arange(n) + s for n, s in zip(size, start, strict=True)]
        z, y, x = np.meshgrid(*axes, indexing="ij")
        of_z, of_y, of_x = self.weights
        voxels = (np.float32(of_z) * z + of_y * y + of_x * x).astype(np.float32)
        return voxels[None] * valid_mask, valid_mask


@dataclass(frozen=True)
class Uniform(Ramp):
    """A case of the value 7 everywhere."""

    def read_padded(self, start, size):
        return np.full((1, *size), 7, np.float32), np.ones(size, bool)


def crop_of(case, start, affine, size=SIZE, max_source=4.0):
    """The resampled crop as numpy arrays (Z, Y, X)."""
    voxels, valid_mask = resampled(read_source(case, start, size, affine, max_source), size)
    return voxels[0].numpy(), valid_mask.numpy()


@pytest.mark.parametrize("axis", range(3))
def test_a_rotation_by_90_degrees_equals_numpys_rot90(axis):
    start = (7, 5, 9)
    direction = np.eye(3)[axis]
    plain, _ = Noisy((30, 30, 30)).read_padded(start, SIZE)
    others = [i for i in range(3) if i != axis]

    quarter_turn = affine_of(90, direction, 1.0, ISOTROPIC)
    augmented, valid_mask = crop_of(Noisy((30, 30, 30)), start, quarter_turn)

    # One of the two directions, which differ; interpolation at whole places rounds a little.
    one = np.rot90(plain[0], 1, others)
    other = np.rot90(plain[0], -1, others)
    assert min(np.abs(augmented - one).max(), np.abs(augmented - other).max()) < 1e-4
    assert np.abs(one - other).max() > 1
    assert valid_mask.all()


def test_a_rotation_about_z_turns_y_into_x_by_hand():
    # A step along x of the crop is a step along y of the scan, and one along y a step back along x.
    matrix = np.array(affine_of(90, (1, 0, 0), 1.0, ISOTROPIC).matrix)

    one_way = [[1, 0, 0], [0, 0, -1], [0, 1, 0]]
    other_way = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    assert np.allclose(matrix, one_way) or np.allclose(matrix, other_way)
    # Not a mirror image.
    assert np.isclose(np.linalg.det(matrix), 1)


def test_a_zoom_of_two_shows_half_the_extent_about_the_middle():
    twice = affine_of(0, (1, 0, 0), 2.0, ISOTROPIC)
    voxels, valid_mask = crop_of(Smooth((40, 40, 40)), (10, 10, 10), twice)

    # The middle of voxels 10 to 25 is 17.5; steps of the crop are half a voxel.
    places = 17.5 + (np.arange(16) - 7.5) / 2
    along_z = places + 10 * places[3] + 100 * places[5]
    along_x = places[2] + 10 * places[3] + 100 * places
    assert np.allclose(voxels[:, 3, 5], along_z, rtol=1e-5)
    assert np.allclose(voxels[2, 3, :], along_x, rtol=1e-5)
    assert valid_mask.all()


def test_rotations_are_rigid_in_millimetres_of_unequal_voxels():
    spacing = np.array((2.0, 1.0, 0.8))
    matrix = np.array(affine_of(25, (0.3, 0.5, 0.8), 1.0, spacing).matrix)
    in_mm = np.diag(spacing) @ matrix @ np.diag(1 / spacing)

    # A rotation times its transpose is the identity: in mm, and so not in voxels.
    assert np.allclose(in_mm @ in_mm.T, np.eye(3))
    assert not np.allclose(matrix @ matrix.T, np.eye(3))


def test_thick_slices_are_rotated_and_zoomed_in_their_plane_only():
    plan = make_plan(**VARIED)
    drawn = [draw_affine(plan, THICK, rng.generator(0, "x", i)) for i in range(50)]

    for affine in drawn:
        matrix = np.array(affine.matrix)
        assert matrix[0].tolist() == [1, 0, 0]
        assert matrix[:, 0].tolist() == [1, 0, 0]
        # A zoom by f shows 1 / f of the extent along both axes of the plane.
        assert np.allclose(np.linalg.det(matrix), affine.zoom**-2)
    assert max(affine.angle_deg for affine in drawn) > 20
    assert min(affine.angle_deg for affine in drawn) < -20
    # Slices count as thick if they are more than three times as thick as pixels are wide.
    assert in_plane_axes((3.0, 1.0, 1.0)) == (0, 1, 2)
    assert in_plane_axes((3.1, 1.0, 1.0)) == (1, 2)
    for i in range(5):
        matrix = np.array(draw_affine(plan, ISOTROPIC, rng.generator(0, "x", i)).matrix)
        assert abs(matrix[0, 1]) > 1e-3


def test_a_single_fine_axis_leaves_no_plane_to_rotate_in():
    assert draw_affine(make_plan(**VARIED), (4.0, 4.0, 1.0), rng.generator(0, "x")) is None


def test_zooms_and_angles_keep_within_the_plans_bounds():
    plan = make_plan(**VARIED)
    drawn = [draw_affine(plan, ISOTROPIC, rng.generator(0, "x", i)) for i in range(300)]
    zooms = np.array([affine.zoom for affine in drawn])

    assert 0.7 <= zooms.min() < 0.72
    assert 1.37 < zooms.max() <= 1.4
    assert 28 < max(abs(affine.angle_deg) for affine in drawn) <= 30


def test_rotation_and_zoom_are_drawn_independently_of_each_other():
    plan = make_plan(**{**VARIED, "spatial_share": 0.2})
    drawn = [draw_affine(plan, ISOTROPIC, rng.generator(0, "x", i)) for i in range(2000)]
    rotated = np.array([affine is not None and affine.angle_deg != 0 for affine in drawn])

    zoomed = np.array([affine is not None and affine.zoom != 1 for affine in drawn])

    # Four standard deviations of a share of 2000 draws.
    for share, expected in ((rotated, 0.2), (zoomed, 0.2), (rotated & zoomed, 0.04)):
        assert abs(share.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000)


def test_voxels_from_outside_the_scan_are_padding_after_a_turn():
    # The scan is 20 voxels wide and all of it is 7. A rotation by 45 degrees brings corners in from
    # outside.
    size = (20, 20, 20)
    turn = affine_of(45, (1, 0, 0), 1.0, ISOTROPIC)

    voxels, valid_mask = crop_of(Uniform(size), (0, 0, 0), turn, size=size)

    y, x = np.meshgrid(np.arange(20) - 9.5, np.arange(20) - 9.5, indexing="ij")
    root = np.sqrt(0.5)
    inside = (np.abs(root * (y + x)) <= 10) & (np.abs(root * (y - x)) <= 10)
    # An octagon covers 2 * (sqrt(2) - 1) = 0.83 of its square.
    assert 0.75 < inside.mean() < 0.9
    assert np.array_equal(valid_mask, np.broadcast_to(inside, valid_mask.shape))
    # No padding is blended into the scan's border.
    assert np.allclose(voxels[valid_mask], 7, atol=1e-5)
    assert np.all(voxels[~valid_mask] == 0)


def test_the_mask_of_a_scan_smaller_than_the_crop_is_turned_along():
    # The scan fills rows 4..11 along y and everything else; a quarter turn in (y, x) makes columns
    # of the rows.
    case = Noisy((16, 8, 16))
    start = (0, -4, 0)
    voxels, valid_mask = crop_of(case, start, affine_of(90, (1, 0, 0), 1.0, ISOTROPIC))
    plain, mask = case.read_padded(start, SIZE)

    assert np.array_equal(valid_mask, np.rot90(mask, 1, (1, 2)))
    matches = [np.abs(voxels - np.rot90(plain[0], k, (1, 2))).max() for k in (1, -1)]
    assert min(matches) < 1e-4


def test_every_turned_crop_keeps_a_part_of_the_scan():
    plan = make_plan(crop_size_vox=SIZE, **VARIED, max_source=1.6)
    # Thin along z and x, so that a turn can easily look past it.
    case = Noisy((3, 30, 5))
    for number in range(100):
        place = rng.generator(0, "x", number)
        turn = rng.generator(0, "y", number)
        drawn = spatial.draw(plan, case.shape_vox, place, ISOTROPIC, turn)
        assert spatial.apply(plan, case, drawn).augmented().valid_mask.any()


def test_no_more_is_read_than_the_crop_covers_and_the_plan_allows():
    start = (20, 20, 20)
    case = Noisy((60, 60, 60))
    rotation = affine_of(45, (1, 0, 0), 1.0, ISOTROPIC)
    zoom = affine_of(0, (1, 0, 0), 0.5, ISOTROPIC)

    # Half the diagonal of 15 voxel steps, 7.5 * sqrt(2) = 10.6, about 27.5: voxels 16 to 39.
    assert read_source(case, start, SIZE, rotation, 4.0).voxels.shape == (1, 16, 24, 24)
    # 15 steps become 30: voxels 12 to 43 about 27.5; 1.5 times 16 voxels are 24.
    assert read_source(case, start, SIZE, zoom, 4.0).voxels.shape == (1, 32, 32, 32)
    assert read_source(case, start, SIZE, zoom, 1.5).voxels.shape == (1, 26, 26, 26)
    # 26 voxels about 27.5 cover 14 of the 16 steps of two voxels; what lies beyond is padding.
    _, valid_mask = crop_of(case, start, zoom, max_source=1.5)
    assert valid_mask[8, 8].tolist() == [False] + [True] * 14 + [False]


def test_crops_that_are_neither_rotated_nor_zoomed_keep_every_bit():
    cases = [Noisy((30, 30, 30)), Noisy((12, 40, 20))]
    before = make_plan()
    some = make_plan(**{**VARIED, "spatial_share": 0.2})
    plain = num_turned = 0
    for number in range(40):
        old = SequenceSampler(before).draw(cases, TRAINING, 3, number)
        new = SequenceSampler(some).draw(cases, TRAINING, 3, number)
        # What is drawn for a sample does not depend on whether others are turned.
        assert np.array_equal(old.order_index, new.order_index)
        assert old.prefix == new.prefix
        assert old.flip_transpose == new.flip_transpose
        if new.sources:
            num_turned += 1
            continue
        plain += 1
        assert np.array_equal(old.voxels, new.voxels)
        assert np.array_equal(old.valid_mask, new.valid_mask)
        assert torch.equal(collate([old]).to(CPU).voxels, collate([new]).to(CPU).voxels)

    # Neither rotated nor zoomed are 0.8 * 0.8 = 64 % of 40.
    assert plain > 15
    assert num_turned > 5


def test_with_a_share_of_zero_nothing_is_resampled():
    sampler = SequenceSampler(make_plan(max_rotation_deg=30.0, zoom=(0.7, 1.4)))

    for number in range(30):
        assert not sampler.draw([Noisy((30, 30, 30))], TRAINING, 0, number).sources


def test_resampling_by_no_angle_and_no_zoom_gives_the_plain_crop():
    start = (-3, 4, 20)
    case = Noisy((30, 30, 30))
    plain, mask = case.read_padded(start, SIZE)

    voxels, valid_mask = crop_of(case, start, affine_of(0, (1, 2, 3), 1.0, ISOTROPIC))

    assert np.array_equal(valid_mask, mask)
    assert np.allclose(voxels, plain[0], atol=1e-4)


def test_draws_depend_on_seed_step_and_sample_only():
    plan = make_plan(**VARIED)
    cases = [Noisy((30, 30, 30))]
    sampler = SequenceSampler(plan)
    one = sampler.draw(cases, TRAINING, 3, 1)
    # Another draw in between would move a generator that is shared.
    sampler.draw(cases, TRAINING, 9, 9)
    again = SequenceSampler(plan).draw(cases, TRAINING, 3, 1)

    assert one.sources[0].matrix == again.sources[0].matrix
    assert torch.equal(one.sources[0].voxels, again.sources[0].voxels)

    other_seed = SequenceSampler(replace(plan, run=replace(plan.run, seed=8)))
    others = [
        sampler.draw(cases, TRAINING, 4, 1),
        sampler.draw(cases, TRAINING, 3, 2),
        other_seed.draw(cases, TRAINING, 3, 1),
    ]

    assert all(other.sources[0].matrix != one.sources[0].matrix for other in others)


def test_held_out_samples_are_never_rotated_zoomed_or_corrupted():
    plan = make_plan(**VARIED)
    plan = replace(plan, objective=replace(plan.objective, corruption=1.0))
    for number in range(20):
        sample = SequenceSampler(plan).draw([Noisy((30, 30, 30))], VALIDATION, number)
        assert not sample.sources
        assert sample.corruption is None


def test_strided_sequences_are_never_rotated_or_zoomed():
    plan = make_plan(
        crop_size_vox=(32, 16, 16),
        weights={"strided": 1.0},
        num_subvolumes=2,
        stride_vox=8,
        **VARIED,
    )
    sampler = SequenceSampler(plan)

    # Their slices lie at a stride along z, which a turn would not keep.
    for number in range(20):
        assert not sampler.draw([Noisy((40, 40, 40))], TRAINING, 0, number).sources


def test_all_members_of_a_contrast_sequence_are_turned_alike():
    pool = contrast_material(1)
    sample = SequenceSampler(contrast_plan(**VARIED)).draw(pool, TRAINING, 0, 0)
    done = sample.augmented()

    assert len(sample.sources) == 4
    assert len({source.matrix for source in sample.sources}) == 1
    assert (done.valid_mask == done.valid_mask[0]).all()
    assert done.valid_mask.any()
    # The contrasts of ``contrast_material`` differ by a constant of 1e5 each.
    steps = np.diff(done.voxels[:, 0], axis=0)[:, done.valid_mask[0]]
    assert np.allclose(steps, 1e5, rtol=1e-3)


def test_members_of_a_semantic_sequence_share_one_rotation():
    pool = semantic_material()
    sample = SequenceSampler(semantic_plan(**VARIED)).draw(pool, TRAINING, 0, 0)

    assert len(sample.sources) == 4
    assert len({source.matrix for source in sample.sources}) == 1
    assert sample.augmented().valid_mask.any(axis=(1, 2, 3)).all()


def test_a_batch_rotates_in_any_parts_and_in_loader_processes():
    plan = make_plan(**{**VARIED, "spatial_share": 0.5})
    batches = StepBatches(
        SequenceSampler(plan),
        [Noisy((30, 30, 30)), Noisy((16, 40, 20))],
        range(5),
    )
    (batch,) = training_batches(batches, range(3, 4), num_workers=1, pin_memory=False)
    assert 0 < sum(bool(sources) for sources in batch.sources) < 5

    whole = batch.to(CPU)
    parts = [part.to(CPU) for part in micro_batches(batch, 2)]

    sampler = SequenceSampler(plan)
    expected = [sampler.draw(batches.cases, TRAINING, 3, i).augmented() for i in range(5)]
    voxels = np.stack([sample.voxels for sample in expected])
    valid_mask = np.stack([sample.valid_mask for sample in expected])
    for made in (whole.voxels, torch.cat([part.voxels for part in parts])):
        assert np.array_equal(made.numpy(), voxels)
    for made in (whole.valid_mask, torch.cat([part.valid_mask for part in parts])):
        assert np.array_equal(made.numpy(), valid_mask)
    # What is done is not done again.
    assert whole.sources == ()
    assert whole.to(CPU).voxels is whole.voxels


def test_resampling_stays_in_single_precision_under_autocast():
    plan = make_plan(**VARIED)
    sampler = SequenceSampler(plan)
    batch = collate([sampler.draw([Noisy((30, 30, 30))], TRAINING, 0, i) for i in range(2)])

    with torch.autocast("cpu", torch.bfloat16):
        inside = batch.to(CPU)

    assert inside.voxels.dtype == torch.float32
    assert torch.equal(inside.voxels, batch.to(CPU).voxels)


def known_crops():
    """Voxels (2, 2, 1, 8, 8, 8) and which of them are known: half of each, and nothing of one
    member.
    """
    generator = torch.Generator().manual_seed(0)
    voxels = torch.randn(2, 2, 1, 8, 8, 8, generator=generator)
    known = torch.rand(2, 2, 8, 8, 8, generator=generator) < 0.5
    known[1, 1] = False
    return voxels, known


STRONG = Corruption(1.4, 1.2, 0.3, seed=5)


def test_unknown_voxels_do_not_change_one_bit_of_the_corrupted_known_ones():
    voxels, known = known_crops()
    corruptions = stacked([STRONG, Corruption(0.8, 0.8, 0.1, seed=6)]).with_noise(voxels)
    unknown = ~known[:, :, None]
    for change in (
        lambda v: v * -30,
        lambda v: v + 1e4,
        lambda v: torch.full_like(v, float("nan")),
    ):
        other = torch.where(unknown, change(voxels), voxels)

        one, two = (corrupted(v, known, corruptions) for v in (voxels, other))

        assert torch.equal(one[~unknown], two[~unknown])
        # The corruption does change known voxels, and never unknown ones.
        assert not torch.equal(one[~unknown], voxels[~unknown])
        assert torch.equal(one[unknown], voxels[unknown])


def test_statistics_of_all_voxels_would_fail_that_test():
    voxels, known = known_crops()
    corruptions = stacked([STRONG, STRONG]).with_noise(voxels)
    other = torch.where(known[:, :, None], voxels, voxels * -30)
    everything = torch.ones_like(known)

    one, two = (corrupted(v, everything, corruptions) for v in (voxels, other))

    assert not torch.equal(one[known[:, :, None]], two[known[:, :, None]])


def test_clean_samples_and_members_without_contrast_keep_every_bit():
    voxels, known = known_crops()
    # A member of one value: a deviation of 0 by which nothing can be divided.
    voxels[0, 1] = 0.25
    corruptions = stacked([STRONG, CLEAN]).with_noise(voxels)

    made = corrupted(voxels, known, corruptions)

    assert torch.equal(made[1], voxels[1])
    assert torch.equal(made[0, 1], voxels[0, 1])
    assert torch.isfinite(made).all()
    assert corrupted(voxels, known, None) is voxels


def test_gamma_keeps_mean_and_deviation_and_contrast_is_computed_by_hand():
    voxels = torch.linspace(-1, 3, 512).reshape(1, 1, 1, 8, 8, 8)
    known = torch.ones(1, 1, 8, 8, 8, dtype=torch.bool)

    bent = corrupted(voxels, known, stacked([Corruption(gamma=1.3)]).with_noise(voxels))
    inner = corrupted(voxels, known, stacked([Corruption(contrast=0.8)]).with_noise(voxels))
    wider = corrupted(voxels, known, stacked([Corruption(contrast=1.25)]).with_noise(voxels))

    # Voxels are evenly spread from -1 to 3, with mean 1. Gamma keeps their order.
    assert abs(float(bent.mean() - 1)) < 0.01
    assert abs(float(bent.std() / voxels.std() - 1)) < 0.02
    assert (bent.flatten().diff() >= 0).all()
    assert float((bent - voxels).abs().max()) > 0.05
    assert torch.allclose(inner, 1 + 0.8 * (voxels - 1), atol=1e-5)
    # Beyond the former extremes a wider contrast is cut off.
    assert torch.allclose(wider, (1 + 1.25 * (voxels - 1)).clamp(-1, 3), atol=1e-5)


def test_noise_has_the_drawn_share_of_the_known_deviation():
    voxels = torch.linspace(-1, 3, 16**3).reshape(1, 1, 1, 16, 16, 16)
    known = torch.ones(1, 1, 16, 16, 16, dtype=torch.bool)

    made = corrupted(voxels, known, stacked([Corruption(noise=0.2, seed=3)]).with_noise(voxels))

    # 4096 draws know their deviation to a ninetieth of it.
    assert abs(float((made - voxels).std() / voxels.std()) - 0.2) < 0.02


def test_noise_comes_from_the_samples_own_seed():
    plan = make_plan()
    plan = replace(plan, objective=replace(plan.objective, corruption=1.0))
    batch = StepBatches(SequenceSampler(plan), [Noisy((30, 30, 30))], range(3))[4]
    whole = batch.to(CPU).corruption

    parts = [part.to(CPU).corruption for part in micro_batches(batch, 2)]

    assert torch.equal(torch.cat([part.noise for part in parts]), whole.noise)
    assert whole.seeds == ()
    assert torch.equal(torch.cat([part.strength for part in parts]), whole.strength)
    assert not torch.equal(whole.noise[0], whole.noise[1])


def test_the_planned_share_of_samples_is_corrupted():
    drawn = [draw_corruption(0.3, rng.generator(0, "x", i)) for i in range(1000)]
    share = np.mean([one != CLEAN for one in drawn])

    # Four standard deviations of a share of 1000 draws.
    assert abs(share - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 1000)
    for one in drawn:
        assert 0.7 <= one.gamma <= 1.5
        assert 0.75 <= one.contrast <= 1.25
        assert 0 <= one.noise <= 0.3


def narrow(plan, **objective):
    """The plan with a small encoder."""
    arguments = {**plan.encoder.arguments, "embed_dim": 48, "eva_depth": 1, "eva_numheads": 2}
    encoder = replace(plan.encoder, arguments=arguments)
    return replace(plan, encoder=encoder, objective=replace(plan.objective, **objective))


def test_only_given_blocks_are_corrupted_and_targets_stay_clean(monkeypatch):
    plan = narrow(make_plan(crop_size_vox=SIZE), corruption=1.0)
    objective = Autoregressive(plan)
    batch = StepBatches(objective.sampler, [Noisy((30, 30, 30))], range(2))[0]
    batch = replace(batch, prefix=torch.tensor([3, 5])).to(CPU)
    inputs = []
    targets = []
    forward = objective.model.forward
    clean = objective._target_voxels

    def watched_forward(asked, valid):
        inputs.append(asked.voxels)
        return forward(asked, valid)

    def watched_targets(of):
        targets.append(of.voxels)
        return clean(of)

    monkeypatch.setattr(objective.model, "forward", watched_forward)
    monkeypatch.setattr(objective, "_target_voxels", watched_targets)

    objective.loss(batch)

    given_BTP = (batch.order_index < batch.prefix[:, None])[:, :, None].expand(-1, -1, 512)
    given = from_tokens(given_BTP, objective.token_size, batch.voxels.shape)[:, :, None]
    changed = inputs[0] != batch.voxels
    assert not changed[~given].any()
    # Noise changes nearly every given voxel.
    assert changed[given].float().mean() > 0.9
    assert targets[0] is batch.voxels


def test_the_corrupted_loss_is_one_graph_for_all_draws():
    plan = narrow(make_plan(crop_size_vox=SIZE), corruption=0.5)
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    objective = Autoregressive(plan)
    loss = torch.compile(objective.loss, dynamic=False, backend=counting, fullgraph=True)
    batches = StepBatches(objective.sampler, [Noisy((30, 30, 30))], range(2))

    for step in range(3):
        loss(batches[step].to(CPU))

    assert len(graphs) == 1


def test_training_that_is_resumed_continues_bit_for_bit():
    plan = narrow(make_plan(crop_size_vox=SIZE, **{**VARIED, "spatial_share": 0.5}), corruption=0.5)
    cases = [Noisy((30, 30, 30)), Noisy((12, 40, 20))]

    def trained(steps, state=None):
        torch.manual_seed(0)
        objective = Autoregressive(plan)
        step = TrainingStep(plan, objective, CPU)
        if state is not None:
            objective.module.load_state_dict(state[0])
            step.optimizer.load_state_dict(state[1])
        batches = StepBatches(objective.sampler, cases, step.numbers)
        losses = [float(step(n, batches[n])[0]) for n in steps]
        return losses, (objective.module.state_dict(), step.optimizer.state_dict())

    through, _ = trained(range(4))
    first, state = trained(range(2))
    rest, _ = trained(range(2, 4), state)

    assert first + rest == through
    assert len(set(through)) == 4


def test_a_sequence_of_members_can_be_replayed_without_its_rotation():
    plan = contrast_plan(**VARIED)
    group = contrast_material(1).groups[0]
    cases = [case for _, case in group.members]
    shape = cases[0].shape_vox
    place, turn = rng.generator(0, "x"), rng.generator(0, "y")
    drawn = members.draw_contrast(plan, shape, ISOTROPIC, range(4), place, turn)
    without = members.draw_contrast(plan, shape, ISOTROPIC, range(4), rng.generator(0, "x"))

    # The turn has its own generator, so the rest of the draw is the same.
    assert drawn.affine is not None
    assert without.affine is None
    assert drawn.starts == without.starts

    sample = members.apply(plan, "contrast", cases, replace(drawn, affine=None))

    assert np.array_equal(sample.voxels, members.apply(plan, "contrast", cases, without).voxels)
