"""The demo CLI at its path in 0.1.0, because workers of that version may still run and start this file."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / 'clis' / 'demo_cli.py'), run_name='__main__')
