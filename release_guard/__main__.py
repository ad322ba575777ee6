"""`python -m release_guard`."""

import sys

from release_guard.cli import start

if __name__ == "__main__":  # a worker process imports this file again
    sys.exit(start())
