"""The adapter for sglang's diffusion runtime (`sglang.multimodal_gen`), which loads it as a plug-in.

Nothing of sglang is imported with this package: `plug_in` is called by sglang, and our classes for it are made when it asks for one.
"""
