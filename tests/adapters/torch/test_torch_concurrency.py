"""Test threads and forks around an optimizer whose kernel has its own threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from adapters.torch.torch_optimizers import engines, run_script, train
from torch import nn
from torch.testing import assert_close

from vsgd.torch import VSGD

SIZE = 300_000  # large enough for the kernel to use its threads
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform does not fork")


def run_at_once(work: Callable[[int], Any], number: int) -> None:
    threads = [Thread(target=work, args=(seed,)) for seed in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def stepped(engine: dict[str, Any], seed: int, steps: int = 5) -> torch.Tensor:
    param = nn.Parameter(torch.ones(SIZE))
    train(VSGD([param], **engine), [param], range(steps * seed, steps * (seed + 1)))
    return param.detach()


@engines
def test_optimizers_step_in_several_threads_at_once(engine: dict[str, Any]) -> None:
    results: dict[int, torch.Tensor] = {}
    run_at_once(lambda seed: results.update({seed: stepped(engine, seed)}), 4)
    for seed in range(4):
        assert_close(results[seed], stepped(engine, seed), rtol=0, atol=0)


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_concurrent_steps_survive_each_threading_layer_of_numba(layer: str) -> None:
    pytest.importorskip("numba")
    # Use a new process: numba chooses the layer once, and workqueue ends the process when calls overlap.
    script = """
        import sys, numba
        numba.config.THREADING_LAYER = sys.argv[1]
        from adapters.torch.test_torch_concurrency import run_at_once, stepped
        run_at_once(lambda seed: stepped({"fused": True}, seed, 50), 4)
        print(numba.threading_layer())
    """
    assert run_script(script, layer, OMP_NUM_THREADS="2") == [layer]  # with one thread numba starts no layer


@forks
def test_a_forked_child_steps_by_itself() -> None:
    pytest.importorskip("numba")
    # Use a new process, because the child of a fork inherits threads and locks. The child calls no other parallel torch
    # function, because torch's own threads do not survive a fork either.
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
    assert run_script(script) == ["0", "True"]
