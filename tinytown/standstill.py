"""The shutdown of a town under its name in 0.1.0, because a spawner of that version may still run and start it."""

import sys
from pathlib import Path

from .townhall.shutdown import main

if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
