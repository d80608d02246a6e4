"""`python -m peer` is `shoal`."""

from peer.cli import main

if __name__ == "__main__":
    main()
