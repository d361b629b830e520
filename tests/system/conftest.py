"""What the tests that install something have in common."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

# Node has certificates of its own and does not look at the machine's, by which alone a mirror may be known.
_OF_THE_MACHINE = (ssl.get_default_verify_paths().cafile, '/etc/ssl/certs/ca-certificates.crt')
for _file in _OF_THE_MACHINE:
    if _file and Path(_file).exists():
        os.environ.setdefault('NODE_EXTRA_CA_CERTS', _file)
