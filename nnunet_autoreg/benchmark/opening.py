"""Open the folder of a benchmark: split the patients, or read the split of an earlier call."""

from pathlib import Path

from nnunet_autoreg.benchmark.commands import Commands
from nnunet_autoreg.benchmark.prepare import (
    Bench,
    images_of,
    open_record,
    with_labels,
    write_exclude,
)
from nnunet_autoreg.benchmark.protocol import BenchmarkFolders, BenchmarkRequest
from nnunet_autoreg.benchmark.public_ids import NO_IDS, read_ids
from nnunet_autoreg.machine import usable_cores
from nnunet_autoreg.nnunet_api import dataset_folder, preprocessed_folder, results_folder


def open_bench(request: BenchmarkRequest, root: Path, device: str, num_jobs: int) -> Bench:
    """Return the benchmark of a folder, and write the list of patients to leave out of pretraining.

    The patients are split on the first call; later calls read the split.
    """
    layout = BenchmarkFolders(root, request.dataset)
    images = images_of(request.dataset)
    folders = {"nnUNet_preprocessed": layout.preprocessed, "nnUNet_results": layout.results}
    # Trainings that run at the same time share the cores.
    num_threads = max(1, usable_cores() // num_jobs)
    commands = Commands(root / "commands.log", device, num_threads, folders)
    record = open_record(root, request, sorted(images), dataset_folder(request.dataset))
    request = with_labels(request, record)
    write_exclude(layout, record, request.split)
    return Bench(
        request,
        layout,
        record,
        images,
        commands,
        preprocessed_folder(),
        results_folder(),
        min(8, usable_cores()),
        read_ids(root) if record.has_ids else NO_IDS,
    )
