"""autoreg_pretrain on a device that is too small for its plan.

The plan is changed once to fewer crops at a time, written, and followed by all later runs.
"""

import json
import shutil

import pytest
import torch

from nnunet_autoreg.cli.pretrain import main
from nnunet_autoreg.objectives.autoregressive import Autoregressive

pytestmark = pytest.mark.integration

ENCODER = (
    'encoder.arguments={"embed_dim":48,"patch_embed_size":[8,8,8],"eva_depth":1,"eva_numheads":2,'
    '"init_values":0.1,"scale_attn_inner":true}'
)


@pytest.fixture
def line(tmp_path, shared_data, monkeypatch):
    """Type a line on three real scans; gives its exit code."""
    scans = tmp_path / "scans"
    scans.mkdir()
    source = shared_data / "nnUNet_raw/Dataset004_Hippocampus/imagesTr"
    for image in sorted(source.glob("*.nii.gz"))[:3]:
        shutil.copy(image, scans)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))

    settings = [
        ENCODER,
        "encoder.token_size_vox=8,8,8",
        "sequence.block_tokens=1,1,1",
        "sequence.crop_size_vox=16,24,16",
        "run.log_every=1",
    ]

    def typed(steps):
        line = ["-i", str(scans), "--name", "small", "--encoder", "primus_tiny"]
        line += ["--steps", str(steps), "--batch", "4", "--device", "cpu", "--set", *settings]
        return main(line)

    return typed


def test_a_step_that_does_not_fit_is_made_in_more_parts(line, tmp_path, monkeypatch, capsys):
    loss = Autoregressive.loss
    seen = []

    def on_a_small_device(self, batch, references=False):
        # Only training on real crops: validation and the estimate of memory (meta) do not count.
        if self.module.training and not batch.voxels.is_meta:
            seen.append(len(batch.prefix))
            if len(batch.prefix) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(self, batch, references)

    monkeypatch.setattr(Autoregressive, "loss", on_a_small_device)

    assert line(2) == 0

    file = tmp_path / "nnUNet_results/autoreg_pretraining/small/plan.json"
    plan = json.loads(file.read_text())
    assert (plan["optim"]["batch_size"], plan["optim"]["micro_batch_size"]) == (4, 1)
    assert plan["run"]["dry_step_seconds"] > 0
    assert plan["run"]["loader_seconds_per_crop"] > 0
    assert plan["run"]["peak_memory_gib"] > 0
    assert "out of memory with 2 crops at once" in plan["reasons"]["optim.micro_batch_size"]
    shown = capsys.readouterr().err
    assert "out of memory with 4 crops at once: 2 at once, 2 times a step" in shown
    assert "dry step: " in shown
    # Tried with 4, 2 and 1 at once, the last with two parts twice; then two steps of four parts.
    assert seen == [4, 2, 1, 1, 1, 1, *[1] * 8]

    seen.clear()
    # A third step: the plan is followed without another try.
    assert line(3) == 0
    assert seen == [1] * 4
    assert "out of memory" not in capsys.readouterr().err
    later = json.loads(file.read_text())
    assert later["optim"]["num_steps"] == 3
    assert {**later["optim"], "num_steps": 2} == plan["optim"]
    assert later["run"] == plan["run"]
    assert later["sequence"] == plan["sequence"]


def test_running_out_of_memory_later_is_reported_in_one_line(line, monkeypatch, capsys):
    loss = Autoregressive.loss
    num = []

    def on_a_device_that_others_use(self, batch, references=False):
        num.append(self.module.training and not batch.voxels.is_meta)
        # After the dry step has fitted: another program takes memory meanwhile.
        if sum(num) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(self, batch, references)

    monkeypatch.setattr(Autoregressive, "loss", on_a_device_that_others_use)
    assert line(8) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    reason = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert f"{reason} Something else may be using the GPU" in last
    assert "same line again" in last
