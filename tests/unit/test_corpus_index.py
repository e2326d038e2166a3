"""The index: one row per scan, copies and exclusions sorted out, the modality decided, Hounsfield
samples pooled.
"""

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from refusals import logged, refused

from nnunet_autoreg.corpus import index as index_module
from nnunet_autoreg.corpus import intensity
from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.content import content_hash
from nnunet_autoreg.corpus.exclude import read_exclude
from nnunet_autoreg.corpus.find import find_scans
from nnunet_autoreg.corpus.identity import salted
from nnunet_autoreg.corpus.index import Index, index_scans
from nnunet_autoreg.corpus.journal import ScanFacts, stamp_of
from nnunet_autoreg.corpus.manifest import Manifest, ManifestEntry
from nnunet_autoreg.corpus.parallel import CHUNKS_AHEAD, parallel_map
from nnunet_autoreg.corpus.rows import read_index, write_index
from nnunet_autoreg.errors import AutoregError, UsageError
from nnunet_autoreg.nnunet_api import RawScan


def mr(seed: int) -> Any:
    """A volume of positive values, as magnitudes of MR are."""
    values = np.random.default_rng(seed).integers(1, 1000, (16, 18, 20))
    return values.astype(np.int16)


def ct(seed: int = 0) -> Any:
    """Air around a body of 24 x 24 voxels at about 40 HU, with a lung at -800 inside."""
    rng = np.random.default_rng(seed)
    array = rng.normal(-1000, 5, (12, 32, 32))
    array[:, 4:28, 4:28] = rng.normal(40, 5, (12, 24, 24))
    array[:, 10:18, 10:18] = rng.normal(-800, 5, (12, 8, 8))
    return np.clip(array, -1024, None).astype(np.int16)


def save(path: Path, array: Any, spacing: tuple[float, float, float] = (1.0, 1.0, 2.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(spacing)
    SimpleITK.WriteImage(image, str(path))
    return path


def make_index(
    folder: Path,
    exclude: set[str] | None = None,
    num_workers: int = 1,
    modality: str | None = None,
) -> Index:
    return index_scans(find_scans([], [folder]), exclude or set(), num_workers, modality)


def statuses(index: Index) -> dict[str, str]:
    return {row.case: row.status for row in index.rows}


def test_a_row_holds_what_the_scan_is(tmp_path: Path) -> None:
    # Four empty slices at one end are cropped away.
    array = mr(0)
    array[:4] = 0
    save(tmp_path / "pool" / "a.nii.gz", array)

    row = make_index(tmp_path / "pool").rows[0]

    assert (row.id, row.status, row.reason, row.modality) == ("pool/a", "ok", "", "MR")
    assert (row.shape_vox, row.cropped_shape_vox) == ((16, 18, 20), (12, 18, 20))
    assert row.spacing_mm == (2.0, 1.0, 1.0)
    assert row.source == str(tmp_path / "pool" / "a.nii.gz")
    assert len(row.content_hash) == 64


def test_a_scan_in_another_format_and_type_is_a_duplicate_of_the_first(
    tmp_path: Path,
) -> None:
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    # The same values as float32 in another format; and with another voxel size.
    save(tmp_path / "pool" / "b.mha", mr(0).astype(np.float32))
    save(tmp_path / "pool" / "c.nrrd", mr(0), (1.5, 1.0, 2.0))

    index = make_index(tmp_path / "pool")

    assert statuses(index) == {"a": "ok", "b": "duplicate", "c": "ok"}
    assert "pool/a" in index.rows[1].reason


def test_the_hash_ignores_the_sign_of_zero_but_not_the_shape() -> None:
    zeros = np.zeros((1, 2, 3, 4), np.float32)
    first = content_hash(RawScan(zeros, (1.0, 1.0, 1.0)))

    # -0.0 has another bit pattern than 0.0 and equals it.
    assert content_hash(RawScan(-zeros, (1.0, 1.0, 1.00000001))) == first
    assert content_hash(RawScan(zeros.reshape(1, 4, 3, 2), (1.0, 1.0, 1.0))) != first


@pytest.mark.parametrize("name", ["a", "pool/a", "a.nii.gz", "{folder}/a.nii.gz", "{folder}"])
def test_scans_are_excluded_by_case_id_file_or_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pool"
    folder = tmp_path / "pool"
    save(folder / "a.nii.gz", mr(0))

    index = make_index(folder, {name.format(folder=folder)})

    assert statuses(index) == {"a": "excluded"}


def test_scans_are_excluded_by_the_id_that_scans_csv_has(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    save(tmp_path / "pool" / "b.nii.gz", mr(1))
    candidates = find_scans([], [tmp_path / "pool"])
    rows = index_scans(candidates, set(), 1, salt="s" * 64).rows

    again = index_scans(candidates, {rows[1].id}, 1, salt="s" * 64).rows

    assert [row.status for row in again] == ["ok", "excluded"]
    # With a salt the id in scans.csv differs from that of the candidate.
    assert rows[1].id == again[1].id != candidates[1].id


def test_a_copy_of_an_excluded_scan_is_excluded_too(
    tmp_path: Path,
) -> None:
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    save(tmp_path / "pool" / "b.nii.gz", mr(1))
    save(tmp_path / "pool" / "c.nii.gz", mr(2))
    # A copy that is excluded by its name, and one outside the pool that is excluded by its path.
    save(tmp_path / "pool" / "zz_test.nii.gz", mr(0))
    outside = save(tmp_path / "test" / "t.mha", mr(1))

    index = make_index(tmp_path / "pool", {"zz_test", str(outside)})

    assert statuses(index) == {"a": "excluded", "b": "excluded", "c": "ok", "zz_test": "excluded"}
    assert "zz_test" in index.rows[0].reason
    assert str(outside) in index.rows[1].reason


def test_an_exclusion_that_matches_nothing_is_reported(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(tmp_path / "pool" / "case1.nii.gz", mr(0))

    make_index(tmp_path / "pool", {"case11"})

    # A typing error that would let a test scan into the training; the closest name is shown.
    assert logged(caplog, "--exclude", "1 of 1", "'case11'", "'case1'")


def test_bad_files_get_rows_and_the_others_go_on(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    (tmp_path / "pool" / "b.nii.gz").write_text("text")
    save(tmp_path / "pool" / "c.nii.gz", np.full((16, 16, 16), 3, np.int16))

    index = make_index(tmp_path / "pool")

    assert statuses(index) == {"a": "ok", "b": "unreadable", "c": "constant"}
    assert [row.id for row in index.usable] == ["pool/a"]


def test_a_file_that_vanishes_between_finding_and_reading_is_a_row(tmp_path: Path) -> None:
    path = save(tmp_path / "pool" / "a.nii.gz", mr(0))
    candidates = find_scans([], [tmp_path / "pool"])
    path.unlink()

    row = index_scans(candidates, set(), 1).rows[0]

    assert row.status == "unreadable"
    assert "vanished" in row.reason


def test_workers_change_nothing(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / "pool" / f"{n}.nii.gz", ct(n))

    one = make_index(tmp_path / "pool")
    two = make_index(tmp_path / "pool", num_workers=2)

    assert one.rows == two.rows
    np.testing.assert_array_equal(one.ct_samples_hu, two.ct_samples_hu)


def test_a_dying_worker_is_a_clear_error() -> None:
    # os._exit ends the worker process at once, as the kernel does when memory runs out.
    with refused(AutoregError, "worker-died", "0 of 3"):
        list(parallel_map(os._exit, [1, 1, 1], 2, "testing"))


@pytest.mark.parametrize(
    ("channel", "modality"),
    [
        ("CT", "CT"),
        ("ct", "CT"),
        ("T1", "MR"),
        ("MRI", "MR"),
        ("PET", "PET"),
    ],
)
def test_the_channel_name_of_a_dataset_decides_the_modality(channel: str, modality: str) -> None:
    array = mr(0).astype(np.float32)

    assert intensity.modality_of(channel, array)[0] == modality


def test_a_ct_without_negative_values_is_questioned() -> None:
    _, rule = intensity.modality_of("CT", mr(0).astype(np.float32))

    assert "Hounsfield units?" in rule


def test_without_a_name_hounsfield_like_values_are_ct(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", ct())
    save(tmp_path / "pool" / "b.nii.gz", mr(0))

    rows = make_index(tmp_path / "pool").rows

    assert [row.modality for row in rows] == ["CT", "MR"]
    assert rows[0].modality_rule == "values look like Hounsfield units"


def test_a_signed_phase_image_is_not_ct() -> None:
    # Phase has negative values like CT, but is symmetric around 0.
    phase = np.random.default_rng(0).integers(-4096, 4096, (16, 32, 32)).astype(np.float32)

    assert not intensity.looks_like_hounsfield(phase)
    assert intensity.looks_like_hounsfield(ct().astype(np.float32))


def test_the_user_may_name_the_modality(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", ct())

    index = make_index(tmp_path / "pool", modality="mr")

    row = index.rows[0]
    assert (row.modality, row.modality_rule) == ("MR", "--modality")
    assert index.ct_samples_hu.size == 0


def test_real_scans_get_their_true_modality_from_their_values(shared_data: Path) -> None:
    from nnunet_autoreg.nnunet_api import read_scan

    raw = shared_data / "nnUNet_raw"
    for dataset in sorted(raw.iterdir()):
        array = read_scan(min((dataset / "imagesTr").iterdir())).array_CZYX[0]
        channels = json.loads((dataset / "dataset.json").read_text())["channel_names"]
        assert intensity.looks_like_hounsfield(array) == ("CT" in channels.values()), dataset.name
    lone_ct = read_scan(shared_data / "nifti" / "example_ct.nii.gz").array_CZYX[0]
    assert intensity.looks_like_hounsfield(lone_ct)


def test_the_body_holds_its_lung_and_not_the_air_around_it() -> None:
    body = intensity.body_mask(ct().astype(np.float32))

    # 12 slices of 24 x 24 voxels; the lung of 8 x 8 is inside.
    assert int(body.sum()) == 12 * 24 * 24
    assert body[0, 12, 12]
    assert not body[0, 0, 0]


def test_the_window_comes_only_from_inside_the_body(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", ct(0))
    save(tmp_path / "pool" / "b.nii.gz", ct(1))
    # c is a copy of b, so two scans of 10 000 samples each are left.
    save(tmp_path / "pool" / "c.nii.gz", ct(1), (1.0, 1.0, 2.0))

    samples = make_index(tmp_path / "pool").ct_samples_hu

    assert samples.shape == (20_000,)

    window = intensity.window_of(samples)

    assert window is not None
    # Soft tissue at 40 HU is 8/9 of the body, the lung at -800 HU the rest.
    assert abs(window.median - 40) < 2
    assert -840 < window.percentile_00_5 < -780
    assert intensity.window_of(np.zeros(0, np.float32)) is None


def test_the_index_survives_its_file(tmp_path: Path) -> None:
    # A comma and quotes in a name, a voxel size with 9 digits, and an empty file.
    save(tmp_path / "pool" / 'ä, "quoted".nii.gz', mr(0), (0.1, 0.333333333, 2.0))
    (tmp_path / "pool" / "b.nii.gz").write_bytes(b"")
    rows = make_index(tmp_path / "pool").rows

    write_index(tmp_path / "run" / "scans.csv", rows)

    assert read_index(tmp_path / "run" / "scans.csv") == rows

    text = (tmp_path / "run" / "scans.csv").read_text(encoding="utf-8")
    header = text.splitlines()[0].split(",")
    assert {"id", "source", "status", "reason"} <= set(header)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / "scans.csv").write_text("id,what\n1,2\n")

    with refused(UsageError, "index-unreadable", tmp_path / "scans.csv"):
        read_index(tmp_path / "scans.csv")


def test_exclusions_are_read_from_text_lists_and_splits(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    ids = tmp_path / "b.json"
    splits = tmp_path / "splits_final.json"
    # Comments begin with "#" after a space: "x#2" is an id.
    text.write_text("# test scans\ncase 1  # the first\n\n/data/ä.nii.gz\nx#2\n", encoding="utf-8")
    assert read_exclude(text) == {"case 1", "/data/ä.nii.gz", "x#2"}

    ids.write_text('["p1", "p2"]')
    assert read_exclude(ids) == {"p1", "p2"}

    # Of splits, everything that is validated or tested in any fold is left out.
    folds = [
        {"train": ["a", "b"], "val": ["c"], "test": ["d"]},
        {"train": ["c", "b"], "val": ["a"]},
    ]
    splits.write_text(json.dumps(folds))
    assert read_exclude(splits) == {"c", "d"}


def test_an_exclusion_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": 1}')

    with refused(UsageError, "exclude-unknown-form", tmp_path / "a.json"):
        read_exclude(tmp_path / "a.json")
    with refused(UsageError, "exclude-unreadable", tmp_path / "gone.txt"):
        read_exclude(tmp_path / "gone.txt")


def test_left_out_candidates_pass_through_unread(tmp_path: Path) -> None:
    candidate = Candidate("x/y", tmp_path / "y", "x", "", status="dicom", reason="3 files")

    (row,) = index_scans([candidate], set(), 1).rows

    assert (row.status, row.reason, row.shape_vox) == ("dicom", "3 files", None)


def described(path: Path, **changes: str) -> list[Candidate]:
    return [replace(c, **changes) for c in find_scans([], [path])]  # type: ignore[arg-type]


def test_subjects_and_sessions_are_hashed_and_left_out_without_a_salt(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    names = {"subject": "DOE^JOHN ", "session": "1.2.3", "contrast": "T1w", "part": ""}
    candidates = described(tmp_path / "pool", **names)

    row = index_scans(candidates, set(), 1, salt="s").rows[0]

    # The session is hashed with its subject: an id of a visit may be the same for two patients.
    assert row.subject == salted("DOE^JOHN", "s")
    assert row.session == salted("DOE^JOHN\n1.2.3", "s")
    assert row.contrast == "T1w"

    bare = index_scans(candidates, set(), 1).rows[0]

    assert (bare.subject, bare.session) == ("", "")


def test_no_identifier_reaches_the_index_or_the_journal(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "nnunet_autoreg")
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    candidates = described(tmp_path / "pool", subject="DOE^JOHN", session="1.2.3.4")
    index = index_scans(candidates, {"DOE^JOHN"}, 1, salt="s", journal=tmp_path / "journal")

    write_index(tmp_path / "scans.csv", index.rows)

    row = index.rows[0]
    assert (row.status, row.reason) == ("excluded", "excluded by the user (by its patient)")
    files = (tmp_path / "scans.csv").read_text() + (tmp_path / "journal").read_text()
    written = files + caplog.text + repr(candidates)
    assert "DOE" not in written
    assert "1.2.3.4" not in written


@pytest.mark.parametrize(
    ("found", "override", "in_manifest", "expected"),
    [
        ("PET", None, "", ("PET", "the file says so")),
        (
            "CT",
            None,
            "",
            ("CT", "the file says so, though no value is negative: are these Hounsfield units?"),
        ),
        ("PET", "ct", "", ("CT", "--modality")),
        ("PET", "ct", "US", ("US", "--manifest")),
    ],
)
def test_manifest_then_option_then_file_decide_the_modality(
    tmp_path: Path,
    found: str,
    override: str | None,
    in_manifest: str,
    expected: tuple[str, str],
) -> None:
    path = save(tmp_path / "pool" / "a.nii.gz", mr(0))
    entry = ManifestEntry(modality=in_manifest, label_class="liver")
    manifest = Manifest(tmp_path / "m.csv", {str(path): entry})
    candidates = described(tmp_path / "pool", modality=found)

    row = index_scans(candidates, set(), 1, override, manifest=manifest).rows[0]

    assert (row.modality, row.modality_rule, row.label_class) == (*expected, "liver")


def test_a_row_holds_intensity_percentiles_of_the_body(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", ct())

    row = make_index(tmp_path / "pool").rows[0]

    assert len(row.percentiles) == 5
    assert list(row.percentiles) == sorted(row.percentiles)
    # The middle one is soft tissue; the air around the body at -1000 HU does not count.
    assert abs(row.percentiles[2] - 40) < 3
    assert row.percentiles[0] > -900


def interrupted_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> list[str]:
    """Index a pool of 4 with a journal, interrupted before scan number ``after``.

    Returns the names of the files that were read.
    """
    read: list[str] = []

    def counted(task: index_module.IndexTask) -> ScanFacts:
        if len(read) == after:
            raise KeyboardInterrupt
        read.append(task.path.name)
        return facts_of(task)

    facts_of = index_module.facts_of
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "facts_of", counted)
        candidates = find_scans([], [tmp_path / "pool"])
        with pytest.raises(KeyboardInterrupt) if after < 4 else nullcontext():
            index_scans(candidates, set(), 1, journal=tmp_path / ".journal")
    return read


@pytest.fixture
def pool_of_4(tmp_path: Path) -> Path:
    """Two CT scans, an MR scan, and one that is left out because it is constant."""
    constant = np.full((16, 16, 16), 3, np.int16)
    arrays = {"a": ct(0), "b": mr(1), "c": constant, "d": ct(1)}
    for name, array in arrays.items():
        save(tmp_path / "pool" / f"{name}.nii.gz", array)
    return tmp_path


def test_an_interrupted_index_continues_where_it_stopped(
    pool_of_4: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = make_index(pool_of_4 / "pool")

    assert interrupted_index(pool_of_4, monkeypatch, 3) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    assert interrupted_index(pool_of_4, monkeypatch, 4) == ["d.nii.gz"]

    candidates = find_scans([], [pool_of_4 / "pool"])
    index = index_scans(candidates, set(), 1, journal=pool_of_4 / ".journal")

    assert index.rows == whole.rows
    np.testing.assert_array_equal(index.ct_samples_hu, whole.ct_samples_hu)


def test_a_file_that_changed_meanwhile_is_read_again(
    pool_of_4: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted_index(pool_of_4, monkeypatch, 2)
    before = (pool_of_4 / "pool" / "b.nii.gz").stat()
    save(pool_of_4 / "pool" / "b.nii.gz", mr(2))
    # The file has the same size and is newer by a nanosecond only.
    os.utime(pool_of_4 / "pool" / "b.nii.gz", ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    assert interrupted_index(pool_of_4, monkeypatch, 4) == ["b.nii.gz", "c.nii.gz", "d.nii.gz"]


def test_a_request_for_another_modality_reads_the_scans_again(
    pool_of_4: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted_index(pool_of_4, monkeypatch, 4)
    candidates = find_scans([], [pool_of_4 / "pool"])

    index = index_scans(candidates, set(), 1, "MR", journal=pool_of_4 / ".journal")

    # Hounsfield samples that the journal holds for "CT" would be wrong now.
    assert {row.modality_rule for row in index.usable} == {"--modality"}
    assert not index.ct_samples_hu.size


@pytest.mark.parametrize(
    "torn",
    # A line cut short by a kill, zeros after a power failure, a line of another format.
    [b'["abc", {"status": "o', b"\x00\x00\n", b'["abc", {"what": 1}]\n'],
)
def test_a_torn_journal_loses_its_last_line_only(
    pool_of_4: Path,
    monkeypatch: pytest.MonkeyPatch,
    torn: bytes,
) -> None:
    interrupted_index(pool_of_4, monkeypatch, 2)
    journal = pool_of_4 / ".journal"
    lines = journal.read_bytes()

    journal.write_bytes(lines + torn)

    assert interrupted_index(pool_of_4, monkeypatch, 4) == ["c.nii.gz", "d.nii.gz"]
    assert journal.read_bytes().startswith(lines)
    assert torn not in journal.read_bytes()


def test_unreadable_files_are_tried_again_every_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A file may be unreadable now and readable later, for example on a network drive.
    (tmp_path / "pool").mkdir()
    for name in "abcd":
        (tmp_path / "pool" / f"{name}.nii.gz").write_text("text")

    assert len(interrupted_index(tmp_path, monkeypatch, 4)) == 4
    assert len(interrupted_index(tmp_path, monkeypatch, 4)) == 4


def test_a_header_has_a_stamp_of_its_voxels_too(tmp_path: Path) -> None:
    # The Analyze format keeps header and voxels in two files; scans are found by the header.
    (tmp_path / "a.hdr").write_bytes(b"header")
    (tmp_path / "a.img").write_bytes(b"voxels")
    before = stamp_of(tmp_path / "a.hdr")

    (tmp_path / "a.img").write_bytes(b"other voxels")

    assert stamp_of(tmp_path / "a.hdr") != before


def test_a_folder_of_slices_has_a_stamp_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a.dcm").write_text("x")
    shutil.copytree(tmp_path / "1", tmp_path / "2")

    (tmp_path / "2" / "b.dcm").write_text("y")

    assert stamp_of(tmp_path / "1") != stamp_of(tmp_path / "2")
    assert stamp_of(tmp_path / "gone") == ""
    # Only the deep stamp looks into folders below.
    assert stamp_of(tmp_path) != stamp_of(tmp_path, deep=True)


def test_headers_decide_what_they_can_before_any_voxel_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    save(tmp_path / "pool" / "b.nii.gz", np.zeros((2, 16, 16), np.int16))
    read = []

    def noted(task: index_module.IndexTask) -> ScanFacts:
        read.append(task.path.name)
        return ScanFacts("constant", "x")

    monkeypatch.setattr(index_module, "facts_of", noted)

    # Two slices are too few, which the header of b says.
    assert statuses(make_index(tmp_path / "pool")) == {"a": "constant", "b": "tiny"}
    assert read == ["a.nii.gz"]


def test_items_are_handed_out_a_few_chunks_ahead_of_the_results() -> None:
    taken = []

    class Watched(list):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            for item in super().__iter__():
                taken.append(item)
                yield item

    results = parallel_map(abs, Watched(range(0, -400, -1)), 2, "testing", 5)

    assert next(results) == 0
    # Chunks of 5 for 2 workers: a million scans are not queued at once.
    assert len(taken) <= 5 * (2 * CHUNKS_AHEAD + 1)
    assert list(results) == list(range(1, 400))


def test_an_index_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    # Columns that were added later (subject, session, percentiles) are missing.
    names = (
        "id,dataset,case,channel,modality,source,shape_vox,spacing_mm,cropped_shape_vox,"
        "content_hash,status,reason,modality_rule"
    )
    (tmp_path / "scans.csv").write_text(
        f"{names}\np/a,p,a,,MR,/p/a.nii.gz,4x5x6,1.0x1.0x2.0,4x4x4,ab,ok,,--modality\n",
    )

    row = read_index(tmp_path / "scans.csv")[0]

    assert (row.spacing_mm, row.subject, row.percentiles) == ((1.0, 1.0, 2.0), "", ())


def test_many_rows_are_written_one_by_one(tmp_path: Path) -> None:
    save(tmp_path / "pool" / "a.nii.gz", mr(0))
    row = make_index(tmp_path / "pool").rows[0]
    # A generator: a pool of millions of rows need not be in memory twice.
    rows_written = (replace(row, id=f"pool/{n}", percentiles=(-1e-7, 0.5 * n)) for n in range(50))

    write_index(tmp_path / "scans.csv", rows_written)

    rows = read_index(tmp_path / "scans.csv")

    assert [r.id for r in rows] == [f"pool/{n}" for n in range(50)]
    assert rows[3].percentiles == (-1e-7, 1.5)


@pytest.fixture
def pet_series(shared_data: Path) -> Path:
    return shared_data / "dicom" / "sarcoma_STS_002" / "STS_002" / "PET" / "image"


def as_image(series: Path) -> Any:
    reader: Any = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(series)))
    return reader.Execute()


def test_a_series_and_its_copies_in_other_formats_are_one_scan(
    pet_series: Path,
    tmp_path: Path,
) -> None:
    image = SimpleITK.Cast(as_image(pet_series), SimpleITK.sitkFloat32)
    copies = {
        "same.nii.gz": image,
        "turned.nrrd": SimpleITK.DICOMOrient(image, "PIR"),
        # Off in the 7th digit, as after a rescale slope that was rounded elsewhere.
        "rounded.mha": SimpleITK.Cast(as_image(pet_series) * (1 + 3e-7), SimpleITK.sitkFloat32),
    }
    (tmp_path / "pool").mkdir()
    for name, copy in copies.items():
        SimpleITK.WriteImage(copy, str(tmp_path / "pool" / name))
    candidates = [*find_scans([], [pet_series]), *find_scans([], [tmp_path / "pool"])]

    index = index_scans(candidates, set(), 1)

    original = index.rows[0]

    assert (original.status, original.modality) == ("ok", "PET")
    assert original.part.startswith("series=")
    assert {row.case: row.reason for row in index.rows[1:]} == {
        "same": f"same voxels and spacing as {original.id}",
        "turned": f"same voxels and spacing as {original.id}",
        "rounded": f"same voxels, except for rounding or scale (64 compared), as {original.id}",
    }


def test_an_excluded_dicom_folder_excludes_its_series_and_copies_elsewhere(
    pet_series: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "pool").mkdir()
    copy = SimpleITK.Cast(as_image(pet_series), SimpleITK.sitkFloat32)
    SimpleITK.WriteImage(copy, str(tmp_path / "pool" / "copy.nii.gz"))

    inside = index_scans(find_scans([], [pet_series.parent]), {str(pet_series)}, 1)

    reasons = {row.reason for row in inside.rows if row.status == "excluded"}
    assert reasons == {f"excluded by the user ('{pet_series}')"}

    elsewhere = make_index(tmp_path / "pool", {str(pet_series.parent)})

    assert [(row.status, row.reason) for row in elsewhere.rows] == [
        ("excluded", f"same voxels as the excluded {pet_series}"),
    ]


def test_a_series_is_excluded_with_a_folder_of_some_of_its_slices(
    pet_series: Path,
    tmp_path: Path,
) -> None:
    # Twenty slices per folder, of which the second folder is excluded.
    for number, path in enumerate(sorted(pet_series.iterdir())):
        folder = tmp_path / "pool" / f"{number // 20}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    candidates = find_scans([], [tmp_path / "pool"])

    index = index_scans(candidates, {str(tmp_path / "pool" / "1")}, 1)

    (row,) = index.rows
    assert row.reason == "excluded by the user (an excluded folder holds this series too)"
