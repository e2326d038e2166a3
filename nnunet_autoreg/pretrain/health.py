"""Whether the features say anything: how much of them depends on the image, over how many
directions they spread, and in words.

Shape suffixes: N tokens, V width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nnunet_autoreg.plan import RunPlan
from nnunet_autoreg.pretrain.guard import Tally

MAX_TOKENS = 8192


def content_part(features_NV: Tensor, position_N: Tensor) -> Tensor:
    """Features less the mean of all tokens at the same place in the grid: what depends on the
    image, not on the place.
    """
    num_positions = int(position_N.max()) + 1 if len(position_N) else 0
    sums = torch.zeros(
        num_positions, features_NV.shape[1], dtype=features_NV.dtype, device=features_NV.device
    )
    sums.index_add_(0, position_N, features_NV)
    count = torch.bincount(position_N, minlength=num_positions).clamp(min=1).to(features_NV.dtype)
    return features_NV - (sums / count[:, None])[position_N]


def token_variance(content_NV: Tensor, features_NV: Tensor) -> float:
    """Share of the features' mean square that depends on the image:

    0 (every image looks alike) to 1. 0 if all are 0, or some NaN.
    """
    whole = features_NV.double().square().sum()
    return float(content_NV.double().square().sum() / whole) if 0 < whole < math.inf else 0.0


def effective_rank(content_NV: Tensor) -> float:
    """Over how many directions the features spread: exp of the entropy of the singular values,
    taken as shares.

    0 if all are 0, or some NaN. In float64, because noise of many small singular values would pass
    for rank.

    Source: RankMe, arXiv 2210.02885, equation 1 (there without subtracting a mean).
    """
    content = content_NV.double().cpu()
    if not bool(torch.isfinite(content).all()):
        return 0.0
    gram = content.T @ content if content.shape[0] >= content.shape[1] else content @ content.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    if not singular.max() > 0:
        return 0.0
    shares = singular / singular.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def evenly(num: int, most: int) -> Tensor:
    """Indices of at most ``most`` of ``num`` things, evenly spread: the same ones every time."""
    return torch.arange(num) if num <= most else torch.linspace(0, num - 1, most).round().long()


@dataclass(frozen=True)
class Health:
    """What was measured on held-out scans.

    Attributes:
        errors: next-block error "error" and that of trivial predictions by name, per voxel.
        token_variance, effective_rank: as the functions of these names give them; None where
            features could not be had.
        probe: balanced accuracy of telling labels from "features" and from raw "voxels", and of
            "chance"; None without labels.
        kinds: next-block error by kind of sequences; empty where there is one kind.
    """

    errors: Mapping[str, float]
    token_variance: float | None = None
    effective_rank: float | None = None
    probe: Mapping[str, float] | None = None
    kinds: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, tuple[float, str]]:
        """Name -> value and unit, as ``metrics.jsonl`` takes them."""
        errors = {**self.errors, **{f"error_{kind}": value for kind, value in self.kinds.items()}}
        found = {f"heldout_{name}": (value, "squared error") for name, value in errors.items()}
        if self.token_variance is not None:
            found["token_variance"] = (self.token_variance, "share of mean square")
        if self.effective_rank is not None:
            found["effective_rank"] = (self.effective_rank, "directions")
        return {
            **found,
            **{
                f"probe_{name}": (value, "balanced accuracy")
                for name, value in (self.probe or {}).items()
            },
        }

    def sentence(self) -> str:
        """All of it in one line."""
        trivial = ", ".join(
            f"{name} {value:.4f}" for name, value in self.errors.items() if name != "error"
        )
        told = f"held-out next-block error {self.errors['error']:.4f} (baselines: {trivial})"
        if self.kinds:
            told += (
                f", {' and '.join(f'{value:.4f} of {kind}' for kind, value in self.kinds.items())} "
                "sequences"
            )
        if self.token_variance is not None and self.effective_rank is not None:
            told += (
                f"; features: token variance {self.token_variance:.3f}, effective rank "
                f"{self.effective_rank:.1f}"
            )
        if self.probe is not None:
            told += (
                f"; probe: balanced accuracy {self.probe['features']:.3f} from features, "
                f"{self.probe['voxels']:.3f} from raw voxels, "
                f"{self.probe['chance']:.3f} by chance"
            )
        return told


def complaints(health: Health, run: RunPlan, warm: bool) -> list[str]:
    """What is wrong, a sentence each; none while all is well.

    Args:
        warm: the warm-up is over, so that something should have been learnt.
    """
    remedy = "lower the rate, or start a new --name with another seed"
    told = [f"collapse: {sentence}; {remedy}" for sentence in collapses(health, run)]
    if not warm:
        return told
    error = health.errors["error"]
    trivial = {name: value for name, value in health.errors.items() if name != "error"}
    beaten = [
        f"'{WORDS.get(name, name)}' ({value:.4f})"
        for name, value in trivial.items()
        if not error < value
    ]
    if beaten or not math.isfinite(error):
        told.append(
            f"nothing learnt yet: the held-out error {error:.4f} is not below "
            f"{' and '.join(beaten) or 'anything'}; it should "
            "fall within the next few hundred steps, else change the rate"
        )
    if health.probe is not None and health.probe["features"] <= health.probe["voxels"]:
        told.append(
            "the features tell labels apart no better than raw voxels do "
            f"({health.probe['features']:.3f} against "
            f"{health.probe['voxels']:.3f} balanced accuracy): train longer"
        )
    return told


def collapses(health: Health, run: RunPlan) -> list[str]:
    """Return a sentence for each sign that the features are collapsed."""
    found = []
    if health.token_variance is not None and not health.token_variance >= run.min_token_variance:
        found.append(
            f"the features hardly depend on the image (token variance {health.token_variance:.2g}, "
            "limit "
            f"{run.min_token_variance:g})"
        )
    if health.effective_rank is not None and not health.effective_rank >= run.min_effective_rank:
        found.append(
            f"the features spread over {health.effective_rank:.1f} directions only (limit "
            f"{run.min_effective_rank:g})"
        )
    return found


def failures(
    health: Health | None, run: RunPlan, weights_are_finite: bool, tally: Tally, num_steps: int
) -> list[str]:
    """Return a sentence for each reason why a run that did all its steps must not be called
    finished.

    Args:
        health: of the last step; None where no scan was held out.
        tally: of all steps.
        num_steps: that were done, skipped ones included.
    """
    found = []
    if not weights_are_finite:
        found.append("weights hold NaN or infinity")
    if tally.skipped >= num_steps:
        found.append(f"none of the {num_steps} steps was good enough to change the weights")
    elif health is None and tally.in_row:
        found.append(
            f"the last {tally.in_row} steps were bad, and no scan was held out that could show "
            "that all is well"
        )
    if health is None:
        return found

    error = health.errors["error"]
    if not math.isfinite(error):
        found.append(f"the held-out error is {error}")
    return [*found, *collapses(health, run)]


WORDS = {"copy": "copy the previous block", "mean": "predict the mean"}
