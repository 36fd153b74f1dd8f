"""Settings that are lists, such as the sources of a mixture."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs import (
    ConfigError,
    DataConfig,
    WeightedSource,
    flatten,
    parse_config,
    read_config,
    to_yaml,
)
from configs.fields import KEYS, Field, fields_of
from configs.load import parse_arguments

MIXTURE = "data.sources=[{source: text, path: a.txt, weight: 3}, {}]"


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a directory with a text file, without torchrun."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    Path("a.txt").write_text("text")


def test_a_list_is_written_the_same_in_a_file_and_on_the_command_line() -> None:
    """In a file it may also stand on several lines."""
    Path("flow.yaml").write_text(f"data:\n  {MIXTURE.removeprefix('data.').replace('=', ': ', 1)}")
    Path("block.yaml").write_text(
        "data:\n  sources:\n    - source: text\n      path: a.txt\n      weight: 3\n    - {}\n"
    )
    expected = (WeightedSource("text", "a.txt", weight=3.0), WeightedSource())
    for arguments in (["config=gpt_debug", MIXTURE], ["config=flow"], ["config=block"]):
        assert parse_config(arguments).data.sources == expected


def test_a_list_survives_being_written_and_read() -> None:
    """In config.yaml of the run, and in the JSON of a checkpoint."""
    config = parse_config(["config=gpt_debug", MIXTURE])
    Path("config.yaml").write_text(to_yaml(config))
    assert read_config(Path("config.yaml")) == config
    assert json.loads(json.dumps(flatten(config))) == flatten(config)


def test_the_single_keys_are_a_mixture_of_one() -> None:
    """Code that reads text does not need to know how it was given."""
    data = DataConfig(source="jsonl", path="x", text_field="body")
    assert data.mixture == {"data": WeightedSource("jsonl", "x", "body")}
    data = DataConfig(sources=(WeightedSource(), WeightedSource("text", "b")))
    assert list(data.mixture) == ["data.sources[0]", "data.sources[1]"]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            "[{wieght: 2}]",
            "data.sources[0].wieght=2: there is no key data.sources[0].wieght; did you mean data."
            "sources[0].weight?",
        ),
        (
            "[{}, {a: 2}]",
            "data.sources[1].a=2: there is no key data.sources[1].a; the keys of "
            "data.sources[1] are: source, path",
        ),
        ("[{source: txt}]", "data.sources[0].source=txt is not one of python_stdlib, text"),
        ("[{source: text}]", "data.sources[0].path=null, but data.sources[0].source=text needs"),
        ("[{source: text, path: b}]", "data.sources[0].path=b does not exist; give an existing"),
        ("[{path: a.txt}]", "data.sources[0].path=a.txt has no effect with data.sources[0].source"),
        ("[{weight: 0}]", "data.sources[0].weight=0.0 is out of range; it must be more than 0"),
        ("[{weight: 1e999}]", "data.sources[0].weight=1e999 is not a finite number"),
        ("[{weight: [1]}]", "data.sources[0].weight=[1] is not a finite number"),
        (
            "[{weight: !!python/name:os.system 1}]",
            "data.sources=[{weight: !!python/name:os.system 1}] is not valid YAML",
        ),
        ("[{text_field: ' '}]", "data.sources[0].text_field is empty; give a value"),
        ("[{weight: 1, weight: 2}]", "data.sources[0].weight is already set; remove one"),
        (
            "[{source:text,path:docs}]",
            "data.sources[0] has source:text; write 'source: text', with a space",
        ),
        ("[a.txt]", "data.sources[0]=a.txt is not a mapping {source, path"),
        ("a.txt", "data.sources=a.txt is not a list [a mapping {source, path"),
        ("[{", "data.sources=[{ is not valid YAML"),
        ("null", "data.sources=null is not a list"),
        ("{source: text}", "data.sources={...} is not a list"),
    ],
)
def test_a_wrong_list_is_refused(sources: str, message: str) -> None:
    """The error names the item, the problem and what is allowed."""
    with pytest.raises(ConfigError) as caught:
        parse_config(["config=gpt_debug", f"data.sources={sources}"])
    assert str(caught.value).startswith(message)


def test_a_wrong_item_in_a_file_is_found_by_its_line() -> None:
    """The line of the key."""
    Path("mine.yaml").write_text("data:\n  sources:\n    - source: text\n      path: b\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:4: data.sources\[0\].path=b does not exist"):
        parse_config(["config=mine"])
    Path("mine.yaml").write_text("data:\n  sources:\n    - {}\n    - weight: x\n")
    with pytest.raises(ConfigError, match=r"mine.yaml:4: data.sources\[1\].weight=x is not a fin"):
        parse_config(["config=mine"])


def test_sources_and_the_single_keys_exclude_each_other() -> None:
    """One of the two would have no effect."""
    with pytest.raises(ConfigError, match=r"^data.text_field=body has no effect together with"):
        parse_config(["config=gpt_debug", MIXTURE, "data.text_field=body"])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ((), ("stream", False, False)),
        (("data.inter_document_masking=true",), ("stream", True, True)),
        (("data.source=hub", "data.path=x", "data.format=messages"), ("best_fit", True, True)),
        (
            ("data.sources=[{}, {source: hub, path: x, format: messages}]",),
            ("best_fit", True, True),
        ),
        (
            ("data.source=hub", "data.path=x", "data.format=messages", "data.sequence_mode=pad"),
            ("stream", False, False),
        ),
    ],
)
def test_the_format_decides_how_rows_are_packed(more: tuple[str, ...], expected: object) -> None:
    """Unless it is given; config.yaml has the result."""
    config = parse_config(["config=gpt_debug", *more])
    data = config.data
    assert (data.packing, data.inter_document_masking, data.masks_documents) == expected
    Path("config.yaml").write_text(to_yaml(config))
    assert read_config(Path("config.yaml")) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2]", (1, 2)),
        ("[1e1, 1_0]", (10, 10)),
        ("null", None),
        ("[1]", "pair=[1] is not a list [an integer, an integer] or null"),
        ("[1, x]", "pair[1]=x is not an integer; write for example 100"),
        ("[1, null]", "pair[1]=null is not an integer"),
        ("12", "pair=12 is not a list [an integer, an integer] or null"),
    ],
)
def test_a_list_of_numbers(text: str, expected: object) -> None:
    """Its items are converted like single numbers."""
    field = Field("pair", tuple[int, int], default=None, nullable=True)
    if not isinstance(expected, str):
        assert parse_arguments([f"pair={text}"], {"pair": field}) == {"pair": expected}
        return
    with pytest.raises(ConfigError) as caught:
        parse_arguments([f"pair={text}"], {"pair": field})
    assert str(caught.value).startswith(expected)


def test_the_fields_of_a_source_are_keys() -> None:
    """They have the types and defaults of the single keys."""
    fields = fields_of(WeightedSource)
    assert fields.pop("weight").default == 1.0
    for leaf, field in fields.items():
        key = KEYS[f"data.{leaf}"]
        assert dataclasses.replace(field, name=key.name, owner=key.owner) == key
        assert field.comment == key.comment


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("[10, 12]", (10, 12)),
        ("[7, 7]", (7, 7)),
        ("null", None),
        (
            "[0, 2]",
            "logging.profile_steps=[0, 2] is not a valid step range; write the first",
        ),
        ("[5, 4]", "logging.profile_steps=[5, 4] is not a valid step range"),
        ("[1, 100000000]", "logging.profile_steps=[1, 100000000] is not a valid step range"),
        ("[5]", "logging.profile_steps=[5] is not a list [an integer, an integer]"),
        ("5", "logging.profile_steps=5 is not a list [an integer, an integer]"),
    ],
)
def test_the_steps_to_profile(steps: str, expected: object) -> None:
    """The first and the last step, from 1 on."""
    arguments = ["config=gpt_debug", f"logging.profile_steps={steps}"]
    if not isinstance(expected, str):
        assert parse_config(arguments).logging.profile_steps == expected
        return
    with pytest.raises(ConfigError) as caught:
        parse_config(arguments)
    assert str(caught.value).startswith(expected)
