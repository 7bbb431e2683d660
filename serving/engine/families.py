"""Which model families the engine serves. Imports nothing heavy, so a command can refuse a model at once."""

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose attention is plain softmax attention with rotary positions: nothing that `paged_attention`
would leave out (sinks, soft caps, biases). SmolLM and SmolLM2 are `llama`."""

FUSED_MODULES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Families whose layers `FusedDecoder` can take over, by the prefix of their classes. They differ in what may be
there (biases, norms of the heads), not in how it is put together."""


class UnsupportedModelError(Exception):
    """This engine cannot serve the model; the message says why."""


def check_model_type(model_type: str) -> None:
    """Raise UnsupportedModelError for a family that would be served wrongly."""
    if model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise UnsupportedModelError(f"model type {model_type!r} is not supported, only {supported} are")
