"""Write fine-tuned CNNs in the form of stock nnU-Net.

A fine-tuned ResEnc is an ordinary ``ResidualEncoderUNet``. So the files of a training in nnU-Net's
results folder name nnU-Net's own trainer and network. The model then predicts without
nnunet-autoreg. Only the plans in the preprocessed folder still refuse nnU-Net's trainers, which
would train without the pretrained weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_autoreg import __version__
from nnunet_autoreg.bridge import NORMALIZATIONS
from nnunet_autoreg.families import CLASS_PATHS, RESENC
from nnunet_autoreg.finetune.network import GUARD_NAME, own_arguments
from nnunet_autoreg.model.encoders import IMPORTED_ARGUMENTS
from nnunet_autoreg.nnunet_api import dataset_number

FINAL_CHECKPOINT = "checkpoint_final.pth"
DEFAULT_FOLDS = ("0", "1", "2", "3", "4")
"""The folds with which nnU-Net predicts if none is named."""

STOCK_TRAINER = "nnUNetTrainer"
"""The trainer with which nnU-Net builds the network when it predicts."""


def runs_on_stock(class_path: str, plans: Mapping[str, Any]) -> bool:
    """Return whether nnU-Net can predict without this package with a model of these plans.

    The network must be nnU-Net's own, and so must every normalisation of the images.

    Args:
        class_path: class of the network that the trainer builds.
    """
    if class_path != CLASS_PATHS[RESENC]:
        return False
    for configuration in plans["configurations"].values():
        if not NORMALIZATIONS.keys().isdisjoint(configuration.get("normalization_schemes", [])):
            return False
    return True


def stock_plans(plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return plans that describe networks in nnU-Net's own form.

    The ``"autoreg"`` block stays, because it says how the model was trained; nnU-Net ignores it.
    Plans that are in this form already are returned as they are.

    Args:
        plans: plans for which ``runs_on_stock`` is true.
    """
    configurations = {}
    for name, configuration in plans["configurations"].items():
        # A configuration that inherits from another one may have no architecture entry.
        architecture = configuration.get("architecture", {})
        configurations[name] = dict(configuration)
        # The module of the guard had another name in earlier releases.
        class_name = str(architecture.get("network_class_name", ""))
        if not class_name.endswith(f".{GUARD_NAME}"):
            continue

        arguments = own_arguments(architecture["arch_kwargs"])
        # nnU-Net imports the class of every argument that is listed, so all of them must be there.
        for key in IMPORTED_ARGUMENTS:
            arguments.setdefault(key, None)
        configurations[name]["architecture"] = {
            "network_class_name": CLASS_PATHS[RESENC],
            "arch_kwargs": arguments,
            "_kw_requires_import": list(IMPORTED_ARGUMENTS),
        }
    return {**plans, "configurations": configurations}


@contextmanager
def named_as_stock(trainer: Any) -> Iterator[None]:
    """Let a trainer's class have the name of nnU-Net's own trainer inside the context.

    nnU-Net writes the name of the class into the checkpoint, and prediction looks it up.
    """
    own = type(trainer)
    trainer.__class__ = type(STOCK_TRAINER, (own,), {})
    try:
        yield
    finally:
        trainer.__class__ = own


def needs_line(is_stock: bool) -> str:
    """Return the line at the end of a training about what prediction needs."""
    if is_stock:
        return "prediction: this model needs stock nnU-Net only, not nnunet-autoreg"
    return (
        "prediction: this model needs nnunet-autoreg beside nnU-Net; on another machine, install "
        f"it first: pip install nnunet-autoreg=={__version__}"
    )


def predict_line(model: Path, dataset: str, device: str) -> str:
    """Return the next line of a segmentation's training: how to predict with the trained folds.

    Args:
        model: folder of the model, named TRAINER__PLANS__CONFIGURATION, with a folder for each
            fold.
        dataset: its name, such as Dataset004_Hippocampus.
    """
    trainer, plans, configuration = model.name.split("__")
    files = model.glob(f"fold_*/{FINAL_CHECKPOINT}")
    folds = sorted(file.parent.name.removeprefix("fold_") for file in files)

    words = ["nnUNetv2_predict", "-d", dataset_number(dataset), "-i", "INPUT", "-o", "OUTPUT"]
    words += ["-c", configuration, "-tr", trainer, "-p", plans]
    # Without -f, nnU-Net looks for all five folds.
    if folds != list(DEFAULT_FOLDS):
        numbered = [fold for fold in folds if fold != "all"]
        words += ["-f", *(numbered or folds)]
    if device != "cuda":
        words += ["-device", device]
    return f"next: {' '.join(words)}"
