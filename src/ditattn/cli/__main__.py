"""`python -m ditattn.cli`."""

from ditattn.cli import main

main()
