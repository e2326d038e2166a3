"""A dataset in nnU-Net's three folders, fine-tuned by nnU-Net's own functions."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")
PRETRAINED = "AutoregPretrainedTrainer"


@dataclass(frozen=True)
class Project:
    """nnU-Net's three folders below ``root``, with one small dataset."""

    root: Path
    dataset: str

    @property
    def number(self) -> int:
        return int(self.dataset[len("Dataset") : len("Dataset000")])

    @property
    def plans_file(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.dataset / "AutoregPlans.json"

    def plans(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.plans_file.read_text())
        return found

    def shorten(self, patch: list[int] | None = None, **recipe: Any) -> None:
        """Plan one epoch of two steps; ``recipe`` changes this, ``patch`` the size of patches."""
        plans = self.plans()
        if patch is not None:
            plans["configurations"]["3d_fullres"]["patch_size"] = patch
        # One epoch of two steps and one validation step takes a second.
        short = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
        plans["autoreg"]["recipe"].update({**short, **recipe})
        self.plans_file.write_text(json.dumps(plans))

    def train(
        self,
        trainer: str = PRETRAINED,
        configuration: str = "3d_fullres",
        fold: int | str = 0,
        **options: Any,
    ) -> str:
        """Train as ``nnUNetv2_train`` does; everything its logs say so far."""
        from nnunetv2.run.run_training import run_training

        run_training(
            str(self.number),
            configuration,
            fold,
            trainer,
            "AutoregPlans",
            device=CPU,
            **options,
        )
        logs = sorted(self.fold(trainer, configuration, fold).glob("training_log_*.txt"))
        return "\n".join(log.read_text() for log in logs)

    def model(
        self,
        trainer: str = PRETRAINED,
        configuration: str = "3d_fullres",
        results: str = "nnUNet_results",
    ) -> Path:
        return self.root / results / self.dataset / f"{trainer}__AutoregPlans__{configuration}"

    def fold(
        self,
        trainer: str = PRETRAINED,
        configuration: str = "3d_fullres",
        fold: int | str = 0,
    ) -> Path:
        return self.model(trainer, configuration) / f"fold_{fold}"

    def checkpoint(
        self,
        trainer: str = PRETRAINED,
        configuration: str = "3d_fullres",
        fold: int | str = 0,
    ) -> dict[str, Any]:
        file = self.fold(trainer, configuration, fold) / "checkpoint_final.pth"
        found: dict[str, Any] = torch.load(file, map_location=CPU, weights_only=False)
        return found

    def predict(self, model: Path | None = None) -> np.ndarray:
        """Probabilities (classes or regions, Z, Y, X) of the first training image."""
        predictor = quick_predictor(device=CPU, allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(model or self.model()), (0,))
        image = min((self.root / "nnUNet_raw" / self.dataset / "imagesTr").glob("*.nii.gz"))
        files = [[str(image)]]
        ((_, found),) = predictor.predict_from_files_sequential(
            files,
            None,
            save_probabilities=True,
        )
        return np.asarray(found)


def quick_predictor(**options: Any) -> Any:
    """nnU-Net's predictor without mirroring and with little overlap: a tenth of the work."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    return nnUNetPredictor(**{**options, "use_mirroring": False, "tile_step_size": 1})
