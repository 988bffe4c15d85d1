"""`python -m hub_repo.engines`."""

import sys

from .comparison import main

if __name__ == "__main__":
    sys.exit(main())
