"""One look at a model on held-out batches and labelled crops: errors, features, probe."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from nnunet_autoreg.objectives.base import Objective, TokenFeatures
from nnunet_autoreg.pretrain.health import (
    MAX_TOKENS,
    Health,
    content_part,
    effective_rank,
    evenly,
    token_variance,
)
from nnunet_autoreg.pretrain.machine import computes_in_half
from nnunet_autoreg.pretrain.probe import LabelledCrop, Probe
from nnunet_autoreg.sampling.sample import Batch


class Validation:
    """Measures the same things on the same data every time; changes nothing, draws nothing at
    random.

    Args:
        heldout: batches on the CPU, by their kind of sequences.
        crops: labelled crops for the probe; may be empty.
    """

    def __init__(
        self,
        objective: Objective,
        heldout: Mapping[str, Sequence[Batch]],
        crops: Sequence[LabelledCrop],
        device: torch.device,
    ):
        self.objective, self.heldout, self.device = objective, heldout, device
        self.probe = Probe(crops)
        self.voxel_score: float | None = None

    @torch.no_grad()
    def measure(self) -> Health | None:
        """All of it, or None without held-out batches. The module is left in evaluation mode."""
        if not self.heldout:
            return None
        self.objective.module.eval()
        errors, kinds = self._errors()
        features, content = self._features()
        variance, rank = token_variance(content, features), effective_rank(content)
        return Health(errors, variance, rank, self._probed() if self.probe.works else None, kinds)

    def autocast(self) -> AbstractContextManager[None]:
        """As in training."""
        return autocast(self.device)

    def _errors(self) -> tuple[dict[str, float], dict[str, float]]:
        """Errors over all batches, by name, and the objective's own by kind of sequences, where
        there are several.
        """
        sums = {kind: self._sums(batches) for kind, batches in self.heldout.items()}
        whole: dict[str, float] = {}
        for part in sums.values():
            for name, value in part.items():
                whole[name] = whole.get(name, 0.0) + value
        count = max(whole.pop("count"), 1.0)
        kinds = (
            {kind: part["error"] / max(part["count"], 1.0) for kind, part in sums.items()}
            if len(sums) > 1
            else {}
        )
        return {name: value / count for name, value in whole.items()}, kinds

    def _sums(self, batches: Sequence[Batch]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for batch in batches:
            with self.autocast():
                terms = self.objective.loss(batch.to(self.device), references=True)
            for name, term in {
                "error": terms.total,
                "count": terms.count,
                **terms.references,
            }.items():
                sums[name] = sums.get(name, 0.0) + float(term)
        return sums

    def _describe(self, batch: Batch) -> TokenFeatures:
        with self.autocast():
            return self.objective.describe(batch.to(self.device))

    def _features(self) -> tuple[Tensor, Tensor]:
        """Features (N, V) of held-out tokens that hold voxels, and the part of them that depends on
        the image.
        """
        features, positions = [], []
        for batch in (batch for batches in self.heldout.values() for batch in batches):
            tokens = self._describe(batch)
            features.append(tokens.features[tokens.valid].float().cpu())
            positions.append(tokens.positions[tokens.valid].cpu())
        all_features = torch.cat(features)
        content = content_part(all_features, torch.cat(positions))
        chosen = evenly(len(content), MAX_TOKENS)
        return all_features[chosen], content[chosen]

    def _probed(self) -> dict[str, float]:
        if self.voxel_score is None:
            self.voxel_score = self.probe.score(self._voxels_of)
        return {
            "features": self.probe.score(self._features_of),
            "voxels": self.voxel_score,
            "chance": self.probe.chance,
        }

    def _features_of(self, batch: Batch) -> Tensor:
        return self._describe(batch).features[0].float().cpu()

    def _voxels_of(self, batch: Batch) -> Tensor:
        return self._describe(batch).voxels[0].float().cpu()


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """bf16 on GPUs that have it, full precision elsewhere. bf16 has the range of float32, so that
    no loss scaler is needed.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=computes_in_half(device))
