"""The spawner under its name of 0.1.0: units that version wrote still start it."""

import sys
from pathlib import Path

from .host.spawner import main

if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
