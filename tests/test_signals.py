"""How processes agree to leave, all after the same call, and what a process keeps of its memory."""

import os
import threading
from unittest.mock import Mock
from unittest.mock import call as called

import pytest
import torch

from mixup_recipes.training import launch, signals

WORLD = 3


@pytest.fixture
def ranks(monkeypatch):
    """``run(seconds, asked, calls)``: what three processes answer to each call, and how often they asked each other.

    ``seconds(rank, call)``: that a process takes before a call; ``asked``: rank and call at which a signal comes.
    """
    clock, barrier, said = threading.local(), threading.Barrier(WORLD, timeout=20), {}
    counts = [0] * WORLD

    def all_reduce(tensor, **_):
        counts[clock.rank] += 1
        said[clock.rank] = tensor.clone()
        barrier.wait()
        tensor.copy_(torch.stack(list(said.values())).amax(0))
        barrier.wait()

    monkeypatch.setattr(signals.signal, "signal", lambda *_: None)
    monkeypatch.setattr(signals.signal, "set_wakeup_fd", lambda *_, **__: None)
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(signals.torch.distributed, "new_group", lambda **_: "group")
    monkeypatch.setattr(signals.torch.distributed, "all_reduce", all_reduce)

    def run(seconds, asked, calls, what=lambda call: "update"):
        counts[:] = [0] * WORLD
        answers = [[] for _ in range(WORLD)]
        stops = [signals.Stop() for _ in range(WORLD)]

        def process(rank):
            clock.rank, clock.now = rank, 100.0
            for call in range(calls):
                clock.now += seconds(rank, call)
                if asked == (rank, call):
                    stops[rank].requested = "SIGTERM"
                answers[rank].append(stops[rank].agreed(Mock(num_processes=WORLD), what(call)))
                if answers[rank][-1]:
                    return

        threads = [threading.Thread(target=process, args=(rank,)) for rank in range(WORLD)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return answers, counts

    return run


def test_all_processes_leave_after_the_same_call_within_seconds_of_the_signal(ranks):
    for pace in (0.001, 0.01, 0.3, 5.0):
        for rank in range(WORLD):
            answers, _ = ranks(lambda r, _, pace=pace: pace * (1 + r), (rank, 150), 400)
            left = {len(said) for said in answers}
            assert len(left) == 1 and all(said[-1] and not any(said[:-1]) for said in answers)
            assert 150 < left.pop() <= 151 + max(1, 1.0 / (pace * WORLD))


def test_processes_ask_each_other_about_once_a_second_of_the_slowest_and_not_at_every_update(ranks):
    _, counts = ranks(lambda *_: 0.01, None, 1000)  # 0.2 s: not more than 20 updates go by unasked
    assert len(set(counts)) == 1 and 50 <= counts[0] <= 54
    _, counts = ranks(lambda rank, _: 0.1 * (1 + rank), None, 300)  # 90 s for the slowest
    assert 90 <= counts[0] <= 110
    _, counts = ranks(lambda *_: 2.0, None, 50)
    assert counts[0] == 50


def test_slow_updates_after_quick_rounds_of_an_evaluation_are_asked_about_at_once(ranks):
    def what(call):
        return "evaluation" if call < 300 else "update"

    answers, _ = ranks(lambda _, call: 0.001 if call < 300 else 5.0, (1, 310), 400, what)
    assert {len(said) for said in answers} <= {311, 312} and all(said[-1] for said in answers)


def test_one_process_asks_nobody(ranks):
    stop, alone = signals.Stop(), Mock(num_processes=1)
    assert not stop.agreed(alone)
    stop.requested = "SIGTERM"
    assert stop.agreed(alone)


def test_a_cpu_keeps_freed_memory_unless_the_environment_speaks_of_it(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)
    library = Mock()
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda _: library)
    launch.keep_freed_memory()
    assert library.mallopt.call_args_list == [called(-4, 0), called(-1, 2**31 - 1)]  # M_MMAP_MAX, M_TRIM_THRESHOLD
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda _: Mock(spec=()))  # no glibc
    launch.keep_freed_memory()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    library.mallopt.reset_mock()
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda _: library)
    launch.keep_freed_memory()
    assert not library.mallopt.called
