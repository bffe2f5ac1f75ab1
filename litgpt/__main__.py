"""What `litgpt` and `python -m litgpt` run."""

import sys

from litgpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
