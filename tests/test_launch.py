"""Processes that raise, die and hang; ranks that disagree about the program."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run

from tpcompile.errors import RuntimeMismatchError, SpecError, TpcompileError, Where
from tpcompile.launch import check_same_program

pytestmark = pytest.mark.distributed


def wait_for_the_others() -> None:
    dist.all_reduce(torch.ones(1))


def raising() -> None:
    if dist.get_rank() == 1:
        raise ZeroDivisionError("boom")
    wait_for_the_others()


def refusing() -> None:
    if dist.get_rank() == 1:
        raise SpecError("no such word", where=Where(file="a.tpspec", line=3), why="because", help="write another")
    wait_for_the_others()


def dying() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    wait_for_the_others()


def hanging() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    wait_for_the_others()


def interrupted() -> str:
    os.kill(os.getpid(), signal.SIGINT)  # as a terminal does to all processes at Ctrl-C
    return "still here"


def disagreeing() -> list[str]:
    """What each kind of disagreement says; the first is none."""
    rank, found = dist.get_rank(), list[str]()
    for digest, text in (("one", "one"), (f"two{rank == 1}", f"first\nsecond {rank == 1}"), (f"three{rank}", "short")):
        try:
            check_same_program(digest, None, text)
            found.append("agreed")
        except RuntimeMismatchError as error:
            found.append(f"{error.what}; {error.why}")
    return found


def failing(function: Callable[..., Any], timeout: float = 120.0) -> TpcompileError:
    with pytest.raises(TpcompileError) as caught:
        run(function, 2, timeout=timeout)
    assert multiprocessing.active_children() == []
    return caught.value


def test_the_rank_that_raised_is_named_not_the_one_that_waited() -> None:
    error = failing(raising)
    assert error.what == "rank 1 of 2 failed"
    assert error.why == "ZeroDivisionError: boom"
    assert "in raising" in error.__notes__[0]


def test_an_error_for_users_comes_back_as_it_is() -> None:
    error = failing(refusing)
    assert type(error) is SpecError
    assert (error.what, error.why, error.help) == ("no such word", "because", "write another")
    assert error.where == Where(file="a.tpspec", line=3)


def test_a_rank_that_dies_is_named() -> None:
    error = failing(dying)
    assert error.what == "rank 1 of 2 failed"
    assert error.why == "the process exited with status 7 without raising an error"


def test_ctrl_c_is_the_parents() -> None:
    assert run(interrupted, 2) == ["still here"] * 2


def test_a_rank_that_hangs_is_named_with_its_place() -> None:
    start = time.monotonic()
    error = failing(hanging, timeout=30.0)
    assert time.monotonic() - start < 60
    assert error.what == "2 of 2 ranks did not finish within 30 s"
    assert error.why is not None
    first, second = error.why.split("; ")
    assert first.startswith("rank 1 is at ")
    assert first.endswith("in hanging")
    assert second.startswith("rank 0 waits for the others at ")


def test_ranks_that_would_run_other_programs_are_told_so() -> None:
    answers = run(disagreeing, 3)
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == [
        "agreed",
        "rank 1 would run another program than ranks 0, 2; "
        "line 2 of the program: ranks 0, 2 have 'second False', rank 1 has 'second True'",
        "rank 1, rank 2 would run another program than rank 0; "
        "the short texts of rank 0 and rank 1 agree, the programs do not; "
        "the short texts of rank 0 and rank 2 agree, the programs do not",
    ]
