"""The built-in CLI `demo`: reads a prompt and says that it did the work, so that anyone can try a town.

Words in a task steer it: `sleep N` takes N seconds, `fail` ends with exit status 1. It imports nothing of Tinytown.
"""

import re
import sys
import time


def main() -> int:
    prompt = sys.stdin.read()
    found = re.search(r'^## Task\n+(.*?)(?=^## |\Z)', prompt, re.M | re.S)
    task = found.group(1).strip() if found else 'the messages'
    if nap := re.search(r'\bsleep (\d+(?:\.\d+)?)\b', task):
        print(f'demo: sleeping for {nap.group(1)} s', flush=True)
        time.sleep(float(nap.group(1)))
    if re.search(r'\bfail\b', task):
        print('demo: failed, as the task asked', file=sys.stderr)
        return 1
    print(f'demo: done: {task}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
