"""The flags by which ms-swift picks a flash-attention version (`--attention_backend flash_2` and so on)."""


class FlashAttentionUtils:
    """No flash-attention package is used; the stand-in's own attention serves every backend."""

    is_installed = False
    v3_is_installed = False
    v4_is_installed = False
