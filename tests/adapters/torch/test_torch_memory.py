"""Test that a step needs little memory in addition to the parameters, their gradients and the state."""

from __future__ import annotations

import sys

import pytest
from adapters.torch.torch_optimizers import engines, run_script

MEASURE = """
    import sys, torch
    from vsgd.torch import VSGD

    def kib(name):
        with open("/proc/self/status") as status:
            (line,) = (line for line in status if line.startswith(name))
        return int(line.split()[1])

    params = [torch.nn.Parameter(torch.randn(4096, 4096)) for _ in range(3)]
    # A second layout, which no flat view covers: a gradient in another order than its parameter.
    params[2].grad = torch.randn(4096, 4096).t()
    for param in params[:2]:
        param.grad = torch.randn(4096, 4096)
    optimizer = VSGD(params, **eval(sys.argv[1]))
    optimizer.step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before = kib("VmRSS")
    optimizer.step()
    print((kib("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux's /proc")
@engines
def test_a_step_needs_at_most_64_mb(engine: dict[str, bool]) -> None:
    (peak,) = run_script(MEASURE, repr(engine))
    # The parameters take 192 MiB, 5% of which is 10 MiB: the larger bound applies. One temporary of a parameter exceeds it.
    assert int(peak) <= 64e6
