"""A pool of processes that join one group, kept for many tests."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

#: Makes of a new process, told its rank, how many there are and a file in which they may find each other, one of the group.
Join = Callable[[int, int, str], None]

_PATIENCE = 120  # seconds, for the slowest call on a busy machine


def torch_group(backend: str, rank: int, size: int, store: str) -> None:
    """Join a process group of torch; where its backend is not gloo alone, each rank has the GPU of its number."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=dist.FileStore(store, size), rank=rank, world_size=size)


GLOO = partial(torch_group, "gloo")


class Ranks:
    """Processes that run a function together, each as one rank; started at the first call, and anew after one that failed.

    Args:
        size: how many.
        folder: for the file in which they find each other.
        join: how each joins the others.
    """

    def __init__(self, size: int, folder: Path, join: Join = GLOO) -> None:
        self.size = size
        self._join = join
        self._folder = folder
        self._starts = 0
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returns on each rank.

        Args:
            function: of a module that the ranks can import.
            *args: its arguments, the same on all ranks.
            **kwargs: likewise.

        Raises:
            RuntimeError: it failed on one rank, or some rank gave no answer. All ranks have ended then.
        """
        if not self._processes:
            self._start()
        # By pickle, and not as the connection would: torch would hand tensors over in memory that both must keep.
        call = pickle.dumps((function, args, kwargs))
        for connection in self._connections:
            connection.send_bytes(call)
        answers: dict[Connection, Any] = {}
        deadline = time.monotonic() + _PATIENCE
        while len(answers) < self.size:
            waiting = [each for each in self._connections if each not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"rank {self._connections.index(waiting[0])} gave no answer in {_PATIENCE} s")
            for connection in ready:
                answers[connection] = self._receive(connection)
        return [answers[connection] for connection in self._connections]

    def _receive(self, connection: Any) -> Any:
        rank = self._connections.index(connection)
        try:
            failure, result = pickle.loads(connection.recv_bytes())
        except EOFError:
            self._fail(f"rank {rank} has ended")
        if failure:
            self._fail(f"rank {rank} failed:\n{failure}")
        return result

    def _fail(self, why: str) -> None:
        self.stop()  # the other ranks may wait for this one for ever
        raise RuntimeError(why)

    def _start(self) -> None:
        self._starts += 1
        spawn = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = spawn.Pipe()
            store = self._folder / f"store-{self.size}-{self._starts}"
            process = spawn.Process(target=_serve, args=(self._join, rank, self.size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def stop(self) -> None:
        """End all processes, without asking: threads of gloo may abort one that ends by itself."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()
        self._processes, self._connections = [], []


def _serve(join: Join, rank: int, size: int, store: str, connection: Any) -> None:
    join(rank, size, store)
    while True:
        try:
            function, args, kwargs = pickle.loads(connection.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            answer = None, function(*args, **kwargs)
        except BaseException:  # an error of torch's checkpoints is no Exception
            answer = traceback.format_exc(), None
        connection.send_bytes(pickle.dumps(answer))
