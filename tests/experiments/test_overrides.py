from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.overrides import Setting, parse_changes, settings, vary
from moe.model.config import ConfigError


@dataclass(frozen=True)
class Engine:
    power: int = 3
    weight: float | None = 1.5
    fuel: Literal["coal", "wind"] = "coal"
    gear: Literal[1, 2, 3] = 1
    parts: tuple[str, ...] = ()
    colours: tuple[Literal["red", "blue"], ...] = ("red",)
    on: bool = False
    forced: bool | None = None

    def __post_init__(self) -> None:
        if self.fuel == "wind" and self.power > 1:
            raise ConfigError(f"power={self.power}: wind gives 1")


@dataclass(frozen=True)
class Ship:
    name: str = "Ark"
    label: str | None = None
    engine: Engine = field(default_factory=Engine)
    learning_rate: float = 0.1


def after(*assignments: str) -> Ship:
    return vary(Ship(), parse_changes(Ship(), assignments))


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("engine.power=7", 7),
        ("engine.power=-1_000", -1000),
        ("engine.weight=1e-3", 1e-3),
        ("engine.weight=2", 2.0),
        ("engine.weight=none", None),
        ("engine.weight=Null", None),
        ("engine.gear=2", 2),
        ("engine.parts=a.txt, b/*.md", ("a.txt", "b/*.md")),
        ("engine.parts=", ()),
        ("engine.colours=blue,red", ("blue", "red")),
        ("engine.on=True", True),
        ("engine.forced=false", False),
        ("engine.forced=none", None),
        ("name=x=y", "x=y"),
        ("label=none", None),
        ("name=none", "none"),
        (" learning_rate = 1e-3", 1e-3),
    ],
)
def test_texts_become_typed_values(assignment, value):
    path = assignment.partition("=")[0].strip()
    changed = settings(after(assignment))[path].value
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("engine.power=1.5", r"engine.power='1.5': give a whole number$"),
        ("engine.power=true", r"engine.power='true': give a whole number$"),
        ("engine.power=none", r"engine.power='none': give a whole number$"),
        ("engine.weight=heavy", r"engine.weight='heavy': give a number or none$"),
        ("engine.weight=nan", r"engine.weight='nan': give a number or none$"),
        ("learning_rate=inf", r"learning_rate='inf': give a number$"),
        ("engine.fuel=Coal", r"engine.fuel='Coal': give one of coal, wind$"),
        ("engine.colours=red,green", r"'red,green': give a list with commas, each one of red, blue$"),
        ("engine.on=1", r"engine.on='1': give true or false$"),
        ("engine=3", r"engine is a group of settings: set one of engine.power, engine.weight,"),
        ("engine.power", r"give PATH=VALUE, such as"),
    ],
)
def test_a_value_of_the_wrong_type_is_told_what_is_expected(assignment, sentence):
    with pytest.raises(ConfigError, match=sentence):
        after(assignment)


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("power", "did you mean engine.power?"),
        ("engin.power", "did you mean engine.power?"),
        ("engine.learning_rate", "did you mean learning_rate?"),
        ("engine.powr", "did you mean engine.power?"),
        ("lerning_rate", "did you mean learning_rate?"),
        ("engine.power.horse", "there is no setting 'engine.power.horse'"),
        ("zzz", "the groups are engine"),
        ("", "there is no setting ''"),
    ],
)
def test_an_unknown_path_is_answered_with_the_nearest(path, nearest):
    with pytest.raises(ConfigError) as caught:
        after(f"{path}=1")
    assert nearest in str(caught.value)


def test_a_path_given_twice():
    with pytest.raises(ConfigError, match=r"engine.power is given twice, the second time as '2': give it once"):
        after("engine.power=1", "engine.power=2")


def test_settings_that_work_only_together_need_no_order():
    for assignments in (("engine.fuel=wind", "engine.power=1"), ("engine.power=1", "engine.fuel=wind")):
        assert after(*assignments).engine == Engine(fuel="wind", power=1)
    with pytest.raises(ConfigError, match="power=3: wind gives 1"):
        after("engine.fuel=wind")


def test_groups_vary_as_a_whole():
    assert vary(Ship(), {"engine": Engine(power=9), "name": "Argo"}) == Ship(name="Argo", engine=Engine(power=9))
    with pytest.raises(ConfigError, match="engine=3: give one Engine"):
        vary(Ship(), {"engine": 3})
    with pytest.raises(ConfigError, match="engine is given as a whole and in parts"):
        vary(Ship(), {"engine": Engine(), "engine.power": 1})


def test_python_values_are_checked_as_well():
    with pytest.raises(ConfigError, match=r"engine.power='4': give a whole number"):
        vary(Ship(), {"engine.power": "4"})


def test_the_original_stays():
    ship = Ship()
    vary(ship, {"engine.power": 5})
    assert ship == Ship()


def test_every_setting_is_listed_in_order():
    assert list(settings(Ship())) == [
        "name",
        "label",
        *(f"engine.{name}" for name in ("power", "weight", "fuel", "gear", "parts", "colours", "on", "forced")),
        "learning_rate",
    ]


def test_equal_values_have_equal_texts():
    assert Setting(float, 1).text == Setting(float, 1.0).text
    assert Setting(float | None, 1).text == Setting(float | None, 1.0).text
    assert Setting(int, 1).text == "1"


@given(
    power=st.integers(),
    weight=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    on=st.booleans(),
    colours=st.lists(st.sampled_from(["red", "blue"])).map(tuple),
)
def test_what_is_shown_can_be_given(power, weight, on, colours):
    ship = Ship(engine=Engine(power=power, weight=weight, on=on, colours=colours))
    shown = [f"{path}={setting.text}" for path, setting in settings(ship).items() if path != "label"]
    assert after(*shown) == ship
