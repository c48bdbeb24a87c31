# SPDX-License-Identifier: Apache-2.0
"""Executors of work that falls into independent parts: here, in processes, on an existing Dask cluster, or by threads
that share the pieces of a frame.

A part is computed with one thread wherever it runs, so that the results are the same to the bit (on processors of one
kind; the process that compiles a loop, once, may differ in the last bits). If a worker is lost, its part is computed
again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kfloc_ros.errors import ConfigError

if TYPE_CHECKING:
    import argparse

P = TypeVar("P")
R = TypeVar("R")

MAX_LOSSES = 3
"""Number of workers lost in a row, without a part finished in between, that ends the work."""
CONNECT_S = 20.0


@dataclass(frozen=True)
class Workers:
    """Where parts are computed."""

    jobs: int = 1
    """Processes on this machine; 1: this process."""
    scheduler: str = ""
    """Address of a Dask scheduler, such as ``tcp://host:8786``; it has priority."""


def add_jobs_arguments(parser: argparse.ArgumentParser, what: str, *, jobs: int | None = None) -> None:
    """Add ``--jobs`` and ``--scheduler``; :func:`workers_from` reads them.

    Args:
        parser: the parser.
        what: the parts, for the help.
        jobs: default of ``--jobs``; None: the option is off.
    """
    names = ("--jobs", "--thread_num") if jobs else ("--jobs",)
    parser.add_argument(
        *names, type=int, default=jobs, metavar="N",
        help=f"compute {what} in N processes, one thread each" + (f" (default: {jobs})" if jobs else ""),
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", default="", metavar="ADDRESS",
        help=f"compute {what} on a Dask cluster with this scheduler, such as tcp://host:8786; its workers need this "
        "package and the same paths (pip install 'kfloc_ros[cluster]')",
    )  # fmt: skip


def workers_from(args: argparse.Namespace) -> Workers | None:
    """Return the workers of ``--jobs`` and ``--scheduler``, or None if neither is given.

    Raises:
        ConfigError: the number of processes is not positive.
    """
    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs takes 1 or more, got {args.jobs}.")
    if args.jobs is None and not args.scheduler:
        return None
    return Workers(args.jobs or 1, args.scheduler)


def call(work: Callable[[], R]) -> R:
    """Return what a function of no arguments does, such as a ``functools.partial`` of a module's function."""
    return work()


def run_parts(
    task: Callable[[P], R],
    parts: Sequence[P],
    workers: Workers | None = None,
    *,
    on_done: Callable[[int], None] = lambda part: None,
) -> list[R]:
    """Return ``task(part)`` of every part, in their order.

    Args:
        task: function of a module, without side effects but files of its own part; it may be called again for a part.
        parts: arguments; like the results, they travel between processes.
        workers: where to compute; by default in this process.
        on_done: called with the number of each part that is finished.

    Raises:
        ConfigError: workers end again and again, or the cluster cannot be reached.
        Exception: what ``task`` raised, of the first part that failed.
    """
    workers = workers or Workers()
    if workers.scheduler:
        return _on_cluster(task, parts, workers.scheduler, on_done)
    if workers.jobs <= 1 or len(parts) <= 1:
        results = []
        for number, part in enumerate(parts):
            results.append(_with_one_thread(task, part))
            on_done(number)
        return results
    return _in_processes(task, parts, min(workers.jobs, len(parts)), on_done)


class SharedWork:
    """Pieces of work that threads take, one after the other, until none is left.

    Args:
        pieces: functions that may run at the same time, in any order.
    """

    def __init__(self, pieces: Sequence[Callable[[], None]]) -> None:
        self._left, self._running = list(reversed(pieces)), 0
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.helped_s = 0.0
        """Time that :meth:`help` spent on pieces, in seconds."""

    def help(self) -> None:
        """Run pieces until none is left to take; what one raises is raised by :meth:`finish`."""
        self._run(helps=True)

    def finish(self) -> None:
        """Run pieces until none is left to take, and wait for those that other threads run.

        Raises:
            Exception: what a piece raised, in whatever thread.
        """
        self._run(helps=False)
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
        if self._error is not None:
            raise self._error

    def _run(self, *, helps: bool) -> None:
        while True:
            with self._changed:
                if not self._left:
                    return
                piece = self._left.pop()
                self._running += 1
            start, error = time.perf_counter(), None
            try:
                piece()
            except Exception as found:
                error = found
            with self._changed:
                self.helped_s += time.perf_counter() - start if helps else 0.0
                self._running -= 1
                if error is not None:
                    self._error, self._left = error, []
                self._changed.notify_all()


class SharedResult(Generic[R]):
    """Result that whichever thread is first computes.

    Args:
        compute: returns the result.
    """

    def __init__(self, compute: Callable[[], R]) -> None:
        self._found: list[R] = []
        self._work = SharedWork([lambda: self._found.append(compute())])

    @property
    def helped_s(self) -> float:
        """Time that :meth:`help` spent, in seconds."""
        return self._work.helped_s

    def help(self) -> None:
        """Compute the result, unless another thread does."""
        self._work.help()

    def result(self) -> R:
        """Return the result; compute it, or wait for the thread that does.

        Raises:
            Exception: what the computation raised, in whatever thread.
        """
        self._work.finish()
        return self._found[0]


class HelperThreads:
    """Threads that run pieces of a frame, one thread of torch each, in place of torch's own threads.

    Torch's threads wait for each other at every layer, and sleep meanwhile: small layers take longer with two than with
    one.
    """

    def __init__(self) -> None:
        self._lock, self._contexts, self._threads = threading.Lock(), 0, 1
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._of_caller = threading.local()
        self.spare = 0
        """Number of threads that may help even where torch has one thread: other cores are mostly free."""

    @contextlib.contextmanager
    def sharing(self) -> Iterator[None]:
        """Run torch in one thread within this context; as many as it had before, less this one, can be enlisted."""
        import torch

        with self._lock:
            self._threads = self._threads if self._contexts else torch.get_num_threads()
            self._contexts += 1
            torch.set_num_threads(1)
        try:
            with self.lending(self._threads - 1):
                yield
        finally:
            with self._lock:
                self._contexts -= 1
                torch.set_num_threads(self._threads)

    @contextlib.contextmanager
    def lending(self, count: int = 0) -> Iterator[None]:
        """Let this thread enlist at least ``count`` helpers within this context, and those that are spare."""
        count = max(count, self.spare)
        with self._lock:
            self._of_caller.pool, self._of_caller.count = self._pool(count) if count else None, count
        try:
            yield
        finally:
            self._of_caller.pool, self._of_caller.count = None, 0

    @property
    def at_hand(self) -> int:
        """Number of helpers that this thread can enlist."""
        return getattr(self._of_caller, "count", 0)

    def enlist(self, *tasks: Callable[[], None]) -> None:
        """Let helpers run tasks, which may also run late; they do nothing if none are at hand."""
        for task in tasks if self.at_hand else ():
            self._of_caller.pool.submit(task)

    def _pool(self, count: int) -> ThreadPoolExecutor:
        import torch

        if count not in self._pools:
            started = threading.Barrier(count + 1)
            pool = self._pools[count] = ThreadPoolExecutor(count, "helper", torch.set_num_threads, (1,))
            for _ in range(count):
                pool.submit(started.wait)
            started.wait()  # the number of threads is set for all of torch; later it would end the caller's
        return self._pools[count]


HELPERS = HelperThreads()
"""Helpers of this process."""


def _with_one_thread(task: Callable[[P], R], part: P) -> R:
    """Return the result of a part, computed with one thread of torch; the number before is restored."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return task(part)
    finally:
        torch.set_num_threads(threads)


def _prepare() -> None:
    """Leave Ctrl-C to the main process, which ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_processes(
    task: Callable[[P], R], parts: Sequence[P], processes: int, on_done: Callable[[int], None]
) -> list[R]:
    found: dict[int, R] = {}
    losses = 0
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    while len(found) < len(parts):
        before = len(found)
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_prepare)
        try:
            waiting: dict[Future[R], int] = {
                pool.submit(_with_one_thread, task, part): number
                for number, part in enumerate(parts)
                if number not in found
            }
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    number = waiting.pop(future)
                    found[number] = future.result()
                    on_done(number)
        except BrokenProcessPool as error:
            losses = 1 if len(found) > before else losses + 1
            if losses >= MAX_LOSSES:
                raise ConfigError(
                    f"{losses} worker processes in a row were ended by the system, with {len(found)} of {len(parts)} "
                    "parts done; memory may be short. Use a smaller --jobs."
                ) from error
        finally:
            _end(pool)
    return [found[number] for number in range(len(parts))]


def _end(pool: ProcessPoolExecutor) -> None:
    """End a pool without waiting for the parts that are being computed."""
    processes: Iterable[Any] = list((getattr(pool, "_processes", None) or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        with contextlib.suppress(OSError, ValueError):
            os.kill(process.pid, signal.SIGTERM)


def _on_cluster(task: Callable[[P], R], parts: Sequence[P], address: str, on_done: Callable[[int], None]) -> list[R]:
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise ConfigError("--scheduler needs Dask: pip install 'kfloc_ros[cluster]'.") from None
    try:
        client = Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"The scheduler '{address}' cannot be reached: {' '.join(str(error).split())}.") from error
    with client:
        futures = [client.submit(_with_one_thread, task, part, pure=False) for part in parts]
        numbers = {future.key: number for number, future in enumerate(futures)}
        try:
            for future in as_completed(futures, loop=client.loop):
                if future.status == "error":
                    break
                on_done(numbers[future.key])
            return [future.result() for future in futures]
        except Exception as error:
            if type(error).__name__ == "KilledWorker":
                raise ConfigError(f"Workers of the cluster are lost again and again: {error}.") from error
            raise
        finally:
            client.cancel(futures)
