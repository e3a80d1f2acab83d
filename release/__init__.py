"""What a release must pass: `python -m release.tag v0.1.0`, and `python -m release.trials dist` on what was built."""
