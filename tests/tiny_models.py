"""Tiny random models with a real tokenizer, built in about a second, for tests that need tokens and not sense."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
"""Config and model class of each family that can be built."""

VOCAB_SIZE = 300
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CORPUS = (
    "The agent sends its whole history again with every turn, and the store keeps what was computed.",
    "the cat and the hen then sat in the sun; the rain in the night was a thing of the past",
    "def main(args):\n    return [token for token in args if token]\n",
    "naïve café, für Öl, 你好世界, привет, 😀 and 👩‍👩‍👧 again",
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `VOCAB_SIZE` tokens: any text survives it, most emoji take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    endoftext, im_start, im_end = SPECIAL_TOKENS
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token=endoftext,
        bos_token=im_start,
        eos_token=im_end,
        pad_token=im_end,
        chat_template=CHAT_TEMPLATE,
    )
    return wrapped


def build_tiny_model(directory: Path, *, seed: int = 0, family: str = "llama") -> Path:
    """Save a random model of `family` (see `FAMILIES`) and its tokenizer to `directory`, and return that.

    The weights are the same for the same seed, and large enough that wrong KV changes the greedy tokens.
    """
    tokenizer = build_tokenizer()
    model = _random_model(family, seed, len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _random_model(family: str, seed: int, vocab_size: int, eos_token_id: int) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "tie_word_embeddings": False,
    }
    if family == "mistral":
        shape["sliding_window"] = None
    config_class, model_class = FAMILIES[family]
    model: PreTrainedModel = model_class(config_class(**shape))
    _redraw_weights(model, seed)
    return model


def _redraw_weights(model: PreTrainedModel, seed: int, std: float = 0.15) -> None:
    """Draw all matrices and biases anew; norms stay at 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, std, generator=generator)
