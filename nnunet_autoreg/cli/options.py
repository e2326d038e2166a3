"""Options that several commands share, and functions for their values."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.io.addresses import advice_for, is_address
from nnunet_autoreg.machine import is_whole_number, problem_of_name

# argparse has no public name for the groups of a parser.
Group = argparse._ArgumentGroup
Options = argparse._ActionsContainer
"""A parser, or a group of one."""

M = TypeVar("M")

MOST_RESAMPLES = 100_000
"""Of a bootstrap; more would take gigabytes, and change no digit that is printed."""


def local_path(text: str) -> Path:
    """Return the path that the user typed.

    Raises:
        UsageError: it is an address on the web (code "usage-address"), or a name that cannot be
            used (code "usage-name").
    """
    if is_address(text):
        raise UsageError(advice_for(text), code="usage-address")
    problem = problem_of_name(text)
    if problem:
        raise UsageError(f"{text}: {problem}", code="usage-name")
    return Path(text)


def local_path_text(text: str) -> str:
    """Return the path that the user typed, as a text.

    Raises:
        UsageError: as ``local_path``.
    """
    return str(local_path(text))


def seed_number(text: str) -> int:
    """Return the seed that the user typed.

    Raises:
        UsageError: it is not a whole number of 0 or more, as numpy needs it (code "usage-seed").
    """
    if not is_whole_number(text):
        raise UsageError(f"--seed {text}: give a whole number of 0 or more", code="usage-seed")
    return int(text)


def num_resamples(text: str) -> int:
    """Return the number of resamples that the user typed.

    Raises:
        UsageError: it is not a whole number, or more than ``MOST_RESAMPLES`` (code
            "evaluation-resamples").
    """
    if not is_whole_number(text) or int(text) > MOST_RESAMPLES:
        raise UsageError(
            f"--bootstrap {text}: give a whole number from 0 to {MOST_RESAMPLES}; 1000 are usual",
            code="evaluation-resamples",
        )
    return int(text)


def add_labelled_dataset(group: Group) -> None:
    """Add ``-d``: a labelled dataset, whose patients are divided."""
    group.add_argument(
        "-d",
        dest="dataset",
        required=True,
        metavar="ID",
        help="labelled nnU-Net raw dataset, by number or name (4 or Dataset004_Name)",
    )


def add_raw_dataset(options: Options) -> None:
    """Add ``-d``: a raw dataset that gets label maps."""
    options.add_argument(
        "-d",
        dest="dataset",
        metavar="ID",
        required=True,
        help="the raw dataset (4 or Dataset004_Name)",
    )


def add_subjects(group: Group) -> None:
    """Add ``--subjects``: which cases belong to which patient."""
    group.add_argument(
        "--subjects",
        metavar="FILE",
        type=local_path_text,
        help="CSV with the columns case and subject, which names the patient (default: cases.csv "
        "of the dataset, else the names of the cases)",
    )


def add_device(options: Options, purpose: str = "where to train") -> None:
    """Add ``--device``."""
    options.add_argument(
        "--device",
        choices=["cpu", "cuda", "mps"],
        help=f"{purpose} (default: cuda if there is a GPU, else cpu)",
    )


def add_split_4d(options: Options) -> None:
    """Add ``--split-4d``."""
    options.add_argument(
        "--split-4d",
        action="store_true",
        help="take every volume of a 4D file or series (cine, diffusion, fMRI) as a separate "
        "scan (default: 4D files and series are left out)",
    )


def add_seed(options: Options, purpose: str = "") -> None:
    """Add ``--seed``.

    Args:
        purpose: the random choices of this seed; "" for all.
    """
    options.add_argument(
        "--seed",
        metavar="N",
        type=seed_number,
        default=0,
        help=f"random seed{purpose} (default: %(default)s)",
    )


def add_trained_model(options: Options, trainer: str) -> None:
    """Add the options that name a trained model, as nnUNetv2_predict has them.

    Args:
        trainer: the default trainer class.
    """
    options.add_argument(
        "-f",
        dest="folds",
        nargs="+",
        default=[],
        metavar="FOLD",
        help="folds of the model (default: all that are finished; fold all has to be named)",
    )
    options.add_argument(
        "-tr",
        dest="trainer",
        default=trainer,
        metavar="TRAINER",
        help="trainer class that the model was trained with (default: %(default)s)",
    )
    options.add_argument(
        "-p",
        dest="plans",
        default="AutoregPlans",
        metavar="PLANS",
        help="name of the plans that it was trained with (default: %(default)s)",
    )
    options.add_argument(
        "-c",
        dest="configuration",
        default="3d_fullres",
        metavar="CONFIGURATION",
        help="configuration that was trained (default: %(default)s)",
    )
    options.add_argument(
        "-chk",
        "--checkpoint",
        default="checkpoint_final.pth",
        metavar="FILE",
        help="checkpoint of every fold (default: %(default)s)",
    )


def open_model(request: Any, kind: Callable[..., M]) -> M:
    """Return the model that the options of ``add_trained_model`` name.

    Args:
        request: has these options, ``dataset`` and ``device``.
        kind: class of the model.
    """
    from nnunet_autoreg.downstream.model import prediction_device, trained_folder
    from nnunet_autoreg.nnunet_api import results_folder

    device = prediction_device(request.device)
    folder = trained_folder(
        results_folder(),
        request.dataset,
        request.trainer,
        request.plans,
        request.configuration,
    )
    return kind(folder, request.folds, device, request.checkpoint)


def add_output_folder(group: Group, contents: str, default: str) -> None:
    """Add ``-o``.

    Args:
        contents: what the folder is for.
        default: the name below ``$nnUNet_results`` that ``output_folder`` gets.
    """
    group.add_argument(
        "-o",
        dest="output",
        metavar="FOLDER",
        type=local_path_text,
        help=f"folder for {contents} (default: $nnUNet_results/{default}/DATASET)",
    )


def chosen_device(device: str | None) -> str:
    """Return the device of ``--device``, or the fastest one without it.

    Raises:
        UsageError: torch finds no such device.
    """
    from nnunet_autoreg.machine import check_device, default_device

    return check_device(device) if device else default_device()


def output_folder(output: str | None, default: str, dataset: str) -> Path:
    """Return the folder of ``-o``, or without it the default one."""
    from nnunet_autoreg.corpus.private import folder_of_dataset
    from nnunet_autoreg.nnunet_api import results_folder

    if output:
        return Path(output).resolve()
    return folder_of_dataset(results_folder() / default, dataset)
