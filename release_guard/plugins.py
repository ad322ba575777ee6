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
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from release_guard.errors import PolicyError, printable

_MOST_SHOWN = 120  # characters of what somebody wrote
_DEEPEST = 16  # levels of tables and lists in an option; chains of chains take five


def _shallow(value: Any, levels: int = _DEEPEST) -> Any:
    """Refuse what is nested so deep that whoever walks through it may never come back."""
    items = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | list | tuple):
        if not levels:
            raise ValueError(f"more than {_DEEPEST} tables or lists in each other")
        for item in items:
            _shallow(item, levels - 1)
    return value


Shallow = Annotated[Any, AfterValidator(_shallow)]
"""Anything that somebody may have written as an option."""


class Spec(BaseModel):
    """Which plug-in, with which options: a policy table such as `{name = "lora", rank = 8}`."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(description="File name of the plug-in, without .py.")

    @model_validator(mode="after")
    def _holds_what_can_be_walked(self) -> Self:
        _shallow(self.options)
        try:
            _ = self.parts, self.after
        except ValidationError:
            raise ValueError("`steps` and `after` list plug-ins: tables with a name") from None
        return self

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
            raise PolicyError("\n".join(map(printable, lines))) from None

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


def excerpt(value: Any) -> str:
    """What somebody wrote, as Python writes it, cut to what fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; a table in a table in
        return "something too long to show"
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} ..."


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
            lines.append(f"{where}.{key}: found {excerpt(problem['input'])}; {problem['msg']}")
    return lines
