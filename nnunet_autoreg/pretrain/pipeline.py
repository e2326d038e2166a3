"""One pretraining from the request to the encoder: index, plan, preprocess, train, export.

File 1 of 11 in reading order. It shows the whole process. The other files follow its steps. Every
step may be interrupted and repeated, because what a step has finished is written to the run's
folder or to the store of preprocessed cases.
"""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nnunet_autoreg import checkpoint, nnunet_api
from nnunet_autoreg.corpus.exclude import read_exclude
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.fingerprint import fingerprint, row_spacing, transpose_axes
from nnunet_autoreg.corpus.identity import load_salt
from nnunet_autoreg.corpus.index import Index, index_scans
from nnunet_autoreg.corpus.journal import JOURNAL_NAME
from nnunet_autoreg.corpus.licences import read_licences, write_licences
from nnunet_autoreg.corpus.manifest import read_manifest
from nnunet_autoreg.corpus.private import PATH_FIELDS, hide_paths
from nnunet_autoreg.corpus.rows import OK, ScanRow, read_index, write_index
from nnunet_autoreg.corpus.spacing import parse_policy
from nnunet_autoreg.errors import AutoregError
from nnunet_autoreg.geometry import size_text
from nnunet_autoreg.machine import has_bf16, num_processes
from nnunet_autoreg.model.card import WEIGHTS_NAME, EncoderCard, read_card
from nnunet_autoreg.model.verdict import NO_VERDICT, Verdict
from nnunet_autoreg.objective_kinds import kind_of
from nnunet_autoreg.phases import phase, signs_of_life
from nnunet_autoreg.plan import DEFAULT_OBJECTIVE, Plan, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.length import expected_seconds, needs_timing
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import hardware_of, pool_of
from nnunet_autoreg.pretrain.checkpointing import (
    check_initial_weights,
    export_encoder,
    prepare_starting_point,
)
from nnunet_autoreg.pretrain.launcher import Launcher, run_main
from nnunet_autoreg.pretrain.preprocessing import (
    make_sampling_pools,
    plan_with_sequences,
    remove_failed,
    split_as_planned,
    usable_rows,
    volumes_of,
)
from nnunet_autoreg.pretrain.request import (
    INDEX_NAME,
    Request,
    check_inputs,
    check_paths,
    continued_plan,
    has_plan,
    index_of,
    is_finished,
    is_planned_anew,
    locked,
    logged_to,
    overrides_of,
    read_plan,
    run_folder,
    with_presets,
    write_plan,
)
from nnunet_autoreg.records import to_jsonable, write_json
from nnunet_autoreg.report.fingerprint_picture import draw_fingerprint
from nnunet_autoreg.report.preview import draw_preview
from nnunet_autoreg.report.report import REPORT_NAME, RunSetting
from nnunet_autoreg.stopping import stoppable
from nnunet_autoreg.store.store import Store
from nnunet_autoreg.wording import counted, duration

log = logging.getLogger(__name__)

WIDTH = 10
"""Width of the first column of the summaries at the start and at the end."""


def pretrain(
    request: Request,
    device: str,
    dry_run: bool = False,
    show: bool = False,
    launcher: Launcher | None = None,
) -> bool:
    """Do the remaining steps of a run; return whether it is finished.

    Args:
        device: cpu, cuda or mps.
        dry_run: stop after plan.json and scans.csv are written.
        show: before that, preprocess a few scans and draw ``sequences.png``.
        launcher: starts the processes of the training; None to train in this process.

    Raises:
        UsageError: the request is wrong, or differs from the one that the run was made with.
        AutoregError: there is no usable scan, or training failed; finished work is kept.
    """
    folder = run_folder(nnunet_api.results_folder(), request.check().name)
    # Refused now rather than after hours of indexing.
    nnunet_api.preprocessed_folder()

    began = time.monotonic()
    with stoppable(), signs_of_life(), locked(folder), logged_to(folder):
        is_new = not has_plan(folder) or is_planned_anew(folder, request)
        if not is_new:
            plan, rows = continue_run(folder, request)
        else:
            check_paths(request)
            card = None
            if request.init:
                card = prepare_starting_point(request.init, folder)
            check_inputs(request, card)
            index = index_inputs(folder, request)
            plan, rows = plan_run(folder, request, index, device, card)

        for line in start_lines(folder, plan, rows, device, is_new):
            log.info(line)

        if show:
            draw_preview(folder, plan, rows, Store(), num_processes())
        finished = is_finished(folder, plan)
        if dry_run:
            if not finished:
                log.info(time_line(folder, plan, device))
            return finished

        if not finished:
            preprocess_and_train(folder, plan, rows, device, launcher or Launcher())
            # A length in hours became a number of steps when a step was timed.
            plan = read_plan(folder)
        verdict = read_card(folder).verdict or NO_VERDICT
        for line in end_lines(folder, plan, len(rows), time.monotonic() - began, verdict):
            log.info(line)
        return True


def continue_run(folder: Path, request: Request) -> tuple[Plan, list[ScanRow]]:
    """Return the plan and the usable scans of a run that was planned earlier.

    Raises:
        UsageError: the request differs from the one that the run was made with.
    """
    plan = check(continued_plan(folder, request))
    if not checkpoint.exists(folder):
        # The user may have edited the plan before training begins.
        from nnunet_autoreg.pretrain.dry_run import check_network

        with phase("building the network"):
            check_network(plan)

    rows = usable_rows(read_index(index_of(folder)))
    return plan, rows


def index_inputs(folder: Path, request: Request) -> Index:
    """Find, check and index the inputs, and write ``scans.csv``.

    Raises:
        UsageError: an input, the exclusions, the manifest or the store's salt cannot be used.
        AutoregError: there is no usable scan, or a worker process died. The next call continues.
    """
    with phase("looking for scans"):
        takes_images = kind_of(request.objective).takes_images
        exclude = read_exclude(Path(request.exclude)) if request.exclude else set()
        manifest = read_manifest(Path(request.manifest)) if request.manifest else None
        salt = load_salt(Store().root)
        folders = [Path(name) for name in request.folders]
        candidates = find_scans(
            list(request.datasets),
            folders,
            split_4d=request.split_4d,
            salt=salt,
            images=takes_images,
        )

        # An interrupted call continues from the journal.
        journal = folder / JOURNAL_NAME
        index = index_scans(
            candidates,
            exclude,
            num_processes(),
            request.modality,
            salt=salt,
            manifest=manifest,
            journal=journal,
            images=takes_images,
        )
        write_licences(folder, index.rows)
        # Paths may contain names of patients, and users share the run's folder.
        _, paths = hide_paths(to_jsonable(request), PATH_FIELDS)
        write_index(folder / INDEX_NAME, index.rows, paths)
        journal.unlink(missing_ok=True)

    log_counts(index.rows, folder / INDEX_NAME)
    if not index.rows:
        raise AutoregError(
            "no scan was found; give other datasets (-d) or folders (-i)",
            code="run-no-scan",
        )
    if not index.usable:
        raise AutoregError(
            f"none of the {len(index.rows)} scans found can be used; {folder / INDEX_NAME} gives "
            "the reason for each",
            code="run-no-usable-scan",
        )
    return index


def log_counts(rows: Sequence[ScanRow], index_file: Path) -> None:
    """Log how many scans are usable, how many are left out, and how modalities were found."""
    log.info(scans_line(rows, index_file))
    modalities = Counter((row.modality, row.modality_rule) for row in usable_rows(rows))
    for (modality, rule), count in modalities.items():
        log.debug("%s: %s (%s)", modality, counted(count, "scan"), rule)


def plan_run(
    folder: Path,
    request: Request,
    index: Index,
    device: str,
    card: EncoderCard | None = None,
) -> tuple[Plan, list[ScanRow]]:
    """Write ``plan.json``; return the plan and the usable scans.

    Args:
        card: card of the weights of ``--init``.

    Raises:
        UsageError: an option does not suit the scans.
        PlanError: a planned value is impossible.
        WeightsError: training cannot start from the weights named by ``--init``.
    """
    from nnunet_autoreg.pretrain.dry_run import (
        check_network,
        step_memory,
        with_fitting_parts,
    )

    rows = list(index.usable)
    with phase("planning"):
        summary = fingerprint(index, parse_policy(request.spacing))
        plan = make_plan(
            request.name,
            pool_of(summary),
            hardware_of(device, request.gpu_memory_gib),
            overrides_of(request, card),
            request.seed,
            to_jsonable(request),
            partial(step_memory, half=has_bf16(device)),
        )
        # Later rules override earlier ones: kinds of sequences, then presets, then --set.
        training, _ = split_as_planned(plan, rows)
        volumes, training_volumes = volumes_of(rows), volumes_of(training)
        plan = plan_with_sequences(
            folder,
            plan,
            request,
            training_volumes,
            volumes,
            num_processes(),
        )
        plan = with_presets(plan, request)
        num_images = len(training) - len(training_volumes)
        plan = kind_of(request.objective).fit(plan, len(training_volumes), num_images)
        plan = check(override(plan, list(request.settings)))
        check_network(plan)
        hardware = hardware_of(device, request.gpu_memory_gib)
        plan = with_fitting_parts(plan, hardware, has_bf16(device))
        check_initial_weights(plan, folder)

        write_json(folder / "fingerprint.json", summary)
        picture = folder / "fingerprint.png"
        draw_fingerprint(picture, summary, volumes, plan, len(rows) - len(volumes))
        # The plan is written last: it marks that planning is complete.
        write_plan(folder, plan)

    for key, reason in plan.reasons.items():
        log.debug("%s = %s (%s)", key, value_at(plan, key), reason)
    return plan, rows


def value_at(plan: Plan, key: str) -> object:
    """Return the value of a dotted key of the plan, such as ``optim.lr``."""
    node: object = plan
    for part in key.split("."):
        # Some records of the plan are dicts, such as the arguments of an encoder.
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node


def preprocess_and_train(
    folder: Path,
    plan: Plan,
    rows: list[ScanRow],
    device: str,
    launcher: Launcher,
) -> None:
    """Preprocess missing scans, train to the plan's last step, and export the encoder.

    Raises:
        AutoregError: no scan could be preprocessed, or training failed; finished work is kept.
    """
    with phase("loading torch"):
        from nnunet_autoreg.downstream.probe import labelled_crops
        from nnunet_autoreg.pretrain.distributed import process_share
        from nnunet_autoreg.pretrain.dry_run import fit_to_device, memory_errors_in_one_line
        from nnunet_autoreg.pretrain.trainer import TrainingJob
        from nnunet_autoreg.pretrain.validation import verdict_of

    # Refuse a batch that the processes cannot share before hours of preprocessing.
    process_share(plan.optim.batch_size, 0, launcher.launch.size)

    store = Store()
    spacing_of = partial(row_spacing, data=plan.data)
    keys = store.ensure(rows, spacing_of, plan.data.ct_window, num_processes())
    rows = remove_failed(folder, rows, store, has_begun=checkpoint.exists(folder))
    cases = {row.id: store.open(keys[row.id]) for row in rows}
    training, validation = split_as_planned(plan, rows)
    log.info("%s to train on, %d for validation", counted(len(training), "scan"), len(validation))

    def make_job(plan: Plan) -> TrainingJob:
        with phase("collecting the cases of each kind of sequence"):
            pools = make_sampling_pools(
                folder,
                plan,
                store,
                cases,
                training,
                validation,
                num_processes(),
            )
        with phase(f"reading label maps of {len(rows)} scans for the probe"):
            probe = labelled_crops(plan, volumes_of(rows), cases, {row.id for row in validation})
        is_new = not checkpoint.exists(folder)
        return TrainingJob(folder, plan, device, *pools, probe, is_new, launcher.launch.local_size)

    # The pools depend on the crop, so a smaller crop needs a new job.
    job = fit_to_device(make_job(plan), make_job, launcher.launch.size)

    with launcher.world() as world, memory_errors_in_one_line():
        in_mm = [row.spacing_mm for row in volumes_of(validation) if row.spacing_mm]
        all_axes = {transpose_axes(spacing_mm) for spacing_mm in in_mm}
        scan_axes = all_axes.pop() if len(all_axes) == 1 else None
        setting = RunSetting(device, len(training), len(validation), scan_axes)
        trainer = run_main(job, world, launcher.launch.local_rank, setting)
        with phase("exporting the encoder"):
            trainer.checkpoints.require_folder()
            licences = read_licences(folder)
            verdict = verdict_of(
                trainer.health_watch.health,
                len(rows),
                len(validation),
                plan.data.min_scans,
            )
            # Fine-tuning chooses an encoder by modality, and 2D images have none.
            volumes = volumes_of(rows)
            export_encoder(folder, trainer.plan, trainer.objective, volumes, licences, verdict)
        world.wait()


def scans_line(rows: Sequence[ScanRow], index_file: Path) -> str:
    """Return a line with the numbers of usable scans, by modality, and of those left out."""
    modalities = Counter(row.modality for row in rows if row.status == OK)
    num_usable = modalities.total()
    by_modality = ", ".join(f"{count:,} {name}" for name, count in modalities.most_common())
    usable = f" ({by_modality})" if by_modality else ""

    reasons = Counter(row.status for row in rows if row.status != OK)
    if not reasons:
        return _line("found", f"{counted(num_usable, 'usable scan')}{usable}, none left out")
    by_reason = ", ".join(f"{count:,} {status}" for status, count in reasons.most_common())
    return _line(
        "found",
        f"{counted(num_usable, 'usable scan')}{usable}; {reasons.total():,} left out "
        f"({by_reason}), see {index_file}",
    )


def start_lines(
    folder: Path,
    plan: Plan,
    rows: Sequence[ScanRow],
    device: str,
    is_new: bool,
) -> list[str]:
    """Return six lines about what the run will do.

    Args:
        rows: the usable scans.
        is_new: the run was not planned by an earlier call.
    """
    optim, crop = plan.optim, size_text(plan.sequence.crop_size_vox)
    spacing = size_text(plan.data.spacing_mm, ".3g")
    token = size_text(plan.encoder.token_size_vox)
    objective = plan.request.get("objective", DEFAULT_OBJECTIVE)
    length = counted(optim.num_steps, "step")
    if needs_timing(plan):
        length = f"{plan.request['num_hours']:g} h"
    return [
        _line("run", f"{plan.name} ({'new' if is_new else 'continued'}) in {folder}"),
        _line(
            "scans",
            f"{len(rows):,}, of which {100 * plan.data.holdout_fraction:.0f} % for validation",
        ),
        _line("encoder", f"{plan.encoder.name}, tokens of {token} voxels, on {device}"),
        _line("crops", f"{crop} voxels of {spacing} mm, {optim.batch_size:,} per step"),
        _line("training", f"{length}, {objective}, rate {optim.lr:g}"),
        _line("details", "plan.json gives the reason of every value; -v shows them here"),
    ]


def time_line(folder: Path, plan: Plan, device: str) -> str:
    """Return a line with the expected time of a run."""
    if plan.request.get("num_hours") is not None:
        return _line("time", f"{plan.request['num_hours']:g} h as given, after preprocessing")
    if checkpoint.exists(folder):
        return _line("time", "the training's log says how long the remaining steps take")

    with phase("loading torch"):
        from nnunet_autoreg.pretrain.dry_run import with_estimated_seconds

    plan = with_estimated_seconds(folder, plan, device)
    seconds = expected_seconds(plan, device)
    if seconds is None:
        return _line("time", "unknown; the training times a step first")
    step = duration(seconds / plan.optim.num_steps)
    return _line(
        "time",
        f"about {duration(seconds)} on this {'GPU' if device == 'cuda' else 'computer'} "
        f"({step} a step, timed now), plus preprocessing and validation",
    )


def end_lines(
    folder: Path,
    plan: Plan,
    num_scans: int,
    seconds: float,
    verdict: Verdict,
) -> list[str]:
    """Return four lines: what was done, where the results are, and the verdict.

    Args:
        seconds: duration of this call.
    """
    steps, scans = counted(plan.optim.num_steps, "step"), counted(num_scans, "scan")
    return [
        _line("finished", f"{steps} on {scans}; this call took {duration(seconds)}"),
        _line("weights", str(folder / WEIGHTS_NAME)),
        _line("report", str(folder / REPORT_NAME)),
        _line("verdict", verdict.message),
    ]


def _line(name: str, text: str) -> str:
    return f"{name:<{WIDTH}}{text}"
