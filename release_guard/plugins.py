"""Plug-ins: one class in one file, found by its file name; no registry.

A folder's `__init__.py` holds the contract (a direct subclass of `Plugin`); every other file beside
it holds exactly one implementation. The file name is the plug-in's only name.
"""

import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from release_guard.errors import PolicyError


class Spec(BaseModel):
    """Which plug-in, with which options: a policy table such as `{name = "lora", rank = 8}`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="File name of the plug-in, without .py.")

    @property
    def options(self) -> Mapping[str, Any]:
        """Everything beside the name, as written."""
        return self.model_extra or {}

    @property
    def label(self) -> str:
        """Short text that tells two specs of one name apart: `finetune(lr=0.01, optimizer=sgd)`.

        What is made of others reads `rescale > finetune(lr=0.01)`.
        """
        if self.parts:
            return " > ".join(part.label for part in (*self.parts, *self.after))
        options = ", ".join(f"{key}={value}" for key, value in sorted(self.options.items()))
        return f"{self.name}({options})" if options else self.name

    @property
    def parts(self) -> tuple["Spec", ...]:
        """The specs that one is made of (`steps`, tables with a name), in their order."""
        return self._specs("steps")

    @property
    def after(self) -> tuple["Spec", ...]:
        """The specs of what is done to its outcome (`after`), in their order."""
        return self._specs("after")

    @property
    def last(self) -> "Spec":
        """What it ends in: itself, or the last of what it is made of."""
        return self.parts[-1] if self.parts else self

    @property
    def family(self) -> str:
        """What it does whatever its options: its name, or `rescale>finetune`."""
        return ">".join(part.family for part in (*self.parts, *self.after)) or self.name

    def changed(self, **options: Any) -> "Spec":
        """With other options; of what is made of others, the last one has them."""
        if not self.parts:
            return Spec(name=self.name, **{**self.options, **options})
        *first, last = self.parts
        steps = [part.model_dump() for part in (*first, last.changed(**options))]
        return Spec(name=self.name, **{**self.options, "steps": steps})

    def _specs(self, option: str) -> tuple["Spec", ...]:
        found = self.options.get(option)
        if not isinstance(found, list | tuple):
            return ()
        return tuple(Spec.model_validate(each) for each in found)


class Plugin(BaseModel):
    """Base of every contract. Options are fields: a default, its bounds in the type."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    @functools.cache  # asked for every trial, held or not
    def available(cls) -> tuple[str, ...]:
        """Names of the implementations that ship beside this contract."""
        package = importlib.import_module(cls.__module__)
        return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))

    @classmethod
    def build(cls, spec: Spec, *, where: str = "") -> Self:
        """Make the plug-in a spec names.

        Args:
            spec: Name and options.
            where: Where the spec stands, to begin messages with, such as `policy.toml: attacks[2]`.

        Raises:
            PolicyError: No such plug-in, or a wrong option; one line for each problem.
        """
        if spec.name not in cls.available():
            kind = cls.__name__.lower()
            raise PolicyError(
                f"{where or kind}.name: {spec.name!r} is no {kind}; "
                f"{advise(spec.name, cls.available())}"
            )
        found = cls._implementation(spec.name)
        try:
            return found.model_validate(dict(spec.options))
        except ValidationError as error:
            lines = _option_problems(error, found, spec, where or spec.name)
            raise PolicyError("\n".join(lines)) from None

    @classmethod
    @functools.cache
    def _implementation(cls, name: str) -> type[Self]:
        module = importlib.import_module(f"{cls.__module__}.{name}")
        (found,) = (
            member
            for _, member in inspect.getmembers(module, inspect.isclass)
            if issubclass(member, cls) and member.__module__ == module.__name__
        )
        return found

    @property
    def name(self) -> str:
        """The file name, which is the plug-in's only name."""
        return type(self).__module__.rpartition(".")[2]


def advise(word: str, allowed: Iterable[str]) -> str:
    """Say what is allowed and, if something is close, what was probably meant."""
    names = sorted(allowed)
    near = difflib.get_close_matches(word, names, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}allowed: {', '.join(names) if names else 'nothing'}"


def _option_problems(
    error: ValidationError, found: type[Plugin], spec: Spec, where: str
) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            allowed = advise(key, found.model_fields)
            lines.append(f"{where}.{key}: not an option of {spec.name}; {allowed}")
        elif problem["type"] == "missing":
            lines.append(f"{where}.{key}: missing; {spec.name} needs it")
        else:
            lines.append(f"{where}.{key}: found {problem['input']!r}; {problem['msg']}")
    return lines
