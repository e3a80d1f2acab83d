"""Hyperparameters: the scripts behind `docs/tuning.md`."""
