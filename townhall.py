#!/usr/bin/env python3
"""Townhall as a drop-in script: runs from a checkout, also through a symlink.

Only the packages redis, argon2-cffi and tomli-w must be installed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tinytown.townhall.main import main

if __name__ == '__main__':
    sys.exit(main())
