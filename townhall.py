#!/usr/bin/env python3
"""Townhall, as a drop-in script: works from a checkout and through a symlink, with nothing installed but `redis`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from tinytown.townhall.main import main

if __name__ == '__main__':
    sys.exit(main())
