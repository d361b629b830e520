"""Makes `python -m tinytown.townhall` the `townhall` command."""

import sys

from .main import main

sys.exit(main())
