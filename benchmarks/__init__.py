"""Measurements, one file per question. Each prints what it found and the machine it found it on."""
