"""Sessions in one SQLite file, which one process at a time has open."""
