"""The demo CLI under its path of 0.1.0: a worker of that version that still runs starts it by this file."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).parent / 'clis' / 'demo_cli.py'), run_name='__main__')
