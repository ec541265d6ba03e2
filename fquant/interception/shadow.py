"""A copy of a module tree that shares its tensors and tells the interpreter whose forward is running.

torch has no other way that survives everything: hooks and patched calls break Dynamo or race between
threads, and `functional_call` on the module itself swaps the user's own tensors while it runs.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fquant.interception.stack import current

_ORIGIN = "_fquant_origin"
Forwards = Mapping[type[nn.Module], Callable[..., Any]]


class _WrittenOut(nn.Module):
    """Stands in for a module that Dynamo will not have in a graph (nn.LSTM, nn.GRU)."""


def shadow_of(
    model: nn.Module, forwards: Forwards, train: bool | None = None, method: str = "forward"
) -> nn.Module:
    """Returns a copy of a module tree, tensors shared, with forwards that report their path.

    Args:
        model: not written, now or later; or a shadow, for another one like it.
        forwards: forwards to run in place of a class's own (`Ops.forwards`).
        train: the training flag of every module; None to keep each as it is.
        method: which method of the model stands behind the copy's forward.

    Raises:
        ValueError: a module has a forward of its own as an instance attribute, which would go on
            running on the original module; or the model has no such method.
    """
    if not callable(getattr(model, method, None)):
        raise ValueError(f"{type(model).__name__}: method must be a method of it, got {method!r}.")
    copy = _Copier(forwards, train, {id(model): method})
    paths = {id(module): path for path, module in model.named_modules()}
    return copy.module(model, "", paths)


class _Copier:
    def __init__(self, forwards: Forwards, train: bool | None, methods: dict[int, str]) -> None:
        self.forwards = forwards
        self.train = train
        self.methods = methods
        self.copies: dict[int, nn.Module] = {}

    def module(self, module: nn.Module, path: str, paths: dict[int, str]) -> nn.Module:
        if id(module) in self.copies:
            return self.copies[id(module)]
        origin: Any = vars(module).get(_ORIGIN)
        if origin is None and "forward" in vars(module):
            raise ValueError(
                f"module {path!r} must not have a forward set on the instance, which would go on "
                f"using the original module, got {vars(module)['forward']!r}."
            )
        if type(module).__name__ == "RecursiveScriptModule":
            return module  # compiled ahead of time: opaque, stays in floating point
        if origin is None:
            origin = (path, type(module), self._forward(module))
        written_out = origin[2] in self.forwards.values()
        recurrent = isinstance(module, nn.RNNBase)
        cls = _WrittenOut if written_out and recurrent else type(module)
        copy = object.__new__(cls)
        self.copies[id(module)] = copy
        state = dict(vars(module))
        for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            state[name] = state[name].copy()
        if recurrent and written_out:  # hold tensors that functional_call cannot swap
            state.pop("_flat_weights", None)
            state.pop("_flat_weight_refs", None)
        if self.train is not None:
            state["training"] = self.train
        # nn.TransformerEncoderLayer and nn.TransformerEncoder: never take the fused kernels, inside
        # which nothing can be seen. Dynamo would in eval mode, silently.
        if isinstance(module, nn.TransformerEncoderLayer):
            state["activation_relu_or_gelu"] = 0
        if isinstance(module, nn.TransformerEncoder):
            state["use_nested_tensor"] = False
        vars(copy).update(state)
        vars(copy)["_modules"] = {
            name: None if child is None else self.module(child, paths[id(child)], paths)
            for name, child in module._modules.items()
        }
        for name, value in state.items():
            if not name.startswith("_"):
                vars(copy)[name] = self._value(value, f"{path}.{name}" if path else name, paths)
        vars(copy)[_ORIGIN] = origin
        vars(copy)["forward"] = _reporting(copy, *origin)
        return copy

    def _forward(self, module: nn.Module) -> Callable[..., Any]:
        """What to run: a forward that is written out, for a class and subclasses that keep theirs."""
        cls = type(module)
        method = self.methods.get(id(module), "forward")
        if method == "forward":
            for base in cls.__mro__:
                if base in self.forwards and cls.forward is vars(base).get("forward"):
                    return self.forwards[base]
        return getattr(cls, method)

    def _value(self, value: Any, path: str, paths: dict[int, str]) -> Any:
        """Plain attributes: modules in lists, dicts and tuples, and bound methods of modules."""
        if isinstance(value, nn.Module):
            return self.module(value, paths.setdefault(id(value), path), paths)
        if type(value) in (list, tuple):
            return type(value)(self._value(v, f"{path}.{i}", paths) for i, v in enumerate(value))
        if type(value) is dict:
            return {k: self._value(v, f"{path}.{k}", paths) for k, v in value.items()}
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            owner = self._value(value.__self__, path, paths)
            if value.__name__ == "forward":
                return vars(owner)["forward"]
            return types.MethodType(value.__func__, owner)
        return value


def _reporting(
    copy: nn.Module, path: str, cls: type[nn.Module], forward: Callable[..., Any]
) -> Callable[..., Any]:
    def reporting(*args: Any, **kwargs: Any) -> Any:
        interpreter = current()
        if interpreter is None:
            return forward(copy, *args, **kwargs)
        interpreter.enter(path, cls)
        try:
            return forward(copy, *args, **kwargs)
        finally:
            interpreter.leave()

    return reporting
