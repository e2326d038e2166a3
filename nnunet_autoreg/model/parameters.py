"""Which parameters weight decay may touch: one rule for pretraining and fine-tuning."""

from torch import nn

POSITIONS = ("pos_embed", "register_tokens", "mask_token", "cls_token", "position", "member")
"""Last names of tables that are looked up rather than multiplied with."""


def is_position(name: str) -> bool:
    """Whether a parameter of this dotted name is a table of positions or special tokens."""
    return name.rsplit(".", 1)[-1] in POSITIONS or ".embed_tokens." in f".{name}."


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Matrices and kernels are decayed; norms, biases, LayerScale (at most one axis) and position tables are not."""
    return parameter.ndim > 1 and not is_position(name)
