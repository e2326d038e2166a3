"""Alice: what student and teacher see, the three losses, the teacher's state, matches, collapse.

The numbers T1 to T12 are those of the method's specification.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from refusals import refused
from safetensors.torch import load_file
from scipy import ndimage
from sequence_cases import Ramp, Shifted, narrow, plan_for
from torch import Tensor

from nnunet_autoreg import checkpoint
from nnunet_autoreg.corpus.rows import ScanRow
from nnunet_autoreg.errors import PlanError
from nnunet_autoreg.geometry import Size, Spacing, as_size, grid_of, volume
from nnunet_autoreg.machine import GIB
from nnunet_autoreg.model.sequence import from_tokens
from nnunet_autoreg.objective_kinds import with_objective
from nnunet_autoreg.objectives.alice import (
    Alice,
    cross_entropy,
    targets,
)
from nnunet_autoreg.objectives.alice_crops import crops_of, num_hidden_blocks
from nnunet_autoreg.objectives.alice_matches import consistent_matches
from nnunet_autoreg.objectives.alice_networks import Casa
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.pool import Hardware
from nnunet_autoreg.pretrain.checkpointing import (
    Progress,
    load_initial_weights,
    restore,
    snapshot,
)
from nnunet_autoreg.pretrain.dry_run import plan_memory, with_fitting_parts
from nnunet_autoreg.pretrain.training_step import TrainingStep, learning_rate, parameter_groups
from nnunet_autoreg.pretrain.validation import Validation
from nnunet_autoreg.report.slices import plain_panel, validation_pictures
from nnunet_autoreg.sampling import members
from nnunet_autoreg.sampling.flip_transpose import FlipTranspose
from nnunet_autoreg.sampling.neighbours import places_alike
from nnunet_autoreg.sampling.pool import SamplingPool, StoredLocation, Structure
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import TRAINING, SequenceSampler

CPU = torch.device("cpu")
SHAPE_VOX = (40, 48, 40)
ENCODERS = ("primus_tiny", "resenc_tiny")
# Crops of 16^3 with tokens of 8^3: 8 tokens per image.
SMALL = (
    "objective.width=16",
    "objective.hidden=24",
    "objective.num_prototypes=32",
    "sequence.crop_size_vox=[16,16,16]",
    "sequence.member_crop_vox=[16,16,16]",
    "optim.warmup_steps=1",
)


def planned(encoder: str = "primus_tiny", *settings: str) -> Plan:
    plan = plan_for(encoder, SHAPE_VOX)
    plan = with_objective(plan, "alice")
    block = ["sequence.block_tokens=[1,1,1]"]
    return check(override(plan, [*SMALL, *block, *narrow(encoder), *settings]))


def built(plan: Plan) -> Alice:
    torch.manual_seed(0)
    objective = build_objective(plan)
    assert isinstance(objective, Alice)
    objective.begin()
    return objective


def batch_of(plan: Plan, num_samples: int = 2, num_members: int = 2, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    size = plan.sequence.crop_size_vox
    num_tokens = num_members * volume(grid_of(size, plan.encoder.token_size_vox))
    # One random order over the tokens of all images of the sequence.
    voxels = torch.randn(num_samples, num_members, 1, *size, generator=generator)
    valid_mask = torch.ones(num_samples, num_members, *size, dtype=torch.bool)
    order = [torch.randperm(num_tokens, generator=generator) for _ in range(num_samples)]
    return Batch(voxels, valid_mask, torch.stack(order), torch.ones(num_samples, dtype=torch.int64))


def part(batch: Batch, name: str, objective: Alice) -> Tensor:
    return objective.loss(batch).terms[name].total


# What is planned.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_pairs_of_whole_crops_with_a_quarter_visible_are_planned(encoder: str) -> None:
    s = planned(encoder).sequence

    assert s.weights == {"semantic": 1.0}
    assert s.semantic_members == 2
    assert (s.order, s.prefix, s.prefix_share) == ("random", "fixed", 0.25)
    assert s.member_crop_vox == s.crop_size_vox


@pytest.mark.parametrize(
    ("setting", "code", "value"),
    [
        ("objective.casa=figures", "plan-unknown-name", "'figure'"),
        ("objective.export=both", "plan-unknown-name", "'both'"),
        ("objective.width=20", "plan-out-of-range", "20"),
        ("objective.momentum=1.5", "plan-out-of-range", "1.5"),
        ("objective.teacher_temperature=[0,0.07]", "plan-out-of-range", "teacher_temperature"),
        ("sequence.prefix=uniform", "plan-ill-posed", "sequence.prefix=uniform"),
    ],
)
def test_impossible_values_are_refused(setting: str, code: str, value: str) -> None:
    with refused(PlanError, code, value):
        planned("primus_tiny", setting)


# T1: the teacher.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t1_the_teacher_gets_no_gradient_and_is_a_running_mean(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)
    step = TrainingStep(plan, objective, CPU)
    name, weight = next(iter(objective.student.named_parameters()))
    history = [weight.detach().clone()]
    for number in range(3):
        # The history holds the student's weights, whose mean the teacher must be.
        step(number, batch_of(plan, seed=number))
        history.append(weight.detach().clone())

    # The momentum rises from 0.996 to 1 along a half cosine over the 10 steps of the plan.
    expected = history[0]
    for number in range(3):
        rest = 0.5 * (1 + math.cos(math.pi * (number + 1) / 10))
        momentum = 1 - (1 - 0.996) * rest
        expected = momentum * expected + (1 - momentum) * history[number + 1]
    taught = dict(objective.state.teacher.named_parameters())[name]
    assert torch.allclose(taught, expected, atol=1e-7)
    assert not torch.equal(taught, history[0])
    assert all(p.grad is None for p in objective.state.teacher.parameters())

    groups = parameter_groups(objective.module, 0.1)
    optimised = set()
    for group in groups:
        optimised |= {id(p) for p in group["params"]}  # type: ignore[attr-defined]
    assert not optimised & {id(p) for p in objective.extra.parameters()}


def test_t1_buffers_are_copied() -> None:
    # A buffer represents the running statistics of networks that normalise by batch.
    objective = built(planned())
    objective.student.register_buffer("probe", torch.ones(3))
    objective.state.teacher.register_buffer("probe", torch.zeros(3))

    objective.begin()

    assert torch.equal(dict(objective.state.teacher.named_buffers())["probe"], torch.ones(3))


def test_student_and_teacher_start_from_given_weights(tmp_path: Path, write_run: Any) -> None:
    folder = write_run(tmp_path, "start", crop=(16, 16, 16))
    weights = folder / "encoder.safetensors"
    plan = replace(planned(), request={"init": str(weights)})
    objective = built(plan)

    # In the order in which a run does both.
    load_initial_weights(objective.network, plan, tmp_path)
    objective.begin()

    state = objective.transferable_state()
    expected = load_file(weights)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    teacher = objective.state.teacher.state_dict()
    for name, value in objective.student.state_dict().items():
        assert torch.equal(teacher[name], value), name


# T2 and resuming.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t2_all_state_survives_a_checkpoint_and_training_is_the_same(
    tmp_path: Path,
    encoder: str,
) -> None:
    plan = planned(encoder)
    objective = built(plan)
    step = TrainingStep(plan, objective, CPU)
    for number in range(2):
        step(number, batch_of(plan, seed=number))
    path = tmp_path / checkpoint.LATEST_NAME
    state = snapshot(objective, step.optimizer, step.guard, Progress(2))
    checkpoint.save_checkpoint(path, {**state, "plan": {}, "scheduled": True}, None)

    # Another seed, so that the restored weights cannot be right by chance.
    torch.manual_seed(99)
    other = build_objective(plan)
    resumed = TrainingStep(plan, other, CPU)
    restore(checkpoint.load_checkpoint(path), other, resumed.optimizer, resumed.guard)

    names = set(objective.extra_state())
    assert {"class_centre", "patch_centre", "temperature"} <= names
    for number in range(2, 4):
        losses = [one(number, batch_of(plan, seed=number))[0] for one in (step, resumed)]
        assert torch.equal(*losses)
    for mine, theirs in ((objective.module, other.module), (objective.extra, other.extra)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name


# T3: which images meet in which loss.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t3_classes_cross_the_images_and_patches_stay_within_one(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)
    objective.module.eval()
    batch = batch_of(plan, num_samples=1)
    crops = crops_of(batch, plan)

    voxels = batch.voxels.clone()
    # Hidden voxels of the second image change: its student sees the same, its teacher does not.
    token = plan.encoder.token_size_vox
    hidden_T = ~crops.is_visible[1]
    token_index = int(hidden_T.nonzero()[0])
    grid = grid_of(plan.sequence.crop_size_vox, token)
    place = torch.unravel_index(torch.tensor(token_index), grid)
    z, y, x = (int(i) * t for i, t in zip(place, token, strict=True))
    voxels[0, 1, 0, z : z + token[0], y : y + token[1], x : x + token[2]] += 5.0
    changed = replace(batch, voxels=voxels)
    before, after = (objective.outputs(b, crops_of(b, plan)) for b in (batch, changed))

    # Only the teacher's view of image 1 changed, so only the student of image 0 meets it in the
    # loss of classes, and only the tokens of image 1 do in the loss of patches.
    assert torch.equal(before.student_classes, after.student_classes)
    assert torch.equal(before.teacher_classes[0], after.teacher_classes[0])
    assert not torch.equal(before.teacher_classes[1], after.teacher_classes[1])
    assert torch.equal(before.teacher_patches[0], after.teacher_patches[0])
    assert not torch.equal(before.teacher_patches[1], after.teacher_patches[1])

    state = objective.state
    # The student's temperature of the method.
    temperature = 0.1
    target = targets(before.teacher_classes, state.class_centre, state.temperature)
    # [1, 0] exchanges the two images: each student is compared with the teacher of the other image.
    crossed = cross_entropy(target[[1, 0]], before.student_classes, temperature)
    own = targets(before.teacher_patches, state.patch_centre, state.temperature)
    within = cross_entropy(own, before.student_patches, temperature)
    assert part(batch, "classes", objective).item() == pytest.approx(float(crossed.sum()), rel=1e-5)
    assert part(batch, "patches", objective).item() == pytest.approx(float(within.sum()), rel=1e-5)


# T4: the mask.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t4_the_teacher_does_not_depend_on_the_mask_and_the_student_does(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)
    objective.module.eval()
    batch = batch_of(plan)
    # Seed 7 draws another order, so other tokens are hidden; the voxels stay.
    other = replace(batch, order_index=batch_of(plan, seed=7).order_index)

    one, two = (objective.outputs(b, crops_of(b, plan)) for b in (batch, other))

    assert torch.equal(one.teacher_classes, two.teacher_classes)
    assert not torch.allclose(one.student_classes, two.student_classes, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t4_hidden_voxels_never_reach_the_student(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)
    objective.module.eval()
    batch = batch_of(plan)
    crops = crops_of(batch, plan)
    token = plan.encoder.token_size_vox
    # From one value per token to one value per voxel of the token.
    hidden = (~crops.is_visible)[:, :, None].expand(-1, -1, volume(token))
    hidden_BTP = hidden.reshape(len(batch.voxels), -1, hidden.shape[2])
    mask = from_tokens(hidden_BTP, token, batch.voxels.shape)
    noisy = replace(batch, voxels=batch.voxels + 3.0 * mask[:, :, None])

    one, two = (objective.outputs(b, crops_of(b, plan)) for b in (batch, noisy))

    assert torch.equal(one.student_classes, two.student_classes)
    assert torch.equal(one.voxels, two.voxels)
    assert not torch.equal(one.teacher_classes, two.teacher_classes)


# T5: CASA.


def test_t5_casa_ignores_the_order_of_keys_and_follows_that_of_queries() -> None:
    torch.manual_seed(0)
    casa = Casa(16, 24).eval()
    query = torch.randn(2, 5, 16)
    key = torch.randn(2, 7, 16)
    valid = torch.ones(2, 7, dtype=torch.bool)
    keys = torch.randperm(7)
    queries = torch.randperm(5)

    out = casa(query, key, valid)

    assert torch.allclose(out, casa(query, key[:, keys], valid), atol=1e-6)
    assert torch.allclose(out[:, queries], casa(query[:, queries], key, valid), atol=1e-6)


@pytest.mark.parametrize("form", ["figure", "released"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_t5_the_teachers_side_follows_the_teachers_tokens(form: str, encoder: str) -> None:
    plan = planned(encoder, f"objective.casa={form}")
    objective = built(plan)
    objective.module.eval()
    batch = batch_of(plan)
    crops = crops_of(batch, plan)
    before = objective.outputs(batch, crops)

    # Only the backbone of the teacher changes, not its heads.
    with torch.no_grad():
        for parameter in objective.state.teacher.backbone.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))

    after = objective.outputs(batch, crops)

    assert not torch.equal(before.teacher_patches, after.teacher_patches)
    assert torch.equal(before.student_patches, after.student_patches)
    loss = objective.loss(batch)
    loss.total.backward()
    assert objective.student.casa.key_value.weight.grad is not None
    # The last axis has one score per prototype (objective.num_prototypes=32).
    assert before.teacher_patches.shape[-1] == 32


# T6: the number of hidden blocks.


# Hidden are (1 - share) of 8 blocks, rounded up: 6, 2.4 -> 3, 7.92 -> 8, 0.08 -> 1. At least one
# stays visible, so the third is 7.
@pytest.mark.parametrize(
    ("share", "hidden"),
    [
        (0.25, 6),
        (0.7, 3),
        (0.01, 7),
        (0.99, 1),
    ],
)
def test_t6_the_number_of_hidden_blocks_follows_the_share(share: float, hidden: int) -> None:
    assert num_hidden_blocks(8, share) == hidden


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t6_every_crop_hides_as_many_blocks_and_others(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)

    crops = crops_of(batch_of(plan, num_samples=3), plan)

    tokens = crops.is_visible.shape[1]
    num_visible = tokens - math.ceil(0.75 * tokens)
    # 3 samples of 2 images. All hide the same number, but not the same blocks.
    assert crops.is_visible.sum(dim=1).tolist() == [num_visible] * 6
    assert len({tuple(row) for row in crops.is_visible.tolist()}) > 1
    assert objective.loss(batch_of(plan, num_samples=3)).total.isfinite()


# T7: the rate.


def test_t7_the_rate_never_exceeds_its_peak_and_falls_after_the_warm_up() -> None:
    optim = replace(planned().optim, num_steps=200, warmup_steps=20)
    rates = [learning_rate(optim, step) for step in range(200)]

    assert max(rates) <= optim.lr
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


# T8 and T10: matches.


def grid_places(side: int, step_mm: float) -> Tensor:
    axis = torch.arange(side).float() * step_mm
    return torch.cartesian_prod(axis, axis, axis)


def test_t8_matches_of_shifted_features_hold_and_random_ones_do_not() -> None:
    torch.manual_seed(0)
    places = grid_places(8, 8.0)
    features = torch.randn(512, 64)
    # The second crop shows the same, one token further along x.
    shifted = features.reshape(8, 8, 8, 64).roll(-1, dims=2).reshape(512, 64)

    known = consistent_matches(features, shifted + 0.1 * torch.randn(512, 64), places, places)
    random = consistent_matches(features, torch.randn(512, 64), places, places)

    # The roll wraps around: the last of 8 columns has no neighbour, so at most 7/8 = 0.875 match.
    assert float(known.float().mean()) > 0.8
    assert float(random.float().mean()) < 0.1


@dataclass(frozen=True)
class Copy:
    """A case that is an affine copy of another volume."""

    voxels: NDArray[np.float32]
    spacing_mm: Spacing = (4.0, 4.0, 4.0)

    @property
    def shape_vox(self) -> Size:
        return as_size(self.voxels.shape)

    def read(self, start: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        inside = [slice(a, a + n) for a, n in zip(start, size, strict=True)]
        crop: NDArray[np.float32] = self.voxels[tuple(inside)]
        return crop[None]


def test_t8_pairs_of_affine_copies_show_the_same_place() -> None:
    rng = np.random.default_rng(0)
    # Structures of about 3 cm in 16 cm.
    anatomy = ndimage.gaussian_filter(rng.normal(size=(40, 40, 40)), 3)
    # 24 patients that differ in size by up to 5 % and in position by up to 2 voxels around the
    # centre.
    zooms = rng.uniform(0.95, 1.05, (24, 3))
    shifts = rng.uniform(3, 7, (24, 3))
    rows, cases = [], {}
    for number in range(24):
        zoom = zooms[number]
        shift = shifts[number]
        voxels = ndimage.affine_transform(
            anatomy / anatomy.std(),
            zoom,
            offset=shift,
            output_shape=(30, 30, 30),
            order=1,
        )
        name = str(number)
        shape = (30, 30, 30)
        cases[name] = Copy(voxels.astype(np.float32))
        row = ScanRow(name, "d", name, "", "MR", "", shape, (4.0,) * 3, shape, name, "ok", "")
        rows.append(replace(row, subject=name))

    found = places_alike(rows, cases, (12, 12, 12), num_subjects=2)  # type: ignore[arg-type]

    def in_anatomy(scan: str, centre: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the point of the original volume that a scan shows at this share of its shape."""
        number = int(scan)
        point: NDArray[np.float64] = zooms[number] * (centre * 30 - 0.5) + shifts[number]
        return point

    errors, random = [], []
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert one.structure == two.structure
        assert one.subject != two.subject

        here = in_anatomy(one.scan, np.array(one.centre))
        there = in_anatomy(two.scan, np.array(two.centre))
        anywhere = in_anatomy(two.scan, rng.uniform(0.2, 0.8, 3))
        errors.append(4.0 * np.linalg.norm(here - there))
        random.append(4.0 * np.linalg.norm(here - anywhere))

    # Voxels are 4 mm: two voxels of error are allowed, where a random place is far outside.
    assert np.median(errors) <= 8.0
    assert np.median(random) > 30.0


def test_t10_mirroring_one_image_mirrors_its_places() -> None:
    places = torch.zeros(1, 1, 4, 4, 4)
    # x = 0 of a volume 4 wide becomes x = 3.
    places[0, 0, 1, 2, 0] = 1.0

    mirrored = FlipTranspose((False, False, True)).tensor(places)

    assert mirrored[0, 0].nonzero().tolist() == [[1, 2, 3]]


class Mirrored(Ramp):
    """The ramp, stored with its x axis reversed."""

    def read_padded(self, start, size):  # type: ignore[no-untyped-def]
        z, y, x = start
        first = self.shape_vox[2] - x - size[2]
        crop, valid_mask = super().read_padded((z, y, first), size)
        return crop[..., ::-1], valid_mask[..., ::-1]


def test_t10_the_mirrored_place_of_a_mirrored_scan_shows_the_mirrored_crop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without jitter, zoom and flips the two crops are equal except for the mirror.
    monkeypatch.setattr(members, "JITTER", 0.0)
    still = ("sequence.spatial_share=0", "sequence.flip=false", "sequence.swap_axes=false")
    plan = planned("primus_tiny", *still)
    shape = (20, 24, 20)
    places = (
        # The x axis has 20 voxels, so the mirror of 4.5 is 19 - 4.5 = 14.5.
        StoredLocation("patient 0", Ramp(shape), (9.5, 11.5, 4.5)),  # type: ignore[arg-type]
        StoredLocation("patient 1", Mirrored(shape), (9.5, 11.5, 14.5)),  # type: ignore[arg-type]
    )
    pool = SamplingPool((), (), (Structure("place", (2.0, 2.0, 2.0), places),))

    one, two = SequenceSampler(plan).draw(pool, TRAINING, 0).augmented().voxels

    assert np.array_equal(one, two[..., ::-1])
    assert not np.array_equal(one, two)


# T9: crops at the border.


def test_t9_pairs_are_crops_that_hold_a_part_of_each_scan() -> None:
    plan = planned()
    cases = [Shifted((20, 24, 20), by=float(100 * number)) for number in range(3)]
    # Two opposite corners, where most of a crop lies outside the scan, and the centre.
    corners = [(0.0, 0.0, 0.0), (19.0, 23.0, 19.0), (10.0, 12.0, 10.0)]
    places = tuple(
        StoredLocation(f"patient {number}", case, corner)  # type: ignore[arg-type]
        for number, (case, corner) in enumerate(zip(cases, corners, strict=True))
    )
    pool = SamplingPool((), (), (Structure("place", (2.0, 2.0, 2.0), places),))
    sampler = SequenceSampler(plan)
    for number in range(20):
        sample = sampler.draw(pool, TRAINING, number).augmented()
        assert sample.voxels.shape == (2, 1, 16, 16, 16)
        assert sample.valid_mask.any(axis=(1, 2, 3)).all()


def test_t9_a_sequence_of_one_image_is_compared_with_itself() -> None:
    plan = planned()
    objective = built(plan)

    loss = objective.loss(batch_of(plan, num_members=1))

    # Two samples with one image each: every image has one partner, itself.
    assert loss.total.isfinite()
    assert float(loss.terms["classes"].count) == 2


# T11: centres over all processes.


class Twice:
    """Two processes, of which the other one has three times this one's sums."""

    size = 2

    def add(self, values: Tensor) -> Tensor:
        return values + 3 * values


def test_t11_centres_move_to_the_mean_of_all_processes() -> None:
    plan = planned()
    objective = built(plan)
    scores = torch.linspace(-1, 1, 32)
    # The sums of this process over 2 volumes and 5 tokens.
    statistics = {
        "class_scores": 2 * scores,
        "classes": torch.tensor(2.0),
        "patch_scores": 10 * scores,
        "patches": torch.tensor(5.0),
    }

    objective.after_step(0, Twice(), statistics)

    # Both processes together: 8 scores over 8 volumes, and 40 scores over 20 tokens. A centre
    # moves by 0.1 of the way.
    assert torch.allclose(objective.state.class_centre, 0.1 * scores, atol=1e-6)
    assert torch.allclose(objective.state.patch_centre, 0.1 * 2 * scores, atol=1e-6)


# T12 and health.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t12_validation_measures_health_and_training_continues(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)
    step = TrainingStep(plan, objective, CPU)
    health = Validation(objective, {"semantic": [batch_of(plan)]}, (), CPU).measure()

    assert health is not None
    assert set(health.parts) == {"reconstruction", "classes", "patches"}
    assert {"error", "mean"} == set(health.errors)
    assert health.errors["error"] == health.parts["reconstruction"]
    assert {"teacher_entropy_classes", "centre_norm_patches", "inlier_rate"} <= set(health.own)

    step(0, batch_of(plan))
    assert objective.module.training
    assert not objective.state.teacher.training


def test_a_teacher_that_gives_one_answer_is_collapsed() -> None:
    plan = planned()
    objective = built(plan)
    batch = batch_of(plan)
    validation = Validation(objective, {"semantic": [batch]}, (), CPU)
    well = validation.measure()

    # One prototype is so likely that every token gets it.
    with torch.no_grad():
        objective.state.patch_centre[0] = -1e3
    one = validation.measure()
    # A temperature of 1e6 makes all prototypes equally likely.
    with torch.no_grad():
        objective.state.patch_centre.zero_()
        objective.state.temperature.fill_(1e6)
    all_alike = validation.measure()

    assert well is not None
    assert one is not None
    assert all_alike is not None
    assert not well.own_signs
    assert len(one.own_signs) == 1
    assert "same prototype" in one.own_signs[0]
    assert len(all_alike.own_signs) == 1
    assert "alike" in all_alike.own_signs[0]


# Learning, accumulation, memory, transfer.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_parts_of_a_batch_give_the_same_loss_and_gradient(encoder: str) -> None:
    whole = planned(encoder)
    parts = planned(encoder, "optim.micro_batch_size=1")
    batch = batch_of(whole)

    # Padding makes the numbers of voxels and tokens differ between the samples.
    valid_mask = batch.valid_mask.clone()
    valid_mask[0, :, 8:] = False
    batch = replace(batch, valid_mask=valid_mask, voxels=batch.voxels * valid_mask[:, :, None])

    results = [TrainingStep(p, built(p), CPU)(0, batch) for p in (whole, parts)]

    (loss, norm), (loss_of_parts, norm_of_parts) = results
    assert float(loss) == pytest.approx(float(loss_of_parts), rel=1e-5)
    assert float(norm) == pytest.approx(float(norm_of_parts), rel=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_learns_to_reconstruct(encoder: str) -> None:
    plan = planned(encoder, "optim.lr=3e-3", "optim.num_steps=40", "optim.warmup_steps=2")
    objective = built(plan)
    step = TrainingStep(plan, objective, CPU)
    ramp = torch.linspace(-1, 1, 16)
    batch = batch_of(plan)
    # Hidden parts of a smooth volume can be derived from the visible ones, those of noise cannot.
    smooth = ramp[:, None, None] + ramp[None, :, None] * ramp[None, None, :]
    batch = replace(batch, voxels=smooth.expand_as(batch.voxels).contiguous())

    errors = []
    for number in range(40):
        step(number, batch)
        errors.append(float(step.term_means["reconstruction"]))

    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_teacher_is_in_the_memory_estimate(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)
    student = sum(p.numel() for p in objective.module.parameters())

    memory = plan_memory(plan)

    taught = sum(v.numel() for v in objective.extra.state_dict().values())
    # A trained weight takes 16 bytes in float32: itself, its gradient, two moments. The teacher's
    # take
    # 4.
    assert memory.fixed_bytes > 1.1 * (16 * student + 4 * taught)
    assert memory.sample_bytes > 0


def test_no_more_pairs_are_at_once_than_fit() -> None:
    plan = planned("primus_tiny", "optim.batch_size=8", "optim.micro_batch_size=8")
    plan = replace(plan, reasons={})
    memory = plan_memory(plan)
    # Room for two and a half samples: parts of 2, so 8 samples take 4 parts.
    room_gib = (memory.fixed_bytes + 2.5 * memory.sample_bytes) / GIB
    hardware = Hardware("cuda", room_gib / Hardware("cuda", 1.0).usable_share)

    fitting = with_fitting_parts(plan, hardware, half=True)
    roomy = with_fitting_parts(plan, Hardware("cuda", 1000.0), half=True)

    assert fitting.optim == replace(plan.optim, micro_batch_size=2)

    assert "4 times a step" in fitting.reasons["optim.micro_batch_size"]
    assert roomy == plan


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("export", ["student", "teacher"])
def test_the_exported_weights_have_the_downstream_keys(encoder: str, export: str) -> None:
    objective = built(planned(encoder, f"objective.export={export}"))
    # Zeros mark the teacher's weights.
    with torch.no_grad():
        for parameter in objective.state.teacher.parameters():
            parameter.zero_()

    state = objective.transferable_state()

    is_transformer = encoder == "primus_tiny"
    prefixes = ("down_projection.", "eva.") if is_transformer else ("encoder.", "decoder.")
    assert state
    assert all(key.startswith(prefixes) for key in state)
    all_zero = all(not value.any() for value in state.values())
    assert all_zero == (export == "teacher")


def test_the_images_of_a_pair_are_shown_side_by_side() -> None:
    objective = built(planned())
    pair = batch_of(objective.plan, 1)
    single = batch_of(objective.plan, 1, num_members=1)

    spacing = objective.plan.data.spacing_mm
    of_pair, of_one = validation_pictures(objective, [pair, single], CPU, spacing)

    assert len(of_pair.images) == 2
    assert of_one.images == ()
    for member, planes in enumerate(of_pair.images):
        # Shown as radiologists view scans, from the opposite ends.
        volume_ZYX = pair.voxels[0, member, 0].flip(0, 1, 2)
        assert torch.equal(torch.tensor(planes[0].truth.copy()), volume_ZYX[8])
        assert torch.equal(torch.tensor(planes[2].truth.copy()), volume_ZYX[:, :, 8])
    assert 'alt="image,' in plain_panel(of_pair.images[1][0])


def test_describe_and_pictures_have_the_shapes_of_the_batch() -> None:
    for encoder in ENCODERS:
        plan = planned(encoder)
        objective = built(plan)
        objective.module.eval()
        batch = batch_of(plan)
        with torch.no_grad():
            features = objective.describe(batch)
            made = objective.reconstruct(batch)

        assert features.features.shape[:2] == features.valid.shape == batch.order_index.shape
        assert made.predicted.shape == made.given.shape == batch.valid_mask.shape
        # Every voxel was either given to the network or counts in the loss, never both.
        assert not (made.given & made.loss_mask).any()
        assert (made.given | made.loss_mask).all()
