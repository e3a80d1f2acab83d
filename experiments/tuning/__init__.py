"""Hyperparameters: the scripts behind `docs/calibration.md` and `docs/appendix.md`."""
