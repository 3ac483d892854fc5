"""The process-wide switch of oneDNN: its effect on other threads and after a fork."""

import os
import threading
from collections.abc import Callable

import pytest
import torch
from sdft_kernels import onednn


@pytest.fixture(autouse=True)
def a_cpu_with_bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("this torch has no such switch")
    monkeypatch.setattr(onednn, "has_bf16_products", lambda: True)


def precision() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


def inside(bf16: bool, started: threading.Event, end: threading.Event) -> Callable[[], None]:
    def run() -> None:
        with onednn.products(bf16):
            started.set()
            end.wait(10)

    return run


@pytest.mark.parametrize("first", [True, False])
def test_a_call_of_the_other_kind_waits(first: bool) -> None:
    """An fp32 call in another thread was up to 2.9% off during a bf16 call."""
    started, end, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with onednn.products(not first):
            seen.append((end.is_set(), precision()))

    threads = [threading.Thread(target=inside(first, started, end)), threading.Thread(target=other)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    threads[1].join(0.1)
    assert not seen, "the other call did not wait"
    assert precision() == ("bf16" if first else "none")
    end.set()
    for thread in threads:
        thread.join(10)
    assert seen == [(True, "none" if first else "bf16")]
    assert precision() == "none"


@pytest.mark.parametrize("bf16", [True, False])
def test_calls_of_one_kind_run_at_once(bf16: bool) -> None:
    end = threading.Event()
    started = [threading.Event() for _ in range(3)]
    threads = [threading.Thread(target=inside(bf16, s, end)) for s in started]
    for thread in threads:
        thread.start()
    assert all(s.wait(10) for s in started)
    assert precision() == ("bf16" if bf16 else "none")
    end.set()
    for thread in threads:
        thread.join(10)
    assert precision() == "none"


def test_an_error_turns_it_back() -> None:
    with pytest.raises(ZeroDivisionError), onednn.products(True):
        1 / 0  # noqa: B018
    assert precision() == "none"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_during_a_call_is_not_left_with_the_switch() -> None:
    """It kept the switch for good, and its own calls would have waited for a thread that it does not have."""
    started, end = threading.Event(), threading.Event()
    thread = threading.Thread(target=inside(True, started, end))
    thread.start()
    assert started.wait(10)
    pid = os.fork()
    if pid == 0:
        good = precision() == "none"
        with onednn.products(False):
            good &= precision() == "none"
        os._exit(0 if good else 1)
    status = os.waitpid(pid, 0)[1]
    assert precision() == "bf16", "the parent's call still runs"
    end.set()
    thread.join(10)
    assert os.waitstatus_to_exitcode(status) == 0
    assert precision() == "none"
