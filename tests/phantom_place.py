"""Five phantom scans in nnU-Net's folders, and an encoder small enough to train on them in
seconds.
"""

from pathlib import Path

import numpy as np
import SimpleITK

ENCODER = (
    'encoder.arguments={"embed_dim":24,"patch_embed_size":[8,8,8],"eva_depth":1,"eva_numheads":2,'
    '"init_values":0.1,"scale_attn_inner":true}'
)
SETTINGS = [ENCODER, "sequence.crop_size_vox=16,16,16", "run.log_every=1"]
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class PhantomPlace:
    """Scans in ``scans/`` and nnU-Net's three folders, all below ``root``."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("scans", *FOLDERS):
            (root / name).mkdir()
        for number in range(5):
            noise = np.random.default_rng(number).normal(300, 90, (20, 18, 17))
            image = SimpleITK.GetImageFromArray(noise.astype(np.float32))
            SimpleITK.WriteImage(image, str(root / "scans" / f"{number}.nii.gz"))

    def folders(self) -> dict[str, str]:
        """nnU-Net's variables."""
        return {name: str(self.root / name) for name in FOLDERS}

    def log(self, name: str) -> Path:
        """What the runs of this name said."""
        return self.root / f"{name}.log"

    def folder(self, name: str) -> Path:
        """The folder of a run."""
        return self.root / "nnUNet_results/autoreg_pretraining" / name
