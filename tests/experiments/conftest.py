"""The experiments are no installed package: they are found beside the tests, after all that is installed."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
