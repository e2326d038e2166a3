"""Run requests in forks of one process that has imported everything once: server and client.

Imports take most of the time of a short line, and are done once for all tests of a file.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback


def serve(child):
    """Run ``child`` in a fork for every JSON request on stdin; answer its pid, then its status.

    The status of a process that a signal ended is negative, as of ``subprocess``.
    """
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            # EX_SOFTWARE of sysexits.h: what the fork ends with if it raises an exception.
            code = 70
            try:
                code = child(request)
            except BaseException:
                # Otherwise nobody would see it: the fork ends without Python's own exit.
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                # Without the handlers of the server's own exit.
                os._exit(code)

        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def take_over(request):
    """Give this fork the environment of a request, and send its output to the request's log."""
    os.environ.update(request["env"])
    # Below Python, so that libraries and child processes write there too.
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def kill():
    """End this process at once, as the kernel does."""
    os.kill(os.getpid(), signal.SIGKILL)
    # The signal arrives a moment later; nothing may be done until then.
    threading.Event().wait()


class ForkServer:
    """A process that serves requests: one at a time is started, and then waited for."""

    def __init__(self, runner, environment):
        self.process = subprocess.Popen(
            [sys.executable, str(runner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "OMP_NUM_THREADS": "1"},
        )

    def start(self, request):
        """Start a request; return the process id of its fork."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()["pid"]

    def status(self):
        """Wait for the fork; return its exit status, negative for a signal."""
        return self._answer()["status"]

    def run(self, request):
        """Do both."""
        self.start(request)
        return self.status()

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        return json.loads(self.process.stdout.readline())
