"""What users name: one file per method."""
