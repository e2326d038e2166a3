"""Matches between the tokens of two crops, by which Alice's features are judged while it trains.

Shape suffixes: B samples, M members, T tokens of a crop, N and M tokens of the first and the second
crop, V features.
"""

import torch
from torch import Tensor
from torch.nn import functional

CYCLE_MM = 12.0
"""A match is an inlier if it comes back, and agrees with the others, within this distance."""


def match_counts(
    tokens_BMTV: Tensor,
    valid_BMT: Tensor,
    positions_T3: Tensor,
) -> dict[str, Tensor]:
    """Return the number of tokens of first images that were matched, and of matches that hold.

    The first image of each sample is matched with the second one.

    Args:
        valid_BMT: bool, False where a token is padding.
        positions_T3: positions in the crop, in mm.
    """
    inliers = matched = torch.zeros((), device=tokens_BMTV.device)
    for tokens_MTV, valid_MT in zip(tokens_BMTV, valid_BMT, strict=True):
        first_T, second_T = valid_MT[0], valid_MT[1]
        if not (first_T.any() and second_T.any()):
            continue
        holds_N = consistent_matches(
            tokens_MTV[0, first_T],
            tokens_MTV[1, second_T],
            positions_T3[first_T],
            positions_T3[second_T],
        )
        inliers = inliers + holds_N.sum()
        matched = matched + len(holds_N)
    return {"inliers": inliers, "matched": matched}


def consistent_matches(
    first_NV: Tensor,
    second_MV: Tensor,
    place_first_N3: Tensor,
    place_second_M3: Tensor,
) -> Tensor:
    """Return which tokens of one crop have a believable match in another, (N,) bool.

    A token is matched with the most similar one of the other crop. The match holds if the best
    match of that one lies near the token again, and if it is shifted as most other matches are.

    Args:
        place_first_N3, place_second_M3: positions in the crops, in mm.
    """
    # Without their mean, because what all tokens share would make all of them alike.
    first_NV = functional.normalize(first_NV - first_NV.mean(dim=0), dim=-1)
    second_MV = functional.normalize(second_MV - second_MV.mean(dim=0), dim=-1)
    similarity_NM = first_NV @ second_MV.T

    # Cycle: there and back again has to end near the start.
    there_N = similarity_NM.argmax(dim=1)
    back_N = similarity_NM.argmax(dim=0)[there_N]
    returns_N = (place_first_N3[back_N] - place_first_N3).norm(dim=1) <= CYCLE_MM

    # The median shift is hardly moved by wrong matches.
    shift_N3 = place_second_M3[there_N] - place_first_N3
    usual_3 = shift_N3.median(dim=0).values
    agrees_N = (shift_N3 - usual_3).norm(dim=1) <= CYCLE_MM
    believed_N: Tensor = returns_N & agrees_N
    return believed_N
