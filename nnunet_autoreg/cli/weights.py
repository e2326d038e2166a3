"""Run ``autoreg_weights``: list, inspect, import and export pretrained encoders."""

import argparse
import sys
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg import nnunet_api
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    options_for,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import local_path, local_path_text
from nnunet_autoreg.convert.choices import (
    FORMS,
    HUGGINGFACE_FORM,
    NNSSL_FORM,
    TOKEN_ORDERS,
    WRITTEN_ORDERS,
)
from nnunet_autoreg.errors import UsageError, printable, shell_quoted
from nnunet_autoreg.model.card import check_run_name

if TYPE_CHECKING:
    from nnunet_autoreg.convert.imported import ImportOptions

FLAGS_OF_NUMBERS = {
    "num_heads": "--heads",
    "patch_size_vox": "--patch-size",
    "spacing_mm": "--spacing",
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    The name of every option that belongs to the import options is that of their field.
    """
    p = CommandParser(
        examples=[
            "autoreg_weights inspect brain",
            "autoreg_weights import downloaded_folder --name openmind",
            "autoreg_weights import hf://OWNER/NAME --name theirs",
            "autoreg_weights export brain -o exported --form huggingface",
        ],
        prog="autoreg_weights",
        description="List and inspect encoders, import those of other projects, and export your "
        "own in their formats. Files are read without running any code in them.",
    )
    actions = p.add_subparsers(dest="action", required=True)

    _add_action(
        actions,
        "list",
        "list the finished and imported encoders that AutoregPlanner can use",
    )
    _add_inspect(actions)
    _add_import(actions)
    _add_export(actions)
    return p


def _add_inspect(actions: Any) -> None:
    inspecting = _add_action(
        actions,
        "inspect",
        "show what a weights file is, what it needs, its licence and its hash",
    )
    inspecting.add_argument(
        "path",
        metavar="FILE|FOLDER|hf://OWNER/NAME",
        help="a weights file, a folder that holds one, a repository on Hugging Face, or the name "
        "of a run",
    )
    _add_statements(inspecting)


def _add_import(actions: Any) -> None:
    importing = _add_action(
        actions,
        "import",
        "import a trained nnU-Net model, an encoder on Hugging Face, or weights of AR-SSL4M "
        "or nnssl (OpenMind, nnFoundation), so that AutoregPlanner can use them like a "
        "finished pretraining run",
    )
    importing.add_argument(
        "path",
        metavar="FILE|FOLDER|hf://OWNER/NAME",
        help="a checkpoint, the folder of a downloaded repository, the folder or zip of a trained "
        "nnU-Net model, or a repository on Hugging Face, which is downloaded into its cache (this "
        'needs pip install "nnunet-autoreg[hf]"; HF_HUB_OFFLINE=1 uses only the cache)',
    )
    importing.add_argument(
        "--name",
        required=True,
        help="name of the new run, which is written to $nnUNet_results/autoreg_pretraining/NAME",
    )
    _add_statements(importing)


def _add_export(actions: Any) -> None:
    exporting = _add_action(
        actions,
        "export",
        "export a finished pretraining run as a folder for Hugging Face, or in nnssl's "
        "format, which the PretrainedTrainers of nnU-Net's master branch read",
    )
    exporting.add_argument(
        "name",
        metavar="NAME",
        help="name of a run, its folder, or its encoder.safetensors",
    )
    exporting.add_argument(
        "-o",
        dest="folder",
        required=True,
        metavar="FOLDER",
        type=local_path_text,
        help="folder for the files of the export",
    )
    exporting.add_argument(
        "--form",
        choices=FORMS,
        default=NNSSL_FORM,
        help="huggingface: model.safetensors, config.json and a model card (README.md); nnssl: "
        "checkpoint_final.pth and its plan, for a ViT the checkpoint of AR-SSL4M (default: "
        "%(default)s)",
    )
    exporting.add_argument(
        "--token-order",
        choices=list(WRITTEN_ORDERS),
        default="nnunet",
        help="order of a transformer's tokens in nnssl's format. nnunet: (w, h, d), for nnU-Net; "
        "nnssl: (h, w, d), for readers that flatten tokens as nnssl does (default: %(default)s)",
    )


def _add_action(actions: Any, name: str, purpose: str) -> argparse.ArgumentParser:
    """Add a subcommand, and show its purpose in both the command's help and its own."""
    description = f"{purpose[0].upper()}{purpose[1:]}."
    added: argparse.ArgumentParser = actions.add_parser(
        name,
        help=purpose,
        description=description,
    )
    return added


def _add_statements(p: argparse.ArgumentParser) -> None:
    """Add the options that supply or correct the information in a file."""
    axes = ("Z", "Y", "X")
    p.add_argument(
        "--adaptation-plan",
        type=local_path,
        metavar="FILE",
        help="nnssl's adaptation_plan.json (default: the one in the weights file or beside it)",
    )
    p.add_argument(
        "--token-order",
        choices=TOKEN_ORDERS,
        help="order of the tokens in nnssl's transformers. permute: correct it; keep: load the "
        "weights uncorrected, as nnU-Net would (default: permute)",
    )
    p.add_argument(
        "--heads",
        dest="num_heads",
        type=int,
        metavar="N",
        help="number of attention heads (default: from the file)",
    )
    p.add_argument(
        "--patch-size",
        dest="patch_size_vox",
        type=int,
        nargs=3,
        metavar=axes,
        help="voxels of a pretraining patch (default: from the file)",
    )
    p.add_argument(
        "--spacing",
        dest="spacing_mm",
        type=float,
        nargs=3,
        metavar=axes,
        help="voxel size of pretraining in mm (default: from the file)",
    )
    p.add_argument(
        "--modality",
        dest="modalities",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modalities of pretraining: CT, MR, ... (default: from the file)",
    )
    p.add_argument(
        "--licence",
        metavar="TEXT",
        help="licence of the weights (default: from the file, or the model card beside it)",
    )


@command
def main(argv: list[str] | None = None) -> int:
    """List, inspect, import or export; return the exit code."""
    arguments = parser().parse_args(argv)
    prepare_torch()
    configure_logging()
    actions = {"list": _list, "inspect": _inspect, "import": _import, "export": _export}
    return actions[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from nnunet_autoreg.finetune.resolve import LIST_HEAD, list_runs

    rows = list_runs(nnunet_api.results_folder())
    if not rows:
        print("no pretraining is finished, and nothing was imported")
        print_next("autoreg_pretrain -i FOLDER_WITH_YOUR_SCANS --name NAME")
        return 0

    # The last column of a row has no fixed width.
    columns = list(zip_longest(LIST_HEAD, *(row[:-1] for row in rows), fillvalue=""))
    widths = [max(map(len, column)) for column in columns]
    for row in (LIST_HEAD, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        print("  ".join([*map(printable, cells), printable(row[-1])]))
    print_next("autoreg_weights inspect NAME")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from nnunet_autoreg.convert.hub import local_weights
    from nnunet_autoreg.convert.inspecting import inspect_weights
    from nnunet_autoreg.finetune.resolve import locate

    # Not a path: the name of a run.
    path = local_weights(arguments.path)
    if not path.exists():
        path = locate(nnunet_api.results_folder(), arguments.path, given_as="inspect ")

    facts, following = inspect_weights(path, _import_options(arguments), arguments.adaptation_plan)
    for name, text in facts:
        print(f"{name:<19} {printable(text)}")

    print_next(following)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    # Before torch is imported, which takes seconds.
    check_run_name(arguments.name)
    results = nnunet_api.results_folder()
    from nnunet_autoreg.convert.hub import local_weights
    from nnunet_autoreg.convert.importing import import_weights

    card, imported = import_weights(
        local_weights(arguments.path),
        arguments.name,
        results,
        _import_options(arguments),
        arguments.adaptation_plan,
    )

    # What was assumed, changed or left out.
    for note in imported.notes:
        print(textwrap.indent(note, "  "))

    # A tensor that the file holds under two names counts once.
    num_tensors = len(imported.tensors) + len(imported.decoder)
    print(
        f"imported {num_tensors} tensors as '{card.name}': {card.encoder}, sha256 "
        f"{card.sha256[:12]}...",
    )
    print(card.licence_line or "licences of the weights: none stated")
    print_next(
        f"export autoreg_weights={card.name}; nnUNetv2_plan_and_preprocess -d DATASET -pl "
        "AutoregPlanner -c 3d_fullres",
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from nnunet_autoreg.convert.exporting import export_weights
    from nnunet_autoreg.finetune.resolve import locate

    weights = locate(nnunet_api.results_folder(), arguments.name, given_as="export ")
    exported = export_weights(
        weights,
        Path(arguments.folder),
        arguments.form,
        WRITTEN_ORDERS[arguments.token_order],
    )

    # The limits of the format.
    for warning in exported.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)

    for file in exported.files:
        print(f"wrote {file}")

    if exported.card.licence_line:
        print(exported.card.licence_line)

    folder = shell_quoted(arguments.folder)
    if arguments.form == HUGGINGFACE_FORM:
        print_next(
            f"read {folder}/README.md and check the licence, then share it: hf upload OWNER/NAME "
            f"{folder}",
        )
    else:
        print_next(f"autoreg_weights inspect {folder}")
    return 0


def _import_options(arguments: argparse.Namespace) -> "ImportOptions":
    from nnunet_autoreg.convert.imported import ImportOptions

    options = options_for(ImportOptions, arguments)

    # An option is a number, a list of them, or None if it was not typed.
    for name, flag in FLAGS_OF_NUMBERS.items():
        value = options[name]
        numbers = value if isinstance(value, tuple) else (value,)
        if any(number is not None and not number > 0 for number in numbers):
            typed = " ".join(str(number) for number in numbers)
            raise UsageError(f"{flag} {typed}: must be greater than 0", code="usage-number")
    return ImportOptions(**options)


if __name__ == "__main__":
    sys.exit(main())
