#!/usr/bin/env bash
# Run everything that needs a CUDA GPU: tests, the cross-backend matrix, several devices, and benchmarks. The limits add up to 12 minutes.
#
#   pip install -e '.[dev]' 'jax[cuda13]' && bash tests/gpu/check.sh
#
# Name steps to run only these: bash tests/gpu/check.sh tests matrix scaling torch_benchmarks optax_benchmarks
# Each step has a time limit and a log in $OUT (build/gpu). A failing step does not stop the others; the exit status counts them.
# Nothing is downloaded. $PYTHON chooses the interpreter.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
OUT=${OUT:-$PWD/build/gpu}
PYTHON=${PYTHON:-python3}
PYTEST="$PYTHON -m pytest -q --durations=5"
# Both frameworks share the GPU.
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=3
mkdir -p "$OUT"
failed=0

step() { # step NAME LIMIT COMMAND...
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  [ "$status" -eq 0 ] || failed=$((failed + 1))
  echo "== $name: exit status $status after $((SECONDS - start)) s"
  grep -E '^(FAILED|ERROR|E  )|passed|failed|^\|' "$OUT/$name.log" | cut -c1-220 | tail -40
}

tests() { step tests 150 $PYTEST -m gpu tests/adapters/torch; }
matrix() { step matrix 270 $PYTEST tests/matrix -k "gpu and not tensorflow and not mlx" --agreement "$OUT/agreement.md"; }
scaling() { step scaling 120 $PYTEST -m gpu tests/scaling -k "not tensorflow and not mirrored" --scaling "$OUT/scaling.md"; }
torch_benchmarks() {
  step torch_benchmarks 90 "$PYTHON" -m benchmarks run torch --device cuda --shapes large conv many --parts times --rounds 7 --seconds 1 \
    --output "$OUT/torch-cuda.json"
}
optax_benchmarks() {
  step optax_benchmarks 60 "$PYTHON" -m benchmarks run optax --device cuda --shapes large conv --parts times --rounds 7 --seconds 1 \
    --output "$OUT/optax-cuda.json"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
[ $# -gt 0 ] || set -- tests matrix torch_benchmarks optax_benchmarks scaling
for name in "$@"; do "$name"; done
exit "$failed"
