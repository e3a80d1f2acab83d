"""How far the posterior can be trusted: the scripts behind `docs/uncertainty.md`."""
