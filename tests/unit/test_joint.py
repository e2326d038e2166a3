"""Joint 2D/3D clustering: views, slabs, attention over them, clusters, banks, collapse, transfer.

The numbers T1 to T11 are those of the method's specification.
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import load_file
from sequence_cases import Ramp, Shifted, narrow, plan_for
from torch import Tensor
from torch.nn import functional

from nnunet_autoreg import checkpoint
from nnunet_autoreg.errors import AutoregError, PlanError
from nnunet_autoreg.geometry import grid_of, volume
from nnunet_autoreg.model.sizes import encoder_size
from nnunet_autoreg.objective_kinds import kind_of, with_objective
from nnunet_autoreg.objectives.clusters import balance_of, codes_of, swapped_losses
from nnunet_autoreg.objectives.joint import Joint, hidden_loss
from nnunet_autoreg.objectives.joint_networks import SlabAttention, VolumeHead, scores_of
from nnunet_autoreg.objectives.joint_plan import JointPlan, joint_of
from nnunet_autoreg.objectives.joint_slabs import IMAGES, SLABS, hidden_slabs, slabs_in
from nnunet_autoreg.objectives.registry import build_objective
from nnunet_autoreg.plan import Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.pretrain.checkpointing import (
    Progress,
    load_initial_weights,
    restore,
    snapshot,
)
from nnunet_autoreg.pretrain.data import StepBatches, micro_batches, training_batches
from nnunet_autoreg.pretrain.distributed import SINGLE_PROCESS
from nnunet_autoreg.pretrain.dry_run import plan_memory
from nnunet_autoreg.pretrain.trainer import Trainer
from nnunet_autoreg.pretrain.training_step import TrainingStep
from nnunet_autoreg.pretrain.validation import Validation
from nnunet_autoreg.report.galleries import galleries_of, html_of
from nnunet_autoreg.report.view_preview import draw_views
from nnunet_autoreg.sampling.pool import SamplingPool
from nnunet_autoreg.sampling.sample import Batch, Sample, collate
from nnunet_autoreg.sampling.sampler import TRAINING, VALIDATION, SequenceSampler
from nnunet_autoreg.sampling.views import draw, in_plane, num_slabs, slab_size

CPU = torch.device("cpu")
SHAPE_VOX = (48, 48, 40)
ENCODERS = ("primus_tiny", "resenc_tiny")
# Small enough for a CPU: crops of 16 voxels with slabs of 8 at steps of 4, so three in a crop.
SMALL = (
    "objective.width=16",
    "objective.num_heads=2",
    "objective.depth=1",
    "objective.slab_vox=8",
    "objective.slab_step_vox=4",
    "objective.num_slab_clusters=8",
    "objective.num_volume_clusters=4",
    "objective.slabs_first=0",
    "sequence.crop_size_vox=[16,16,16]",
    "sequence.block_tokens=[1,1,1]",
    "optim.warmup_steps=1",
)


def planned(encoder: str = "primus_tiny", *settings: str, images: int = 6) -> Plan:
    plan = plan_for(encoder, SHAPE_VOX)
    plan = kind_of("joint").fit(with_objective(plan, "joint"), 4, images)
    return check(override(plan, [*SMALL, *narrow(encoder), *settings]))


def built(plan: Plan) -> Joint:
    torch.manual_seed(0)
    objective = build_objective(plan)
    assert isinstance(objective, Joint)
    objective.begin()
    return objective


def pool(num_volumes: int = 4, num_images: int = 6) -> SamplingPool:
    volumes = [Shifted((20, 24, 20), by=float(9000 * n)) for n in range(num_volumes)]
    images = [Ramp((1, 30 + n, 28)) for n in range(num_images)]
    return SamplingPool(tuple(volumes), images=tuple(images))  # type: ignore[arg-type]


def batch_of(plan: Plan, kind: str = "views", step: int = 0, num_samples: int = 2) -> Batch:
    """A batch as training loads it, with voxels of mean 0 and deviation 1."""
    plan = replace(plan, sequence=replace(plan.sequence, weights={kind: 1.0}))
    sampler = SequenceSampler(plan)
    batch = collate([sampler.draw(pool(), TRAINING, step, i) for i in range(num_samples)]).to(CPU)
    voxels = (batch.voxels - batch.voxels.mean()) / batch.voxels.std()
    return replace(batch, voxels=voxels)


def moved(objective: Joint, before: dict[str, Tensor]) -> set[str]:
    state = objective.module.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, state[name])}


def settings_of(**values: Any) -> JointPlan:
    return JointPlan("joint", **{"width": 16, "num_heads": 2, "depth": 2, **values})


# What is planned.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_views_slabs_and_clusters_are_planned_for_the_scans(encoder: str) -> None:
    size = encoder_size(encoder)
    plan = plan_for(encoder, SHAPE_VOX)

    plan = check(kind_of("joint").fit(with_objective(plan, "joint"), 100, 300))

    # One cluster for 8 rows: 100 volumes of four slabs and 300 images are 700 rows, 700 / 8 = 87
    # and 100 / 8 = 12. The bank holds all 400 cases.
    settings = joint_of(plan)
    assert plan.sequence.weights == {"views": 1.0, "images": 0.5}
    assert settings.slab_vox % size.token_size[0] == 0
    assert settings.slab_step_vox * 2 == settings.slab_vox
    assert num_slabs(plan) >= 2
    assert (settings.num_slab_clusters, settings.num_volume_clusters) == (87, 12)
    assert settings.bank_cases == 400


def test_thin_volumes_get_slabs_of_two_slices() -> None:
    plan = planned(
        "resenc_tiny",
        "encoder.arguments.strides=[[1,1,1],[1,2,2],[1,2,2],[1,2,2]]",
        "encoder.token_size_vox=[1,8,8]",
        "objective.slab_vox=2",
        "objective.slab_step_vox=1",
        "sequence.crop_size_vox=[8,16,16]",
    )

    again = with_objective(plan, "joint")

    assert joint_of(again).slab_vox == 2
    # Slabs of two slices begin at slices 0 to 6 of a crop of eight.
    assert num_slabs(again) == 7


@pytest.mark.parametrize(
    ("setting", "code", "value"),
    [
        # A slab as deep as the crop, one that is not a multiple of the token, and a step that does
        # not divide it.
        ("objective.slab_vox=16", "plan-slabs", "16"),
        ("objective.slab_vox=12", "plan-slabs", "12"),
        ("objective.slab_step_vox=3", "plan-slabs", "3"),
        ("objective.hidden_share=0", "plan-out-of-range", "hidden_weight=0"),
        ("objective.num_volume_clusters=1", "plan-out-of-range", "1"),
        ("objective.width=15", "plan-out-of-range", "15"),
        ("objective.corruption=0.5", "plan-ill-posed", "intensity_share"),
        ('sequence.weights={"spatial":1}', "plan-unknown-kind", "spatial"),
    ],
)
def test_impossible_values_are_refused(setting: str, code: str, value: str) -> None:
    with refused(PlanError, code, value):
        planned("primus_tiny", setting)


def test_other_objectives_draw_no_views() -> None:
    plan = with_objective(planned(), "masked")

    with refused(PlanError, "plan-unknown-kind", "views"):
        check(override(plan, ['sequence.weights={"views":1}']))


# Views.


def test_two_views_show_the_same_slices_each_changed_in_its_plane() -> None:
    # Intensities stay as they are, and with them the numbers by which a voxel is found again.
    plan = planned("primus_tiny", "objective.intensity_share=0", "sequence.spatial_share=0")
    sampler = SequenceSampler(plan)
    case = Ramp((20, 24, 20))
    slice_vox = 24 * 20

    for number in range(8):
        generator = torch_free_generator(number)
        only_case = SamplingPool((case,))  # type: ignore[arg-type]
        sample, _ = sampler.draw_kind("views", only_case, generator)
        first, second = collate([sample]).to(CPU).voxels[0, :, 0]

        # The raster index shows in which slice of the case a voxel lies.
        slices = [((view - 1) / slice_vox).floor().amax(dim=(1, 2)) for view in (first, second)]
        assert torch.equal(*slices)
        assert len(slices[0].unique()) == 16
        assert not torch.equal(first, second)


def torch_free_generator(number: int) -> Any:
    from nnunet_autoreg import rng

    return rng.generator(3, "test", number)


def test_a_2d_image_is_the_same_in_every_slice_of_its_slab() -> None:
    plan = planned()

    batch = batch_of(plan, "images")

    assert batch.voxels.shape[2:] == (1, *slab_size(plan))
    assert torch.equal(batch.voxels, batch.voxels[:, :, :, :1].expand_as(batch.voxels))
    assert batch.valid_mask.any(dim=(2, 3, 4)).all()
    assert not torch.equal(batch.voxels[:, 0], batch.voxels[:, 1])


def test_mirrored_and_transposed_views_hold_exactly_the_voxels_of_the_case() -> None:
    plan = planned("primus_tiny", "objective.intensity_share=0", "sequence.spatial_share=0")
    case = Ramp((16, 16, 16))
    whole = torch.from_numpy(case.read_padded((0, 0, 0), (16, 16, 16))[0][0])

    found = set()
    for number in range(24):
        generator = torch_free_generator(number)
        sample, _ = SequenceSampler(plan).draw_kind(
            "views",
            SamplingPool((case,)),
            generator,  # type: ignore[arg-type]
        )
        view = collate([sample]).to(CPU).voxels[0, 0, 0]
        # Three flips and one swap within the plane: 16 ways to store the case.
        for z, y, x, swap in itertools.product((0, 1), repeat=4):
            axes = [axis for axis, flip in enumerate((z, y, x)) if flip]
            other = whole.transpose(1, 2) if swap else whole
            # Neighbouring voxels differ by 1.
            if torch.allclose(view, other.flip(axes), atol=0.02):
                found.add((z, y, x, swap))
                break
        else:
            pytest.fail("a view that is not a mirrored or transposed case")
    assert len(found) > 8


def test_rotations_keep_lengths_in_mm() -> None:
    # Voxels of 5 x 2 x 1 mm, turned by 90 degrees in the plane.
    affine = in_plane(90.0, 1.0, (False, False), False, 1.0, (5.0, 2.0, 1.0))

    _, (_, yy, yx), (_, xy, xx) = affine.matrix
    # A step of one pixel along x (1 mm) becomes half a pixel along y (2 mm).
    assert (abs(yy), abs(xx)) == (pytest.approx(0, abs=1e-9),) * 2
    assert abs(yx) == pytest.approx(0.5)
    assert abs(xy) == pytest.approx(2.0)


# T1 and T2: attention over slabs.


def test_t1_a_slab_sees_other_slabs_with_weights_for_any_number_of_them() -> None:
    torch.manual_seed(0)
    head = VolumeHead(settings_of()).eval()
    for number in (4, 9):
        slabs = functional.normalize(torch.randn(1, number, 16), dim=-1)
        other = slabs.clone()
        other[0, 1] = functional.normalize(torch.randn(16), dim=-1)
        valid = torch.ones(1, number, dtype=torch.bool)

        before = head(slabs, valid)
        after = head(other, valid)

        # The slab before the last changed; the last can only notice by attention.
        assert before.shape == slabs.shape
        assert not torch.allclose(before[0, number - 1], after[0, number - 1], atol=1e-5)


def test_t2_without_offsets_it_is_ordinary_attention_with_a_bias() -> None:
    torch.manual_seed(0)
    attention = SlabAttention(settings_of(key_every=1)).eval()
    torch.nn.init.zeros_(attention.to_offset.weight)
    slabs = torch.randn(2, 6, 16)
    valid = torch.ones(2, 6, dtype=torch.bool)

    found = attention(slabs, valid)

    # The same by torch: two heads of width 8, (B, heads, slabs, 8).
    query, key, value = (
        layer(slabs).reshape(2, 6, 2, 8).transpose(1, 2)
        for layer in (attention.query, attention.key, attention.value)
    )
    place = torch.arange(6.0).expand(2, 2, 6)
    bias = attention.bias(place, 6)
    # A bias of zeros would not show whether it is used.
    assert bias.abs().max() > 0
    plain = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    expected = attention.project(plain.transpose(1, 2).flatten(2))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 4])
def test_offsets_move_keys_within_the_volume_and_are_learnt(every: int) -> None:
    torch.manual_seed(0)
    attention = SlabAttention(settings_of(key_every=every))
    slabs = torch.randn(1, 9, 16)
    valid = torch.ones(1, 9, dtype=torch.bool)
    places = attention.places(attention._heads(attention.query(slabs)))

    attention(slabs, valid).square().sum().backward()

    assert places.shape == (1, 2, 9 // every)
    assert places.min() >= 0
    assert places.max() <= 8
    assert attention.to_offset.weight.grad is not None
    assert attention.to_offset.weight.grad.abs().max() > 0
    # One slab has nothing to look at but itself.
    single = attention(slabs[:, :1], valid[:, :1])
    assert single.isfinite().all()


def test_padded_slabs_are_not_keys() -> None:
    torch.manual_seed(0)
    head = VolumeHead(settings_of()).eval()
    slabs = functional.normalize(torch.randn(1, 8, 16), dim=-1)
    valid = torch.tensor([[True] * 5 + [False] * 3])
    other = slabs.clone()
    other[0, 5:] = functional.normalize(torch.randn(3, 16), dim=-1)

    assert torch.allclose(head.embed(slabs, valid), head.embed(other, valid), atol=1e-4)


# T3: hidden slabs.


def test_t3_hidden_predictions_have_a_gradient_and_the_target_has_none() -> None:
    predicted = torch.randn(2, 5, 8, requires_grad=True)
    target = torch.randn(2, 5, 8, requires_grad=True)
    hidden = torch.zeros(2, 5, dtype=torch.bool)
    hidden[0, 1] = hidden[1, 3] = True

    loss = hidden_loss(predicted, target, hidden)
    loss.backward()

    assert target.grad is None
    assert predicted.grad is not None
    assert torch.equal(predicted.grad.abs().sum(dim=2) > 0, hidden)
    # One minus the cosine, over the two hidden slabs.
    expected = 0.0
    for b, r in ((0, 1), (1, 3)):
        expected += 1 - torch.cosine_similarity(predicted[b, r], target[b, r], dim=0).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("valid", "share", "number"),
    # 10 * 0.2, 9 * 0.3 rounded, at least one, and none if it would be the only one.
    [(10, 0.2, 2), (9, 0.3, 3), (2, 0.1, 1), (1, 0.9, 0)],
)
def test_t3_the_planned_number_of_slabs_is_hidden(valid: int, share: float, number: int) -> None:
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[:, :valid] = True
    order = torch.stack([torch.randperm(10) for _ in range(3)])

    hidden = hidden_slabs(mask, order, share)

    assert hidden.sum(dim=1).tolist() == [number] * 3
    assert not (hidden & ~mask).any()


# T4: places in the bank.


def test_t4_cases_of_two_datasets_and_images_have_separate_places() -> None:
    plan = planned()
    sampler = SequenceSampler(plan)
    seen: dict[int, set[str]] = {}
    for step, number in itertools.product(range(30), range(2)):
        kind = sampler.kind(pool(), TRAINING, step)
        sample = sampler.draw(pool(), TRAINING, step, number)
        assert sample.case_id is not None
        seen.setdefault(sample.case_id, set()).add(kind)

    # Four volumes (two of each dataset) and six images.
    assert set(seen) == set(range(10))
    for case, kinds in seen.items():
        assert kinds == ({"views"} if case < 4 else {"images"})


def test_t4_the_bank_holds_each_case_at_its_own_place() -> None:
    plan = planned()
    objective = built(plan)
    batch = batch_of(plan)
    assert batch.case_ids is not None

    objective.after_step(0, SINGLE_PROCESS, objective.loss(batch).statistics)

    known = objective.state.volume_known.nonzero()[:, 0].tolist()
    assert known == sorted(set(batch.case_ids.tolist()))
    with_slabs = objective.state.slab_known.any(dim=1).nonzero()[:, 0]
    assert with_slabs.tolist() == known
    # Embeddings are directions: of length 1.
    lengths = objective.state.slab_bank[objective.state.slab_known].norm(dim=1)
    assert torch.allclose(lengths, torch.ones_like(lengths), atol=1e-5)


# T5 and T6: clusters.


def test_t5_planted_clusters_are_found_and_none_stays_empty() -> None:
    torch.manual_seed(0)
    # Fifty directions around each of four centres.
    centres = functional.normalize(torch.randn(4, 16), dim=-1)
    truth = torch.arange(200) % 4
    bank = functional.normalize(centres[truth] + 0.1 * torch.randn(200, 16), dim=-1)
    prototypes = torch.nn.Parameter(functional.normalize(torch.randn(4, 16), dim=-1))
    optimizer = torch.optim.Adam([prototypes], lr=0.05)

    for _ in range(60):
        scores = scores_of(bank, prototypes)
        balance = balance_of(scores.detach(), 0.05)
        first, second = swapped_losses(scores, scores, balance, 0.05, 0.1)
        optimizer.zero_grad()
        (first + second).mean().backward()
        optimizer.step()

    scores = scores_of(bank, prototypes).detach()
    found = codes_of(scores, balance_of(scores, 0.05), 0.05).argmax(dim=1)
    assert found.unique().numel() == 4
    assert adjusted_rand_index(truth, found) > 0.95


def adjusted_rand_index(first: Tensor, second: Tensor) -> float:
    # 1 for the same groups under any names, 0 on average by chance.
    """Source: Hubert and Arabie 1985, J. Classification 2:193."""
    table = torch.zeros(4, 4)
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        table[a, b] += 1

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    both = pairs(table)
    rows = pairs(table.sum(dim=1))
    columns = pairs(table.sum(dim=0))
    total = len(first) * (len(first) - 1) / 2
    expected = rows * columns / total
    return (both - expected) / ((rows + columns) / 2 - expected)


def test_t6_codes_sum_to_one_and_all_clusters_are_equally_large() -> None:
    torch.manual_seed(0)
    scores = scores_of(functional.normalize(torch.randn(300, 8), dim=-1), torch.randn(12, 8))

    codes = codes_of(scores, balance_of(scores, 0.05, iterations=100), 0.05)

    # 300 embeddings over 12 clusters are 25 each; rows are exact, columns after 100 iterations
    # nearly.
    assert torch.allclose(codes.sum(dim=1), torch.ones(300), atol=1e-5)
    assert torch.allclose(codes.sum(dim=0), torch.full((12,), 25.0), rtol=0.01)


class Recorded:
    """The other process of two, whose rows were recorded before."""

    size = 2

    def __init__(self, others: list[Tensor]):
        self.others = list(others)

    def add(self, values: Tensor) -> Tensor:
        return values + self.others.pop(0)


def test_t6_one_process_and_two_agree_on_banks_and_balance() -> None:
    plan = planned()
    alone = built(plan)
    together = built(plan)
    batch = batch_of(plan)
    first, second = micro_batches(batch, 1)

    alone.after_step(0, SINGLE_PROCESS, alone.loss(batch).statistics)
    # Each process has half of the batch; the second one's sums are recorded and added by the first.
    rows = [together.loss(part).statistics for part in (first, second)]
    together.after_step(0, Recorded(list(rows[1].values())), rows[0])

    for name, value in alone.extra_state().items():
        assert torch.allclose(value, together.extra_state()[name], atol=1e-5), name


# T7: augmentation.


def test_t7_a_case_looks_different_each_time_in_any_process() -> None:
    plan = planned()
    one_case = replace(pool(), cases=pool().cases[:1], images=())
    only = replace(plan, sequence=replace(plan.sequence, weights={"views": 1.0}))
    batches = StepBatches(SequenceSampler(only), one_case, range(1))

    here = list(training_batches(batches, range(3), 0, False))
    elsewhere = list(training_batches(batches, range(3), 1, False))

    crops = [batch.to(CPU).voxels for batch in here]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(crops, 2))
    for mine, theirs in zip(crops, elsewhere, strict=True):
        assert torch.equal(mine, theirs.to(CPU).voxels)


# T8: swapped views.


def test_t8_each_view_learns_the_code_of_the_other_one() -> None:
    torch.manual_seed(0)
    first, second = (torch.randn(5, 6, requires_grad=True) for _ in range(2))
    balance = torch.randn(6)

    of_first, of_second = swapped_losses(first, second, balance, 0.5, 0.1)
    of_first.sum().backward()

    # The code of the other view is a target: without a gradient.
    # Without the second view's own learning, only the first view has a gradient.
    assert second.grad is None
    assert first.grad is not None
    code = (second.detach() / 0.5 + balance).softmax(dim=1)
    expected = -(code * (first.detach() / 0.1).log_softmax(dim=1)).sum(dim=1)
    assert torch.allclose(of_first.detach(), expected, atol=1e-6)
    assert not torch.allclose(of_first.detach(), of_second.detach())


# T9: images.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t9_images_train_the_encoder_and_no_attention_over_slabs(encoder: str) -> None:
    plan = planned(encoder)
    objective = built(plan)
    before = {name: value.clone() for name, value in objective.module.state_dict().items()}

    step = TrainingStep(plan, objective, CPU)
    step(0, batch_of(plan, "images"))

    changed = moved(objective, before)
    # An image is a single slab: there is nothing to attend to.
    assert set(step.term_means) == {"slabs"}
    assert "prototypes" in changed
    assert "project.1.weight" in changed
    assert any(name.startswith("backbone.") for name in changed)
    assert not any(name.startswith("volume_head.") for name in changed)

    step(1, batch_of(plan, "views"))

    assert any(name.startswith("volume_head.") for name in moved(objective, before))
    assert set(step.term_means) == {"slabs", "volumes", "hidden"}


def test_only_slabs_are_clustered_first_and_the_other_terms_rise() -> None:
    plan = planned("primus_tiny", "objective.slabs_first=0.2")
    objective = built(plan)
    step = TrainingStep(plan, objective, CPU)

    terms = []
    shares = []
    for number in range(5):
        shares.append(objective.state.phase_in)
        loss, _ = step(number, batch_of(plan, step=number))
        means = {name: float(mean) for name, mean in step.term_means.items()}
        others = sum(value for name, value in means.items() if name != "slabs")
        assert float(loss) == pytest.approx(means["slabs"] + shares[-1] * others, rel=1e-5)
        terms.append(set(means))

    # 0.2 of ten steps are two. The share rises in the two after them: number / 2 - 1.
    assert shares == pytest.approx([0, 0, 0, 0.5, 1])
    assert terms == [{"slabs"}] * 3 + [{"slabs", "volumes", "hidden"}] * 2


# T10, T11 and resuming.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_t10_all_state_survives_and_training_continues_the_same(
    tmp_path: Path,
    encoder: str,
) -> None:
    plan = planned(encoder, "objective.slabs_first=0.2")
    objective = built(plan)
    step = TrainingStep(plan, objective, CPU)
    kinds = ("views", "images", "views", "views", "images")
    for number in range(3):
        step(number, batch_of(plan, kinds[number], number))
    path = tmp_path / checkpoint.LATEST_NAME
    state = snapshot(objective, step.optimizer, step.guard, Progress(3))
    checkpoint.save_checkpoint(path, {**state, "plan": {}, "scheduled": True}, None)

    # Other random weights, all of which the checkpoint must replace.
    torch.manual_seed(99)
    other = build_objective(plan)
    resumed = TrainingStep(plan, other, CPU)
    restore(checkpoint.load_checkpoint(path), other, resumed.optimizer, resumed.guard)

    assert {"project.1.weight", "volume_head.mask_token"} <= set(state["network_weights"])
    for number in range(3, 5):
        batch = batch_of(plan, kinds[number], number)
        loss, _ = step(number, batch)
        resumed_loss, _ = resumed(number, batch)
        assert torch.equal(loss, resumed_loss)
    for mine, theirs in ((objective.module, other.module), (objective.extra, other.extra)):
        for name, value in mine.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[name]), name


def test_t11_another_number_of_processes_keeps_the_bank() -> None:
    plan = planned()
    objective = built(plan)
    objective.after_step(0, SINGLE_PROCESS, objective.loss(batch_of(plan)).statistics)
    kept = {name: value.clone() for name, value in objective.extra_state().items()}

    other = build_objective(plan)
    other.load_extra_state(kept)
    batch = batch_of(plan, "images", 1)
    first, second = (other.loss(part).statistics for part in micro_batches(batch, 1))
    other.after_step(1, Recorded(list(second.values())), first)

    # Volumes stay where they were; the images are added at other places.
    assert torch.equal(other.extra_state()["volume_bank"], kept["volume_bank"])
    assert batch.case_ids is not None
    places = {int(case) for case in batch.case_ids}
    assert all(bool(other.extra_state()["slab_known"][place, 0]) for place in places)


# Parts of a batch, learning, health, collapse, memory, transfer.


@pytest.mark.parametrize("encoder", ENCODERS)
def test_parts_of_a_batch_give_the_same_loss_gradient_and_banks(encoder: str) -> None:
    whole = planned(encoder)
    parts = planned(encoder, "optim.micro_batch_size=1")
    batch = batch_of(whole)
    # Padding makes the numbers of slabs differ between the samples.
    valid_mask = batch.valid_mask.clone()
    valid_mask[0, :, 8:] = False
    batch = replace(batch, valid_mask=valid_mask, voxels=batch.voxels * valid_mask[:, :, None])

    results = []
    states = []
    for plan in (whole, parts):
        objective = built(plan)
        results.append(TrainingStep(plan, objective, CPU)(0, batch))
        states.append(objective.extra_state())

    (loss, norm), (loss_of_parts, norm_of_parts) = results
    # Sums of parts in another order; the bank holds quotients of such sums.
    assert float(loss) == pytest.approx(float(loss_of_parts), rel=1e-5)
    assert float(norm) == pytest.approx(float(norm_of_parts), rel=1e-4)
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], atol=1e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_it_learns_to_agree_and_health_is_measured(encoder: str) -> None:
    plan = planned(encoder, "optim.lr=3e-3", "optim.num_steps=40", "optim.warmup_steps=2")
    objective = built(plan)
    step = TrainingStep(plan, objective, CPU)
    sampler = SequenceSampler(plan)
    samples = [sampler.draw(pool(), VALIDATION, number) for number in range(4)]
    # Crops of volumes are 16 deep, slabs of images 8.
    batches = {"views": [by_shape(samples, 16)], "images": [by_shape(samples, 8)]}
    validation = Validation(objective, batches, (), CPU)

    losses = []
    for number in range(30):
        step(number, batch_of(plan, ("views", "images")[number % 2], number % 4))
        losses.append(float(step.term_means["slabs"]))
    health = validation.measure()

    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert health is not None
    assert set(health.parts) == {"slabs", "volumes", "hidden"}
    # Eight equally likely clusters: log 8.
    assert set(health.errors) == {"error", "uniform"}
    assert health.errors["uniform"] == pytest.approx(torch.log(torch.tensor(8.0)).item(), rel=1e-4)
    assert {"cluster_entropy", "code_entropy", "slab_spread", "empty_clusters"} <= set(health.own)
    assert not health.own_signs


def by_shape(samples: list[Sample], depth: int) -> Batch:
    batch = collate([sample for sample in samples if sample.voxels.shape[2] == depth]).to(CPU)
    # Raster indices go up to tens of thousands.
    return replace(batch, voxels=batch.voxels / 5000)


def test_embeddings_that_are_all_alike_are_a_collapse() -> None:
    plan = planned()
    objective = built(plan)
    batch = batch_of(plan)
    validation = Validation(objective, {"views": [replace(batch, numbers=None)]}, (), CPU)
    well = validation.measure()

    # Without weights all projections are the bias.
    with torch.no_grad():
        objective.trained.project[1].weight.zero_()
    objective.after_step(0, SINGLE_PROCESS, objective.loss(batch).statistics)
    alike = validation.measure()

    # A balance that prefers one cluster so much that every slab falls into it.
    with torch.no_grad():
        objective.state.slab_balance[0] = 1e3
    same = validation.measure()

    assert well is not None
    assert alike is not None
    assert same is not None
    assert not well.own_signs
    assert "projections of all slabs are alike" in alike.own_signs[0]
    assert "same clusters" in same.own_signs[-1]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_banks_are_in_the_memory_estimate(encoder: str) -> None:
    few, many = (planned(encoder, f"objective.bank_cases={n}") for n in (1, 100_000))

    first = plan_memory(few)
    second = plan_memory(many)

    # Float32 rows of width 16: four slabs and the volume of every case.
    row_bytes = 4 * 16 * 5
    assert second.fixed_bytes - first.fixed_bytes > 99_999 * row_bytes
    assert first.sample_bytes > 0


@pytest.mark.parametrize("encoder", ENCODERS)
def test_only_the_encoder_is_exported_under_the_downstream_keys(encoder: str) -> None:
    objective = built(planned(encoder))

    state = objective.transferable_state()
    adaptation = objective.adaptation()

    is_transformer = encoder == "primus_tiny"
    prefixes = ("down_projection.", "eva.") if is_transformer else ("encoder.",)
    assert state
    assert all(key.startswith(prefixes) for key in state)
    assert adaptation.keys_to_decoder == ()
    if is_transformer:
        # The positions are those of the whole crop, and every one is drawn for some slab.
        grid = grid_of((16, 16, 16), (8, 8, 8))
        assert state["eva.pos_embed"].shape[1] == volume(grid)


def test_describe_has_the_shapes_of_volumes_and_images() -> None:
    for encoder, kind in itertools.product(ENCODERS, ("views", "images")):
        plan = planned(encoder)
        objective = built(plan)
        objective.module.eval()
        batch = batch_of(plan, kind)

        with torch.no_grad():
            features = objective.describe(batch)

        # Two views of each sample.
        tokens = 2 * volume(grid_of(batch.voxels.shape[3:], plan.encoder.token_size_vox))
        assert features.features.shape[:2] == features.valid.shape == (2, tokens)
        assert features.positions.shape == (2, tokens)
        assert features.features.isfinite().all()


def test_the_positions_of_slabs_are_drawn_and_say_nothing_of_their_place() -> None:
    plan = planned()
    generator = torch_free_generator(0)
    windows = {
        draw(plan, (20, 24, 20), (2.0, 2.0, 2.0), generator, False).window for _ in range(30)
    }
    objective = built(plan)

    slabs = slabs_in(batch_of(plan), objective.plan)

    # A crop has two layers of tokens and a slab one, so there are two windows.
    assert windows == {0, 1}
    # If positions showed where a slab lies, clusters could be those of positions.
    of_views = slabs.positions.reshape(2, -1, slabs.positions.shape[1])
    assert torch.equal(of_views, of_views[:, :1].expand_as(of_views))


def test_the_report_shows_slabs_and_images_nearest_to_prototypes() -> None:
    plan = planned()
    objective = built(plan)
    batches = [batch_of(plan, kind) for kind in ("views", "images")]
    objective.module.train()

    galleries = galleries_of(objective, batches, CPU)

    # Six galleries of four pictures each are 24 pictures.
    assert len(galleries) == 6
    assert all(len(one.slices) == 4 for one in galleries)
    captions = set()
    for one in galleries:
        for text, values in one.slices:
            captions.add(text.split(",")[0])
            assert values.shape == (16, 16)
    assert captions == {"volume", "2D image"}
    # The network is as before: in training mode.
    assert objective.module.training
    page = html_of(galleries)
    assert page.count("<img") == 24
    assert galleries[0].title in page


def test_both_views_of_a_few_samples_are_pictured(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "sequences.png"

    assert draw_views(path, planned(), pool()) == 6
    with Image.open(path) as picture:
        assert picture.size[0] == 1200
        assert picture.size[1] > 1000


def test_it_starts_from_other_weights(tmp_path: Path, write_run: Any) -> None:
    folder = write_run(tmp_path, "start", crop=(16, 16, 16))
    weights = folder / "encoder.safetensors"
    plan = replace(planned(), request={"init": str(weights)})
    objective = built(plan)

    load_initial_weights(objective.network, plan, tmp_path)

    state = objective.transferable_state()
    expected = load_file(weights)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_a_run_whose_embeddings_stay_alike_stops(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nnunet_autoreg.pretrain.trainer.draw_progress", lambda *_: None)
    # A rate so small that the collapse cannot heal.
    often = ("run.validate_every=1", "run.max_collapsed=2", "optim.lr=1e-12")
    plan = planned("primus_tiny", *often, "optim.warmup_steps=1", "run.log_every=1")
    objective = built(plan)
    with torch.no_grad():
        objective.trained.project[1].weight.zero_()
    trainer = Trainer(plan, tmp_path, objective, pool(), pool(2, 2), CPU, num_workers=0)

    with refused(AutoregError, "training-collapsed", "after step 4", "projections of all slabs"):
        trainer.run()


def test_embeddings_are_standardised_by_the_statistics_of_their_kind() -> None:
    plan = planned()
    objective = built(plan)
    batch = batch_of(plan)
    slabs = slabs_in(batch, objective.plan)
    projected = objective._projected(slabs).detach()
    rows = projected.flatten(0, 2)

    objective.after_step(0, SINGLE_PROCESS, objective.loss(batch).statistics)

    state = objective.state
    assert torch.allclose(state.mean[SLABS], rows.mean(dim=0), atol=1e-5)
    # Of all that were seen, so without the correction for a sample.
    assert torch.allclose(state.deviation[SLABS], rows.std(dim=0, correction=0), atol=1e-4)
    assert not state.mean[IMAGES].any()
    assert bool((state.deviation[IMAGES] == 1).all())
    assert state.num_measured.tolist() == [1, 0, 1]
    # What all have in common is gone, so that embeddings point in all directions.
    embedded = objective.state.standardised(projected, SLABS).flatten(0, 2)
    assert float(embedded.mean(dim=0).norm()) < 0.3


def test_statistics_follow_as_a_running_mean() -> None:
    plan = planned()
    objective = built(plan)
    means = []
    for number in range(12):
        # Sums and sums of squares over 16 features of two embeddings, and their number.
        moments = torch.zeros(33)
        moments[:16] = 2.0 * number
        moments[16:32] = 4.0 * number
        moments[32] = 2.0
        objective.state.measure(SLABS, moments)
        means.append(float(objective.state.mean[SLABS, 0]))

    # The exact mean of 0, 1 and 2 at first, and then a new value counts for a tenth.
    assert means[:3] == pytest.approx([0, 0.5, 1])
    assert means[11] == pytest.approx(0.9 * means[10] + 0.1 * 11)
