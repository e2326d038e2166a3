"""Draw features of scans of several sets as a map of two dimensions.

    autoreg_embed -w brain -i RAW/imagesTr -o ixi.npz
    python benchmarks/embedding_map.py --features "IXI=ixi.npz" "LIDC=lidc.npz" --out map.png

Features are scaled to length 1, because their length differs more with the size of a scan than with
what it shows, and standardised. The map shows their first two principal components. Sets differ in
their number of scans, so every set counts equally in both steps.

How well sets separate is measured in all dimensions: the share of scans whose nearest neighbour is
of their own set. It is added to ``benchmarks/results/classification.jsonl``, as a line of kind
"map".
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_lines import circumstances
from numpy.typing import NDArray

from nnunet_autoreg.records import append_json_line, atomic_path, read_json
from nnunet_autoreg.report.palette import SERIES

RESULTS = Path(__file__).parent / "results" / "classification.jsonl"


def standardised(
    features_SV: NDArray[np.float64],
    sets: NDArray[np.str_],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return features of mean 0 and deviation 1, and the weight of every scan.

    Weights make all sets count equally.
    """
    names, index_S, counts = np.unique(sets, return_inverse=True, return_counts=True)
    weights_S = 1 / (len(names) * counts[index_S])
    mean_V = weights_S @ features_SV
    variance_V = weights_S @ (features_SV - mean_V) ** 2
    return (features_SV - mean_V) / np.sqrt(np.maximum(variance_V, 1e-12)), weights_S


def neighbour_shares(values_SV: NDArray[np.float64], sets: NDArray[np.str_]) -> dict[str, float]:
    """Return set -> share of its scans whose nearest neighbour is of the same set."""
    from sklearn.neighbors import NearestNeighbors

    # The nearest is the scan itself.
    found = NearestNeighbors(n_neighbors=2).fit(values_SV).kneighbors(values_SV)[1][:, 1]
    is_same = sets[found] == sets
    return {name: float(is_same[sets == name].mean()) for name in dict.fromkeys(sets.tolist())}


def components(
    values_SV: NDArray[np.float64],
    weights_S: NDArray[np.float64],
) -> tuple[NDArray[np.float64], list[float]]:
    """Return the first two principal components (S, 2), and the share of variance of each."""
    from sklearn.decomposition import PCA

    # Rows that are repeated count more often: the weights become numbers of repetitions.
    repetitions_S = np.maximum(1, np.round(weights_S / weights_S.min() * 4)).astype(int)
    fitted = PCA(n_components=2).fit(np.repeat(values_SV, repetitions_S, axis=0))
    return fitted.transform(values_SV), fitted.explained_variance_ratio_.tolist()


def draw(
    picture: Path,
    points_S2: NDArray[np.float64],
    sets: NDArray[np.str_],
    shares: list[float],
) -> None:
    """Draw the map; every set has a colour and a marker."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(dict.fromkeys(sets.tolist())):
        own = points_S2[sets == name]
        style = SERIES[number % len(SERIES)]
        axis.scatter(
            own[:, 0],
            own[:, 1],
            s=28,
            color=style.colour,
            marker=style.marker,
            edgecolors="white",
            linewidths=0.5,
            label=f"{name} ({len(own)})",
        )
    first, second = (f"{100 * share:.0f} % of the variance" for share in shares)
    axis.set(xlabel=f"first component, {first}", ylabel=f"second component, {second}")
    axis.grid(alpha=0.3)
    axis.legend(title="set (scans)", loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    with atomic_path(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def main() -> None:
    """Draw the map and add its line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--features", nargs="+", required=True, metavar="SET=FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()

    rows: list[NDArray[np.float64]] = []
    names: list[str] = []
    described: dict[str, Any] = {}
    for pair in args.features:
        name, _, file = pair.partition("=")
        features_SV = np.load(file)["features"].astype(np.float64)
        rows.append(features_SV / np.linalg.norm(features_SV, axis=1, keepdims=True))
        names += [name] * len(features_SV)
        described[name] = read_json(Path(file).with_suffix(".json"))

    sets = np.array(names)
    values_SV, weights_S = standardised(np.concatenate(rows), sets)
    points_S2, shares = components(values_SV, weights_S)
    draw(args.out, points_S2, sets, shares)
    line = {
        "kind": "map",
        "scans": {name: names.count(name) for name in described},
        "nearest_neighbour_of_own_set": neighbour_shares(values_SV, sets),
        "variance_shares": shares,
        "features": described,
        **circumstances(torch.device("cpu")),
    }
    append_json_line(args.results, line)
    print(line["nearest_neighbour_of_own_set"])


if __name__ == "__main__":
    main()
