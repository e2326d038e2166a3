"""What a hostile file holds: an object that does something when it is unpickled."""

import os
from pathlib import Path
from typing import Any


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.folder,))
