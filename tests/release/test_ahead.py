"""Work done ahead in threads: order and errors as without threads, and never more work ahead than the bound."""

import threading

import pytest
import torch

from rwkv_peft.release.ahead import ahead


@pytest.fixture(params=[1, 3])
def threads(request):
    """torch's number of threads while a test runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_torch_keeps_its_threads(threads):
    gate = threading.Event()

    def task(number):
        if number == 0 and threads > 1:
            assert gate.wait(10)  # the first is done last
        gate.set()
        return number

    assert list(ahead(lambda number=number: task(number) for number in range(50))) == list(range(50))
    assert torch.get_num_threads() == threads


def test_each_task_has_one_thread_of_torch(threads):
    assert list(ahead([torch.get_num_threads] * 5)) == [1] * 5


def test_little_is_made_ahead(threads):
    begun = 0

    def count():
        nonlocal begun
        for number in range(1, 101):
            begun = number
            yield lambda: None

    for taken, _ in enumerate(ahead(count()), start=1):
        assert begun <= taken + 3 * threads


def test_an_error_is_raised_in_its_turn_and_ends_the_work(threads):
    def failing():
        raise KeyError("no more")

    results = ahead([lambda: 1, failing, lambda: 3])
    assert next(results) == 1
    with pytest.raises(KeyError, match="no more"):
        next(results)
    assert list(results) == [] and torch.get_num_threads() == threads


def test_an_error_of_the_tasks_source_is_raised():
    def tasks():
        yield lambda: 1
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(ahead(tasks()))


def test_leaving_early_stops_the_work(threads):
    begun = []
    results = ahead(lambda number=number: begun.append(number) for number in range(100))
    next(results)
    results.close()
    assert len(begun) <= 2 + 3 * threads
