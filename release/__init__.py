"""Check a release: `python -m release.tag v0.1.0` checks its tag, `python -m release.trials dist` its wheel and sdist."""
