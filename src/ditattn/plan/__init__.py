"""What to attend: block plans, token orders, and which plans may serve again."""
