"""The model: loads a folder of weights, refuses what it cannot serve, and runs packed steps.

The modules of a known family are fused (see `fused`), others run as transformers has them, with this engine's
attention; no Cache object, no mask. The KV goes to the pool named by the step batch; the runner itself keeps no
state between steps, so any thread may own it, but only one at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from cache.fingerprint import Fingerprint
from serving.engine import attention
from serving.engine.families import UnsupportedModelError, check_model_type
from serving.engine.fused import FusedDecoder, can_fuse
from serving.engine.kv_pool import KV_DTYPES, KVLayout
from serving.engine.linear import TiedHead, make_linear
from serving.engine.step_batch import StepBatch

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
"""Rope types whose angles change with the length of the batch: their KV cannot be reused."""

CONFIG_KEYS_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "transformers_version",
        "dtype",  # the dtype that was loaded is in the fingerprint itself
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
    }
)
"""Fields of a config that KV cannot depend on. Everything else counts, unknown fields too."""


class ModelRunner:
    """A decoder-only model on one device, in evaluation mode."""

    def __init__(self, model_dir: Path, dtype: str = "float32", device: torch.device | str = "cpu") -> None:
        """Load the folder. Raises UnsupportedModelError before any weight is read, OSError for a broken folder."""
        if dtype not in KV_DTYPES:
            raise UnsupportedModelError(f"dtype {dtype!r} is not supported, choose one of {', '.join(KV_DTYPES)}")
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        check_supported(config)
        attention.register()
        with quiet_loading():
            model: Any = AutoModelForCausalLM.from_pretrained(
                model_dir,
                dtype=KV_DTYPES[dtype],
                attn_implementation=attention.ATTENTION_NAME,
                local_files_only=True,
            )
        self.model_dir = model_dir
        self.dtype = dtype
        self.device = torch.device(device)
        model.to(self.device).eval()
        # The model's own config: what it was built with, after transformers filled in its defaults.
        self._config: Any = model.config
        self._decoder = model.get_decoder()
        self._head_dim: int = self._decoder.layers[0].self_attn.head_dim
        self._fused = FusedDecoder(self._decoder, self._config) if can_fuse(self._decoder, self._config) else None
        self._lm_head = _take_head(model)
        self.eos_token_ids: frozenset[int] = _token_ids(model.generation_config.eos_token_id) | _token_ids(
            self._config.eos_token_id
        )

    def __repr__(self) -> str:
        return f"<ModelRunner {self._config.model_type} {self.dtype} on {self.device}>"

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together that the model was made for."""
        return int(self._config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        return int(self._config.vocab_size)

    def layout(self, block_size: int) -> KVLayout:
        """Layout of the KV that the model makes."""
        return KVLayout(
            num_layers=self._config.num_hidden_layers,
            num_kv_heads=self._config.num_key_value_heads,
            head_dim=self._head_dim,
            block_size=block_size,
            dtype=self.dtype,
        )

    def config_digest(self) -> str:
        """Digest of every config field that KV may depend on, rope scaling included."""
        return config_digest(self._config)

    def fingerprint(
        self, weights: str, block_size: int, tenant_salt: str = "", kv_dtype: str | None = None
    ) -> Fingerprint:
        """Fingerprint of the KV that this runner makes, stored as `kv_dtype`, None being the runner's own dtype.

        `weights` is the digest of the weights' content.
        """
        return Fingerprint(
            weights=weights,
            config=self.config_digest(),
            kv_dtype=kv_dtype or self.dtype,
            numerics=self.dtype,
            block_size=block_size,
            tenant_salt=tenant_salt,
        )

    def forward(self, batch: StepBatch) -> torch.Tensor:
        """Compute the batch's tokens into its pool and return the wanted logits, `(num_logits, vocab_size)` float32."""
        with torch.inference_mode():
            hidden = self._hidden_states(batch)
            # The head is as large as several layers, so it only sees the rows whose logits are wanted.
            logits: torch.Tensor = self._lm_head(hidden.index_select(0, batch.logits_indices))
            return logits.float()

    def _hidden_states(self, batch: StepBatch) -> torch.Tensor:
        """Last hidden states `(T, hidden_size)`."""
        if self._fused is not None:
            return self._fused.forward(batch)
        hidden: torch.Tensor = self._decoder(
            input_ids=batch.input_ids.unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            use_cache=False,
            batch=batch,
        ).last_hidden_state
        return hidden[0]


def set_num_threads(num_threads: int) -> None:
    """Threads that torch uses for operations of the calling thread, whatever other threads set for theirs."""
    # OpenMP counts per thread. But a thread that has not asked yet takes, at its first operation, the number that
    # any thread has set last: so it asks now.
    torch.get_num_threads()
    torch.set_num_threads(num_threads)


def check_supported(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError, with the reason, for a model that would be served wrongly."""
    check_model_type(config.model_type)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError("the checkpoint is quantised; only plain weights are supported")
    window = getattr(config, "sliding_window", None)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if window is not None or layer_types - {"full_attention"}:
        kinds = ", ".join(sorted(layer_types)) or "all layers"
        raise UnsupportedModelError(
            f"sliding-window attention is not supported (sliding_window={window}, layers: {kinds})"
        )
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModelError(
            f"rope type {rope['rope_type']!r} changes positions with the length of the batch, so KV can't be reused"
        )


def config_digest(config: PreTrainedConfig) -> str:
    """128-bit hexadecimal digest of the config as canonical JSON, without the fields that have no effect on KV."""
    kept = {name: value for name, value in config.to_dict().items() if name not in CONFIG_KEYS_WITHOUT_EFFECT}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=16, person=b"tokenloft.config").hexdigest()


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of transformers on standard error inside; as before afterwards."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _take_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product with the output head, whose weights stay what the embedding looks up if they are tied."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight and head.bias is None:
        return TiedHead(head.weight.detach())
    with torch.inference_mode():
        taken = make_linear(head.weight.detach(), head.bias)
    model.set_output_embeddings(None)
    return taken


def _token_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
