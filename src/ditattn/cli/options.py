"""The command line of a verb, made from the declarations of its keys."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from ditattn.cli.settings import PANELS, CallSettings, CommandOptions, CompareSettings, Option, TuneSettings, flag, read_settings
from ditattn.errors import ConfigError

__all__ = ["command"]


def command(settings_cls: type[CallSettings], target: str) -> Callable[..., None]:
    """A function for typer, with an option for every key of `settings_cls`, whose docstring is the help text.

    Args:
        settings_cls: the keys of the verb.
        target: "module:function" that does the work, called with the settings; imported when the verb runs, so that help needs no torch.
    """
    declared = _in_order(settings_cls)

    def run(**values: Any) -> None:
        given = {key: _given(key, declared[key], values[_name(key, declared[key])]) for key in declared}
        config, debug = given.pop("config"), given.pop("debug")
        settings = read_settings(settings_cls, {key: value for key, value in given.items() if value is not None}, config)
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(settings, debug=bool(debug))

    run.__doc__ = settings_cls.__doc__
    parameters = [_parameter(key, field) for key, field in declared.items()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _in_order(settings_cls: type[CallSettings]) -> dict[str, FieldInfo]:
    """Panel by panel; within one as they are declared, but for those that are listed before another."""
    fields = {**settings_cls.model_fields, **CommandOptions.model_fields}
    keys = [key for key, field in fields.items() if _option(field).before is None]
    for key, field in fields.items():
        if (before := _option(field).before) is not None:
            keys.insert(keys.index(before), key)
    return {key: fields[key] for key in sorted(keys, key=lambda key: PANELS.index(_option(fields[key]).panel))}


def _option(field: FieldInfo) -> Option:
    return next(item for item in field.metadata if isinstance(item, Option))


def _name(key: str, field: FieldInfo) -> str:
    """Of the option: what is on by default can only be switched off."""
    return f"no_{key}" if field.default is True else key


def _given(key: str, field: FieldInfo, value: Any) -> Any:
    """The value of the key; None if the option was not given.

    Raises:
        ConfigError: an option that takes one value here, and several in other commands, was given several times.
    """
    if isinstance(value, bool):
        return (not field.default) if value else None
    if not isinstance(value, list):
        return value
    if not value or _takes_several(field):
        return value or None
    if len(value) > 1:
        raise ConfigError(f"{flag(key)} was given {len(value)} times: {', '.join(map(str, value))}. This command takes one value")
    return value[0]


def _takes_several(field: FieldInfo) -> bool:
    return _option(field).repeated or get_origin(_plain_type(field.annotation)[0]) is list


def _looks_repeatable(key: str, field: FieldInfo) -> bool:
    """True if whoever repeats the option may expect every value to count: settings, and what other commands take several of."""
    fields = (cls.model_fields.get(key) for cls in (CompareSettings, TuneSettings))
    return get_origin(_plain_type(field.annotation)[0]) is dict or any(_takes_several(other) for other in fields if other is not None)


def _parameter(key: str, field: FieldInfo) -> inspect.Parameter:
    option, name = _option(field), _name(key, field)
    kind, constraints = _plain_type(field.annotation)
    is_switch, is_list = kind is bool, _takes_several(field)
    # click would take the last of several values without a word
    counted = not is_list and _looks_repeatable(key, field)
    element, of_elements = _plain_type(get_args(kind)[0]) if get_origin(kind) is list else (kind, [])
    # mappings are typed as text, see `parse_config`
    element = element if element in (bool, int, float) else str
    bounds = [*field.metadata, *constraints, *of_elements]
    shown = typer.Option(
        # typer would add --no-strict beside --strict
        *([flag(name)] if is_switch else []),
        # a switch takes no value; without a name typer shows <bool>
        metavar="" if is_switch else option.metavar or (f"<{element.__name__}>" if counted else None),
        rich_help_panel=option.panel,
        help=option.help,
        show_default=_shown_default(option, field) or False,
        min=next((bound.ge for bound in bounds if hasattr(bound, "ge")), None),
        max=next((bound.le for bound in bounds if hasattr(bound, "le")), None),
    )
    annotation: Any = bool if is_switch else (list[element] | None if is_list or counted else element | None)  # type: ignore[valid-type]
    default = False if is_switch else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[annotation, shown])


def _shown_default(option: Option, field: FieldInfo) -> str | None:
    value = field.get_default(call_default_factory=True)
    if option.default is not None or isinstance(value, (bool, dict)) or value is None:
        return option.default
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain_type(annotation: Any) -> tuple[Any, list[Any]]:
    """A type without `None` and `Annotated`, and the constraints that were in there."""
    if get_origin(annotation) is Annotated:
        kind, inner = _plain_type(get_args(annotation)[0])
        own = [part for item in annotation.__metadata__ for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return kind, [*own, *inner]
    alternatives = [part for part in get_args(annotation) if part is not NoneType]
    if NoneType in get_args(annotation):
        return _plain_type(alternatives[0])
    return annotation, []
