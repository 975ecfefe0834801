"""A tiny text-to-video model of stock diffusers classes: its world of captioned clips, its training and its evaluation."""
