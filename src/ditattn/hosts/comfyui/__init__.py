"""ComfyUI: a sparse backend of ours for the attention of one MODEL, by the interface that nodes have.

A node gets a clone of the model with an `optimized_attention_override` and two wrappers: one around the sampling, one around each forward
of the diffusion model. Nothing of ComfyUI's is imported or patched, and the model that went in stays as it was. Nodes: `comfyui/`.
Source: ComfyUI 0.3.64 and its files of 2026, comfy/ldm and comfy/model_patcher.py.
"""

from ditattn.hosts.comfyui.handle import Handle
from ditattn.hosts.comfyui.patched_model import attach
from ditattn.hosts.comfyui.picture import density_picture
from ditattn.hosts.comfyui.widgets import backend_choices, keys_of, preset_choices

__all__ = ["Handle", "attach", "backend_choices", "density_picture", "keys_of", "preset_choices"]
