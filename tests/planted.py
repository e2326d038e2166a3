"""Scans that name a patient wherever a scan can, and a search for these names in everything that
commands have written.
"""

import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import dicom_files
import nibabel
import numpy as np
import SimpleITK
from numpy.typing import NDArray

NAME, BIRTH, UID = "quintrell", "19601231", "1.2.840.999666"
PATIENT = f"DOE^{NAME.upper()}_{BIRTH}"
SECRETS = (NAME, BIRTH, UID)
"""These must not occur in any output, in lower case."""

LABELLED = "zephyrine"
"""Part of the name of the raw dataset and of its cases: nnU-Net itself writes it."""

WORDS = ("endings", "slices", "header", "image", "same", "voxels", "read", "spacing", "scan")
"""Ordinary words that folders are called by as well, and that messages must keep."""

SHAPE = (24, 32, 24)
NUM_PICTURES = 2
DESCRIPTION, ARTIST, COPYRIGHT, EXIF_IFD, USER_COMMENT = 0x010E, 0x013B, 0x8298, 0x8769, 0x9286
"""Numbers of tags of EXIF."""
PNG = b"\x89PNG\r\n\x1a\n"


def noise(seed: int, shape: tuple[int, ...] = SHAPE) -> NDArray[np.float32]:
    """Return noise around 100."""
    values = np.random.default_rng(seed).normal(100, 30, shape)
    return values.astype(np.float32)


def write_nifti(file: Path, array: NDArray[Any], note: str = PATIENT) -> None:
    """Write a NIfTI file with ``note`` in every text field of its header, and in an extension."""
    image = nibabel.Nifti1Image(array.T, np.eye(4))
    # Fields of fixed length: 80, 24, 18 and 16 bytes, of which the last one stays 0.
    image.header["descrip"] = f"of {note}".encode()[:79]
    image.header["aux_file"] = note.encode()[:23]
    image.header["db_name"] = note.encode()[:17]
    image.header["intent_name"] = note.encode()[:15]
    extension = nibabel.nifti1.Nifti1Extension("comment", f"of {note}".encode())
    image.header.extensions.append(extension)
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, file)


def write_with_keys(file: Path, array: NDArray[Any]) -> None:
    """Write an NRRD or MetaImage file with additional keys."""
    image: Any = SimpleITK.GetImageFromArray(array)
    image.SetMetaData("PatientName", PATIENT)
    image.SetMetaData(NAME, BIRTH)
    image.SetMetaData("SeriesInstanceUID", f"{UID}.7")
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(file))


def write_dicom(folder: Path, seed: int, file_name: str = PATIENT, **changes: Any) -> None:
    """Write a DICOM series that names the patient in UIDs, in text and in private tags."""
    tags = {
        "t0008103e": ("LO", f"T1 {PATIENT}"),
        "t00080080": ("LO", f"Clinic of {NAME}"),
        "t00081030": ("LO", PATIENT),
        "t00091010": ("LO", PATIENT),
        "t00100010": ("PN", PATIENT.replace("_", "^")),
        "t00100020": ("LO", PATIENT),
        "t00100030": ("DA", BIRTH),
        "t00180015": ("CS", NAME.upper()),
        "t00181030": ("LO", f"protocol {PATIENT}"),
        "t00190010": ("LO", f"{NAME} private"),
        "t00191001": ("UN", PATIENT.encode()),
        "t0020000d": ("UI", f"{UID}.1"),
        "t00200052": ("UI", f"{UID}.2"),
        "t00204000": ("LT", PATIENT),
        **changes,
    }
    array = noise(seed, (16, 24, 24)).astype(np.int16)
    for number, pixels in enumerate(array):
        values = dicom_files.slice_values(
            number,
            series=f"{UID}.{seed}",
            sop_class=dicom_files.MR,
            shape=(24, 24),
            spacing=(1.0, 1.0),
            step_mm=1.0,
            **tags,
        )
        dicom_files.write(folder / f"{file_name}_{number}", values, pixels)


def write_pictures(folder: Path) -> None:
    """Write 2D images that name the patient in PNG's texts, EXIF, XMP and JPEG comments."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = f"of {PATIENT}, {UID}"
    exif = Image.Exif()
    for tag in (ARTIST, DESCRIPTION, COPYRIGHT):
        exif[tag] = text
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = text.encode()
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_PICTURES):
        pixels = np.clip(noise(60 + number, (40, 48)), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        chunks = PngInfo()
        chunks.add_text("Author", text)
        chunks.add_text("Comment", text, zip=True)
        chunks.add_itxt("XML:com.adobe.xmp", f"<name>{text}</name>")
        chunks.add_itxt(NAME, text, zip=True)
        image.save(folder / f"{PATIENT}_{number}.png", pnginfo=chunks, exif=exif)

        pixels = np.clip(noise(80 + number, (40, 48)), 0, 255).astype(np.uint8)
        xmp = f"<name>{text}</name>".encode()
        file = folder / f"{NAME}_{number}.jpg"
        Image.fromarray(pixels).save(file, comment=text, exif=exif, xmp=xmp)


def write_pool(root: Path) -> Path:
    """Write scans of every format, usable and unusable ones; return the folder to give with -i."""
    pool = root / f"ward of {PATIENT}"
    write_nifti(pool / PATIENT / "CT" / "x.nii.gz", noise(1))
    write_nifti(pool / f"{PATIENT}.nii", noise(2))
    write_with_keys(pool / f"nrrd_{NAME}" / f"{NAME}.nrrd", noise(3))
    write_with_keys(pool / f"meta_{NAME}" / f"{NAME}.mha", noise(4))
    write_dicom(pool / PATIENT / "MR", 5)
    write_pictures(pool / f"radiographs of {PATIENT}")

    write_nifti(root / "member.nii.gz", noise(6))
    with zipfile.ZipFile(pool / f"{PATIENT}.zip", "w") as archive:
        archive.write(root / "member.nii.gz", f"{PATIENT}/{NAME}.nii.gz")

    # Scans that are left out, whose reasons are written too.
    write_nifti(pool / f"copy of {PATIENT}.nii.gz", noise(1))
    write_nifti(pool / f"excluded_{NAME}.nii.gz", noise(7))
    write_nifti(pool / f"flat_{NAME}.nii.gz", np.zeros(SHAPE, np.float32))
    write_nifti(pool / f"gap_{NAME}.nii.gz", noise(8) * np.nan)
    write_nifti(pool / f"seg_{NAME}.nii.gz", np.rint(noise(9) / 60))
    write_dicom(pool / f"gappy_{NAME}", 10)
    # A missing slice, two patients in one series, and files that are damaged.
    (pool / f"gappy_{NAME}" / f"{PATIENT}_7").unlink()
    write_dicom(pool / f"two_{NAME}", 11)
    write_dicom(pool / f"two_{NAME}" / "other", 11, t00100020=("LO", f"{PATIENT}b"))
    (pool / f"damaged_{NAME}.nii.gz").write_bytes(b"nothing")
    (pool / f"damaged_{NAME}.zip").write_bytes(b"nothing")
    (pool / f"damaged_{NAME}.nrrd").write_bytes(f"NRRD0004\n# {PATIENT}\n".encode())
    (pool / f"damaged_{NAME}.dcm").write_bytes(b"\0" * 128 + b"DICM" + PATIENT.encode())
    (pool / f"{NAME}.txt").write_text(PATIENT)
    for number, word in enumerate(WORDS):
        # Cut off behind the header, so that the reason names the file.
        file = pool / word / f"{word}.nii.gz"
        write_nifti(file, noise(20 + number))
        file.write_bytes(file.read_bytes()[: 3000 + number])
    return pool


def write_lists(root: Path, pool: Path) -> dict[str, Path]:
    """Write files for --exclude and --manifest that name scans, some of which do not exist."""
    exclude = root / f"exclude_{NAME}.txt"
    exclude.write_text(f"excluded_{NAME}\nnobody_{NAME}\n{pool / f'excluded_{NAME}.nii.gz'}\n")
    manifest = root / f"manifest_{NAME}.csv"
    rows = [
        "path,subject,session",
        f"{pool / PATIENT / 'CT'},{PATIENT},{BIRTH}",
        f"gone_{NAME},{PATIENT},{BIRTH}",
        f"{exclude},{PATIENT},{BIRTH}",
    ]
    manifest.write_text("\n".join(rows) + "\n")
    boxes = root / f"boxes_{NAME}.csv"
    boxes.write_text(
        "scan,class,zmin,ymin,xmin,zmax,ymax,xmax\n"
        f"{PATIENT},cube,4,4,4,12,12,12\nnobody_{NAME},cube,4,4,4,12,12,12\n",
    )
    return {"exclude": exclude, "manifest": manifest, "boxes": boxes}


def write_dataset(raw: Path, number: int = 77, num_cases: int = 8) -> Path:
    """Write a labelled raw dataset whose cases, headers and description name patients."""
    folder = raw / f"Dataset{number:03d}_{LABELLED.upper()}"
    note = f"{PATIENT} {LABELLED}"
    for case in range(num_cases):
        labels = np.zeros(SHAPE, np.uint8)
        labels[6:16, 8 + case % 4 : 20, 6:16] = 1
        image = noise(40 + case) + 120 * labels
        name = f"{LABELLED}_{case:03d}"
        write_nifti(folder / "imagesTr" / f"{name}_0000.nii.gz", image, note)
        write_nifti(folder / "labelsTr" / f"{name}.nii.gz", labels, note)
    labels = np.zeros(SHAPE, np.uint8)
    labels[6:12, 8:16, 6:14] = 1
    write_nifti(folder / "imagesTs" / f"{LABELLED}_100_0000.nii.gz", noise(90) + 120 * labels, note)
    write_nifti(folder / "labelsTs" / f"{LABELLED}_100.nii.gz", labels, note)
    with (folder / "classesTr.csv").open("w") as handle:
        handle.write("case,patient,kind\n")
        for case in range(num_cases):
            handle.write(f"{LABELLED}_{case:03d},{PATIENT}_{case},{'ab'[case % 2]}\n")
    content = {
        "name": note,
        "description": f"scans of {PATIENT}",
        "reference": f"{NAME}, {UID}",
        "release": BIRTH,
        "channel_names": {"0": f"MR {NAME}"},
        "labels": {"background": 0, "cube": 1},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
        "licence": "CC0",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def write_png(file: Path, text: str) -> None:
    """Write a picture with a compressed text chunk."""
    content = b"Comment\0\0" + zlib.compress(text.encode())
    chunk = b"zTXt" + content
    checksum = zlib.crc32(chunk).to_bytes(4, "big")
    file.write_bytes(PNG + len(content).to_bytes(4, "big") + chunk + checksum)


def texts(data: bytes) -> Iterator[bytes]:
    """Yield bytes, and what is packed inside: zip members, gzip streams, compressed PNG chunks."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield from texts(gzip.decompress(data))
    elif data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                yield name.encode()
                yield from texts(archive.read(name))
    elif data.startswith(PNG):
        yield from _chunks(data)


def _chunks(data: bytes) -> Iterator[bytes]:
    """Yield the texts of a PNG file as plain bytes."""
    position = len(PNG)
    while position < len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        content = data[position + 8 : position + 8 + size]
        if kind == b"zTXt":
            yield zlib.decompress(content.partition(b"\0")[2][1:])
        elif kind == b"iTXt" and content.partition(b"\0")[2][:1] == b"\1":
            yield zlib.decompress(content.split(b"\0", 4)[-1])
        position += size + 12


def leaks(folder: Path, secrets: Iterable[str] = SECRETS, private: Iterable[str] = ()) -> list[str]:
    """Return what occurs where in the files below a folder and in their names.

    Args:
        private: names of files that are not searched.
    """
    wanted = [(secret, secret.lower().encode()) for secret in secrets]
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in private]
    assert files, f"{folder} holds nothing to search"

    found = set()
    for file in files:
        where = str(file.relative_to(folder))
        contents = [where.encode(), *texts(file.read_bytes())]
        for content in contents:
            lower = content.lower()
            found.update(f"{where}: {secret}" for secret, sought in wanted if sought in lower)
    return sorted(found)
