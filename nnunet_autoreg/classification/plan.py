"""Make and read the ``"autoreg_classification"`` block of a configuration in a plans file.

It holds the tasks, how unequal numbers of cases are balanced, and the values of the training that
differ from those of segmentation.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nnunet_autoreg.classification.table import ClassificationTask, ClassTable
from nnunet_autoreg.downstream.plan_block import check_ranges
from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.families import RESENC, family_of
from nnunet_autoreg.finetune.block import ADAMW, Recipe
from nnunet_autoreg.records import differences, from_jsonable

BLOCK = "autoreg_classification"
VERSION = 1
BALANCES = SAMPLING, WEIGHTS, NONE = ("sampling", "weights", "none")
NUM_EPOCHS, LAYER_DECAY = 100, 0.75
PRETRAINED_RATE, SCRATCH_RATE, WEIGHT_DECAY, WARMUP = 1e-4, 3e-4, 1e-2, 0.1
MOST_UNEQUAL = 1.5
"""Up to this ratio of the largest to the smallest class, nothing is balanced."""
VALIDATED_SHARE = 4
"""An epoch has a validation batch for every this many training batches."""


@dataclass(frozen=True)
class ClassificationPlan:
    """Hold the values of a classifier, and of its training if they differ from segmentation.

    Every value may be edited in the plans file.

    Attributes:
        tasks: the tasks, with their classes.
        class_counts: for each task, the number of cases of each class in the dataset.
        balance: ``sampling`` draws every class of the only task equally often. ``weights`` gives
            every class the same share of the loss. ``none`` changes nothing.
        num_iterations_per_epoch: batches of an epoch, which is one pass over the cases.
        num_val_iterations_per_epoch: batches for the scores after each epoch.
        num_epochs: length of a training; a trainer's ``_<N>epochs`` name overrides it.
        pretrained_rate, scratch_rate: peak learning rate with and without pretrained weights.
        weight_decay: weight decay of AdamW; norms, biases and positions are not decayed.
        warmup_fraction: share of the run in which the learning rate rises.
        layer_decay: rate factor per layer from the output towards the input; 1.0 is off.
        ordinal_smoothing: share of the target that the neighbours of an ordinal class get; 0.0 is
            off.
        reasons: the reasons of values above.
        version: version of this format.
    """

    tasks: tuple[ClassificationTask, ...]
    class_counts: tuple[tuple[int, ...], ...]
    balance: str
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int
    num_epochs: int = NUM_EPOCHS
    pretrained_rate: float = PRETRAINED_RATE
    scratch_rate: float = SCRATCH_RATE
    weight_decay: float = WEIGHT_DECAY
    warmup_fraction: float = WARMUP
    layer_decay: float = 1.0
    ordinal_smoothing: float = 0.0
    reasons: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def class_numbers(self) -> tuple[int, ...]:
        """Return the number of classes of every task."""
        return tuple(len(task.classes) for task in self.tasks)


def make_plan(
    table: ClassTable,
    batch_size: int,
    class_path: str,
    most_iterations: int,
) -> ClassificationPlan:
    """Return the plan of a configuration.

    Args:
        batch_size: number of patches of a batch.
        class_path: class of the encoder's network.
        most_iterations: the recipe's length of an epoch, which is never exceeded.
    """
    counts = []
    for number in range(len(table.tasks)):
        counts.append(tuple(table.counts(number)))
    balance, why_balance = plan_balance(table.tasks, counts)
    one_pass = math.ceil(len(table.labels) / batch_size)
    num_iterations = min(max(1, one_pass), most_iterations)

    is_cnn = family_of(class_path) == RESENC
    decay_reason = "a CNN: off" if is_cnn else "a transformer: lower layers learn more slowly"
    reasons = {
        "balance": why_balance,
        "num_iterations_per_epoch": f"{len(table.labels)} cases in batches of {batch_size}, at "
        f"most {most_iterations}",
        "layer_decay": decay_reason,
    }
    return ClassificationPlan(
        tasks=table.tasks,
        class_counts=tuple(counts),
        balance=balance,
        num_iterations_per_epoch=num_iterations,
        num_val_iterations_per_epoch=max(1, num_iterations // VALIDATED_SHARE),
        layer_decay=1.0 if is_cnn else LAYER_DECAY,
        reasons=reasons,
    )


def plan_balance(
    tasks: Sequence[ClassificationTask],
    class_counts: Sequence[Sequence[int]],
) -> tuple[str, str]:
    """Return how unequal numbers of cases are balanced, and the reason."""
    worst = 1.0
    unequal = ""
    for task, counts in zip(tasks, class_counts, strict=True):
        present = [count for count in counts if count]
        most, fewest = max(present), min(present)
        if most / fewest > worst:
            worst = most / fewest
            unequal = f"{task.name} has {most} cases of one class and {fewest} of another"

    if worst <= MOST_UNEQUAL:
        return NONE, f"the classes are about equal in number (at most {worst:.2f} to 1)"
    if len(tasks) == 1:
        return SAMPLING, unequal
    return WEIGHTS, f"{unequal}; with several tasks, cases cannot be drawn evenly for all"


def classification_recipe(recipe: Recipe, plan: ClassificationPlan) -> Recipe:
    """Return the segmentation's recipe as classification uses it: AdamW, one output, no decoder."""
    return replace(
        recipe,
        optimizer=ADAMW,
        pretrained_rate=plan.pretrained_rate,
        scratch_rate=plan.scratch_rate,
        weight_decay=plan.weight_decay,
        warmup_fraction=plan.warmup_fraction,
        warmup_min_samples=0,
        warmup_max_fraction=plan.warmup_fraction,
        layer_decay=plan.layer_decay,
        clip_norm=1.0,
        deep_supervision=False,
        decoder_first_fraction=0.0,
    )


def read_plan(configuration: Mapping[str, Any], where: str) -> ClassificationPlan | None:
    """Return the checked block of a configuration of parsed plans, None if it has none.

    The configuration must hold the values that it inherits.

    Raises:
        PlanError: the format is newer, a key is unknown, or a value is impossible.
    """
    data = configuration.get(BLOCK)
    if data is None:
        return None
    return check(from_jsonable(ClassificationPlan, data, f"{where}: {BLOCK}"), where)


def check(plan: ClassificationPlan, where: str) -> ClassificationPlan:
    """Return ``plan`` if a classifier can be built and trained by it.

    Raises:
        PlanError: a value is missing or impossible.
    """
    has_classes = bool(plan.tasks) and all(number > 1 for number in plan.class_numbers)
    counted = [len(counts) for counts in plan.class_counts]
    if not has_classes or counted != list(plan.class_numbers):
        raise PlanError(
            f"{where}: {BLOCK} needs tasks of two classes or more, and a count for every class; "
            "remove the block to have it planned again",
            code="classification-plan-incomplete",
        )
    if plan.balance not in BALANCES:
        raise PlanError(
            f"{where}: {BLOCK}.balance={plan.balance} is not known; "
            f"{did_you_mean(plan.balance, BALANCES)}",
            code="classification-plan-balance",
        )
    if plan.balance == SAMPLING and len(plan.tasks) > 1:
        raise PlanError(
            f"{where}: {BLOCK}.balance=sampling is for one task, and there are {len(plan.tasks)}; "
            "use weights",
            code="classification-plan-balance",
        )
    rules = {
        "num_epochs": (plan.num_epochs >= 1, "at least 1"),
        "num_iterations_per_epoch": (plan.num_iterations_per_epoch >= 1, "at least 1"),
        "num_val_iterations_per_epoch": (plan.num_val_iterations_per_epoch >= 1, "at least 1"),
        "pretrained_rate": (plan.pretrained_rate > 0, "greater than 0"),
        "scratch_rate": (plan.scratch_rate > 0, "greater than 0"),
        "weight_decay": (plan.weight_decay >= 0, "0 or more"),
        "warmup_fraction": (0 <= plan.warmup_fraction < 1, "in [0, 1)"),
        "layer_decay": (plan.layer_decay > 0, "greater than 0"),
        "ordinal_smoothing": (0 <= plan.ordinal_smoothing < 1, "in [0, 1)"),
    }
    check_ranges(plan, rules, BLOCK, where, "classification-plan-range")
    return plan


def check_same_table(plan: ClassificationPlan, table: ClassTable, where: str) -> None:
    """Compare the plan's tasks with the table, which may have been edited since.

    Raises:
        PlanError: names or classes differ.
    """
    changes = differences(plan.tasks, table.tasks)
    if changes:
        raise PlanError(
            f"{where} was planned for other classes than the table has now ({'; '.join(changes)});"
            f' remove the "{BLOCK}" block from its configurations to have it planned again',
            code="classification-plan-other-classes",
        )
