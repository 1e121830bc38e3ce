"""Computations side by side: their order, how many at once, errors, and torch's threads afterwards."""

import threading
import time
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch

from igpt_lab.core import side_by_side as module
from igpt_lab.core.side_by_side import LEAST, MOST, at_once, caller, check_wanted, is_middling, side_by_side
from igpt_lab.probing.solvers.logistic import fit_logistic

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_each_by_one_thread_and_few_jobs_at_once(threads):
    taken, done = [], threading.Semaphore(0)
    full, read = threading.Event(), threading.Event()

    def jobs():
        for job in range(6):
            taken.append(job)
            if len(taken) > threads:
                full.set()
            yield job

    def work(job):
        assert threads == 1 or (read if job else full).wait(60)
        return job, torch.get_num_threads()

    results = side_by_side(work, jobs(), CPU, LEAST)
    assert next(results) == (0, 1) and len(taken) == (1 if threads == 1 else threads + 1)
    read.set()
    assert list(results) == [(job, 1) for job in range(1, 6)]
    assert torch.get_num_threads() == threads
    late = threading.Thread(target=lambda: (taken.append(torch.get_num_threads()), done.release()))
    late.start(), late.join()
    assert taken[-1] == threads  # of a thread that begins later


def test_others_go_on_beside_a_long_job_and_few_are_taken_at_once():
    """The first job ends once the fourth has run; three of the jobs taken are not done, at most."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    taken, done = [], []
    fourth = threading.Event()

    def jobs():
        for job in range(20):
            taken.append(job)
            yield job

    def work(job):
        open_now = len(taken) - len(done)
        if job == 0:
            assert fourth.wait(60)
        if job == 3:
            fourth.set()
        done.append(job)
        return job, open_now

    try:
        results = list(side_by_side(work, jobs(), CPU, LEAST))
    finally:
        torch.set_num_threads(before)
    assert [job for job, _ in results] == list(range(20)) and max(count for _, count in results) <= 3


def test_results_do_not_wait_for_jobs_that_are_slow_to_come():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    received, waiting = [], []

    def jobs():
        for job in range(8):
            waiting.append(job - len(received))
            yield job
            time.sleep(0.05)  # as for the next features to be read

    try:
        for result in side_by_side(lambda job: job, jobs(), CPU, LEAST):
            received.append(result)
    finally:
        torch.set_num_threads(before)
    assert received == list(range(8)) and max(waiting) <= 3


def test_they_run_at_the_same_time():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        both = threading.Barrier(2, timeout=60)
        assert len(list(side_by_side(lambda job: both.wait(), range(2), CPU, MOST))) == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_ends_it_and_the_rest_is_not_begun(threads, error):
    begun = []

    def work(job):
        begun.append(job)
        if job == 1:
            raise error("no")

    with pytest.raises(error, match="no"):
        list(side_by_side(work, range(100), CPU, LEAST))
    assert 1 in begun and len(begun) <= threads + 3 and torch.get_num_threads() == threads


def test_a_long_job_ends_soon_after_the_others(threads):
    steps = []

    def work(job):
        if job == 1:
            raise ValueError("no")
        for _ in range(1000 * job):
            check_wanted()
            steps.append(job)
            time.sleep(0.01)

    with pytest.raises(ValueError, match="no"):
        list(side_by_side(work, range(4), CPU, LEAST))
    assert len(steps) < 1000
    check_wanted()  # where nothing runs side by side


def test_products_are_in_the_dtype_of_the_caller(threads):
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert [product.dtype for product in side_by_side(x.mm, [x, x, x], CPU, LEAST)] == [torch.bfloat16] * 3
    assert [product.dtype for product in side_by_side(x.mm, [x, x, x], CPU, LEAST)] == [torch.float32] * 3


def test_gradients_and_inference_are_those_of_the_caller(threads):
    def modes(_):
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    for block in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with block():
            expected = modes(None)
            assert list(side_by_side(modes, range(3), CPU, LEAST)) == [expected] * 3


def test_no_more_than_a_limit_run_at_once(threads):
    running, most = [], []

    def work(job):
        running.append(job)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(job)

    list(side_by_side(work, range(8), CPU, LEAST, at_most=2))
    assert max(most) <= min(threads, 2) == at_once(CPU, LEAST, 2) and torch.get_num_threads() == threads


def test_a_thread_works_for_the_one_that_called(threads):
    here = threading.get_ident()
    nested = side_by_side(lambda _: list(side_by_side(lambda _: caller(), [0], CPU, LEAST)), range(2), CPU, LEAST)
    assert list(nested) == [[here]] * 2 and caller() == here


def test_a_fit_ends_where_nobody_waits_for_it(monkeypatch):
    rows, labels = np.random.default_rng(0).normal(size=(1, 60, 4)), np.arange(60) % 3
    fit_logistic(rows, labels, [1.0])
    ended = threading.Event()
    monkeypatch.setattr(module._of_thread, "ended", ended, raising=False)
    fit_logistic(rows, labels, [1.0])
    ended.set()
    with pytest.raises(CancelledError):
        fit_logistic(rows, labels, [1.0])


def test_what_is_small_or_large_or_not_on_a_cpu_is_in_turn(threads):
    assert is_middling(CPU, LEAST) and is_middling(CPU, MOST) and not is_middling(torch.device("cuda"), LEAST)
    for numbers in (LEAST - 1, MOST + 1):
        assert not is_middling(CPU, numbers)
        assert list(side_by_side(lambda job: torch.get_num_threads(), range(2), CPU, numbers)) == [threads] * 2
