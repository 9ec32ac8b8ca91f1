"""Makes the ``method`` section of a configuration from the options that a method describes."""

from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError

from flexlora.aggregators.registry import MethodError, load_file, method_outline
from flexlora.aggregators.settings import Option, Traits, options_of, traits_of
from flexlora.errors import FlexLoraError
from flexlora.experiment.config_section import Section

DEFAULT_METHOD = "flexlora"
FEDERATED_AVERAGING = "fedit"
"""What runs are compared with."""


class MethodConfig(Section):
    """How updates become the next global adapter; each method adds options of its own."""

    name: str = Field(
        default=DEFAULT_METHOD,
        description="A method of the package, of an installed package, or of the file `method.path`.",
    )
    path: str | None = Field(
        default=None,
        min_length=1,
        description="A Python file with a method of your own, which a run executes; null for all others.",
    )

    def options(self) -> dict[str, Any]:
        """Return the method's own options by name."""
        common = MethodConfig.model_fields
        return {name: getattr(self, name) for name in type(self).model_fields if name not in common}

    def traits(self) -> Traits:
        """Return what the rest of the package must know of the method with these options.

        Raises:
            MethodError: If the method cannot be loaded, refuses its options, or has no proper traits.
        """
        made = self.make(method_outline(self.name, self.path), _any_scaling)
        try:
            return traits_of(made)
        except Exception as error:
            raise MethodError(f"method: the traits of {self.name} cannot be read; {_in_words(error)}") from error

    def make(self, method: type, scaling: Any) -> Any:
        """Return an object of the class of this method, with these options.

        Raises:
            MethodError: If the class refuses them.
        """
        try:
            return method(scaling=scaling, **self.options())
        except FlexLoraError:
            raise
        except Exception as error:
            raise MethodError(f"method: {self.name} cannot be made from its options; {_in_words(error)}") from error


def method_model(name: str, path: str | None = None) -> type[MethodConfig]:
    """Return the section of a method, with its options as fields.

    Raises:
        MethodError: If there is no such method, its file fails, or its options are not described as they must be.
    """
    return _model_of(method_outline(name, path), name)


def read_method(value: object) -> MethodConfig:
    """Return the ``method`` section that a plain mapping describes, or the section itself.

    Raises:
        MethodError: If there is no such method, it refuses its options together, or ``value`` is no section.
        ValidationError: If an option is wrong.
    """
    if isinstance(value, MethodConfig) and type(value) is not MethodConfig:
        return value
    if isinstance(value, MethodConfig):
        value = value.model_dump(exclude_unset=True)
    if not isinstance(value, dict):
        raise MethodError(f"method: must be a section of settings, as method.name={value}; got {value!r}")
    section = method_model(*method_named(value)).model_validate(value)
    section.traits()
    return section


def method_named(section: dict[str, Any]) -> tuple[str, str | None]:
    """Return name and file of the method in a plain section; a file with one method needs no name.

    Raises:
        MethodError: If either is no text, or the file has several methods and none is named.
    """
    path, name = section.get("path"), section.get("name")
    if not isinstance(path, str | None) or not isinstance(name, str | None):
        raise MethodError(f"method: name and path must be text; got {name!r} and {path!r}")
    if path is None or name is not None:
        return name or DEFAULT_METHOD, path
    names = sorted(load_file(path))
    if len(names) > 1:
        raise MethodError(f"method.name: must say which method of {path} to take: {', '.join(names)}")
    return names[0], path


@cache
def _model_of(outline: type, name: str) -> type[MethodConfig]:
    try:
        options = options_of(outline)
    except Exception as error:  # Type hints are the user's code, which may raise anything.
        raise MethodError(f"method.name: the options of {name} cannot be read: {error}") from error
    for option_name, option in options.items():
        _check_option(f"method.name: the option {option_name} of {name}", option)
    fields: dict[str, Any] = {
        option_name: (
            option.annotation,
            Field(default=option.default, description=option.description or None, **option.rules),
        )
        for option_name, option in options.items()
    }
    taken = sorted(fields.keys() & {*MethodConfig.model_fields, *dir(MethodConfig)})
    if taken:
        raise MethodError(f"the method {name} must give its option {taken[0]} another name; this one is taken")
    fields["name"] = (
        Literal[name],  # pyright: ignore[reportInvalidTypeForm]
        Field(default=name, description=MethodConfig.model_fields["name"].description),
    )
    summary = (outline.__doc__ or "").strip().split("\n")[0]
    return create_model(f"{outline.__name__}Config", __base__=MethodConfig, __doc__=summary, **fields)


def _check_option(what: str, option: Option) -> None:
    """Raise unless a configuration can hold an option, and its default keeps its own rules.

    Raises:
        MethodError: Beginning with ``what``.
    """
    try:
        hint: Any = Annotated[option.annotation, Field(**option.rules)]  # pyright: ignore[reportInvalidTypeForm]
        adapter: TypeAdapter[Any] = TypeAdapter(hint)
    except (PydanticUserError, TypeError) as error:
        raise MethodError(
            f"{what} must have a plain type, such as bool, int, float, str, Literal[...], a tuple of them, or one of "
            f"them with None; got {option.annotation}"
        ) from error
    try:
        adapter.validate_python(option.default)
    except ValidationError as error:
        raise MethodError(
            f"{what} has a default that it refuses: {error.errors()[0]['msg']}; got {option.default!r}"
        ) from error
    except TypeError as error:
        raise MethodError(f"{what} has rules that do not suit its type: {error}") from error


def _any_scaling(rank: int) -> float:
    """Stand for the scaling rule where traits alone are asked for."""
    return 1.0


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
