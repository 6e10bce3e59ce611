"""Greedy answers of a model that can only be walked: a draft is guessed, one walk says how far it is right.

A walk over all drafts at once gives the model's own next token after every token of every draft. The longest
beginning on which the two agree is kept, the model's token is put at the first difference, and drafting goes on from
there. Each kept token is thus the model's own choice after the tokens before it, whatever the draft: a bad one costs
passes, never a token. The choice is the token of the largest logit, of equal ones the lowest id, in the walk's
arithmetic, with every row at its own positions and none padded. Where two logits lie closer than that arithmetic
rounds, another order of summation (a cache, another batch) may choose the other, as it may in any engine.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fourge.evaluation.draft_journal import DraftJournal
from fourge.evaluation.generation import Question


@dataclass
class Answer:
    """The tokens of an answer so far."""

    question: Question
    tokens: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and self.question.rule.ends(self.tokens)

    @property
    def truncated(self) -> bool:
        return self.question.rule.truncated(self.tokens)

    @property
    def left(self) -> int:
        """How many more tokens it may have."""
        return self.question.rule.max_tokens - len(self.tokens)

    @property
    def prefix(self) -> list[int]:
        """All tokens that the model has read when it goes on."""
        return [*self.question.prompt, *self.tokens]

    def take(self, tokens: Sequence[int]) -> int:
        """Appends tokens up to the one that ends the answer; returns how many."""
        for number, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if self.ended:
                return number
        return len(tokens)


Draft = Callable[[Sequence[Answer]], list[list[int]]]
"""Guesses how each answer goes on; a guess may be empty, wrong, or longer than the answer may be."""

Verify = Callable[[int, Sequence[Sequence[int]], Sequence[Sequence[int]]], list[list[int]]]
"""`verify(number, prefixes, drafts)`: the model's greedy token after each prefix and after each token of its draft,
one more than the draft has. `number` counts the passes from 0."""


def agreed(draft: Sequence[int], greedy: Sequence[int]) -> int:
    """How many tokens the draft and the model have in common from the beginning on."""
    pairs = enumerate(zip(draft, greedy, strict=False))
    return next((at for at, (guess, token) in pairs if guess != token), len(draft))


def answer_verified(answers: Sequence[Answer], draft: Draft, verify: Verify, journal: DraftJournal) -> None:
    """Completes all answers. What a pass found out is in the journal before the next begins, and so are its drafts
    before it begins: stopped at any time, it goes on to the same tokens."""
    state = journal.state
    while open_answers := [answer for answer in answers if not answer.ended]:
        if state.drafts is None:
            guessed = draft(open_answers)
            # The model's token after the last of a draft comes for nothing.
            state.drafts = [guess[: answer.left - 1] for guess, answer in zip(guessed, open_answers, strict=True)]
            journal.save(answers)
        greedy = verify(state.passes, [answer.prefix for answer in open_answers], state.drafts)
        taken = 0
        for answer, guess, tokens in zip(open_answers, state.drafts, greedy, strict=True):
            right = agreed(guess, tokens)
            taken += answer.take(tokens[: right + 1])
            state.drafted += len(guess)
            state.accepted += right
        state.verified += len(open_answers)
        state.passes += 1
        state.drafts = None
        journal.save(answers)
        ended = sum(answer.ended for answer in answers)
        print(
            f"Pass {state.passes}: {taken:,} tokens for {len(open_answers):,} answers, "
            f"{ended:,} of {len(answers):,} are whole",
            file=sys.stderr,
            flush=True,
        )
