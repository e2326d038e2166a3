"""Features for everyone: load_encoder, tiles of whole scans, autoreg_embed, and its page."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from torch.nn import functional

import nnunet_autoreg
from nnunet_autoreg.cli.embed import main
from nnunet_autoreg.downstream import embed
from nnunet_autoreg.downstream.embed import LabelRegion
from nnunet_autoreg.downstream.encoder import load_encoder
from nnunet_autoreg.downstream.tiles import TiledScan, features_of_scan
from nnunet_autoreg.errors import InterruptedRunError, UsageError, WeightsError
from nnunet_autoreg.finetune.load import read_tensors

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "features.md"
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def write_scan(file: Path, shape: tuple[int, ...], seed: int = 0) -> None:
    import SimpleITK

    voxels = np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(file))


@pytest.fixture(scope="module")
def results(write_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's folder of results with a CNN and a transformer, both with random weights."""
    folder = tmp_path_factory.mktemp("features")
    write_run(folder, "brain", crop=(32, 32, 32), encoder="resenc_tiny")
    write_run(folder, "tokens", crop=(32, 40, 32))
    return folder


@pytest.fixture(autouse=True)
def results_variable(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_results", str(results))


def test_importing_the_package_loads_no_torch_until_it_is_used() -> None:
    script = (
        "import sys, nnunet_autoreg\n"
        "assert 'torch' not in sys.modules\n"
        "from nnunet_autoreg import load_encoder\n"
        "assert 'torch' in sys.modules and callable(load_encoder)\n"
    )

    # A separate process, because this one has loaded torch long ago.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False)

    assert done.returncode == 0
    with pytest.raises(AttributeError):
        _ = nnunet_autoreg.no_such_name


def test_type_checkers_of_users_find_the_types() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    assert (ROOT / "nnunet_autoreg" / "py.typed").is_file()
    assert re.search(r'^"nnunet_autoreg" = \["py.typed"\]$', declared, re.MULTILINE)


def test_a_cnn_gives_its_stages_with_the_weights_of_the_file(results: Path) -> None:
    encoder = load_encoder("brain")
    file = results / "autoreg_pretraining" / "brain" / "encoder.safetensors"

    maps = encoder(torch.zeros(2, 1, 32, 48, 32))

    # resenc_tiny has strides 1, 2, 2, 2 and doubles its features at every stage.
    assert [tuple(level.shape) for level in maps] == [
        (2, 16, 32, 48, 32),
        (2, 32, 16, 24, 16),
        (2, 64, 8, 12, 8),
        (2, 128, 4, 6, 4),
    ]
    assert encoder.num_features == (16, 32, 64, 128)
    assert torch.equal(encoder.deepest(torch.zeros(2, 1, 32, 48, 32)), maps[-1])
    assert not encoder.training
    state = encoder.state_dict()
    saved = read_tensors(file)
    assert all(torch.equal(state[key], value) for key, value in saved.items())
    assert not any(key.startswith("decoder") for key in state)


def test_a_transformer_reads_the_size_that_it_was_loaded_for() -> None:
    # The run was pretrained with crops of 32 x 40 x 32: positions are adapted when it is loaded.
    encoder = load_encoder("tokens", input_shape=(16, 40, 32))
    grid = tuple(s // t for s, t in zip((16, 40, 32), encoder.token_size, strict=True))

    maps = encoder(torch.zeros(1, 1, 16, 40, 32))

    assert [tuple(level.shape[2:]) for level in maps] == [grid] * 4
    assert tuple(level.shape[1] for level in maps) == encoder.num_features
    with refused(UsageError, "encoder-input-shape", "16 x 40 x 32", "input_shape=(32, 40, 32)"):
        encoder(torch.zeros(1, 1, 32, 40, 32))


def test_wrong_sizes_and_names_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with refused(UsageError, "encoder-input-shape", "30 x 32 x 32", "32 x 32 x 32"):
        load_encoder("brain")(torch.zeros(1, 1, 30, 32, 32))
    with refused(UsageError, "encoder-input-shape", "(32, 41, 32)"):
        load_encoder("tokens", input_shape=(32, 41, 32))
    with refused(UsageError, "encoder-input-shape", "(0, 32, 32)"):
        load_encoder("tokens", input_shape=(0, 32, 32))
    with refused(UsageError, "encoder-input-shape", "(32, 32)"):
        load_encoder("tokens", input_shape=(32, 32))
    # A slip of two letters: the message names the run that was meant.
    with refused(WeightsError, "weights-not-found", "brian", "'brain'"):
        load_encoder("brian")
    with refused(WeightsError, "weights-unfinished", tmp_path):
        load_encoder(tmp_path)


def test_tiles_together_give_the_features_of_the_whole_scan() -> None:
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 21, 16, 40))).float()
    scan = TiledScan(image, (16, 16, 16), (4, 4, 4))

    def pooled(tile: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool3d(tile, 4)

    found = features_of_scan(pooled, scan, with_map=True)

    # 21 planes are filled up to 24, a multiple of 4: one before and two behind.
    assert scan.shape == (24, 16, 40)
    assert scan.offset == (1, 0, 0)
    assert found.map_Vzyx is not None
    assert torch.allclose(found.map_Vzyx, pooled(scan.image_CZYX[None])[0], atol=1e-6)


def test_voxels_that_were_filled_up_with_zeros_do_not_count() -> None:
    image = torch.full((1, 8, 8, 8), 3.0)
    scan = TiledScan(image, (16, 16, 16), (4, 4, 4))

    found = features_of_scan(lambda tile: functional.avg_pool3d(tile, 4), scan)

    # With the zeros counted, the mean would be 3 * 8^3 / 16^3 = 0.375.
    assert found.mean_V.tolist() == pytest.approx([3.0])


def test_a_scan_is_prepared_as_in_pretraining(results: Path) -> None:
    encoder = load_encoder("brain")
    voxels = np.random.default_rng(0).normal(5, 2, (1, 24, 20, 10)).astype(np.float32)

    prepared = encoder.preprocess(voxels, (1.0, 1.0, 4.0))

    # The coarsest axis comes first, at the spacing of 1 mm.
    # 10 slices of 4 mm are 40 voxels of 1 mm.
    assert tuple(prepared.shape) == (1, 40, 24, 20)
    assert float(prepared.mean()) == pytest.approx(0, abs=0.1)


def test_the_command_writes_a_vector_and_a_grid_for_every_scan(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_scan(tmp_path / "scans" / "a_0000.nii.gz", (24, 40, 32))
    write_scan(tmp_path / "scans" / "b_0000.nii.gz", (16, 16, 16), seed=1)
    (tmp_path / "scans" / "c_0000.nii.gz").write_bytes(b"no image")
    output = tmp_path / "features.npz"

    code = main(["-w", "brain", "-i", str(tmp_path / "scans"), "-o", str(output), "--dense"])

    found = np.load(output)
    assert code == 1
    assert found["ids"].tolist() == ["a", "b"]
    assert found["features"].shape == (2, 128)
    assert found["spacing_mm"].tolist() == [[1, 1, 1]] * 2
    # Scan a has 24 x 40 x 32 voxels: filled up to 32 along z, 4 on either side, and then divided
    # into positions of 8 voxels.
    assert found["grid/a"].shape == (128, 4, 5, 4)
    assert found["offset_vox/a"].tolist() == [4, 0, 0]
    assert json.loads((tmp_path / "features.json").read_text())["encoder"] == "brain"
    assert "c is left out (unreadable)" in capsys.readouterr().err


def test_scans_that_show_nothing_or_do_not_fit_are_left_out(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # One such file once lost the features of all others, and a 2D image became equal slices of
    # 999 mm.
    import SimpleITK

    folder = tmp_path / "scans"
    write_scan(folder / "good_0000.nii.gz", (16, 16, 16))
    # A flat image, one of four dimensions, one of two values per voxel, and two constant ones.
    write_scan(folder / "flat_0000.nii.gz", (16, 16))
    volume = SimpleITK.ReadImage(str(folder / "good_0000.nii.gz"))
    SimpleITK.WriteImage(SimpleITK.JoinSeries(volume, volume), str(folder / "four_0000.nii.gz"))
    SimpleITK.WriteImage(SimpleITK.Compose(volume, volume), str(folder / "two_0000.nii.gz"))
    equal = SimpleITK.GetImageFromArray(np.full((16, 16, 16), 7, np.int16))
    SimpleITK.WriteImage(equal, str(folder / "equal_0000.nii.gz"))
    empty = SimpleITK.GetImageFromArray(np.zeros((16, 16, 16), np.int16))
    SimpleITK.WriteImage(empty, str(folder / "empty_0000.nii.gz"))
    output = tmp_path / "features.npz"

    code = main(["-w", "brain", "-i", str(folder), "-o", str(output)])

    warnings = capsys.readouterr().err
    reasons = {"empty": "constant", "equal": "constant", "flat": "not3d", "four": "not3d"}
    reasons["two"] = "rgb"
    assert code == 1
    assert np.load(output)["ids"].tolist() == ["good"]
    assert [n for n, why in reasons.items() if f"{n} is left out ({why})" not in warnings] == []


def test_too_little_memory_for_tiles_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_scan(tmp_path / "scans" / "a_0000.nii.gz", (16, 16, 16))
    line = ["-w", "tokens", "-i", str(tmp_path / "scans"), "-o", str(tmp_path / "f.npz")]

    assert main([*line, "--tile", "800000", "800000", "800000"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_finer_layer_can_be_chosen(tmp_path: Path) -> None:
    write_scan(tmp_path / "scans" / "a_0000.nii.gz", (16, 16, 16))
    output = tmp_path / "features.npz"

    line = ["-w", "brain", "-i", str(tmp_path / "scans"), "-o", str(output)]

    assert main([*line, "--layer", "0"]) == 0
    # The finest layer of the CNN has 16 features; there are 4 layers, and tiles are multiples of 8.
    assert np.load(output)["features"].shape == (1, 16)
    assert main([*line, "--layer", "7"]) == 2
    assert main([*line, "--tile", "16", "16", "30"]) == 2
    assert main([*line, "--tile", "0", "0", "0"]) == 2
    assert main([*line, "--tile", "-16", "-16", "-16"]) == 2


def test_the_size_of_tiles_can_be_chosen(tmp_path: Path) -> None:
    # Tiles of 0 or of negative size once ended in tracebacks of torch.
    write_scan(tmp_path / "scans" / "a_0000.nii.gz", (40, 40, 40))
    output = tmp_path / "features.npz"

    line = ["-w", "brain", "-i", str(tmp_path / "scans"), "-o", str(output)]

    assert main([*line, "--tile", "40", "40", "40"]) == 0
    scan = load_encoder("brain", (40, 40, 40))
    # One tile is the whole scan: computed by hand, without tiles.
    voxels = np.random.default_rng(0).normal(100, 20, (1, 40, 40, 40))
    expected = scan.deepest(scan.preprocess(voxels, (1, 1, 1))[None]).mean((2, 3, 4))[0]
    found = np.load(output)["features"][0]
    assert found == pytest.approx(expected.detach().numpy(), abs=1e-4)


def write_label(file: Path, shape: tuple[int, int, int], box: tuple[slice, ...]) -> None:
    import SimpleITK

    labels = np.zeros(shape, dtype=np.uint8)
    labels[box] = 1
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(file))


def test_the_mean_can_be_taken_over_the_box_around_a_label(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shape = (32, 32, 32)
    for name in ("a", "b", "c", "d", "e"):
        write_scan(tmp_path / "scans" / f"{name}_0000.nii.gz", shape)
    labels = tmp_path / "labels"
    # A label, an empty map, one of another size, none at all (d), and half a file.
    write_label(labels / "a.nii.gz", shape, np.s_[16:24, 8:16, 0:8])
    write_label(labels / "b.nii.gz", shape, np.s_[0:0, 0:0, 0:0])
    write_label(labels / "c.nii.gz", (16, 16, 16), np.s_[0:8, 0:8, 0:8])
    (labels / "e.nii.gz").write_bytes((labels / "a.nii.gz").read_bytes()[:60])
    output = tmp_path / "features.npz"
    line = ["-w", "brain", "-i", str(tmp_path / "scans"), "-o", str(output)]

    assert main([*line, "--region", "label", "--labels", str(labels)]) == 1

    encoder = load_encoder("brain")
    voxels = np.random.default_rng(0).normal(100, 20, (1, *shape)).astype(np.float32)
    with torch.no_grad():
        features = encoder.deepest(encoder.preprocess(voxels, (1, 1, 1))[None])[0]
    found = np.load(output)
    # A position of the deepest map is 8 voxels wide along each axis.
    assert found["features"][0] == pytest.approx(features[:, 2, 1, 0].numpy(), abs=1e-4)
    assert found["ids"].tolist() == ["a"]
    warnings = capsys.readouterr().err
    assert "b is left out (label)" in warnings
    assert "c is left out (geometry)" in warnings
    assert "d is left out (label)" in warnings
    assert "e is left out (unreadable)" in warnings


def test_a_box_is_found_in_a_scan_that_was_cut_turned_and_resampled(tmp_path: Path) -> None:
    write_label(tmp_path / "a.nii.gz", (12, 20, 10), np.s_[4:6, 10:12, 2:4])
    image = np.zeros((1, 12, 20, 10), dtype=np.float32)
    # The image is zero outside z 2 to 10 and x 2 to 10, which preprocessing cuts away.
    image[:, 2:10, :, 2:10] = 1

    # The last axis is the coarsest, so it comes first; there are twice as many voxels along it.
    counted = LabelRegion(tmp_path, 1.0).counted("a", image, (1.0, 1.0, 2.0), (16, 8, 20))

    inside = np.argwhere(counted.numpy())
    # The margin of 1 mm is rounded up to a voxel. The box x 2:4 becomes 1:5, then -1:3 in the cut
    # scan, and -2:6 after resampling, of which 0:6 are inside. z 4:6 becomes 3:7, then 1:5.
    assert inside.min(0).tolist() == [0, 1, 9]
    assert (inside.max(0) + 1).tolist() == [6, 5, 13]


KILLED_WHILE_IT_WRITES = """
import os, signal, sys
from pathlib import Path
from nnunet_autoreg.cli.embed import main

replace, left = Path.replace, [int(sys.argv[1])]

def replace_or_die(path, onto):
    if Path(onto).suffix == ".npz":
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
    return replace(path, onto)

Path.replace = replace_or_die
main(sys.argv[2:])
"""


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the scans whose features are computed from now on."""
    names: list[str] = []
    original = embed.embed_scan

    def noted(encoder: Any, scan: Any, *rest: Any) -> Any:
        names.append(scan.name)
        return original(encoder, scan, *rest)

    monkeypatch.setattr(embed, "embed_scan", noted)
    return names


# After so many finished scans; all three are finished when the file of -o is about to be written.
@pytest.mark.parametrize("num_finished", [0, 2, 3])
def test_a_killed_command_continues_and_gives_the_same_features(
    num_finished: int,
    tmp_path: Path,
    counted: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed, name in enumerate("abc"):
        write_scan(tmp_path / "scans" / f"{name}_0000.nii.gz", (36, 32, 32), seed)
    line = ["-w", "brain", "-i", str(tmp_path / "scans"), "--dense"]
    assert main([*line, "-o", str(tmp_path / "whole.npz")]) == 0
    counted.clear()
    output = tmp_path / "features.npz"
    line += ["-o", str(output)]

    killed = [sys.executable, "-W", "ignore", "-c", KILLED_WHILE_IT_WRITES, str(num_finished)]
    code = subprocess.run([*killed, *line], check=False, capture_output=True).returncode

    assert code == -signal.SIGKILL
    assert not output.exists()
    assert main(line) == 0
    assert counted == list("abc")[num_finished:]
    assert (f"{num_finished} of 3 scans" in capsys.readouterr().out) == (num_finished > 0)
    found, expected = np.load(output), np.load(tmp_path / "whole.npz")
    assert found.files == expected.files
    for name in expected.files:
        assert np.array_equal(found[name], expected[name])

    # Nothing is left beside the results, so that the next call begins from the first scan.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "features.json",
        "features.npz",
        "scans",
        "whole.json",
        "whole.npz",
    ]


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line whose first call was stopped after both scans, and before it wrote the file of -o."""
    shape = (32, 32, 32)
    for seed, name in enumerate("ab"):
        write_scan(tmp_path / "scans" / f"{name}_0000.nii.gz", shape, seed)
        write_label(tmp_path / "labels" / f"{name}.nii.gz", shape, np.s_[16:24, 8:16, 0:8])
    line = ["-w", "brain", "-i", str(tmp_path / "scans"), "-o", str(tmp_path / "features.npz")]
    line += ["--region", "label", "--labels", str(tmp_path / "labels")]

    def stop(*arguments: Any) -> None:
        raise InterruptedRunError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(embed, "write_features", stop)
        assert main(line) == 130
    return line


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["-w", "tokens"], "weights"),
        (["--layer", "0"], "layer"),
        (["--tile", "40", "40", "40"], "tile_size_vox"),
        (["--dense"], "dense"),
        (["--margin", "3"], "margin_mm"),
    ],
)
def test_other_weights_or_options_do_not_continue(
    more: list[str],
    named: str,
    stopped: list[str],
    counted: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*stopped, *more]) == 2

    message = capsys.readouterr().err
    assert named in message and str(tmp_path / ".features.npz.unfinished") in message
    assert counted == [] and not (tmp_path / "features.npz").exists()

    # The options of the stopped call continue it, and another file begins.
    assert main([*stopped, *more, "-o", str(tmp_path / "other.npz")]) == 0
    assert counted == ["a", "b"]
    assert main(stopped) == 0
    assert counted == ["a", "b"]


def test_the_last_layer_has_two_names(stopped: list[str], counted: list[str]) -> None:
    assert main([*stopped, "--layer", "3"]) == 0
    assert counted == []


def test_scans_and_labels_that_have_changed_are_done_again(
    stopped: list[str],
    counted: list[str],
    tmp_path: Path,
) -> None:
    write_scan(tmp_path / "scans" / "a_0000.nii.gz", (32, 32, 32), seed=7)
    write_label(tmp_path / "labels" / "b.nii.gz", (32, 32, 32), np.s_[0:8, 8:16, 0:8])
    write_scan(tmp_path / "scans" / "c_0000.nii.gz", (32, 32, 32), seed=8)

    # The new scan has no label map.
    assert main(stopped) == 1

    assert counted == ["a", "b", "c"]
    continued = np.load(tmp_path / "features.npz")["features"]
    assert main(stopped) == 1
    assert np.array_equal(np.load(tmp_path / "features.npz")["features"], continued)


@pytest.mark.parametrize("left", [b"", b"PK", 400])
def test_a_damaged_file_of_a_finished_scan_is_done_again(
    left: bytes | int,
    stopped: list[str],
    counted: list[str],
    tmp_path: Path,
) -> None:
    file, _ = sorted((tmp_path / ".features.npz.unfinished").iterdir())
    file.write_bytes(left if isinstance(left, bytes) else file.read_bytes()[:left])

    assert main(stopped) == 0

    assert len(counted) == 1
    assert np.load(tmp_path / "features.npz")["ids"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["-o", "features.npz", "--region", "label"], "--labels"),
        (["-o", "features.npz", "--labels", "."], "--region label"),
        (["-o", "features.npz", "--region", "label", "--labels", "nowhere"], "nowhere"),
        (["-o", "features.npz", "--margin", "-1"], "--margin -1"),
        (["-o", "features.csv"], ".npz"),
        (["-o", "features.parquet", "--dense"], "--dense"),
        (["-o", "nowhere/features.npz"], "nowhere"),
        (["-o", "folder.npz"], "folder.npz"),
    ],
)
def test_wrong_options_of_the_command_end_with_2(
    more: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A wrong -o was once found after hours of work.
    (tmp_path / "folder.npz").mkdir()
    monkeypatch.chdir(tmp_path)

    assert main(["-w", "brain", "-i", ".", *more]) == 2
    assert named in capsys.readouterr().err


SNIPPETS = SNIPPET.findall(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_programs_of_the_page_run(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "monai" in SNIPPETS[number]:
        pytest.importorskip("monai", reason="MONAI is not installed; pip install monai")
        pytest.importorskip("nibabel", reason="MONAI reads NIfTI by nibabel; pip install nibabel")
    write_scan(tmp_path / "scan.nii.gz", (40, 36, 34))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    exec(compile(SNIPPETS[number], str(PAGE), "exec"), names)

    # Most programs compute features; the one that trains an encoder leaves gradients.
    encoder = names["encoder"]
    if "features" in names:
        channels = [level.shape[1] for level in names["features"]]
        assert tuple(channels) == encoder.num_features
    else:
        assert all(p.grad is not None for p in encoder.parameters())


def test_the_page_shows_plain_pytorch_and_monai() -> None:
    assert len(SNIPPETS) == 3
    assert sum("monai" in snippet for snippet in SNIPPETS) == 1
