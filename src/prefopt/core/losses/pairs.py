"""Facts of the losses of a chosen and a rejected response against a reference.

In the formulas c and r are the log-ratios of the chosen and of the rejected response, and m = c - r. Losses of m alone
take other divergences than the reverse KL: the constant of the prompt that those leave in the reward cancels in m.
"""

from __future__ import annotations

from dataclasses import replace

from prefopt.core.losses.facts import Knob, LossFacts
from prefopt.core.losses.knobs import EVERY_READING, LABEL_SMOOTHING, PRICE_OF_KL, READ_TOKENS, beta

RATIOS = ("chosen_G", "rejected_G")
MARGIN = "m = (log-ratio of chosen) - (log-ratio of rejected)"
SIDES = "c, r = log-ratio of chosen, of rejected"

_FLIPPED = LABEL_SMOOTHING["label_smoothing"]
_CDPO = "-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m)"

FACTS = (
    LossFacts(
        name="dpo",
        title="Direct Preference Optimization; with label_smoothing > 0 it is cDPO",
        function="prefopt.objective.pairs:dpo",
        formula=f"{_CDPO},  {MARGIN}",
        paper="arXiv 2305.18290, eq. 7; cDPO: Mitchell 2023, 'A note on DPO with noisy preferences'",
        inputs=RATIOS,
        knobs={**PRICE_OF_KL, **LABEL_SMOOTHING, **EVERY_READING},
        since="0.1",
    ),
    LossFacts(
        name="cdpo",
        title="Conservative DPO: dpo for labels of which some share is flipped",
        function="prefopt.objective.pairs:dpo",
        formula=f"{_CDPO},  {MARGIN}",
        paper="Mitchell 2023, 'A note on DPO with noisy preferences', eq. 3",
        inputs=RATIOS,
        knobs={
            **PRICE_OF_KL,
            "label_smoothing": replace(
                _FLIPPED,
                default=0.1,
                about="share e of labels believed to be flipped; the margin is pulled to log((1 - e) / e) / beta",
            ),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="robust",
        title="Robust DPO: an unbiased estimate of the loss on clean labels",
        function="prefopt.objective.pairs:robust",
        formula=f"(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e),  {MARGIN}",
        paper="arXiv 2403.00409 (the de-biased loss)",
        inputs=RATIOS,
        knobs={
            **PRICE_OF_KL,
            "label_smoothing": Knob(
                0.1,
                "share e of labels known to be flipped, 0.1 in the paper's experiments; at 0.5 labels say nothing",
                low=0.0,
                high=0.5,
                high_open=True,
            ),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="ipo",
        title="Identity Preference Optimization",
        function="prefopt.objective.pairs:ipo",
        formula="(m - 1 / (2 beta))^2,  m = (log-ratio of chosen) - (log-ratio of rejected)",
        paper="arXiv 2310.12036, eq. 17 (tau there is beta here)",
        inputs=RATIOS,
        reduce="choice",
        knobs={
            **beta(0.1, "strength of the regularisation; the target margin is 1 / (2 beta)"),
            "reduce": Knob(
                "mean",
                "sum: log-ratios summed over tokens, as in the paper; mean: averaged over tokens, as in TRL."
                " The same beta means different things",
                choices=("sum", "mean"),
            ),
            **EVERY_READING,
        },
        since="0.1",
    ),
    LossFacts(
        name="hinge",
        title="Hinge loss on the reward margin: pairs that are right by 1 / beta nats teach nothing more",
        function="prefopt.objective.pairs:hinge",
        formula=f"max(0, 1 - beta m),  {MARGIN}",
        paper="arXiv 2309.06657 (RSO's hinge-norm); SLiC-HF, arXiv 2305.10425 sec. 2, has log-probs in place of log-ratios",
        inputs=RATIOS,
        knobs={**beta(0.1, "1 / beta is the margin that is enough, 10 nats; RSO uses 0.05, so 20"), **EVERY_READING},
    ),
    LossFacts(
        name="sigmoid_norm",
        title="Length-normalised DPO: log-ratios averaged over tokens",
        function="prefopt.objective.pairs:dpo",
        formula=f"{_CDPO},  m of log-ratios averaged over the tokens of each response",
        paper="length-normalized DPO of Tulu 3, arXiv 2411.15124 (TRL 1.16's sigmoid_norm at label_smoothing 0)",
        inputs=RATIOS,
        reduce="mean",
        knobs={
            **beta(5.0, "price of KL, in reward per nat a token: means are smaller than sums by the length; Tulu 3 uses 5"),
            **LABEL_SMOOTHING,
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="exo",
        title="Efficient Exact Optimization: reverse KL to the smoothed preference of the pair",
        function="prefopt.objective.pairs:exo",
        formula=f"p log(p / (1 - e)) + (1 - p) log((1 - p) / e),  p = sigmoid(beta m),  {MARGIN}",
        paper="arXiv 2402.00856, eq. 16 with K = 2",
        inputs=RATIOS,
        knobs={
            **beta(0.1, "price of KL, in reward per nat, as in the paper (beta_pi there)"),
            "label_smoothing": Knob(
                1e-3,
                "smoothing e of the label, 0.001 in the paper; the margin is pulled to log((1 - e) / e) / beta",
                low=0.0,
                high=0.5,
                low_open=True,
            ),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="discopop",
        title="DiscoPOP: the log-ratio modulated loss that a language model found",
        function="prefopt.objective.pairs:discopop",
        formula=f"(1 - w) (-log sigmoid(beta m)) + w exp(-beta m),  w = sigmoid(beta m / tau),  {MARGIN}",
        paper="arXiv 2406.08414, eq. 5",
        inputs=RATIOS,
        knobs={
            **beta(0.05, "price of KL, in reward per nat; the paper trains with 0.05"),
            "tau": Knob(
                0.05,
                "width of the switch between the two parts, in reward, 0.05 in the paper;"
                " at most 1, beyond which pairs in the wrong order cost exponentially much",
                low=0.0,
                high=1.0,
                low_open=True,
            ),
            **EVERY_READING,
        },
    ),
    LossFacts(
        name="nca",
        title="Noise Contrastive Alignment of a pair: keeps the chosen response likely",
        function="prefopt.objective.pairs:nca",
        formula=f"-log sigmoid(beta c) - 0.5 log sigmoid(-beta c) - 0.5 log sigmoid(-beta r),  {SIDES}",
        paper="arXiv 2402.05369 (NCA with K = 2 and preference labels; TRL 1.16's nca_pair)",
        inputs=RATIOS,
        knobs={
            **beta(0.01, "reward per nat, 0.01 in the paper; the chosen log-ratio is pulled to log(2) / beta"),
            **READ_TOKENS,
        },
    ),
    LossFacts(
        name="bco_pair",
        title="Binary Classifier Optimization of pairs",
        function="prefopt.objective.pairs:bco_pair",
        formula=f"-log sigmoid(beta c - d) - log sigmoid(-(beta r - d)),  d = running mean of beta log-ratio over all responses"
        f" so far (TRL 1.16's bco_pair has d = 0),  {SIDES}",
        paper="arXiv 2404.04656 (the reward shift is d)",
        inputs=(*RATIOS, "reward_mean"),
        step_wide=True,
        knobs={
            **beta(0.1, "reward per nat; as for dpo, of whose loss this is an upper bound. The paper trains with 0.01"),
            **READ_TOKENS,
        },
    ),
    LossFacts(
        name="sppo",
        title="Self-Play Preference Optimization with hard labels",
        function="prefopt.objective.pairs:sppo",
        formula=f"(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2,  {SIDES}",
        paper="arXiv 2405.00675, eq. 4.7 with probabilities 1 and 0 and beta = 1 / eta (TRL 1.16's sppo_hard)",
        inputs=RATIOS,
        knobs={
            **beta(
                0.1,
                "the target log-ratios are +-1 / (2 beta), 5 nats. The paper has 0.001: 500 nats, so far off that the"
                " loss is a straight line which nothing holds to the reference",
            ),
            **READ_TOKENS,
        },
    ),
    LossFacts(
        name="apo_zero",
        title="Anchored Preference Optimization, zero: chosen up, rejected down",
        function="prefopt.objective.pairs:apo_zero",
        formula=f"1 - sigmoid(beta c) + sigmoid(beta r),  {SIDES}",
        paper="arXiv 2408.06266, eq. 7, plus 1 as in TRL",
        inputs=RATIOS,
        knobs={**beta(0.1, "reward per nat, 0.1 in the paper"), **READ_TOKENS},
    ),
    LossFacts(
        name="apo_down",
        title="Anchored Preference Optimization, down: for chosen responses worse than what the model writes",
        function="prefopt.objective.pairs:apo_down",
        formula=f"sigmoid(beta c) + 1 - sigmoid(beta (c - r)),  {SIDES}",
        paper="arXiv 2408.06266, eq. 8, plus 1 as in TRL",
        inputs=RATIOS,
        knobs={**beta(0.1, "reward per nat, 0.1 in the paper"), **READ_TOKENS},
    ),
)
