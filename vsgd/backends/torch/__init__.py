"""The core on torch: leaves, the engines that step them, and the dispatch between these."""
