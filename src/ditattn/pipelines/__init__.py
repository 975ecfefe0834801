"""From a running pipeline to attention calls: what step it is, what the tokens are, and what really ran."""
