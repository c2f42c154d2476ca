"""`python -m megakd.cli`."""

import sys

from megakd.cli import main

if __name__ == "__main__":
    sys.exit(main())
