"""`python -m tinytown.townhall` is `townhall`."""

import sys

from .main import main

sys.exit(main())
