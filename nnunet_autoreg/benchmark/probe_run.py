"""The dense probe of several encoders on one dataset, with a line of JSON for every result."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_autoreg.benchmark.dense_probe import ProbeCase, ProbeSettings, dense_probe, raw_voxels
from nnunet_autoreg.benchmark.probe_data import DatasetLabels
from nnunet_autoreg.benchmark.probe_networks import Encoder, FrozenNetwork
from nnunet_autoreg.benchmark.probe_report import RAW, ProbeLine, as_json
from nnunet_autoreg.benchmark.public_ids import NO_IDS, PublicIds
from nnunet_autoreg.geometry import Spacing, as_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probed:
    """The scans that encoders are probed on.

    Attributes:
        dataset: number of the raw dataset.
        split: the part of the dataset whose patients are scored.
        pool, scored: scans to label, and scans to score.
        spacing_mm: spacing to which they were resampled.
        ids: what scans and patients are called in the results.
    """

    dataset: str
    split: str
    pool: Sequence[ProbeCase]
    scored: Sequence[ProbeCase]
    labels: DatasetLabels
    spacing_mm: Spacing
    ids: PublicIds = NO_IDS


def probe_all(
    probed: Probed,
    encoders: Sequence[Encoder],
    settings: ProbeSettings,
    device: torch.device,
    file: Path,
) -> list[ProbeLine]:
    """Probe raw voxels and every encoder; append one JSON line per result to ``file``."""
    context: dict[str, Any] = {
        "dataset": probed.dataset,
        "split": probed.split,
        "spacing_mm": list(probed.spacing_mm),
        "voxels_per_class": settings.voxels_per_class,
        "penalty": settings.penalty,
    }

    # A transformer is built for the largest extent along every axis.
    cases = [*probed.pool, *probed.scored]
    shapes = np.array([case.image.shape[-3:] for case in cases])
    largest = as_size(shapes.max(axis=0))
    num_classes = probed.labels.num_classes
    structures = probed.labels.structures
    lines: list[ProbeLine] = []

    # Results are written as they come, so that a kill loses the current encoder only.
    with file.open("a", encoding="utf-8") as handle:

        def keep(new: list[ProbeLine], shown_name: str, start: float) -> None:
            seconds = round(time.monotonic() - start, 1)
            for line in new:
                text = as_json(line, structures, probed.ids, {**context, "seconds": seconds})
                handle.write(text + "\n")
            handle.flush()
            lines.extend(new)
            log.info("%s: %.0f s", shown_name, seconds)

        start = time.monotonic()
        results = dense_probe(raw_voxels, probed.pool, probed.scored, num_classes, settings)
        keep([ProbeLine(RAW, "-", None, result) for result in results], RAW, start)

        for encoder in encoders:
            start = time.monotonic()
            network = FrozenNetwork(encoder, largest, probed.labels.channel_names, device)
            results = dense_probe(
                network.features,
                probed.pool,
                probed.scored,
                num_classes,
                settings,
                network.level_sets(),
                network.input_shape,
            )
            name = encoder.architecture.name
            seed = encoder.seed if encoder.file is None else None
            kind = f"'{encoder.name}'" if seed is None else f"random, seed {seed}"
            new = [ProbeLine(encoder.name, name, seed, result) for result in results]
            keep(new, f"{name}, {kind}", start)
    return lines
