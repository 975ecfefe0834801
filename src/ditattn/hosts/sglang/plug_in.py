"""Where sglang chooses an attention backend, our names resolve to ours.

sglang calls `plug_in` once in every process, by the entry point of the group `sglang.multimodal_gen.plugins`, and applies the hooks that it
registers later. It discards a plug-in that raises, with a line in its log: so everything that the hook needs is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ditattn.backends.selector import backend_on
from ditattn.devices import find_device
from ditattn.hosts.sglang import classes
from ditattn.hosts.sglang.config import NAMES, asks_for_ours, global_keys, parse_setting
from ditattn.hosts.sglang.serving import logger

__all__ = ["plug_in"]

_PLATFORMS = "sglang.multimodal_gen.runtime.platforms"
# the platforms whose devices our backends know; what is registered for a platform that is not this machine's does nothing
TARGETS = tuple(
    f"{_PLATFORMS}.{platform}.get_attn_backend_cls_str" for platform in ("cpu.CpuPlatform", "cuda.CudaPlatformBase", "npu.NPUPlatformBase")
)
CLASSES = {name: f"{classes.__name__}.{name}" for name in NAMES}


def plug_in() -> None:
    """Register the hooks; again, it registers nothing."""
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    for target in TARGETS:
        if not any(hook is choose_class for _, hook, _ in HookRegistry._hooks.get(target, ())):
            HookRegistry.register(target, choose_class, HookType.AROUND)


def choose_class(original: Callable[..., str], platform: Any, selected_backend: Any, head_size: int, dtype: Any) -> str:
    """The dotted path of the class that serves `selected_backend`: ours for our names, sglang's answer for every other.

    Args:
        original: sglang's own choice.
        platform: sglang's class of the platform.
        selected_backend: a member of its AttentionBackendEnum, or None.
        head_size, dtype: of the layer.

    Raises:
        UnknownKey, ConfigError: `--attention-backend-config`.
        UnsupportedHeadSize, BackendUnavailable: as `backend_on`.
    """
    name = "" if selected_backend is None else selected_backend.name.lower()
    if name not in NAMES:
        return original(platform, selected_backend, head_size, dtype)
    keys = global_keys()
    if platform.device_type == "npu" and not asks_for_ours(keys):
        try:
            return original(platform, selected_backend, head_size, dtype)
        except ImportError as error:
            logger().info("sglang's own %s cannot be imported here (%s): the one of ditattn serves", name, error)
    setting = parse_setting(name, keys)
    backend_on(find_device(platform.device_type), setting.backend, head_size, dtype)
    return CLASSES[name]
