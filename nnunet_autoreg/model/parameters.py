"""Rules about a network's parameters: which are decayed, and which leave a pretraining."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

POSITIONS = ("pos_embed", "register_tokens", "mask_token", "cls_token", "position", "member")
"""Last names of tables that are looked up rather than multiplied with."""


def is_position(name: str) -> bool:
    """Return whether a parameter of this name is a table of positions or special tokens."""
    parts = name.split(".")
    return parts[-1] in POSITIONS or "embed_tokens" in parts


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies to a parameter.

    It does to matrices and kernels, and not to norms, biases, LayerScale (which have at most one
    axis) and tables of positions.
    """
    return parameter.ndim > 1 and not is_position(name)


def weights_under(network: nn.Module, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the tensors of ``network`` whose keys begin with a prefix, as float32 on the CPU.

    A tensor with several names (nnU-Net's convolutions have two) is listed once, under the first.
    Rotary tables are left out: the downstream network makes them for its own grid. If weights are
    sharded over processes, all processes have to call this together.
    """
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}

    for key, value in network.state_dict(keep_vars=True).items():
        if not key.startswith(prefixes) or ".rope." in key or id(value) in seen:
            continue
        seen.add(id(value))

        # Gather before moving: nccl gathers nothing that is on the CPU.
        kept[key] = whole(value).to("cpu", torch.float32).contiguous()
    return kept


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's values, without gradient; a sharded one is gathered in all processes."""
    values = tensor.detach()
    return values.full_tensor() if isinstance(values, DTensor) else values
