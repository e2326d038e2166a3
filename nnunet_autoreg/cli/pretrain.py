"""``autoreg_pretrain``: unlabelled scans in, a pretrained encoder out."""

import argparse
from pathlib import Path

from nnunet_autoreg.cli.common import command, configure_logging, prepare_torch, print_next
from nnunet_autoreg.model.sizes import ENCODERS


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="autoreg_pretrain",
        description="Pretrain a 3D encoder on unlabelled scans by autoregressive sequence modelling. Finds, checks, plans, "
        "preprocesses, trains and leaves weights that nnUNetv2_plan_and_preprocess -pl AutoregPlanner picks up. "
        "The same line typed again continues where it stopped.",
    )
    p.add_argument("-d", nargs="+", default=[], metavar="ID",
                   help="nnU-Net raw datasets (4 or Dataset004_Name): images only, every channel a scan")
    p.add_argument("-i", nargs="+", default=[], metavar="FOLDER", help="folders with NIfTI, NRRD or MetaImage scans, searched recursively")
    p.add_argument("--name", required=True, help="name of the run: results go to $nnUNet_results/autoreg_pretraining/NAME")
    p.add_argument("--encoder", default="auto", choices=["auto", *ENCODERS], help="default: chosen by device, image size and memory")
    p.add_argument("--steps", type=int, metavar="N", help="optimiser steps; default: planned from the amount of data")
    p.add_argument("--batch", type=int, metavar="N", help="crops per step; default: planned from the memory")
    p.add_argument("--device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one")
    p.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random (default 0)")
    p.add_argument("--modality", metavar="NAME", help="CT, MR, ... for all scans; default: dataset.json, else by Hounsfield-like values")
    p.add_argument("--exclude", metavar="FILE", help="paths or ids to leave out, one a line, or an nnU-Net splits_final.json "
                   "(leaves out the validation cases of its first fold)")
    p.add_argument("--manifest", metavar="FILE", help="CSV that says of scans what they are: path (of a file or folder), and any of "
                   "subject, session, contrast, class, modality")
    p.add_argument("--init", metavar="FILE", help="start from these weights (encoder.safetensors with its encoder.json beside it)")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override planned values, e.g. optim.lr=3e-4")
    p.add_argument("--dry-run", action="store_true", help="write plan.json and scans.csv, then stop")
    return p


def absolute(path: str | None) -> str | None:
    """The absolute form of a path; whether it exists is asked when it is needed, which a continued run may not."""
    return None if path is None else str(Path(path).resolve())


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parser().parse_args(argv)
    configure_logging()
    prepare_torch()
    from nnunet_autoreg.pretrain.folder import Request
    from nnunet_autoreg.pretrain.run import check_device, default_device, pretrain

    request = Request(
        name=args.name,
        datasets=tuple(args.d),
        folders=tuple(str(absolute(folder)) for folder in args.i),
        encoder=args.encoder,
        num_steps=args.steps,
        batch_size=args.batch,
        seed=args.seed,
        modality=args.modality,
        exclude=absolute(args.exclude),
        manifest=absolute(args.manifest),
        init=absolute(args.init),
        settings=tuple(args.set),
    ).check()
    device = check_device(args.device) if args.device else default_device()
    outcome = pretrain(request, device, args.dry_run)
    if not outcome.finished:
        print_next(f"look at {outcome.folder / 'plan.json'} and {outcome.folder / 'scans.csv'}, edit the plan if you like, "
                   "then type the same line without --dry-run")
        return 0
    dataset = args.d[0] if args.d else "ID"
    print_next(f"nnUNetv2_plan_and_preprocess -d {dataset} -pl AutoregPlanner")
    return 0
