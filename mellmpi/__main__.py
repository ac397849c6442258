"""`python -m mellmpi`."""

import sys

from mellmpi.cli import main

if __name__ == "__main__":
    sys.exit(main())
