"""``autoreg_evaluate_classification``: predicted classes against true ones, with pictures."""

import argparse
import logging
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
from nnunet_autoreg.cli.options import add_seed, local_path, num_resamples
from nnunet_autoreg.errors import UsageError
from nnunet_autoreg.records import write_json
from nnunet_autoreg.stopping import writes_at_the_end

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassEvaluationRequest:
    """The options of the command, under the names of the parser below."""

    predictions: Path
    truth: Path
    output: Path
    num_resamples: int
    seed: int


def parser() -> argparse.ArgumentParser:
    """Return the command's parser; its values are the fields of ``ClassEvaluationRequest``."""
    p = CommandParser(
        examples=[
            "autoreg_evaluate_classification -p classes.csv -g classesTs.csv -o scores.json",
        ],
        prog="autoreg_evaluate_classification",
        description="Score predicted classes: AUC, balanced accuracy, F1, accuracy, calibration "
        "and confusion, with 95 % intervals over patients. FILE.json gets every figure, FILE.png "
        "the ROC curve with its interval, the confusion matrix and the calibration of every task.",
    )
    add = p.add_argument
    add(
        "-p",
        dest="predictions",
        metavar="PRED",
        type=local_path,
        required=True,
        help="folder that autoreg_classify wrote, or its classes.csv; or the folder validation of "
        "a trained fold",
    )
    add(
        "-g",
        dest="truth",
        metavar="CSV",
        type=local_path,
        required=True,
        help="true classes: the column case, one column per task, and optionally patient; an empty "
        "cell is not known and not scored",
    )
    add(
        "-o",
        dest="output",
        metavar="FILE",
        type=local_path,
        required=True,
        help="where to write, e.g. metrics.json; its ending is replaced",
    )
    add(
        "--bootstrap",
        dest="num_resamples",
        metavar="N",
        type=num_resamples,
        default=1000,
        help="resamples of the patients for 95 %% intervals; 0 for no intervals (default: "
        "%(default)s)",
    )
    add_seed(p, " of the resamples")
    return p


@command
def main(argv: list[str] | None = None) -> int:
    """Score, write, and print the main figures. Returns 0."""
    request = ClassEvaluationRequest(**vars(parser().parse_args(argv)))
    configure_logging()
    writes_at_the_end()
    prepare_torch()
    if request.output.is_dir():
        raise UsageError(
            f"-o {request.output} is a folder; give a file in it, e.g. "
            f"{request.output / 'metrics.json'}",
            code="evaluation-output-is-folder",
        )
    from nnunet_autoreg.classification.evaluate import evaluate_folders, lines_of
    from nnunet_autoreg.classification.pictures import draw_tasks

    results = evaluate_folders(
        request.predictions,
        request.truth,
        request.num_resamples,
        request.seed,
    )

    # An ending that is not ours, such as that of "run.1", belongs to the name.
    stem = request.output
    if stem.suffix in (".json", ".png"):
        stem = stem.with_suffix("")
    json_file, picture = stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.png")

    # Write the figures first, because drawing the picture may fail.
    write_json(json_file, results)
    for line in lines_of(results):
        print(line)
    draw_tasks(picture, results["tasks"])
    log.info("wrote %s, %s", json_file, picture)
    print_next(f"look at {picture}")
    return 0
