"""Pretraining runs on phantom scans, each of them a line in a fork of one process."""

import os

import phantom_place
from fork_server import ForkServer

SETTINGS = [*phantom_place.SETTINGS, "run.checkpoint_every=3", "run.validate_every=4"]


class PhantomRuns(phantom_place.PhantomPlace):
    """Runs of eight steps with checkpoints after 3, 6 and 8, validated after 4 and 8.

    Args:
        runner: the script that serves the lines.
        prefix: of the variables with which the runner talks to its own children.
    """

    def __init__(self, root, runner, prefix):
        # Variables of the user or of a runner above would change the run.
        super().__init__(root)
        own = ("autoreg_", prefix)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        self.server = ForkServer(runner, {**clean, "nnUNet_raw": str(root / "nnUNet_raw")})

    def start(self, name, store="nnUNet_preprocessed", options=(), **request):
        """Type the line of a run; return its process id.

        Args:
            store: folder of preprocessed cases below the root.
            options: further values of the plan, then further options.
            request: what the runner reads besides.
        """
        argv = ["-i", str(self.root / "scans"), "--name", name, "--steps", "8", "--batch", "2"]
        argv += ["--encoder", "primus_tiny", "--device", "cpu", "--set", *SETTINGS]
        argv += options
        (self.root / store).mkdir(exist_ok=True)
        folders = {**self.folders(), "nnUNet_preprocessed": str(self.root / store)}
        shared = {"argv": argv, "log": str(self.log(name)), "env": folders}
        return self.server.start({**shared, **request})

    def status(self):
        """Wait for the line; return its exit status, negative for a signal."""
        return self.server.status()

    def output(self, name):
        """Return what the lines of a run have written so far."""
        return self.log(name).read_text()
