"""Executors for tests: in this process, but through pickles, as if it were another one."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool

from qrecipe.pool import worker


def _run(future, task):
    function, args = pickle.loads(task)
    future.set_result(pickle.loads(pickle.dumps(function(*args))))


class AtOnce(Executor):
    """Runs each piece when it is submitted, as a worker that has just started; keeps its bytes."""

    def __init__(self):
        worker._BEGUN.clear()
        self.sent = []

    def submit(self, function, /, *args):
        future = Future()
        self.sent.append(pickle.dumps((function, args)))
        _run(future, self.sent[-1])
        return future

    @property
    def pieces(self):
        return [pickle.loads(each)[1][1] for each in self.sent]


class LastFirst(Executor):
    """Runs the pieces that were submitted last first, one at a time."""

    def __init__(self, workers=3):
        self._max_workers = workers
        self._waiting = []
        threading.Thread(target=self._work, daemon=True).start()

    def submit(self, function, /, *args):
        future = Future()
        self._waiting.append((future, pickle.dumps((function, args))))
        return future

    def _work(self):
        while True:
            time.sleep(0.01)
            while self._waiting:
                future, task = self._waiting.pop()
                if future.set_running_or_notify_cancel():
                    _run(future, task)


class Dying(AtOnce):
    """Breaks for good after some pieces, as a pool of processes does when one of them dies."""

    def __init__(self, after):
        super().__init__()
        self._after = after

    def submit(self, function, /, *args):
        if len(self.sent) < self._after:
            return super().submit(function, *args)
        future = Future()
        future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
        return future
