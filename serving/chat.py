"""From chat messages to token ids, through the model's own chat template.

The template is the model's, unchanged, rendered with the generation prompt; nothing is truncated. Where it knows of
tools it gets them, and calls and results as messages with those roles. Where it does not, the tools are described at
the end of the system message, calls are texts of the assistant's and results of the user's (see `tool_calls`).

Text that looks like a special token (`<|im_end|>` in a user's message) becomes that special token, as in other servers
that tokenise the rendered template: a client can therefore forge turns in its own prompt, never in another's.
Never imports FastAPI or pydantic; transformers is imported when a tokenizer is loaded.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cache.hashing import TokenIds, as_token_ids
from serving.tool_calls import Tool, ToolCall, result_text, tools_text
from serving.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_TOOLS_VARIABLE = re.compile(r"\btools\b")


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
    tool_calls: tuple[ToolCall, ...] = ()
    """The assistant's."""
    tool_call_id: str | None = None
    """Of the call that a tool's message is the result of."""

    def as_template_input(self) -> dict[str, Any]:
        """Keys as the templates expect them; those that have no value are absent, not None."""
        optional = {
            "name": self.name,
            "tool_calls": [call.as_template_input() for call in self.tool_calls] or None,
            "tool_call_id": self.tool_call_id,
        }
        present = {key: value for key, value in optional.items() if value is not None}
        return {"role": self.role, "content": self.content, **present}


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
        self._knows_tools = bool(_TOOLS_VARIABLE.search(tokenizer.get_chat_template(tools=[{}])))
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

    def render(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> TokenIds:
        """Token ids of the prompt, `(num_tokens,)`, up to where the assistant begins to speak.

        Raises ChatTemplateError if the template refuses the messages.
        """
        from jinja2.exceptions import TemplateError

        if not self._knows_tools:
            messages, tools = without_tools(messages, tools), ()
        conversation = [message.as_template_input() for message in messages]
        definitions: Any = [tool.as_template_input() for tool in tools] or None
        try:
            with self.vocabulary.lock:
                token_ids = self._tokenizer.apply_chat_template(
                    conversation, tools=definitions, tokenize=True, add_generation_prompt=True, return_dict=False
                )
        except TemplateError as error:
            raise ChatTemplateError(f"the model's chat template refuses these messages: {error}") from error
        return as_token_ids(cast(list[int], token_ids))

    def __repr__(self) -> str:
        return f"ChatTemplate(vocab_size={self.vocab_size}, eos_token_ids={sorted(self.eos_token_ids)})"


def without_tools(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
    """The same conversation for a template that knows only system, user and assistant.

    Results that follow each other become one message, as many such templates want user and assistant to alternate.
    """
    plain = [ChatMessage("system", tools_text(tools))] if tools else []
    for message in messages:
        if message.role == "tool":
            text = result_text(message.content)
            if plain and plain[-1].role == "tool":
                plain[-1] = replace(plain[-1], content=f"{plain[-1].content}\n{text}")
            else:
                plain.append(ChatMessage("tool", text))
        elif message.tool_calls:
            texts = [message.content, *(call.as_text() for call in message.tool_calls)]
            plain.append(ChatMessage(message.role, "\n".join(text for text in texts if text), message.name))
        elif message.role == "system" and tools and len(plain) == 1:
            plain[0] = replace(message, content=f"{message.content}\n\n{plain[0].content}")
        else:
            plain.append(message)
    return [replace(message, role="user") if message.role == "tool" else message for message in plain]


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
