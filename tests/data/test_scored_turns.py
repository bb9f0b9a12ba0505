"""Which tokens of a response carry loss: all assistant turns or the last, with or without an end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.tiny_tokenizers import CHATML, CHATML_WITH_SYSTEM, byte_level, metaspace
from prefopt.data import token_cache
from prefopt.data.budget import fit_budget
from prefopt.data.encode import TokenGroup, TokenSet, encode_groups, end_of_turn_ids
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.refusals import Reason
from prefopt.data.token_cache import cached_encoding, encoding_key

ASKED = (Turn("user", "what is the capital of France?"),)
CALLS = '[{"type": "function", "function": {"name": "add", "arguments": {}}}]'
WITH_TOOLS = (
    Turn("assistant", "Paris, of course."),
    Turn("user", "what is 12 + 30"),
    Turn("assistant", "hello", tool_calls=CALLS),
    Turn("tool", "42"),
    Turn("assistant", "It is 42."),
)
TALK = (Turn("assistant", "Paris, of course."), Turn("user", "what is 12 + 30"), Turn("assistant", "It is 42."))
SHORT = (Turn("assistant", "yes"),)


def group(*responses: tuple[Turn, ...], **options: Any) -> Group:
    return Group(ASKED, responses, Feedback("pair"), **{"source": "rows.jsonl:1", **options})


def encoded(tokenizer: Any, row: Group, **options: Any) -> TokenGroup:
    tokens = encode_groups(GroupSet(groups=(row,)), tokenizer, **options)
    assert not tokens.bad, tokens.bad
    return tokens.groups[0]


def runs(tokenizer: Any, tokens: TokenGroup, response: int = 0) -> list[tuple[bool, str]]:
    """Neighbouring tokens that are all scored or all not, as text."""
    ids, scored = tokens.response_ids[response], tokens.scored[response]
    places = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(scored.astype(int))) + 1)
    return [(bool(scored[run[0]]), tokenizer.decode(ids[run])) for run in places]


class TestTrainOn:
    def test_all_turns_of_the_assistant_with_their_ends_and_nothing_else(self) -> None:
        tokenizer = byte_level()
        assert runs(tokenizer, encoded(tokenizer, group(WITH_TOOLS, SHORT), train_on="all")) == [
            (True, "Paris, of course.<|im_end|>"),
            (False, "\n<|im_start|>user\nwhat is 12 + 30<|im_end|>\n<|im_start|>assistant\n"),
            (True, "hello<tool_call>add</tool_call><|im_end|>"),
            (False, "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"),
            (True, "It is 42.<|im_end|>"),
        ]

    def test_the_last_turn_alone_with_its_end(self) -> None:
        tokenizer = byte_level()
        assert runs(tokenizer, encoded(tokenizer, group(WITH_TOOLS, SHORT), train_on="last")) == [
            (
                False,
                "Paris, of course.<|im_end|>\n<|im_start|>user\nwhat is 12 + 30<|im_end|>\n<|im_start|>assistant\n"
                "hello<tool_call>add</tool_call><|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n",
            ),
            (True, "It is 42.<|im_end|>"),
        ]

    def test_a_call_that_is_the_last_turn_is_scored(self) -> None:
        tokenizer = byte_level()
        tokens = encoded(tokenizer, group(WITH_TOOLS[:3], SHORT), train_on="last")
        assert runs(tokenizer, tokens)[-1] == (True, "hello<tool_call>add</tool_call><|im_end|>")

    def test_plain_conversations_too(self) -> None:
        tokenizer = byte_level(None)
        tokens = encoded(tokenizer, group(TALK, SHORT, form="hh"), train_on="last")
        assert runs(tokenizer, tokens) == [
            (False, " Paris, of course.\n\nHuman: what is 12 + 30\n\nAssistant:"),
            (True, " It is 42.<|im_end|>"),
        ]

    @pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(CHATML_WITH_SYSTEM), metaspace()])
    def test_the_ids_do_not_depend_on_it_and_one_turn_is_scored_either_way(self, tokenizer: Any) -> None:
        every, last = (encoded(tokenizer, group(TALK, SHORT), train_on=which) for which in ("all", "last"))
        for first, second in zip(every.response_ids, last.response_ids, strict=True):
            assert first.tolist() == second.tolist()
        assert every.scored[0].sum() > last.scored[0].sum() > 0
        assert not (last.scored[0] & ~every.scored[0]).any()
        assert every.scored[1].tolist() == last.scored[1].tolist()


UNFINISHED = (True, False)
KINDS = {
    "chat": (byte_level(), "messages"),
    "system": (byte_level(CHATML_WITH_SYSTEM), "messages"),
    "metaspace": (metaspace(), "messages"),
    "text": (byte_level(None), "text"),
    "hh": (byte_level(None), "hh"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["It is 42", "It is 42. ", "cut in a lis\n\n", "yes <|im_end|>", "yes </s>"])
class TestUnfinished:
    def test_it_is_the_finished_one_without_its_end(self, kind: str, text: str) -> None:
        tokenizer, form = KINDS[kind]
        whole, cut = (
            encoded(tokenizer, group(SHORT, (Turn("assistant", text),), form=form, finished=finished))
            for finished in ((), UNFINISHED)
        )
        end = end_of_turn_ids(tokenizer)[0]
        assert (whole.finished, cut.finished) == ((True, True), UNFINISHED)
        assert end not in cut.response_ids[1] and cut.scored[1].all()
        assert cut.response_ids[0].tolist() == whole.response_ids[0].tolist()
        assert cut.prompt_ids.tolist() == whole.prompt_ids.tolist()
        closing = (" " if kind == "metaspace" else "") + str(tokenizer.convert_ids_to_tokens(end))
        assert tokenizer.decode(whole.response_ids[1]) == tokenizer.decode(cut.response_ids[1]) + closing

    def test_it_ends_with_its_own_text(self, kind: str, text: str) -> None:
        """What the template writes behind the text is not there: Llama 2 has a space before its end-of-turn token."""
        tokenizer, form = KINDS[kind]
        cut = encoded(tokenizer, group(SHORT, (Turn("assistant", text),), form=form, finished=UNFINISHED))
        written = tokenizer.decode(cut.response_ids[1])
        assert written.removeprefix("" if kind in ("chat", "system", "text") else " ") == text


def test_earlier_turns_of_a_cut_response_keep_their_ends() -> None:
    tokenizer = byte_level()
    tokens = encoded(tokenizer, group(WITH_TOOLS, SHORT, finished=(False, True)))
    assert runs(tokenizer, tokens)[0] == (True, "Paris, of course.<|im_end|>")
    assert runs(tokenizer, tokens)[-1] == (True, "It is 42.")


def test_a_template_without_an_end_of_its_own() -> None:
    """The end-of-sequence token ends a finished response, behind what the template writes; a cut one has neither."""
    tokenizer = byte_level("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    texts = [
        tokenizer.decode(encoded(tokenizer, group(SHORT, TALK[-1:], finished=finished)).response_ids[1])
        for finished in ((), UNFINISHED)
    ]
    assert texts == ["assistant: It is 42.\n<|im_end|>", "assistant: It is 42."]


def test_a_cut_response_of_which_nothing_is_left_is_refused_by_name() -> None:
    tokenizer = byte_level(CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"))
    thought = (Turn("assistant", "<think>hm</think>"),)
    tokens = encode_groups(GroupSet(groups=(group(SHORT, thought, finished=UNFINISHED),)), tokenizer)
    (bad,) = tokens.bad
    assert not tokens.groups
    assert (bad.source, bad.reason, bad.field) == ("rows.jsonl:1", Reason.EMPTY_RESPONSE, "responses")


def test_a_budget_does_not_finish_what_was_cut() -> None:
    tokens = encode_groups(GroupSet(groups=(group(SHORT, TALK, finished=UNFINISHED),)), byte_level())
    assert fit_budget(tokens, (99, 99), on_overlong="truncate").groups[0].finished == (True, False)
    assert fit_budget(tokens, (99, 1), on_overlong="truncate").groups[0].finished == (False, False)


class TestCache:
    ROWS = GroupSet(
        groups=(
            group(TALK, SHORT, finished=(False, True)),
            group(WITH_TOOLS, SHORT, source="rows.jsonl:2"),
            group(SHORT, TALK, source="rows.jsonl:3", finished=(False, False)),
        )
    )

    def test_ends_and_turns_are_kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def plain(tokens: TokenSet) -> list[Any]:
            return [
                (each.finished, [ids.tolist() for ids in each.response_ids], [flags.tolist() for flags in each.scored])
                for each in tokens.groups
            ]

        tokenizer = byte_level()
        made = {which: cached_encoding(self.ROWS, tokenizer, train_on=which, root=tmp_path) for which in ("all", "last")}
        monkeypatch.setattr(token_cache, "encode_parts", pytest.fail)
        for which, first in made.items():
            again = cached_encoding(self.ROWS, tokenizer, train_on=which, root=tmp_path)
            assert plain(again) == plain(first)
            assert [each.finished for each in again.groups] == [(False, True), (True, True), (False, False)]
        assert plain(made["all"]) != plain(made["last"])
        assert plain(cached_encoding(self.ROWS, tokenizer, root=tmp_path)) == plain(made["all"])

    def test_the_key_is_turns_and_ends_as_well(self) -> None:
        tokenizer = byte_level()
        finished = replace(self.ROWS, groups=(replace(self.ROWS.groups[0], finished=()), *self.ROWS.groups[1:]))
        keys = {
            encoding_key(self.ROWS, tokenizer, "auto", "all"),
            encoding_key(self.ROWS, tokenizer, "auto", "last"),
            encoding_key(finished, tokenizer, "auto", "all"),
        }
        assert len(keys) == 3
        assert encoding_key(self.ROWS, tokenizer, "auto") in keys
