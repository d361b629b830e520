#!/usr/bin/env python3
"""Townhall as a drop-in script: runs from a checkout, also through a symlink.

Only the packages redis, argon2-cffi and tomli-w must be installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

try:
    from tinytown.townhall.main import main
except ModuleNotFoundError as e:
    if (e.name or '').startswith('tinytown'):
        raise
    sys.exit(
        f'townhall: this Python has no package {e.name}; run  make setup  in the checkout, and start this with the '
        'python in .venv/bin'
    )

if __name__ == '__main__':
    sys.exit(main())
