"""Assignment of embeddings to clusters of equal size (SwAV), with the balance kept as a state.

SwAV balances the clusters over the samples of a batch, by Sinkhorn iterations. Here the same
iterations run over a bank of embeddings, once for each accepted step, and leave one number for each
cluster: its *balance*. The code of a sample then depends only on the sample and these numbers. It
is the same regardless of the other samples in the batch, however a batch is split, and in any
number of processes.

Shape suffixes: N embeddings, K clusters.

Source: SwAV (arXiv 2006.09882); Sinkhorn iterations in the logarithm as by Cuturi (2013).
"""

import math

import torch
from torch import Tensor

ITERATIONS = 30


def balance_of(scores_NK: Tensor, sharpness: float, iterations: int = ITERATIONS) -> Tensor:
    """Return the balance of every cluster, (K,): added to score / sharpness, it makes clusters
    equal.

    Args:
        scores_NK: cosines of embeddings and prototypes.
    """
    logits_NK = scores_NK.float() / sharpness
    num_rows, num_clusters = logits_NK.shape
    wanted = math.log(num_rows / num_clusters)
    balance_K = torch.zeros(num_clusters, device=logits_NK.device)
    for _ in range(iterations):
        # Every embedding is given away once, then every cluster gets its equal share.
        row_N = torch.logsumexp(logits_NK + balance_K, dim=1)
        column_K = torch.logsumexp(logits_NK - row_N[:, None], dim=0)
        balance_K = wanted - column_K
    return balance_K


def codes_of(scores_NK: Tensor, balance_K: Tensor, sharpness: float) -> Tensor:
    """Return the shares of the clusters in each embedding, (..., K), without gradient."""
    return (scores_NK.detach().float() / sharpness + balance_K).softmax(dim=-1)


def swapped_losses(
    first_NK: Tensor,
    second_NK: Tensor,
    balance_K: Tensor,
    sharpness: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropies of both views, each with the code of the other one, (...,) each.

    Args:
        first_NK, second_NK: scores of the two views.

    Returns:
        the losses of the first view and of the second view.
    """
    losses = []
    for own_NK, other_NK in ((first_NK, second_NK), (second_NK, first_NK)):
        # The code is a target: only the view's own scores get a gradient.
        code_NK = codes_of(other_NK, balance_K, sharpness)
        log_share_NK = (own_NK.float() / temperature).log_softmax(dim=-1)
        losses.append((code_NK * log_share_NK).sum(dim=-1).neg())
    return losses[0], losses[1]
