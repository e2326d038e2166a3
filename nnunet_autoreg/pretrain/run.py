"""One pretraining from the request to the encoder: index, plan, store, train, export.

Safe to repeat at any point.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_autoreg import checkpoint, nnunet_api
from nnunet_autoreg.corpus.exclude import read_exclude
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.fingerprint import fingerprint, row_spacing
from nnunet_autoreg.corpus.identity import load_salt
from nnunet_autoreg.corpus.index import Index, index_scans
from nnunet_autoreg.corpus.journal import JOURNAL_NAME
from nnunet_autoreg.corpus.licences import read_licences, write_licences
from nnunet_autoreg.corpus.manifest import read_manifest
from nnunet_autoreg.corpus.private import PATH_FIELDS, hide_paths
from nnunet_autoreg.corpus.rows import ScanRow, read_index, write_index
from nnunet_autoreg.corpus.spacing import parse_policy
from nnunet_autoreg.errors import AutoregError, PlanError, UsageError
from nnunet_autoreg.geometry import Size, as_size
from nnunet_autoreg.model.card import WEIGHTS_NAME, read_card
from nnunet_autoreg.phases import phase, signs_of_life
from nnunet_autoreg.plan import Plan, literal, override
from nnunet_autoreg.plan_check import check
from nnunet_autoreg.planning.length import with_hours
from nnunet_autoreg.planning.make import make_plan
from nnunet_autoreg.planning.pool import BY_USER, Hardware, Pool, Wishes, pool_of
from nnunet_autoreg.presets import PAPER_BATCH, faithful, with_objective
from nnunet_autoreg.pretrain.export import export_encoder
from nnunet_autoreg.pretrain.folder import (
    INDEX_NAME,
    Request,
    continued_plan,
    has_plan,
    index_of,
    is_finished,
    locked,
    log_file,
    run_folder,
    write_plan,
)
from nnunet_autoreg.pretrain.launch import Crew
from nnunet_autoreg.pretrain.machine import hardware, has_half, num_processes, step_memory
from nnunet_autoreg.pretrain.material import make_material, parse_kinds, plan_with_sequences
from nnunet_autoreg.pretrain.pictures import show_sequences
from nnunet_autoreg.pretrain.start import check_start
from nnunet_autoreg.records import to_jsonable, write_json
from nnunet_autoreg.report.fingerprint_picture import draw_fingerprint
from nnunet_autoreg.report.report import Reporter, Setting
from nnunet_autoreg.stopping import stoppable
from nnunet_autoreg.store.store import Store

if TYPE_CHECKING:
    from nnunet_autoreg.pretrain.distributed import World
    from nnunet_autoreg.pretrain.job import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a call did: the run's folder and whether its encoder is there now."""

    folder: Path
    finished: bool


def pretrain(
    request: Request,
    device: str,
    dry_run: bool = False,
    show: bool = False,
    crew: Crew | None = None,
) -> Outcome:
    """Do what is left of the run that ``request`` describes.

    Args:
        device: cpu, cuda or mps.
        dry_run: stop after plan.json and scans.csv.
        show: before that, preprocess a few scans and draw ``sequences.png``.
        crew: the processes that train together; None for this one alone. All but the training is
            done by this one alone, before the others are needed.

    Raises:
        UsageError: the request is wrong, or differs from the one that the run was made with.
        AutoregError: no usable scan, or training failed; what was done is kept.
    """
    folder = run_folder(nnunet_api.results_folder(), request.check().name)
    nnunet_api.preprocessed_folder()
    with stoppable(), signs_of_life(), locked(folder), log_file(folder):
        plan, rows = prepare(folder, request, device)
        if show:
            show_sequences(folder, plan, rows, Store(), num_processes())
        if dry_run:
            return Outcome(folder, is_finished(folder, plan))
        if is_finished(folder, plan):
            log.info(
                "run '%s' is finished: %d steps on %d scans",
                plan.name,
                plan.optim.num_steps,
                len(rows),
            )
            return Outcome(folder, True)
        train(folder, plan, rows, device, crew or Crew())
        return Outcome(folder, True)


def prepare(folder: Path, request: Request, device: str) -> tuple[Plan, list[ScanRow]]:
    """The plan and the usable scans: read from the folder if they are there, else made and written
    (the plan last).
    """
    if has_plan(folder):
        plan = check(continued_plan(folder, request))
        if not checkpoint.exists(folder):
            with phase("building the network"):
                check_network(plan)  # the plan may have been edited
        rows = usable(read_index(index_of(folder)))
        log.info("continuing run '%s': %d scans, %s", plan.name, len(rows), folder)
        return plan, rows
    check_inputs(request)
    with phase("looking for scans"):
        index = index_inputs(folder, request)
    report_left_out(index.rows, folder / INDEX_NAME)
    rows = usable(index.rows)
    if not index.rows:
        raise AutoregError("no scan was found; give other datasets (-d) or folders (-i)")
    if not rows:
        raise AutoregError(
            f"no usable scan was found; {folder / INDEX_NAME} says why for each of "
            f"{len(index.rows)}"
        )
    with phase("planning"):
        print_of = fingerprint(index, parse_policy(request.spacing))
        plan = make_plan(
            request.name,
            pool_of(print_of),
            hardware(device, request.gpu_memory_gib),
            wishes_of(request),
            request.seed,
            to_jsonable(request),
            partial(step_memory, half=has_half(device)),
        )
        plan = with_presets(with_sequences(folder, plan, request, rows), request)
        plan = check(override(plan, list(request.settings)))
        check_network(plan)
        check_start(plan)
        write_json(folder / "fingerprint.json", print_of)
        draw_fingerprint(folder / "fingerprint.png", print_of, rows, plan)
        write_plan(folder, plan)
    for key, reason in plan.reasons.items():
        log.info("%s = %s (%s)", key, value_at(plan, key), reason)
    return plan, rows


def with_sequences(folder: Path, plan: Plan, request: Request, rows: list[ScanRow]) -> Plan:
    """The plan with its kinds of sequences, by what the training scans offer; positions of
    structures are kept in ``places.json``.
    """
    training, _ = split(rows, plan.data.holdout_fraction, plan.run.seed)
    return plan_with_sequences(folder, plan, request, training, rows, num_processes())


def with_presets(plan: Plan, request: Request) -> Plan:
    """The plan for the objective and the preset asked for; what is typed beside a preset counts
    more.
    """
    plan = with_objective(plan, request.objective)
    if request.preset != "faithful":
        return plan
    typed = {"sequence.weights": request.sequences, "optim.batch_size": request.batch_size}
    return faithful(plan, [key for key, value in typed.items() if value])


def index_inputs(folder: Path, request: Request) -> Index:
    """Find, check and index the inputs, and write ``scans.csv``.

    Raises:
        UsageError: an input, the exclusions, the manifest or the store's salt cannot be used.
        AutoregError: a worker process died; what was read is kept for the next call.
    """
    exclude = read_exclude(Path(request.exclude)) if request.exclude else set()
    manifest = read_manifest(Path(request.manifest)) if request.manifest else None
    salt = load_salt(Store().root)
    folders = [Path(f) for f in request.folders]
    candidates = find_scans(list(request.datasets), folders, split_4d=request.split_4d, salt=salt)
    journal = folder / JOURNAL_NAME
    index = index_scans(
        candidates,
        exclude,
        num_processes(),
        request.modality,
        salt=salt,
        manifest=manifest,
        journal=journal,
    )
    write_licences(folder, index.rows)
    _, paths = hide_paths(to_jsonable(request), PATH_FIELDS)
    write_index(folder / INDEX_NAME, index.rows, paths)
    journal.unlink(missing_ok=True)
    return index


def train(folder: Path, plan: Plan, rows: list[ScanRow], device: str, crew: Crew) -> None:
    """Preprocess what is missing, train to the plan's length together with the crew, export the
    encoder.
    """
    with phase("loading torch"):
        from nnunet_autoreg.pretrain.distributed import share_of
        from nnunet_autoreg.pretrain.fit import memory_errors_in_one_line
        from nnunet_autoreg.pretrain.job import Job
        from nnunet_autoreg.pretrain.labels import labelled_crops

    share_of(plan.optim.batch_size, 0, crew.launch.size)
    store = Store()
    keys = store.ensure(
        rows, partial(row_spacing, data=plan.data), plan.data.ct_window, num_processes()
    )
    rows = stored(folder, rows, store, begun=checkpoint.exists(folder))
    training, heldout = split(rows, plan.data.holdout_fraction, plan.run.seed)
    log.info("%d scans to train on, %d held out", len(training), len(heldout))
    cases = {row.id: store.open(keys[row.id]) for row in rows}

    def job_of(plan: Plan) -> Job:
        with phase("gathering what sequences are cut from"):
            parts = make_material(folder, plan, store, cases, training, heldout, num_processes())
        with phase(f"reading label maps of {len(rows)} scans for the probe"):
            probe = labelled_crops(plan, rows, cases, {row.id for row in heldout})
        return Job(
            folder,
            plan,
            device,
            *parts,
            probe,
            not checkpoint.exists(folder),
            crew.launch.local_size,
        )

    job = tried(job_of(plan), job_of, crew.launch.size)
    with crew.world() as world, memory_errors_in_one_line():
        lead(job, world, crew, rows, Setting(device, len(training), len(heldout)))


def tried(job: "Job", job_of: Callable[[Plan], "Job"], num_training: int) -> "Job":
    """The job with a plan that a dry step on this process's device has shown to fit, written once,
    before the first step.

    Args:
        job_of: makes the job of another plan, whose sequences are others.
        num_training: processes that will train together.
    """
    import torch

    from nnunet_autoreg.pretrain.fit import fitted, share_of_plan
    from nnunet_autoreg.pretrain.job import is_shared_out, trainer_of

    was_tried = not job.is_new or job.plan.run.peak_memory_gib is not None
    if was_tried or (num_training > 1 and is_shared_out(job, num_training)):
        return job

    def with_plan(plan: Plan) -> "Job":
        return replace(job, plan=plan) if plan.sequence == job.plan.sequence else job_of(plan)

    with phase("trying a training step, to see that it fits"):
        plan = fitted(
            share_of_plan(job.plan, num_training),
            lambda plan: trainer_of(with_plan(plan)),
            torch.device(job.device),
        )
    write_plan(job.folder, plan)
    return with_plan(plan)


def lead(job: "Job", world: "World", crew: Crew, rows: list[ScanRow], setting: Setting) -> None:
    """The main process's part of the training, and the export; ``job.assist`` is the others'."""
    from nnunet_autoreg.pretrain.job import measured, pictures_of, trainer_of
    from nnunet_autoreg.pretrain.loading import choose_loaders

    folder, place = job.folder, crew.launch.local_rank
    world.share((job, needs_pace(job.plan)))
    if needs_pace(job.plan):
        with phase("measuring how long a step takes"):
            job = measured(
                job,
                world,
                place,
                lambda plan, seconds: with_pace(folder, plan, seconds, job.device),
            )
    if world.size > 1:
        log.info(
            "%d processes train together, %d of %d crops in this one",
            world.size,
            job.plan.optim.batch_size // world.size,
            job.plan.optim.batch_size,
        )
    if job.device == "cuda":
        num_loaders, why = choose_loaders(job.plan, job.device, job.num_local)
        log.info("%d processes load for each GPU (%s)", num_loaders, why)
    with phase("building the network and the validation batches"):
        trainer = trainer_of(job, world, place)
    pictures, reporter = pictures_of(trainer), Reporter(folder, job.plan, setting)

    def report() -> None:
        drawn = pictures() if trainer.is_sharded else None
        reporter.write(pictures if drawn is None else lambda: drawn)

    trainer.after_checkpoint = report
    trainer.run()
    trainer.require_folder()
    with phase("drawing the report"):
        report()
    with phase("exporting the encoder"):
        trainer.require_folder()
        export_encoder(folder, job.plan, trainer.objective, rows, read_licences(folder))
    world.wait()


def needs_pace(plan: Plan) -> bool:
    """Whether the length was given in hours and the step has not been measured yet."""
    is_open = plan.request.get("num_hours") is not None and plan.run.seconds_per_step is None
    return is_open and plan.reasons.get("optim.num_steps") != BY_USER


def with_pace(folder: Path, plan: Plan, seconds: float, device: str) -> Plan:
    """The plan with its hours turned into steps, written once, so that a resumed run is the same
    run.
    """
    plan = with_hours(plan, float(plan.request["num_hours"]), seconds, device)
    write_plan(folder, plan)
    log.info("optim.num_steps = %d (%s)", plan.optim.num_steps, plan.reasons["optim.num_steps"])
    return plan


def check_inputs(request: Request) -> None:
    """Refuse what can be refused before any scan is read.

    Raises:
        UsageError: a path that does not exist, or an unknown or mistyped setting.
    """
    parse_kinds(request.sequences)
    files = {
        "--exclude": request.exclude,
        "--manifest": request.manifest,
        "--init": request.init,
        "--boxes": request.boxes,
    }
    for flag, paths in (
        ("-i", request.folders),
        *((flag, (path,)) for flag, path in files.items()),
    ):
        for path in paths:
            if path and not Path(path).exists():
                raise UsageError(f"{flag} {path}: does not exist")
            # Reading a pipe would wait for its other end forever.
            if path and not (Path(path).is_file() or Path(path).is_dir()):
                raise UsageError(f"{flag} {path}: is neither a file nor a folder")
    if request.init and Path(request.init).is_dir():
        raise UsageError(f"--init {request.init}: is a folder; name the {WEIGHTS_NAME} in it")
    nobody = Pool(1, (1.0, 1.0, 1.0), (64, 64, 64), 64**3, None)
    some, wishes = Hardware("cpu", 1.0), wishes_of(request)
    refused: PlanError | None = None
    # Which family will suit the scans is not known yet, and a setting may be of either.
    for name in ("resenc_tiny", "primus_tiny") if wishes.encoder == "auto" else (wishes.encoder,):
        try:
            sketch = make_plan(
                request.name,
                nobody,
                some,
                replace(wishes, encoder=name),
                request.seed,
                {},
                lambda *_: (0.0, 0.0),
            )
            override(with_presets(sketch, request), list(request.settings))
            return
        except PlanError as error:
            refused = error
    assert refused is not None
    raise refused


def check_network(plan: Plan) -> None:
    """Build the network once, without memory for its weights.

    Raises:
        PlanError: its arguments do not go together.
    """
    import torch

    from nnunet_autoreg.objectives.registry import build_objective

    try:
        with torch.device("meta"):
            build_objective(plan)
    except (
        AssertionError,
        AttributeError,
        ValueError,
        TypeError,
        RuntimeError,
        ArithmeticError,
        LookupError,
    ) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(
            f"encoder.arguments={plan.encoder.arguments}: no network can be built from them ({why})"
        ) from error


def split(
    rows: Sequence[ScanRow], fraction: float, seed: int
) -> tuple[list[ScanRow], list[ScanRow]]:
    """Training and held-out scans.

    All scans of a subject, and all channels of a case, go the same way.

    Which way is told by a hash of the cases' names that other cases do not change; of a subject the
    lowest counts, since its own hash differs between machines.
    """
    cases = {(row.dataset, row.case): row.subject for row in reversed(rows)}
    lowest: dict[object, str] = {}
    for case, subject in cases.items():
        drawn = hashlib.sha256(f"{seed}/{case}".encode()).hexdigest()
        lowest[subject or case] = min(drawn, lowest.get(subject or case, drawn))
    num_heldout = (
        min(max(1, round(fraction * len(lowest))), len(lowest) - 1)
        if fraction > 0 and len(lowest) > 1
        else 0
    )
    chosen = set(sorted(lowest, key=lambda group: lowest[group])[:num_heldout])
    is_heldout = [
        (cases[row.dataset, row.case] or (row.dataset, row.case)) in chosen for row in rows
    ]
    return [r for r, out in zip(rows, is_heldout, strict=True) if not out], [
        r for r, out in zip(rows, is_heldout, strict=True) if out
    ]


def stored(folder: Path, rows: list[ScanRow], store: Store, begun: bool) -> list[ScanRow]:
    """The scans that are in the store; those that could not be preprocessed get their reason in
    scans.csv.

    Args:
        begun: training has begun, so that no scan may leave any more.

    Raises:
        AutoregError: none is left, or one is missing from a run that has begun.
    """
    if not store.failures:
        return rows
    index = folder / INDEX_NAME
    failed = {row: (error.status, str(error)) for row, error in store.failures.items()}
    left = [row for row in rows if row.id not in failed]
    first, (status, reason) = next(iter(failed.items()))
    if not left:
        raise AutoregError(
            f"none of {len(rows)} scans could be preprocessed; the first, {first}, is {status}: "
            f"{reason}"
        )
    if begun:
        raise AutoregError(
            f"{len(failed)} scans of this run are in the store no more and cannot be read again; "
            f"the first, {first}, is {status} "
            f"({reason}): put them back, so that the run stays the same, or use another --name"
        )
    write_index(
        index,
        [
            replace(row, status=failed[row.id][0], reason=failed[row.id][1])
            if row.id in failed
            else row
            for row in read_index(index)
        ],
    )
    log.warning(
        "%d scans could not be preprocessed and are left out; %s says why", len(failed), index
    )
    return left


def usable(rows: Sequence[ScanRow]) -> list[ScanRow]:
    """The rows that take part."""
    return [row for row in rows if row.status == "ok"]


def report_left_out(rows: Sequence[ScanRow], index: Path) -> None:
    """Say how many scans take part, how many do not by status, and how modalities were told."""
    counts = Counter(row.status for row in rows)
    left_out = ", ".join(
        f"{count} {status}" for status, count in sorted(counts.items()) if status != "ok"
    )
    log.info(
        "%d scans are usable%s; %s says why for each",
        counts["ok"],
        f", left out are: {left_out}" if left_out else "",
        index,
    )
    for (modality, rule), count in Counter(
        (row.modality, row.modality_rule) for row in rows if row.status == "ok"
    ).items():
        log.info("%d of them are %s (%s)", count, modality, rule)


def wishes_of(request: Request) -> Wishes:
    """What the user fixed: the encoder of ``--init``'s weights where none is named; a preset's
    batch too, since the length in steps follows from it, and what it asks of the encoder.
    """
    is_faithful = request.preset == "faithful"
    card = read_card(Path(request.init).parent) if request.init else None
    encoder = card.encoder if card is not None and request.encoder == "auto" else request.encoder
    token = typed_token_size(request.settings)
    if token is None and card is not None and card.encoder == encoder:
        token = card.token_size_vox
    batch = request.batch_size or (PAPER_BATCH if is_faithful else None)
    return Wishes(
        encoder, batch, request.num_steps, request.num_epochs, request.num_hours, is_faithful, token
    )


def typed_token_size(settings: Sequence[str]) -> Size | None:
    """Return the token size that ``--set`` gives among an encoder's arguments, so that crop and
    blocks are planned for it.

    A value that is no size is left to the check of the plan, which names it.
    """
    found: object = None
    for setting in settings:
        key, _, text = setting.partition("=")
        value = literal(text.strip())
        if key.strip() == "encoder.arguments" and isinstance(value, dict):
            found = value.get("patch_embed_size", found)
        elif key.strip() == "encoder.arguments.patch_embed_size":
            found = value

    if not isinstance(found, list) or len(found) != 3:
        return None
    is_size = all(
        isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in found
    )
    return as_size(found) if is_size else None


def value_at(plan: Plan, key: str) -> object:
    """The value of a dotted key of the plan."""
    node: object = plan
    for part in key.split("."):
        # Arguments of an encoder, and weights of sequences, are keys of a dict.
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node
