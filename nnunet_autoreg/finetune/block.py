"""The ``"autoreg"`` block of a plans file: which encoder, which weights, which recipe, and why.

Torch-free.

Users edit the recipe by hand, so every read goes through ``read_block``, which refuses what it does
not know.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_autoreg.errors import PlanError, did_you_mean
from nnunet_autoreg.families import (
    LAYER_NAME,
    check_argument_types,
    family_of,
    has_deep_supervision,
)
from nnunet_autoreg.plan import EncoderPlan
from nnunet_autoreg.records import from_jsonable

BLOCK_KEY = "autoreg"
BLOCK_VERSION = 1
ALLOWED_CLASSES = ("dynamic_network_architectures.", "nnunet_autoreg.")
"""Network classes come from these packages only: a plan or card may be a stranger's."""
OPTIMIZERS = ADAMW, SGD = ("adamw", "sgd")


@dataclass(frozen=True)
class PlannedWeights:
    """Where pretrained weights lie, and whether they hold a decoder.

    Attributes:
        name: of the run.
        file: relative to ``$nnUNet_results``, or absolute.
        sha256: hex, of the file.
        has_decoder: whether a CNN's decoder was pretrained too.
    """

    name: str
    file: str
    sha256: str
    has_decoder: bool = False


@dataclass(frozen=True)
class Recipe:
    """How fine-tuning is done; every value may be edited in the plans file.

    Attributes:
        num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch: length; a trainer's
            ``_<N>epochs`` name overrides the first.
        pretrained_rate, scratch_rate: peak learning rate with and without pretrained weights.
        transfer_decoder: whether a CNN's decoder is loaded too, where the weights hold one.
        decoder_rate_factor: peak rate of the loaded part of the decoder, as a multiple of
            ``pretrained_rate``; what starts at random, the segmentation heads among it, keeps the
            full rate.
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum.
        weight_decay: with ``adamw`` none on norms, biases, positions and LayerScale; with ``sgd``
            on everything, as nnU-Net does.
        betas: of AdamW.
        momentum: of SGD.
        warmup_fraction, warmup_min_samples, warmup_max_epochs, warmup_max_fraction: linear warm-up
            over min(max(fraction of the run, min_samples), max_epochs, max_fraction of the run).
        poly_exponent: of the decay after warm-up.
        decoder_first_fraction: first part of a run from pretrained weights in which only the
            decoder learns; 0.0 is off.
        clip_norm: largest norm of the gradient.
        drop_path_rate: stochastic depth of a transformer; a CNN has none.
        deep_supervision: whether a CNN's coarser predictions are trained too.
        layer_decay: rate factor per layer from the output towards the input; 1.0 is off.
        expected_encoder_share: training stops where fewer of the encoder's parameters come from the
            weights file.
    """

    num_epochs: int
    pretrained_rate: float
    scratch_rate: float
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    optimizer: str = ADAMW
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.99
    warmup_fraction: float = 0.05
    warmup_min_samples: int = 12_500
    warmup_max_epochs: int = 50
    warmup_max_fraction: float = 0.1
    poly_exponent: float = 0.9
    decoder_first_fraction: float = 0.0
    clip_norm: float = 1.0
    drop_path_rate: float = 0.2
    deep_supervision: bool = False
    layer_decay: float = 1.0
    expected_encoder_share: float = 0.95
    transfer_decoder: bool = True
    decoder_rate_factor: float = 1.0


@dataclass(frozen=True)
class AutoregBlock:
    """The whole block of a plans file.

    Attributes:
        encoder: class and arguments of the network, as in a pretraining plan.
        weights: None in a plan for training from random weights only.
        recipe: how fine-tuning is done.
        reasons: per planned value, why it was chosen.
        version: of this format.
    """

    encoder: EncoderPlan
    weights: PlannedWeights | None
    recipe: Recipe
    reasons: dict[str, str] = field(default_factory=dict)
    version: int = BLOCK_VERSION

    @property
    def transfers_decoder(self) -> bool:
        """Whether fine-tuning starts from a pretrained decoder: the weights hold one, and the
        recipe wants it.
        """
        return (
            self.weights is not None and self.weights.has_decoder and self.recipe.transfer_decoder
        )


def read_block(plans: dict[str, Any]) -> AutoregBlock:
    """The checked ``"autoreg"`` block of a parsed plans file.

    Raises:
        PlanError: there is none, it is of a newer format, a key is unknown, or a value is
            impossible.
    """
    where = f"{plans.get('plans_name', 'plans')}.json"
    if BLOCK_KEY not in plans:
        raise PlanError(
            f'{where} has no "{BLOCK_KEY}" block, so it does not fit this trainer; add \'-p '
            "AutoregPlans' to the command "
            "(made by: nnUNetv2_plan_and_preprocess -d DATASET -pl AutoregPlanner)"
        )
    return check_block(
        from_jsonable(AutoregBlock, plans[BLOCK_KEY], f"{where}: {BLOCK_KEY}"), where
    )


def check_block(block: AutoregBlock, where: str) -> AutoregBlock:
    """Return ``block`` if it can be carried out.

    Raises:
        PlanError: a class from elsewhere, a number out of its range, or what this encoder cannot
            do.
    """
    check_class(block.encoder.class_path, where)
    check_arguments(block.encoder.arguments, where)
    check_argument_types(
        block.encoder.class_path,
        block.encoder.arguments,
        f"{where}: {BLOCK_KEY}.encoder.arguments",
    )
    _check_family(block, where)
    check_recipe(block.recipe, where)
    return block


def check_recipe(r: Recipe, where: str) -> None:
    """Refuse what no network can be trained with.

    Raises:
        PlanError: an unknown optimiser, or a number out of its range.
    """
    if r.optimizer not in OPTIMIZERS:
        raise PlanError(
            f"{where}: {BLOCK_KEY}.recipe.optimizer={r.optimizer} does not exist; "
            f"{did_you_mean(r.optimizer, OPTIMIZERS)}"
        )
    at_least_one = {
        "num_epochs": r.num_epochs,
        "num_iterations_per_epoch": r.num_iterations_per_epoch,
        "num_val_iterations_per_epoch": r.num_val_iterations_per_epoch,
    }
    positive = {
        "pretrained_rate": r.pretrained_rate,
        "scratch_rate": r.scratch_rate,
        "poly_exponent": r.poly_exponent,
        "clip_norm": r.clip_norm,
        "layer_decay": r.layer_decay,
        "decoder_rate_factor": r.decoder_rate_factor,
    }
    not_negative = {
        "weight_decay": r.weight_decay,
        "warmup_min_samples": r.warmup_min_samples,
        "warmup_max_epochs": r.warmup_max_epochs,
    }
    below_one = {
        "betas[0]": r.betas[0],
        "betas[1]": r.betas[1],
        "drop_path_rate": r.drop_path_rate,
        "warmup_fraction": r.warmup_fraction,
        "warmup_max_fraction": r.warmup_max_fraction,
        "momentum": r.momentum,
        "decoder_first_fraction": r.decoder_first_fraction,
    }
    rules: list[tuple[dict[str, Any], Callable[[Any], bool], str]] = [
        (at_least_one, lambda v: v >= 1, "at least 1"),
        (positive, lambda v: v > 0, "greater than 0"),
        (not_negative, lambda v: v >= 0, "0 or more"),
        (below_one, lambda v: 0 <= v < 1, "in [0, 1)"),
        ({"expected_encoder_share": r.expected_encoder_share}, lambda v: 0 <= v <= 1, "in [0, 1]"),
    ]
    for values, holds, range_text in rules:
        for name, value in values.items():
            if not holds(value):
                raise PlanError(f"{where}: {BLOCK_KEY}.recipe.{name}={value} must be {range_text}")


def _check_family(block: AutoregBlock, where: str) -> None:
    r, is_cnn = block.recipe, has_deep_supervision(family_of(block.encoder.class_path))
    if is_cnn and r.drop_path_rate:
        raise PlanError(
            f"{where}: {BLOCK_KEY}.recipe.drop_path_rate={r.drop_path_rate}, but "
            f"{block.encoder.name} has none; set it to 0.0"
        )
    if r.deep_supervision and not is_cnn:
        raise PlanError(
            f"{where}: {BLOCK_KEY}.recipe.deep_supervision=true, but {block.encoder.name} has one "
            "output; set it to false"
        )


def check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of a network that name anything importable but layers of torch: they are
    called while it is built.

    Raises:
        PlanError: one names something else.
    """
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            check_arguments(value, f"{where}: {key}")
        elif isinstance(value, str) and not LAYER_NAME.fullmatch(value):
            raise PlanError(
                f"{where}: the network argument {key}='{value}' names no layer of torch.nn"
            )


def check_class(class_path: str, where: str) -> None:
    """Refuse network classes of foreign packages.

    Raises:
        PlanError: ``class_path`` is none of ours or of dynamic_network_architectures.
    """
    if not class_path.startswith(ALLOWED_CLASSES):
        raise PlanError(
            f"{where}: the network class '{class_path}' is none of "
            f"{' or '.join(p + '*' for p in ALLOWED_CLASSES)}"
        )
