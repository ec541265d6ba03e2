"""Scale rules: how amax becomes a step, by name. Every rule works for every format.

real                amax / q_max
bfloat16            bfloat16(amax) / q_max         adaptive block floating point
power_of_two        2^ceil(log2(amax / q_max))     nothing is clipped
power_of_two_floor  2^(floor(log2 amax) - floor(log2 q_max))   OCP MX; clips up to a binade
two_level           e4m3(amax / q_max / t) * t,  t = max amax / (448 q_max)     NVFP4
"""

RULES = ("real", "bfloat16", "power_of_two", "power_of_two_floor", "two_level")


def require_scale_rule(owner: str, rule: str) -> None:
    """Raises ValueError, listing the rules, unless `rule` is one of them."""
    if rule not in RULES:
        raise ValueError(f"{owner}: scale_rule must be one of {list(RULES)}, got {rule!r}.")
