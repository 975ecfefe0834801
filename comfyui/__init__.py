"""ComfyUI nodes of ditattn: sparse attention for a MODEL, and what it did. The work is in ditattn.hosts.comfyui."""

from ditattn.hosts import comfyui as host


class DitattnAttention:
    """Sparse attention for the model that goes out; the one that comes in stays as it is."""

    CATEGORY = "model_patches/ditattn"
    RETURN_TYPES = ("MODEL", "DITATTN")
    RETURN_NAMES = ("model", "ditattn")
    FUNCTION = "attach"
    DESCRIPTION = "The model's self-attention computes a part of its blocks. Pictures change a little; the ditattn report says what ran."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "backend": (host.backend_choices(), {"tooltip": "The method; the first one is recommended."}),
                "preset": (host.preset_choices(), {"tooltip": "What sparsity and dense_steps are where they are not given."}),
                "sparsity": (
                    "FLOAT",
                    {"default": -1.0, "min": -1.0, "max": 0.99, "step": 0.01, "tooltip": "Share of blocks to drop; -1 takes the preset's."},
                ),
                "dense_steps": (
                    "STRING",
                    {
                        "default": "preset",
                        "tooltip": "First steps of this sampler that stay dense: preset, auto, a number, or a share such as 20%.",
                    },
                ),
            }
        }

    def attach(self, model, backend, preset, sparsity, dense_steps):
        return host.attach(model, backend, host.keys_of(preset, sparsity, dense_steps))


class DitattnReport:
    """What the attention did while the latent was sampled. The latent only says when: this node runs after the sampler."""

    CATEGORY = "model_patches/ditattn"
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("report", "density")
    FUNCTION = "report"
    OUTPUT_NODE = True
    DESCRIPTION = "A row of the picture is a layer, a column a step; dark is dense, light is sparse."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "ditattn": ("DITATTN",),
                "latent": ("LATENT", {"tooltip": "Of the sampler that has the model of the ditattn attention node."}),
            }
        }

    def report(self, ditattn, latent):
        text = ditattn.report().summary()
        return {"ui": {"text": [text]}, "result": (text, host.density_picture(ditattn))}


NODE_CLASS_MAPPINGS = {"DitattnAttention": DitattnAttention, "DitattnReport": DitattnReport}
NODE_DISPLAY_NAME_MAPPINGS = {"DitattnAttention": "ditattn attention", "DitattnReport": "ditattn report"}
