"""The model: loads a folder of weights, refuses what it cannot serve, and runs packed steps.

The modules of a known family are fused (see `fused`), others run as transformers has them, with this engine's
attention; no Cache object, no mask. The KV goes to the pool named by the step batch; the runner itself keeps no
state between steps, so any thread may own it, but only one at a time.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from cache.fingerprint import Fingerprint
from serving.engine import attention, kernels
from serving.engine.families import UnsupportedModelError, check_model_type
from serving.engine.flash import Mode, choose_mode
from serving.engine.fused import FusedDecoder, can_fuse
from serving.engine.kv_pool import KV_DTYPES, KVLayout, KVPool
from serving.engine.linear import (
    INT4_GROUP,
    Linear,
    PackedLinear,
    TiedHead,
    Weights,
    can_pack,
    make_linear,
)
from serving.engine.step_batch import SequencePart, StepBatch, build_step_batch

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

    def __init__(
        self,
        model_dir: Path,
        dtype: str = "float32",
        device: torch.device | str = "cpu",
        weights: Weights = "float32",
    ) -> None:
        """Load the folder; the weights of the products are then kept as `weights`, KV is in `dtype` all the same.

        Raises UnsupportedModelError, before any weight is read but for modules that are not as their family's are.
        OSError for a broken folder.
        """
        if dtype not in KV_DTYPES:
            raise UnsupportedModelError(f"dtype {dtype!r} is not supported, choose one of {', '.join(KV_DTYPES)}")
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        check_supported(config)
        check_weights(weights, dtype, torch.device(device), config)
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
        self.numerics = numerics_of(dtype, weights)
        """How KV is computed, for fingerprints."""
        self.device = torch.device(device)
        model.to(self.device).eval()
        # The model's own config: what it was built with, after transformers filled in its defaults.
        self._config: Any = model.config
        self._decoder = model.get_decoder()
        self._head_dim: int = self._decoder.layers[0].self_attn.head_dim
        smaller: Weights = "float32" if self.numerics == dtype else weights
        self._fused = self._fuse(smaller)
        # Four bits are too few for the head: alone it changes five times as many greedy tokens as all else in bf16.
        self._lm_head = self._take_head(model, "bf16" if smaller == "int4" else smaller)
        if smaller != "float32":
            self._decoder.embed_tokens.bfloat16()
        self._num_embedding_bytes = _num_embedding_bytes(self._decoder)
        self.eos_token_ids: frozenset[int] = _token_ids(model.generation_config.eos_token_id) | _token_ids(
            self._config.eos_token_id
        )
        self._warm_up()

    def __repr__(self) -> str:
        return f"<ModelRunner {self._config.model_type} {self.numerics} on {self.device}>"

    def _fuse(self, weights: Weights) -> FusedDecoder | None:
        if can_fuse(self._decoder, self._config):
            return FusedDecoder(self._decoder, self._config, weights)
        if weights != "float32":
            kind = f"{self._config.model_type} with {self._config.hidden_act}"
            raise UnsupportedModelError(f"this {kind} runs on stock modules, whose weights can't be {weights}")
        return None

    def _take_head(self, model: Any, weights: Weights) -> TiedHead | Linear:
        """The product with the output head, which may be the embedding too."""
        head = model.get_output_embeddings()
        is_tied = head.weight is model.get_input_embeddings().weight and head.bias is None
        with torch.inference_mode():
            if not is_tied or weights != "float32":
                taken = make_linear(head.weight.detach(), head.bias, weights)
            elif (
                self._fused is not None
                and can_pack(head.weight)
                and (packed := PackedLinear(head.weight)).panels is not None
            ):
                self._fused.embed = packed.take_rows
                self._decoder.embed_tokens = None
                taken = packed
            else:
                return TiedHead(head.weight.detach())
        model.set_output_embeddings(None)
        return taken

    def _warm_up(self) -> None:
        """Have what compiles at its first call do so now: one token, several, and a chunk."""
        pool = KVPool(self.layout(block_size=2), 1, self.device)
        max_loop_rows = self._fused.max_loop_rows if self._fused is not None else 0
        for num_parts, num_tokens in ((1, 1), (max(max_loop_rows, 1) + 1, 1), (1, 2)):
            self.forward(build_step_batch(pool, [SequencePart([0] * num_tokens, 0, [0])] * num_parts))

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together that the model was made for."""
        return int(self._config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        return int(self._config.vocab_size)

    @property
    def num_weight_bytes(self) -> int:
        """Memory that embedding, layers and output head take; the few norms are left out. Needs a fused family."""
        assert self._fused is not None
        return self._num_embedding_bytes + self._fused.num_bytes + self._lm_head.num_bytes

    def layout(self, block_size: int) -> KVLayout:
        """Layout of the KV that the model makes."""
        return KVLayout(
            num_layers=self._config.num_hidden_layers,
            num_kv_heads=self._config.num_key_value_heads,
            head_dim=self._head_dim,
            block_size=block_size,
            dtype=self.dtype,
        )

    def flash_mode(self, block_size: int) -> Mode | None:
        """How FlashAttention attends for this model here, if it does."""
        kv_shape = (block_size, self._config.num_key_value_heads, self._head_dim)
        return choose_mode(kv_shape, self._config.num_attention_heads, KV_DTYPES[self.dtype], self.device)

    def config_digest(self) -> str:
        """Digest of every config field that KV may depend on, rope scaling included."""
        return config_digest(self._config)

    def fingerprint(
        self,
        weights: str,
        block_size: int,
        tenant_salt: str = "",
        kv_dtype: str | None = None,
        numerics: str | None = None,
    ) -> Fingerprint:
        """Fingerprint of the KV that this runner makes, stored as `kv_dtype`, None being the runner's own dtype.

        `weights` is the digest of the weights' content. With other `numerics`: of KV that it can read but not make.
        """
        return Fingerprint(
            weights=weights,
            config=self.config_digest(),
            kv_dtype=kv_dtype or self.dtype,
            numerics=numerics or self.numerics,
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
    kernels.set_num_threads(num_threads)
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


def check_weights(weights: str, dtype: str, device: torch.device, config: PreTrainedConfig) -> None:
    """Raise UnsupportedModelError, with the reason, if this model's weights can't be kept as `weights`."""
    if weights not in get_args(Weights):
        choices = ", ".join(get_args(Weights))
        raise UnsupportedModelError(f"weights {weights!r} are not supported, choose one of {choices}")
    if numerics_of(dtype, weights) == dtype:
        return
    if device.type != "cpu" or dtype != "float32":
        hint = "model.dtype: bfloat16 keeps them in bf16 there" if device.type != "cpu" else "use model.dtype: float32"
        raise UnsupportedModelError(f"{weights} weights need a CPU and float32, not {dtype} on {device}; {hint}")
    if weights == "int4":
        _check_int4(config)


def _check_int4(config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "hidden size": config.hidden_size,
        "intermediate size": config.intermediate_size,
        "heads": config.num_attention_heads * head_dim,
    }
    for name, size in sizes.items():
        if size % INT4_GROUP:
            raise UnsupportedModelError(
                f"int4 weights are in groups of {INT4_GROUP}, and this model's {name} ({size}) are no multiple of that"
            )


def numerics_of(dtype: str, weights: str) -> str:
    """How KV is computed in `dtype` with weights kept as `weights`; `dtype` itself if they are as they were loaded."""
    if weights == "float32" or (weights == "bf16" and dtype == "bfloat16"):
        return dtype
    return f"{dtype}, weights {weights}" + (f" in groups of {INT4_GROUP}" if weights == "int4" else "")


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


def _num_embedding_bytes(decoder: Any) -> int:
    if decoder.embed_tokens is None:  # its rows are the head's
        return 0
    table: torch.Tensor = decoder.embed_tokens.weight
    return table.numel() * table.element_size()


def _token_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
