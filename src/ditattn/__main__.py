"""`python -m ditattn`."""

from ditattn.cli import main

main()
