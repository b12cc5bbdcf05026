"""`python -m esr_train` is `esr-train`."""

import sys

from esr_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
