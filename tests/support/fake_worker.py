"""A worker without JAX: its networks do what the names of their files say.

`COMMAND` starts it. A network writes the id of its process into a file beside it.
"""

import os
import re
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

PROJECT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, str(Path(__file__).resolve()))
PROPERTY = (
    "(declare-const X_0 Real)(declare-const Y_0 Real)(assert (and (<= 0 X_0) (<= X_0 1)))"
    "(assert (<= Y_0 0))"
)


class Network:
    def __init__(self, path, rounding, max_bytes):
        self.name = path.stem
        path.touch()
        path.with_suffix(".pid").write_text(str(os.getpid()))
        if self.name == "heavy":
            time.sleep(600)

    def verify(self, property, method, timeout, with_proof=False, max_queue_bytes=0, counts=True):
        self.timeout, self.counts = timeout, counts
        return getattr(self, self.name)()

    def sat(self):
        counterexample = SimpleNamespace(inputs=[0.5], outputs=[-1.0])
        return SimpleNamespace(
            verdict="sat", counterexample=counterexample, note="the attack failed"
        )

    def unsat(self):
        print("printed by a library", end="", flush=True)  # no line of its own
        return SimpleNamespace(verdict="unsat", counterexample=None, note="")

    def sleeps(self):
        time.sleep(600)

    def compiles(self):
        """An answer after the limit, and after what the supervisor waits beyond it."""
        time.sleep(self.timeout + 1.0)
        return self.sat() if self.counts else self.unsat()

    def never_yields(self):
        re.fullmatch("(a+)+", "a" * 60 + "b")  # takes years, and lets no other thread run

    def crashes(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def exits(self):
        os._exit(3)

    def raises(self):
        raise ValueError("op 'f' is not supported:\n use another")


def main():
    sys.path.insert(0, str(PROJECT))
    from boundjax.verify import worker

    print("printed while starting", flush=True)
    worker.serve(lambda: Network)


if __name__ == "__main__":
    main()
