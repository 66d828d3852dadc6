"""`python -m samray`: the command line where the `samray` script is not on the path."""

import sys

from samray.cli import main

if __name__ == "__main__":
    sys.exit(main())
