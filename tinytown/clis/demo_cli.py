"""The built-in CLI `demo`: reads a prompt and prints that the work is done, so that anyone can try a town.

Two words in a task have an effect: `sleep N` sleeps N seconds, `fail` makes the exit status 1. The file runs as a
script and imports nothing of Tinytown.
"""

import re
import sys
import time


def main() -> int:
    prompt = sys.stdin.read()
    section = re.search(r'^## Task\n+(.*?)(?=^## |\Z)', prompt, re.M | re.S)
    task = section.group(1).strip() if section else 'the messages'
    if sleep := re.search(r'\bsleep (\d+(?:\.\d+)?)\b', task):
        print(f'demo: sleeping for {sleep.group(1)} s', flush=True)
        time.sleep(float(sleep.group(1)))
    if re.search(r'\bfail\b', task):
        print('demo: failed, as the task asked', file=sys.stderr)
        return 1
    print(f'demo: done: {task}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
