"""Runs torch outside the step loop without slowing the loop down: in a thread of its own, which then ends.

GNU OpenMP gives every thread that enters a parallel region a team of its own, which lives as long as that thread. As
soon as a process has more team threads than CPUs, waiting threads no longer spin but sleep, in every region of every
team: on two cores a decode step of a small model took 13.4 ms in place of 8.8. So while it serves, no thread but the
engine's may own a team; what is computed before (load, gate, warm-up) is computed here, and what is computed beside it
is computed without a team.
"""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


def run_in_own_thread(call: Callable[[], Result]) -> Result:
    """What `call` returns or raises, computed in a new thread that has ended by then. Blocking.

    The caller's number of torch threads applies there; its grad and inference modes, which are a thread's own, do not.
    """
    num_threads = torch.get_num_threads()
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            torch.set_num_threads(num_threads)
            results.append(call())
        except BaseException as error:
            errors.append(error)

    # A daemon: whoever interrupts the wait must be able to leave.
    thread = threading.Thread(target=run, name="own-thread", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors.pop()
    return results.pop()


def in_own_thread(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that runs its body by `run_in_own_thread`."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        return run_in_own_thread(lambda: function(*args, **kwargs))

    return call


def enter_without_team() -> None:
    """Makes the calling thread, which is to run nothing but torch, do all of it alone: it never has a team.

    The number of threads that threads yet to come begin with is left as it was.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Torch takes the last number set for everybody's default.
    restoring = threading.Thread(target=torch.set_num_threads, args=(num_threads,), name="own-thread")
    restoring.start()
    restoring.join()
