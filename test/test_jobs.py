# SPDX-License-Identifier: Apache-2.0
"""The executor: the same results here, in processes and on a Dask cluster; a lost worker's part is done again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import parts as work
import pytest
import torch

from kfloc_ros.device import spare_threads
from kfloc_ros.errors import ConfigError, SourceError
from kfloc_ros.jobs import HelperThreads, SharedResult, SharedWork, Workers, run_parts

HELPERS = Path(work.__file__).parent


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers find the helpers and this checkout."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HELPERS), str(HELPERS.parents[1])]))


@pytest.fixture
def cluster() -> Iterator[Any]:
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'kfloc_ros[cluster]'")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp"
    ) as found:
        yield found


def folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    return root / name


def parts_of(root: Path, name: str, **odd: Any) -> list[work.Part]:
    place = folder(root, name)
    return [work.Part(n, place, **(odd if n == 1 else {})) for n in range(4)]


def kill_worker_of(part: work.Part) -> threading.Thread:
    """Kill the process that computes a part as soon as it does."""

    def run() -> None:
        until_s = time.monotonic() + 30.0
        while time.monotonic() < until_s:
            for path in part.folder.glob(f"{part.number}-0-*"):
                os.kill(int(path.name.rsplit("-", 1)[1]), signal.SIGKILL)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def times_computed(part: work.Part) -> int:
    return len(list(part.folder.glob(f"{part.number}-*")))


def test_parts_in_this_process_come_in_order_with_one_thread(tmp_path: Path) -> None:
    done: list[int] = []
    found = run_parts(work.compute, parts_of(tmp_path, "here"), on_done=done.append)
    assert [number for number, _, _ in found] == [0, 1, 2, 3] == done
    assert {threads for _, _, threads in found} == {1}
    assert run_parts(work.compute, []) == []


@pytest.mark.thorough
def test_a_killed_process_costs_its_part_once_more_and_nothing_else(tmp_path: Path) -> None:
    expected = run_parts(work.compute, parts_of(tmp_path, "here"))
    parts = parts_of(tmp_path, "processes", dies=True)
    killer = kill_worker_of(parts[1])
    done: list[int] = []
    assert run_parts(work.compute, parts, Workers(2), on_done=done.append) == expected
    killer.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert times_computed(parts[1]) == 2


@pytest.mark.thorough
def test_an_error_of_a_part_is_raised_and_workers_that_always_end_are_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="Part 1 cannot"):
        run_parts(work.compute, parts_of(tmp_path, "fails", fails=True), Workers(2))
    parts = parts_of(tmp_path, "ends")
    with pytest.raises(ConfigError, match="3 worker processes in a row"):
        run_parts(work.end_at_once, parts, Workers(2))


@pytest.mark.thorough
def test_a_cluster_gives_the_same_and_survives_the_loss_of_a_worker(tmp_path: Path, cluster: Any) -> None:
    expected = run_parts(work.compute, parts_of(tmp_path, "here"))
    parts = parts_of(tmp_path, "cluster", dies=True)
    killer = kill_worker_of(parts[1])
    done: list[int] = []
    assert run_parts(work.compute, parts, Workers(scheduler=cluster.scheduler_address), on_done=done.append) == expected
    killer.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert times_computed(parts[1]) == 2
    failing = parts_of(tmp_path, "fails", fails=True)
    with pytest.raises(SourceError, match="Part 1 cannot"):
        run_parts(work.compute, failing, Workers(scheduler=cluster.scheduler_address))


def test_an_address_without_a_scheduler_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'kfloc_ros[cluster]'")
    monkeypatch.setattr("kfloc_ros.jobs.CONNECT_S", 0.5)
    for address in ("tcp://127.0.0.1:9", "nonsense://x"):
        with pytest.raises(ConfigError, match="cannot be reached"):
            run_parts(work.compute, parts_of(tmp_path, address.split(":")[0]), Workers(scheduler=address))


def test_pieces_are_shared_by_threads_and_each_runs_once() -> None:
    done, both = [], threading.Barrier(2, timeout=10.0)

    def piece(number: int) -> None:
        if number < 2:
            both.wait()  # so that two threads must take one each
        done.append((number, threading.get_ident()))

    shared = SharedWork([lambda number=number: piece(number) for number in range(5)])
    helper = threading.Thread(target=shared.help)
    helper.start()
    shared.finish()
    assert sorted(number for number, _ in done) == list(range(5))
    assert len({thread for _, thread in done}) == 2
    helper.join()
    assert shared.helped_s > 0.0
    shared.finish()
    assert len(done) == 5


def test_what_a_piece_raises_is_raised_where_the_work_is_finished() -> None:
    shared = SharedWork([lambda: [][0], lambda: None])
    shared.help()
    with pytest.raises(IndexError):
        shared.finish()


def test_a_shared_result_is_computed_once() -> None:
    done: list[int] = []
    shared = SharedResult(lambda: done.append(1) or len(done))
    helper = threading.Thread(target=shared.help)
    helper.start()
    assert shared.result() == shared.result() == 1
    helper.join()
    assert done == [1]


def test_two_threads_that_share_at_once_leave_torch_its_number_of_threads() -> None:
    before, helpers, inside = torch.get_num_threads(), HelperThreads(), threading.Barrier(2)

    def share() -> None:
        with helpers.sharing():
            inside.wait(10.0)

    torch.set_num_threads(2)
    try:
        other = threading.Thread(target=share)
        other.start()
        share()
        other.join()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_helpers_run_torch_in_one_thread_each_and_are_as_many_as_torch_had(threads: int) -> None:
    before, helpers = torch.get_num_threads(), HelperThreads()
    met, seen = threading.Barrier(threads), []

    def meet() -> None:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        met.wait(10.0)

    torch.set_num_threads(threads)
    try:
        for _ in range(2):
            with helpers.sharing():
                assert helpers.at_hand == threads - 1
                helpers.enlist(*[meet] * (threads - 1))
                meet()
            assert not helpers.at_hand and torch.get_num_threads() == threads
            helpers.enlist(lambda: seen.append((0, 0)))  # outside: none
    finally:
        torch.set_num_threads(before)
    assert len({ident for ident, _ in seen}) == threads and {number for _, number in seen} == {1}


def test_spare_helpers_are_at_hand_where_torch_has_one_thread_and_leave_its_threads_alone() -> None:
    before, helpers, seen = torch.get_num_threads(), HelperThreads(), []
    helpers.spare = 1

    def meet(met: threading.Barrier) -> None:
        seen.append(threading.get_ident())
        met.wait(10.0)

    try:
        for threads, context in ((1, helpers.sharing), (3, helpers.lending)):
            torch.set_num_threads(threads)
            met = threading.Barrier(2)
            with context():
                assert helpers.at_hand == 1 and torch.get_num_threads() == threads
                helpers.enlist(partial(meet, met))
                meet(met)
            assert helpers.at_hand == 0
    finally:
        torch.set_num_threads(before)
    assert len(set(seen)) == 2, "this thread and one helper, the same both times"


@pytest.mark.parametrize(("cores", "said", "spare"), [(1, None, 0), (2, None, 1), (16, None, 1), (2, "1", 0)])
def test_nodes_have_a_spare_thread_where_there_is_a_core_for_it_unless_the_user_says_how_many(
    monkeypatch: pytest.MonkeyPatch, cores: int, said: str | None, spare: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert spare_threads() == spare
