"""Tinytown runs a town of AI coding agents; Townhall is its control plane."""

__version__ = '0.1.0'
