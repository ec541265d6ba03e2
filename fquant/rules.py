"""Rules: which parameter is quantized how, chosen by the path of its name."""

import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fquant.spec import QuantSpec


class UnusedRuleWarning(UserWarning):
    """A rule decided nothing: no name matched it, or earlier rules took all that did."""


@dataclass(frozen=True)
class Rule:
    """One line of a list of rules: names that match `path` get `spec`.

    Attributes:
        path: a regular expression that the whole dotted name must match.
        spec: the grid, or None to leave the tensor in floating point.

    Raises:
        ValueError: path is not a regular expression.
        TypeError: spec is neither a QuantSpec nor None.
    """

    path: str
    spec: QuantSpec | None

    def __post_init__(self) -> None:
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"Rule: path must be a regular expression, got {self.path!r} ({error})."
            ) from error
        if self.spec is not None and not isinstance(self.spec, QuantSpec):
            raise TypeError(f"Rule: spec must be a QuantSpec or None, got {self.spec!r}.")


def assign_specs(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, QuantSpec]:
    r"""Returns the spec of every name that is to be quantized; the first rule that matches decides.

    Names that no rule matches, or that a rule with spec None takes, are absent. Each rule that
    decided nothing is reported by an UnusedRuleWarning.

    Args:
        names: dotted parameter names; a parameter dict will do.
        rules: in order of precedence.

    Raises:
        TypeError: rules holds anything but Rules.

    Example:
        >>> rules = [Rule(r"head\..*", None), Rule(r".*weight", QuantSpec(axis=0))]
        >>> list(assign_specs(["conv.weight", "conv.bias", "head.weight"], rules))
        ['conv.weight']
    """
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(
                f"assign_specs: rules must be Rules of names (OpRules are for make_plan), got {rule!r}."
            )
    specs: dict[str, QuantSpec] = {}
    used = [False] * len(rules)
    for name in names:
        for i, rule in enumerate(rules):
            if re.fullmatch(rule.path, name):
                used[i] = True
                if rule.spec is not None:
                    specs[name] = rule.spec
                break
    for rule, was_used in zip(rules, used, strict=True):
        if not was_used:
            warnings.warn(f"{rule} decided no name.", UnusedRuleWarning, stacklevel=2)
    return specs
