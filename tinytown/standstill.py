"""The shutdown of a town under its name of 0.1.0: a spawner of that version that still runs starts it."""

import sys
from pathlib import Path

from .townhall.shutdown import main

if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
