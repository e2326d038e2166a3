"""Write the raw datasets that the classification benchmark trains on, without the test patients.

    python benchmarks/classification_data.py --raw FOLDER --out $nnUNet_raw

Images and label maps are links to those of the source. ``classesTr.csv`` is made from its
``cases.csv``. The test patients of ``autoreg_benchmark`` (a fifth, by a hash of their names) are
left out: folds, choices and pretraining see the other patients only.
"""

import argparse
import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_autoreg.benchmark.split import divide, find_patients
from nnunet_autoreg.records import read_json, write_json

Row = Mapping[str, str]

DIAMETERS_MM = (8.0, 14.0)
"""Diameters of the LIDC nodules. Outside this range, the class follows from the size only."""
SOLID = "5"
"""Texture 5 of 5 is solid, all others are subsolid."""


@dataclass(frozen=True)
class Source:
    """Hold how a set is made of a dataset.

    Attributes:
        dataset: folder name of the source.
        number, name: of the new dataset.
        tasks: names of the columns.
        classes: row of ``cases.csv`` -> the class in each task; None leaves the case out.
    """

    dataset: str
    number: int
    name: str
    tasks: tuple[str, ...]
    classes: Callable[[Row], tuple[str, ...] | None]


def diagnosis(row: Row) -> tuple[str, ...] | None:
    """Return the diagnosis of a heart."""
    return (row["diagnosis"],)


def sex(row: Row) -> tuple[str, ...] | None:
    """Return the sex; scans of unknown sex are left out."""
    return (row["sex"],) if row["sex"] else None


def nodule(row: Row) -> tuple[str, ...] | None:
    """Return malignancy and texture of a nodule of 8 to 14 mm."""
    low, high = DIAMETERS_MM
    if not low <= float(row["diameter_mm"]) <= high:
        return None
    malignancy = "malignant" if row["malignant"] == "1" else "benign"
    return malignancy, "solid" if row["texture"] == SOLID else "subsolid"


SETS = {
    "acdc": Source("Dataset028_ACDC100", 701, "ACDC100", ("diagnosis",), diagnosis),
    "lidc": Source("Dataset091_LIDCNodules", 702, "LIDC", ("malignancy", "texture"), nodule),
    "ixi": Source("Dataset085_IXI2mm", 703, "IXI", ("sex",), sex),
}


def write_set(source: Source, raw: Path, out: Path) -> tuple[Path, int]:
    """Write one dataset; returns its folder and the number of its cases."""
    origin = raw / source.dataset
    described = read_json(origin / "dataset.json")
    ending = described["file_ending"]
    with (origin / "cases.csv").open(newline="") as handle:
        rows = {row["case"]: row for row in csv.DictReader(handle)}
    patient_of = find_patients(origin, sorted(rows)).patient_of
    test_cases = set(divide(patient_of).test)

    folder = out / f"Dataset{source.number}_{source.name}"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines = [",".join(("case", "patient", *source.tasks))]
    for case, row in rows.items():
        classes = source.classes(row)
        if classes is None or case in test_cases:
            continue
        lines.append(",".join((case, patient_of[case], *classes)))
        for file in (f"imagesTr/{case}_0000{ending}", f"labelsTr/{case}{ending}"):
            link = folder / file
            if not link.is_symlink():
                link.symlink_to((origin / file).absolute())

    (folder / "classesTr.csv").write_text("\n".join(lines) + "\n")
    number = len(lines) - 1
    write_json(folder / "dataset.json", {**described, "numTraining": number})
    return folder, number


def main() -> None:
    """Write all datasets."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--raw", type=Path, required=True, help="raw datasets of the sources")
    parser.add_argument("--out", type=Path, required=True, help="where the new ones are written")
    args = parser.parse_args()
    for source in SETS.values():
        folder, number = write_set(source, args.raw, args.out)
        print(f"{folder}: {number} cases")


if __name__ == "__main__":
    main()
