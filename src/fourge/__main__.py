"""`python -m fourge`."""

from fourge.cli import main

main()
