"""Draw glossary.png: crop, token, block, order, prefix and members on a real scan.

    python docs/explanation/draw_glossary.py T1.nii.gz FLAIR.nii.gz

The two images show the same patient on the same grid.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from nnunet_autoreg.report.palette import BLUE, ORANGE, WHITE

PICTURE = Path(__file__).with_name("glossary.png")
SEED = 3

TOKEN, BLOCK, CROP = 8, 16, 64  # voxels along each axis
CROP_START_YX = (52, 44)
NUM_KNOWN = 6


def read_slice(path: Path, slice_z: int) -> np.ndarray:
    """Return one axial slice (Y, X), anterior at the top, intensities from 0 to 1."""
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
    voxels = SimpleITK.GetArrayFromImage(image).astype(np.float32)  # (Z, Y, X)
    brightest = np.percentile(voxels, 99.5)
    return np.clip(voxels[slice_z] / brightest, 0, 1)


def crop_of(slice_yx: np.ndarray) -> np.ndarray:
    """Return the crop (64, 64) of a slice."""
    y, x = CROP_START_YX
    return slice_yx[y : y + CROP, x : x + CROP]


def show(axis: Any, picture_yx: np.ndarray, title: str) -> None:
    """Show a picture whose voxel edges lie at whole numbers."""
    height, width = picture_yx.shape
    axis.imshow(picture_yx, cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=11, loc="left")


def outline(axis: Any, corner_xy: tuple[float, float], size: float, colour: str) -> None:
    """Draw a square."""
    square = Rectangle(corner_xy, size, size, fill=False, edgecolor=colour, linewidth=3.5)
    square.set_zorder(3)  # above the lines of the grid
    axis.add_patch(square)


def draw_grid(axis: Any, spacing: int, width: float) -> None:
    """Draw the borders between tokens or blocks of a crop."""
    for position in range(0, CROP + 1, spacing):
        axis.plot([position, position], [0, CROP], color=WHITE, linewidth=width)
        axis.plot([0, CROP], [position, position], color=WHITE, linewidth=width)


def draw_order(axis: Any, order: np.ndarray, num_known: int) -> None:
    """Write the number of every block into it, and tint the known and the unknown blocks.

    Args:
        order: number of each block from 0, row by row.
    """
    blocks_per_row = CROP // BLOCK
    for place, number in enumerate(order):
        row, column = divmod(place, blocks_per_row)
        is_known = number < num_known
        colour = BLUE if is_known else ORANGE
        corner = (column * BLOCK, row * BLOCK)
        axis.add_patch(Rectangle(corner, BLOCK, BLOCK, facecolor=colour, alpha=0.45))
        axis.text(
            corner[0] + BLOCK / 2,
            corner[1] + BLOCK / 2,
            str(number + 1),
            color=WHITE,
            fontsize=13,
            fontweight="bold",
            ha="center",
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="black")],
        )
    draw_grid(axis, BLOCK, width=1.6)


def draw(t1: np.ndarray, flair: np.ndarray) -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(13.5, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    y, x = CROP_START_YX
    generator = np.random.default_rng(SEED)
    num_blocks = (CROP // BLOCK) ** 2

    show(axes[0, 0], t1, "scan, and a crop (blue) of it")
    outline(axes[0, 0], (x, y), CROP, BLUE)

    show(axes[0, 1], crop_of(t1), "tokens: cubes of voxels (one in blue)")
    draw_grid(axes[0, 1], TOKEN, width=0.8)
    outline(axes[0, 1], (3 * TOKEN, 4 * TOKEN), TOKEN, BLUE)

    show(axes[0, 2], crop_of(t1), "blocks: cubes of tokens (one in blue)")
    draw_grid(axes[0, 2], TOKEN, width=0.5)
    draw_grid(axes[0, 2], BLOCK, width=2.2)
    outline(axes[0, 2], (2 * BLOCK, 1 * BLOCK), BLOCK, BLUE)

    order = generator.permutation(num_blocks)
    show(axes[1, 0], crop_of(t1), f"order: 1 to {num_blocks}; prefix: the first {NUM_KNOWN}")
    draw_order(axes[1, 0], order, NUM_KNOWN)

    # The order of a sequence with several members runs over the blocks of all of them.
    members = ("T1", t1), ("FLAIR", flair)
    order = generator.permutation(len(members) * num_blocks)
    for number, (name, image) in enumerate(members):
        axis = axes[1, 1 + number]
        show(axis, crop_of(image), f"two members, member {number + 1}: {name}")
        blocks = slice(number * num_blocks, (number + 1) * num_blocks)
        draw_order(axis, order[blocks], len(members) * NUM_KNOWN)

    figure.supxlabel(
        "Blue: the prefix, which is known. Orange: to be predicted, in the order of the numbers.",
        fontsize=11,
    )
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Draw the picture of the glossary.")
    parser.add_argument("t1", type=Path)
    parser.add_argument("flair", type=Path)
    parser.add_argument("--slice", type=int, default=70, help="number of the axial slice")
    args = parser.parse_args()

    t1, flair = (read_slice(path, args.slice) for path in (args.t1, args.flair))
    draw(t1, flair).savefig(PICTURE, dpi=80)


if __name__ == "__main__":
    main()
