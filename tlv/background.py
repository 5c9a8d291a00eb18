"""Functions that run in processes of their own. Used in notebooks 00 and 05."""

import logging
import os
import pickle
from concurrent.futures import ProcessPoolExecutor
from logging.handlers import QueueHandler, QueueListener
from multiprocessing import connection, get_context, parent_process
from threading import Thread

import torch


class Background:
    """Jobs that have been started, a process each; `wait` for what they return.

    `jobs` maps names to a function and its keyword arguments, the most urgent one first: where
    there are fewer cores than processes, the others stand back. What a job logs under the name of
    this package is shown while one waits. The processes end with the one that started them.
    """

    def __init__(self, jobs: dict, num_threads: int = 1):
        context = get_context("spawn")
        # A notebook's kernel shows twice what another process prints, so lines come by a queue.
        self._lines = context.Queue()
        self._pool = ProcessPoolExecutor(
            len(jobs), context, _start_worker, (num_threads, self._lines)
        )
        self._futures = {
            name: self._pool.submit(_run, function, urgency, kwargs)
            for urgency, (name, (function, kwargs)) in enumerate(jobs.items())
        }

    def wait(self) -> dict:
        """What every job returns, by name. An error in a job is raised here."""
        listener = QueueListener(self._lines, logging.StreamHandler())
        listener.start()
        try:
            return {name: future.result() for name, future in self._futures.items()}
        finally:
            listener.stop()
            self._pool.shutdown()


def stand_back() -> None:
    """Let other processes go first on a busy machine."""
    os.nice(10)


def compute_ahead(function, items, chunk: int = 20):
    """Yields function(item) of all items in order, computed early by a process that stands back."""
    with ProcessPoolExecutor(1, get_context("fork"), _start_helper) as pool:
        yield from pool.map(function, items, chunksize=chunk)


def map_forked(function, items, count: int, chunk: int = 4):
    """Yields function(item) of all items in order, computed by `count` copies of this process, of
    one CPU thread each; 1: by this process itself.

    The copies are forked here, so that `function` may hold whatever it needs. Raises ValueError
    where this process has used a GPU: its copies could not.
    """
    if count == 1:
        yield from map(function, items)
        return
    if torch.cuda.is_initialized():
        raise ValueError(f"num_processes = {count}: a process that uses a GPU cannot be copied; "
                         "take 1")  # fmt: skip
    own = count, get_context("fork"), _start_copy, (function,)
    with ProcessPoolExecutor(*own) as pool:
        yield from map(pickle.loads, pool.map(_call_own, items, chunksize=chunk))


def _start_helper() -> None:
    stand_back()
    end_with_parent()


def _start_copy(function) -> None:
    global _function
    _function = function
    torch.set_num_threads(1)  # no other thread survives a fork
    end_with_parent()


def _call_own(item) -> bytes:
    return pickle.dumps(_function(item))  # by value: torch would pass a file handle for each tensor


def _start_worker(num_threads: int, lines) -> None:
    torch.set_num_threads(num_threads)
    log = logging.getLogger("tlv")
    log.addHandler(QueueHandler(lines))
    log.setLevel(logging.INFO)
    end_with_parent()


def end_with_parent() -> None:
    """Let this process, which multiprocessing started, not outlive the one that did."""
    Thread(target=_await_parent, daemon=True).start()


def _await_parent() -> None:
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _run(function, urgency: int, kwargs: dict):
    if urgency:
        stand_back()
    return function(**kwargs)
