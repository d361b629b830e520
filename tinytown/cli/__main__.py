"""`python -m tinytown.cli` is `tt`."""

import sys

from .main import main

sys.exit(main())
