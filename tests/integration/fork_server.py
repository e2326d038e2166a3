"""Answer requests in forks of one process that has imported everything once."""

import json
import os
import sys


def serve(child):
    """Run ``child`` in a fork for every JSON request on stdin, and answer with its exit status.

    The status of a process that a signal ended is negative, as of ``subprocess``.
    """
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}), flush=True)
