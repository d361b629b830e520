"""The worker of one agent, as townhall and tt start it: `python -m tinytown.worker`."""

import sys

from .main import main

sys.exit(main())
