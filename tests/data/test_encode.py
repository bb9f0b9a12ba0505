"""Text -> ids: one prompt for all responses, one end of turn, loss where the assistant speaks, and nothing obeyed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tiny_tokenizers import CHATML, CHATML_WITH_SYSTEM, FORGETFUL, LLAMA_2, byte_level, metaspace
from prefopt.core.errors import ConfigError, DataError, ModelError
from prefopt.data import token_cache
from prefopt.data.budget import fit_budget
from prefopt.data.encode import TokenGroup, TokenSet, encode_groups, end_of_turn_ids, prompt_ids
from prefopt.data.groups import Feedback, Group, GroupSet, Turn
from prefopt.data.load import load_groups
from prefopt.data.refusals import Reason
from prefopt.data.token_cache import cached_encoding, encoding_key

CHAT = (Turn("user", "what is the capital of France?"),)
ANSWERS = ((Turn("assistant", "Paris, of course."),), (Turn("assistant", "  Ünïcode 🙂\n\n"),))


def pair(prompt: tuple[Turn, ...] = CHAT, responses: tuple[tuple[Turn, ...], ...] = ANSWERS, **options: Any) -> Group:
    return Group(prompt, responses, Feedback("pair"), **{"source": "rows.jsonl:1", **options})


def encoded(tokenizer: Any, *groups: Group, template: str = "auto") -> TokenSet:
    return encode_groups(GroupSet(groups=groups), tokenizer, template=template)


def only(tokens: TokenSet) -> TokenGroup:
    assert not tokens.bad, tokens.bad
    (group,) = tokens.groups
    return group


def rendered(tokenizer: Any, turns: tuple[Turn, ...], *, generate: bool = False) -> str:
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))


@pytest.fixture(params=["byte-level", "byte-level with system", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "metaspace":
        return metaspace()
    return byte_level(CHATML if request.param == "byte-level" else CHATML_WITH_SYSTEM)


def test_prompt_and_response_are_the_rendered_conversation(tokenizer: Any) -> None:
    """Together they spell what the template writes, up to the end-of-turn token, and the prompt is what is generated from."""
    group = only(encoded(tokenizer, pair()))
    prompt = rendered(tokenizer, CHAT, generate=True)
    spelled = tokenizer.decode(group.prompt_ids).replace("<s> ", "<s>")  # the space that SentencePiece puts in front
    assert spelled == prompt
    end = tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer)[0])
    for ids, turns in zip(group.response_ids, ANSWERS, strict=True):
        whole = rendered(tokenizer, CHAT + turns)
        whole = whole[: whole.rindex(end) + len(end)]
        assert tokenizer.decode([*group.prompt_ids, *ids]).replace("<s> ", "<s>") == whole
    assert prompt_ids(CHAT, tokenizer, form="messages").tolist() == group.prompt_ids.tolist()


def test_the_ids_are_those_of_the_whole_text_where_the_boundary_is_a_special_token() -> None:
    tokenizer = byte_level()
    group = only(encoded(tokenizer, pair()))
    whole = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in CHAT + ANSWERS[0]], tokenize=True, return_dict=False
    )
    ours = [*group.prompt_ids.tolist(), *group.response_ids[0].tolist()]
    assert whole[: len(ours)] == ours


def test_a_metaspace_response_has_no_invented_space() -> None:
    tokenizer = metaspace()
    group = only(encoded(tokenizer, pair(responses=((Turn("assistant", "Paris"),), (Turn("assistant", "yes"),)))))
    tokens = tokenizer.convert_ids_to_tokens(group.response_ids[0])
    assert "".join(tokens) == "▁Paris▁</s>"


def test_every_response_ends_its_turn_once_at_the_end_and_all_of_it_is_scored(tokenizer: Any) -> None:
    group = only(encoded(tokenizer, pair()))
    end = end_of_turn_ids(tokenizer)[0]
    for ids, scored in zip(group.response_ids, group.scored, strict=True):
        assert np.flatnonzero(ids == end).tolist() == [len(ids) - 1]
        assert scored.all() and len(scored) == len(ids)
    assert group.finished == (True, True)


def test_the_prompt_does_not_depend_on_the_responses(tokenizer: Any) -> None:
    """Also where a response begins with what could merge with the end of the prompt."""
    beginnings = ("\n", " ", "ist", "\n\n x", "…")
    groups = [pair(responses=((Turn("assistant", text + "y"),), (Turn("assistant", "z"),))) for text in beginnings]
    prompts = [group.prompt_ids.tolist() for group in encoded(tokenizer, *groups).groups]
    assert len(prompts) == len(beginnings)
    assert all(prompt == prompts[0] for prompt in prompts)


TURNS = (
    Turn("assistant", "Paris, of course."),
    Turn("user", "what is 12 + 30"),
    Turn("assistant", "hello", tool_calls='[{"type": "function", "function": {"name": "add", "arguments": {}}}]'),
    Turn("tool", "42"),
    Turn("assistant", "It is 42."),
)


def test_later_user_turns_and_tool_outputs_carry_no_loss() -> None:
    tokenizer = byte_level()
    group = only(encoded(tokenizer, pair(responses=(TURNS, ANSWERS[0]))))
    ids, scored = group.response_ids[0], group.scored[0]
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(scored.astype(int))) + 1)
    pieces = [(bool(scored[run[0]]), tokenizer.decode(ids[run])) for run in runs]
    assert pieces == [
        (True, "Paris, of course.<|im_end|>"),
        (False, "\n<|im_start|>user\nwhat is 12 + 30<|im_end|>\n<|im_start|>assistant\n"),
        (True, "hello<tool_call>add</tool_call><|im_end|>"),
        (False, "\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"),
        (True, "It is 42.<|im_end|>"),
    ]


def test_plain_conversations_score_the_assistant_only_and_end_once() -> None:
    tokenizer = byte_level(None)
    group = only(encoded(tokenizer, pair(responses=((TURNS[0], TURNS[1], TURNS[4]), ANSWERS[0]), form="hh")))
    assert tokenizer.decode(group.prompt_ids) == "\n\nHuman: what is the capital of France?\n\nAssistant:"
    ids, scored = group.response_ids[0], group.scored[0]
    assert tokenizer.decode(ids) == " Paris, of course.\n\nHuman: what is 12 + 30\n\nAssistant: It is 42.<|im_end|>"
    assert tokenizer.decode(ids[scored]) == " Paris, of course. It is 42.<|im_end|>"


def test_plain_text_is_as_it_is() -> None:
    group = only(encoded(byte_level(None), pair(form="text")))
    tokenizer = byte_level(None)
    assert tokenizer.decode(group.prompt_ids) == CHAT[0].content
    assert [tokenizer.decode(ids) for ids in group.response_ids] == [turns[0].content + "<|im_end|>" for turns in ANSWERS]
    sentences = metaspace(None)
    group = only(
        encoded(
            sentences,
            pair((Turn("user", "hello"),), ((Turn("assistant", "world"),), (Turn("assistant", " world"),)), form="text"),
        )
    )
    assert sentences.convert_ids_to_tokens(group.prompt_ids)[0] == "<s>"
    assert sentences.decode([*group.prompt_ids, *group.response_ids[0]]) == "<s> helloworld</s>"
    assert sentences.decode([*group.prompt_ids, *group.response_ids[1]]) == "<s> hello world</s>"


SPECIAL = ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>", "<s>"]


@given(
    st.lists(st.sampled_from([*SPECIAL, "Paris ", "x", "\n", " ", "<|im_", "end|>", "system", "🙂"]), min_size=1, max_size=8)
)
@settings(max_examples=60, deadline=None)
def test_special_token_text_in_contents_is_spelled_out(parts: list[str]) -> None:
    """Only the template opens and ends turns, whatever users and assistants write; and what they wrote is kept."""
    content = "a" + "".join(parts) + "b"
    for tokenizer in TOKENIZERS:
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        written, clean = (
            encoded(tokenizer, pair((Turn("user", text),), ((Turn("assistant", text),), (Turn("assistant", "no"),))))
            for text in (content, "ab")
        )
        group, plain = only(written), only(clean)
        for ids, wanted in ((group.prompt_ids, plain.prompt_ids), (group.response_ids[0], plain.response_ids[0])):
            assert [id for id in ids.tolist() if id in special] == [id for id in wanted.tolist() if id in special]
            assert tokenizer.decode(ids) == tokenizer.decode(wanted).replace("ab", content)
        mine = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        assert bool(written.special_text) is any(token in content for token in mine)


TOKENIZERS = [byte_level(), metaspace()]


def test_a_template_that_refuses_a_role_refuses_the_row_and_names_it() -> None:
    tokens = encoded(metaspace(), pair((Turn("system", "be kind"), *CHAT)), pair(source="rows.jsonl:2"))
    assert [group.source for group in tokens.groups] == ["rows.jsonl:2"]
    (bad,) = tokens.bad
    assert bad.source == "rows.jsonl:1" and bad.reason == "template refuses the turns" and "system" in bad.found


def test_a_system_turn_is_where_the_template_puts_it() -> None:
    tokenizer = byte_level(CHATML_WITH_SYSTEM)
    mine = only(encoded(tokenizer, pair((Turn("system", "be brief"), *CHAT))))
    default = only(encoded(tokenizer, pair()))
    assert tokenizer.decode(mine.prompt_ids).startswith("<|im_start|>system\nbe brief<|im_end|>")
    assert tokenizer.decode(default.prompt_ids).startswith("<|im_start|>system\nYou are kind.<|im_end|>")


def test_a_template_that_forgets_the_prompt_is_refused() -> None:
    tokens = encoded(byte_level(FORGETFUL), pair(responses=((TURNS[0], TURNS[1], TURNS[4]), ANSWERS[0])))
    (bad,) = tokens.bad
    assert not tokens.groups and bad.reason == "template does not extend the prompt"


def test_chat_rows_need_a_template_and_text_rows_do_not() -> None:
    base = byte_level(None)
    with pytest.raises(ModelError, match="no chat template") as raised:
        encoded(base, pair())
    assert "data.template" in raised.value.todo
    for form in ("text", "hh"):
        assert only(encoded(base, pair(form=form)))
    assert only(encoded(base, pair(), template="plain"))
    with pytest.raises(ModelError, match="no chat template"):
        encoded(base, pair(form="text"), template="chat")


def test_a_template_from_a_file_replaces_the_own_one(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(CHATML_WITH_SYSTEM)
    own, other = only(encoded(byte_level(), pair(), template=str(path))), only(encoded(byte_level(CHATML_WITH_SYSTEM), pair()))
    assert own.prompt_ids.tolist() == other.prompt_ids.tolist()
    with pytest.raises(ConfigError, match="is not a file"):
        encoded(byte_level(), pair(), template=str(tmp_path / "absent.jinja"))
    path.write_text("{% for %}")
    with pytest.raises(ModelError, match="cannot render"):
        encoded(byte_level(), pair(), template=str(path))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    tokenizer = byte_level(None)
    tokenizer.eos_token = None
    (bad,) = encoded(tokenizer, pair(form="text")).bad
    assert bad.reason == Reason.NO_END_OF_TURN
    with pytest.raises(ModelError, match="no end-of-sequence"):
        end_of_turn_ids(tokenizer)


def test_an_empty_prompt_is_refused_unless_a_first_token_stands_for_it() -> None:
    empty = pair((Turn("user", ""),), form="text")
    (bad,) = encoded(byte_level(None), empty).bad
    assert bad.reason == "empty prompt"
    assert only(encoded(metaspace(None), empty)).prompt_ids.tolist() == [1]
    with pytest.raises(DataError, match="no tokens"):
        prompt_ids((Turn("user", ""),), byte_level(None))


def test_the_end_of_a_turn_is_found_where_it_is_not_the_end_of_a_text() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = "<|endoftext|>"
    turn, text = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert end_of_turn_ids(tokenizer) == (turn, text)
    assert all(ids[-1] == turn for ids in only(encoded(tokenizer, pair())).response_ids)


LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)), max_size=6)


def tokens_of(lengths: list[tuple[int, int, int]]) -> TokenSet:
    groups = []
    for number, (prompt, *responses) in enumerate(lengths):
        random = np.random.default_rng(number)
        ids = tuple(random.integers(0, 3, length, dtype=np.int32) for length in responses)
        scored = tuple(np.arange(length) >= length // 3 for length in responses)
        prompt_ids = np.arange(prompt, dtype=np.int32)
        groups.append(TokenGroup(prompt_ids, ids, scored, Feedback("pair"), f"rows:{number}", (True, True)))
    return TokenSet(tuple(groups))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 12), st.sampled_from(["drop", "truncate"]))
@settings(deadline=None)
def test_budgets_hold_and_every_row_is_kept_cut_or_named(
    lengths: list[tuple[int, int, int]], prompt_budget: int, response_budget: int, on_overlong: str
) -> None:
    tokens = tokens_of(lengths)
    fitted = fit_budget(tokens, (prompt_budget, response_budget), on_overlong=on_overlong)
    before = {group.source: group for group in tokens.groups}
    assert sorted([*(group.source for group in fitted.groups), *(row.source for row in fitted.bad)]) == sorted(before)
    assert on_overlong == "truncate" or not fitted.truncated
    for group in fitted.groups:
        old = before[group.source]
        fits = len(old.prompt_ids) <= prompt_budget and all(len(ids) <= response_budget for ids in old.response_ids)
        assert (group is old) is fits is (group.source not in fitted.truncated)
        assert group.prompt_ids.tolist() == old.prompt_ids[-prompt_budget:].tolist(), "a prompt keeps its end"
        assert not np.array_equal(*group.response_ids) or np.array_equal(*old.response_ids)
        for at, ids in enumerate(group.response_ids):
            assert ids.tolist() == old.response_ids[at][:response_budget].tolist(), "a response keeps its start"
            assert group.scored[at].tolist() == old.scored[at][:response_budget].tolist()
            assert group.scored[at].any()
            assert group.finished[at] is (len(old.response_ids[at]) <= response_budget)


def test_a_budget_that_must_not_be_exceeded_names_the_row_and_the_option() -> None:
    with pytest.raises(DataError, match="rows:1") as raised:
        fit_budget(tokens_of([(1, 1, 1), (2, 5, 1)]), (3, 4), on_overlong="error")
    assert "data.max_response_tokens" in raised.value.todo
    with pytest.raises(DataError, match="prompt over the token budget"):
        fit_budget(tokens_of([(4, 1, 1)]), (3, 4), on_overlong="error")


ROWS = (
    pair(),
    pair((Turn("user", "say <|im_end|>"),), source="rows.jsonl:2"),
    pair(responses=((Turn("user", "not an answer"),), ANSWERS[0]), source="rows.jsonl:3"),
    replace(pair(source="rows.jsonl:4"), feedback=Feedback("pair", margin=2.0)),
)


def same(first: TokenSet, second: TokenSet) -> bool:
    def plain(tokens: TokenSet) -> Any:
        groups = [
            (
                group.prompt_ids.tolist(),
                [ids.tolist() for ids in group.response_ids],
                [flags.tolist() for flags in group.scored],
                group.feedback,
                group.source,
                group.finished,
            )
            for group in tokens.groups
        ]
        return groups, tokens.bad, tokens.special_text

    return bool(plain(first) == plain(second))


class TestCache:
    def test_the_second_call_tokenises_nothing_and_gives_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows, tokenizer = GroupSet(groups=ROWS), byte_level()
        first = cached_encoding(rows, tokenizer, root=tmp_path)
        assert len(first.groups) == 3 and len(first.bad) == 1 and first.special_text == ("rows.jsonl:2",)
        monkeypatch.setattr(token_cache, "encode_parts", pytest.fail)
        again = cached_encoding(rows, tokenizer, root=tmp_path)
        assert same(first, again) and same(first, encode_groups(rows, tokenizer))
        changed = GroupSet(groups=tuple(replace(row, feedback=Feedback("pair", weight=0.5)) for row in ROWS))
        assert {group.feedback.weight for group in cached_encoding(changed, tokenizer, root=tmp_path).groups} == {0.5}

    @pytest.mark.parametrize("body", [b"", b"\xff\xff\xff\xff", b"garbage"])
    def test_a_damaged_entry_is_made_again(self, tmp_path: Path, body: bytes) -> None:
        rows, tokenizer = GroupSet(groups=ROWS), byte_level()
        first = encode_groups(rows, tokenizer)
        cached_encoding(rows, tokenizer, root=tmp_path)
        (path,) = tmp_path.glob("*.arrow")
        whole = path.read_bytes()
        for damaged in (body, whole[:-60], whole[: len(whole) // 2] + b"x" * 40 + whole[len(whole) // 2 + 40 :]):
            path.write_bytes(damaged)
            assert same(first, cached_encoding(rows, tokenizer, root=tmp_path))
            assert path.stat().st_size == len(whole)

    def test_the_key_is_texts_template_and_tokenizer(self, tmp_path: Path) -> None:
        rows, tokenizer = GroupSet(groups=ROWS), byte_level()
        path = tmp_path / "own.jinja"
        path.write_text(CHATML)
        more = byte_level()
        more.add_tokens(["capital"])
        keys = [
            encoding_key(rows, tokenizer, "auto"),
            encoding_key(rows, tokenizer, "plain"),
            encoding_key(rows, tokenizer, str(path)),
            encoding_key(rows, byte_level(CHATML_WITH_SYSTEM), "auto"),
            encoding_key(rows, byte_level(LLAMA_2), "auto"),
            encoding_key(rows, metaspace(CHATML), "auto"),
            encoding_key(rows, more, "auto"),
            encoding_key(GroupSet(groups=ROWS[1:]), tokenizer, "auto"),
            encoding_key(GroupSet(groups=(pair((Turn("user", "b"),)), *ROWS[1:])), tokenizer, "auto"),
            encoding_key(GroupSet(groups=(pair((Turn("system", CHAT[0].content),)), *ROWS[1:])), tokenizer, "auto"),
            encoding_key(GroupSet(groups=(pair(form="hh"), *ROWS[1:])), tokenizer, "auto"),
            encoding_key(GroupSet(groups=(pair(tools="[]"), *ROWS[1:])), tokenizer, "auto"),
        ]
        path.write_text(CHATML_WITH_SYSTEM)
        keys.append(encoding_key(rows, tokenizer, str(path)))
        assert len(set(keys)) == len(keys)
        assert encoding_key(rows, byte_level(), "auto") == keys[0]

    def test_rows_without_a_source_keep_their_own_feedback(self, tmp_path: Path) -> None:
        rows = GroupSet(
            groups=tuple(replace(row, source="", feedback=Feedback("pair", margin=n)) for n, row in enumerate(ROWS))
        )
        for _ in range(2):
            tokens = cached_encoding(rows, byte_level(), root=tmp_path)
            assert [group.feedback.margin for group in tokens.groups] == [0, 1, 3]


def test_a_real_sentencepiece_tokenizer_gives_what_it_gives_for_the_whole_text(shared: Path) -> None:
    """stories15M has Llama 2's tokenizer: prompt and response apart are the tokens of both together."""
    from transformers import AutoTokenizer

    folder = shared / "models" / "stories15M"
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
        pytest.skip("stories15M is not there")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, answer = "Once upon a time, there was", " a little girl called Lily.\n\nShe was happy."
    group = only(
        encoded(
            tokenizer, pair((Turn("user", prompt),), ((Turn("assistant", answer),), ANSWERS[0]), form="text"), template="plain"
        )
    )
    ours = [*group.prompt_ids.tolist(), *group.response_ids[0].tolist()]
    assert ours == [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]


def test_the_prompt_that_is_written_as_nothing_is_the_beginning_of_text_alone() -> None:
    groups = load_groups([{"prompt": "", "chosen": "It is calm.", "rejected": "It are calm."}])
    assert any('1 rows have the prompt ""' in note for note in groups.notes)
    plain = encode_groups(groups, metaspace(), template="plain").groups[0]
    assert plain.prompt_ids.tolist() == [metaspace().bos_token_id]
    chat = encode_groups(groups, byte_level())
    assert not chat.groups and chat.bad[0].reason == "empty prompt"
