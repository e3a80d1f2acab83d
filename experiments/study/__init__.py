"""Compare optimizers on tasks that no earlier choice used."""
