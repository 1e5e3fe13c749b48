"""Build, fine-tune and serve a private large language model on ChatGLM3-6B.

>>> from entrypoints import EngineOptions, load_chat
>>> chat = load_chat("models/chatglm3-6b")  # or, for example, load_chat(folder, EngineOptions(device="cpu"))
>>> response, history = chat.chat("你好", history=[])
"""

from typing import Any

__all__ = ["EngineOptions", "load_chat"]


def __getattr__(name: str) -> Any:
    if name == "load_chat":  # lazy: importing the package does not import torch
        from entrypoints.chat_session import load_chat

        return load_chat
    if name == "EngineOptions":
        from entrypoints.engines.options import EngineOptions

        return EngineOptions
    if name.startswith("get_") or name == "EntryPoint":  # of the package `entrypoints` on PyPI, which this one hides
        raise AttributeError(
            f"the other package 'entrypoints', which has {name!r}, is hidden by glm-entrypoints; "
            "install them in separate environments"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
