"""What to attend: backends, block plans, token orders, block selection."""
