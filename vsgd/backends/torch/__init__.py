"""The core on torch: `dispatch` gives each of `leaves` to an engine: `fused_cpu`, `fused_cuda`, `foreach` or `loop`."""
