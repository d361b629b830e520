"""`python -m tinytown.worker`: the entry point of a worker process. Townhall and tt start it."""

import sys

from .main import main

sys.exit(main())
