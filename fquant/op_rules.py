"""Rules for models: which operands of which operations are quantized how.

An `OpRule` matches by the path of the module whose forward is running, by the class of the modules
around, and by the operation; the first rule of a list that matches decides. `w8a8()` and the like
return such lists, to be put behind rules of one's own.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

from torch import Tensor

from fquant.formats import Format, require_format
from fquant.interception.operation import Layout
from fquant.observers import MaxObserver, MinMaxObserver, Observer
from fquant.presets import E4M3
from fquant.spec import QuantSpec


@dataclass(frozen=True)
class Quantizer:
    """How one operand is quantized: its grid, what watches it, and which values share a scale.

    Attributes:
        spec: the grid, a `QuantSpec` or another `Format`; its `axis` counts only with `per="axis"`.
        per: what has a scale of its own: "tensor"; "channel", the axis that the operation's layout says
            (output channels for weights); "token", everything but the channel axis, which needs
            `dynamic`; or "axis", `spec.axis` as it stands.
        dynamic: take the range from the tensor itself at every call, instead of from calibration.
        observer: what collects the range in calibration; its `axis` follows from `per`, its `block`
            and the grid that a histogram is read out for (its `spec`) from spec. `MaxObserver`, or
            `MinMaxObserver` for an asymmetric range, unless given.
        learn: whether the scale is meant to be trained (`fquant.split_qstate`), and by which
            derivative: True, that of clipping (`fquant.fake_quantize`); "lsq", with LSQ's gradient scale
            (`fquant.fake_quantize_lsq`); "pact", that of the clipping end `scale * q_max`
            (`fquant.learned_clip`), on an unsigned grid. The values are the same for all. True and
            "pact" give the derivative by the step, `q_max` times that by amax: to train amax at a rate
            with SGD, train the step at `rate / q_max^2`, as a parameter group of its own.
        groups: the first axis is taken apart into (groups, rest) before axes count; set by plans.
        symmetric: False for a range from the smallest to the largest value, with a zero point.

    With `per="token"`, `spec.block` is how many neighbours along the channel axis share a scale. Groups
    of a linear layer's weight along its inputs are `Quantizer(QuantSpec(4, axis=(0, 1), block=(1, 32)),
    "axis")`; with "channel" a block is of output channels.

    Raises:
        TypeError: spec is no Format, or observer no Observer.
        ValueError: per or learn is unknown; per token without dynamic; an asymmetric range with a grid
            that is not of integers, an observer that has no `range`, or a learned scale of another kind
            than clipping; PACT on a signed grid.

    Example:
        >>> frames = fquant.Quantizer(fquant.QuantSpec(block=8), "token", dynamic=True)
        >>> asymmetric = fquant.Quantizer(fquant.QuantSpec(unsigned=True), symmetric=False)
    """

    spec: Format = QuantSpec()  # noqa: RUF009  # immutable
    per: str = "tensor"
    dynamic: bool = False
    observer: Observer = MaxObserver()  # noqa: RUF009  # immutable
    learn: bool | str = False
    groups: int = 1
    symmetric: bool = True

    def __post_init__(self) -> None:
        require_format("Quantizer", self.spec)
        if not hasattr(self.observer, "update"):
            raise TypeError(
                "Quantizer: observer must be an Observer, such as HistogramObserver(method='mse'), "
                f"got {self.observer!r}."
            )
        if self.per not in ("tensor", "channel", "token", "axis"):
            raise ValueError(
                f"Quantizer: per must be 'tensor', 'channel', 'token' or 'axis', got {self.per!r}."
            )
        if self.per == "token" and not self.dynamic:
            raise ValueError(
                "Quantizer: per must be 'token' with dynamic=True only, because batches differ in "
                "their tokens, got dynamic=False."
            )
        if self.learn not in (False, True, "lsq", "pact"):
            raise ValueError(
                f"Quantizer: learn must be False, True, 'lsq' or 'pact', got {self.learn!r}."
            )
        if self.learn == "pact" and not getattr(self.spec, "unsigned", False):
            raise ValueError(f"Quantizer: spec must be unsigned for 'pact', got {self.spec}.")
        if not self.symmetric:
            self._require_asymmetric()

    def _require_asymmetric(self) -> None:
        if self.observer == MaxObserver():
            object.__setattr__(self, "observer", MinMaxObserver())
        for what, value, right in (
            ("spec", self.spec, isinstance(self.spec, QuantSpec) and self.spec.block is None),
            ("observer", self.observer, hasattr(self.observer, "range")),
            ("learn", self.learn, isinstance(self.learn, bool)),
        ):
            if not right:
                raise ValueError(
                    "Quantizer: symmetric must be True but for a QuantSpec without blocks, an observer "
                    f"with a range, and learn False or True, got {what}={value!r}."
                )

    def range_of(self, state: Any) -> tuple[Tensor, Tensor]:
        """Returns (minimum, maximum) of what the observer of an asymmetric range saw."""
        observer: Any = self.observer
        return observer.range(state)

    def at(self, layout: Layout, rank: int) -> Self:
        """Returns the quantizer with the axes of an operand's layout in spec and observer."""
        axis: Any = self.spec.axis
        block: Any = getattr(self.spec, "block", None)
        groups = 1
        if self.per == "tensor":
            axis = None
        elif self.per == "channel":
            axis, groups = layout.axis, layout.groups
        elif self.per == "token":
            channel = layout.axis if isinstance(layout.axis, int) else -1
            axis = tuple(a for a in range(rank) if a != channel % rank)
            if isinstance(block, int):
                axis = tuple(range(rank))
                block = tuple(block if a == channel % rank else 1 for a in axis)
        spec: Any = replace(cast(QuantSpec, self.spec), axis=axis)  # any format is a dataclass
        if block is not None:
            spec = replace(spec, block=block)
        observer: Any = self.observer
        for name, value in (("axis", axis), ("block", block), ("spec", self.spec)):
            if getattr(observer, name, value) != value:
                observer = replace(observer, **{name: value})
        if block is not None and not self.dynamic and not hasattr(observer, "block"):
            raise ValueError(f"Quantizer: observer must know blocks for {spec}, got {observer}.")
        return replace(self, spec=spec, observer=observer, groups=groups)


Choice = Quantizer | Format | None


@dataclass(frozen=True)
class OpRule:
    """One line of a list of rules for operations.

    Attributes:
        path: a regular expression that the whole path of the module must match ("" is the model).
        types: module classes, or their names; one of the modules around must be of one. Empty: any.
        ops: names of operations; empty for all but those that are opt-in (sums, pools, norms, ...).
        weight: how the weight is quantized: a spec (per channel), a Quantizer, or None.
        inputs: likewise for the activations that go in (a spec: per tensor).
        output: likewise for what comes out.
        share: whether a module that is called twice has one quantizer, or one per call.

    Raises:
        ValueError: path is not a regular expression.
        TypeError: weight, inputs or output is neither a spec, a Quantizer, nor None.

    Example:
        >>> first_in_float = fquant.OpRule("stem.*")
        >>> sums_too = fquant.OpRule(ops=("add",), inputs=fquant.QuantSpec())
        >>> rules = [first_in_float, sums_too, *fquant.w8a8()]
    """

    path: str = ".*"
    types: tuple[Any, ...] = ()
    ops: tuple[str, ...] = ()
    weight: Choice = None
    inputs: Choice = None
    output: Choice = None
    share: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(
                f"OpRule: path must be a regular expression, got {self.path!r} ({error})."
            ) from error
        for name, per in (("weight", "channel"), ("inputs", "tensor"), ("output", "tensor")):
            choice = getattr(self, name)
            if choice is not None and not isinstance(choice, Quantizer):
                if not hasattr(choice, "axis"):
                    raise TypeError(
                        f"OpRule: {name} must be a spec, a Quantizer or None, got {choice!r}."
                    )
                per = per if choice.axis is None else "axis"
                object.__setattr__(self, name, Quantizer(choice, per))
        for name in ("types", "ops"):
            value = getattr(self, name)
            values = (value,) if isinstance(value, str | type) else tuple(value)
            object.__setattr__(self, name, tuple(map(_class_name, values)))

    def quantizer(self, kind: str) -> Quantizer | None:
        """Returns how "weight", "inputs" or "output" is quantized; a spec has become a Quantizer."""
        return cast(Quantizer | None, getattr(self, kind))

    def matches(self, path: str, classes: Sequence[type], op: str, opt_in: bool) -> bool:
        """Whether the rule is about an operation in a module at `path`, inside modules of `classes`."""
        if self.ops and op not in self.ops:
            return False
        if not self.ops and opt_in:
            return False
        names = {_class_name(base) for cls in classes for base in cls.__mro__}
        names |= {name.rpartition(".")[2] for name in names}
        if self.types and names.isdisjoint(self.types):
            return False
        return re.fullmatch(self.path, path) is not None


def _class_name(value: Any) -> str:
    return value if isinstance(value, str) else f"{value.__module__}.{value.__qualname__}"


def w8a8(dynamic: bool = False) -> list[OpRule]:
    """Returns rules for 8-bit weights per channel and 8-bit activations per tensor.

    Args:
        dynamic: take the activations' ranges per token at run time, instead of from calibration.
    """
    return _weights_and_activations(8, 8, dynamic)


def w4a8(dynamic: bool = False) -> list[OpRule]:
    """Returns rules for 4-bit weights per channel and 8-bit activations, as `w8a8`."""
    return _weights_and_activations(4, 8, dynamic)


def w8() -> list[OpRule]:
    """Returns rules for 8-bit weights per channel; activations stay in floating point."""
    return [OpRule(weight=QuantSpec(8, narrow_range=True))]


def w4() -> list[OpRule]:
    """Returns rules for 4-bit weights per channel; activations stay in floating point."""
    return [OpRule(weight=QuantSpec(4, narrow_range=True))]


def fp8(dynamic: bool = False) -> list[OpRule]:
    """Returns rules for E4M3 weights per channel and E4M3 activations per tensor, scaled to amax.

    Args:
        dynamic: take the activations' ranges per token at run time, instead of from calibration.

    References:
        Micikevicius et al. 2022, arXiv 2209.05433.
    """
    inputs = Quantizer(E4M3, "token" if dynamic else "tensor", dynamic)
    return [OpRule(weight=Quantizer(E4M3, "channel"), inputs=inputs)]


def skip(*names_or_types: str | type) -> list[OpRule]:
    """Returns rules that leave modules in floating point, by path (and all below) or by class.

    Example:
        >>> rules = [*fquant.skip("head", torch.nn.Embedding), *fquant.w8a8()]
    """
    return [
        OpRule(rf"{re.escape(what)}(\..*)?") if isinstance(what, str) else OpRule(types=(what,))
        for what in names_or_types
    ]


def _weights_and_activations(weight_bits: int, bits: int, dynamic: bool) -> list[OpRule]:
    weight = Quantizer(QuantSpec(weight_bits, narrow_range=True), "channel")
    inputs = Quantizer(QuantSpec(bits), "token" if dynamic else "tensor", dynamic)
    return [OpRule(weight=weight, inputs=inputs)]
