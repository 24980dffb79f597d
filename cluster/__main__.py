"""``python -m cluster ...``: the command ``engram`` in a checkout, where nothing has to be installed."""

import sys

from cluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
