"""autoreg_probe on a small dataset: encoders, files, table, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_autoreg.benchmark.dense_probe import ProbeResult
from nnunet_autoreg.benchmark.probe_networks import FrozenNetwork, find_encoder
from nnunet_autoreg.benchmark.probe_report import ProbeLine, rows_of, t_interval, table
from nnunet_autoreg.cli.probe import main
from nnunet_autoreg.corpus.rows import ScanRow, write_index

DATASET = "Dataset900_Blobs"
SHAPE = (16, 16, 16)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve scans with a bright blob and a dark one, and nnU-Net's folders."""
    import SimpleITK as sitk  # noqa: N813

    raw = tmp_path / "raw" / DATASET
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for number in range(12):
        generator = np.random.default_rng(number)
        labels = np.zeros(SHAPE, np.uint8)
        labels[2:7, 3:9, 4:12] = 1
        labels[9:14, 5:12, 2 + number % 3 : 9] = 2
        # Structures that a linear probe can find: 3 above or below the rest, with noise of 0.1.
        image = 5 + np.array([0.0, 3.0, -3.0])[labels] + 0.1 * generator.normal(size=SHAPE)
        sitk.WriteImage(
            sitk.GetImageFromArray(image.astype(np.float32)),
            str(raw / "imagesTr" / f"blob_{number:03d}_0000.nii.gz"),
        )
        label_file = str(raw / "labelsTr" / f"blob_{number:03d}.nii.gz")
        sitk.WriteImage(sitk.GetImageFromArray(labels), label_file)
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "bright": 1, "dark": 2},
        "numTraining": 12,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    for variable in ("raw", "results", "preprocessed"):
        (tmp_path / variable).mkdir(exist_ok=True)
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    return tmp_path


def probe(*words: str) -> int:
    return main(["-d", "900", "--labels", "2", "--draws", "2", "--device", "cpu", *words])


def lines_in(folders: Path) -> list[dict]:
    file = folders / "results" / "autoreg_probe" / DATASET.partition("_")[0] / "probe.jsonl"
    return [json.loads(text) for text in file.read_text().splitlines()]


def test_a_run_is_scored_beside_random_twins_and_raw_voxels(
    folders: Path,
    write_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run(folders / "results", "brain", SHAPE, encoder="resenc_tiny")

    assert probe("--encoder", "brain", "--encoder", "random", "--random-seeds", "2") == 0

    lines = lines_in(folders)
    found = {(line["encoder"], line["levels"], line["seed"]) for line in lines}
    expected = {("raw voxels", "all levels", None), ("brain", "encoder", None)}
    for seed in (0, 1):
        # A random network has a decoder, which the run of an encoder lacks.
        expected |= {("random", "encoder", seed), ("random", "encoder + decoder", seed)}
    assert found == expected
    # Two draws of labelled patients each.
    assert len(lines) == 2 * len(found)
    assert all(0 <= line["dice"] <= 1 for line in lines)
    assert set(lines[0]["dice_per_structure"]) == {"bright", "dark"}
    assert "blob" not in json.dumps(lines).lower()
    assert capsys.readouterr().out.splitlines()[-1].startswith("next: ")


def test_a_transformer_is_probed_too(folders: Path, write_run: Callable[..., Path]) -> None:
    write_run(folders / "results", "brain", SHAPE)

    assert probe("--encoder", "brain", "--random-seeds", "1") == 0

    assert {line["levels"] for line in lines_in(folders)} == {"all levels", "encoder"}


def test_an_encoder_that_saw_a_scored_patient_is_refused(
    folders: Path,
    write_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = write_run(folders / "results", "brain", SHAPE, encoder="resenc_tiny")
    rows = []
    for number in range(12):
        case = f"blob_{number:03d}"
        rows.append(
            ScanRow(
                f"{DATASET}/{case}",
                DATASET,
                case,
                "MR",
                "MR",
                "/x.nii.gz",
                SHAPE,
                (1.0, 1.0, 1.0),
                SHAPE,
                "hash",
                "ok",
                "",
            ),
        )
    write_index(run / "scans.csv", rows)

    code = probe("--encoder", "brain")

    assert code in (1, 2)
    assert "'brain'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--encoder", "random"],
        ["--encoder", "resenc_tinny"],
        ["--encoder", "resenc_tiny", "--labels", "99"],
        ["--encoder", "resenc_tiny", "--draws", "0"],
    ],
)
def test_what_cannot_be_probed_is_one_line(
    folders: Path,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert probe(*words) in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("autoreg_probe: ")


def test_weights_of_the_file_are_in_the_network(
    folders: Path,
    write_run: Callable[..., Path],
) -> None:
    from safetensors.torch import load_file

    run = write_run(folders / "results", "brain", SHAPE, encoder="resenc_tiny")
    encoder = find_encoder(folders / "results", "brain", (1.0, 1.0, 1.0))

    network = FrozenNetwork(encoder, SHAPE, ("MRI",)).network

    state = network.state_dict()
    stored = load_file(run / "encoder.safetensors")
    assert all(torch.equal(state[key], tensor) for key, tensor in stored.items())


def test_a_pretrained_decoder_is_loaded_and_probed(
    folders: Path,
    write_run: Callable[..., Path],
) -> None:
    from safetensors.torch import load_file

    from nnunet_autoreg.finetune.load import write_tensors
    from nnunet_autoreg.model.card import DECODER_PREFIXES
    from nnunet_autoreg.model.encoders import build_network
    from nnunet_autoreg.model.sizes import ENCODERS
    from nnunet_autoreg.records import sha256_of

    size = ENCODERS["resenc_tiny"]
    whole = build_network(size.class_path, size.arguments, SHAPE, 1, 1).state_dict()
    run = write_run(folders / "results", "whole", SHAPE, encoder="resenc_tiny")
    tensors = load_file(run / "encoder.safetensors")
    # ``all_modules`` holds second names of the same tensors, and a file may hold each tensor once.
    for key, value in whole.items():
        if key.startswith(DECODER_PREFIXES) and ".all_modules." not in key:
            tensors[key] = value
    write_tensors(run / "encoder.safetensors", tensors)
    card = json.loads((run / "encoder.json").read_text())
    card["sha256"] = sha256_of(run / "encoder.safetensors")
    card["adaptation"]["keys_to_decoder"] = list(DECODER_PREFIXES)
    (run / "encoder.json").write_text(json.dumps(card))

    encoder = find_encoder(folders / "results", "whole", (1.0, 1.0, 1.0))
    network = FrozenNetwork(encoder, SHAPE, ("MRI",))

    state = network.network.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors.items())
    assert list(network.level_sets()) == ["encoder", "encoder + decoder"]
    # Four maps of the encoder and three of the decoder.
    assert len(network.features(np.zeros(SHAPE, np.float32))) == 7


def test_random_networks_of_two_seeds_differ_and_of_one_agree() -> None:
    from dataclasses import replace

    encoder = find_encoder(None, "resenc_tiny", (1.0, 1.0, 1.0))
    image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    maps = [
        FrozenNetwork(replace(encoder, seed=seed), SHAPE, ("MRI",)).features(image)
        for seed in (0, 0, 1)
    ]

    assert torch.equal(maps[0][2], maps[1][2])
    assert not torch.equal(maps[0][2], maps[2][2])
    assert len(maps[0]) == 4 + 3


def result(dice: float, draw: int, levels: str = "encoder") -> ProbeResult:
    return ProbeResult(levels, 5, draw, ("a",), {"p": {1: dice}})


def test_differences_are_paired_by_draw_with_the_mean_of_the_random_seeds() -> None:
    lines = [ProbeLine("brain", "tiny", None, result(d, k)) for k, d in enumerate((0.5, 0.7))]
    for seed, dices in enumerate(((0.3, 0.5), (0.5, 0.5))):
        lines += [ProbeLine("random", "tiny", seed, result(d, k)) for k, d in enumerate(dices)]

    ours, random = rows_of(lines)

    # The two seeds average 0.4 and 0.5, so the differences of the draws are 0.1 and 0.2.
    assert ours.to_random is not None
    assert ours.to_random.mean == pytest.approx((0.1 + 0.2) / 2)
    assert random.to_random is None
    assert random.dice == pytest.approx([0.4, 0.5])
    assert "tiny, 2 seeds" in table(lines, {1: "one"})


def test_the_t_interval_is_that_of_the_textbook() -> None:
    found = t_interval([0.1, 0.2, 0.3])

    # Mean 0.2, deviation 0.1, t of 2 degrees of freedom 4.3027.
    reach = 4.3027 * 0.1 / 3**0.5
    assert (found.low, found.high) == pytest.approx((0.2 - reach, 0.2 + reach), abs=1e-5)
    assert str(t_interval([0.1])) == "+0.100, 1 draw"
