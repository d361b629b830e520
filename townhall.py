#!/usr/bin/env python3
"""Townhall, as a drop-in script: runs from a checkout, through a symlink too, with only what the core needs installed.

That is the packages redis, argon2-cffi and tomli-w.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tinytown.townhall.main import main

if __name__ == '__main__':
    sys.exit(main())
