"""The attention backends that users name: one file per method."""
