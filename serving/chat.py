"""From chat messages to token ids, through the model's own chat template.

The template is the model's, unchanged, rendered with the generation prompt; nothing is truncated. Text that
looks like a special token (`<|im_end|>` in a user's message) becomes that special token, as in other servers
that tokenise the rendered template: a client can therefore forge turns in its own prompt, never in another's.
Never imports FastAPI or pydantic; transformers is imported when a tokenizer is loaded.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cache.hashing import TokenIds, as_token_ids
from serving.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplateError(ValueError):
    """The template refuses these messages, for example because of the order of their roles."""


class NoChatTemplate(ValueError):
    """The model has no chat template, so it cannot be served as a chat model."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message as templates see it."""

    role: str
    content: str
    name: str | None = None

    def as_template_input(self) -> dict[str, str]:
        """Keys as the templates expect them; `name` is absent, not None, where there is none."""
        message = {"role": self.role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


class ChatTemplate:
    """A model's tokenizer and chat template. May be called from several threads."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        eos_token_ids: frozenset[int] = frozenset(),
        num_embeddings: int | None = None,
    ) -> None:
        """`eos_token_ids`: further ids that end an answer, beside the tokenizer's own.

        `num_embeddings`: rows of the model's embedding table, where they are known.
        """
        if not tokenizer.chat_template:
            raise NoChatTemplate(
                f"the model at '{tokenizer.name_or_path}' has no chat template "
                "(chat_template in tokenizer_config.json, or chat_template.jinja): serve an instruct model"
            )
        self._tokenizer = tokenizer
        self._extra_eos_token_ids = eos_token_ids
        self.vocabulary = Vocabulary(tokenizer, num_embeddings)

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """Read tokenizer, template and eos ids from a model's folder. Never goes to the network.

        Raises NoChatTemplate, and OSError where there is no tokenizer.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(tokenizer, _generation_eos_ids(folder), _num_embeddings(folder))

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer knows, added tokens included. The model's own table may be longer."""
        return len(self._tokenizer)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end an answer: the tokenizer's and those of `generation_config.json`."""
        own = self._tokenizer.eos_token_id
        return self._extra_eos_token_ids if own is None else self._extra_eos_token_ids | {own}

    def render(self, messages: Sequence[ChatMessage]) -> TokenIds:
        """Token ids of the prompt, `(num_tokens,)`, up to where the assistant begins to speak.

        Raises ChatTemplateError if the template refuses the messages.
        """
        from jinja2.exceptions import TemplateError

        conversation = [message.as_template_input() for message in messages]
        try:
            with self.vocabulary.lock:
                token_ids = self._tokenizer.apply_chat_template(
                    conversation, tokenize=True, add_generation_prompt=True, return_dict=False
                )
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        return as_token_ids(cast(list[int], token_ids))

    def __repr__(self) -> str:
        return f"ChatTemplate(vocab_size={self.vocab_size}, eos_token_ids={sorted(self.eos_token_ids)})"


def _generation_eos_ids(folder: Path) -> frozenset[int]:
    """Eos ids of `generation_config.json`, which holds one id, a list, or none; empty without the file."""
    path = folder / "generation_config.json"
    if not path.exists():
        return frozenset()
    eos: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    return frozenset([eos] if isinstance(eos, int) else eos or ())


def _num_embeddings(folder: Path) -> int | None:
    """Rows of the model's embedding table by `config.json`, None where it does not say."""
    path = folder / "config.json"
    if not path.exists():
        return None
    size: Any = json.loads(path.read_text(encoding="utf-8")).get("vocab_size")
    return size if isinstance(size, int) else None
