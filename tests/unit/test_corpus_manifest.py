"""The manifest: what the user says of scans counts; rows that cannot be meant are refused."""

from pathlib import Path

import pytest
from refusals import logged, refused

from nnunet_autoreg.corpus.candidates import Candidate
from nnunet_autoreg.corpus.manifest import ManifestEntry, describe, read_manifest
from nnunet_autoreg.errors import UsageError

NAMES = ("a.nii.gz", "sub/b.nii.gz", "sub/c.nii.gz")


def write(folder: Path, text: str) -> Path:
    """Write a manifest beside three empty files of scans."""
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    file = folder / "manifest.csv"
    file.write_text(text, encoding="utf-8")
    return file


def candidates(folder: Path) -> list[Candidate]:
    """Return the three scans with what was found in their files."""
    found = []
    for n in NAMES:
        one = Candidate(
            f"p/{n}",
            folder / n,
            "p",
            n,
            subject="found",
            contrast="T1w",
            modality="MR",
        )
        found.append(one)
    return found


def test_a_row_overrules_what_was_found_and_an_empty_cell_does_not(
    tmp_path: Path,
) -> None:
    # A relative path with an empty contrast, and an absolute path with nothing but a contrast.
    text = (
        f"path,subject,session,contrast,class,modality\na.nii.gz,P1,S1,,tumour,pet\n"
        f"{tmp_path}/sub/b.nii.gz,,,FLAIR,,\n"
    )

    described, entries = describe(candidates(tmp_path), read_manifest(write(tmp_path, text)))

    assert [(c.subject, c.session, c.contrast, c.modality) for c in described] == [
        ("P1", "S1", "T1w", "PET"),
        ("found", "", "FLAIR", "MR"),
        ("found", "", "T1w", "MR"),
    ]
    assert entries["p/a.nii.gz"].label_class == "tumour"
    assert set(entries) == {"p/a.nii.gz", "p/sub/b.nii.gz"}


def test_a_folder_speaks_for_all_scans_in_it_and_a_file_for_itself(tmp_path: Path) -> None:
    # Spreadsheets of some countries write semicolons.
    manifest = read_manifest(write(tmp_path, "path;subject\nsub;P7\nsub/c.nii.gz;P8\n"))

    described, _ = describe(candidates(tmp_path), manifest)

    assert [c.subject for c in described] == ["found", "P7", "P8"]


def test_tabs_a_byte_order_mark_capitals_and_quoted_commas_are_read(tmp_path: Path) -> None:
    # The byte order mark is what Excel puts before UTF-8.
    manifest = read_manifest(write(tmp_path, "\ufeffPath\tClass\na.nii.gz\tleft, upper\n"))

    assert list(manifest.entries.values()) == [ManifestEntry(label_class="left, upper")]


def test_paths_that_do_not_exist_or_hold_no_scan_are_counted_and_shown(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "nnunet_autoreg")
    # A scan, a file that does not exist, and a file that is not a scan.
    text = "path,subject\na.nii.gz,1\ngone.nii.gz,2\nmanifest.csv,3\n"

    describe(candidates(tmp_path), read_manifest(write(tmp_path, text)))

    assert logged(caplog, "--manifest", "1 scans", "1 of 3 rows")
    assert logged(caplog, "--manifest", "1 paths", "'gone.nii.gz'")
    assert logged(caplog, "--manifest", "1 paths", f"'{tmp_path / 'manifest.csv'}'")
    # Files and redirected output name no file.
    assert "gone" not in caplog.text
    assert str(tmp_path) not in caplog.text


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("path,subjekt\na.nii.gz,1\n", "manifest-unknown-column", "'subject'"),
        ("file,subject\na.nii.gz,1\n", "manifest-unknown-column", "'file'"),
        ("subject\n1\n", "manifest-missing-column", "'path'"),
        ("", "manifest-missing-column", "'path'"),
        ("path,path\na,b\n", "manifest-repeated-column", "'path'"),
        ("path,subject\na.nii.gz,1,2\n", "manifest-extra-cells", "row 1"),
        ("path,subject\na.nii.gz,1\n,2\n", "manifest-no-path", "row 2"),
        # Two spellings of one path.
        (
            "path,subject\na.nii.gz,1\n./sub/../a.nii.gz,2\n",
            "manifest-repeated-path",
            "./sub/../a.nii.gz",
        ),
        # A quote that is never closed.
        ('path,subject\n"a.nii.gz,1\n', "manifest-unreadable", ""),
    ],
)
def test_a_manifest_that_cannot_be_meant_is_refused(
    tmp_path: Path,
    text: str,
    code: str,
    value: str,
) -> None:
    with refused(UsageError, code, value, tmp_path / "manifest.csv"):
        read_manifest(write(tmp_path, text))


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with refused(UsageError, "manifest-unreadable", tmp_path / "gone.csv"):
        read_manifest(tmp_path / "gone.csv")

    (tmp_path / "latin.csv").write_bytes("path\nMüller\n".encode("latin-1"))

    with refused(UsageError, "manifest-unreadable", tmp_path / "latin.csv", "UTF-8"):
        read_manifest(tmp_path / "latin.csv")


def test_without_a_manifest_nothing_changes(tmp_path: Path) -> None:
    assert describe(candidates(tmp_path), None) == (candidates(tmp_path), {})
