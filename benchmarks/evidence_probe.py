"""The project's dense probe on the sets of ``evidence.py``: frozen features, a linear classifier.

Nothing is trained but the classifier, so a run costs a minute on a CPU, and its noise is small.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from evidence_data import ResidentSet
from evidence_lines import Line, ResultFile, Stopwatch, circumstances
from evidence_pretrain import encoder_like, weights_file

from nnunet_autoreg.benchmark.dense_probe import ProbeCase, ProbeResult, ProbeSettings, dense_probe
from nnunet_autoreg.benchmark.probe_networks import (
    Architecture,
    Encoder,
    FrozenNetwork,
    find_encoder,
)
from nnunet_autoreg.geometry import as_size

log = logging.getLogger("nnunet_autoreg.evidence")

RANDOM = "random"


@dataclass(frozen=True)
class ProbeJob:
    """One probe.

    Attributes:
        init: the arm whose pretraining is probed, or "random".
        pretraining_seed: of that pretraining; None for random weights.
        labels: numbers of labelled patients; those of one draw are nested.
        num_draws: sets of labelled patients, the same as those of fine-tuning.
        split: "development" or "test".
        like: for random weights, an arm whose architecture the network takes; None for the
            encoder's own.
    """

    data: str
    init: str
    pretraining_seed: int | None
    encoder: str
    labels: tuple[int, ...]
    num_draws: int
    split: str
    voxels_per_class: int
    like: str | None = None

    @property
    def arm(self) -> str:
        """Name of the arm in the results."""
        return self.init if self.like is None else f"{self.init} (like {self.like})"

    @property
    def identity(self) -> Line:
        """The values that identify the run."""
        return {
            "command": "probe",
            "set": self.data,
            "arm": self.arm,
            "pretraining_seed": self.pretraining_seed,
            "encoder": self.encoder,
            "split": self.split,
            "settings": {
                "labels": list(self.labels),
                "draws": self.num_draws,
                "voxels_per_class": self.voxels_per_class,
            },
        }


def probe(
    job: ProbeJob,
    data: ResidentSet,
    work: Path,
    results: ResultFile,
    device: torch.device,
) -> None:
    """Probe the features of one network and write its line.

    Raises:
        UsageError: the pretraining is not finished, or the pool has too few patients.
    """
    if results.has(job.identity):
        return
    clock = Stopwatch()
    pool = [_case(data, case) for case in data.division.pool]
    scored = [_case(data, case) for case in data.division.scored(job.split)]
    shapes = np.array([case.image.shape for case in (*pool, *scored)])
    largest = as_size(shapes.max(axis=0).tolist())
    channels = tuple(sorted({scan.channel for scan in data.facts.scans}))
    network = FrozenNetwork(_encoder(job, data, work), largest, channels, device)

    settings = ProbeSettings(job.labels, job.num_draws, job.voxels_per_class)
    probed = dense_probe(
        network.features,
        pool,
        scored,
        data.num_classes,
        settings,
        network.level_sets(),
        network.input_shape,
    )
    found = [_storable(result) for result in probed]
    results.append({**job.identity, **clock.read(), "results": found, **circumstances(device)})
    for levels in network.level_sets():
        values = [result.dice for result in probed if result.levels == levels]
        log.info("%s %s, %s: Dice %.4f", job.data, job.init, levels, float(np.mean(values)))


def _case(data: ResidentSet, case: str) -> ProbeCase:
    return ProbeCase(case, data.subject_of[case], data.images[case], data.labels[case])


def _encoder(job: ProbeJob, data: ResidentSet, work: Path) -> Encoder:
    """Return the pretrained encoder, or a random one of the same size."""
    if job.init == RANDOM and job.like is not None:
        planned = encoder_like(work, job.data, job.like)
        architecture = Architecture(planned.name, planned.class_path, planned.arguments)
        return Encoder("random", architecture)
    if job.init == RANDOM:
        return find_encoder(None, job.encoder, data.facts.spacing_mm)
    assert job.pretraining_seed is not None, "every pretraining has a seed"
    file = weights_file(work, job.data, job.init, job.pretraining_seed)
    return find_encoder(None, str(file), data.facts.spacing_mm)


def _storable(result: ProbeResult) -> Line:
    """Return a result with the mean over structures of every scored patient."""
    means = {}
    for patient, dice in result.dice_of_patient.items():
        if dice:
            means[patient] = round(float(np.mean(list(dice.values()))), 5)
    labels, draw = result.num_labels, result.draw
    return {"levels": result.levels, "labels": labels, "draw": draw, "dice": means}
