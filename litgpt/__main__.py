"""What `litgpt` and `python -m litgpt` run."""

import sys

try:
    from litgpt.cli import main
except KeyboardInterrupt:  # reading it takes a moment
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
