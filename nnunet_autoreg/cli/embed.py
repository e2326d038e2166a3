"""``autoreg_embed``: features of scans from a pretrained encoder."""

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import nnunet_autoreg.cli.starting  # noqa: F401
from nnunet_autoreg.cli.common import (
    CommandParser,
    command,
    configure_logging,
    prepare_torch,
    print_next,
)
from nnunet_autoreg.cli.options import add_device, add_split_4d, local_path
from nnunet_autoreg.errors import AutoregError, ScanError, UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EmbedRequest:
    """The options of the command, under the names of the parser below."""

    weights: str
    scans: Path
    output: Path
    dense: bool
    layer: int
    tile: list[int] | None
    region: str
    labels: Path | None
    margin: float
    device: str | None
    split_4d: bool

    def check_output(self) -> None:
        """Refuse a file that cannot be written, before the work of hours.

        Raises:
            UsageError: its ending or its folder is wrong.
        """
        if self.output.suffix not in (".npz", ".parquet"):
            raise UsageError(
                f"-o {self.output} must end in .npz or .parquet",
                code="embed-output-ending",
            )
        if self.dense and self.output.suffix == ".parquet":
            raise UsageError(
                "--dense: a table cannot hold grids; give -o features.npz",
                code="embed-dense-table",
            )
        if self.output.is_dir():
            raise UsageError(
                f"-o {self.output} is a folder; give a file in it, e.g. "
                f"{self.output / 'features.npz'}",
                code="embed-output-is-folder",
            )
        if not self.output.parent.is_dir():
            raise UsageError(
                f"-o {self.output}: the folder {self.output.parent} does not exist; make it first",
                code="embed-no-folder",
            )
        if not os.access(self.output.parent, os.W_OK):
            raise UsageError(
                f"-o {self.output}: the folder {self.output.parent} cannot be written; give "
                "another",
                code="embed-folder-read-only",
            )

    def check_region(self) -> None:
        """Refuse options of ``--region`` that are missing or contradict each other.

        Raises:
            UsageError: they do.
        """
        is_label = self.region == "label"
        if is_label and self.labels is None:
            raise UsageError(
                "--region label needs --labels FOLDER, with a label map for every scan",
                code="embed-no-labels",
            )
        if not is_label and self.labels is not None:
            raise UsageError(
                f"--labels {self.labels} is not used; add --region label",
                code="embed-unused-labels",
            )
        if self.labels is not None and not self.labels.is_dir():
            raise UsageError(
                f"--labels {self.labels} is not a folder; give the folder of the label maps",
                code="embed-labels-folder",
            )
        if not 0 <= self.margin < float("inf"):
            raise UsageError(f"--margin {self.margin} must be 0 mm or more", code="embed-margin")


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``EmbedRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_embed -w brain -i imagesTr -o features.npz",
            "autoreg_embed -w chest -i imagesTr -o nodules.npz --region label --labels labelsTr",
        ],
        prog="autoreg_embed",
        description="Write the features that a pretrained encoder computes for scans: one vector "
        "per scan, the mean over all positions. Scans are preprocessed as in pretraining, and "
        "covered by tiles if they are larger than a crop of pretraining. If the command was "
        "interrupted, type it again: it continues with the scans that are missing.",
    )
    _add_files(p)
    _add_feature_options(p)
    _add_region_options(p)
    add_device(p, "where to compute the features")
    add_split_4d(p)
    return p


def _add_files(p: CommandParser) -> None:
    p.add_argument(
        "-w",
        dest="weights",
        required=True,
        metavar="RUN_OR_FILE",
        help="a finished pretraining run, its folder, or its encoder.safetensors",
    )
    p.add_argument(
        "-i",
        dest="scans",
        required=True,
        metavar="SCANS",
        type=local_path,
        help="scans: files named as nnU-Net does (case_0000.nii.gz); or, for encoders of one "
        "channel, any folder, file or .zip archive with DICOM, NIfTI, NRRD or MetaImage scans",
    )
    p.add_argument(
        "-o",
        dest="output",
        required=True,
        metavar="FILE",
        type=local_path,
        help="the file to write: .npz (arrays ids, features and spacing_mm) or .parquet (a row per "
        "scan; needs pyarrow). A .json file beside it names the encoder",
    )


def _add_feature_options(p: CommandParser) -> None:
    p.add_argument(
        "--dense",
        action="store_true",
        help="also write the features of every position, as grid/NAME (features, z, y, x); .npz "
        "only (default: one vector per scan)",
    )
    p.add_argument(
        "--layer",
        type=int,
        default=-1,
        metavar="N",
        help="which feature map: 0 is the finest, -1 the deepest (default: %(default)s)",
    )
    p.add_argument(
        "--tile",
        type=int,
        nargs=3,
        metavar=("Z", "Y", "X"),
        help="voxels of a tile at the spacing of pretraining, a multiple of the token size. Larger "
        "tiles see more context and are faster (default: the crop of pretraining)",
    )


def _add_region_options(p: CommandParser) -> None:
    p.add_argument(
        "--region",
        choices=["scan", "label"],
        default="scan",
        help="region of the mean: the whole scan, or the bounding box of the structure in the "
        "scan's label map, such as a nodule (default: %(default)s)",
    )
    p.add_argument(
        "--labels",
        type=local_path,
        metavar="FOLDER",
        help="label maps for --region label, named like the scans (case.nii.gz)",
    )
    p.add_argument(
        "--margin",
        type=float,
        default=0.0,
        metavar="MM",
        help="enlarge the box of --region label by this many mm on every side (default: "
        "%(default)s)",
    )


@command
def main(argv: list[str] | None = None) -> int:
    """Write the features. Returns 1 if a scan could not be read, else 0."""
    request = EmbedRequest(**vars(parser().parse_args(argv)))
    prepare_torch()
    configure_logging()
    request.check_output()
    request.check_region()

    from nnunet_autoreg.downstream.embed import (
        PARQUET,
        LabelRegion,
        check_parquet,
        embed_scan,
        map_chooser,
        write_features,
    )
    from nnunet_autoreg.downstream.encoder import load_encoder
    from nnunet_autoreg.downstream.kept_features import KeptFeatures, inputs_of, settings_of
    from nnunet_autoreg.downstream.model import prediction_device
    from nnunet_autoreg.downstream.scans import find

    # Everything that may be wrong is found before the first scan is read.
    if request.output.suffix == PARQUET:
        check_parquet()
    device = prediction_device(request.device)
    encoder = load_encoder(request.weights, request.tile)
    map_chooser(encoder, request.layer)
    encoder.to(device)
    num_channels = encoder.card.num_input_channels
    scans = find(request.scans, ".nii.gz", num_channels, request.split_4d)

    region = LabelRegion(request.labels, request.margin) if request.labels is not None else None

    # Every finished scan is kept, so that the same line continues if this call is stopped.
    settings = settings_of(encoder, request.layer, request.dense, region)
    kept = KeptFeatures(request.output, settings)
    inputs = {scan.name: inputs_of(scan, region) for scan in scans}
    earlier = kept.read(inputs)
    if earlier:
        print(f"{len(earlier)} of {len(scans)} scans were done before", flush=True)

    done = []
    for scan in scans:
        found = earlier.get(scan.name)
        if found is None:
            try:
                found = embed_scan(encoder, scan, request.layer, request.dense, device, region)
            except ScanError as error:
                log.warning("%s is left out (%s): %s", scan.name, error.status, error)
                continue
            kept.write(found, inputs[scan.name])
        done.append(found)

        # A log file has no progress bar.
        if len(done) % 50 == 0:
            print(f"{len(done)} of {len(scans)} scans", flush=True)
    if not done:
        raise AutoregError(
            f"none of the {len(scans)} scans of {request.scans} could be read; the warnings above "
            "say why",
            code="embed-none-readable",
        )

    write_features(request.output, done, encoder, request.layer, region)
    kept.remove()
    print(f"wrote {len(done)} vectors of {len(done[0].vector_V)} features to {request.output}")
    reader = "numpy.load" if request.output.suffix == ".npz" else "pandas.read_parquet"
    print_next(f"in Python: {reader}({str(request.output)!r})")
    return 0 if len(done) == len(scans) else 1
