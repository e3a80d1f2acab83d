"""Save a model in training, or continue those that others saved: `python keras_checkpoint.py save|continue FOLDER`.

Each call is a process of its own, with its own KERAS_BACKEND, and writes weights and optimizer variables to `.npz` files:
`SAVER` when it saved `SAVER.keras`, `SAVER-goes-on` after training on, and `SAVER-read-by-READER` and `SAVER-on-READER`
likewise in a process that loaded the file. `SAVER-bfloat16` is the same with state in bfloat16.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
from adapters.keras.keras_problems import BACKEND, fit, linear_model, make, to_numpy

EPOCHS = 5  # 20 steps


def write(path: Path, model: Any) -> None:
    arrays = [to_numpy(each) for each in [*model.weights, *model.optimizer.variables]]
    # A file of NumPy's holds no bfloat16.
    np.savez(path, **{str(i): each.astype(np.float32) if each.dtype == "bfloat16" else each for i, each in enumerate(arrays)})


def main(command: str, folder: Path) -> None:
    if command == "save":
        for name, dtype in ((BACKEND, "float32"), (f"{BACKEND}-bfloat16", "bfloat16")):
            # Keras saves what "auto" chose, and torch compiles no model of an older Keras.
            model = linear_model(make("VSGD", lr=0.05, weight_decay=0.01, state_dtype=dtype), jit_compile=False)
            fit(model, EPOCHS)
            model.save(folder / f"{name}.keras")
            write(folder / f"{name}.npz", model)
            fit(model, EPOCHS)
            write(folder / f"{name}-goes-on.npz", model)
        return
    for path in sorted(folder.glob("*.keras")):
        model = keras.saving.load_model(path)
        write(folder / f"{path.stem}-read-by-{BACKEND}.npz", model)
        fit(model, EPOCHS)
        write(folder / f"{path.stem}-on-{BACKEND}.npz", model)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
