"""Alice: a student and a momentum teacher on crops of the same anatomy in two patients.

The student is shown a quarter of the blocks of each crop, the teacher all of them. Three losses
train the student:

- between the images: the student's view of one patient has to match the teacher's view of the
  other ("classes": scores of prototypes, from the mean of the tokens);
- within an image: each visible token, after attention to the student's decoder, has to match the
  same token after attention to the teacher's tokens ("patches", through CASA);
- reconstruction of the hidden voxels.

The teacher is a running mean of the student. Its scores are centred and sharpened, which keeps it
from giving all images the same answer or every answer equally often. The paper finds pairs by a
network that was trained elsewhere; here semantic sequences give them. A batch whose sequences have
one image is trained too: each image is then compared with itself.

"Classes" and "patches" are named after the heads of DINO: scores of prototypes for a whole volume
and for one token.

Shape suffixes: as in ``alice_networks`` and ``alice_crops``.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nnunet_autoreg.geometry import as_size, grid_of, volume
from nnunet_autoreg.model.card import Adaptation
from nnunet_autoreg.model.parameters import whole
from nnunet_autoreg.model.sequence import from_tokens, to_tokens
from nnunet_autoreg.objectives.alice_crops import Crops, crops_of, student_voxels
from nnunet_autoreg.objectives.alice_matches import match_counts
from nnunet_autoreg.objectives.alice_networks import AliceNetwork, Casa
from nnunet_autoreg.objectives.alice_plan import alice_of
from nnunet_autoreg.objectives.base import (
    OF_LARGEST,
    LossTerm,
    LossTerms,
    Objective,
    Processes,
    Reconstruction,
    TokenFeatures,
)
from nnunet_autoreg.objectives.targets import full_precision
from nnunet_autoreg.plan import Plan
from nnunet_autoreg.sampling.sample import Batch
from nnunet_autoreg.sampling.sampler import SequenceSampler

WARM_SHARE = 0.1
"""Share of the run in which the teacher's temperature rises."""
MIN_PROTOTYPE_ENTROPY, MAX_TOKEN_ENTROPY = 0.02, 0.999
"""Entropy of the prototypes, as a share of the largest possible: below the first limit all tokens
get the same one, and above the second every token gets all of them alike."""


class AliceState(nn.Module):
    """What training changes without gradients: teacher, centres and the teacher's temperature."""

    class_centre: Tensor
    patch_centre: Tensor
    temperature: Tensor

    def __init__(self, student: AliceNetwork, num_prototypes: int, temperature: float):
        super().__init__()
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self.register_buffer("class_centre", torch.zeros(num_prototypes))
        self.register_buffer("patch_centre", torch.zeros(num_prototypes))
        self.register_buffer("temperature", torch.tensor(temperature))

    @torch.no_grad()
    def follow(self, student: AliceNetwork, momentum: float) -> None:
        """Set the teacher to the weighted mean of itself and the student; buffers are copied."""
        parameters = dict(student.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            # Sharded weights are gathered one by one, and the teacher is whole in every process.
            parameter.lerp_(whole(parameters[name]), 1 - momentum)

        buffers = dict(student.named_buffers())
        for name, buffer in self.teacher.named_buffers():
            buffer.copy_(buffers[name])


@dataclass(frozen=True)
class Outputs:
    """What student and teacher say of crops.

    Attributes:
        student_classes, teacher_classes: scores of whole volumes, (N, O).
        student_patches, teacher_patches: scores of the visible tokens, (N, S, O).
        voxels: predicted by the student, (N, T, P).
        teacher_tokens: features of the teacher's encoder, (N, T, V).
    """

    student_classes: Tensor
    teacher_classes: Tensor
    student_patches: Tensor
    teacher_patches: Tensor
    voxels: Tensor
    teacher_tokens: Tensor


class Alice(Objective):
    """The objective: the losses, the teacher, and the weights that transfer. See
    ``objectives.base.Objective``."""

    counts_ahead = True
    follows_steps = True

    def __init__(self, plan: Plan):
        self.plan = plan
        self.settings = alice_of(plan)
        self.token_size = plan.encoder.token_size_vox
        self.sampler = SequenceSampler(plan)

        self.student = AliceNetwork(plan)
        self.module: nn.Module = self.student
        self.network: nn.Module = self.student.backbone.network
        start, _ = self.settings.teacher_temperature
        self.state = AliceState(self.student, self.settings.num_prototypes, start)
        self.extra: nn.Module = self.state

    def begin(self) -> None:
        """Have the teacher start as a copy of the student."""
        self.state.follow(self.student, 0.0)

    def loss(self, batch: Batch, references: bool = False) -> LossTerms:
        """Return the three terms. References: ``mean`` predicts each crop's visible mean."""
        crops = crops_of(batch, self.plan)
        outputs = self.outputs(batch, crops)
        state, settings = self.state, self.settings
        num_members = batch.voxels.shape[1]

        # The teacher's view of one image is the target of the student's view of the next one.
        class_target_NO = targets(outputs.teacher_classes, state.class_centre, state.temperature)
        patch_target_NSO = targets(outputs.teacher_patches, state.patch_centre, state.temperature)
        partner_N = partners(len(class_target_NO), num_members, batch.voxels.device)
        class_loss_N = cross_entropy(
            class_target_NO[partner_N],
            outputs.student_classes,
            settings.student_temperature,
        )

        # Tokens are compared within an image, so that they need no partner.
        patch_loss_NS = cross_entropy(
            patch_target_NSO,
            outputs.student_patches,
            settings.student_temperature,
        )

        # Padding carries no loss: it is the same in every image.
        counted_NS = crops.valid.gather(1, crops.visible).float()
        truth_NTP = self._true_voxels(crops)
        supervised_NTP = self._supervised(crops).float()
        counts = self._counts(crops, supervised_NTP)
        error_NTP = (outputs.voxels.float() - truth_NTP).square() * supervised_NTP
        terms = {
            "reconstruction": LossTerm(
                error_NTP.sum(),
                counts["reconstruction"],
                settings.reconstruction_weight,
            ),
            "classes": LossTerm(class_loss_N.sum(), counts["classes"], settings.class_weight),
            "patches": LossTerm(
                (patch_loss_NS * counted_NS).sum(),
                counts["patches"],
                settings.patch_weight,
            ),
        }

        statistics = {
            # Sums and counts instead of means: parts of a batch and processes are added up.
            "class_scores": outputs.teacher_classes.sum(dim=0),
            "classes": counts["classes"],
            "patch_scores": (outputs.teacher_patches * counted_NS[:, :, None]).sum(dim=(0, 1)),
            "patches": counts["patches"],
        }
        if not references:
            return LossTerms(terms, statistics=statistics)

        mean_N11 = self._visible_mean(crops)
        trivial_NTP = (mean_N11 - truth_NTP).square() * supervised_NTP
        statistics |= {
            "class_entropy": entropy(class_target_NO).sum(),
            "patch_entropy": (entropy(patch_target_NSO) * counted_NS).sum(),
            "patch_shares": (patch_target_NSO * counted_NS[:, :, None]).sum(dim=(0, 1)),
        }
        if num_members > 1:
            statistics |= self._match_counts(batch, crops, outputs.teacher_tokens)
        return LossTerms(terms, {"mean": trivial_NTP.sum()}, statistics)

    def outputs(self, batch: Batch, crops: Crops) -> Outputs:
        """Return the outputs of student and teacher for the crops of a batch. Scores are
        float32."""
        student, teacher = self.student, self.state.teacher
        is_figure = self.settings.casa == "figure"
        shown = replace(crops, voxels=student_voxels(batch, crops, self.token_size))

        # The student sees only the visible blocks, corrupted if the plan says so.
        encoded = student.backbone.encode_visible(shown)
        decoded_NTW, voxels_NTP = student.backbone.decode(encoded, shown, all_visible=False)
        student_classes_NO = student.class_scores(encoded.tokens, crops.is_visible & crops.valid)
        index_NSV = crops.visible[:, :, None].expand(-1, -1, encoded.tokens.shape[2])
        query_NSD = student.project_encoder(encoded.tokens.gather(1, index_NSV))
        key_NTD = student.project_decoder(decoded_NTW)

        # The teacher sees everything, and gets no gradient.
        with torch.no_grad():
            whole = teacher.backbone.encode_all(crops)
            teacher_classes_NO = teacher.class_scores(whole.tokens, crops.valid)

        if is_figure:
            # Both sides are asked by the student's tokens, so that entries correspond.
            attended_NSD = student.casa(query_NSD, key_NTD, crops.valid)
            student_patches_NSO = student.head.patches(attended_NSD)
            with torch.no_grad():
                teacher_key_NTD = teacher.project_encoder(whole.tokens)
                attended_NSD = teacher.casa(query_NSD.detach(), teacher_key_NTD, crops.valid)
                teacher_patches_NSO = teacher.head.patches(attended_NSD)
        else:
            # One block for both sides, between scores of prototypes. The teacher has the
            # directions of volumes only.
            query_NSO = student.head.patches(query_NSD)
            key_NTO = student.head.patches(key_NTD)
            student_patches_NSO = student.casa(query_NSO, key_NTO, crops.valid)
            with torch.no_grad():
                teacher_decoded_NTW, _ = teacher.backbone.decode(whole, crops, all_visible=True)
                teacher_key_NTO = teacher.head.classes(teacher.project_decoder(teacher_decoded_NTW))
                shared: Casa = student.casa
                teacher_patches_NSO = shared(query_NSO.detach(), teacher_key_NTO, crops.valid)

        return Outputs(
            student_classes_NO.float(),
            teacher_classes_NO.float(),
            student_patches_NSO.float(),
            teacher_patches_NSO.float(),
            voxels_NTP,
            whole.tokens.float(),
        )

    def term_counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the numbers of voxels, volumes and tokens that the terms sum over."""
        crops = crops_of(batch, self.plan)
        return self._counts(crops, self._supervised(crops).float())

    def after_step(self, step: int, processes: Processes, statistics: Mapping[str, Tensor]) -> None:
        """Move teacher, centres and temperature on."""
        state, settings = self.state, self.settings
        share_done = (step + 1) / self.plan.optim.num_steps
        # The momentum rises to 1 along half a cosine: at the end the teacher hardly moves.
        rest = 0.5 * (1 + math.cos(math.pi * min(1.0, share_done)))
        state.follow(self.student, 1 - (1 - settings.momentum) * rest)

        centres = (
            (state.class_centre, "class_scores", "classes"),
            (state.patch_centre, "patch_scores", "patches"),
        )
        for centre_O, sum_name, count_name in centres:
            # The sum and its count travel in one message.
            message = torch.cat([statistics[sum_name], statistics[count_name][None].float()])
            message = processes.add(message)
            mean_O = message[:-1] / message[-1].clamp(min=1)
            centre_O.lerp_(mean_O.to(centre_O.dtype), 1 - settings.centre_momentum)

        # As in DINO, the teacher's temperature rises in the first part of a run.
        start, end = settings.teacher_temperature
        share_warm = min(1.0, share_done / WARM_SHARE)
        state.temperature.fill_(start + (end - start) * share_warm)

    def health(self, statistics: Mapping[str, Tensor]) -> dict[str, tuple[float, str]]:
        """Return entropies of the teacher, norms of the centres, and the inlier rate of matches."""
        most = math.log(self.settings.num_prototypes)
        patches = float(statistics["patches"].clamp(min=1))
        shares_O = statistics["patch_shares"] / patches
        found = {
            "teacher_entropy_classes": (
                float(statistics["class_entropy"] / statistics["classes"]) / most,
                OF_LARGEST,
            ),
            "teacher_entropy_patches": (
                float(statistics["patch_entropy"]) / patches / most,
                OF_LARGEST,
            ),
            "prototype_entropy": (float(entropy(shares_O)) / most, OF_LARGEST),
            "centre_norm_classes": (float(self.state.class_centre.norm()), "1"),
            "centre_norm_patches": (float(self.state.patch_centre.norm()), "1"),
        }
        if "matched" in statistics:
            rate = float(statistics["inliers"] / statistics["matched"].clamp(min=1))
            found["inlier_rate"] = (rate, "share of matches")
        return found

    def collapse_signs(self, health: Mapping[str, tuple[float, str]]) -> list[str]:
        """Return a message where the teacher's answers say nothing about the image."""
        signs = []
        shared, _ = health["prototype_entropy"]
        each, _ = health["teacher_entropy_patches"]
        # Written so that NaN is a sign of collapse as well.
        if not shared >= MIN_PROTOTYPE_ENTROPY:
            signs.append(
                f"the teacher gives all tokens the same prototype (entropy {shared:.2g} of the "
                f"largest, limit {MIN_PROTOTYPE_ENTROPY:g})",
            )
        if each > MAX_TOKEN_ENTROPY:
            signs.append(
                f"the teacher gives every token all prototypes alike (entropy {each:.4f} of the "
                f"largest, limit {MAX_TOKEN_ENTROPY:g})",
            )
        return signs

    def reconstruct(self, batch: Batch) -> Reconstruction:
        """Return the student's prediction of hidden voxels beside the truth."""
        crops = crops_of(batch, self.plan)
        predicted_NTP = self.outputs(batch, crops).voxels.float()
        is_visible_NT1 = crops.is_visible[:, :, None]

        def as_volume(tokens_NTP: Tensor) -> Tensor:
            B, M = batch.voxels.shape[:2]
            tokens_BTP = tokens_NTP.reshape(B, -1, tokens_NTP.shape[2])
            return from_tokens(tokens_BTP, self.token_size, (B, M, *batch.voxels.shape[2:]))

        return Reconstruction(
            truth=batch.voxels[:, :, 0],
            predicted=as_volume(predicted_NTP),
            trivial=as_volume(self._visible_mean(crops).expand_as(predicted_NTP)),
            given=as_volume(is_visible_NT1 & crops.valid_mask),
            loss_mask=as_volume(~is_visible_NT1 & crops.valid_mask),
            valid_mask=batch.valid_mask,
        )

    def describe(self, batch: Batch) -> TokenFeatures:
        """Return features of every image by itself, as fine-tuning gets them."""
        crops = crops_of(batch, self.plan)
        B = len(batch.voxels)
        features_NTV = self._exported().backbone.describe(
            crops.voxels,
            crops.valid,
            crops.positions,
        )
        return TokenFeatures(
            features_NTV.reshape(B, -1, features_NTV.shape[2]),
            to_tokens(batch.voxels, self.token_size),
            crops.positions.reshape(B, -1),
            crops.valid.reshape(B, -1),
        )

    def example_batch(self, num_samples: int) -> Batch:
        """Return pairs of crops of the planned shapes; their order is a real one."""
        size = self.plan.sequence.member_crop_vox or self.plan.sequence.crop_size_vox
        num_tokens = 2 * volume(grid_of(size, self.token_size))
        order_index = torch.arange(num_tokens).expand(num_samples, -1)
        return Batch(
            voxels=torch.zeros(num_samples, 2, 1, *size),  # (B, M, C, Z, Y, X)
            valid_mask=torch.ones(num_samples, 2, *size, dtype=torch.bool),
            order_index=order_index,
            prefix=torch.ones(num_samples, dtype=torch.int64),
        )

    def transferable_state(self) -> dict[str, Tensor]:
        """Return the weights of the student's or the teacher's encoder, as the plan says."""
        return self._exported().backbone.transferable_state()

    def adaptation(self) -> Adaptation:
        """Return the keys of the parts that fine-tuning may have to adapt."""
        return self.student.backbone.adaptation()

    def _exported(self) -> AliceNetwork:
        return self.student if self.settings.export == "student" else self.state.teacher

    def _supervised(self, crops: Crops) -> Tensor:
        """Return which voxels carry the loss of reconstruction, (N, T, P) bool."""
        if self.settings.all_voxels:
            return crops.valid_mask
        return crops.valid_mask & ~crops.is_visible[:, :, None]

    def _counts(self, crops: Crops, supervised_NTP: Tensor) -> dict[str, Tensor]:
        device = crops.valid.device
        return {
            "reconstruction": supervised_NTP.sum(),
            "classes": torch.full((), float(len(crops.valid)), device=device),
            "patches": crops.valid.gather(1, crops.visible).float().sum(),
        }

    def _true_voxels(self, crops: Crops) -> Tensor:
        """Return the voxels of every token, (N, T, P), float32."""
        return to_tokens(crops.voxels[:, None], self.token_size).float()

    def _visible_mean(self, crops: Crops) -> Tensor:
        """Return the mean of each crop's visible voxels, (N, 1, 1)."""
        weight_NTP = (crops.valid_mask & crops.is_visible[:, :, None]).float()
        total_N11 = (self._true_voxels(crops) * weight_NTP).sum(dim=(1, 2), keepdim=True)
        return total_N11 / weight_NTP.sum(dim=(1, 2), keepdim=True).clamp(min=1)

    def _match_counts(self, batch: Batch, crops: Crops, tokens_NTV: Tensor) -> dict[str, Tensor]:
        """Return how many tokens of the first images are matched, and how many matches hold."""
        B, M, _, Z, Y, X = batch.voxels.shape
        grid = grid_of(as_size((Z, Y, X)), self.token_size)
        axes = [torch.arange(side, device=tokens_NTV.device) for side in grid]
        # In mm, because voxels of thick slices are not cubes.
        spacing_mm = self.plan.data.spacing_mm
        token_mm = [side * mm for side, mm in zip(self.token_size, spacing_mm, strict=True)]
        token_mm_3 = torch.tensor(token_mm, device=tokens_NTV.device)
        positions_T3 = torch.cartesian_prod(*axes).float() * token_mm_3
        return match_counts(
            tokens_NTV.reshape(B, M, *tokens_NTV.shape[1:]),
            crops.valid.reshape(B, M, -1),
            positions_T3,
        )


def targets(scores_O: Tensor, centre_O: Tensor, temperature: Tensor) -> Tensor:
    """Return the teacher's probabilities of the prototypes, (..., O), without gradient."""
    with full_precision(scores_O.device):
        return ((scores_O.detach().float() - centre_O) / temperature).softmax(dim=-1)


def cross_entropy(target_O: Tensor, scores_O: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of the student's scores (...,) under the targets, in float32."""
    with full_precision(scores_O.device):
        log_likelihood_O: Tensor = (scores_O.float() / temperature).log_softmax(dim=-1)
        cross_entropy_O: Tensor = (target_O * log_likelihood_O).sum(dim=-1).neg()
    return cross_entropy_O


def entropy(probabilities_O: Tensor) -> Tensor:
    """Return the entropy of probabilities, (...,), in nats."""
    entropy_O: Tensor = torch.special.entr(probabilities_O).sum(dim=-1)
    return entropy_O


def partners(num_crops: int, num_members: int, device: torch.device) -> Tensor:
    """Return for each crop the index of its sequence's next image; the first follows the last."""
    # Crops of one sequence follow each other: crop b M + m is member m of sample b.
    index = torch.arange(num_crops, device=device)
    member = index % num_members
    return index - member + (member + 1) % num_members
