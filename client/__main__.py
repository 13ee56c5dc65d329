"""`python -m granatum.client`, and the command `granatum`."""

from granatum.client.cli import main

if __name__ == "__main__":
    main()
