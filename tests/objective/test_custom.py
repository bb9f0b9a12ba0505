"""Losses of your own: a real module on the path, read by its signature, used like any other."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from objective.made_rows import PAIR, group, judged, label, pairs, ranking, responses, scores, values
from prefopt.core.errors import ConfigError
from prefopt.core.losses.facts import INPUTS
from prefopt.core.losses.table import loss_facts, resolve_parts
from prefopt.objective.apply import Objective
from prefopt.objective.pairs import dpo
from prefopt.objective.unpaired import kto

Write = Callable[[str], str]
_names = (f"losses_of_mine_{number}" for number in itertools.count())


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a module of losses into a folder of the Python path; gives its name, each time another one."""
    monkeypatch.syspath_prepend(tmp_path)

    def writing(source: str) -> str:
        name = next(_names)
        header = "import torch\nimport torch.nn.functional as F\n\n"
        (tmp_path / f"{name}.py").write_text(header + textwrap.dedent(source), encoding="utf-8")
        return name

    return writing


PAIR_LOSS = '''
def my_loss(chosen_G, rejected_G, *, beta=0.3, power=2, curved=False):
    """Distance of the margin from 1.

    More text.
    """
    margin_G = beta * (chosen_G - rejected_G)
    return (1 - margin_G).abs() ** power if curved else (1 - margin_G) ** 2
'''


class TestFacts:
    def test_they_are_read_from_the_signature(self, write: Write) -> None:
        name = f"{write(PAIR_LOSS)}:my_loss"
        facts = loss_facts(name)
        assert facts.name == name and facts.title == "Distance of the margin from 1."
        assert facts.inputs == ("chosen_G", "rejected_G") and facts.accepts == ("pair",)
        assert facts.unit == "group" and facts.needs_reference and not facts.step_wide
        assert {key: knob.default for key, knob in facts.knobs.items()} == {"beta": 0.3, "power": 2.0, "curved": False}
        assert facts.implicit_reward == "ratio"

    @pytest.mark.parametrize(
        ("parameters", "accepts", "unit", "needs"),
        [
            ("ratio_S, desirable_S", ("label", "pair"), "response", {"needs_reference"}),
            ("ratio_S, desirable_S, kl", ("label", "pair"), "response", {"needs_reference", "needs_mismatched"}),
            ("ratio_S, reward_mean", ("label", "pair"), "response", {"needs_reference", "step_wide"}),
            ("chosen_mean_logp_G, rejected_mean_logp_G", ("pair",), "group", set()),
            ("chosen_G, rejected_G, margin_G", ("pair",), "group", {"needs_reference"}),
            ("chosen_kl_G, rejected_kl_G", ("pair",), "group", {"needs_reference", "needs_live_reference"}),
            ("ranked_GK, value_GK, present_GK", ("pair", "ranking", "scores"), "group", {"needs_reference"}),
            ("ranked_score_GK, present_GK", ("pair", "ranking", "scores"), "group", {"trains_reward_model"}),
            ("best_logp_G", ("demonstration", "label", "pair", "ranking", "scores"), "group", set()),
            ("chosen_score_G, tie_G", ("pair",), "group", {"trains_reward_model", "learns_from_ties"}),
        ],
    )
    def test_what_it_needs_follows_from_its_quantities(
        self, write: Write, parameters: str, accepts: tuple[str, ...], unit: str, needs: set[str]
    ) -> None:
        facts = loss_facts(f"{write(f'def f({parameters}): ...')}:f")
        assert facts.accepts == accepts and facts.unit == unit
        flags = (
            "needs_reference",
            "needs_mismatched",
            "needs_live_reference",
            "step_wide",
            "trains_reward_model",
            "learns_from_ties",
        )
        assert {flag for flag in flags if getattr(facts, flag)} == needs
        assert facts.columns == (("margin",) if "margin_G" in parameters else ())

    def test_a_module_says_which_of_its_losses_need_the_whole_step(self, write: Write) -> None:
        module = write("STEP_WIDE = {'wide'}\ndef wide(chosen_G): ...\ndef narrow(chosen_G): ...")
        assert loss_facts(f"{module}:wide").step_wide and not loss_facts(f"{module}:narrow").step_wide

    def test_the_working_folder_is_searched(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        (tmp_path / "losses_beside_the_recipe.py").write_text("def f(best_logp_G): return -best_logp_G", encoding="utf-8")
        assert loss_facts("losses_beside_the_recipe:f").inputs == ("best_logp_G",)


class TestTraining:
    def test_a_copy_of_a_formula_trains_like_the_formula(self, write: Write) -> None:
        module = write(
            """
            def mine(chosen_G, rejected_G, *, beta=0.1):
                return -F.logsigmoid(beta * (chosen_G - rejected_G))

            def of_responses(ratio_S, desirable_S, kl, *, beta=0.1):
                gain_S = beta * (ratio_S - kl)
                return torch.where(desirable_S, torch.sigmoid(-gain_S), torch.sigmoid(gain_S))

            def of_rankings(ranked_GK, present_GK, *, beta=0.1):
                lead_GK = (beta * (ranked_GK - ranked_GK[:, :1])).masked_fill(~present_GK, -1e30)
                return torch.logsumexp(lead_GK, dim=1)

            def of_scores(chosen_score_G, rejected_score_G):
                return -F.logsigmoid(chosen_score_G - rejected_score_G)

            def imitate(best_logp_G, best_tokens_G):
                return -best_logp_G / best_tokens_G
            """
        )
        ragged = [group(ranking(2, 1), 1, 1), group(scores(0.0, 4.0, 2.0), 1, 1, 1), group(PAIR, 1, 1)]
        cases: list[tuple[str, dict[str, Any], list[Any]]] = [
            ("mine", {"name": "dpo", "beta": 0.7}, pairs(3)),
            ("of_responses", {"name": "kto", "beta": 0.7}, [group(label(True), 1), group(label(False), 1), group(PAIR, 1, 1)]),
            ("of_rankings", {"name": "best_of_k", "beta": 0.7}, ragged),
            ("of_scores", {"name": "reward", "centering": 0.0}, pairs(3)),
            ("imitate", {"name": "sft"}, pairs(3)),
        ]
        numbers = (-1.0, -2.5, -0.3, -0.7, -1.9, -2.2, -0.1)
        for function, theirs, rows in cases:
            options = {"name": f"{module}:{function}", **({"beta": 0.7} if "beta" in theirs else {})}
            count = responses(rows)
            at = values(*numbers[:count])
            more = () if function == "of_scores" else (torch.full((count,), -1.0, dtype=torch.float64),)
            extra = {} if function == "of_scores" else {"mismatch": 0.4}
            mine, wanted = judged(options, rows, at, *more, **extra), judged(theirs, rows, at, *more, **extra)
            assert mine.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-12), function
            assert torch.allclose(torch.autograd.grad(mine.loss, at)[0], torch.autograd.grad(wanted.loss, at)[0], rtol=1e-12)
            assert torch.allclose(mine.reward_S, wanted.reward_S, equal_nan=True)

    def test_options_come_from_the_recipe(self, write: Write) -> None:
        name = f"{write(PAIR_LOSS)}:my_loss"
        rows = pairs(1)
        policy_N, reference_N = values(-1.0, -3.0), values(-2.0, -2.0)
        assert judged({"name": name}, rows, policy_N, reference_N).loss.item() == pytest.approx((1 - 0.6) ** 2)
        options = {"name": name, "beta": 1.0, "power": 3, "curved": True}
        assert judged(options, rows, policy_N, reference_N).loss.item() == pytest.approx(1.0)

    def test_it_mixes_with_the_others(self, write: Write) -> None:
        name = f"{write(PAIR_LOSS)}:my_loss"
        policy_N, reference_N = values(-1.0, -3.0), values(-2.0, -2.0)
        mix = {"dpo": 1.0, name: {"weight": 0.5, "power": 2}, "beta": 0.2}
        outcome = judged(mix, pairs(1), policy_N, reference_N)
        wanted = dpo(values(1.0), values(-1.0), beta=0.2).item()
        assert list(outcome.parts) == ["dpo", name]
        assert outcome.loss.item() == pytest.approx(wanted + 0.5 * (1 - 0.4) ** 2, rel=1e-12)
        assert Objective({name: 1.0}).name == name

    def test_running_statistics_are_there_by_name(self, write: Write) -> None:
        """reward_mean is that of bco, with this loss's beta."""
        name = f"{write('def f(ratio_S, reward_mean, *, beta=2.0): return (beta * ratio_S - reward_mean) ** 2')}:f"
        objective = Objective({"name": name})
        outcome = judged({"name": name}, pairs(1), values(-1.0, -3.0), values(-2.0, -2.0), learn=True)
        assert outcome.loss.item() == pytest.approx(4.0) and list(objective.state()) == [f"{name}.reward_mean"]

    @pytest.mark.parametrize("result", ["loss_G.mean()", "loss_G[:1]", "loss_G[:, None]", "loss_G.sum().item()"])
    def test_anything_but_one_loss_a_group_is_refused(self, write: Write, result: str) -> None:
        """A mean would be spread over the groups and averaged again: no error, and another loss in every micro-batch."""
        module = write(f"def f(chosen_G, rejected_G):\n    loss_G = rejected_G - chosen_G\n    return {result}")
        with pytest.raises(ConfigError, match=r"gave .*, and it must be a tensor of shape \(2,\)") as refused:
            judged({"name": f"{module}:f"}, pairs(2), values(-1.0, -2.0, -3.0, -4.0), values(-1.0, -1.0, -1.0, -1.0))
        assert refused.value.todo == "Return one loss a group, without a mean."

    def test_a_loss_of_responses_gives_one_a_response(self, write: Write) -> None:
        module = write("def f(ratio_S, desirable_S):\n    return ratio_S[desirable_S]")
        with pytest.raises(ConfigError, match=r"gave \(2,\), and it must be a tensor of shape \(4,\)"):
            judged({"name": f"{module}:f"}, pairs(2), values(-1.0, -2.0, -3.0, -4.0), values(-1.0, -1.0, -1.0, -1.0))


class TestRefusals:
    @pytest.mark.parametrize(
        ("source", "what", "todo"),
        [
            ("def f(chosen_g, rejected_G): ...", "its parameter chosen_g is no known quantity", 'did you mean "chosen_G"?'),
            ("def f(chosen_G, beta=0.1): ...", "its parameter beta is no known quantity", "Options are keyword-only, after *."),
            ("def f(*everything): ...", "its parameter everything is no known quantity", "Quantities: chosen_G"),
            ("def f(chosen_G, **options): ...", "its parameter options is no known quantity", "keyword-only"),
            ("def f(*, beta=0.1): ...", "it takes no quantity", "Name some as positional parameters: chosen_G"),
            ("def f(chosen_G, *, beta): ...", "its option beta has no default that is a number", "For example beta=0.1."),
            ("def f(chosen_G, *, layers=(1, 2)): ...", "its option layers has no default that is a number", "For example"),
            ("def f(chosen_G, *, weight=1.0): ...", "its option weight has a name that means something else", "Rename it"),
            ("def f(chosen_G, *, ld_alpha=1.0): ...", "its option ld_alpha has a name that means something else", "reduce"),
            (
                "def f(ratio_S, tie_G): ...",
                "it takes ratio_S, of each response, and tie_G, of each group",
                "chosen_G and rejected_G",
            ),
            ("def g(chosen_G): ...", "has no function f", ""),
            ("def ff(chosen_G): ...", "has no function f", 'did you mean "ff"?'),
            ("f = 3", "has no function f", ""),
            ("f = max", "its parameters cannot be read", "Wrap it in a function of your own."),
            ("import no_such_module_of_anyone", "cannot be imported (ModuleNotFoundError: No module named", "Name a module in"),
            ("raise ValueError('not today')", "cannot be imported (ValueError: not today)", "working folder"),
            ("def f(:", "cannot be imported (SyntaxError", "Python path"),
        ],
    )
    def test_a_function_that_is_no_loss(self, write: Write, source: str, what: str, todo: str) -> None:
        name = f"{write(source)}:f"
        with pytest.raises(ConfigError) as refused:
            Objective({"name": name})
        assert refused.value.what.startswith(f'loss "{name}": ') and what in refused.value.what
        assert todo in refused.value.todo

    def test_quantities_that_no_row_has_together(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        from prefopt.core.losses.facts import Input

        monkeypatch.setitem(INPUTS, "story_G", Input("of demonstrations alone", ("demonstration",)))
        name = f"{write('def f(chosen_G, story_G): ...')}:f"
        with pytest.raises(ConfigError, match="no kind of row has all of chosen_G, story_G"):
            loss_facts(name)

    def test_a_module_that_is_not_there(self) -> None:
        with pytest.raises(ConfigError, match=r'loss "nobodys_losses:f": nobodys_losses cannot be imported'):
            resolve_parts({"nobodys_losses:f": 1.0})
        with pytest.raises(ConfigError, match="cannot be imported"):
            resolve_parts({"name": ":f"})

    def test_an_option_that_it_has_not(self, write: Write) -> None:
        name = f"{write(PAIR_LOSS)}:my_loss"
        with pytest.raises(ConfigError, match="has no such option") as refused:
            Objective({"name": name, "powr": 3})
        assert 'did you mean "power"?' in refused.value.todo and "Options of" in refused.value.todo

    @pytest.mark.parametrize(
        ("value", "what"), [("much", "is not a number"), (True, "is not a number"), (None, "is not a number")]
    )
    def test_an_option_of_another_kind(self, write: Write, value: object, what: str) -> None:
        with pytest.raises(ConfigError, match=rf"loss\.power: .*{what}"):
            Objective({"name": f"{write(PAIR_LOSS)}:my_loss", "power": value})

    def test_text_options_take_text(self, write: Write) -> None:
        name = write("def f(chosen_G, *, mode='soft'): return chosen_G") + ":f"
        assert resolve_parts({"name": name, "mode": "1.5"})[0].knobs == {"mode": "1.5"}
        with pytest.raises(ConfigError, match=r"loss\.mode: 3 is not text"):
            resolve_parts({"name": name, "mode": 3})


def test_kto_of_the_table_and_by_its_own_name_are_one_function() -> None:
    """`module:function` reaches the formulas of the project too, without the facts of the table."""
    facts = loss_facts("prefopt.objective.unpaired:kto")
    assert facts.inputs == loss_facts("kto").inputs and facts.unit == "response"
    objective = Objective({"name": "prefopt.objective.unpaired:kto"})
    assert objective.parts[0].function is kto
