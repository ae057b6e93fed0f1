"""Model folders: fetched, memory-mapped, cut, built and written."""
