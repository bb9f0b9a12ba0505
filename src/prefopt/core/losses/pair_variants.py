"""Facts of the losses of pairs against a reference that look at more than two log-ratios of the pair.

In the formulas c and r are the log-ratios of the chosen and of the rejected response, and m = c - r.
"""

from __future__ import annotations

from prefopt.core.losses.facts import Knob, LossFacts
from prefopt.core.losses.knobs import EVERY_READING, LABEL_SMOOTHING, READ_TOKENS, WPO, beta
from prefopt.core.losses.pairs import MARGIN, RATIOS, SIDES

_AS_DPO = beta(0.1, "price of KL, in reward per nat, as dpo's")
_TRANSPORT = beta(0.01, "reward per nat, 0.01 in the paper (fig. 2); a violated quantile is felt over 1 / beta nats")

FACTS = (
    LossFacts(
        name="odpo",
        title="DPO with an offset: the margin has to exceed what the row says",
        function="prefopt.objective.pair_variants:odpo",
        formula=f"-log sigmoid(beta m - alpha f(margin)),  f = log or identity,  {MARGIN}",
        paper="arXiv 2402.10571 (f = log; alpha = 1 in the authors' code)",
        inputs=(*RATIOS, "margin_G"),
        knobs={
            **_AS_DPO,
            "alpha": Knob(1.0, "offset in reward for a scaled margin of 1; 0 is dpo", low=0.0),
            "scaling": Knob(
                "log",
                "log: the offset is the logarithm of the row's margin, as in the paper, below 0 for margins below 1;"
                " identity: the margin itself",
                choices=("log", "identity"),
            ),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="dpop",
        title="DPO-Positive (Smaug): a penalty where the chosen response gets less likely than under the reference",
        function="prefopt.objective.pair_variants:dpop",
        formula=f"-log sigmoid(beta (c - r - penalty max(0, -c))),  {SIDES}",
        paper="arXiv 2402.13228 (penalty is lambda there)",
        inputs=RATIOS,
        knobs={
            **beta(0.3, "price of KL, in reward per nat; the paper trains its models with 0.3 and penalty 50"),
            "penalty": Knob(50.0, "nats of margin taken for each nat that the chosen response lost; 0 is dpo", low=0.0),
            **READ_TOKENS,
        },
    ),
    LossFacts(
        name="r_dpo",
        title="Length-regularised DPO: reward minus a price of each token",
        function="prefopt.objective.pair_variants:r_dpo",
        formula="-log sigmoid(beta m + alpha (tokens of chosen - tokens of rejected)),  " + MARGIN,
        paper="arXiv 2403.19159; the sign follows from its penalised objective, reward - alpha tokens, in which the reward"
        " is beta log-ratio + alpha tokens + a constant of the prompt. Some write-ups print a minus",
        inputs=(*RATIOS, "chosen_tokens_G", "rejected_tokens_G"),
        knobs={
            **_AS_DPO,
            "alpha": Knob(0.01, "price of a token, in reward; 0 is dpo", low=0.0),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="beta_dpo",
        title="DPO with a beta that follows the step's mean margin",
        function="prefopt.objective.pair_variants:beta_dpo",
        formula="-log sigmoid(beta_step m),  beta_step = beta max(0.01, 1 + alpha (mean of m - M)), no gradient,"
        f"  M = moving average over steps of the mean of m, this step's included,  {MARGIN}",
        paper="arXiv 2407.08639, batch-level beta; without its filter of pairs whose margin is far from M",
        inputs=(*RATIOS, "step_margin", "margin_mean"),
        step_wide=True,
        knobs={
            **beta(0.1, "price of KL at a mean margin of M, in reward per nat, as dpo's"),
            "alpha": Knob(0.6, "relative change of beta for each nat of the mean margin above M; 0 is dpo", low=0.0),
            "momentum": Knob(0.9, "share of M that a step keeps", low=0.0, high=1.0, high_open=True),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="cal_dpo",
        title="Calibrated DPO: implicit rewards pulled to a scale of their own",
        function="prefopt.objective.pair_variants:cal_dpo",
        formula=f"-log sigmoid(c - r) + (c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2,  {SIDES}",
        paper="arXiv 2412.14516, algorithm 1 (no beta within the sigmoid)",
        inputs=RATIOS,
        knobs={
            **beta(
                0.1,
                "the target log-ratios are +-1 / (2 beta), 5 nats; the paper searches 0.001 to 0.1, of which this one"
                " is within reach of a run",
            ),
            **READ_TOKENS,
        },
    ),
    LossFacts(
        name="tdpo",
        title="Token-level DPO: the KL of both responses at every token as well",
        function="prefopt.objective.pair_variants:tdpo",
        formula="-log sigmoid(beta (m - d)),  tdpo1: d = KL(rejected) - KL(chosen);"
        f"  tdpo2: d = alpha (KL(rejected) - KL(chosen) without gradient),  KL(reference || policy) summed over tokens,  {MARGIN}",
        paper="arXiv 2404.11999",
        inputs=(*RATIOS, "chosen_kl_G", "rejected_kl_G"),
        knobs={
            **beta(0.1, "price of KL, in reward per nat, 0.1 in the authors' recipe"),
            "version": Knob(
                "tdpo2",
                "tdpo1: the difference of both KLs; tdpo2: alpha times it, and the chosen response's KL is not trained",
                choices=("tdpo1", "tdpo2"),
            ),
            "alpha": Knob(
                0.5,
                "weight of the difference of KLs, 0.5 in the authors' recipe; 0 is dpo",
                low=0.0,
                only_with=("version", "tdpo2"),
            ),
            **WPO,
        },
    ),
    LossFacts(
        name="soft_dpo",
        title="DPO on soft labels: the cross-entropy of each row's probability",
        function="prefopt.objective.pair_variants:soft_dpo",
        formula=f"-p log sigmoid(beta m) - (1 - p) log sigmoid(-beta m),  p = the row's probability,  {MARGIN}",
        paper="cDPO with a label of its own for each row; arXiv 2409.06691 compares it with other losses of soft labels",
        inputs=(*RATIOS, "probability_G"),
        knobs={**_AS_DPO, **EVERY_READING},
    ),
    LossFacts(
        name="rao_kupper",
        title="DPO with ties after Rao and Kupper: a winner has to lead by log(nu)",
        function="prefopt.objective.ties:rao_kupper",
        formula="-log P,  P(chosen wins) = sigmoid(d - log nu),"
        f"  P(tie) = (nu^2 - 1) sigmoid(d - log nu) sigmoid(-d - log nu),  d = beta m,  {MARGIN}",
        paper="arXiv 2409.17431 (DPO-RK)",
        inputs=(*RATIOS, "tie_G"),
        knobs={
            **_AS_DPO,
            "nu": Knob(
                3.0,
                "3, as in the paper: equally good responses tie half of the time, (nu - 1) / (nu + 1); towards 1 it is dpo",
                low=1.0,
                low_open=True,
            ),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="davidson",
        title="DPO with ties after Davidson: ties in proportion to the geometric mean of both strengths",
        function="prefopt.objective.ties:davidson",
        formula="-log P,  P(chosen wins) = 1 / (1 + exp(-d) + 2 nu exp(-d / 2)),"
        f"  P(tie) = 2 nu exp(-d / 2) P(chosen wins),  d = beta m,  {MARGIN}",
        paper="arXiv 2409.17431 (DPO-D)",
        inputs=(*RATIOS, "tie_G"),
        knobs={
            **_AS_DPO,
            "nu": Knob(
                1.0,
                "1, as in the paper: equally good responses tie half of the time, nu / (1 + nu); towards 0 it is dpo",
                low=0.0,
                low_open=True,
            ),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="aot",
        title="Alignment via Optimal Transport of pairs: the policy's log-odds above the reference's at every quantile",
        function="prefopt.objective.transport:aot",
        formula="mean over quantiles q of -(1 - e) log sigmoid(beta (P_q - R_q)) - e log sigmoid(-beta (P_q - R_q)),"
        "  P, R = log-prob of chosen - log-prob of rejected, under policy and reference, each sorted over the step",
        paper="arXiv 2406.05882 (paired, logistic violation); label_smoothing as in TRL",
        inputs=("chosen_logp_G", "rejected_logp_G", "chosen_reference_G", "rejected_reference_G"),
        unit="step",
        step_wide=True,
        knobs={**_TRANSPORT, **LABEL_SMOOTHING},
    ),
    LossFacts(
        name="aot_unpaired",
        title="Alignment via Optimal Transport without pairs: desirable above undesirable log-ratios at every quantile",
        function="prefopt.objective.transport:aot_unpaired",
        formula="mean over quantiles q of -(1 - e) log sigmoid(beta (D_q - U_q)) - e log sigmoid(-beta (D_q - U_q)),"
        "  D, U = log-ratios of desirable and of undesirable responses, each sorted over the step",
        paper="arXiv 2406.05882 (unpaired, logistic violation); label_smoothing as in TRL",
        inputs=("ratio_S", "desirable_S"),
        unit="step",
        step_wide=True,
        knobs={**_TRANSPORT, **LABEL_SMOOTHING},
    ),
)
