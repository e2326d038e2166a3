"""Fixtures for every tier."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Tests run in as many processes as there are cores; several threads in each would only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# dicom_files.py, phantom_place.py, few_cases.py and sequence_cases.py are shared by several tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the repository; skips where there is none."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real scans are not here (looked for {folder})")
    return folder


@pytest.fixture(scope="session")
def write_run() -> Callable[..., Path]:
    """A function that writes a finished pretraining run as pretraining leaves it.

    The encoder is a tiny Primus with random weights if none is named.
    """
    return _write_run


def _write_run(
    results: Path,
    name: str,
    crop: tuple[int, int, int] = (32, 40, 32),
    channels: int = 1,
    encoder: str = "primus_tiny",
    decoder: bool = False,
    **changes: Any,
) -> Path:
    """Write a run; ``decoder`` adds the decoder of a CNN, which whole-network training has."""
    import torch

    from nnunet_autoreg.finetune.load import write_tensors
    from nnunet_autoreg.model.card import DECODER_PREFIXES, Adaptation, EncoderCard
    from nnunet_autoreg.model.encoders import build_network
    from nnunet_autoreg.model.sizes import ENCODERS
    from nnunet_autoreg.records import sha256_of

    folder = results / "autoreg_pretraining" / name
    folder.mkdir(parents=True)
    size = ENCODERS[encoder]
    # Runs of different names have different weights.
    torch.manual_seed(len(name))
    arguments = changes.get("arguments", size.arguments)
    network: Any = build_network(size.class_path, arguments, crop, channels, 2)
    decoder_keys = DECODER_PREFIXES if decoder else ()
    prefixes = (f"{network.key_to_encoder}.", f"{network.key_to_stem}.", *decoder_keys)
    # A tensor of two names is written under its first, as pretraining does.
    first = {}
    for key, tensor in reversed(network.state_dict(keep_vars=True).items()):
        if key.startswith(prefixes):
            first[id(tensor)] = key
    state = network.state_dict()
    # Tables of rotary positions are computed again from the shape of the patch.
    tensors = {key: state[key] for key in first.values() if ".rope." not in key}
    write_tensors(folder / "encoder.safetensors", tensors)
    values: dict[str, Any] = {
        "name": name,
        "encoder": size.name,
        "class_path": size.class_path,
        "arguments": size.arguments,
        "token_size_vox": size.token_size,
        "crop_size_vox": crop,
        "spacing_mm": (1.0, 1.0, 1.0),
        "modalities": ("MR",),
        "channel_names": ("MRI",),
        "ct_window": None,
        "num_input_channels": channels,
        "adaptation": Adaptation(
            network.key_to_encoder,
            network.key_to_stem,
            tuple(network.keys_to_in_proj),
            network.key_to_lpe,
            decoder_keys,
        ),
        "objective": "autoregressive",
        "licences": {},
        "num_scans": 10,
        "num_steps": 100,
        "finished_at": "2026-01-01T00:00:00Z",
        "sha256": sha256_of(folder / "encoder.safetensors"),
        **changes,
    }
    EncoderCard(**values).save(folder)
    return folder
