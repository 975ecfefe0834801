"""The adapter for diffusers: the only place that imports it.

No class is patched and nothing happens at import: `install` serves one pipeline and undoes itself, `register` makes our names selectable
through diffusers' own `set_attention_backend`.
"""
