"""Which token ids answers were made of, so that they come back as the same ids.

A client sends an answer back as text, and a tokenizer would often cut that text in other places than the model did:
the prompt of the next turn would part from the KV of the last one in the middle of its answer. This is state of
rendering and apart from any cache: whether KV is kept or not, the same prompts come out.

    prompt and answer     ...<|im_start|> | assistant \n It \n \n is | <|im_end|>
                          context         ^ said                     ^
    next prompt, plain    ...<|im_start|> | assistant \n It \n\n is  | <|im_end|> \n <|im_start|> user ...

What was *said* is kept under the hash of all ids before it, the *context*. A prompt is searched for known contexts, and
follows what was said in each for as long as that spells the prompt's own text (see `token_match`). So an answer that
was edited, stripped, or cut at a stop string is followed up to there and encoded plainly from there on, an edited
history is another context and unknown, and branches of one prompt are told apart by their text. No session id is
needed.

Invariants: the text of a prompt never changes, whatever is remembered; what one tenant said is never found by another;
at most `max_bytes` are held, the least recently used goes first. What is forgotten costs time, and nothing else.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import numpy as np

from cache.hashing import TokenIds, as_token_ids
from serving.protocol import TokenBatch
from serving.token_match import last_meeting
from serving.vocabulary import TokenMark, Vocabulary

MAX_BYTES = 64 * 2**20
MAX_BRANCHES = 64
"""Most things said in one context that are kept."""
ENTRY_BYTES = 300
"""Rough cost of an entry beside its ids."""
NUM_FOLLOWING = 4
"""Tokens behind a stretch that are decoded with it when its text is checked."""

Context = tuple[bytes, bytes]
"""Hashes of the tenant and of all token ids so far."""


class AnswerMemory:
    """See the module's docstring. May be called from several threads."""

    def __init__(self, vocabulary: Vocabulary, max_bytes: int = MAX_BYTES) -> None:
        self._vocabulary = vocabulary
        self._max_bytes = max_bytes
        self._marks = vocabulary.marks()
        self._lock = threading.Lock()
        self._said: OrderedDict[Context, list[TokenIds]] = OrderedDict()
        """The latest is last, in each list too."""
        self._num_bytes = 0

    def __repr__(self) -> str:
        return f"<AnswerMemory {len(self._said)} contexts, {self._num_bytes} of {self._max_bytes} bytes>"

    def recall(self, token_ids: TokenIds, tenant: str = "") -> TokenIds:
        """The prompt `token_ids`, `(num_tokens,)`, with the ids that its answers were made of where they are known."""
        contexts = _Contexts(tenant)
        anchors, num_done = self._anchors(token_ids), 0
        while num_done < len(anchors):
            at = int(anchors[num_done])
            num_done += 1
            branches = self._branches(contexts.of(token_ids, at))
            followed = self._follow(token_ids, at, branches) if branches else None
            if followed is not None:  # its first `num_done` anchors are the same
                token_ids, anchors = followed, self._anchors(followed)
        return token_ids

    def remember(self, prompt: TokenIds, answer: Sequence[int], tenant: str = "") -> None:
        """`answer` was generated behind `prompt`, whole or in part. What follows a special token is no text: left out.

        Costs a hash of the prompt, so that an event loop may call it.
        """
        told = self._told(as_token_ids(answer))
        if not len(told):
            return
        anchor = int(self._anchors(prompt)[-1])
        said = np.concatenate([prompt[anchor:], told])
        context = _Contexts(tenant).of(prompt, anchor)
        with self._lock:
            self._keep(context, said)

    async def hear(
        self, batches: AsyncGenerator[TokenBatch, None], prompt: TokenIds, tenant: str = ""
    ) -> AsyncGenerator[TokenBatch, None]:
        """Pass on the batches of the answers to `prompt`, and remember each when it ends, however that is."""
        answers: dict[int, list[int]] = {}
        try:
            async with aclosing(batches):
                async for batch in batches:
                    answers.setdefault(batch.choice, []).extend(batch.token_ids)
                    if batch.finish_reason is not None:  # who has this batch may send the next turn at once
                        self.remember(prompt, answers.pop(batch.choice), tenant)
                    yield batch
        finally:
            for beginning in answers.values():
                self.remember(prompt, beginning, tenant)

    def forget(self, tenant: str) -> int:
        """Drop all that was said to `tenant`; returns the number of answers."""
        who = _hash_of(tenant)
        with self._lock:
            dropped = [context for context in self._said if context[0] == who]
            return sum(self._drop(context) for context in dropped)

    def check_integrity(self) -> None:
        """Raise AssertionError if the books are off."""
        with self._lock:
            assert self._num_bytes == sum(_size(said) for branches in self._said.values() for said in branches)
            assert self._num_bytes <= self._max_bytes
            assert all(0 < len(branches) <= MAX_BRANCHES for branches in self._said.values())

    # -- contexts -----------------------------------------------------------------------------------

    def _anchors(self, token_ids: TokenIds) -> TokenIds:
        """Where something said may begin, ascending: at the start, behind a special token, behind the end of a line.

        At the end of `token_ids` only behind a special token, with which nothing can merge: a line's end may become
        part of another token as soon as text follows.
        """
        marks = self._marks.take(token_ids, mode="clip")
        behind = np.flatnonzero(marks != TokenMark.PLAIN) + 1
        if len(behind) and behind[-1] == len(token_ids) and marks[-1] != TokenMark.SPECIAL:
            behind = behind[:-1]
        return as_token_ids(np.concatenate([[0], behind]))

    def _told(self, token_ids: TokenIds) -> TokenIds:
        """The ids up to the first special token."""
        special = np.flatnonzero(self._marks.take(token_ids, mode="clip") == TokenMark.SPECIAL)
        return token_ids[: special[0]] if len(special) else token_ids

    # -- following ----------------------------------------------------------------------------------

    def _follow(self, token_ids: TokenIds, at: int, branches: Sequence[TokenIds]) -> TokenIds | None:
        """The prompt with the branch that goes furthest, the latest of those that do; None if nothing changes."""
        best, num_best = token_ids[at:at], 0
        rest = self._told(token_ids[at:])
        for said in branches:
            num_said, num_rest = last_meeting(said, rest, self._data_of)
            if num_rest >= num_best:
                best, num_best = said[:num_said], num_rest
        if np.array_equal(best, rest[:num_best]) or not self._is_same_text(best, rest, num_best):
            return None
        return np.concatenate([token_ids[:at], best, token_ids[at + num_best :]])

    def _is_same_text(self, said: TokenIds, rest: TokenIds, num_rest: int) -> bool:
        following = rest[num_rest : num_rest + NUM_FOLLOWING].tolist()
        decode = self._vocabulary.decode
        return decode(said.tolist() + following) == decode(rest[:num_rest].tolist() + following)

    def _data_of(self, token_id: int) -> bytes:
        return self._vocabulary.piece(token_id).data

    # -- the books ----------------------------------------------------------------------------------

    def _branches(self, context: Context) -> Sequence[TokenIds]:
        with self._lock:
            branches = self._said.get(context)
            if branches is None:
                return ()
            self._said.move_to_end(context)
            return tuple(branches)

    def _keep(self, context: Context, said: TokenIds) -> None:
        branches = self._said.setdefault(context, [])
        self._said.move_to_end(context)
        same = next((i for i, one in enumerate(branches) if np.array_equal(one, said)), None)
        if same is not None:
            branches.append(branches.pop(same))
            return
        branches.append(said)
        self._num_bytes += _size(said)
        if len(branches) > MAX_BRANCHES:
            self._num_bytes -= _size(branches.pop(0))
        while self._num_bytes > self._max_bytes:
            self._drop(next(iter(self._said)))

    def _drop(self, context: Context) -> int:
        branches = self._said.pop(context)
        self._num_bytes -= sum(map(_size, branches))
        return len(branches)


class _Contexts:
    """Contexts of one prompt's places, asked for in ascending order: each id is hashed once."""

    def __init__(self, tenant: str) -> None:
        self._tenant = _hash_of(tenant)
        self._ids = hashlib.blake2b(digest_size=16)
        self._num_hashed = 0

    def of(self, token_ids: TokenIds, at: int) -> Context:
        """The context of place `at`; the ids before the place asked for last must be the same as then."""
        self._ids.update(token_ids[self._num_hashed : at].tobytes())
        self._num_hashed = at
        return self._tenant, self._ids.digest()


def _hash_of(tenant: str) -> bytes:
    return hashlib.blake2b(tenant.encode("utf-8"), digest_size=16).digest()


def _size(said: TokenIds) -> int:
    return said.nbytes + ENTRY_BYTES
