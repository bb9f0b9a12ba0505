"""Templates that only copy contents are rendered once for all conversations of a kind; the others as they always were."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tiny_tokenizers import CHATML, CHATML_WITH_SYSTEM, FORGETFUL, LLAMA_2, byte_level
from prefopt.data.groups import Turn
from prefopt.data.render import ChatRenderer
from prefopt.data.skeleton import only_copies

NEWER = (  # in the manner of Qwen 2.5
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}"
    "{{- tools | tojson }}{{- '<|im_end|>\\n' }}"
    "{%- else %}{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif %}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) "
    "or (message.role == 'assistant' and not message.tool_calls) %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role }}"
    "{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}"
    "{%- for tool_call in message.tool_calls %}{{- '<tool_call>' }}{{- tool_call.function.name }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
NAMED = (  # names for the list, for a message and for its text
    "{% set rest = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for m in rest %}{% set text = '<|im_start|>' ~ m['role'] ~ m['content'] ~ '<|im_end|>' %}"
    "{% if loop.first and messages|length > 2 and m.content is string %}{% set text = '! ' + text %}{% endif %}"
    "{% if not m.content %}(nothing){% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
COPYING = {
    "CHATML": CHATML,
    "with system": CHATML_WITH_SYSTEM,
    "Llama 2": LLAMA_2,
    "newer": NEWER,
    "named": NAMED,
    "forgetful": FORGETFUL,
}

LOOP = "{%% for m in messages %%}%s{%% endfor %%}"
LOOKING = {
    "trims": LOOP % "{{ m.content | trim }}",
    "cuts": LOOP % "{{ m['content'].split('</think>')[-1] }}",
    "indexes": LOOP % "{{ m.content[0] }}",
    "compares": LOOP % "{% if m.content == 'x' %}y{% endif %}",
    "searches": LOOP % "{% if 'x' in m.content %}y{% endif %}",
    "counts": LOOP % "{{ m.content | length }}",
    "chooses": LOOP % "{{ m.content or 'x' }}",
    "formats": LOOP % "{{ '%s' % m.content }}",
    "passes on": LOOP % "{{ raise_exception(m.content) }}",
    "dumps": LOOP % "{{ m | tojson }}",
    "gets": LOOP % "{{ m.get('content') | upper }}",
    "gets by text": LOOP % "{{ m['get']('content') }}",
    "takes values": LOOP % "{{ m.values() | list }}",
    "looks around": LOOP % "{% if loop.previtem and loop.previtem.content == 'x' %}y{% endif %}",
    "looks around by text": LOOP % "{% if loop['nextitem'] %}y{% endif %}",
    "takes any part": LOOP % "{% for key in ['role', 'content'] %}{{ m[key] | upper }}{% endfor %}",
    "takes the last": "{{ (messages | last).content | upper }}",
    "turns round": "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    "selects": "{% for m in messages | selectattr('content', 'equalto', 'x') %}{{ m.content }}{% endfor %}",
    "selects as it goes": "{% for m in messages if m.content == 'x' %}y{% endfor %}",
    "names, then looks": LOOP % "{% set text = m.content %}{% if text == 'x' %}y{% endif %}",
    "looks, then names": LOOP % "{% if text == 'x' %}y{% endif %}{% set text = m.content %}",
    "adds, then looks": LOOP % "{% set text = 'a' + m.content %}{{ text | upper }}",
    "names one thing two ways": "{% set a = messages[0] %}{% set a = messages[0].content %}{{ a[0] }}",
    "keeps in a namespace": "{% set ns = namespace(x='') %}" + LOOP % "{% set ns.x = m.content %}" + "{{ ns.x }}",
    "gives to a namespace": "{% set ns = namespace(x=messages) %}{{ ns.x[0].content }}",
    "has a macro": "{% macro f(m) %}{{ m.content }}{% endmacro %}" + LOOP % "{{ f(m) }}",
    "writes into a block": LOOP % "{% set text %}{{ m.content }}{% endset %}{{ text | upper }}",
    "filters a block": LOOP % "{% filter upper %}{{ m.content }}{% endfilter %}",
    "goes through letters": LOOP % "{% for letter in m.content %}{{ letter }}-{% endfor %}",
    "joins lists": "{% for m in messages + messages %}{{ m.content }}{% endfor %}",
    "with": LOOP % "{% with text = m.content %}{{ text | upper }}{% endwith %}",
    "asks the time": "{{ strftime_now('%Y') }}" + LOOP % "{{ m.content }}",
    "cannot be parsed": LOOP % "{% generation %}{{ m.content }}{% endgeneration %}",
    "is broken": "{% for",
}
TEXTS = ("", " ", "x", " y\n", "</think> z", "<|im_end|>", "\ue0f21\ue0f3", "{{ 1 }}", "\ue0f0", "<b>&amp;")
ROLES = ("system", "user", "assistant", "tool")


def renderers(template: str) -> tuple[ChatRenderer, ChatRenderer]:
    """With skeletons where the template allows it, and without."""
    tokenizer = byte_level(template)
    fast, slow = ChatRenderer(tokenizer, template), ChatRenderer(tokenizer, template)
    slow.skeletons = None
    return fast, slow


def outcome(render: Any) -> Any:
    try:
        return render()
    except Exception as error:
        return type(error), str(error), getattr(error, "found", "")


@pytest.mark.parametrize("name", COPYING)
def test_filled_skeletons_are_what_the_template_writes(name: str) -> None:
    fast, slow = renderers(COPYING[name])
    assert fast.skeletons is not None
    calls = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'
    texts = st.sampled_from(TEXTS) | st.text(max_size=9)
    turn = st.builds(Turn, st.sampled_from(ROLES), texts, st.just("")) | st.builds(
        Turn, st.just("assistant"), texts, st.just(calls)
    )

    @given(turns=st.lists(turn, min_size=1, max_size=4), tools=st.sampled_from(("", '[{"name": "f"}]')), generate=st.booleans())
    @settings(max_examples=150, deadline=None)
    def check(turns: list[Turn], tools: str, generate: bool) -> None:
        for _ in range(2):
            fills = [outcome(lambda one=one: one._render(turns, tools, generate=generate)) for one in (fast, slow)]
            assert fills[0] == fills[1]

    check()
    assert fast.skeletons.known


REPEATS = LOOP % "<{{ m.role }}>{{ m.content }}" + "{% if not add_generation_prompt %}{{ messages[0].content }}{% endif %}"
HIDES_EARLIER = LOOP % "<{{ m.role }}>{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %}"


@pytest.mark.parametrize("template", [*COPYING.values(), REPEATS, HIDES_EARLIER], ids=[*COPYING, "repeats", "hides earlier"])
def test_a_response_behind_a_known_opening_is_what_the_template_writes(template: str) -> None:
    """Also where it repeats the prompt behind the response, leaves something out once more follows, or refuses the turns."""
    fast, slow = renderers(template)
    assert fast.skeletons is not None
    texts = st.sampled_from(TEXTS) | st.text(max_size=9)
    turn = st.builds(Turn, st.sampled_from(ROLES), texts, st.just(""))
    answers = st.lists(st.builds(Turn, st.just("assistant"), texts, st.just("")), min_size=1, max_size=3)

    @given(
        prompt=st.lists(turn, min_size=1, max_size=3).map(tuple),
        answers=answers,
        tools=st.sampled_from(("", '[{"name": "f"}]')),
    )
    @settings(max_examples=100, deadline=None)
    def check(prompt: tuple[Turn, ...], answers: list[Turn], tools: str) -> None:
        for answer in answers:
            found = [outcome(lambda one=one, answer=answer: one.response(prompt, (answer,), tools)) for one in (fast, slow)]
            assert found[0] == found[1]

    check()


def test_a_response_of_a_known_kind_is_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = renderers(CHATML)
    fast.response((Turn("user", "one"),), (Turn("assistant", "two"),), "")
    wanted = slow.response((Turn("user", "three"),), (Turn("assistant", "four"),), "")
    monkeypatch.setattr(fast, "_rendered", pytest.fail)
    assert fast.response((Turn("user", "three"),), (Turn("assistant", "four"),), "") == wanted


def test_a_conversation_of_a_known_kind_is_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, _ = renderers(CHATML)
    fast.prompt((Turn("user", "one"),), "")
    monkeypatch.setattr(fast, "_rendered", pytest.fail)
    assert fast.prompt((Turn("user", "two"),), "").parts == (
        ("<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n", False),
    )


@pytest.mark.parametrize("name", LOOKING)
def test_a_template_that_looks_at_contents_is_rendered_every_time(name: str) -> None:
    assert not only_copies(LOOKING[name])


@pytest.mark.parametrize("name", COPYING)
def test_nothing_but_the_contents_differs_between_conversations_of_a_kind(name: str) -> None:
    """The law that `only_copies` stands for: contents are holes, and no more."""
    template = COPYING[name]
    _, slow = renderers(template)
    for roles in product(("user", "assistant"), repeat=2):
        marks = [Turn(role, f"\ue0f5{place}\ue0f6") for place, role in enumerate(roles)]
        text = outcome(lambda marks=marks: slow._render(marks, ""))
        for first, second in product(TEXTS[1:5], repeat=2):
            found = outcome(lambda a=first, b=second, roles=roles: slow._render((Turn(roles[0], a), Turn(roles[1], b)), ""))
            assert found == (
                text.replace("\ue0f50\ue0f6", first).replace("\ue0f51\ue0f6", second) if isinstance(text, str) else text
            )
