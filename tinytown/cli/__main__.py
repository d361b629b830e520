"""Makes `python -m tinytown.cli` the `tt` command."""

import sys

from .main import main

sys.exit(main())
