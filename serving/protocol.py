"""What travels between gateway, decode and prefill: plain frozen values, no behaviour to speak of."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cache.extent import NOBODY, Origin
from cache.fingerprint import Fingerprint
from cache.hashing import BlockHash, TokenIds
from router.policy import Decision

Logits = npt.NDArray[np.float32]
"""Of one position, `(vocab_size,)`."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen and when to stop."""

    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Draws are a function of (seed, position), never of the batch. The gateway draws one if the client gave none."""
    stop: tuple[str, ...] = ()
    top_k: int = 0
    """Only the most likely tokens may be drawn; 0: all."""
    min_p: float = 0.0
    """Only tokens at least this likely, against the most likely one, may be drawn."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of every token that the answer has already."""
    frequency_penalty: float = 0.0
    """Subtracted once for each time that the answer has the token."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token of prompt and answer."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these token ids."""
    min_tokens: int = 0
    """Before so many tokens the answer does not end by itself."""
    ignore_eos: bool = False
    """Go on to `max_tokens`; the end-of-sequence token is a token like others."""
    stop_token_ids: tuple[int, ...] = ()
    """More tokens that end the answer; they are not part of its text."""
    num_logprobs: int | None = None
    """Log-probabilities of each token and of this many most likely ones beside it; None: none at all."""
    grammar: str | None = None
    """The answer follows this grammar, in llguidance's Lark dialect, and ends where the grammar ends."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was, before temperature and filters but after grammar, penalties and bias."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens at its place, `(token_id, logprob)`, best first."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers to a prompt. Choice i draws with `sampling.seed + i`."""

    index: int = 0
    generated: tuple[int, ...] = ()
    """Tokens that a replica had sent before it failed: the answer goes on behind them."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One completion to compute."""

    request_id: str
    token_ids: TokenIds
    """The prompt, `(num_tokens,)`."""
    fingerprint: Fingerprint
    """What the hashes are rooted in. A replica with another model refuses the request."""
    block_hashes: tuple[BlockHash, ...]
    """Hashes of the prompt's full blocks, `num_tokens // block_size` of them."""
    sampling: SamplingParams
    decision: Decision
    use_cache: bool = True
    """False: nothing stored is looked up and nothing is kept; the handoff still works."""
    choices: tuple[Choice, ...] = (Choice(),)
    """Answers wanted to the one prompt, which is computed once."""
    origin: Origin = NOBODY
    """Whose KV it becomes, for purges."""

    @property
    def target(self) -> str | None:
        """Replica that the router chose, None for any."""
        return self.decision.decode_replica


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """How an engine meant to get the KV of a prompt's stored part, as it stood when the store had answered.

    What really happened is in the usage: a load that turns out slow is helped by computing, and where both ends
    are at work they meet where they meet.
    """

    kind: Literal["load", "compute", "both"]
    load_tokens: int
    compute_tokens: int
    estimated_s: float
    """Until all of it has KV."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer cost and where its prompt's KV came from. The four tiers and `computed` add up to the prompt."""

    prompt_tokens: int
    completion_tokens: int
    device_tokens: int = 0
    """Found in the engine's own pool."""
    dram_tokens: int = 0
    disk_tokens: int = 0
    remote_tokens: int = 0
    """Loaded from another node's store."""
    prefill_tokens: int = 0
    """Computed for this request by a prefill replica and handed off."""
    decode_computed_tokens: int = 0
    """Prompt tokens computed by the decode replica itself."""
    load_s: float = 0.0
    """Time spent loading stored blocks."""
    ttft_s: float = 0.0
    """From arrival at the engine to the first token."""
    saved_s: float = 0.0
    """Estimate: computing what was reused, less loading it."""
    reason: str = ""
    """Why the router chose this replica."""
    plan: LoadPlan | None = None
    """None if nothing was stored but what the pool had already."""

    @property
    def cached_tokens(self) -> int:
        return self.device_tokens + self.dram_tokens + self.disk_tokens + self.remote_tokens


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A piece of a streamed answer. The last one has a `finish_reason` and the `usage`."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None = None
    """`stop` or `length`. With the reason as `text`: `error` if the engine failed on this request, `lost` if the
    engine has ended, so that another one can go on with it."""
    usage: Usage | None = None
    choice: int = 0
    """Which of the request's choices this belongs to."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `token_ids` if they were asked for."""


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """Ask a prefill replica for the KV of `token_ids`."""

    request_id: str
    token_ids: TokenIds
    fingerprint: Fingerprint
    block_hashes: tuple[BlockHash, ...]
    first_block: int
    """Blocks before this one are in the asker's pool already and need not be handed off."""
    lease_owner: str
    """Handoff extents are leased to this owner until it has loaded them."""
    wants_logits: bool = False
    """Whether the logits after the last token are wanted as well."""
    use_cache: bool = True
    target: str | None = None
    origin: Origin = NOBODY


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Streamed by a prefill replica: the first `num_tokens` tokens can now be loaded from `node_id`'s store."""

    num_tokens: int
    node_id: str
    computed_tokens: int = 0
    """Computed so far for this request, the rest was reused."""
    done: bool = False
    logits: Logits | None = None
    """Those after the last token, as soon as they are computed: the last blocks are still to be stored."""
