"""Quality and cost of settings, measured against a dense reference with the same prompts and seeds."""
