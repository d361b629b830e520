"""The spawner under its name in 0.1.0, because systemd units from that version still start it."""

import sys
from pathlib import Path

from .host.spawner import main

if __name__ == '__main__':
    sys.exit(main(Path(sys.argv[1])))
