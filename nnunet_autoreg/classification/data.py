"""Load patches with the classes of their cases, by nnU-Net's loader."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_autoreg.classification.table import UNKNOWN


class ClassLoader(nnUNetDataLoader):  # type: ignore[misc]
    """nnU-Net's loader, whose batches also have ``classes`` (B, T): the class index of each task.

    A class that is not known is ``UNKNOWN``.

    Args:
        labels: case -> index of its class in each task.
        is_balanced: draw every class of the only task equally often.
    """

    def __init__(
        self,
        data: Any,
        *args: Any,
        labels: Mapping[str, Sequence[int]],
        is_balanced: bool,
        **kwargs: Any,
    ):
        super().__init__(data, *args, **kwargs)
        self.labels = labels

        # Without balancing, all cases are in one group.
        groups: dict[int, list[str]] = {}
        for case in data.identifiers:
            # A case without any known class carries no loss, so it is never drawn.
            if all(label == UNKNOWN for label in labels[case]):
                continue
            group = labels[case][0] if is_balanced else 0
            groups.setdefault(group, []).append(case)
        self.groups = list(groups.values())

    def get_indices(self) -> list[str]:
        """Return the cases of a batch: a class is drawn first, then a case of it."""
        names = []
        for _ in range(self.batch_size):
            group = self.groups[np.random.randint(len(self.groups))]
            names.append(group[np.random.randint(len(group))])
        return names

    def generate_train_batch(self) -> dict[str, Any]:
        """Return nnU-Net's batch with the classes of its cases."""
        batch: dict[str, Any] = super().generate_train_batch()
        labels = [self.labels[case] for case in batch["keys"]]
        batch["classes"] = torch.tensor(labels, dtype=torch.int64)
        # The label maps are not needed, and would be copied from process to process.
        batch["target"] = torch.zeros(len(labels))
        return batch
