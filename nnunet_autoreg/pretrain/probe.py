"""A frozen probe: how well a linear classifier tells a token's label from its features, against one
on the token's raw voxels.

Shape suffixes: N tokens, V width, C classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_autoreg.pretrain.health import evenly
from nnunet_autoreg.sampling.sample import Batch

MAX_TOKENS, MAX_ITERATIONS, PENALTY = 8192, 50, 1e-3


@dataclass(frozen=True)
class LabelledCrop:
    """One crop of a labelled case.

    Attributes:
        batch: of one sample.
        labels: (T,) majority class of every token, raster order; -1 where there is padding or no
            label.
        is_test: the subject is one that the probe is not fitted on.
    """

    batch: Batch
    labels: Tensor
    is_test: bool


def balanced_accuracy(predicted_N: Tensor, truth_N: Tensor) -> float:
    """Mean over the classes that occur in ``truth`` of the share of their tokens that was predicted
    right.
    """
    shares = [
        float((predicted_N[truth_N == c] == c).float().mean())
        for c in torch.unique(truth_N).tolist()
    ]
    return sum(shares) / len(shares)


def fit_and_score(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Balanced accuracy on ``test`` of a logistic regression fitted on ``train``; both are (inputs
    (N, V), labels (N,)).

    Classes count equally, inputs are standardised by ``train``; the problem is convex and starts
    from zero, so that nothing is random.
    """
    inputs, labels = train[0].double(), train[1]
    mean, deviation = inputs.mean(0), inputs.std(0).clamp(min=1e-6)
    num_classes = int(torch.cat([train[1], test[1]]).max()) + 1
    weight = 1 / torch.bincount(labels, minlength=num_classes).clamp(min=1).double()
    inputs = (inputs - mean) / deviation
    with torch.enable_grad():
        slope = torch.zeros(inputs.shape[1], num_classes, dtype=torch.float64, requires_grad=True)
        offset = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
        solver = torch.optim.LBFGS(
            [slope, offset], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            solver.zero_grad()
            error = functional.cross_entropy(inputs @ slope + offset, labels, weight=weight)
            total = error + PENALTY * slope.square().sum()
            torch.autograd.backward(total)
            return total

        solver.step(objective)  # type: ignore[no-untyped-call]
    scores = ((test[0].double() - mean) / deviation) @ slope.detach() + offset.detach()
    return balanced_accuracy(scores.argmax(1), test[1])


class Probe:
    """Fits on the tokens of some crops and scores on those of others, on the same tokens every
    time.

    Args:
        crops: may be empty.
    """

    def __init__(self, crops: Sequence[LabelledCrop]):
        self.parts = {
            is_test: [crop for crop in crops if crop.is_test is is_test]
            for is_test in (False, True)
        }
        self.labels = {
            side: torch.cat([crop.labels for crop in part])
            for side, part in self.parts.items()
            if part
        }
        self.known = {side: _spread(labels) for side, labels in self.labels.items()}

    @property
    def works(self) -> bool:
        """Whether there are at least two classes on each side."""
        return len(self.labels) == 2 and all(
            len(torch.unique(self.labels[side][self.known[side]])) > 1 for side in self.labels
        )

    @property
    def chance(self) -> float:
        """Balanced accuracy of guessing."""
        return 1 / len(torch.unique(self.labels[True][self.known[True]]))

    def score(self, read: Callable[[Batch], Tensor]) -> float:
        """Balanced accuracy from what ``read`` says of the tokens of a batch of one sample, (T, V)
        on the CPU; 0 if that is not finite.
        """
        sides = {}
        for side in (False, True):
            inputs = torch.cat([read(crop.batch) for crop in self.parts[side]])[self.known[side]]
            if not bool(torch.isfinite(inputs).all()):
                return 0.0
            sides[side] = inputs, self.labels[side][self.known[side]]
        return fit_and_score(sides[False], sides[True])


def _spread(labels: Tensor) -> Tensor:
    """Indices of tokens whose label is known, evenly spread where there are too many."""
    known = (labels >= 0).nonzero()[:, 0]
    return known[evenly(len(known), MAX_TOKENS)]
