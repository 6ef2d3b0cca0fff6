"""`python -m normlab`."""

from normlab.cli import entry

if __name__ == "__main__":
    entry()
