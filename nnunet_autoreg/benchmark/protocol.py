"""The request, the folders and the runs of a benchmark."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from nnunet_autoreg.benchmark.results import RunKey
from nnunet_autoreg.benchmark.split import CROSS_VALIDATION, NUM_FOLDS, SCORED_SPLITS, fold_name
from nnunet_autoreg.errors import PlanError, UsageError, did_you_mean
from nnunet_autoreg.finetune.block import Recipe, check_recipe
from nnunet_autoreg.model.card import RUNS_FOLDER
from nnunet_autoreg.objective_kinds import objective_kinds
from nnunet_autoreg.plan import literal
from nnunet_autoreg.records import from_jsonable, to_jsonable

PRETRAINED, SCRATCH, STOCK = "pretrained", "scratch", "stock"
STOCK_PLANS = "nnUNetPlans"
CONFIGURATION = "3d_fullres"
OWN_PREFIX = "benchmark_"


def twin_arms() -> tuple[str, ...]:
    """Return the arms that repeat a pretraining with another objective, named after it."""
    return tuple(objective_kinds())


def arms() -> tuple[str, ...]:
    """Return all arms, in the order of tables and pictures."""
    return (PRETRAINED, *twin_arms(), SCRATCH, STOCK)


def trainer_of(arm: str) -> str:
    """Return the name of the trainer of an arm."""
    others = {SCRATCH: "AutoregScratchTrainer", STOCK: "nnUNetTrainer"}
    return others.get(arm, "AutoregPretrainedTrainer")


def twin_name(family: str, arm: str) -> str:
    """Return the name of the run that repeats another one with the objective of an arm."""
    return f"{family}_{arm}"


@dataclass(frozen=True)
class BenchmarkRequest:
    """The options that the user typed.

    Attributes:
        dataset: folder name of the raw dataset.
        labels: numbers of labelled patients; empty until the pool is known.
        weights: finished pretraining runs; empty to have the benchmark pretrain ``encoders``
            itself.
        encoders: names of the encoders to pretrain on the pool of the dataset.
        pretrain_steps, pretrain_batch: number of steps and batch size of those pretrainings; None
            to have them planned.
        budget_min: minutes of training per run, one or several lengths; the steps follow from the
            slowest arm. Empty if ``steps`` are given.
        steps: number of steps of a run, one or several lengths.
        num_folds: number of folds of ``--split cross-validation``.
        batch: patches per step, for all arms; None for the smallest of the plans.
        recipe: changed values of the fine-tuning recipe of our arms, "key=value".
        subjects: a CSV of case and subject; None for ``cases.csv`` or the cases' names.
        surface_tolerance_mm: tolerance of the surface Dice; None for the dataset's typical in-plane
            voxel.
    """

    dataset: str
    labels: tuple[int, ...] = ()
    num_seeds: int = 3
    arms: tuple[str, ...] = ("pretrained", "scratch", "stock")
    weights: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ("auto",)
    pretrain_steps: int | None = None
    pretrain_batch: int | None = None
    budget_min: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    batch: int | None = None
    split: str = "test"
    num_folds: int = NUM_FOLDS
    recipe: tuple[str, ...] = ()
    subjects: str | None = None
    surface_tolerance_mm: float | None = None

    def check(self) -> "BenchmarkRequest":
        """Return the request if it can be carried out.

        Raises:
            UsageError: an impossible number, an unknown arm or recipe value.
        """
        for arm in self.arms:
            if arm not in arms():
                raise UsageError(
                    f"--arms {arm}: there is no such arm; {did_you_mean(arm, arms())}",
                    code="benchmark-unknown-arm",
                )

        if self.split not in SCORED_SPLITS:
            raise UsageError(
                f"--split {self.split}: there is no such split; "
                f"{did_you_mean(self.split, SCORED_SPLITS)}",
                code="benchmark-unknown-split",
            )

        numbers = {
            "--seeds": self.num_seeds,
            "--folds": self.num_folds,
            "--batch": self.batch,
            "--surface-tolerance": self.surface_tolerance_mm,
            "--pretrain-steps": self.pretrain_steps,
            "--pretrain-batch": self.pretrain_batch,
            **{f"--labels {number}": number for number in self.labels},
            **{f"--budget {minutes:g}": minutes for minutes in self.budget_min},
            **{f"--steps {steps}": steps for steps in self.steps},
        }
        for flag, number in numbers.items():
            if number is not None and not 0 < number < float("inf"):
                raise UsageError(
                    f"{flag} {number:g}: must be greater than 0",
                    code="benchmark-not-positive",
                )

        if bool(self.steps) == bool(self.budget_min):
            raise UsageError(
                "give the length of a run either as --steps or as --budget",
                code="benchmark-length",
            )

        for name in self.weights:
            if not re.fullmatch(r"[\w.-]+", name):
                raise UsageError(
                    f"--weights {name}: give the name of a run in $nnUNet_results/{RUNS_FOLDER}",
                    code="benchmark-weights-name",
                )

        recipe_values(self.recipe)  # refuses what is not a recipe
        return self

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the pretrainings that are compared: the user's, or the benchmark's own."""
        if self.weights:
            return self.weights
        return tuple(OWN_PREFIX + encoder for encoder in self.encoders)

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits of the runs: one for each fold, or the requested one."""
        if self.split != CROSS_VALIDATION:
            return (self.split,)
        return tuple(fold_name(fold, self.num_folds) for fold in range(self.num_folds))

    @property
    def recipe_word(self) -> str:
        """The changed values of the recipe, sorted, as one text."""
        return " ".join(sorted(self.recipe))


def recipe_values(settings: tuple[str, ...]) -> dict[str, object]:
    """Return the changed values of the recipe, converted to their types.

    Raises:
        UsageError: a text without "key=value", an unknown key or a value of the wrong type.
    """
    found: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not (key and equals and text):
            raise UsageError(
                f"--recipe {setting}: write it as key=value, e.g. pretrained_rate=3e-3",
                code="recipe-not-key-value",
            )
        found[key] = literal(text)

    # A recipe is made of these values, so that keys, types and ranges are checked as in a plan.
    base = to_jsonable(Recipe(num_epochs=1, pretrained_rate=1e-3, scratch_rate=1e-3))
    try:
        changed = from_jsonable(Recipe, {**base, **found}, "--recipe")
        check_recipe(changed, "--recipe")
    except PlanError as error:
        raise UsageError(str(error), code="recipe-value") from error
    return found


def runs_of(request: BenchmarkRequest, lengths: Sequence[int], batch: int) -> Iterator[RunKey]:
    """Yield all runs, seed by seed, so that complete comparisons are available early.

    Args:
        lengths: numbers of steps; the shortest come first.
    """
    seeds = range(request.num_seeds)
    comparisons = product(seeds, sorted(lengths), request.labels, request.splits)
    for (seed, steps, labels, split), arm in product(comparisons, request.arms):
        encoders, recipe = request.families, request.recipe_word
        if arm == STOCK:
            # Stock nnU-Net has neither our encoders nor our recipe.
            encoders, recipe = ("-",), ""
        for encoder in encoders:
            yield RunKey(arm, encoder, labels, seed, split, steps, batch, recipe)


@dataclass(frozen=True)
class BenchmarkFolders:
    """The folders of a benchmark, below ``root``."""

    root: Path
    dataset: str

    @property
    def preprocessed(self) -> Path:
        """nnUNet_preprocessed of all runs."""
        return self.root / "preprocessed"

    @property
    def results(self) -> Path:
        """nnUNet_results of planning and pretraining."""
        return self.root / "results"

    @property
    def plans(self) -> Path:
        """The dataset's folder of plans, splits and preprocessed cases."""
        return self.preprocessed / self.dataset

    @property
    def exclude(self) -> Path:
        """The cases that are scored, for ``autoreg_pretrain --exclude``."""
        return self.root / "exclude.txt"

    def make(self) -> None:
        """Make the folders that pretrainings and plans are written to."""
        for folder in (self.plans, self.results / RUNS_FOLDER):
            folder.mkdir(parents=True, exist_ok=True)

    def pretraining(self, name: str) -> Path:
        """Return the folder of a pretraining; it is a link if the user made the pretraining."""
        return self.results / RUNS_FOLDER / name

    def run(self, key: RunKey) -> Path:
        """Return the folder of one training."""
        return self.root / "runs" / key.folder


def weights_of(key: RunKey) -> str | None:
    """Return the pretraining whose weights a run starts from; None for random weights."""
    if key.arm == PRETRAINED:
        return key.encoder
    if key.arm in twin_arms():
        return twin_name(key.encoder, key.arm)
    return None


def plans_name(key: RunKey) -> str:
    """Return the name of the plans of a run.

    The scratch arm has the plans of the pretrained arm. Those of the arms with other objectives
    differ only in the weights.
    """
    if key.arm == STOCK:
        return STOCK_PLANS
    name = f"AutoregPlans_{weights_of(key) or key.encoder}"
    recipe = re.sub(r"[^A-Za-z0-9.]+", "_", key.recipe)
    return f"{name}_{recipe}" if recipe else name


def fold_of(folds: list[Mapping[str, object]], fold: Mapping[str, object]) -> int:
    """Return the index of a fold in ``splits_final.json``.

    A new fold is appended, so that earlier ones keep their numbers.
    """
    if fold not in folds:
        folds.append(fold)
    return folds.index(fold)
