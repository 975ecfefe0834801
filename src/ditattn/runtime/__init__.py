"""From a running pipeline to attention calls: which step it is, what the tokens are, and what really ran."""
