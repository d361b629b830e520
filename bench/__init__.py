"""Measures Townhall side by side with servers that do the same work on the same Redis: `make bench`."""
