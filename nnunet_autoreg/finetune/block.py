"""Define the ``"autoreg"`` block of a plans file: encoder, weights, recipe, and the reasons.

Users edit the recipe by hand. Therefore every read goes through ``read_block``, which refuses
unknown keys and impossible values. Torch-free.
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
"""Network classes are taken from these packages only, because a plan may come from anywhere."""
OPTIMIZERS = ADAMW, SGD = ("adamw", "sgd")


@dataclass(frozen=True)
class PlannedWeights:
    """Hold the location of pretrained weights.

    Attributes:
        name: name of the run.
        file: relative to ``$nnUNet_results``, or absolute.
        sha256: hexadecimal hash of the file.
        has_decoder: whether the weights hold the decoder of a CNN as well.
    """

    name: str
    file: str
    sha256: str
    has_decoder: bool = False


@dataclass(frozen=True)
class Recipe:
    """Hold the settings of fine-tuning; every value may be edited in the plans file.

    Attributes:
        num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch: length; a trainer named
            ``..._<N>epochs`` overrides the first.
        pretrained_rate, scratch_rate: peak learning rate with and without pretrained weights.
        transfer_decoder: whether a CNN's decoder is loaded as well, if the weights hold one.
        decoder_rate_factor: peak rate of the loaded part of the decoder, as a multiple of
            ``pretrained_rate``. Random parts, such as the segmentation heads, have the full rate.
        optimizer: ``adamw``, or ``sgd`` with Nesterov momentum.
        weight_decay: ``adamw`` does not decay norms, biases, positions and LayerScale; ``sgd``
            decays everything, as in nnU-Net.
        betas: betas of AdamW.
        momentum: momentum of SGD.
        warmup_fraction, warmup_min_samples, warmup_max_epochs, warmup_max_fraction: length of the
            linear warm-up, which is min(max(fraction of the run, min_samples), max_epochs,
            max_fraction of the run).
        poly_exponent: exponent of the decay after warm-up.
        decoder_first_fraction: first part of a run from pretrained weights in which only the
            decoder is trained; 0.0 is off.
        clip_norm: largest norm of the gradient.
        drop_path_rate: stochastic depth of a transformer; 0.0 for a CNN.
        deep_supervision: whether a CNN's coarser predictions are trained as well.
        layer_decay: rate factor per layer from the output towards the input; 1.0 is off.
        expected_encoder_share: training stops if a smaller share of the encoder's parameters comes
            from the weights file.
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
    """Hold the whole block of a plans file.

    Attributes:
        encoder: class and arguments of the network, as in a pretraining plan.
        weights: None in a plan for training from random weights only.
        recipe: settings of fine-tuning.
        reasons: the reason of each planned value.
        version: version of this format.
    """

    encoder: EncoderPlan
    weights: PlannedWeights | None
    recipe: Recipe
    reasons: dict[str, str] = field(default_factory=dict)
    version: int = BLOCK_VERSION

    @property
    def transfers_decoder(self) -> bool:
        """Return whether fine-tuning starts from a pretrained decoder.

        The weights must hold one, and the recipe must not switch it off.
        """
        has_decoder = self.weights is not None and self.weights.has_decoder
        return has_decoder and self.recipe.transfer_decoder


def read_block(plans: dict[str, Any]) -> AutoregBlock:
    """Return the checked ``"autoreg"`` block of a parsed plans file.

    Raises:
        PlanError: there is no block (code "plan-no-block"), its format is newer, a key is unknown,
            or a value is impossible.
    """
    where = f"{plans.get('plans_name', 'plans')}.json"
    if BLOCK_KEY not in plans:
        raise PlanError(
            f'{where} has no "{BLOCK_KEY}" block, so it does not fit this trainer; add \'-p '
            "AutoregPlans' to the command (these plans are made by: nnUNetv2_plan_and_preprocess "
            "-d DATASET -pl AutoregPlanner)",
            code="plan-no-block",
        )
    block = from_jsonable(AutoregBlock, plans[BLOCK_KEY], f"{where}: {BLOCK_KEY}")
    return check_block(block, where)


def check_block(block: AutoregBlock, where: str) -> AutoregBlock:
    """Return ``block`` if its values are possible.

    Raises:
        PlanError: the network class is not allowed, a number is out of its range, or the encoder
            does not support a setting.
    """
    check_class(block.encoder.class_path, where)
    check_arguments(block.encoder.arguments, where)
    check_argument_types(
        block.encoder.class_path,
        block.encoder.arguments,
        f"{where}: {BLOCK_KEY}.encoder.arguments",
    )

    # Settings that the encoder's family does not support.
    recipe, name = block.recipe, block.encoder.name
    is_cnn = has_deep_supervision(family_of(block.encoder.class_path))
    if is_cnn and recipe.drop_path_rate:
        raise PlanError(
            f"{where}: {BLOCK_KEY}.recipe.drop_path_rate={recipe.drop_path_rate}, but {name} does "
            "not support it; set it to 0.0",
            code="plan-family",
        )
    if recipe.deep_supervision and not is_cnn:
        raise PlanError(
            f"{where}: {BLOCK_KEY}.recipe.deep_supervision=true, but {name} has one output; set it "
            "to false",
            code="plan-family",
        )

    check_recipe(block.recipe, where)
    return block


def check_recipe(r: Recipe, where: str) -> None:
    """Refuse settings with which no network can be trained.

    Raises:
        PlanError: the optimiser is unknown (code "plan-optimizer"), or a number is out of its range
            (code "plan-range").
    """
    if r.optimizer not in OPTIMIZERS:
        raise PlanError(
            f"{where}: {BLOCK_KEY}.recipe.optimizer={r.optimizer} does not exist; "
            f"{did_you_mean(r.optimizer, OPTIMIZERS)}",
            code="plan-optimizer",
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
    # NaN holds no rule, so that it is refused as well.
    for values, holds, range_text in rules:
        for name, value in values.items():
            if not holds(value):
                raise PlanError(
                    f"{where}: {BLOCK_KEY}.recipe.{name}={value} must be {range_text}",
                    code="plan-range",
                )


def check_arguments(arguments: Mapping[str, Any], where: str) -> None:
    """Refuse arguments of a network that name anything but layers of torch.

    The named layers are imported and called while the network is built.

    Raises:
        PlanError: an argument names something else (code "plan-network-argument").
    """
    for key, value in arguments.items():
        if isinstance(value, Mapping):
            check_arguments(value, f"{where}: {key}")
        elif isinstance(value, str) and not LAYER_NAME.fullmatch(value):
            raise PlanError(
                f"{where}: the network argument {key}='{value}' is not a layer of torch.nn",
                code="plan-network-argument",
            )


def check_class(class_path: str, where: str) -> None:
    """Refuse network classes of other packages.

    Raises:
        PlanError: ``class_path`` does not belong to an allowed package (code
            "plan-network-class").
    """
    if not class_path.startswith(ALLOWED_CLASSES):
        allowed = " or ".join(f"{package}*" for package in ALLOWED_CLASSES)
        raise PlanError(
            f"{where}: the network class '{class_path}' is not allowed; use {allowed}",
            code="plan-network-class",
        )
