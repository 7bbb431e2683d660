"""`python -m serving` is the `tokenloft` command."""

import sys

from serving.cli import main

if __name__ == "__main__":
    sys.exit(main())
