"""Compares Townhall with servers that do the same work on the same Redis: `make bench`. Start reading at `rows`."""
