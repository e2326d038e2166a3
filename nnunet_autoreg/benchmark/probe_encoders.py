"""Choose the encoders of a probe: those that the user has named, and random ones like them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from nnunet_autoreg.benchmark.leak import Scored, check_pretraining
from nnunet_autoreg.benchmark.probe_networks import Encoder, find_encoder
from nnunet_autoreg.benchmark.public_ids import EXCLUDE_HEADER
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.geometry import Spacing
from nnunet_autoreg.model.card import read_card
from nnunet_autoreg.plan import IntensityWindow

RANDOM_WORD = "random"


def first_ct_window(encoders: Sequence[Encoder]) -> IntensityWindow | None:
    """Return the Hounsfield window of the first encoder that has one, for raw voxels."""
    for encoder in encoders:
        if encoder.file:
            window = read_card(encoder.file.parent).ct_window
            if window is not None:
                return window
    return None


def find_encoders(
    named: Sequence[str],
    spacing_mm: Spacing,
    num_random_seeds: int,
) -> list[Encoder]:
    """Return the pretrained encoders that were named, then the random ones.

    Args:
        named: runs, their folders or files, and names of encoders; each counts once.
        num_random_seeds: random networks of each architecture.

    Raises:
        UsageError: none was named, or only the word ``random``.
    """
    names = [name for name in dict.fromkeys(named) if name != RANDOM_WORD]
    if not names:
        raise UsageError(
            "--encoder: name a pretraining run, or an encoder such as resenc_tiny for random "
            "weights only",
            code="usage-no-encoder",
        )

    # Weights files and names of encoders need no folder of results.
    setting = os.environ.get("nnUNet_results", "")  # noqa: SIM112
    results = Path(setting) if setting else None
    found = [find_encoder(results, name, spacing_mm) for name in names]
    pretrained = [encoder for encoder in found if encoder.file is not None]

    # One set of random twins serves all encoders of an architecture.
    twins: list[Encoder] = []
    known = []
    for encoder in found:
        if encoder.architecture in known:
            continue
        known.append(encoder.architecture)
        twin = replace(encoder, name=RANDOM_WORD, file=None, has_decoder=False)
        twins += [replace(twin, seed=seed) for seed in range(num_random_seeds)]
    return [*pretrained, *twins]


def check_leaks(encoders: Sequence[Encoder], scored: Scored, root: Path) -> Iterator[str]:
    """Refuse encoders whose pretraining has seen a scored patient; yield a warning if unknown.

    Args:
        root: folder of the results. It gets a list of the scans to leave out of a pretraining.

    Raises:
        AutoregError: a scored patient has been seen.
    """
    # A refusal names the file with which to pretrain again.
    exclude = root / "exclude.txt"
    for encoder in encoders:
        if encoder.file is None:
            continue
        if not exclude.is_file():
            root.mkdir(parents=True, exist_ok=True)
            names = "".join(f"{scored.dataset}/{name}\n" for name in scored.cases)
            exclude.write_text(EXCLUDE_HEADER + names, encoding="utf-8")
        warning = check_pretraining(encoder.file.parent, scored, exclude)
        if warning:
            yield warning
