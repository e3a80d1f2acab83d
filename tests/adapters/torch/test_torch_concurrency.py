"""Threads and forks: what users do around an optimizer, with the kernel that has threads of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from typing import Any

import pytest
from drivers.processes import TESTS

torch = pytest.importorskip("torch")

from adapters.torch.torch_optimizers import ENGINES  # noqa: E402
from torch import nn  # noqa: E402
from torch.testing import assert_close  # noqa: E402

from vsgd.torch import VSGD  # noqa: E402

SIZE = 300_000  # enough that the kernel uses its threads


def stepped(engine: dict[str, Any], seed: int, steps: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    param = nn.Parameter(torch.randn(SIZE, generator=generator))
    optimizer = VSGD([param], **engine)
    for _ in range(steps):
        param.grad = torch.randn(SIZE, generator=generator)
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_optimizers_step_in_several_threads_at_once(engine: dict[str, Any]) -> None:
    results: dict[int, torch.Tensor] = {}
    threads = [threading.Thread(target=lambda seed=seed: results.update({seed: stepped(engine, seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        assert_close(results[seed], stepped(engine, seed), rtol=0, atol=0)


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_concurrent_steps_survive_each_threading_layer_of_numba(layer: str) -> None:
    pytest.importorskip("numba")
    # In a process of its own: the layer is chosen once, and workqueue ends the process where calls overlap.
    script = """
        import sys, threading, numba
        numba.config.THREADING_LAYER = sys.argv[1]
        sys.path.insert(0, sys.argv[2])
        from adapters.torch.test_torch_concurrency import stepped
        threads = [threading.Thread(target=stepped, args=({"fused": True}, seed, 50)) for seed in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        print(numba.threading_layer())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), layer, str(TESTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()) == (0, [layer]), done.stderr


def test_threads_may_share_parameters() -> None:
    # As in Hogwild: steps of one may overwrite those of the other, but every element moves, down, and nothing breaks.
    pytest.importorskip("numba")
    param = nn.Parameter(torch.zeros(SIZE))
    grad = torch.ones(SIZE)

    def work() -> None:
        mine = nn.Parameter(param.detach())  # the same memory
        optimizer = VSGD([mine], lr=0.1, fused=True)
        mine.grad = grad
        for _ in range(20):
            optimizer.step()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert param.isfinite().all()
    assert (param < 0).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_data_loader_workers_fork_between_steps() -> None:
    pytest.importorskip("numba")
    # In a process of its own, which other tests have given no threads.
    script = """
        import torch
        from vsgd.torch import VSGD

        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 8

            def __getitem__(self, index):
                return torch.full((300_000,), float(index))

        def train(workers):
            param = torch.nn.Parameter(torch.zeros(300_000))
            optimizer = VSGD([param], fused=True)
            for _ in range(2):  # workers fork anew for each epoch, the second time after the kernel has run
                how = {"multiprocessing_context": "fork"} if workers else {}
                for batch in torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=workers, **how):
                    param.grad = batch.mean(0)
                    optimizer.step()
            return param, optimizer.state[param]["step"].item()

        (with_workers, steps), (without, _) = train(2), train(0)
        print(steps, torch.equal(with_workers, without))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["8.0", "True"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")
def test_a_forked_child_steps_by_itself() -> None:
    pytest.importorskip("numba")
    # In a process of its own: the child of a fork inherits threads and locks. The child calls nothing else of torch that is
    # parallel, for torch's own threads do not survive a fork either.
    script = """
        import hashlib, os, torch
        from vsgd.torch import VSGD

        def step_and_hash():
            optimizer.step()
            return hashlib.sha256(param.detach().numpy()).digest()

        torch.set_num_threads(2)
        param = torch.nn.Parameter(torch.zeros(300_000))
        param.grad = torch.linspace(-1, 1, 300_000)
        optimizer = VSGD([param], fused=True)
        optimizer.step()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, step_and_hash())
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, os.read(read, 32) == step_and_hash())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["0", "True"]
