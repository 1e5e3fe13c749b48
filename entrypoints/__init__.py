"""Build, tune and run a private large model on ChatGLM3-6B.

>>> from entrypoints import load_chat
>>> chat = load_chat("models/chatglm3-6b")
>>> response, history = chat.chat("你好", history=[])
"""

__all__ = ["load_chat"]


def __getattr__(name: str) -> object:
    if name == "load_chat":  # lazy: torch is imported when it is used, not when the package is
        from entrypoints.conversation import load_chat

        return load_chat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
