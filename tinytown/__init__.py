"""The vocabulary that all rooms share: errors, model, schemas, settings, configuration and the log.

Tinytown runs a town of AI coding agents; Townhall is its control plane.
"""

__version__ = '1.0.0'
