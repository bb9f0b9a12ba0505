"""Facts of the losses that learn from the rewards of the policy's own samples."""

from __future__ import annotations

from prefopt.core.losses.facts import Knob, LossFacts

_CLIP = Knob(
    0.2, "the ratio of policy to the policy that drew a sample counts within [1 - clip, 1 + clip]", low=0.0, low_open=True
)

FACTS = (
    LossFacts(
        name="ppo",
        title="Proximal policy optimisation with a value head, against a KL penalty (RLHF)",
        function="prefopt.objective.policy_gradient:ppo",
        formula="max(-A r, -A clip(r, 1 - e, 1 + e)) + value_weight / 2 max((v - R)^2, (v_clipped - R)^2),  r = policy / old policy",
        paper="arXiv 1707.06347 eq. 7; value clipping and KL penalty as in arXiv 1909.08593 and 2203.02155",
        inputs=("logp_N", "old_logp_N", "advantage_N", "value_N", "old_value_N", "return_N"),
        knobs={
            "clip": _CLIP,
            "value_clip": Knob(
                0.2, "the value counts within this distance of what it was when the token was drawn", low=0.0, low_open=True
            ),
            "value_weight": Knob(0.1, "weight of the value head's loss", low=0.0),
        },
        unit="every token",
    ),
    LossFacts(
        name="rloo",
        title="REINFORCE with the other samples' mean reward as the baseline",
        function="prefopt.objective.policy_gradient:rloo",
        formula="max(-A r, -A clip(r, 1 - e, 1 + e)),  A = reward - mean of the prompt's other rewards,  r = policy / old policy",
        paper="arXiv 2402.14740 eq. 7; the clipped ratio serves more than one pass over the samples",
        inputs=("sampled_logp_S", "old_logp_S", "advantage_S"),
        knobs={"clip": _CLIP},
        unit="response",
    ),
    LossFacts(
        name="grpo",
        title="Group-relative policy optimisation: rewards normalised within the prompt's samples",
        function="prefopt.objective.policy_gradient:grpo",
        formula="max(-A r, -A clip(r, 1 - e, 1 + e)),  A = (reward - mean) / standard deviation of the prompt's rewards",
        paper="arXiv 2402.03300 eq. 3, with the KL penalty in the reward instead of the loss, and the mean over all tokens of a"
        " step (arXiv 2503.14476) instead of each response's own",
        inputs=("logp_N", "old_logp_N", "advantage_N"),
        advantage="group_normalised",
        knobs={"clip": _CLIP},
        unit="every token",
    ),
)
