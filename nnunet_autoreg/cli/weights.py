"""``autoreg_weights``: look at, import and export pretrained encoders."""

import argparse
import shlex
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg import nnunet_api
from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.errors import UsageError, printable
from nnunet_autoreg.geometry import as_size, as_spacing
from nnunet_autoreg.model.card import check_run_name

if TYPE_CHECKING:
    from nnunet_autoreg.convert.imported import Options

TOKEN_ORDERS = ("permute", "keep")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_weights",
        description="Pretrained encoders: what a file is, other people's as ours, ours in other "
        "people's formats. Files are read without "
        "running anything in them.",
    )
    actions = p.add_subparsers(dest="action", required=True)
    look = actions.add_parser(
        "inspect", help="what a weights file is, what it needs, its licence and hash"
    )
    look.add_argument(
        "path",
        metavar="FILE|FOLDER",
        help="a weights file, or a folder that holds one; also the name of a run",
    )
    take = actions.add_parser(
        "import",
        help="AR-SSL4M, or nnssl's formats (OpenMind, nnFoundation), as a finished pretraining "
        "that AutoregPlanner can use",
    )
    take.add_argument(
        "path", metavar="FILE|FOLDER", help="a checkpoint, or the folder of a downloaded repository"
    )
    take.add_argument(
        "--name", required=True, help="goes to $nnUNet_results/autoreg_pretraining/NAME"
    )
    for sub in (look, take):
        _add_statements(sub)
    give = actions.add_parser(
        "export",
        help="a finished pretraining in nnssl's format, which nnU-Net's master branch and "
        "nnDetection read; a ViT as AR-SSL4M's",
    )
    give.add_argument("name", metavar="NAME", help="a run, its folder, or its encoder.safetensors")
    give.add_argument(
        "-o",
        dest="folder",
        required=True,
        metavar="FOLDER",
        help="where checkpoint_final.pth and its plan go",
    )
    return p


def _add_statements(p: argparse.ArgumentParser) -> None:
    """What the user may know better than the file."""
    p.add_argument(
        "--adaptation-plan",
        metavar="FILE",
        help="nnssl's adaptation_plan.json, where it is neither in the file nor beside it",
    )
    p.add_argument(
        "--token-order",
        choices=TOKEN_ORDERS,
        help="of nnssl's transformers: permute mends it (default), keep loads the "
        "weights uncorrected, as nnU-Net would",
    )
    p.add_argument(
        "--heads", type=int, metavar="N", help="attention heads, where the file does not say"
    )
    axes = ("Z", "Y", "X")
    p.add_argument(
        "--patch-size",
        type=int,
        nargs=3,
        metavar=axes,
        help="voxels of pretraining, where the file is wrong or silent",
    )
    p.add_argument(
        "--spacing",
        type=float,
        nargs=3,
        metavar=axes,
        help="mm of pretraining, where the file is wrong or silent",
    )
    p.add_argument(
        "--modality",
        nargs="+",
        default=[],
        metavar="NAME",
        help="CT, MR, ... of pretraining, where the file does not say",
    )
    p.add_argument(
        "--licence", metavar="TEXT", help="the licence of the weights, where the file does not say"
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Inspect, import or export; return the exit code."""
    arguments = parser().parse_args(argv)
    prepare_torch()
    configure_logging()
    if arguments.action == "inspect":
        return _inspect(arguments)
    if arguments.action == "import":
        return _import(arguments)
    return _export(arguments)


def _inspect(arguments: argparse.Namespace) -> int:
    from nnunet_autoreg.convert.inspecting import inspect_weights

    facts, following = inspect_weights(_path(arguments.path), _options(arguments), _plan(arguments))
    for name, text in facts:
        print(f"{name:<19} {printable(text)}")
    print_next(following)
    return 0


def _import(arguments: argparse.Namespace) -> int:
    check_run_name(arguments.name)
    results = nnunet_api.results_folder()
    from nnunet_autoreg.convert.importing import import_weights

    card, imported = import_weights(
        Path(arguments.path), arguments.name, results, _options(arguments), _plan(arguments)
    )
    for note in imported.notes:
        print(textwrap.indent(note, "  "))
    print(
        f"imported {len(imported.tensors)} tensors as '{card.name}': {card.encoder}, sha256 "
        f"{card.sha256[:12]}..."
    )
    print(card.licence_line or "licences of the weights: none stated")
    print_next(
        f"export autoreg_weights={card.name}; nnUNetv2_plan_and_preprocess -d DATASET -pl "
        "AutoregPlanner -c 3d_fullres"
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from nnunet_autoreg.convert.exporting import export_weights
    from nnunet_autoreg.finetune.resolve import locate

    done = export_weights(
        locate(nnunet_api.results_folder(), arguments.name), Path(arguments.folder)
    )
    for warning in done.warnings:
        print(f"WARNING: {warning}", file=sys.stderr)
    for file in done.files:
        print(f"wrote {file}")
    if done.card.licence_line:
        print(done.card.licence_line)
    print_next(f"autoreg_weights inspect {shlex.quote(arguments.folder)}")
    return 0


def _path(text: str) -> Path:
    """The path, or the folder of the run of that name."""
    path = Path(text)
    if path.exists():
        return path
    from nnunet_autoreg.finetune.resolve import locate

    return locate(nnunet_api.results_folder(), text)


def _plan(arguments: argparse.Namespace) -> Path | None:
    return Path(arguments.adaptation_plan) if arguments.adaptation_plan else None


def _options(arguments: argparse.Namespace) -> "Options":
    from nnunet_autoreg.convert.imported import Options

    for flag, values in (
        ("--heads", [arguments.heads]),
        ("--patch-size", arguments.patch_size),
        ("--spacing", arguments.spacing),
    ):
        if any(value is not None and not value > 0 for value in values or ()):
            raise UsageError(f"{flag} {' '.join(str(v) for v in values)}: must be greater than 0")
    return Options(
        token_order=arguments.token_order,
        num_heads=arguments.heads,
        patch_size_vox=as_size(arguments.patch_size) if arguments.patch_size else None,
        spacing_mm=as_spacing(arguments.spacing) if arguments.spacing else None,
        modalities=tuple(arguments.modality),
        licence=arguments.licence,
    )


if __name__ == "__main__":
    sys.exit(main())
