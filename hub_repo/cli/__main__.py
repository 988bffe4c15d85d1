"""`python -m hub_repo.cli`."""

from . import main

if __name__ == "__main__":
    main()
